"""Tunes the layers of a network for a card: compiles kernels of convolutions in parallel, then times all forms.

    python -m benchmarks.gpu.tuning --network wrn-28-10/4 --output FILE

What is the fastest is kept in `$XDG_CACHE_HOME/twolevel`, the kernels in `$TRITON_CACHE_DIR`.
"""

import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.kernels import Network
from benchmarks.peers import one_rank
from twolevel import models
from twolevel.nn.problems import LayerProblem, layer_problems
from twolevel.ops import dispatch, normalise_dispatch
from twolevel.ops.autotune import Decision
from twolevel.ops.kernels.triton import TritonKernels
from twolevel.ops.normalise_problem import NormaliseProblem
from twolevel.ops.problem import Problem


@dataclass
class Settings:
    """Compile and time what can compute the layers of a network."""

    network: str
    """MODEL/GROUPS, or MODEL/GROUPS/RANKS for what one of so many ranks computes"""

    output: Path
    """file to write"""

    batch: int = 128
    """images"""

    processes: int = os.cpu_count() or 1
    """processes that compile"""


def problems(network: Network, batch: int, device: torch.device, dtype: torch.dtype) -> list[LayerProblem]:
    """The distinct layers of a network that have several forms, in channels_last memory; nothing is computed."""
    here = {"batch": batch, "device": device, "dtype": dtype}

    def on_card(problem: LayerProblem) -> LayerProblem:
        if isinstance(problem, Problem):
            return replace(problem, channels_last=True, **here)
        return replace(problem, memory="channels_last", odd="", **here)

    size = models.image_size(network.model)
    with torch.device("meta"):
        if network.ranks > 1:
            model = one_rank(network.model, network.groups, network.ranks)
        else:
            model = models.create(network.model, conv="gc2l", groups=network.groups)
        with layer_problems(model) as found:
            model.eval()(torch.empty(2, 3, size, size))
    return list(dict.fromkeys(map(on_card, found.values())))


def measure(layers: list[LayerProblem], processes: int) -> dict[str, Any]:
    """Seconds of compiling and of timing, the form of each layer with the times of all, and what cannot be compiled."""
    began = time.perf_counter()
    convolutions = [layer for layer in layers if isinstance(layer, Problem)]
    failed = TritonKernels().compile_ahead(convolutions, processes)
    compiled = time.perf_counter()
    found = []
    for layer in layers:
        decision, inside = decided(layer)
        times = dict(decision.milliseconds)
        found.append(
            {"layer": layer.title(), "form": str(decision.form), "compiled": str(inside.form), "ms": times}
        )
        print(f"{layer.title()}: {decision.why()}", flush=True)
    return {
        "compile_s": compiled - began,
        "measure_s": time.perf_counter() - compiled,
        "layers": found,
        "cannot_compile": failed,
    }


def decided(layer: LayerProblem) -> tuple[Decision, Decision]:
    """The form of a layer, and that in a compiled network: of a convolution any but dense, which is timed apart."""
    if isinstance(layer, NormaliseProblem):
        decision = normalise_dispatch.decide(layer, normalise_dispatch.able_forms(layer), may_measure=True)
        inside = decision
    else:
        able = dispatch.able_forms(layer)
        decision = dispatch.decide(layer, able, may_measure=True)
        able = [form for form in able if form.schedule != "dense"]
        inside = dispatch.decide(layer, able, may_measure=True)
    assert decision is not None and inside is not None
    return decision, inside


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "gpu", argv)
    facts = report.machine(report.choose_device("cuda"))
    torch.backends.cudnn.benchmark = True
    network = Network.named(settings.network)
    layers = problems(network, settings.batch, torch.device("cuda", 0), torch.bfloat16)
    found = measure(layers, settings.processes)
    report.save(settings.output, "python -m benchmarks.gpu.tuning", facts, asdict(settings), found)
    for why in found["cannot_compile"]:
        print(f"cannot be compiled: {why}")
    print(
        f"{network}: {len(layers)} layers, compiled in {found['compile_s']:.0f} s by {settings.processes} "
        f"processes, timed in {found['measure_s']:.0f} s"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
