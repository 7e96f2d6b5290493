"""How a kernel tiles its work: the configurations there are, and the choice without a measurement."""

from functools import lru_cache
from typing import Literal, NamedTuple, get_args

from twolevel.errors import UserError, unknown
from twolevel.ops.kernels.triton.problem import TILE, Problem

Operation = Literal["forward", "input_grad", "weight_grad"]
OPERATIONS: tuple[str, ...] = get_args(Operation)


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
        (128, 128, 64, 8, 3),
        (128, 64, 128, 8, 3),
        (128, 128, 32, 8, 3),
        (128, 32, 128, 8, 3),
        (128, 64, 64, 4, 3),
        (64, 128, 128, 8, 2),
        (64, 128, 64, 4, 3),
        (64, 64, 128, 4, 3),
        (128, 64, 32, 4, 4),
        (128, 32, 64, 4, 4),
        (64, 64, 64, 4, 4),
        (128, 32, 32, 4, 4),
        (64, 64, 32, 4, 4),
        (64, 32, 64, 4, 4),
        (64, 32, 32, 4, 4),
        (128, 64, 16, 4, 4),
        (128, 16, 64, 4, 4),
        (128, 32, 16, 4, 4),
        (128, 16, 32, 4, 4),
        (128, 16, 16, 4, 4),
        (64, 16, 16, 4, 4),
        (32, 32, 32, 2, 4),
        (32, 16, 16, 2, 4),
    ]
)

# Shared memory of a program: Ampere cards other than the A100 have 99 KiB.
SHARED_BYTES = 96 * 1024
# Programs below which a large card has idle processors; an H100 has 132.
ENOUGH_PROGRAMS = 256


def tiles(problem: Problem, config: Config, operation: Operation) -> tuple[int, int, int]:
    """(pixel tiles, output tiles, input tiles) of one pack of groups."""
    columns = problem.pack * (problem.group_outputs + (problem.restriction and operation == "forward"))
    rows = problem.pixels
    if operation == "input_grad":
        rows = problem.batch * problem.height * problem.width
    inputs = problem.pack * problem.group_inputs
    return -(-rows // config.block_pixels), -(-columns // config.block_out), -(-inputs // config.block_in)


def candidates(problem: Problem, operation: Operation) -> list[Config]:
    """The configurations that fit a card, the most promising first; no card was asked, this is an estimate.

    Padded multiplications, each weighted by the loads it needs, and by how far the programs fill a card.
    """
    fitting = [config for config in CONFIGS if _shared_bytes(problem, config, operation) <= SHARED_BYTES]
    return sorted(fitting, key=lambda config: _cost(problem, config, operation))


def pick(
    problem: Problem,
    operation: Operation,
    override: Config | None = None,
    measured: Config | None = None,
) -> Config:
    """The configuration to run: the override, else the measured one, else the best estimate.

    Raises UserError for an operation that is not one of OPERATIONS and for an override that no kernel can run.
    """
    if operation not in OPERATIONS:
        raise unknown("operation", operation, OPERATIONS)
    if override is not None:
        return _checked(Config(*override))
    return measured or _estimate(problem, operation)


@lru_cache(maxsize=1024)  # of a pure function, which every call of every layer asks for
def _estimate(problem: Problem, operation: Operation) -> Config:
    return candidates(problem, operation)[0]


def _checked(config: Config) -> Config:
    for name, size in zip(config._fields[:3], config, strict=False):
        if size < TILE or size & (size - 1):
            raise UserError(f"{name}={size} is not a power of two of at least {TILE}; use 16, 32, 64 or 128")
    if config.num_warps not in (1, 2, 4, 8, 16):
        raise UserError(f"num_warps={config.num_warps} is not one of 1, 2, 4, 8, 16")
    if config.num_stages < 1:
        raise UserError(f"num_stages={config.num_stages} is less than 1; use 1 to 5")
    return config


def _shared_bytes(problem: Problem, config: Config, operation: Operation) -> int:
    """Bytes of the two operands of a product, once for every stage of the pipeline."""
    pixels, out, inp = config[:3]
    # The contracted side, then the two sides of the result.
    k, rows, columns = {
        "forward": (inp, pixels, out),
        "input_grad": (out, pixels, inp),
        "weight_grad": (pixels, out, inp),
    }[operation]
    return k * (rows + columns) * problem.dtype.itemsize * config.num_stages


def _cost(problem: Problem, config: Config, operation: Operation) -> float:
    rows, outs, ins = tiles(problem, config, operation)
    pixels, out, inp = config[:3]
    padded = rows * pixels * outs * out * ins * inp
    sides = {"forward": (pixels, out), "input_grad": (pixels, inp), "weight_grad": (out, inp)}[operation]
    loads = sum(TILE / side for side in sides)
    if operation == "weight_grad":  # it is split over pixels until it fills the card
        return padded * (1 + loads)
    programs = problem.packs * rows * (outs if operation == "forward" else ins)
    return padded * (1 + loads) * max(1.0, ENOUGH_PROGRAMS / max(1, programs))
