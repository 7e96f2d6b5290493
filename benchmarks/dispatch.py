"""What a two-level layer costs the host above its kernels, once it is decided by what it is computed.

    python -m benchmarks dispatch

A layer so small that its kernels do next to nothing; forward and its four gradients, float32 on one thread of the CPU:

    layer      a call of the module, and torch.autograd.grad of its output
    kernels    the schedule's forward and backward, called directly on the same tensors
    torch      a module that calls a torch.autograd.Function of as many tensors, which computes nothing

What is left, layer - kernels - torch, is this package's own: the look-up of the plan, checks, strides of gradients.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import report
from twolevel.nn import TwoLevelConv2d
from twolevel.ops import LOCAL
from twolevel.ops.dispatch import able_forms, plan_for
from twolevel.options import parse

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
    found = {}
    for form in able_forms(layer.problem(x)):
        if form.schedule != "dense":  # which is one operation of torch
            layer.schedule, layer.kernels = form
            found[str(form)] = _of_form(settings, layer, x)
    return {"microseconds": found}


def _of_form(settings: Settings, layer: TwoLevelConv2d, x: Tensor) -> dict[str, float]:
    weights = (layer.local.weight, layer.restriction.weight, layer.coarse.weight)
    leaves = (x, *weights)
    tensors = tuple(tensor.detach() for tensor in leaves)
    plan = plan_for(*leaves, layer.geometry, 1, layer.schedule, layer.kernels, may_measure=False)
    assert plan.schedule is not None
    schedule, geometry = plan.schedule, layer.geometry
    nothing = Nothing(layer)
    gy = torch.ones_like(x)

    def with_gradients(module: nn.Module) -> None:
        torch.autograd.grad(module(x), leaves, gy)

    def kernels() -> None:
        with torch.no_grad():
            _, z = schedule.forward(*tensors, geometry, LOCAL)
            schedule.backward(gy, *tensors, z, geometry, LOCAL, (True,) * 4)

    parts = {
        "layer": lambda: with_gradients(layer),
        "kernels": kernels,
        "torch": lambda: with_gradients(nothing),
    }
    clock = report.stopwatch("cpu", settings.threads)
    least = dict.fromkeys(parts, float("inf"))
    for _ in range(settings.turns):
        for name, call in parts.items():
            least[name] = min(least[name], 1e6 * clock(call, CALLS))
    least["own"] = least["layer"] - least["kernels"] - least["torch"]
    return {name: round(value, 1) for name, value in least.items()}


def main(argv: list[str]) -> None:
    settings = parse(Settings, "benchmarks dispatch", argv)
    facts = report.machine()
    found = measure(settings)
    names = ("layer", "kernels", "torch", "own")
    rows = [["us, forward and backward", *names]]
    rows += [
        [form, *(f"{times[name]:.1f}" for name in names)] for form, times in found["microseconds"].items()
    ]
    print(report.table(rows, first=26, width=10))
    report.write("dispatch", argv, settings, facts, found)
