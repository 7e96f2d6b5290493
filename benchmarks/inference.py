"""How long the convolutions of a ResNet-18 take in inference, and what share of a dense network's time.

    python -m benchmarks inference

A pass runs the 16 convolutions of 3 x 3 and the 3 down-sampling ones of 1 x 1 one after the other, so
that weights come from where they lie in a network, not from the nearest cache. Peers take turns; in a
turn a pass warms the caches with the peer's weights and another one, of other images, is timed. Times are
medians over the turns. `dense` and `gc` are nn.Conv2d alone; `flgc` and `dgconv` have groups that are spread over
the channels, and bring them together and back; `dgc` is all that the layer does: BN, ReLU, saliency,
selection, gathering, convolution, shuffle. "+ BN ReLU" has those two in front as well. Every
peer is there in both memory formats, and the one whose passes are faster counts.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import report
from twolevel.errors import UserError
from twolevel.nn import DGConv2d, DynamicGroupConv2d, FLGConv2d

FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


@dataclass
class Settings:
    """Time group convolutions in inference against dense ones, on the CPU."""

    turns: int = 100
    """timed passes of every peer"""

    batch: int = 1
    """images in a pass"""

    size: int = 224
    """height and width of the network's input, a multiple of 32"""

    groups: int = 4
    """groups of gc, flgc and dgconv (a power of two), heads of dgc"""

    xi: float = 0.75
    """share of the channels that dgc drops"""

    threads: int = 1
    """threads of torch; with 1, times are those that the thread had a core, else those of the clock"""

    output: Path = report.RESULTS / "inference.json"
    """file to write"""

    def __post_init__(self) -> None:
        report.check_turns(self.turns)
        if self.groups < 2 or self.groups & (self.groups - 1):
            raise UserError(f"--groups {self.groups} is not a power of two from 2 on, as dgconv needs; use 4")
        if self.size < 32 or self.size % 32:
            raise UserError(
                f"--size {self.size} is not a multiple of 32, by which a ResNet-18 divides it; use 224"
            )


@dataclass(frozen=True)
class Layer:
    name: str
    channels: int
    outputs: int
    kernel: int
    stride: int
    height: int

    def convolution(self, groups: int) -> nn.Conv2d:
        arguments = (self.channels, self.outputs, self.kernel, self.stride, self.kernel // 2)
        return nn.Conv2d(*arguments, groups=groups, bias=False)


def resnet18_layers(size: int) -> list[Layer]:
    """All convolutions but the stem, in the order in which a ResNet-18 runs them."""
    height = size // 4
    layers = [Layer("stage 1", 64, 64, 3, 1, height)] * 4
    for stage, width in enumerate([128, 256, 512], 2):
        layers += [
            Layer(f"stage {stage}, stride 2", width // 2, width, 3, 2, height),
            Layer(f"stage {stage}, shortcut", width // 2, width, 1, 2, height),
        ]
        height //= 2
        layers += [Layer(f"stage {stage}", width, width, 3, 1, height)] * 3
    return layers


def dense(layer: Layer, settings: Settings) -> nn.Module:
    return layer.convolution(1)


def gc(layer: Layer, settings: Settings) -> nn.Module:
    return layer.convolution(settings.groups)


def with_norm(build: Callable[[Layer, Settings], nn.Module]) -> Callable[[Layer, Settings], nn.Module]:
    def build_both(layer: Layer, settings: Settings) -> nn.Module:
        norm = as_if_trained(nn.BatchNorm2d(layer.channels))
        return nn.Sequential(norm, nn.ReLU(inplace=True), build(layer, settings))

    return build_both


def dgc(layer: Layer, settings: Settings) -> nn.Module:
    arguments = (layer.channels, layer.outputs, layer.kernel, layer.stride, layer.kernel // 2)
    module = DynamicGroupConv2d(*arguments, groups=settings.groups, xi=settings.xi)
    as_if_trained(module.norm)
    module.set_progress(1)
    with torch.no_grad():
        for offset in module.offset:  # training moves them all apart from 1
            offset.copy_(torch.linspace(0.5, 1.5, len(offset))[torch.randperm(len(offset))])
    return module.eval().to_inference()


@torch.no_grad()
def flgc(layer: Layer, settings: Settings) -> nn.Module:
    """Groups of equal size, of channels from anywhere."""
    arguments = (layer.channels, layer.outputs, layer.kernel, layer.stride, layer.kernel // 2)
    module = FLGConv2d(*arguments, groups=settings.groups)
    for logits in (module.input_logits, module.output_logits):
        groups = torch.arange(len(logits))[torch.randperm(len(logits))] % settings.groups
        logits.copy_(nn.functional.one_hot(groups, settings.groups))
    return module.eval().to_inference()


@torch.no_grad()
def dgconv(layer: Layer, settings: Settings) -> nn.Module:
    """Interleaved groups: the gates of the last bits are closed. A network's permutations are not folded away."""
    arguments = (layer.channels, layer.outputs, layer.kernel, layer.stride, layer.kernel // 2)
    module = DGConv2d(*arguments)
    module.gates.fill_(1.0)
    module.gates[len(module.gates) - (settings.groups.bit_length() - 1) :] = -1.0
    return module.eval().to_inference()


@torch.no_grad()
def as_if_trained(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.running_mean.normal_(0, 0.5)
    norm.running_var.uniform_(0.5, 1.5)
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.normal_(0, 0.5)
    return norm.eval()


PEERS: dict[str, Callable[[Layer, Settings], nn.Module]] = {
    "dense": dense,
    "gc": gc,
    "flgc": flgc,
    "dgconv": dgconv,
    "dgc": dgc,
    "dense + BN ReLU": with_norm(dense),
    "gc + BN ReLU": with_norm(gc),
}
"""What to time, by name: (layer, settings) -> a module in evaluation form."""

RATIOS = {"dense": ["gc", "flgc", "dgconv", "dgc"], "dense + BN ReLU": ["gc + BN ReLU", "dgc"]}
"""Of which peers the times are divided by which one's."""


class Inputs:
    """Layers' inputs, each written when it is asked for, as the layer before would have just done.

    All have the same memory, since a network uses memory again. From pass to pass the channels have
    other scales, so that dgc selects others.
    """

    def __init__(self, layers: list[Layer], settings: Settings):
        self.layers, self.batch, self.asked = layers, settings.batch, 0
        size = settings.batch * max(layer.channels * layer.height**2 for layer in layers)
        self.source, self.memory = torch.randn(size), torch.empty(size)

    def write(self, layer: Layer, memory_format: torch.memory_format) -> Tensor:
        shape = (self.batch, layer.channels, layer.height, layer.height)
        strides = torch.empty(shape, device="meta", memory_format=memory_format).stride()
        scale = torch.randn(layer.channels, 1, 1).exp_()
        return torch.mul(
            self.source.as_strided(shape, strides), scale, out=self.memory.as_strided(shape, strides)
        )


@torch.inference_mode()
def seconds(networks: dict, layers: list[Layer], settings: Settings) -> dict:
    """Times by peer and memory format: one list for each layer, of one time for each turn."""
    clock = getattr(time, report.clock_name(settings.threads))
    inputs = Inputs(layers, settings)
    taken = {key: [[] for _ in layers] for key in networks}
    report.steady_memory()
    for _ in range(settings.turns):
        for (peer, name), network in networks.items():
            for timed in (False, True):
                for layer, module, of_layer in zip(layers, network, taken[peer, name], strict=True):
                    x = inputs.write(layer, FORMATS[name])
                    start = clock()
                    module(x)
                    end = clock()
                    if timed:
                        of_layer.append((end - start) / 1e9)
    return taken


def measure(settings: Settings) -> dict:
    """Milliseconds of a pass and of each layer by peer, in its faster memory format, and ratios of passes."""
    layers = resnet18_layers(settings.size)
    torch.manual_seed(0)
    networks = {}
    for peer, build in PEERS.items():
        network = [build(layer, settings).eval() for layer in layers]
        for name, memory_format in FORMATS.items():
            networks[peer, name] = [copy.deepcopy(m).to(memory_format=memory_format) for m in network]
    taken = seconds(networks, layers, settings)

    passes = {key: [1e3 * sum(turn) for turn in zip(*times, strict=True)] for key, times in taken.items()}
    median = {key: statistics.median(times) for key, times in passes.items()}
    peers = {}
    for peer in PEERS:
        name = min(FORMATS, key=lambda name: median[peer, name])
        peers[peer] = {
            "memory_format": name,
            "pass_ms": median[peer, name],
            "pass_quartiles_ms": statistics.quantiles(passes[peer, name]),
            "layers_ms": [1e3 * statistics.median(times) for times in taken[peer, name]],
            "pass_ms_by_format": {name: median[peer, name] for name in FORMATS},
        }
    ratios = {
        base: {peer: peers[peer]["pass_ms"] / peers[base]["pass_ms"] for peer in others}
        for base, others in RATIOS.items()
    }
    return {"layers": [asdict(layer) for layer in layers], "peers": peers, "ratios": ratios}


def table(found: dict) -> str:
    """Milliseconds of each kind of layer, all of that kind together, and of all."""
    peers, kinds = found["peers"], [layer["name"] for layer in found["layers"]]
    rows = [["ms", *peers]]
    for kind in dict.fromkeys(kinds):
        sums = [
            sum(ms for ms, of in zip(peer["layers_ms"], kinds, strict=True) if of == kind)
            for peer in peers.values()
        ]
        rows.append([f"{kind} ({kinds.count(kind)})", *(f"{ms:.2f}" for ms in sums)])
    rows.append(["whole pass", *(f"{peer['pass_ms']:.2f}" for peer in peers.values())])
    rows.append(["memory format", *(peer["memory_format"] for peer in peers.values())])
    lines = [report.table(rows)]
    for base, others in found["ratios"].items():
        lines += [f"{peer} / ({base}): {ratio:.3f}" for peer, ratio in others.items()]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "inference", argv)
    facts = report.machine()
    torch.set_num_threads(settings.threads)
    found = measure(settings)
    print(table(found))
    report.write("inference", argv, settings, facts, found)


if __name__ == "__main__":
    main(sys.argv[1:])
