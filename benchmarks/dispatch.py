"""What a two-level layer costs the host beside its kernels, once it is decided by what it is computed.

    python -m benchmarks dispatch

Kernels that hand over prepared results stand in for the real ones, so that all the time is the host's: a layer's
forward, then its four gradients by torch.autograd.grad, on one thread of the CPU, in microseconds a call.

    layer      a call of the module
    torch      a module that calls a torch.autograd.Function of as many tensors, which does nothing else
    own        layer - torch: the look-up of the plan, checks of the arguments, what autograd is given
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import report
from twolevel.cli.options import parse
from twolevel.nn import TwoLevelConv2d
from twolevel.ops import LOCAL
from twolevel.ops.dispatch import plan_for

CALLS = 200  # in one timing, so that the clock's own step does not count


@dataclass
class Settings:
    """Time the host's part of a layer's forward and backward."""

    turns: int = 40
    """timings, of which the least counts: whatever else the machine does adds to a time"""

    threads: int = 1
    """threads of torch"""

    output: Path = Path(__file__).parent / "results" / "dispatch.json"
    """file to write"""


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, local, restriction, coarse, *rest):
        ctx.save_for_backward(x, local, restriction, coarse, x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gy):
        x, local, restriction, coarse, _ = ctx.saved_tensors
        return x, local, restriction, coarse, None, None, None


class Nothing(nn.Module):
    """As a layer that computes nothing."""

    def __init__(self, layer: TwoLevelConv2d):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        weights = (layer.local.weight, layer.restriction.weight, layer.coarse.weight)
        return _Nothing.apply(x, *weights, layer.geometry, LOCAL, None)


def measure(settings: Settings) -> dict:
    torch.set_num_threads(settings.threads)
    layer = TwoLevelConv2d(16, 16, 3, padding=1, groups=4).to(memory_format=torch.channels_last)
    x = torch.randn(1, 16, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = (layer.local.weight, layer.restriction.weight, layer.coarse.weight)
    leaves = (x, *weights)
    plan = plan_for(*leaves, layer.geometry, 1, "overlapped", "grouped", may_measure=False)
    layer.schedule, layer.kernels = plan.form
    prepared = tuple(tensor.detach().clone() for tensor in leaves)
    z = x.new_empty(4, 1, 4, 4)
    stand_in = {
        "forward": lambda *_: (torch.empty_like(x), z),
        "backward": lambda *_: prepared,
    }
    modules = {"layer": layer, "torch": Nothing(layer)}
    found = {name: {"forward": float("inf"), "both": float("inf")} for name in modules}
    with mock.patch.multiple(plan.schedule, **stand_in):
        for _ in range(settings.turns):
            for name, module in modules.items():
                for what, call in _calls(module, x, leaves).items():
                    found[name][what] = min(found[name][what], _microseconds(call))
    times = {
        name: {"forward": least["forward"], "backward": least["both"] - least["forward"]}
        for name, least in found.items()
    }
    times["own"] = {what: times["layer"][what] - times["torch"][what] for what in ("forward", "backward")}
    return {"microseconds": times}


def _calls(module: nn.Module, x: Tensor, leaves: tuple[Tensor, ...]) -> dict[str, Callable[[], object]]:
    gy = torch.ones_like(x)
    return {
        "forward": lambda: module(x),
        "both": lambda: torch.autograd.grad(module(x), leaves, gy),
    }


def _microseconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter_ns()
    for _ in range(CALLS):
        call()
    return (time.perf_counter_ns() - begin) / CALLS / 1e3


def main(argv: list[str]) -> None:
    settings = parse(Settings, "benchmarks dispatch", argv)
    facts = report.machine()
    found = measure(settings)
    rows = [["us a call", "forward", "backward"]]
    rows += [
        [name, *(f"{value:.1f}" for value in times.values())] for name, times in found["microseconds"].items()
    ]
    print(report.table(rows, first=12, width=10))
    report.write("dispatch", argv, settings, facts, found)
