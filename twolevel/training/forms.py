"""The form of each two-level convolution of a run: decided before its first step, and then part of its state.

Another form gives other rounding errors. A run that goes on, and one that is started from another's config.json, takes
the forms recorded there; so its results do not depend on what the machine measured.
"""

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from twolevel.distributed.agreement import all_gather
from twolevel.distributed.strategies import Placed
from twolevel.nn import TwoLevelConv2d
from twolevel.ops.autotune import Decision, Form
from twolevel.ops.dispatch import able_forms, decide
from twolevel.ops.problem import Problem
from twolevel.streams import stream


@dataclass
class ChosenForms:
    """The forms of a network: by layer sizes "schedule kernels", as config.json holds them, and why each."""

    forms: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    measured: int = 0
    seconds: float = 0.0


def fix_forms(
    placed: Placed, batch: int, image_shape: tuple[int, int, int], recorded: dict[str, str]
) -> ChosenForms:
    """Decide for every two-level convolution of this rank's part of a network, and set its `schedule` and `kernels`.

    The layers' sizes are those of a forward in evaluation mode of `batch` random images, which leaves no trace. What
    `recorded` has is taken, the rest measured; where ranks measure differently the first rank's is taken by all.
    Every rank must call this. Warns of what is recorded and cannot be computed here.
    """
    layers = [module for module in placed.model.modules() if isinstance(module, TwoLevelConv2d)]
    chosen, began = ChosenForms(), time.perf_counter()
    titles: dict[TwoLevelConv2d, str] = {}
    able: dict[str, list[Form]] = {}

    def before_forward(layer: TwoLevelConv2d, inputs: tuple[Tensor, ...]) -> None:
        problem = layer.problem(inputs[0])
        title = titles[layer] = problem.title()
        if title not in able:
            able[title] = able_forms(problem, layer.schedule, layer.kernels)
            decision, why = _decide(problem, able[title], recorded.get(title))
            chosen.forms[title], chosen.why[title] = str(decision.form), why
            chosen.measured += decision.new
        layer.schedule, layer.kernels = chosen.forms[title].split()

    hooks = [layer.register_forward_pre_hook(before_forward) for layer in layers]
    try:
        _forward(placed, batch, image_shape)
    finally:
        for hook in hooks:
            hook.remove()
    own = dict(chosen.forms)
    for theirs in reversed(all_gather(own, placed.device)):
        chosen.forms |= theirs
    for layer, title in titles.items():
        form = Form(*chosen.forms[title].split())
        if form in able[title]:
            layer.schedule, layer.kernels = form
        else:
            _warn(title, str(form), own[title])
    chosen.seconds = time.perf_counter() - began
    return chosen


def _decide(problem: Problem, able: list[Form], recorded: str | None) -> tuple[Decision, str]:
    """The form, and why that one."""
    if recorded is not None and Form(*recorded.split()) in able:
        return Decision(Form(*recorded.split()), {}), f"{recorded}, as recorded"
    decision = decide(problem, able, may_measure=True)
    assert decision is not None
    # Otherwise it was possible, and the user asks for another one.
    if recorded is not None and Form(*recorded.split()) not in able_forms(problem):
        _warn(problem.title(), recorded, str(decision.form))
    return decision, decision.why()


def _warn(title: str, recorded: str, instead: str) -> None:
    warnings.warn(
        f"layers of {title} are computed by {instead}, not by {recorded} as recorded, which is not possible here: "
        "results differ by rounding",
        stacklevel=2,
    )


class _OneBatch:
    """Test images, as a strategy reads them: one batch of random ones on every rank."""

    def __init__(self, images: Tensor, ranks: int):
        self.images, self.ranks = images, ranks

    def __len__(self) -> int:
        return len(self.images) * self.ranks

    def eval_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.images, self.images.new_zeros(len(self.images), dtype=torch.int64)


@torch.no_grad()
def _forward(placed: Placed, batch: int, image_shape: tuple[int, int, int]) -> None:
    model, mesh = placed.model, placed.mesh
    images = torch.randn(batch, *image_shape, generator=stream("forms")).to(
        placed.device, placed.strategy.dtype
    )
    training = model.training
    model.eval()
    # A graph of torch.compile would call no hooks.
    with torch.compiler.set_stance("force_eager"):
        for part, _ in placed.eval_batches(model, _OneBatch(images, mesh["data"].size())):
            placed.logits(model, part)
    model.train(training)
