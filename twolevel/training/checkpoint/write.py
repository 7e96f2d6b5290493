"""One checkpoint, written by all ranks."""

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from twolevel import durable
from twolevel.distributed.agreement import all_gather, together
from twolevel.errors import UserError
from twolevel.training.checkpoint import folders
from twolevel.training.checkpoint.tensors import cause


def write(
    path: Path, tensors: dict[str, Tensor], state: dict[str, Any], *, group: dist.ProcessGroup | None = None
) -> None:
    """Write a checkpoint of contiguous tensors; every rank calls it. It is on the disk when this returns.

    `group` carries what ranks tell each other, all of them; the default group unless given.

    Raises UserError, on every rank, where it cannot be written or rank 0 does not find every rank's shard; what was
    there before is untouched, and nothing of this is left.
    """
    made, rank = folders.unfinished(path), dist.get_rank()
    if rank == 0:
        shutil.rmtree(made, ignore_errors=True)
    try:
        try:
            # Collective: rank 0's failure to make the folder reaches every rank through it.
            writer = HuggingFaceStorageWriter(str(made), save_distributed=True)
            save_tensors(tensors, storage_writer=writer, process_group=group)
        except CheckpointException as error:
            raise UserError(f"cannot write checkpoint {path}: {cause(error)}") from error
        with together(group=group):
            own = _finish_shards(path, rank)
        by_rank: list[dict[str, tuple[int, str]]] = all_gather(own, group=group)
        with together(group=group):
            if rank == 0:
                _check_shards(made, path, by_rank)
                try:
                    shards = {name: digest for shards in by_rank for name, (_, digest) in shards.items()}
                    folders.publish(path, shards, state)
                except OSError as error:
                    raise UserError(f"cannot write checkpoint {path}: {error.strerror}") from error
    finally:
        if rank == 0:
            shutil.rmtree(made, ignore_errors=True)


def _finish_shards(path: Path, rank: int) -> dict[str, tuple[int, str]]:
    """The size and SHA-256 of the shards that this rank has written, which are then on the disk."""
    found = {}
    try:
        for file in folders.unfinished(path).glob(f"shard-{rank + 1:05d}-*"):
            durable.sync(file)
            found[file.name] = (file.stat().st_size, folders.digest(file))
    except OSError as error:
        raise UserError(f"cannot write checkpoint {path}: {error.strerror}") from error
    return found


def _check_shards(made: Path, path: Path, by_rank: list[dict[str, tuple[int, str]]]) -> None:
    """Raise UserError unless all that ranks say they wrote is in rank 0's folder."""
    for rank, shards in enumerate(by_rank):
        there = {name: (made / name).stat().st_size for name in shards if (made / name).exists()}
        if not shards or there != {name: size for name, (size, _) in shards.items()}:
            raise UserError(
                f"cannot write checkpoint {path}: the shard of rank {rank} is not in rank 0's folder, so the ranks "
                "do not share a file system; give an --output that all of them share"
            )
