"""What the operations launch, from sizes alone: no tensor, no card and no Triton are needed to say it."""

from collections.abc import Iterator
from math import gcd
from typing import NamedTuple

from twolevel.ops.kernels.triton.configs import Config, tiles
from twolevel.ops.kernels.triton.problem import Problem, round_up

# The weight gradient is split over pixels into about so many programs. It is a constant, and not a count of the
# card's processors, so that the order of the sum does not depend on the card.
SPLIT_PROGRAMS = 512

Strides = tuple[int, int, int]
"""Of the (row, channel, tap) of a weight."""


class Launch(NamedTuple):
    """A kernel of `kernels` by its name, and all of its arguments but the tensors."""

    kernel: str
    programs: int
    steps: int
    """Tiles that a program multiplies, one after the other."""
    config: Config
    sizes: dict[str, int]
    """Arguments of the compiled kernel."""
    constants: dict[str, int | str]
    """What it is compiled for."""


def forward(
    problem: Problem,
    config: Config,
    precision: str,
    weight: Strides,
    restriction: Strides | None = None,
    maps: int = 0,
) -> Launch:
    """y, with a restriction also z; `maps` representatives add the coarse term."""
    pixel_tiles, out_tiles, in_tiles = tiles(problem, config, "forward")
    (sh, sw), (ph, pw), (dh, dw) = problem.geometry
    row, channel, tap = weight
    out_height, out_width = problem.out_size
    return Launch(
        "gather_product",
        pixel_tiles * out_tiles * problem.packs,
        problem.taps * in_tiles,
        config,
        {
            "num_rows": problem.pixels,
            "row_height": out_height,
            "row_width": out_width,
            **_images("x", problem.height, problem.width, problem.inputs),
            **_images("out", out_height, out_width, problem.outputs),
            "num_groups": problem.groups,
            **_pair("x_scale", sh, sw),
            **_pair("x_start", -ph, -pw),
            **_pair("x_step", dh, dw),
            **_pair("tap_start", 0, 0),
            **_pair("tap_step", 1, 1),
            **_pair("out_scale", 1, 1),
            **_pair("out_start", 0, 0),
            "w_group": problem.group_outputs * row,
            "w_column": row,
            "w_channel": channel,
            "w_tap": tap,
            **_restriction(restriction),
            "num_maps": maps,
        },
        {
            "TAPS_H": problem.kernel[0],
            "TAPS_W": problem.kernel[1],
            "KERNEL_W": problem.kernel[1],
            "C": problem.group_inputs,
            "D": problem.group_outputs,
            "PACK": problem.pack,
            "HAS_R": int(restriction is not None),
            "HAS_COARSE": int(maps > 0),
            "PRECISION": precision,
            "BLOCK_ROW": config.block_pixels,
            "BLOCK_COLUMN": config.block_out,
            "BLOCK_K": config.block_in,
        },
    )


def input_grad(problem: Problem, config: Config, precision: str, weight: Strides) -> Iterator[Launch]:
    """The gradient of x: pixels of x whose places agree modulo the stride meet the same taps, so each such phase is
    one launch that skips taps that contribute nothing.
    """
    row, channel, tap = weight
    _, out_tiles, in_tiles = tiles(problem, config, "input_grad")
    for phase_h in phases(problem, 0):
        for phase_w in phases(problem, 1):
            rows = problem.batch * phase_h.size * phase_w.size
            yield Launch(
                "gather_product",
                -(-rows // config.block_pixels) * in_tiles * problem.packs,
                phase_h.taps * phase_w.taps * out_tiles,
                config,
                {
                    "num_rows": rows,
                    "row_height": phase_h.size,
                    "row_width": phase_w.size,
                    **_images("x", *problem.out_size, problem.outputs),
                    **_images("out", problem.height, problem.width, problem.inputs),
                    "num_groups": problem.groups,
                    **_pair("x_scale", 1, 1),
                    **_pair("x_start", phase_h.start, phase_w.start),
                    **_pair("x_step", phase_h.step, phase_w.step),
                    **_pair("tap_start", phase_h.tap_start, phase_w.tap_start),
                    **_pair("tap_step", phase_h.tap_step, phase_w.tap_step),
                    **_pair("out_scale", *problem.geometry.stride),
                    **_pair("out_start", phase_h.place, phase_w.place),
                    "w_group": problem.group_outputs * row,
                    "w_column": channel,
                    "w_channel": row,
                    "w_tap": tap,
                    **_restriction(None),
                    "num_maps": 0,
                },
                {
                    "TAPS_H": phase_h.taps if phase_w.taps else 0,
                    "TAPS_W": max(1, phase_w.taps),
                    "KERNEL_W": problem.kernel[1],
                    "C": problem.group_outputs,
                    "D": problem.group_inputs,
                    "PACK": problem.pack,
                    "HAS_R": 0,
                    "HAS_COARSE": 0,
                    "PRECISION": precision,
                    "BLOCK_ROW": config.block_pixels,
                    "BLOCK_COLUMN": config.block_in,
                    "BLOCK_K": config.block_out,
                },
            )


def weight_grad(problem: Problem, config: Config, precision: str) -> tuple[Launch, int]:
    """The launch, and the number of partial sums it leaves: ranges of pixels are summed apart."""
    pixel_tiles, out_tiles, in_tiles = tiles(problem, config, "weight_grad")
    programs = out_tiles * in_tiles * problem.packs * problem.taps
    size = problem.outputs * problem.taps * problem.group_inputs
    splits = max(1, min(SPLIT_PROGRAMS // programs, pixel_tiles, (2**31 - 1) // max(1, size)))
    per_split = round_up(-(-problem.pixels // splits), config.block_pixels)
    splits = max(1, -(-problem.pixels // max(1, per_split)))  # rounding up may leave the last ranges empty
    out_height, out_width = problem.out_size
    launch = Launch(
        "tap_product",
        programs * splits,
        per_split // config.block_pixels,
        config,
        {
            "num_pixels": problem.pixels,
            **_images("", out_height, out_width),
            "gy_channels": problem.outputs,
            **_images("x", problem.height, problem.width, problem.inputs),
            "num_groups": problem.groups,
            **_pair("stride", *problem.geometry.stride),
            **_pair("padding", *problem.geometry.padding),
            **_pair("dilation", *problem.geometry.dilation),
            "pixels_per_split": per_split,
        },
        {
            "TAPS": problem.taps,
            "KERNEL_W": problem.kernel[1],
            "C": problem.group_inputs,
            "D": problem.group_outputs,
            "PACK": problem.pack,
            "PRECISION": precision,
            "BLOCK_PIXELS": config.block_pixels,
            "BLOCK_OUT": config.block_out,
            "BLOCK_IN": config.block_in,
        },
    )
    return launch, splits


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


def _images(name: str, height: int, width: int, channels: int | None = None) -> dict[str, int]:
    prefix = f"{name}_" if name else ""
    sizes = {f"{prefix}height": height, f"{prefix}width": width}
    return sizes if channels is None else sizes | {f"{prefix}channels": channels}


def _pair(name: str, height: int, width: int) -> dict[str, int]:
    return {f"{name}_h": height, f"{name}_w": width}


def _restriction(strides: Strides | None) -> dict[str, int]:
    return dict(zip(("r_group", "r_channel", "r_tap"), strides or (0, 0, 0), strict=True))
