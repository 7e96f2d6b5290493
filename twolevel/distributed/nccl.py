"""NCCL: how its process groups are made, and whether it takes ranks that share a GPU."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

# NCCL's own switch, and the first version that has it.
SHARING = "NCCL_MULTI_RANK_GPU_ENABLE"
FIRST_THAT_SHARES = (2, 30)
ONE_GPU_EACH = f"NCCL needs one for each rank, unless it is 2.30 or newer and {SHARING}=1 is set"


def options(backend: str) -> Any:
    """Options of a process group: its kernels run before those of a convolution that also wait; None without NCCL."""
    if "nccl" not in backend:
        return None
    return dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)


def bound_device(backend: str, device: torch.device) -> torch.device | None:
    """The GPU to which a process group is bound, so that its ranks connect at once; None without NCCL."""
    return device if "nccl" in backend else None


@contextmanager
def own_timeout() -> Iterator[None]:
    """Make process groups in it: their options have a timeout of their own, which torch replaces and then warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "backend_options._timeout was specified")
        yield


def shares_gpus() -> bool:
    """Whether several ranks may use one GPU: only if NCCL can and the environment asks for it."""
    if os.environ.get(SHARING) != "1" or not dist.is_nccl_available():
        return False
    from torch.cuda import nccl

    return nccl.version()[:2] >= FIRST_THAT_SHARES
