"""How long each distinct convolution of a network takes, against other ways to write it and the machine's roofline.

    python -m benchmarks layers

Forward, input gradient and weight gradient are timed apart, by autograd: float32 on the CPU, bfloat16 on a GPU, each
in the memory format that is best for it, channels_last but for our C kernels. On a GPU each is the replay of a CUDA
graph, so that times are of kernels alone. Peers take turns; times are medians over the turns. `dense` and `gc` are
nn.Conv2d, `stock` is the two-level layer by stock layers (benchmarks/stock.py), `gc2l` is ours.

The roof of a pass is the time that this machine would need at its best, by what is measured in the same run:
max(operations / rate of a large product or dense convolution, whichever is faster, bytes / rate of a large
copy), where bytes are inputs, outputs and weights once each. A copy runs through main memory: a layer whose
tensors stay in a cache can beat its roof.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import report, roofline
from benchmarks.roofline import Roofline
from benchmarks.stock import StockTwoLevelConv2d
from twolevel import models
from twolevel.errors import UserError
from twolevel.nn import TwoLevelConv2d
from twolevel.nn.structure import memory_format
from twolevel.ops.replay import replay_of
from twolevel.settings import Device

PASSES = ("forward", "input gradient", "weight gradient")


@dataclass
class Settings:
    """Time every distinct convolution of a network against the roofline of this machine."""

    device: Device = "auto"
    """where to run; auto takes the GPU where there is one"""

    models: tuple[str, ...] = ()
    """networks, as for `twolevel train`; by default wrn-16-4 on the CPU, wrn-28-10 and wrn-28-40 on a GPU"""

    batch: int | None = None
    """images; by default 32 on the CPU, 128 on a GPU"""

    groups: tuple[int, ...] = (4, 16)
    """numbers of groups to time"""

    turns: int = 9
    """timed calls of every pass of every peer"""

    threads: int = 1
    """threads of torch on the CPU; with 1, times are those that the thread had a core"""

    output: Path | None = None
    """file to write, a picture beside it; by default results/layers.json, on a GPU results/layers-gpu.json"""

    def __post_init__(self) -> None:
        report.check_turns(self.turns)
        self.device = report.choose_device(self.device)
        on_gpu = self.device == "cuda"
        self.models = self.models or (("wrn-28-10", "wrn-28-40") if on_gpu else ("wrn-16-4",))
        self.batch = self.batch or (128 if on_gpu else 32)
        self.output = self.output or report.RESULTS / ("layers-gpu.json" if on_gpu else "layers.json")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32


@dataclass(frozen=True)
class Shape:
    """A square convolution of an image of `height` x `height`, padded by half its kernel."""

    channels: int
    outputs: int
    kernel: int
    stride: int
    height: int

    def __str__(self) -> str:
        return f"{self.channels}-{self.outputs} k{self.kernel} s{self.stride} {self.height}x{self.height}"

    @property
    def arguments(self) -> tuple[int, ...]:
        return self.channels, self.outputs, self.kernel, self.stride, self.kernel // 2

    @property
    def output_height(self) -> int:
        return (self.height - 1) // self.stride + 1


def shapes(name: str) -> Counter[Shape]:
    """The distinct convolutions of a network after its stem, and how often each occurs, in order."""
    found = Counter()

    def note(module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        kernel, stride = module.kernel_size[0], module.stride[0]
        shape = Shape(module.in_channels, module.out_channels, kernel, stride, inputs[0].shape[2])
        if module.groups > 1 or module.padding[0] != kernel // 2:
            raise UserError(f"--models {name}: {module} is not dense and half-padded; use a wrn-D-k")
        found[shape] += module.in_channels > 3

    size = models.image_size(name)
    with torch.device("meta"):
        network = models.create(name, conv="sc")
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        network(torch.empty(1, 3, size, size))
    return +found  # without the stem


def two_level(shape: Shape, groups: int) -> TwoLevelConv2d:
    return TwoLevelConv2d(*shape.arguments, groups=groups)


PEERS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "gc": lambda shape, groups: nn.Conv2d(*shape.arguments, groups=groups, bias=False),
    "stock": lambda shape, groups: StockTwoLevelConv2d(two_level(shape, groups)),
    "gc2l": two_level,
}


def passes(module: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """Each pass of a layer as a call; the gradients are of graphs kept from one forward pass each.

    A graph of its own for each, so that a layer sees which of them is wanted.
    """
    parameters = [*module.parameters()]

    def forward() -> Tensor:
        with torch.no_grad():
            return module(x)

    def backward(by: list[Tensor], input_: Tensor) -> Callable[[], object]:
        y = module(input_)
        gy = torch.randn_like(y)
        return lambda: torch.autograd.grad(y, by, gy, retain_graph=True)

    own = x.detach().requires_grad_()
    module.requires_grad_(False)
    by_input = backward([own], own)
    module.requires_grad_(True)
    return dict(zip(PASSES, (forward, by_input, backward(parameters, x)), strict=True))


def ready(layer: nn.Module, images: Tensor) -> dict[str, Callable[[], object]]:
    """The passes of a layer once each has run, which allocates and chooses algorithms; on a GPU what replays them."""
    if not images.is_cuda:
        calls = passes(layer, images)
        for call in calls.values():
            call()
        return calls
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = passes(layer, images)
        for call in calls.values():
            call()
        return {name: _replayed(name, call, stream) for name, call in calls.items()}


def _replayed(name: str, call: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], object]:
    try:
        return replay_of(call, stream)
    except RuntimeError as error:
        print(f"{name} is timed with what the host adds, as it cannot be captured: {error}")
        return call


def measure_shape(
    shape: Shape, settings: Settings, seconds: Callable[..., float], machine: Roofline
) -> list[dict]:
    """Milliseconds of every pass of every peer of one shape."""
    options = {"device": settings.device, "dtype": settings.dtype}
    images = torch.randn(settings.batch, shape.channels, shape.height, shape.height, **options)
    layers = {("dense", 1): nn.Conv2d(*shape.arguments, bias=False)}
    layers |= {(name, g): build(shape, g) for g in settings.groups for name, build in PEERS.items()}
    calls = {}
    for key, layer in layers.items():
        memory = {"memory_format": memory_format(layer, settings.device)}
        made = ready(layer.to(**options, **memory), images.to(**memory))
        calls |= {(*key, name): call for name, call in made.items()}
    repeated = partial(seconds, repeats=roofline.REPEATS[settings.device])
    found = []
    for (name, groups, of_pass), times in report.take_turns(calls, settings.turns, repeated).items():
        weights = sum(weight.numel() for weight in layers[name, groups].parameters())
        timed = roofline.under_roof(times, machine.seconds(shape, weights, settings))
        found.append({"peer": name, "groups": groups, "pass": of_pass, **timed})
    return found


def measure(settings: Settings) -> dict:
    """The machine's rates, and for every network every distinct convolution with the times of its peers."""
    torch.manual_seed(0)
    torch.set_num_threads(settings.threads)
    torch.backends.cudnn.benchmark = True
    report.steady_memory()
    seconds = report.stopwatch(settings.device, settings.threads)
    machine = roofline.measure_roofline(settings, seconds)
    found = roofline.measure_shapes(
        settings.models, shapes, lambda shape: measure_shape(shape, settings, seconds, machine)
    )
    return {"roofline": asdict(machine), "convolutions": found}


def peer_name(peer: dict) -> str:
    return peer["peer"] if peer["groups"] == 1 else f"{peer['peer']} G={peer['groups']}"


def table(found: dict) -> str:
    """For each pass: milliseconds (and per cent of the roof), a line for each convolution."""
    blocks = []
    for of_pass in PASSES:
        names = [peer_name(p) for p in found["convolutions"][0]["peers"] if p["pass"] == of_pass]
        rows = [[f"{of_pass}, ms (roof / time)", *names]]
        for convolution in found["convolutions"]:
            peers = [p for p in convolution["peers"] if p["pass"] == of_pass]
            cells = [f"{p['median_ms']:.2f} ({p['of_roof']:.0%})" for p in peers]
            rows.append([f"{convolution['label']} (x{convolution['times_in_model']})", *cells])
        sums = [sum(ms) for ms in zip(*_all_ms(found, of_pass), strict=True)]
        rows.append(["all, as often as they occur", *(f"{total:.1f}" for total in sums)])
        blocks.append(report.table(rows, first=32, width=15))
    product, convolution, copy = (rate / 1e9 for rate in found["roofline"].values())
    blocks.append(
        f"roofline: product {product:.0f}, convolution {convolution:.0f} G operations/s, copy {copy:.1f} GB/s"
    )
    return "\n\n".join(blocks)


def _all_ms(found: dict, of_pass: str) -> list[list[float]]:
    """Milliseconds of each convolution by peer, times how often it occurs."""
    return [
        [c["times_in_model"] * p["median_ms"] for p in c["peers"] if p["pass"] == of_pass]
        for c in found["convolutions"]
    ]


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "layers", argv)
    facts = report.machine(settings.device)
    found = measure(settings)
    title = f"{', '.join(settings.models)}, batch {settings.batch}, {settings.device}"
    print(f"{title}, {settings.turns} turns")
    print(table(found))
    report.write("layers", argv, settings, facts, found)
    roofline.draw(found["convolutions"], peer_name, settings.output.with_suffix(".png"), title)
