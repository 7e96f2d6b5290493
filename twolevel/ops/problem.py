"""One layer to compute on one rank, and what it is called where its form is kept."""

import platform
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from twolevel.ops import native
from twolevel.ops.geometry import Geometry


class Problem(NamedTuple):
    """One layer on one rank: tensors of its sizes, not necessarily its own."""

    x: Tensor
    local: Tensor
    restriction: Tensor
    coarse: Tensor
    geometry: Geometry
    ranks: int

    @property
    def macs(self) -> int:
        """Multiplications of the local part, forward."""
        (sh, sw), _, _ = self.geometry
        return self.x.shape[0] * self.x.shape[2] * self.x.shape[3] * self.local.numel() // (sh * sw)

    def sizes(self) -> tuple:
        """All that a choice depends on within a process; a batch counts as the next power of two."""
        x = self.x
        batch = 1 << max(0, x.shape[0] - 1).bit_length()  # last batches are not measured anew
        shapes = (batch, *x.shape[1:], *self.local.shape, len(self.restriction), self.coarse.shape[1])
        place = (x.dtype, self._channels_last(), x.device, torch.get_num_threads())
        return (*shapes, *self.geometry, self.ranks, *place)

    def title(self) -> str:
        """The layer in a few words, whatever its batch and the machine: what a run keeps its form under."""
        _, channels, *size = self.x.shape
        by = {"": self.local.shape[2:]} | {
            f"{name} ": pair
            for name, pair, usual in zip(Geometry._fields, self.geometry, Geometry(), strict=True)
            if tuple(pair) != usual
        }
        parts = [
            f"{channels} to {len(self.local)} channels of {_times(size)}",
            *(f"{name}{_times(pair)}" for name, pair in by.items()),
            f"{len(self.restriction)} groups",
        ]
        if self.ranks > 1:
            parts.append(f"one of {self.ranks} ranks")
        parts.append(f"{str(self.x.dtype).removeprefix('torch.')} {self._format()}")
        return ", ".join(parts)

    def line(self, able: list) -> str:
        """Everything that a measurement depends on: the layer, its batch, the machine and the candidates."""
        threads = torch.get_num_threads()
        device = f"{_processor()}, {threads} threads"
        if self.x.is_cuda:
            device = torch.cuda.get_device_name(self.x.device)
        candidates = " ".join("/".join(one) for one in able)
        return (
            f"{self.sizes()[0]} images, {self.title()} | {device} | torch {torch.__version__} {native.version()} | "
            f"{candidates}"
        )

    def _channels_last(self) -> bool:
        return self.x.is_contiguous(memory_format=torch.channels_last)

    def _format(self) -> str:
        return "channels_last" if self._channels_last() else "contiguous"


def _times(pair) -> str:
    return "x".join(map(str, pair))


@cache
def _processor() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
