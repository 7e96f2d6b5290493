"""Kernels compiled ahead, by many processes at once: that is most of what a first measurement takes.

Triton keeps what it has compiled in `$TRITON_CACHE_DIR`, or `~/.triton/cache`, for every process of a user.
"""

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import torch
from torch import Tensor

from twolevel.ops.kernels.triton import grouped
from twolevel.ops.kernels.triton.configs import Config
from twolevel.ops.kernels.triton.estimate import candidates
from twolevel.ops.kernels.triton.problem import Operation, problem_of
from twolevel.ops.problem import Problem


class Job(NamedTuple):
    """An operation of a layer, with so many outputs: those of the local part, or its representatives.

    `joined` with the restriction it computes representatives as well; `maps` of them add the coarse term.
    """

    layer: Problem
    operation: Operation
    outputs: int
    joined: bool = False
    maps: int = 0

    def runs(self, most: int, precision: str) -> list[Callable[[], object]]:
        """The operation by each of its `most` best configurations, on zeros."""
        layer, options = self.layer, {"dtype": self.layer.dtype, "device": self.layer.device}

        def image(channels: int, size: tuple[int, int]) -> Tensor:
            shape = (layer.batch, channels, *size)
            return torch.zeros(shape, **options).contiguous(memory_format=torch.channels_last)

        def weight(rows: int) -> Tensor:
            return torch.zeros(rows, *layer.local_shape[1:], **options)

        x, own, groups = image(layer.inputs, layer.size), weight(self.outputs), layer.groups
        restriction = weight(groups * layer.representatives) if self.joined else None
        coarse = z = None
        if self.maps:
            coarse = torch.zeros(self.outputs, self.maps, **options)
            z = torch.zeros(self.maps, layer.batch, *layer.output, **options)
        gy = image(self.outputs, layer.output)

        def run(config: Config) -> object:
            how = {"config": config, "precision": precision}
            if self.operation == "forward":
                return grouped.forward(x, own, layer.geometry, groups, restriction, coarse, z, **how)
            if self.operation == "input_grad":
                return grouped.input_grad(gy, own, x.shape, layer.geometry, groups, **how)
            return grouped.weight_grad(gy, x, own.shape, layer.geometry, groups, **how)

        joined = layer.representatives if self.joined else 0
        problem = problem_of(x.shape, own.shape, layer.geometry, groups, x.dtype, joined)
        on_card = layer.device.type == "cuda"
        capability = torch.cuda.get_device_capability(layer.device) if on_card else None
        configs = candidates(problem, self.operation, capability)[:most]
        return [lambda config=config: run(config) for config in configs]


def jobs(layer: Problem) -> list[Job]:
    """Every operation that the schedules of `TritonKernels` ask for."""
    operations: tuple[Operation, ...] = ("forward", "input_grad", "weight_grad")
    maps = layer.groups * layer.representatives
    found = [Job(layer, "forward", layer.outputs, joined=True)]
    if layer.ranks == 1:
        found.append(Job(layer, "forward", layer.outputs, maps=maps))
    return found + [Job(layer, one, outputs) for outputs in (layer.outputs, maps) for one in operations]


def compile_ahead(layers: Iterable[Problem], processes: int, *, most: int, precision: str) -> list[str]:
    """Compile the kernels of these layers, each in its `most` best configurations; returns what cannot be, and why.

    Each is run once on the card of its layer, so that what is compiled is what will be asked for.
    """
    able = [layer for layer in dict.fromkeys(layers) if grouped.unsupported(layer) is None]
    todo = [(job, most, precision) for layer in able for job in jobs(layer)]
    if not todo:
        return []
    context = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot be forked
    failed = []
    with ProcessPoolExecutor(min(processes, len(todo)), mp_context=context) as pool:
        try:
            for found in pool.map(compile_job, *zip(*todo, strict=True)):
                failed += found
        except BrokenProcessPool as error:  # the layers are compiled where they are measured
            failed.append(f"all that had not been compiled yet: {error}")
    return failed


def compile_job(job: Job, most: int, precision: str) -> list[str]:
    """Run the kernels of a job; returns why those that fail do."""
    from triton.runtime.errors import OutOfResources

    failed = []
    for run in job.runs(most, precision):
        try:
            run()
            if job.layer.device.type == "cuda":
                torch.cuda.synchronize(job.layer.device)
        except OutOfResources:  # as in a measurement, which leaves it out
            continue
        except Exception as error:
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            failed.append(f"{job.operation} of {job.layer.title()}, {job.outputs} outputs: {why}")
    return failed
