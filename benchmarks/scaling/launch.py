"""Starts the ranks of a job and brings back what they found."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.links import Nodes
from benchmarks.scaling.cases import Job
from twolevel.errors import UserError

ROOT = Path(__file__).parents[2]
# What a launcher around this process may have set, and what is set here.
PER_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
POLL_S = 0.05


class RanksFailed(Exception):
    """A rank of a job failed; the message is the end of what it wrote."""


def run(job: Job, settings: dict, nodes: Nodes | None = None, timeout_s: float = 3600) -> dict:
    """Start the job's ranks, wait for them, and return what rank 0 found.

    Args:
        settings: device, turns, threads and `memory`, as `rank.py` reads them.
        nodes: the two ends of a link to start them on; None: this machine.

    Raises:
        UserError: mpirun is asked for and not there.
        RanksFailed: a rank failed or they took longer than `timeout_s`. None is left running.
    """
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        path, found = Path(folder, "job.json"), Path(folder, "found.json")
        path.write_text(json.dumps(asdict(job) | settings | {"found": str(found)}))
        python = [sys.executable, "-m", "benchmarks.scaling.rank", str(path)]
        commands = _commands(job, python, nodes)
        clean = {name: value for name, value in os.environ.items() if name not in PER_RANK}
        threads = {"OMP_NUM_THREADS": str(settings["threads"])}
        logs = [Path(folder, f"{index}.log") for index in range(len(commands))]
        processes = []
        try:
            for (command, environment), log in zip(commands, logs, strict=True):
                with open(log, "wb") as file:
                    processes.append(
                        subprocess.Popen(
                            command,
                            env=clean | threads | environment,
                            cwd=ROOT,
                            stdin=subprocess.DEVNULL,
                            stdout=file,
                            stderr=subprocess.STDOUT,
                        )
                    )
            _wait(processes, logs, timeout_s)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
        return json.loads(found.read_text())


def _commands(job: Job, python: list[str], nodes: Nodes | None) -> list[tuple[list[str], dict[str, str]]]:
    """Command line and environment of every process to start."""
    if job.launcher == "mpi":
        return [([*mpirun(), "-n", str(job.ranks), *python], {})]
    if nodes is not None:
        return [
            (nodes.command(nodes.node_of(rank, job.ranks), python), nodes.environment(rank, job.ranks))
            for rank in range(job.ranks)
        ]
    port = _free_port()
    return [(python, _environment(rank, job.ranks, port)) for rank in range(job.ranks)]


def mpirun() -> list[str]:
    """The command that starts ranks of MPI on this machine. Raises UserError where it is not there."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise UserError("--carriers mpi: no mpirun here; pip install twolevel[mpi], or use gloo")
    root = ["--allow-run-as-root"] if hasattr(os, "getuid") and os.getuid() == 0 else []
    return [found, *root, "--oversubscribe", "--bind-to", "none"]


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    values = (rank, ranks, rank, ranks, "127.0.0.1", port)
    return {name: str(value) for name, value in zip(PER_RANK, values, strict=True)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(processes: list[subprocess.Popen], logs: list[Path], timeout_s: float) -> None:
    """Until all have ended well. Raises RanksFailed at the first that has not."""
    end = time.monotonic() + timeout_s
    while True:
        codes = [process.poll() for process in processes]
        failed = [index for index, code in enumerate(codes) if code]
        if failed:
            text = logs[failed[0]].read_text(errors="replace")
            raise RanksFailed(f"process {failed[0]} of {len(processes)} failed:\n{text[-3000:]}")
        if None not in codes:
            return
        if time.monotonic() > end:
            raise RanksFailed(f"{len(processes)} processes were not done after {timeout_s:g} s")
        time.sleep(POLL_S)
