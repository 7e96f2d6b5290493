"""Chooses how a two-level convolution is computed: looks the plan up; else lists the forms that can, and measures them.

A form is a schedule and a set of kernels:

    overlapped  grouped, products, depthwise   operations of torch, by the way of the restriction
                native                         C kernels throughout (CPU, float32)
                triton                         Triton kernels throughout (GPU)
    fused       grouped                        the paper's: one convolution with m/G + 1 outputs a group
                native                         the local part in one walk with the coarse term
                triton                         as grouped, the restriction in the padding of the local tile
    dense       grouped                        one dense convolution with the structured weight (one rank)
"""

import dataclasses
import logging
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from twolevel.errors import UserError, unknown
from twolevel.ops import autotune, schedules
from twolevel.ops.autotune import Decision, Form, Plans, Run
from twolevel.ops.exchange import LOCAL, Copies, Exchange
from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels.base import KernelSet
from twolevel.ops.kernels.native import NativeKernels, available
from twolevel.ops.kernels.torch import TorchKernels
from twolevel.ops.kernels.triton import TritonKernels
from twolevel.ops.problem import Problem
from twolevel.settings import KERNELS, SCHEDULES

KERNEL_SETS: tuple[KernelSet, ...] = (
    NativeKernels(),
    TorchKernels("products"),
    TorchKernels("depthwise"),
    TorchKernels("grouped"),
    TritonKernels(),
)
# Added to a set's estimate: before any measurement hiding the exchange is the best guess.
ESTIMATE = {"overlapped": 0, "fused": 10, "dense": 20}

log = logging.getLogger("twolevel.ops")


class Plan(NamedTuple):
    """What computes a layer: a schedule over a set of kernels, or None for the dense convolution."""

    form: Form
    schedule: schedules.Schedule | None


_plans: Plans[Plan] = Plans()


def plan_for(
    x: Tensor,
    local: Tensor,
    restriction: Tensor,
    coarse: Tensor,
    geometry: Geometry,
    ranks: int,
    schedule: str,
    kernels: str,
    *,
    may_measure: bool,
    may_be_dense: bool = True,
) -> Plan:
    """The plan for these tensors: the requested schedule and kernels; where they are auto, the fastest as measured.

    In the steady state this is one look-up. The best estimate is used for layers that are too small to benchmark, and
    for layers without a measurement while none may be made: if `may_measure` is False, or a CUDA graph is captured.
    Without `may_be_dense` the schedule auto is one of the others.
    Raises UserError for an unknown name and for kernels that cannot compute these tensors here.
    """
    key = (
        *(x.shape, x.dtype, x.device, type(x), x.is_contiguous(memory_format=torch.channels_last)),
        *(local.shape, local.dtype, local.device, type(local)),
        *(restriction.shape, restriction.dtype, restriction.device, type(restriction)),
        *(coarse.shape, coarse.dtype, coarse.device, type(coarse)),
        *(geometry, ranks, schedule, kernels, torch.get_num_threads(), may_be_dense),
    )
    plan = _plans.get(key)
    if plan is None:
        problem = Problem.of(x, local, restriction, coarse, geometry, ranks)
        able = able_forms(problem, schedule, kernels)
        if schedule == "auto" and not may_be_dense:
            able = [form for form in able if form.schedule != "dense"]
        form, settled = autotune.form_now(problem, able, decide, may_measure=may_measure)
        plan = _plan(form)
        if settled:
            _plans[key] = plan
    return plan


@cache
def _plan(form: Form) -> Plan:
    if form.schedule == "dense":
        return Plan(form, None)
    kind = schedules.Fused if form.schedule == "fused" else schedules.Overlapped
    return Plan(form, kind(next(found for found in KERNEL_SETS if found.name == form.kernels)))


def able_forms(
    problem: Problem, schedule: str = "auto", kernels: str = "auto", *, exchange_known: bool = False
) -> list[Form]:
    """The requested forms that can compute this problem here, at least one; the best estimate first.

    Of the schedules that wait for the exchange on several ranks, `auto` takes one only if it is known for how long.
    Raises UserError for an unknown name, and where there is none: with the reason of every requested set.
    """
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    if kernels not in KERNELS:
        raise unknown("kernels", kernels, KERNELS)
    if problem.device.type == "cpu" and problem.dtype == torch.float32:
        _warn_without_c()
    reasons = {kernel_set.name: kernel_set.unsupported(problem) for kernel_set in KERNEL_SETS}
    able = [
        (ESTIMATE[name] + kernel_set.estimate(problem), Form(name, kernel_set.name))
        for kernel_set in KERNEL_SETS
        if reasons[kernel_set.name] is None
        for name in kernel_set.schedules
        if name != "dense" or problem.ranks == 1
    ]
    forms = [form for _, form in sorted(able)]
    asked = [form for form in forms if _is_asked_for(form, schedule, kernels)]
    if schedule == "auto":
        asked = [form for form in asked if _worth_trying(form, problem, exchange_known)]
    if not asked:
        raise UserError(_cannot(problem, schedule, kernels, reasons, forms))
    return asked


def _is_asked_for(form: Form, schedule: str, kernels: str) -> bool:
    if form.schedule == schedule == "dense":  # one operation of torch, whatever the kernels
        return True
    return kernels in ("auto", form.kernels) and schedule in ("auto", form.schedule)


def _worth_trying(form: Form, problem: Problem, exchange_known: bool) -> bool:
    if form.schedule != "fused":
        return True
    if problem.ranks > 1:
        return exchange_known
    # Nothing is exchanged: kernels that join the coarse term are in one walk already.
    return not next(found for found in KERNEL_SETS if found.name == form.kernels).joins_coarse


def _cannot(
    problem: Problem, schedule: str, kernels: str, reasons: dict[str, str | None], forms: list[Form]
) -> str:
    if schedule == "dense" and problem.ranks > 1:
        return f"schedule='dense' needs every channel on one rank: this one of {problem.ranks}; use auto"
    shape = [problem.batch, problem.inputs, *problem.size]
    fit = {form.kernels for form in forms if schedule in ("auto", form.schedule)}
    *some, last = "auto", *sorted(fit)
    return (
        f"kernels={kernels!r} cannot compute {shape} in {problem.dtype} on {problem.device}: "
        f"{reasons[kernels] or f'schedule={schedule!r} has no such kernels'}; use {', '.join(some)} or {last}"
    )


@cache
def _warn_without_c() -> None:
    """Warn once a process that torch computes what C kernels would compute faster, and why."""
    if (why := available()) is not None:
        log.warning("two-level convolutions are computed without the C kernels: %s", why)


def decide(
    problem: Problem, able: Sequence[Form], *, may_measure: bool, exchange_s: float = 0.0
) -> Decision | None:
    """The fastest of `able`; None where it is unknown and must not be measured now.

    `exchange_s`: seconds of an exchange forward and backward, for which the fused schedule waits; under the overlapped
    one's local part it counts as hidden.
    """
    small = problem.macs < autotune.SMALL_MACS
    waits = {form: exchange_s for form in able if form.schedule == "fused"} if exchange_s else {}
    return autotune.decide(
        problem,
        able,
        lambda problem: runs(problem, able),
        small=small,
        may_measure=may_measure,
        waits=waits,
    )


def runs(problem: Problem, able: Sequence[Form]) -> list[Run]:
    """Forward and backward of random tensors of the problem's sizes, by each form."""
    if problem.device.type == "cpu":
        images = max(1, int(problem.batch * autotune.CPU_MACS / problem.macs))
        problem = dataclasses.replace(problem, batch=min(problem.batch, images))
    tensors = problem.tensors()
    return [_run_of(form, problem, tensors) for form in able]


def _run_of(form: Form, problem: Problem, tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> Run:
    geometry = problem.geometry
    schedule = _plan(form).schedule
    if schedule is None:
        x, local, restriction, coarse = leaves = [tensor.clone().requires_grad_() for tensor in tensors]

        def run_dense() -> None:
            with torch.enable_grad():
                y = schedules.dense(x, local, restriction, coarse, geometry)
                torch.autograd.grad(y, leaves, y.detach())

        return run_dense
    exchange: Exchange = LOCAL if problem.ranks == 1 else Copies(problem.ranks)
    everything = (True, True, True, True)

    def run() -> None:
        with torch.no_grad():
            y, z = schedule.forward(*tensors, geometry, exchange)
            schedule.backward(y, *tensors, z, geometry, exchange, everything)

    return run
