"""How long batch norm and ReLU of each size in a network take in training, by torch's operations and by ours.

    python -m benchmarks normalise

Forward, then backward by autograd with the gradients of input, weight and bias: float32 on the CPU, bfloat16 maps on a
GPU, in both memory formats. Where a block adds its input to its output, the gradient of that shortcut comes in as well.
Peers take turns; times are medians over the turns.

    torch     F.relu(norm(x)), which keeps o and x; autograd adds the gradient of the shortcut
    native    C kernels (twolevel.ops.kernels.native), on the CPU;  triton  Triton kernels, on a GPU

The roof is the time that the maps take through memory at the rate of a large copy, measured in the same run: x, x and o
forward; x, go, x, go, gx and the shortcut's gradient backward. Maps that stay in a cache can beat it, and in contiguous
memory the second pass over a channel does.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import report, roofline
from twolevel import models
from twolevel.errors import UserError
from twolevel.models.wide_resnet import WideResNet
from twolevel.nn.batch_norm import batch_norm_relu_and_input, watched_norms
from twolevel.ops.normalise_problem import NormaliseProblem
from twolevel.settings import Device

PASSES = ("forward", "backward")
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass
class Settings:
    """Time batch norm and ReLU of every size in a network by each form."""

    device: Device = "auto"
    """where to run; auto takes the GPU where there is one"""

    models: tuple[str, ...] = ()
    """networks, as for `twolevel train`; by default wrn-16-4 on the CPU, wrn-28-10 on a GPU"""

    batch: int | None = None
    """images; by default 32 on the CPU, 128 on a GPU"""

    turns: int = 15
    """timed calls of every pass of every peer"""

    threads: int = 1
    """threads of torch on the CPU; with 1, times are those that the thread had a core"""

    output: Path | None = None
    """file to write, a picture beside it; by default results/normalise.json, on a GPU results/normalise-gpu.json"""

    def __post_init__(self) -> None:
        report.check_turns(self.turns)
        self.device = report.choose_device(self.device)
        on_gpu = self.device == "cuda"
        self.models = self.models or (("wrn-28-10",) if on_gpu else ("wrn-16-4",))
        self.batch = self.batch or (128 if on_gpu else 32)
        self.output = self.output or report.RESULTS / ("normalise-gpu.json" if on_gpu else "normalise.json")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def peers(self) -> tuple[str, ...]:
        return ("torch", "triton" if self.device == "cuda" else "native")


@dataclass(frozen=True)
class Shape:
    """Maps of an image of `height` x `height`, which a block may add to its output."""

    channels: int
    height: int
    shortcut: bool

    def __str__(self) -> str:
        return f"{self.channels} {self.height}x{self.height}{' shortcut' if self.shortcut else ''}"

    def seconds(self, of_pass: str, settings: Settings, bytes_per_second: float) -> float:
        """The least time of a pass over memory."""
        maps = 3 if of_pass == "forward" else 5 + self.shortcut
        values = settings.batch * self.channels * self.height**2
        return maps * values * settings.dtype.itemsize / bytes_per_second


def shapes(name: str) -> Counter[Shape]:
    """The distinct norms with ReLU of a wide residual network, and how often each occurs, in order."""
    found = Counter()
    with torch.device("meta"):
        network = models.create(name, conv="sc").eval()
    if not isinstance(network, WideResNet):
        raise UserError(f"--models {name}: only the norms of a wrn-D-k are computed together with their ReLU")
    added = {block.bn1 for stage in network.stages for block in stage if block.shortcut is None}

    def note(norm: nn.BatchNorm2d, problem: NormaliseProblem) -> None:
        found[Shape(problem.channels, problem.size[0], norm in added)] += 1

    size = models.image_size(name)
    with watched_norms(note):
        network(torch.empty(1, 3, size, size, device="meta"))
    return found


def passes(
    kernels: str, shape: Shape, x: Tensor, go: Tensor, more: Tensor
) -> dict[str, Callable[[], object]]:
    """Each pass of a norm and ReLU as a call; the gradients are of a graph kept from one forward pass."""
    norm = nn.BatchNorm2d(shape.channels, device=x.device)
    norm.kernels = kernels
    x = x.detach().requires_grad_()

    def forward() -> tuple[Tensor, Tensor]:
        return batch_norm_relu_and_input(norm, x)

    o, again = forward()
    outputs, gradients = ((o, again), (go, more)) if shape.shortcut else ((o,), (go,))
    leaves = (x, norm.weight, norm.bias)
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True),
    }


def measure_shape(
    shape: Shape, settings: Settings, seconds: Callable[..., float], bytes_per_second: float
) -> list[dict]:
    """Milliseconds of every pass of every peer in every memory format."""
    calls = {}
    for memory, memory_format in FORMATS.items():
        size = (settings.batch, shape.channels, shape.height, shape.height)
        x, go, more = (
            torch.randn(size, device=settings.device, dtype=settings.dtype).to(memory_format=memory_format)
            for _ in range(3)
        )
        for peer in settings.peers:
            for of_pass, call in passes(peer, shape, x, go, more).items():
                call()  # allocates, and compiles
                calls[memory, peer, of_pass] = call
    repeated = partial(seconds, repeats=roofline.REPEATS[settings.device])
    found = []
    for (memory, peer, of_pass), times in report.take_turns(calls, settings.turns, repeated).items():
        timed = roofline.under_roof(times, shape.seconds(of_pass, settings, bytes_per_second))
        found.append({"memory": memory, "peer": peer, "pass": of_pass, **timed})
    return found


def measure(settings: Settings) -> dict:
    """The rate of a copy, and for every network every size with the times of its peers."""
    torch.manual_seed(0)
    torch.set_num_threads(settings.threads)
    report.steady_memory()
    seconds = report.stopwatch(settings.device, settings.threads)
    rate = report.copy_rate(settings.device, settings.dtype, roofline.PROBES[settings.device][3], seconds)
    found = roofline.measure_shapes(
        settings.models, shapes, lambda shape: measure_shape(shape, settings, seconds, rate)
    )
    return {"bytes_per_second": rate, "norms": found}


def table(found: dict, settings: Settings) -> str:
    """For each memory format: milliseconds of each peer (and per cent of the roof), and ours over torch's."""
    torchs, ours = settings.peers
    blocks = []
    for memory in FORMATS:
        columns = [(peer, of_pass) for of_pass in PASSES for peer in settings.peers]
        rows = [[f"{memory}, ms (roof / time)", *map(" ".join, columns), "ratio"]]
        sums = dict.fromkeys(columns, 0.0)
        for norm in found["norms"]:
            timed = {(p["peer"], p["pass"]): p for p in norm["peers"] if p["memory"] == memory}
            cells = [f"{timed[key]['median_ms']:.2f} ({timed[key]['of_roof']:.0%})" for key in columns]
            for key in columns:
                sums[key] += norm["times_in_model"] * timed[key]["median_ms"]
            both = [sum(timed[peer, of_pass]["median_ms"] for of_pass in PASSES) for peer in (ours, torchs)]
            rows.append([f"{norm['label']} (x{norm['times_in_model']})", *cells, f"{both[0] / both[1]:.2f}"])
        whole = [sum(sums[peer, of_pass] for of_pass in PASSES) for peer in (ours, torchs)]
        totals = [f"{sums[key]:.1f}" for key in columns]
        rows.append(["all, as often as they occur", *totals, f"{whole[0] / whole[1]:.2f}"])
        blocks.append(report.table(rows, first=32, width=18))
    blocks.append(f"copy {found['bytes_per_second'] / 1e9:.1f} GB/s")
    return "\n\n".join(blocks)


def series(peer: dict) -> str:
    return f"{peer['peer']}, {peer['memory']}"


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "normalise", argv)
    facts = report.machine(settings.device)
    found = measure(settings)
    title = f"{', '.join(settings.models)}, batch {settings.batch}, {settings.device}"
    print(f"{title}, {settings.turns} turns")
    print(table(found, settings))
    report.write("normalise", argv, settings, facts, found)
    path = settings.output.with_suffix(".png")
    roofline.draw(found["norms"], series, path, f"batch norm and ReLU, {title}")
