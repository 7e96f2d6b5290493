"""Measured configurations, kept on disk: what was the fastest for an operation, a problem, a card and a Triton."""

import hashlib
import importlib.metadata
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from twolevel.errors import UserError, unknown
from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels.triton import grouped
from twolevel.ops.kernels.triton.configs import OPERATIONS, Config
from twolevel.ops.kernels.triton.estimate import candidates
from twolevel.ops.kernels.triton.problem import Operation, Problem, problem_of, representatives_of
from twolevel.ops.problem import batch_class
from twolevel.ops.store import Store, cache_folder

FILE = "grouped_convolution.json"


def key(operation: Operation, problem: Problem, card: str, precision: str = "ieee") -> str:
    """Everything that a measurement depends on, in one line."""
    batch = batch_class(problem.batch)
    sizes = (batch, problem.inputs, problem.outputs, problem.groups, problem.height, problem.width)
    kernel = f"{'x'.join(map(str, sizes))} kernel {problem.kernel} {tuple(map(tuple, problem.geometry))}"
    z = f" with {problem.representatives} representatives" if problem.representatives else ""
    return f"{operation} | {kernel}{z} | {problem.dtype} {precision} | {card} | {version()}"


@cache
def version() -> str:
    """Triton's version and a digest of these files: by another Triton, or of other kernels, nothing is known."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return f"triton {triton} kernels {digest.hexdigest()[:8]}"


class Choices:
    """The measured configurations of a folder, read once; `get` is a look-up and `keep` writes."""

    def __init__(self, folder: Path | None = None):
        self._store = Store((folder or cache_folder()) / FILE)
        self.path = self._store.path

    def get(
        self, operation: Operation, problem: Problem, card: str, precision: str = "ieee"
    ) -> Config | None:
        found = self._store.get(key(operation, problem, card, precision))
        if found is None:
            return None
        try:
            return Config(*map(int, found))
        except (TypeError, ValueError):  # not what `keep` writes: it is measured again
            return None

    def keep(
        self, operation: Operation, problem: Problem, card: str, config: Config, precision: str = "ieee"
    ) -> None:
        """Add a choice, to this object and to the file, beside what others have written since."""
        self._store.keep(key(operation, problem, card, precision), list(config))


def tune(
    operation: Operation,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    groups: int,
    restriction: Tensor | None = None,
    *,
    choices: Choices | None = None,
    most: int = 8,
    precision: str = "ieee",
) -> dict[Config, float]:
    """Milliseconds of the `most` best estimates on the card of x, the fastest first; keeps it in `choices`.

    Configurations that need more of the card than it has are left out. Raises UserError without a card: the
    interpreter's times say nothing of one.
    """
    if operation not in OPERATIONS:
        raise unknown("operation", operation, OPERATIONS)
    if not x.is_cuda:
        raise UserError(f"tune measures on a CUDA card, and x is on {x.device}")
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    restriction = restriction if operation == "forward" else None
    representatives = representatives_of(restriction, groups)
    problem = problem_of(x.shape, weight.shape, geometry, groups, x.dtype, representatives)
    run = _runner(operation, problem, x, weight, restriction, precision)
    times = {}
    capability = torch.cuda.get_device_capability(x.device)
    for config in candidates(problem, operation, capability)[:most]:
        try:
            times[config] = do_bench(lambda config=config: run(config), return_mode="median")
        except OutOfResources:
            continue
    if not times:
        raise UserError(
            f"none of the {most} best configurations of {operation} fits {torch.cuda.get_device_name(x.device)}; "
            f"use more than most={most}"
        )
    times = dict(sorted(times.items(), key=lambda item: item[1]))
    if choices is not None:
        choices.keep(operation, problem, torch.cuda.get_device_name(x.device), next(iter(times)), precision)
    return times


def _runner(
    operation: Operation,
    problem: Problem,
    x: Tensor,
    weight: Tensor,
    restriction: Tensor | None,
    precision: str,
) -> Callable[[Config], object]:
    geometry, groups = problem.geometry, problem.groups
    if operation == "forward":
        return lambda config: grouped.forward(
            x, weight, geometry, groups, restriction, config=config, precision=precision
        )
    shape = (problem.batch, problem.outputs, *problem.out_size)
    gy = torch.randn(shape, dtype=x.dtype, device=x.device).contiguous(memory_format=torch.channels_last)
    if operation == "input_grad":
        return lambda config: grouped.input_grad(
            gy, weight, x.shape, geometry, groups, config=config, precision=precision
        )
    return lambda config: grouped.weight_grad(
        gy, x, weight.shape, geometry, groups, config=config, precision=precision
    )
