"""The torchrun job that ranks are of: whether it has started them in place of earlier ones, whose run they go on with.

torchrun's own count (TORCHELASTIC_RESTART_COUNT) does not tell: machines that come or leave do not raise it, and it
rises too where the first ranks were refused a folder that holds another run. So a run's folder names the processes of
torchrun that have it trained. Other ranks of any of these go on with it.
"""

import contextlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

from twolevel import durable
from twolevel.distributed.agreement import all_gather

FILE = ".job"


@dataclass(frozen=True)
class Job:
    """What is known of the job on every rank; without torchrun there are no `agents` and it never goes on."""

    first: bool
    """Whether this is rank 0, which reads and writes the record."""
    process: str
    agents: list[str]
    device: torch.device

    @classmethod
    def of(cls, device: torch.device) -> "Job":
        """The job of these ranks; a collective."""
        elastic = bool(os.environ.get("TORCHELASTIC_RUN_ID"))
        own = {"process": _name(os.getpid()), "agent": _name(os.getppid()) if elastic else None}
        ranks = all_gather(own, device)
        agents = sorted({rank["agent"] for rank in ranks if rank["agent"]})
        return cls(ranks[0] == own, ranks[0]["process"], agents, device)

    def goes_on_in(self, output: Path) -> bool:
        """Whether the run in this folder is to be gone on with, as earlier ranks of the job left it; a collective."""
        found = False
        if self.first and self.agents:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                before = json.loads((output / FILE).read_text())
                found = before["process"] != self.process and not {*self.agents}.isdisjoint(before["agents"])
        return all_gather(found, self.device)[0]

    def record(self, output: Path) -> None:
        """Write into a run's folder whose it is; rank 0 does."""
        if self.agents:
            text = json.dumps({"process": self.process, "agents": self.agents})
            durable.write_text(output / FILE, text + "\n")


def _name(process: int) -> str:
    """A process by its machine, number and, where the system says, the time when it began: numbers come again."""
    began = ""
    with contextlib.suppress(OSError, IndexError):
        began = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()} {process} {began}"
