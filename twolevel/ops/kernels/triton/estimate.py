"""The choice of a configuration without a measurement: what each is estimated to take."""

import math
from dataclasses import replace
from functools import lru_cache

from twolevel.errors import unknown
from twolevel.ops.kernels.triton.configs import CONFIGS, OPERATIONS, Config, checked, sides, splits, tiles
from twolevel.ops.kernels.triton.problem import Operation, Problem
from twolevel.ops.problem import batch_class

# KiB of shared memory of a processor by compute capability; of a program one less. NVIDIA, "CUDA C++ Programming
# Guide", technical specifications.
SHARED_KIB = {(8, 0): 164, (8, 6): 100, (8, 7): 164, (8, 9): 100, (9, 0): 228, (10, 0): 228, (12, 0): 100}
# What the estimate takes a card to be, an H100: processors, registers of one, then of one in a cycle multiplications
# of bfloat16, bytes from the cache that all share, and instructions; and the cycles that a load from there takes.
PROCESSORS, REGISTERS, PRODUCTS, BYTES, INSTRUCTIONS, LATENCY = 132, 1 << 16, 2048, 32, 2.8, 700


def shared_bytes(capability: tuple[int, int] | None = None) -> int:
    """Shared memory of a program, at most: of the smallest card where the compute capability is not known."""
    return (SHARED_KIB.get(capability or (0, 0), min(SHARED_KIB.values())) - 1) << 10


def candidates(
    problem: Problem, operation: Operation, capability: tuple[int, int] | None = None
) -> list[Config]:
    """The configurations that fit a card of this compute capability (every card without one), the most promising
    first; no card was asked, this is an estimate. A smaller last batch has those of its class.
    """
    problem = replace(problem, batch=batch_class(problem.batch))
    most = shared_bytes(capability)
    fitting = [config for config in CONFIGS if _shared_bytes(problem, config, operation) <= most]
    # Of equals, as where latency is all, the smaller tile: it pads less.
    return sorted(
        fitting, key=lambda config: (_cycles(problem, config, operation, most), math.prod(config[:3]))
    )


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
        return checked(Config(*override))
    return measured or _estimate(problem, operation)


@lru_cache(maxsize=1024)  # of a pure function, which every call of every layer asks for
def _estimate(problem: Problem, operation: Operation) -> Config:
    return candidates(problem, operation)[0]


def _shared_bytes(problem: Problem, config: Config, operation: Operation) -> int:
    """Bytes of the two operands of a product, once for every stage of the pipeline; or of the result, which goes
    through shared memory too, where these are more.
    """
    rows, columns, depth = sides(config, operation)
    operands = depth * (rows + columns) * problem.dtype.itemsize * config.num_stages
    result = rows * columns * (4 if operation == "weight_grad" else problem.dtype.itemsize)
    return max(operands, result)


def _cycles(problem: Problem, config: Config, operation: Operation, shared: int) -> float:
    """Cycles of a card for an operation: the slowest of multiplying, loading and issuing instructions, and a quarter
    of the others, as they do not quite hide each other; or the latency of loads, where few programs run at once.
    """
    rows, columns, depth = sides(config, operation)
    pixels, outs, ins = tiles(problem, config, operation)
    packs = problem.packs(operation)
    if operation == "weight_grad":
        ranges = splits(problem, config)
        programs, steps = packs * outs * ins * ranges, pixels / ranges
    elif operation == "forward":
        programs, steps = packs * pixels * outs, ins
    else:
        programs, steps = packs * pixels * ins, outs
    loaded = depth * (rows + columns) * problem.dtype.itemsize
    channels = problem.group_outputs if operation == "input_grad" else problem.group_inputs
    copy = problem.copy_bytes(problem.pack(operation) * channels)
    # Counted by benchmarks kernels: 60 instructions of a warp for a tile, and 6 for each of its copies, 14 where every
    # pixel is found anew.
    issued = 60 * config.num_warps + (14 if operation == "weight_grad" else 6) * loaded / copy / 32
    parts = (
        rows * columns * depth / PRODUCTS * problem.dtype.itemsize / 2,
        loaded / BYTES,
        issued / INSTRUCTIONS,
    )
    step = max(parts) + (sum(parts) - max(parts)) / 4
    threads = 32 * config.num_warps
    registers = rows * columns / threads + 64
    used = _shared_bytes(problem, config, operation) + 1024
    at_once = min(REGISTERS // (threads * registers), shared // used, 2048 // threads)
    at_once = max(1, int(at_once))
    alone = steps * LATENCY / max(1, config.num_stages - 1) + 3 * LATENCY
    full, rest = divmod(programs, PROCESSORS * at_once)
    last = -(-rest // PROCESSORS)
    return full * max(at_once * steps * step, alone) + (max(last * steps * step, alone) if rest else 0)
