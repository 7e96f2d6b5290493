"""What some convolutions ask of training beyond a loss and SGD. The loop calls every rule and knows none."""

from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from twolevel.nn import DGConv2d, DynamicGroupConv2d, FLGConv2d, LearnedGroupConv2d
from twolevel.nn.base import ReplicatedConv2d
from twolevel.training.config import RuleConfig


class Rule(Protocol):
    """One method's rule. `progress` runs from 0 at the start of training to 1 at its end."""

    def begin_step(self, progress: float) -> None:
        """Called before the forward of a step."""
        ...

    def loss(self, loss: Tensor) -> Tensor:
        """The loss to minimise, from the mean cross-entropy of the images just seen."""
        ...

    def end_epoch(self) -> dict[str, Any]:
        """Called after the last step of an epoch; returns what to record of it, by layer."""
        ...


def rules_for(model: nn.Module, config: RuleConfig) -> list[Rule]:
    """The rules that the convolutions of a network ask for."""
    dynamic = {name: m for name, m in model.named_modules() if isinstance(m, DynamicGroupConv2d)}
    gated = {name: m for name, m in model.named_modules() if isinstance(m, DGConv2d)}
    learned = {name: m for name, m in model.named_modules() if isinstance(m, FLGConv2d)}
    condensed = {name: m for name, m in model.named_modules() if isinstance(m, LearnedGroupConv2d)}
    rules: list[Rule] = []
    if dynamic:
        rules.append(ProgressivePruning(dynamic))
        rules.append(SaliencyLasso(dynamic, config.lasso, config.lasso_form))
        if any(layer.by_threshold for layer in dynamic.values()):
            rules.append(GlobalThreshold(dynamic, config.threshold_steps))
    if gated:
        rules.append(ComplexityBudget(gated, config.complexity_divisor, config.complexity_exponent))
    if learned:
        rules.append(GroupRecord(learned))
    if condensed:
        rules.append(Condensation(condensed))
        rules.append(GroupLasso(condensed, config.group_lasso))
    return rules


def undecayed(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that a convolution says weight decay must spare, such as gates."""
    whole = [m for m in model.modules() if isinstance(m, ReplicatedConv2d)]
    return {parameter for m in whole for name, parameter in m.named_parameters() if name in m.undecayed}


@torch.no_grad()
def copy_choices(model: nn.Module, average: nn.Module) -> None:
    """Give a moving average what must not be averaged: how far DGC has pruned, its threshold, what LGC keeps."""
    for source, target in zip(model.modules(), average.modules(), strict=True):
        if isinstance(source, ReplicatedConv2d):
            for mine, its in zip(source.buffers(recurse=False), target.buffers(recurse=False), strict=True):
                its.copy_(mine)


class _Silent:
    """A rule that does nothing but what a subclass says."""

    def begin_step(self, progress: float) -> None:
        pass

    def loss(self, loss: Tensor) -> Tensor:
        return loss

    def end_epoch(self) -> dict[str, Any]:
        return {}


class ProgressivePruning(_Silent):
    """DGC drops no channel at first, then more and more: each layer follows the progress of training."""

    def __init__(self, layers: dict[str, DynamicGroupConv2d]):
        self.layers = layers

    @torch.no_grad()
    def begin_step(self, progress: float) -> None:
        for layer in self.layers.values():
            layer.set_progress(progress)


class _Saliencies(_Silent):
    """Sees the saliencies `[B, H, n]` of each forward in training through hooks: layers keep no state of it."""

    def __init__(self, layers: dict[str, DynamicGroupConv2d]):
        self.layers = layers
        self.seen: list[Tensor] = []
        for layer in layers.values():
            layer.saliency.register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: Any, saliency: Tensor) -> None:
        if module.training:
            self.seen.append(saliency)

    def take(self) -> list[Tensor]:
        seen, self.seen = self.seen, []
        return seen


class SaliencyLasso(_Saliencies):
    """DGC's sparsity term, of the saliencies g of L layers with H heads of n channels each.

        paper    lambda / (L H)  sum over layers and heads of |g|_1       (Su et al., Eq. 8)
        public   lambda          sum over layers and heads of |g|_1 / n   (the authors' code)

    Both take the mean over the images. `public` averages over channels, but not over layers and heads: where all
    layers are n wide, it is L H / n times `paper`.
    """

    def __init__(self, layers: dict[str, DynamicGroupConv2d], weight: float, form: str):
        super().__init__(layers)
        self.weight, self.form = weight, form

    def loss(self, loss: Tensor) -> Tensor:
        seen = self.take()
        # Saliencies come out of a ReLU: their sum is their L1 norm.
        if self.form == "public":
            norms, share = [s.mean(2) for s in seen], 1.0
        else:
            norms, share = [s.sum(2) for s in seen], 1 / sum(s.shape[1] for s in seen)
        return loss + self.weight * share * sum(norm.float().mean(0).sum() for norm in norms)


class GlobalThreshold(_Saliencies):
    """DGC-G's one threshold for all layers and heads: the xi-quantile of their saliencies.

    Taken over the last `steps` steps of each epoch, and kept in every layer for test time, as batch norm keeps its
    statistics. How many steps is left open by the paper. They are no part of a checkpoint: a run that goes on in
    the middle of an epoch takes its next threshold over the steps since then.
    """

    def __init__(self, layers: dict[str, DynamicGroupConv2d], steps: int):
        super().__init__(layers)
        self.steps = steps
        self.recent: list[list[Tensor]] = []

    def begin_step(self, progress: float) -> None:
        self.recent = [*self.recent, []][-self.steps :]

    def loss(self, loss: Tensor) -> Tensor:
        self.recent[-1] += [s.detach().flatten() for s in self.take()]
        return loss

    @torch.no_grad()
    def end_epoch(self) -> dict[str, Any]:
        values = torch.cat([s for step in self.recent for s in step]).float()
        self.recent = []
        layer = next(iter(self.layers.values()))
        kept = max(1, round(layer.xi * len(values)))
        threshold = values.kthvalue(kept).values
        for layer in self.layers.values():
            layer.get_buffer("threshold").copy_(threshold)
        return {"dgc_threshold": threshold.item()}


class ComplexityBudget(_Silent):
    """DGConv's budget: the loss times (max(zeta, o) / o)^exponent, with the complexity zeta = non-zeros of all U.

    o is the wanted complexity, that of dense layers divided by `divisor` (Zhang et al., complexity constraint);
    without a divisor there is no budget. Also records the gates of each layer.
    """

    def __init__(self, layers: dict[str, DGConv2d], divisor: float | None, exponent: float):
        self.layers, self.exponent = layers, exponent
        dense = sum(layer.in_channels * layer.out_channels for layer in layers.values())
        self.wanted = None if divisor is None else dense / divisor

    def loss(self, loss: Tensor) -> Tensor:
        if self.wanted is None:
            return loss
        complexity = reduce(torch.add, (layer.complexity().double() for layer in self.layers.values()))
        factor = (complexity.clamp(min=self.wanted) / self.wanted) ** self.exponent
        return loss * factor.to(loss.dtype)

    def end_epoch(self) -> dict[str, Any]:
        return {"dgconv_gates": {name: layer.open_gates() for name, layer in self.layers.items()}}


class GroupRecord(_Silent):
    """Records how many inputs and outputs each group of an FLGC layer has."""

    def __init__(self, layers: dict[str, FLGConv2d]):
        self.layers = layers

    def end_epoch(self) -> dict[str, Any]:
        def sizes(layer: FLGConv2d) -> list[list[int]]:
            return [torch.bincount(of, minlength=layer.groups).tolist() for of in layer.groups_of()]

        return {"flgc_groups": {name: sizes(layer) for name, layer in self.layers.items()}}


class Condensation(_Silent):
    """LGC drops inputs stage by stage in the first half of training. Also records how many each group keeps."""

    def __init__(self, layers: dict[str, LearnedGroupConv2d]):
        self.layers = layers
        self.entered: dict[str, int] = {}

    def begin_step(self, progress: float) -> None:
        for name, layer in self.layers.items():
            stage = layer.stage_at(progress)
            if self.entered.get(name) != stage:
                layer.condense(stage)
                self.entered[name] = stage

    def end_epoch(self) -> dict[str, Any]:
        return {"lgc_kept": {name: layer.kept.sum(1).tolist() for name, layer in self.layers.items()}}


class GroupLasso(_Silent):
    """LGC's sparsity term: lambda times the sum over layers, groups and kept inputs j of |W_g[:, j]|_2.

    Huang et al. (arXiv 1711.09224), section 3.1. A layer is left out once it has entered its last stage.
    """

    def __init__(self, layers: dict[str, LearnedGroupConv2d], weight: float):
        self.layers, self.weight = [*layers.values()], weight
        self.begin_step(0)

    def begin_step(self, progress: float) -> None:
        self.condensing = [layer for layer in self.layers if layer.stage_at(progress) < layer.stages]

    def loss(self, loss: Tensor) -> Tensor:
        return loss + self.weight * sum(layer.group_lasso() for layer in self.condensing)
