"""Chooses how batch normalisation is computed: looks the kernels up; else lists those that can, and measures them.

torch    operations of torch: on one rank its own batch norm and ReLU, as without this package
native   C kernels (CPU, float32)
triton   Triton kernels (GPU)
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from twolevel.errors import UserError, unknown
from twolevel.ops import autotune
from twolevel.ops.autotune import Decision, Form, Plans, Run
from twolevel.ops.kernels.native import NativeNormaliser
from twolevel.ops.kernels.normalise import Normaliser, TorchNormaliser
from twolevel.ops.kernels.triton import TritonNormaliser
from twolevel.ops.normalise_problem import NormaliseProblem, memory_of
from twolevel.settings import NORMALISERS

SETS: dict[str, Normaliser] = {
    kernels.name: kernels for kernels in (NativeNormaliser(), TorchNormaliser(), TritonNormaliser())
}
SCHEDULE = "normalise"  # there is one: the first word of a form

_chosen: Plans[Normaliser] = Plans()


def normaliser_for(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    replicas: int,
    kernels: str,
    *,
    may_measure: bool,
) -> Normaliser:
    """The requested kernels for these tensors; for `auto` the fastest as measured, as `dispatch.plan_for` has it.

    Raises UserError for an unknown name and for kernels that cannot compute these tensors here.
    """
    key = (
        *(x.shape, x.dtype, x.device, type(x), memory_of(x)),
        None if weight is None else (weight.dtype, weight.device, type(weight)),
        None if bias is None else (bias.dtype, bias.device, type(bias)),
        *(relu, replicas, kernels, torch.get_num_threads()),
    )
    found = _chosen.get(key)
    if found is None:
        problem = NormaliseProblem.of(x, weight, bias, relu, replicas)
        able = able_forms(problem, kernels)
        form, settled = autotune.form_now(problem, able, decide, may_measure=may_measure)
        found = SETS[form.kernels]
        if settled:
            _chosen[key] = found
    return found


def able_forms(problem: NormaliseProblem, kernels: str = "auto") -> list[Form]:
    """The requested kernels that can compute this problem here, at least one; the best estimate first.

    Raises UserError for an unknown name, and where there are none.
    """
    if kernels not in NORMALISERS:
        raise unknown("kernels", kernels, NORMALISERS)
    reasons = {name: found.unsupported(problem) for name, found in SETS.items()}
    able = [name for name, reason in reasons.items() if reason is None]
    able.sort(key=lambda name: SETS[name].estimate(problem))
    asked = [Form(SCHEDULE, name) for name in able if kernels in ("auto", name)]
    if not asked:
        *some, last = "auto", *sorted(able)
        raise UserError(
            f"kernels={kernels!r} cannot compute {problem.title()} on {problem.device}: {reasons[kernels]}; "
            f"use {', '.join(some)} or {last}"
        )
    return asked


def decide(problem: NormaliseProblem, able: Sequence[Form], *, may_measure: bool) -> Decision | None:
    """The fastest of `able`; None where it is unknown and must not be measured now."""
    small = problem.values < autotune.SMALL_VALUES
    return autotune.decide(
        problem, able, lambda problem: runs(problem, able), small=small, may_measure=may_measure
    )


def runs(problem: NormaliseProblem, able: Sequence[Form]) -> list[Run]:
    """Forward and backward of random tensors of the problem's sizes, by each form."""
    if problem.device.type == "cpu":
        images = max(1, problem.batch * autotune.CPU_VALUES // problem.values)
        problem = dataclasses.replace(problem, batch=min(problem.batch, images))
    tensors = problem.tensors()
    return [_run_of(SETS[form.kernels], problem, tensors) for form in able]


def _run_of(kernels: Normaliser, problem: NormaliseProblem, tensors: tuple[Tensor, Tensor, Tensor]) -> Run:
    eps = 1e-5
    if kernels.name == "torch" and problem.replicas == 1:
        leaves = x, weight, bias = [tensor.clone().requires_grad_() for tensor in tensors]

        def run_composed() -> None:
            with torch.enable_grad():
                o = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
                o = F.relu(o, inplace=True) if problem.relu else o
                torch.autograd.grad(o, leaves, o.detach())

        return run_composed

    @torch.no_grad()
    def run() -> None:
        o, by = kernels.forward(*tensors, eps, problem.relu, None)
        kernels.backward(o, tensors[0], None, by)

    return run
