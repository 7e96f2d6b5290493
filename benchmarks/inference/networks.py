"""How long a condensenet-86 takes for images of 32 x 32, of dense 1x1 convolutions and of DGC.

    dense, dgc             as they are, the DGC layers in their inference form
    dense, dgc prepared    by `twolevel.nn.inference.network.for_inference`: the same is done to both

Peers take turns; in a turn a pass warms the caches and another one, of other images, is timed. Times are medians
over the turns. Every peer is there in both memory formats, and the faster one counts.
"""

import copy
import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks import report
from benchmarks.inference.layers import ratio_lines
from benchmarks.inference.peers import FORMATS, as_if_trained
from twolevel import models
from twolevel.nn import DynamicGroupConv2d
from twolevel.nn.inference.network import for_inference

if TYPE_CHECKING:
    from benchmarks.inference.command import Settings

MODEL, SIZE, HEADS = "condensenet-86", 32, 4
RATIOS = {"dense": ["dgc", "dgc prepared"], "dense prepared": ["dgc prepared"]}


def build(xi: float) -> dict[str, nn.Module]:
    """The networks by the names of the peers."""
    torch.manual_seed(0)
    dense = as_if_trained(models.create(MODEL, conv="sc"))
    # Without a bound saliencies multiply from layer to layer until numbers are infinite.
    dgc = as_if_trained(models.create(MODEL, conv="dgc", groups=HEADS, xi=xi, saliency_bound=1.0))
    forms = copy.deepcopy(dgc)
    for name, module in dgc.named_modules():
        if isinstance(module, DynamicGroupConv2d):
            forms.set_submodule(name, module.to_inference())
    return {
        "dense": dense,
        "dense prepared": for_inference(dense),
        "dgc": forms,
        "dgc prepared": for_inference(dgc),
    }


@torch.inference_mode()
def seconds(networks: dict[tuple[str, str], nn.Module], settings: "Settings") -> dict:
    """Times by peer and memory format, one for each turn."""
    clock = getattr(time, report.clock_name(settings.threads))
    taken = {key: [] for key in networks}
    report.steady_memory()
    for _ in range(settings.turns):
        for (peer, name), network in networks.items():
            for timed in (False, True):
                x = torch.randn(settings.batch, 3, SIZE, SIZE).to(memory_format=FORMATS[name])
                start = clock()
                network(x)
                end = clock()
                if timed:
                    taken[peer, name].append((end - start) / 1e9)
    return taken


def measure(settings: "Settings") -> dict:
    """Milliseconds of each peer, in its faster memory format, and ratios."""
    networks = {
        (peer, name): copy.deepcopy(network).to(memory_format=memory_format)
        for peer, network in build(settings.xi).items()
        for name, memory_format in FORMATS.items()
    }
    times = {key: report.summary(of) for key, of in seconds(networks, settings).items()}
    peers = {}
    for peer in dict.fromkeys(peer for peer, _ in networks):
        by_format = {name: times[peer, name]["median_ms"] for name in FORMATS}
        name = min(by_format, key=by_format.__getitem__)
        peers[peer] = {"memory_format": name, **times[peer, name], "median_ms_by_format": by_format}
    ratios = {
        base: {peer: peers[peer]["median_ms"] / peers[base]["median_ms"] for peer in others}
        for base, others in RATIOS.items()
    }
    return {"model": MODEL, "size": SIZE, "heads": HEADS, "peers": peers, "ratios": ratios}


def table(found: dict) -> str:
    peers = found["peers"]
    rows = [
        [f"{found['model']}, ms", *peers],
        ["whole network", *(f"{peer['median_ms']:.2f}" for peer in peers.values())],
        ["memory format", *(peer["memory_format"] for peer in peers.values())],
    ]
    return "\n".join([report.table(rows), *ratio_lines(found["ratios"])])
