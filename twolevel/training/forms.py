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
from twolevel.ops.exchange import Exchange
from twolevel.ops.problem import Problem
from twolevel.streams import stream

EXCHANGES = 4  # in a measurement


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
    chosen, began = ChosenForms(), time.perf_counter()
    problems = _problems(placed, batch, image_shape)
    titles = {layer: problem.title() for layer, problem in problems.items()}
    exchange_s = _exchange_seconds(
        {layer: problem for layer, problem in problems.items() if titles[layer] not in recorded}, placed
    )
    able: dict[str, list[Form]] = {}
    for layer, problem in problems.items():
        title = titles[layer]
        if title not in able:
            known = title in exchange_s or title in recorded
            able[title] = able_forms(problem, layer.schedule, layer.kernels, exchange_known=known)
            decision, why = _decide(problem, able[title], recorded.get(title), exchange_s.get(title, 0.0))
            chosen.forms[title], chosen.why[title] = str(decision.form), why
            chosen.measured += decision.new
    own = dict(chosen.forms)
    for theirs in reversed(all_gather(own, placed.device)):
        chosen.forms |= theirs
    for layer, title in titles.items():
        form = Form(*chosen.forms[title].split())
        if form not in able[title]:
            _warn(title, str(form), own[title])
            form = Form(*own[title].split())
        layer.schedule, layer.kernels = form
    chosen.seconds = time.perf_counter() - began
    return chosen


def _problems(placed: Placed, batch: int, image_shape: tuple[int, int, int]) -> dict[TwoLevelConv2d, Problem]:
    """The sizes of every two-level convolution of this rank's part of a network."""
    problems: dict[TwoLevelConv2d, Problem] = {}

    def before_forward(layer: TwoLevelConv2d, inputs: tuple[Tensor, ...]) -> None:
        problems[layer] = layer.problem(inputs[0])

    layers = [module for module in placed.model.modules() if isinstance(module, TwoLevelConv2d)]
    hooks = [layer.register_forward_pre_hook(before_forward) for layer in layers]
    try:
        _forward(placed, batch, image_shape)
    finally:
        for hook in hooks:
            hook.remove()
    return problems


def _exchange_seconds(problems: dict[TwoLevelConv2d, Problem], placed: Placed) -> dict[str, float]:
    """Of an exchange forward and backward, the least of a few, on the slowest rank: by title of the layer."""
    seconds: dict[str, float] = {}
    for layer, problem in problems.items():
        title = problem.title()
        if problem.ranks > 1 and title not in seconds:
            own = torch.zeros(
                problem.groups, problem.batch, *problem.output, dtype=problem.dtype, device=problem.device
            )
            times = [_exchange(layer.exchange, own) for _ in range(EXCHANGES)]
            seconds[title] = min(times[1:])  # the first makes connections
    if not seconds:
        return {}
    everywhere = all_gather(seconds, placed.device)
    return {title: max(rank.get(title, 0.0) for rank in everywhere) for title in seconds}


def _exchange(exchange: Exchange, own: Tensor) -> float:
    began = time.perf_counter()
    exchange.scatter_sum(exchange.gather(own).wait()).wait()
    if own.is_cuda:
        torch.cuda.synchronize(own.device)
    return time.perf_counter() - began


def _decide(
    problem: Problem, able: list[Form], recorded: str | None, exchange_s: float
) -> tuple[Decision, str]:
    """The form, and why that one."""
    if recorded is not None and Form(*recorded.split()) in able:
        return Decision(Form(*recorded.split()), {}), f"{recorded}, as recorded"
    decision = decide(problem, able, may_measure=True, exchange_s=exchange_s)
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
