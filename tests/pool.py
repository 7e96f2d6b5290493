"""A pool of rank processes on this machine, on which every distributed test runs.

    parent                                   rank r: one process, kept from test to test
    run(body, ranks=4)  -- job file ------>  environment of torchrun, new Gloo group of 4, body()
                        <-- outcome file --  "returned" or "failed"
    once all reported   -- "finish" ------>  destroys the group, restores the process, "idle"

Only words cross the pipes; values cross in files. So a rank that hangs or dies cannot block the
parent, which waits for nothing without a limit. Upper half: the parent; lower half: a rank.
"""

import atexit
import contextlib
import faulthandler
import gc
import io
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

# torch and Gloo read these when they are loaded, and a spawned rank imports this module first.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"

import torch
import torch.distributed as dist

START_LIMIT = 180.0  # seconds; importing torch takes 2 to 4, many times that on a busy machine
FINISH_LIMIT = 10.0  # seconds to destroy a process group or to exit, which takes well under one
STACK_LIMIT = 3.0  # seconds to write a stack, which takes microseconds
STACK_SIGNAL = signal.SIGUSR2  # not SIGUSR1, Slurm's usual warning, which a body may handle
STACK_END = re.compile(r" in _rank_main$|^  \.\.\.$", re.M)  # in each; after 100 frames dots

# How Gloo and TCPStore say that another rank has left.
PEER_LEFT = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection (was likely )?closed|remote server", re.I
)

# What a body may change in torch: how to read it, how to set it.
TORCH_STATE: list[tuple[Callable, Callable]] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
]


class RankFailure(Exception):
    """A body raised, hung or died on some rank; the message holds that rank's traceback or stack."""


@dataclass
class Failure:
    """What went wrong on one rank.

    `what`: in a few words; `detail`: the traceback or stack; `echo`: in a few words, set if it
    happened only because another rank had left.
    """

    rank: int
    what: str
    detail: str
    echo: str = ""
    time: float = 0.0

    def __post_init__(self):
        self.time = time.monotonic()  # one clock for all processes of a machine


class RankPool:
    """`size` rank processes, each started when a run first needs it and replaced when it is lost.

    `grace`: seconds in which the other ranks must report once one rank has failed.
    """

    def __init__(self, size: int = 4, *, grace: float = 3.0):
        self.size = size
        self.grace = grace
        self._workers: list[Worker | None] = [None] * size
        self._directory: Path | None = None

    def run(
        self,
        body: Callable,
        *args,
        ranks: int = 4,
        timeout: float = 60.0,
        init: bool = True,
        **kwargs,
    ) -> list:
        """`body(*args, **kwargs)` on ranks 0 to `ranks` - 1; returns what each rank returned.

        Each body starts from the test's environment variables (and those that torchrun would set),
        working directory, sys.path and sys.argv, with torch seeded with 0 and its settings
        untouched, in a new Gloo group of `ranks` members, which is destroyed afterwards. With
        `init=False` the body makes the group itself; env:// works. Tensors arrive as leaves with
        their own data.

        Raises RankFailure if the body raises (SystemExit too), dies, or runs longer than `timeout`
        seconds on any rank; ValueError for `ranks` outside the pool; TypeError for a body that is
        not a function at the top of a module, or an argument that cannot be pickled.
        """
        __tracebackhide__ = True
        if not 1 <= ranks <= self.size:
            raise ValueError(f"ranks={ranks} is not in this pool; use 1 to {self.size}")
        job = _job(body, args, kwargs, ranks, init)
        workers = self._start(ranks)
        directory = Path(tempfile.mkdtemp(prefix="run-", dir=self._directory))
        try:
            (directory / "job").write_bytes(job)
            for worker in workers:
                worker.begin(directory)
            self._await_reports(workers, timeout)
            failures = self._failures(workers, timeout) or self._unfinished(workers)
            if failures:
                raise RankFailure(_describe(body, ranks, failures))
            return [worker.outcome() for worker in workers]
        finally:
            self._release(workers)
            shutil.rmtree(directory, ignore_errors=True)

    def close(self) -> None:
        """Ends the processes; a later run starts new ones."""
        atexit.unregister(self.close)
        workers = [worker for worker in self._workers if worker]
        self._workers = [None] * self.size
        for worker in workers:
            if worker.phase == "idle":
                worker.pipe.close()  # the rank returns when it reads the end
            else:
                worker.kill()
        for worker in workers:
            worker.process.join(FINISH_LIMIT)
            worker.kill()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _start(self, ranks: int) -> list["Worker"]:
        """The first `ranks` ranks, idle; those missing are started."""
        __tracebackhide__ = True
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="rank-pool-"))
            atexit.register(self.close)  # runs before multiprocessing's own, which waits forever
        for rank in range(ranks):
            worker = self._workers[rank]
            if worker:
                worker.listen()
            if worker is None or worker.phase == "died":
                self._workers[rank] = Worker(rank, self._directory)
        workers = self._workers[:ranks]
        _listen(workers, lambda worker: worker.phase != "starting", START_LIMIT)
        for worker in workers:
            if worker.phase != "idle":
                worker.kill()
                raise RankFailure(f"rank {worker.rank} did not start; it {worker.death()}")
        return workers

    def _await_reports(self, workers: list["Worker"], timeout: float) -> None:
        """Until every rank has reported; at most `timeout`, and `grace` after a first failure."""

        def all_reported_or_one_failed(_):
            reports = [worker.report for worker in workers]
            return None not in reports or "failed" in reports or "died" in reports

        deadline = time.monotonic() + timeout
        _listen(workers, all_reported_or_one_failed, timeout)
        if any(worker.report in ("failed", "died") for worker in workers):
            for worker in workers:
                worker.finish()  # so that ranks that wait for one that has returned notice
            limit = min(self.grace, deadline - time.monotonic())
            _listen(workers, lambda worker: worker.report is not None, limit)

    def _failures(self, workers: list["Worker"], timeout: float) -> list[Failure]:
        """What went wrong until now on each rank."""
        failures = []
        for worker in workers:
            if worker.report == "failed":
                failures.append(worker.outcome())
            elif worker.report == "died":
                failures.append(Failure(worker.rank, worker.death(), worker.stack()))
        busy = [worker for worker in workers if worker.report is None]
        if failures:
            late = f"was still busy {self.grace:g} s after that and was ended"
            return failures + [Failure(worker.rank, late, "", echo=late) for worker in busy]
        late = f"did not return within {timeout:g} s"
        return [Failure(worker.rank, late, worker.dump_stack()) for worker in busy]

    def _unfinished(self, workers: list["Worker"]) -> list[Failure]:
        """Has the groups destroyed, which can hang if the body left work in flight."""
        for worker in workers:
            worker.finish()
        _listen(workers, Worker.is_free, FINISH_LIMIT)
        stuck = f"returned, but its process group did not end within {FINISH_LIMIT:g} s"
        return [
            Failure(worker.rank, f"returned, but then {worker.death()}", worker.stack())
            if worker.phase == "died"
            else Failure(worker.rank, stuck, worker.dump_stack())
            for worker in workers
            if worker.phase != "idle"
        ]

    def _release(self, workers: list["Worker"]) -> None:
        """Leaves only idle ranks: those that have reported may still tidy up, others are killed."""
        for worker in workers:
            if worker.phase == "busy":
                worker.kill()
            worker.finish()
        _listen(workers, Worker.is_free, FINISH_LIMIT)
        for worker in workers:
            if worker.phase != "idle":
                worker.kill()


class Worker:
    """The parent's side of one rank: its process, and what it last said.

    `phase`: starting, idle, busy, returned, failed, finishing or died.
    `report`: of this run; None, returned, failed or died.
    """

    def __init__(self, rank: int, directory: Path):
        self.rank = rank
        self.phase = "starting"
        self.report: str | None = None
        self._stacks = directory / f"stacks-{rank}"
        self._stacks.unlink(missing_ok=True)
        self._run: Path | None = None
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_rank_main, args=(rank, theirs, self._stacks), name=f"rank {rank}"
        )
        self.process.start()
        theirs.close()

    def begin(self, directory: Path) -> None:
        self.phase, self.report, self._run = "busy", None, directory
        self._send(str(directory))

    def finish(self) -> None:
        """Lets a rank that has returned destroy its group; one that failed does so by itself."""
        if self.phase == "returned":
            self.phase = "finishing"
            self._send("finish")

    def listen(self) -> None:
        """Takes in what the rank has said since, and whether it has died."""
        if self.phase == "died":
            return
        # Asked before the pipe is read, so that the last words of a dying rank are not missed.
        died = self.process.exitcode is not None
        try:
            while self.pipe.poll():
                self.phase = self.pipe.recv_bytes().decode()
                if self.phase in ("returned", "failed"):
                    self.report = self.phase
        except (EOFError, OSError):
            died = True
            self.process.join(FINISH_LIMIT)
        if died:
            self.kill()

    def kill(self) -> None:
        """Ends the process at once, with whatever it has started."""
        if self.phase == "died":
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join(FINISH_LIMIT)
        self.pipe.close()
        self.phase = "died"
        self.report = self.report or "died"

    def is_free(self) -> bool:
        return self.phase in ("idle", "died")

    def outcome(self) -> Any:
        """What the body returned, or the Failure that it ended in."""
        return pickle.loads((self._run / f"outcome-{self.rank}").read_bytes())

    def death(self) -> str:
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"died of {signal.Signals(-code).name} (exit code {code})"
        return f"died with exit code {code}"

    def stack(self) -> str:
        """What faulthandler wrote, if it did, without the addresses and the thread of the pool."""
        text = self._stacks.read_text(errors="replace") if self._stacks.exists() else ""
        threads = re.sub(r" 0x[0-9a-f]+", "", text).split("\n\n")
        return "\n\n".join(thread for thread in threads if "in _die_with_parent" not in thread)

    def dump_stack(self) -> str:
        """The Python stack of every thread of a rank that is alive."""
        deadline = time.monotonic() + STACK_LIMIT
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, STACK_SIGNAL)
        while not STACK_END.search(self.stack()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.stack() or "(no stack: the process does not take signals)"

    def _send(self, word: str) -> None:
        with contextlib.suppress(OSError):  # a rank that is gone is noticed by listen()
            self.pipe.send_bytes(word.encode())


def _listen(workers: list[Worker], done: Callable[[Worker], bool], limit: float) -> None:
    """Listens to the living until `done` holds of every worker, at most `limit` seconds."""
    deadline = time.monotonic() + limit
    while not all(done(worker) for worker in workers):
        left = deadline - time.monotonic()
        if left <= 0:
            return
        # In slices: a death is not heard while a process that the rank started holds its pipe.
        alive = [worker for worker in workers if worker.phase != "died"]
        connection.wait([worker.pipe for worker in alive], min(left, 0.2))
        for worker in alive:
            worker.listen()


def _job(body: Callable, args: tuple, kwargs: dict, ranks: int, init: bool) -> bytes:
    """What a rank must know of a run; the call itself needs the rest before it can be unpickled."""
    try:
        call = _dumps((body, args, kwargs))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"{body!r} and its arguments cannot be sent to a rank ({error}); "
            "use a function at the top of a test module, and arguments that pickle"
        ) from error
    environ = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return pickle.dumps(
        {
            "call": call,
            "environ": {**os.environ, **environ},
            "cwd": os.getcwd(),
            "sys_path": sys.path,
            "argv": sys.argv,
            "ranks": ranks,
            "init": init,
        }
    )


def free_port() -> int:
    """A port for rank 0 to listen on.

    Below the range from which the kernel serves port 0, where other processes get theirs.
    """
    draw = random.Random()  # from the system: two test sessions must not draw the same ports
    for _ in range(100):
        port = draw.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError("100 ports drawn from 20000 to 31999 were all taken")


def _describe(body: Callable, ranks: int, failures: list[Failure]) -> str:
    """The first failure in full, then the others; echoes and repetitions in one line each."""
    first, *others = sorted(failures, key=lambda failure: (bool(failure.echo), failure.time))
    lines = [
        f"{body.__module__}.{body.__qualname__} failed on rank {first.rank} of {ranks}",
        f"rank {first.rank} {first.what}\n{first.detail}",
    ]
    seen = {first.detail}
    for failure in others:
        if failure.echo:
            lines.append(f"rank {failure.rank} {failure.echo}")
        elif failure.detail in seen:
            lines.append(f"rank {failure.rank} {failure.what}, the same")
        else:
            lines.append(f"rank {failure.rank} {failure.what}\n{failure.detail}")
        seen.add(failure.detail)
    return "\n".join(lines)


class _Pickler(pickle.Pickler):
    """Sends a tensor as the bytes of its own elements, not of the storage that it is a view of.

    Unlike multiprocessing's pickler it shares no memory, so a value outlives its process.
    """

    def reducer_override(self, value):
        if type(value) is torch.Tensor and value.layout is torch.strided:
            own = value.detach().clone().requires_grad_(value.requires_grad)
            return own.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def _dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


# From here on, what runs in a rank.


def _rank_main(rank: int, pipe: connection.Connection, stacks: Path) -> None:
    """Serves the runs whose directories arrive, until the parent closes the pipe."""
    os.setpgid(0, 0)  # Ctrl-C is for the parent, and killing the group spares nothing of this rank
    threading.Thread(target=_die_with_parent, args=(stacks.parent,), daemon=True).start()
    torch.set_num_threads(1)
    with open(stacks, "w") as file, contextlib.suppress(EOFError, ConnectionError):
        faulthandler.enable(file)
        faulthandler.register(STACK_SIGNAL, file)
        while True:
            pipe.send_bytes(b"idle")
            _serve(rank, pipe, Path(pipe.recv_bytes().decode()))


def _die_with_parent(directory: Path) -> None:
    """Nothing outlives a test session that is killed."""
    multiprocessing.parent_process().join()
    shutil.rmtree(directory, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _serve(rank: int, pipe: connection.Connection, directory: Path) -> None:
    """One run: the body, its outcome in a file, a word to the parent, then everything undone."""
    outcome = directory / f"outcome-{rank}"
    with _restored():
        try:
            outcome.write_bytes(_dumps(_call(rank, directory)))
            report = b"returned"
        except BaseException as error:  # SystemExit too: no body may end its rank
            last = traceback.format_exception_only(error)[-1]
            left = isinstance(error, RuntimeError | OSError) and PEER_LEFT.search(last)
            echo = f"raised {type(error).__name__} because another rank had left" if left else ""
            failure = Failure(rank, "raised", traceback.format_exc(), echo)
            outcome.write_bytes(pickle.dumps(failure))
            report = b"failed"
        pipe.send_bytes(report)
        if report == b"failed":
            gc.collect()  # frames of the traceback hold groups, and with them their connections
        else:
            pipe.recv_bytes()  # a group that ends early can cut off peers that still read from it
        if dist.is_initialized():
            dist.destroy_process_group()


def _call(rank: int, directory: Path) -> Any:
    """What the body returns, called in the state that `RankPool.run` promises."""
    job = pickle.loads((directory / "job").read_bytes())
    sys.path[:], sys.argv[:] = job["sys_path"], job["argv"]
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environ"], RANK=str(rank), LOCAL_RANK=str(rank))
    body, args, kwargs = pickle.loads(job["call"])
    if job["init"]:
        store = dist.FileStore(str(directory / "rendezvous"), job["ranks"])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job["ranks"])
    torch.manual_seed(0)
    return body(*args, **kwargs)


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Puts torch's settings back; everything else a body gets anew with its job."""
    state = [(read, write, read()) for read, write in TORCH_STATE]
    try:
        yield
    finally:
        for read, write, value in state:
            if read() != value:  # some are slow to write: they import the compiler
                write(value)
