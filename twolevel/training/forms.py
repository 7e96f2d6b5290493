"""The form of each layer of a run that has several: decided before its first step, and then part of its state.

Those are two-level convolutions, and batch norms that a network asks for ReLU or that replicas share.

Another form gives other rounding errors. A run that goes on, and one that is started from another's config.json, takes
the forms recorded there; so its results do not depend on what the machine measured.
"""

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from twolevel.distributed.agreement import all_gather
from twolevel.distributed.strategies import Placed
from twolevel.host import usable_cores
from twolevel.launchers import discover
from twolevel.nn import TwoLevelConv2d
from twolevel.nn.batch_norm import kernels_asked_for
from twolevel.nn.problems import LayerProblem, layer_problems
from twolevel.ops import dispatch, normalise_dispatch
from twolevel.ops.autotune import Decision, Form
from twolevel.ops.exchange import Exchange
from twolevel.ops.kernels.triton import TritonKernels
from twolevel.ops.normalise_problem import NormaliseProblem
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
    """Decide for every such layer of this rank's part of a network, and set its `kernels`, of a convolution `schedule`.

    The layers' sizes are those of a forward in evaluation mode of `batch` random images, which leaves no trace. What
    `recorded` has is taken, the rest measured; where ranks measure differently the first rank's is taken by all.
    Every rank must call this. Warns of what is recorded and cannot be computed here.
    """
    chosen, began = ChosenForms(), time.perf_counter()
    with layer_problems(placed.model) as problems:
        _forward(placed, batch, image_shape)
    titles = {layer: problem.title() for layer, problem in problems.items()}
    exchange_s = _exchange_seconds(
        [layer for layer in problems if titles[layer] not in recorded], problems, placed
    )
    _compile_ahead(problems, recorded, placed.device)
    able: dict[str, list[Form]] = {}
    for layer, problem in problems.items():
        title = titles[layer]
        if title not in able:
            known = title in exchange_s or title in recorded
            able[title] = _able(layer, problem, known)
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
        _set(layer, form)
    chosen.seconds = time.perf_counter() - began
    return chosen


def _compile_ahead(
    problems: dict[nn.Module, LayerProblem], recorded: dict[str, str], device: torch.device
) -> None:
    """On a GPU, compile what is about to be measured by all cores of this rank, each rank of a machine its share.

    A layer that another rank compiles late is compiled here where it is measured.
    """
    if device.type != "cuda":
        return
    unknown = [
        problem
        for layer, problem in problems.items()
        if isinstance(problem, Problem) and problem.title() not in recorded and _is_unknown(layer, problem)
    ]
    ranks = discover()
    local_size = ranks.local_world_size
    if dist.is_initialized():  # spares compile nothing
        working = dist.get_world_size() - dist.get_rank() + ranks.local_rank
        local_size = min(local_size, max(working, ranks.local_rank + 1))
    share = [*dict.fromkeys(unknown)][ranks.local_rank :: local_size]
    processes = max(1, len(usable_cores()) // local_size)
    for why in TritonKernels().compile_ahead(share, processes):
        warnings.warn(f"a kernel cannot be compiled: {why}", stacklevel=2)


def _is_unknown(layer: nn.Module, problem: Problem) -> bool:
    """Whether Triton's kernels are going to be measured for this layer."""
    able = _able(layer, problem, exchange_known=True)
    by_triton = any(form.kernels == "triton" for form in able)
    return by_triton and dispatch.decide(problem, able, may_measure=False) is None


def _exchange_seconds(
    layers: list[nn.Module], problems: dict[nn.Module, LayerProblem], placed: Placed
) -> dict[str, float]:
    """Of an exchange forward and backward, the least of a few, on the slowest rank: by title of the layer.

    It decides between schedules alone, so that layers whose schedule is given are left out.
    """
    seconds: dict[str, float] = {}
    for layer in layers:
        problem = problems[layer]
        title = problem.title()
        if not isinstance(layer, TwoLevelConv2d) or layer.schedule != "auto":
            continue
        if layer.exchange.ranks > 1 and title not in seconds:
            assert isinstance(problem, Problem)
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


def _able(layer: nn.Module, problem: LayerProblem, exchange_known: bool) -> list[Form]:
    if isinstance(layer, TwoLevelConv2d):
        assert isinstance(problem, Problem)
        return dispatch.able_forms(problem, layer.schedule, layer.kernels, exchange_known=exchange_known)
    assert isinstance(layer, nn.BatchNorm2d) and isinstance(problem, NormaliseProblem)
    return normalise_dispatch.able_forms(problem, kernels_asked_for(layer))


def _set(layer: nn.Module, form: Form) -> None:
    if isinstance(layer, TwoLevelConv2d):
        layer.schedule, layer.kernels = form
    else:
        vars(layer)["kernels"] = form.kernels


def _decide(
    problem: LayerProblem, able: list[Form], recorded: str | None, exchange_s: float
) -> tuple[Decision, str]:
    """The form, and why that one."""
    if recorded is not None and Form(*recorded.split()) in able:
        return Decision(Form(*recorded.split()), {}), f"{recorded}, as recorded"
    if isinstance(problem, Problem):
        decision = dispatch.decide(problem, able, may_measure=True, exchange_s=exchange_s)
        possible = dispatch.able_forms(problem, exchange_known=True)
    else:
        decision = normalise_dispatch.decide(problem, able, may_measure=True)
        possible = normalise_dispatch.able_forms(problem)
    assert decision is not None
    # Otherwise it was possible, and the user asks for another one.
    if recorded is not None and Form(*recorded.split()) not in possible:
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
