"""Checkpoints that any number of ranks writes and any other number reads.

A checkpoint is a folder of safetensors shards, written and resharded by torch.distributed.checkpoint, and a
`state.json` with everything that is not a tensor. It appears under its name only when every rank's shard is in it.

    step-00000042/
        shard-00001-model-00001-of-00001.safetensors   one a rank
        state.json                                     {"config": ..., "step": 42, "shards": {name: bytes}, ...}
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from twolevel.distributed.agreement import all_gather, together
from twolevel.errors import UserError
from twolevel.nn import Layout

STATE = "state.json"
REQUIRED = {"config", "num_classes", "step", "epoch_sums", "ranks"}
SECTIONS = {"model", "data", "optimiser", "run"}
_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, CheckpointException)


def as_part(name: str, tensor: Tensor, layout: Layout, mesh: DeviceMesh) -> Tensor:
    """This rank's part of a tensor of the single-process state, marked with where it belongs in the whole."""
    if not layout.is_split(name):
        return tensor.detach()
    placements = [Replicate(), Shard(layout.dims[name])]
    return DTensor.from_local(tensor.detach(), mesh, placements, run_check=False)


def folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def complete(root: Path) -> dict[int, Path]:
    """The complete checkpoints under `root` by their step, rising. Folders of other names are not ours."""
    found = {
        int(match[1]): path.parent
        for path in root.glob(f"step-*/{STATE}")
        if (match := re.fullmatch(r"step-(\d+)", path.parent.name))
    }
    return dict(sorted(found.items()))


def newest(root: Path) -> Path | None:
    """The complete checkpoint of the highest step under `root`."""
    return next(reversed(complete(root).values()), None)


def save(path: Path, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: int) -> None:
    """Write a checkpoint; every rank calls it. Of those of earlier steps beside it, keeps the `keep` - 1 newest.

    Raises UserError, on every rank, where it cannot be written or rank 0 does not find every rank's shard; what was
    there before is untouched.
    """
    rank = dist.get_rank()
    unfinished = path.with_name(f".{path.name}.unfinished")
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}  # safetensors knows no strides
    try:
        # Collective: rank 0's failure to make the folder reaches every rank through it.
        save_tensors(tensors, storage_writer=HuggingFaceStorageWriter(str(unfinished), save_distributed=True))
    except CheckpointException as error:
        raise UserError(f"cannot write checkpoint {path}: {_cause(error)}") from error
    own = {file.name: file.stat().st_size for file in unfinished.glob(f"shard-{rank + 1:05d}-*")}
    by_rank: list[dict[str, int]] = all_gather(own)
    with together():
        if rank == 0:
            _check_shards(unfinished, path, by_rank)
            state = state | {"shards": {name: size for shards in by_rank for name, size in shards.items()}}
            try:
                (unfinished / STATE).write_text(json.dumps(state, indent=1, allow_nan=False))
                replaced = path.with_name(f".{path.name}.replaced")
                shutil.rmtree(replaced, ignore_errors=True)
                if path.exists():
                    path.rename(replaced)
                unfinished.rename(path)
                shutil.rmtree(replaced, ignore_errors=True)
            except OSError as error:
                raise UserError(f"cannot write checkpoint {path}: {error.strerror}") from error
            step = int(path.name.removeprefix("step-"))
            earlier = [folder for number, folder in complete(path.parent).items() if number < step]
            for folder in earlier[: max(0, len(earlier) + 1 - keep)]:
                shutil.rmtree(folder, ignore_errors=True)


def _check_shards(unfinished: Path, path: Path, by_rank: list[dict[str, int]]) -> None:
    """Raise UserError unless all that ranks say they wrote is in rank 0's folder."""
    for rank, shards in enumerate(by_rank):
        there = {name: (unfinished / name).stat().st_size for name in shards if (unfinished / name).exists()}
        if not shards or there != shards:
            raise UserError(
                f"cannot write checkpoint {path}: the shard of rank {rank} is not in rank 0's folder, so the ranks "
                "do not share a file system; give an --output that all of them share"
            )


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors. Raises UserError where that is missing or damaged."""
    try:
        state = json.loads((path / STATE).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is no checkpoint: it has no {STATE}; give a folder like runs/last") from None
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} is damaged: {STATE}: {error}") from error
    missing = REQUIRED - state.keys() if isinstance(state, dict) else REQUIRED
    if not missing:
        config = state["config"]
        missing = SECTIONS - config.keys() if isinstance(config, dict) else SECTIONS
        missing = missing or {name for name in SECTIONS if not isinstance(config[name], dict)}
    if missing:
        raise UserError(f"checkpoint {path} is damaged: {STATE} lacks {', '.join(sorted(missing))}")
    wrong = [name for name, fits in FITS.items() if name in state and not fits(state[name])]
    if wrong:
        raise UserError(
            f"checkpoint {path} is damaged: {STATE}: {wrong[0]}={state[wrong[0]]!r:.60} is invalid"
        )
    return state


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


FITS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("step", "num_classes", "ranks"), _is_count),
    "epoch_sums": lambda sums: (
        isinstance(sums, list) and len(sums) == 3 and all(isinstance(value, int | float) for value in sums)
    ),
    "shards": lambda shards: isinstance(shards, dict) and all(map(_is_count, shards.values())),
    "untested": lambda record: record is None or isinstance(record, dict),
}
"""What a state may hold beside its settings, by name."""


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The names and whole shapes of a checkpoint's tensors. Raises UserError where a shard is missing or damaged."""
    for name, size in read_state(path).get("shards", {}).items():
        file = path / name
        if not file.exists():
            raise UserError(f"checkpoint {path} is damaged: {name} is missing, one of its shards")
        if file.stat().st_size != size:
            raise UserError(
                f"checkpoint {path} is damaged: {name} has {file.stat().st_size} bytes, {size} were written"
            )
    try:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata()
        tensors = metadata.state_dict_metadata.items()
        return {
            name: tuple(entry.size) for name, entry in tensors if isinstance(entry, TensorStorageMetadata)
        }
    except _UNREADABLE as error:
        raise UserError(f"checkpoint {path} is damaged: {_cause(error)}") from error


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Read a checkpoint into `tensors`, in place: parts as `as_part` marks them, or whole.

    Raises UserError where a tensor is missing, has another shape, or cannot be read.
    """
    there = shapes(path)
    for name, tensor in tensors.items():
        if there.get(name) != tuple(tensor.shape):
            found = f"has shape {[*there[name]]}" if name in there else "is not there"
            raise UserError(
                f"checkpoint {path} is of another network: {name} {found}, this one needs {[*tensor.shape]}"
            )
    try:
        with torch.no_grad():
            load_tensors(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
    except _UNREADABLE as error:
        raise UserError(f"checkpoint {path} is damaged: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]
