"""Batch normalisation with or without ReLU by Triton kernels: two passes over the maps forward, two backward.

Numbers are float32 whatever the maps are. Sums are of splits of the pixels, in their order: a constant number of
programs, so that they do not depend on the card.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from twolevel.errors import UserError
from twolevel.ops.kernels.normalise import (
    Moments,
    Normalisation,
    Running,
    TorchNormaliser,
    in_memory_of,
    in_rows,
    numbers,
)
from twolevel.ops.kernels.triton.launch import check_device, start
from twolevel.ops.kernels.triton.problem import MOST_ELEMENTS
from twolevel.ops.normalise_problem import NormaliseProblem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of each kernel that sums; enough for a large card, few enough to join in one program.
SPLIT_PROGRAMS = 512
MOST_SPLITS = 256
TILE = 4096  # numbers
BLOCK_CHANNELS = {True: 64, False: 4}  # in rows, in planes
WARPS = 4


class TritonNormaliser(TorchNormaliser):
    """Triton kernels."""

    name = "triton"

    def unsupported(self, problem: NormaliseProblem) -> str | None:
        if problem.odd:
            return f"they are for plain tensors of one device, not {problem.odd}"
        if problem.memory == "strided":
            return "they are for contiguous or channels_last memory"
        if problem.dtype not in DTYPES:
            return f"they are for float32, float16 and bfloat16, not {problem.dtype}"
        if problem.values >= MOST_ELEMENTS:
            return f"x of {problem.values} elements is beyond 32-bit offsets; split the batch"
        try:
            check_device(problem.device, problem.dtype)
        except UserError as error:
            return str(error)
        return None

    def estimate(self, problem: NormaliseProblem) -> float:
        return 30  # never a guess

    def moments(self, x: Tensor) -> Moments:
        mean, var, _ = _moments(x, 0.0, None)
        return Moments(mean, var, numbers(x))

    def apply(self, x: Tensor, by: Normalisation) -> Tensor:
        o, grid = torch.empty_like(x), _Grid.of(x)
        _launch("apply", x, grid.tiles, x, o, *_by(by, x), *grid.sizes, **grid.constants, **_constants(by))
        return o

    def sums(self, go: Tensor, x: Tensor, by: Normalisation) -> Tensor:
        go, grid = in_memory_of(x, go), _Grid.of(x)
        found = torch.empty(grid.splits, 2, x.shape[1], dtype=torch.float32, device=x.device)
        _launch(
            "sums_of_splits",
            x,
            (grid.splits, grid.tiles[1]),
            *(go, x, found, *_by(by, x), *grid.sizes),
            tiles=grid.tiles_of_split,
            **grid.constants,
            **_constants(by),
        )
        return found.sum(0)

    def input_grad(
        self, go: Tensor, x: Tensor, more: Tensor | None, by: Normalisation, means: Tensor
    ) -> Tensor:
        return _input_grad(go, x, more, by, means.contiguous(), 1.0)

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        relu: bool,
        running: Running | None,
    ) -> tuple[Tensor, Normalisation]:
        if running is not None and (isinstance(running.rate, Tensor) or not _can_write(running)):
            return super().forward(x, weight, bias, eps, relu, running)
        mean, _, inv_std = _moments(x, eps, running)
        by = Normalisation(mean, inv_std, weight, bias, relu)
        return self.apply(x, by), by

    def backward(
        self, go: Tensor, x: Tensor, more: Tensor | None, by: Normalisation
    ) -> tuple[Tensor, Tensor]:
        sums = self.sums(go, x, by)
        return _input_grad(go, x, more, by, sums, 1 / numbers(x)), sums


class _Grid(NamedTuple):
    """How programs share the maps."""

    tiles: tuple[int, int]
    """of pixels, of channels"""
    tiles_of_split: int
    splits: int
    sizes: tuple[int, int, int]
    """pixels of all images, channels, pixels of an image"""
    constants: dict[str, int | bool]

    @classmethod
    def of(cls, x: Tensor) -> "_Grid":
        batch, channels, height, width = x.shape
        pixels, rows = batch * height * width, in_rows(x)
        block_channels = min(BLOCK_CHANNELS[rows], _power_of_two(channels))
        block_pixels = min(TILE // block_channels, max(16, _power_of_two(pixels)))
        tiles = _ceil_div(pixels, block_pixels), _ceil_div(channels, block_channels)
        most = max(1, min(MOST_SPLITS, SPLIT_PROGRAMS // tiles[1]))
        tiles_of_split = _ceil_div(tiles[0], most)
        return cls(
            tiles,
            tiles_of_split,
            _ceil_div(tiles[0], tiles_of_split),
            (pixels, channels, height * width),
            {"IN_ROWS": rows, "BLOCK_PIXELS": block_pixels, "BLOCK_CHANNELS": block_channels},
        )


def _moments(x: Tensor, eps: float, running: Running | None) -> Tensor:
    """Mean, variance and 1 / sqrt(var + eps), `[3, C]`; running statistics follow."""
    grid, channels = _Grid.of(x), x.shape[1]
    means, spreads = torch.empty(2, grid.splits, channels, dtype=torch.float32, device=x.device)
    _launch(
        "moments_of_splits",
        x,
        (grid.splits, grid.tiles[1]),
        *(x, means, spreads, *grid.sizes),
        tiles=grid.tiles_of_split,
        **grid.constants,
    )
    found = torch.empty(3, channels, dtype=torch.float32, device=x.device)
    mean, var, rate = running or (None, None, 0.0)
    block = min(16, _power_of_two(channels))
    _launch(
        "join_moments",
        x,
        (_ceil_div(channels, block),),
        *(x, means, spreads, found, _or(mean, x), _or(var, x), eps, rate, grid.sizes[0]),
        *(grid.tiles_of_split * grid.constants["BLOCK_PIXELS"], grid.splits, *grid.sizes[1:]),
        IN_ROWS=grid.constants["IN_ROWS"],
        HAS_MEAN=mean is not None,
        HAS_VAR=var is not None,
        BLOCK_SPLITS=_power_of_two(grid.splits),
        BLOCK_CHANNELS=block,
    )
    return found


def _input_grad(
    go: Tensor, x: Tensor, more: Tensor | None, by: Normalisation, sums: Tensor, part: float
) -> Tensor:
    go, more = in_memory_of(x, go), None if more is None else in_memory_of(x, more)
    gx, grid = torch.empty_like(x), _Grid.of(x)
    _launch(
        "input_grad",
        x,
        grid.tiles,
        *(go, x, _or(more, x), gx, sums, part, *_by(by, x), *grid.sizes),
        **grid.constants,
        **_constants(by),
        HAS_MORE=more is not None,
    )
    return gx


def _can_write(running: Running) -> bool:
    return all(
        t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in (running.mean, running.var)
    )


def _by(by: Normalisation, x: Tensor) -> tuple[Tensor, ...]:
    assert all(t is None or t.numel() == x.shape[1] for t in (by.weight, by.bias))
    return by.mean, by.inv_std, _or(by.weight, x), _or(by.bias, x)


def _constants(by: Normalisation) -> dict[str, bool]:
    return {"RELU": by.relu, "HAS_WEIGHT": by.weight is not None, "HAS_BIAS": by.bias is not None}


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Some tensor, for what the kernel does not read."""
    return other if tensor is None else tensor


def _launch(
    kernel: str, like: Tensor, grid: tuple[int, ...], *arguments: object, **named: int | bool
) -> None:
    from twolevel.ops.kernels.triton import normalise_kernels as kernels

    start(kernels, kernel, grid, like, *arguments, **named, num_warps=WARPS)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
