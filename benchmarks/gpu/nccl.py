"""Whether two ranks compute over NCCL what they should: their exchange, and steps as CUDA graphs.

    python -m benchmarks.gpu.nccl --output FILE

The ranks share a card where there is one, which takes NCCL 2.30: a check, and no measurement of NCCL's speed.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl as of_torch
from torch.distributed.device_mesh import DeviceMesh

from benchmarks import report
from benchmarks.gpu.runner import ROOT, SKIP
from twolevel.distributed import init_mesh, nccl
from twolevel.distributed.collectives import MeshAxis
from twolevel.distributed.environment import start, stop
from twolevel.settings import Device
from twolevel.training.config import OptimiserConfig
from twolevel.training.graphed import GraphedStep
from twolevel.training.step import make_step

RANKS = 2
STEPS = 16  # more than any capture waits for
WIDTH, BATCH = "wrn-16-4", 32
# Two runs of one network: some of cuDNN's kernels add up in an order that changes from run to run.
CLOSE = 1e-2


@dataclass
class Settings:
    """Check the exchange and the steps of two ranks over NCCL."""

    output: Path
    """file to write"""

    rank: bool = False
    """be one of the ranks, which torchrun starts"""


def unavailable() -> str | None:
    """Why two ranks cannot use NCCL here; None where they can."""
    if not dist.is_nccl_available():
        return "this torch has no NCCL"
    if torch.cuda.device_count() < RANKS and of_torch.version()[:2] < nccl.FIRST_THAT_SHARES:
        version = ".".join(map(str, of_torch.version()))
        return f"there is one card, and {nccl.ONE_GPU_EACH}: this is {version}"
    return None


def exchange_of_known_numbers(axis: MeshAxis, rank: int, device: torch.device) -> dict[str, bool]:
    """Whether what the ranks send each other arrives: numbers that one can work out by hand."""
    own = torch.full((1, 2, 3, 3), float(rank + 1), device=device)
    gathered = axis.gather(own).wait()
    parts = torch.arange(1.0, axis.ranks + 1, device=device).view(-1, 1, 1, 1) * (rank + 1)
    total = axis.scatter_sum(parts.contiguous()).wait()
    every = axis.ranks * (axis.ranks + 1) / 2
    return {
        "all-gather": gathered[:, 0, 0, 0].tolist() == [float(r + 1) for r in range(axis.ranks)],
        "reduce-scatter": total.flatten().tolist() == [every * (rank + 1)],
    }


def losses(mesh: DeviceMesh, device: torch.device, *, graphed: bool, sync: bool = False) -> list[float]:
    """The mean losses of some steps on batches that never change, on this rank's share of them."""
    step = make_step(
        WIDTH,
        mesh,
        device,
        conv="gc2l",
        groups=4,
        sync_batch_norm=sync,
        precision="bf16" if device.type == "cuda" else "float32",
        optimiser=OptimiserConfig(learning_rate=0.01, weight_decay=5e-4),
    )
    share = BATCH // mesh["data"].size()
    generator = torch.Generator().manual_seed(mesh.get_local_rank("data"))
    images = torch.randn(share, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(10, (share,), generator=generator).to(device)
    taken = GraphedStep(step) if graphed else step
    taken.set_rate(0.01)
    return [float(taken(images, labels)[0]) / share for _ in range(STEPS)]


def compared(mesh: DeviceMesh, device: torch.device, *, sync: bool = False) -> dict[str, Any]:
    """Whether the steps of a mesh train, and are the same as a CUDA graph; on CPUs there is none."""
    plain = losses(mesh, device, graphed=False, sync=sync)
    found: dict[str, Any] = {"losses": plain, "trains": plain[-1] < plain[0]}
    if device.type == "cuda":
        replayed = losses(mesh, device, graphed=True, sync=sync)
        far = max(abs(a - b) / abs(a) for a, b in zip(plain, replayed, strict=True))
        found |= {"replayed": replayed, "differs_by": far, "same as a graph": far < CLOSE}
    return found


def checks(device: Device) -> dict[str, Any]:
    """All that two ranks are asked, as this one sees it; every rank must call this."""
    world = start(device, timeout_s=120)
    try:
        found: dict[str, Any] = {"backend": world.backend}
        ranks = init_mesh(device=device, timeout_s=120)
        axis = MeshAxis(ranks.get_group("group"))
        found |= exchange_of_known_numbers(axis, world.rank, world.device)
        found["groups"] = compared(ranks, world.device)
        replicas = init_mesh(world.size, device=device, timeout_s=120)
        found["replicas"] = compared(replicas, world.device)
        found["replicas, synchronised"] = compared(replicas, world.device, sync=True)
        return found
    finally:
        stop(world)


def wrong(found: dict[str, Any], where: str = "") -> list[str]:
    """The names of the checks that fail."""
    names = []
    for name, value in found.items():
        if isinstance(value, dict):
            names += wrong(value, f"{where}{name}: ")
        elif value is False:
            names.append(f"{where}{name}")
    return names


def started(folder: str) -> list[dict[str, Any]]:
    """What every rank has found, of ranks started by torchrun."""
    command = [sys.executable, "-m", "twolevel.torchrun", "--standalone", f"--nproc-per-node={RANKS}"]
    command += ["-m", "benchmarks.gpu.nccl", "--rank", "--output", folder]
    environment = {**os.environ, nccl.SHARING: "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(RANKS)]


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "gpu", argv)
    if settings.rank:
        found = checks("cuda")
        Path(settings.output, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
        return
    facts = report.machine(report.choose_device("cuda"))
    if (why := unavailable()) is not None:
        print(why)
        sys.exit(SKIP)
    facts["nccl"] = ".".join(map(str, of_torch.version()))
    with tempfile.TemporaryDirectory() as folder:
        found = started(folder)
    report.save(settings.output, "python -m benchmarks.gpu.nccl", facts, asdict(settings), {"ranks": found})
    bad = [f"rank {rank}: {name}" for rank, one in enumerate(found) for name in wrong(one)]
    if bad:
        sys.exit(f"benchmarks: {'; '.join(bad)}")
    print(f"two ranks over {found[0]['backend']} (NCCL {facts['nccl']}): all as it should be")


if __name__ == "__main__":
    main(sys.argv[1:])
