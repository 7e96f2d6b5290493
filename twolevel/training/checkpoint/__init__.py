"""Checkpoints that any number of ranks writes and any other number reads, and that are whole or not there.

A checkpoint is a folder of safetensors shards, written and resharded by torch.distributed.checkpoint, a `state.json`
with everything that is not a tensor, and the checksums of both. It appears under its name, by one rename, when all of
it is on the disk. `sha256sum -c SHA256SUMS` checks one by hand.

    step-00000042/
        shard-00001-model-00001-of-00001.safetensors   one a rank
        state.json                                     {"config": ..., "step": 42, ...}
        SHA256SUMS

`folders.py` is about the folders, `tensors.py` about what is in the shards, `write.py` makes a checkpoint, `saver.py`
does so while training goes on, and `retention.py` says which are kept.
"""

from twolevel.training.checkpoint.folders import (
    REQUIRED,
    SECTIONS,
    STATE,
    SUMS,
    Damaged,
    complete,
    damage_of,
    folder,
    newest_good,
    read_state,
    recover,
    verify,
)
from twolevel.training.checkpoint.retention import Retention
from twolevel.training.checkpoint.saver import Saver
from twolevel.training.checkpoint.tensors import as_part, load, require, shapes
from twolevel.training.checkpoint.write import write

__all__ = [
    "REQUIRED",
    "SECTIONS",
    "STATE",
    "SUMS",
    "Damaged",
    "Retention",
    "Saver",
    "as_part",
    "complete",
    "damage_of",
    "folder",
    "load",
    "newest_good",
    "read_state",
    "recover",
    "require",
    "shapes",
    "verify",
    "write",
]
