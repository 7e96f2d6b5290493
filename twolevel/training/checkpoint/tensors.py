"""The tensors of a checkpoint: which part of the whole a rank holds, and reading them back."""

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from twolevel.errors import UserError
from twolevel.nn import Layout
from twolevel.training.checkpoint.folders import Damaged

# torch's reader takes what a header says as it is, and fails in as many ways.
_UNREADABLE = (OSError, ValueError, LookupError, RuntimeError, SafetensorError, CheckpointException)
_UNREADABLE += (TypeError, AttributeError, AssertionError, OverflowError)


def as_part(name: str, tensor: Tensor, layout: Layout, mesh: DeviceMesh) -> Tensor:
    """This rank's part of a tensor of the single-process state, marked with where it belongs in the whole."""
    if not layout.is_split(name):
        return tensor.detach()
    placements = [Replicate(), Shard(layout.dims[name])]
    return DTensor.from_local(tensor.detach(), mesh, placements, run_check=False)


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The names and whole shapes of a checkpoint's tensors. Raises Damaged where they cannot be read."""
    try:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata()
        tensors = metadata.state_dict_metadata.items()
        return {
            name: tuple(entry.size) for name, entry in tensors if isinstance(entry, TensorStorageMetadata)
        }
    except _UNREADABLE as error:
        raise Damaged(path, cause(error)) from error


def load(path: Path, tensors: dict[str, Tensor], *, alone: bool = False) -> None:
    """Read a checkpoint into `tensors`, in place: parts as `as_part` marks them, or whole.

    Every rank calls this, unless it reads whole tensors `alone`.

    What the shards hold is taken as it is: `verify` says whether it is what was written.

    Raises UserError where a tensor is missing or has another shape, and Damaged where one cannot be read.
    """
    require(path, tensors)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is meant
            load_tensors(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=alone)
    except _UNREADABLE as error:
        raise Damaged(path, cause(error)) from error


def require(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise UserError where a checkpoint lacks one of these tensors, or has it in another shape."""
    there = shapes(path)
    for name, tensor in tensors.items():
        if there.get(name) != tuple(tensor.shape):
            found = f"has shape {[*there[name]]}" if name in there else "is not there"
            raise UserError(
                f"checkpoint {path} is of another network: {name} {found}, this one needs {[*tensor.shape]}"
            )


def cause(error: BaseException) -> str:
    """The innermost reason, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]
