"""Batch normalisation with or without ReLU by C kernels, each one pass over memory (see normalise.c).

x and the gradients are float32 on the CPU, channels_last or contiguous. Threads share the pixels out in channels_last
memory, the channels in contiguous memory. Sums are then of threads, in their order: they depend on the number of
threads to rounding, and on nothing else.
"""

from ctypes import byref

import torch
from torch import Tensor

from twolevel.ops.kernels.native import call
from twolevel.ops.kernels.native.call import Maps
from twolevel.ops.kernels.normalise import (
    Moments,
    Normalisation,
    Running,
    TorchNormaliser,
    in_memory_of,
    in_rows,
    joined,
    numbers,
)
from twolevel.ops.normalise_problem import NormaliseProblem

# Numbers below which torch's two operations are faster: then a pass takes less time than a call of it.
LEAST_VALUES = 1 << 16


class NativeNormaliser(TorchNormaliser):
    """C kernels; forward and backward are one call each, unless threads have to wait for each other's sums."""

    name = "native"

    def unsupported(self, problem: NormaliseProblem) -> str | None:
        if problem.device.type != "cpu" or problem.dtype != torch.float32:
            return f"they are for float32 on CPUs, not {problem.dtype} on {problem.device}"
        if problem.odd:
            return f"they are for plain tensors of one type, not {problem.odd}"
        if problem.memory == "strided":
            return "they are for contiguous or channels_last memory"
        return call.available()

    def estimate(self, problem: NormaliseProblem) -> float:
        return 0 if problem.values >= LEAST_VALUES else 2

    def moments(self, x: Tensor) -> Moments:
        maps, parts, sets = _shared_out(x)
        found = torch.empty(sets, 2, x.shape[1], dtype=torch.float64)
        _run("twolevel_norm_moments", maps, parts, x.data_ptr(), found=found)
        (means, spreads), count = found.unbind(1), numbers(x)
        if sets == 1:
            return Moments(means[0].float(), (spreads[0] / count).float(), count)
        counts = found.new_tensor([[end - begin] for begin, end in parts])
        mean, var, _ = joined(means, spreads / counts, counts)
        return Moments(mean.float(), var.float(), count)

    def apply(self, x: Tensor, by: Normalisation) -> Tensor:
        maps, parts, _ = _shared_out(x, by)
        o = torch.empty_like(x)
        _run("twolevel_norm_apply", maps, parts, x.data_ptr(), o.data_ptr())
        return o

    def sums(self, go: Tensor, x: Tensor, by: Normalisation) -> Tensor:
        maps, parts, sets = _shared_out(x, by)
        go, found = in_memory_of(x, go), x.new_empty(sets, 2, x.shape[1])
        _run("twolevel_norm_sums", maps, parts, go.data_ptr(), x.data_ptr(), found=found)
        return call.total(found)

    def input_grad(
        self, go: Tensor, x: Tensor, more: Tensor | None, by: Normalisation, means: Tensor
    ) -> Tensor:
        maps, parts, _ = _shared_out(x, by)
        go, more = in_memory_of(x, go), None if more is None else in_memory_of(x, more)
        gx, means = torch.empty_like(x), means.contiguous()
        _run(
            "twolevel_norm_input_grad",
            maps,
            parts,
            *(go.data_ptr(), x.data_ptr(), call.pointer(more), means.data_ptr(), gx.data_ptr()),
        )
        return gx

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        relu: bool,
        running: Running | None,
    ) -> tuple[Tensor, Normalisation]:
        channels = x.shape[1]
        by = Normalisation(x.new_empty(channels), x.new_empty(channels), weight, bias, relu)
        maps, parts, sets = _shared_out(x, by)
        mean, var, rate = running or (None, None, 0.0)
        writes = _can_write(channels, mean) and _can_write(channels, var)
        if sets > 1 or isinstance(rate, Tensor) or not writes:
            return super().forward(x, weight, bias, eps, relu, running)
        o = torch.empty_like(x)
        pointers = call.pointer(mean), call.pointer(var), x.data_ptr(), o.data_ptr()
        _run("twolevel_norm_forward", maps, parts, eps, rate, *pointers)
        return o, by

    def backward(
        self, go: Tensor, x: Tensor, more: Tensor | None, by: Normalisation
    ) -> tuple[Tensor, Tensor]:
        maps, parts, sets = _shared_out(x, by)
        if sets > 1:
            return super().backward(go, x, more, by)
        go, more = in_memory_of(x, go), None if more is None else in_memory_of(x, more)
        gx, sums = torch.empty_like(x), x.new_empty(2, x.shape[1])
        _run(
            "twolevel_norm_backward",
            maps,
            parts,
            *(go.data_ptr(), x.data_ptr(), call.pointer(more), sums.data_ptr(), gx.data_ptr()),
        )
        return gx, sums


Parts = list[tuple[int, int]]
"""Pixels of all images, in contiguous memory channels, for each thread."""


def _shared_out(x: Tensor, by: Normalisation | None = None) -> tuple[Maps, Parts, int]:
    """What a kernel is called with; and how many sets of sums it finds: in contiguous memory parts of one."""
    batch, channels, height, width = x.shape
    pixels = height * width
    rows = in_rows(x)
    maps = Maps(batch, channels, pixels, rows)
    if by is not None:
        mean, inv_std, weight, bias, maps.relu = by
        assert weight is None or weight.numel() == channels
        assert bias is None or bias.numel() == channels
        maps.mean, maps.inv_std = mean.data_ptr(), inv_std.data_ptr()
        maps.weight, maps.bias = call.pointer(weight), call.pointer(bias)
    parts = call.parts_of(batch * pixels if rows else channels, x.numel())
    return maps, parts, len(parts) if rows else 1


def _can_write(channels: int, running: Tensor | None) -> bool:
    return running is None or (
        running.dtype == torch.float32 and running.numel() == channels and running.is_contiguous()
    )


def _run(
    name: str, maps: Maps, parts: Parts, *arguments: float | int | None, found: Tensor | None = None
) -> None:
    """Call a kernel; `found` is where each part puts its set of sums, or its part of the one that there is."""
    function, at = call.function(name), byref(maps)
    if found is None:
        call.share_out(lambda part, begin, end: function(at, *arguments, begin, end), parts)
        return
    sets = len(found)
    call.share_out(
        lambda part, begin, end: function(
            at, *arguments, call.pointer_to_row(found, part if sets > 1 else 0), begin, end
        ),
        parts,
    )
