"""How a kernel tiles its work: the configurations there are, and what each makes of a problem."""

from typing import NamedTuple, get_args

from twolevel.errors import UserError
from twolevel.ops.kernels.triton.problem import TILE, Operation, Problem

OPERATIONS: tuple[str, ...] = get_args(Operation)
# The weight gradient is split over pixels into about so many programs. It is a constant, and not a count of the
# card's processors, so that the order of the sum does not depend on the card.
SPLIT_PROGRAMS = 512


class Config(NamedTuple):
    """Sides of a tile, powers of two of at least 16; then warps of a program and stages of its pipeline.

    Whatever the operation, `block_out` tiles the output channels and `block_in` the input channels of a convolution.
    """

    block_pixels: int
    block_out: int
    block_in: int
    num_warps: int
    num_stages: int


CONFIGS: tuple[Config, ...] = tuple(
    Config(*config)
    for config in [
        (128, 256, 64, 8, 3),
        (256, 128, 64, 8, 3),
        (128, 64, 256, 8, 3),
        (256, 64, 128, 8, 3),
        (64, 128, 256, 8, 3),
        (32, 128, 256, 8, 3),
        (16, 64, 256, 4, 4),
        (256, 64, 32, 8, 3),
        (256, 32, 64, 8, 3),
        (128, 128, 64, 8, 3),
        (128, 64, 128, 8, 3),
        (64, 128, 128, 8, 3),
        (64, 64, 128, 4, 3),
        (128, 128, 32, 8, 3),
        (128, 32, 128, 8, 3),
        (128, 64, 64, 4, 3),
        (256, 32, 32, 4, 3),
        (256, 16, 32, 4, 3),
        (256, 16, 16, 4, 4),
        (128, 64, 32, 4, 4),
        (128, 32, 64, 4, 4),
        (128, 16, 128, 4, 4),
        (64, 16, 256, 4, 3),
        (64, 64, 64, 4, 4),
        (128, 32, 32, 4, 4),
        (64, 64, 32, 4, 4),
        (64, 32, 64, 4, 4),
        (64, 32, 32, 4, 4),
        (128, 16, 64, 4, 4),
        (128, 64, 16, 4, 4),
        (128, 32, 16, 4, 4),
        (128, 16, 32, 4, 4),
        (128, 16, 16, 4, 4),
        (64, 16, 16, 4, 4),
        (32, 32, 32, 2, 4),
        (32, 16, 16, 2, 4),
    ]
)


class Sides(NamedTuple):
    """Of a tile: the two of the result, and the one that is summed over."""

    rows: int
    columns: int
    depth: int


def sides(config: Config, operation: Operation) -> Sides:
    pixels, out, inp = config[:3]
    if operation == "forward":
        return Sides(pixels, out, inp)
    return Sides(pixels, inp, out) if operation == "input_grad" else Sides(out, inp, pixels)


def tiles(problem: Problem, config: Config, operation: Operation) -> tuple[int, int, int]:
    """(pixel tiles, output tiles, input tiles) of one pack of groups; every tap has inputs or outputs of its own."""
    pack = problem.pack(operation)
    outputs = pack * (problem.group_outputs + (problem.representatives if operation == "forward" else 0))
    inputs = pack * problem.group_inputs
    pixels = problem.pixels
    if operation == "input_grad":
        pixels = problem.batch * problem.height * problem.width
        outputs *= problem.taps
    else:
        inputs *= problem.taps
    sides = zip((pixels, outputs, inputs), config, strict=False)
    pixel_tiles, out_tiles, in_tiles = (-(-side // block) for side, block in sides)
    return pixel_tiles, out_tiles, in_tiles


def splits(problem: Problem, config: Config) -> int:
    """Into how many ranges of pixels a weight gradient is split, at least one."""
    pixel_tiles, out_tiles, in_tiles = tiles(problem, config, "weight_grad")
    size = problem.outputs * problem.taps * problem.group_inputs
    programs = out_tiles * in_tiles * problem.packs("weight_grad")
    return max(1, min(SPLIT_PROGRAMS // programs, pixel_tiles, (2**31 - 1) // max(1, size)))


def checked(config: Config) -> Config:
    """The configuration. Raises UserError for one that no kernel can run."""
    for name, size in zip(config._fields[:3], config, strict=False):
        if size < TILE or size & (size - 1):
            raise UserError(
                f"{name}={size} is not a power of two of at least {TILE}; use 16, 32, 64, 128 or 256"
            )
    if config.num_warps not in (1, 2, 4, 8, 16):
        raise UserError(f"num_warps={config.num_warps} is not one of 1, 2, 4, 8, 16")
    if config.num_stages < 1:
        raise UserError(f"num_stages={config.num_stages} is less than 1; use 1 to 5")
    return config
