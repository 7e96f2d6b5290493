"""What the operations launch, from sizes alone: no tensor, no card and no Triton are needed to say it."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import gcd
from typing import NamedTuple

from twolevel.ops.kernels.triton.configs import Config, splits, tiles
from twolevel.ops.kernels.triton.problem import Problem, round_up


class Launch(NamedTuple):
    """A kernel of `kernels` by its name, and all of its arguments but the tensors."""

    kernel: str
    programs: int
    steps: int
    """Tiles that a program multiplies, one after the other."""
    config: Config
    sizes: dict[str, int]
    """Arguments of the compiled kernel: what depends on the number of images, so that a smaller last batch compiles
    nothing anew."""
    constants: dict[str, int | str]
    """What it is compiled for."""


@lru_cache(maxsize=1024)  # of pure functions, which every call of every layer asks for
def forward(problem: Problem, config: Config, precision: str, maps: int = 0) -> Launch:
    """y, and z where the problem has representatives; `maps` of all ranks add the coarse term."""
    pixel_tiles, out_tiles, in_tiles = tiles(problem, config, "forward")
    row = problem.taps * problem.group_inputs
    return Launch(
        "gather_product",
        pixel_tiles * out_tiles * problem.packs("forward"),
        in_tiles,
        config,
        {"num_rows": problem.pixels},
        {
            **_pair("ROW", "HEIGHT", "WIDTH", problem.out_size),
            **_images("X", (problem.height, problem.width), problem.inputs),
            **_images("OUT", problem.out_size, problem.outputs),
            "NUM_GROUPS": problem.groups,
            **_sides("X_SCALE", problem.geometry.stride),
            **_sides("X_START", [-padding for padding in problem.geometry.padding]),
            **_sides("X_STEP", problem.geometry.dilation),
            **_sides("TAP_START", (0, 0)),
            **_sides("TAP_STEP", (1, 1)),
            **_sides("OUT_SCALE", (1, 1)),
            **_sides("OUT_START", (0, 0)),
            "W_GROUP": problem.group_outputs * row,
            "W_COLUMN": row,
            "W_CHANNEL": 1,
            "W_TAP": problem.group_inputs,
            **_sides("TAPS", problem.kernel),
            "KERNEL_W": problem.kernel[1],
            "C": problem.group_inputs,
            "D": problem.group_outputs,
            "PACK": problem.pack("forward"),
            "OWN_MAPS": problem.representatives,
            "R_BYTES": problem.copy_bytes(row),
            "NUM_MAPS": maps,
            "PRECISION": precision,
            "BLOCK_ROW": config.block_pixels,
            "BLOCK_COLUMN": config.block_out,
            "BLOCK_K": config.block_in,
        },
    )


@lru_cache(maxsize=1024)
def input_grad(problem: Problem, config: Config, precision: str) -> tuple[Launch, ...]:
    """The gradient of x: pixels of x whose places agree modulo the stride meet the same taps, so each such phase is
    one launch that skips taps that contribute nothing.
    """
    return tuple(
        _of_phase(problem, config, precision, phase_h, phase_w)
        for phase_h in phases(problem, 0)
        for phase_w in phases(problem, 1)
    )


def _of_phase(problem: Problem, config: Config, precision: str, phase_h: "Phase", phase_w: "Phase") -> Launch:
    both = (phase_h, phase_w)
    rows = problem.batch * phase_h.size * phase_w.size
    column_tiles, pack = tiles(problem, config, "input_grad")[2], problem.pack("input_grad")
    taps = phase_h.taps * phase_w.taps
    row = problem.taps * problem.group_inputs
    return Launch(
        "gather_product",
        -(-rows // config.block_pixels) * column_tiles * problem.packs("input_grad"),
        -(-taps * pack * problem.group_outputs // config.block_out),
        config,
        {"num_rows": rows},
        {
            **_pair("ROW", "HEIGHT", "WIDTH", [phase.size for phase in both]),
            **_images("X", problem.out_size, problem.outputs),
            **_images("OUT", (problem.height, problem.width), problem.inputs),
            "NUM_GROUPS": problem.groups,
            **_sides("X_SCALE", (1, 1)),
            **_sides("X_START", [phase.start for phase in both]),
            **_sides("X_STEP", [phase.step for phase in both]),
            **_sides("TAP_START", [phase.tap_start for phase in both]),
            **_sides("TAP_STEP", [phase.tap_step for phase in both]),
            **_sides("OUT_SCALE", problem.geometry.stride),
            **_sides("OUT_START", [phase.place for phase in both]),
            "W_GROUP": problem.group_outputs * row,
            "W_COLUMN": 1,
            "W_CHANNEL": row,
            "W_TAP": problem.group_inputs,
            "TAPS_H": phase_h.taps if taps else 0,
            "TAPS_W": max(1, phase_w.taps),
            "KERNEL_W": problem.kernel[1],
            "C": problem.group_outputs,
            "D": problem.group_inputs,
            "PACK": pack,
            "OWN_MAPS": 0,
            "R_BYTES": 1,
            "NUM_MAPS": 0,
            "PRECISION": precision,
            "BLOCK_ROW": config.block_pixels,
            "BLOCK_COLUMN": config.block_in,
            "BLOCK_K": config.block_out,
        },
    )


@lru_cache(maxsize=1024)
def weight_grad(problem: Problem, config: Config, precision: str) -> tuple[Launch, int]:
    """The launch, and the number of partial sums it leaves: ranges of pixels are summed apart."""
    _, out_tiles, in_tiles = tiles(problem, config, "weight_grad")
    per_split = round_up(-(-problem.pixels // splits(problem, config)), config.block_pixels)
    ranges = max(1, -(-problem.pixels // max(1, per_split)))  # rounding up may leave the last ranges empty
    launch = Launch(
        "tap_product",
        out_tiles * in_tiles * problem.packs("weight_grad") * ranges,
        per_split // config.block_pixels,
        config,
        {"num_pixels": problem.pixels, "pixels_per_split": per_split},
        {
            **_pair("", "HEIGHT", "WIDTH", problem.out_size),
            "GY_CHANNELS": problem.outputs,
            **_images("X", (problem.height, problem.width), problem.inputs),
            "NUM_GROUPS": problem.groups,
            **_sides("STRIDE", problem.geometry.stride),
            **_sides("PADDING", problem.geometry.padding),
            **_sides("DILATION", problem.geometry.dilation),
            "TAPS": problem.taps,
            "KERNEL_W": problem.kernel[1],
            "C": problem.group_inputs,
            "D": problem.group_outputs,
            "PACK": problem.pack("weight_grad"),
            "PRECISION": precision,
            "BLOCK_PIXELS": config.block_pixels,
            "BLOCK_OUT": config.block_out,
            "BLOCK_IN": config.block_in,
        },
    )
    return launch, ranges


class Phase(NamedTuple):
    """Pixels `place, place + stride, ...` of one axis of x, and the taps that reach them."""

    place: int
    size: int  # pixels
    taps: int
    tap_start: int
    tap_step: int
    start: int  # where in gy the first pixel meets its first tap
    step: int  # from there to the next tap


def phases(problem: Problem, axis: int) -> Iterator[Phase]:
    """The phases of an axis (0 height, 1 width); pixel i meets tap k where stride divides i + padding - k dilation."""
    stride, padding, dilation = (pair[axis] for pair in problem.geometry)
    kernel, size = problem.kernel[axis], (problem.height, problem.width)[axis]
    tap_step = stride // gcd(stride, dilation)
    for place in range(min(stride, size)):
        pixels = -(-(size - place) // stride)
        first = next((k for k in range(kernel) if (place + padding - k * dilation) % stride == 0), None)
        if first is None:
            yield Phase(place, pixels, 0, 0, 0, 0, 0)
            continue
        yield Phase(
            place,
            pixels,
            taps=-(-(kernel - first) // tap_step),
            tap_start=first,
            tap_step=tap_step,
            start=(place + padding - first * dilation) // stride,
            step=-tap_step * dilation // stride,
        )


def _pair(name: str, first: str, second: str, values: Sequence[int]) -> dict[str, int]:
    prefix = f"{name}_" if name else ""
    return {f"{prefix}{first}": values[0], f"{prefix}{second}": values[1]}


def _sides(name: str, values: Sequence[int]) -> dict[str, int]:
    return _pair(name, "H", "W", values)


def _images(name: str, size: Sequence[int], channels: int) -> dict[str, int]:
    return _pair(name, "HEIGHT", "WIDTH", size) | {f"{name}_CHANNELS": channels}
