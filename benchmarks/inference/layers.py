"""How long the convolutions of a ResNet-18 take in inference, and what share of a dense network's time.

A pass runs the 16 convolutions of 3 x 3 and the 3 down-sampling ones of 1 x 1 one after the other, so
that weights come from where they lie in a network, not from the nearest cache. Peers take turns; in a
turn a pass warms the caches with the peer's weights and another one, of other images, is timed. Times are
medians over the turns. `dense` and `gc` are nn.Conv2d alone; `flgc` and `dgconv` have groups that are spread over
the channels, and bring them together and back: of equal size, or for `flgc drawn` as its logits start. `dgc` is
all that the layer does: BN, ReLU, saliency, selection, gathering, convolution, shuffle. "+ BN ReLU" has those
two in front as well. Every peer is there in both memory formats, and the one whose passes are faster counts.
"""

import copy
import statistics
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.inference.peers import FORMATS, PEERS, RATIOS, Layer

if TYPE_CHECKING:
    from benchmarks.inference.command import Settings


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


class Inputs:
    """Layers' inputs, each written when it is asked for, as the layer before would have just done.

    All have the same memory, since a network uses memory again. From pass to pass the channels have
    other scales, so that dgc selects others.
    """

    def __init__(self, layers: list[Layer], batch: int):
        self.layers, self.batch = layers, batch
        size = batch * max(layer.channels * layer.height**2 for layer in layers)
        self.source, self.memory = torch.randn(size), torch.empty(size)

    def write(self, layer: Layer, memory_format: torch.memory_format) -> Tensor:
        shape = (self.batch, layer.channels, layer.height, layer.height)
        strides = torch.empty(shape, device="meta", memory_format=memory_format).stride()
        scale = torch.randn(layer.channels, 1, 1).exp_()
        return torch.mul(
            self.source.as_strided(shape, strides), scale, out=self.memory.as_strided(shape, strides)
        )


@torch.inference_mode()
def seconds(networks: dict, layers: list[Layer], settings: "Settings") -> dict:
    """Times by peer and memory format: one list for each layer, of one time for each turn."""
    clock = getattr(time, report.clock_name(settings.threads))
    inputs = Inputs(layers, settings.batch)
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


def measure(settings: "Settings", groups: int) -> dict:
    """Milliseconds of a pass and of each layer by peer, in its faster memory format, and ratios of passes."""
    layers = resnet18_layers(settings.size)
    torch.manual_seed(0)
    networks = {}
    for peer, build in PEERS.items():
        network = [build(layer, groups, settings.xi).eval() for layer in layers]
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
    return "\n".join([report.table(rows), *ratio_lines(found["ratios"])])


def ratio_lines(ratios: dict[str, dict[str, float]]) -> list[str]:
    """`ratios[base][peer]`, a line each."""
    return [f"{peer} / ({base}): {ratio:.3f}" for base, of in ratios.items() for peer, ratio in of.items()]
