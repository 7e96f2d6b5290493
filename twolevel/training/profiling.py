"""Where the time of a step goes: traces of some steps of a run with --profile, and a table of them."""

import contextlib
import warnings
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from twolevel import durable
from twolevel.distributed.agreement import all_gather
from twolevel.ops.ranges import JOINED, RANGES, named

WARM_UP = 3  # steps before: memory, momentum, the choice of algorithms and kernels
FOLDER, TABLE = "profile", "table.txt"
ROWS = 30  # operations of the table


class Profiling:
    """Follows a run on this rank: after WARM_UP steps it records `steps` of one epoch, and then writes them.

    Into `output`/profile: rank-R.json.gz, which chrome://tracing and Perfetto show, and table.txt of rank 0. Every
    rank calls `before_step` and `end` alike. A file that cannot be written is warned of.
    """

    def __init__(self, steps: int, output: Path, device: torch.device, rank: int, *, compiled: bool):
        self.steps, self.folder, self.device, self.rank = steps, output / FOLDER, device, rank
        self.compiled = compiled
        self.begun = 0
        self._recording = contextlib.ExitStack()
        self._profile: profile | None = None

    def before_step(self) -> str | None:
        """What there is to say, on rank 0."""
        said = self.end() if self.begun == WARM_UP + self.steps else None
        if self.begun == WARM_UP:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self._recording.enter_context(named(norms=not self.compiled))
            self._profile = self._recording.enter_context(profile(activities=activities))
        self.begun += 1
        return said

    def end(self) -> str | None:
        """Write what was recorded, unless that is done; what there is to say. A collective."""
        recorded, self._profile = self._profile, None
        number = min(self.begun - WARM_UP, self.steps)
        if recorded is None:
            return None
        self.begun = WARM_UP + self.steps + 1
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._recording.close()
        path = self.folder / f"rank-{self.rank}.json.gz"
        table = table_of(recorded, number) if self.rank == 0 else ""
        why = None
        try:
            self.folder.mkdir(exist_ok=True)
            with durable.replacing(path) as made:
                recorded.export_chrome_trace(str(made))
            if self.rank == 0:
                durable.write_text(self.folder / TABLE, table)
        except (OSError, RuntimeError) as error:
            why = getattr(error, "strerror", None) or str(error)
        failed = [(rank, said) for rank, said in enumerate(all_gather(why, self.device)) if said is not None]
        if failed:
            ranks = ", ".join(str(rank) for rank, _ in failed)
            warnings.warn(
                f"{self.folder} lacks the profile of rank {ranks}: {failed[0][1]}; the run goes on",
                stacklevel=2,
            )
        return f"{table}\nprofile     {self.folder}"

    def close(self) -> None:
        """Stop recording, whatever has happened."""
        self._profile = None
        self._recording.close()
        if self.begun <= WARM_UP:
            warnings.warn(
                f"profile={self.steps}: nothing is recorded, as the run took {self.begun} steps; "
                f"the first {WARM_UP} are left out",
                stacklevel=2,
            )


def table_of(recorded: profile, steps: int) -> str:
    """Time by range, then by operation; ranges of all threads, forward and backward together, for each step."""
    averages = recorded.key_averages()
    on_device = any(event.device_time_total for event in averages)
    times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for event in averages:
        if event.key in (*RANGES, *JOINED):
            times[event.key][0] += event.count
            times[event.key][1] += event.cpu_time_total
            times[event.key][2] += event.device_time_total
    lines = [f"{steps} steps of rank 0, a step:", f"{'range':24}{'times':>8}{'host, ms':>12}"]
    lines[-1] += f"{'device, ms':>12}" if on_device else ""
    for name in (*RANGES, *JOINED):
        if name in times:
            number, host, device = (value / steps for value in times[name])
            row = f"{name:24}{number:8.0f}{host / 1e3:12.3f}"
            lines.append(row + (f"{device / 1e3:12.3f}" if on_device else ""))
    by = "self_device_time_total" if on_device else "self_cpu_time_total"
    return "\n".join(lines) + "\n\n" + averages.table(sort_by=by, row_limit=ROWS) + "\n"
