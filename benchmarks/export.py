"""How long an exported network takes, as a share of the dense network in eager torch.

    python -m benchmarks export

Two networks, dense (`models.create(name, conv="sc")`, torch's layers alone) and `--conv`, each in four forms:

    eager      the module in evaluation mode
    prepared   by `twolevel.nn.for_inference`
    torch      the program of `twolevel.models.export`, .pt2, as torch runs it
    onnx       the ONNX file of it, in onnxruntime on the CPU

Peers take turns; in a turn a pass warms the caches with the peer's weights and another one, of other images, is timed.
Times are medians over the turns. Modules are there in both memory formats, and the faster one counts; files take
contiguous images.
"""

import copy
import importlib.util
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import report
from benchmarks.inference.peers import FORMATS, as_if_trained
from twolevel import models
from twolevel.errors import UserError
from twolevel.models.exporting import onnx_graph, torch_program
from twolevel.nn import for_inference
from twolevel.settings import Conv

BASE = "dense eager"
FILES = {"torch": (".pt2", torch_program.load), "onnx": (".onnx", onnx_graph.load)}


@dataclass
class Settings:
    """Time networks in eager torch, prepared for inference and exported, on the CPU."""

    model: str = "wrn-16-4"
    """network, as of `twolevel train`"""

    conv: Conv = "gc2l"
    """its convolutions, beside dense ones"""

    groups: int = 4
    """their groups"""

    batches: tuple[int, ...] = (1, 8)
    """images in a pass; one table for each"""

    turns: int = 50
    """timed passes of every peer"""

    threads: int = 1
    """threads of torch and onnxruntime; with 1, times are those that the thread had a core, else those of the clock"""

    output: Path = report.RESULTS / "export.json"
    """file to write"""

    def __post_init__(self) -> None:
        report.check_turns(self.turns)
        if min(self.batches, default=0) < 1:
            raise UserError(
                f"--batches {' '.join(map(str, self.batches))}: use positive numbers, such as 1 8"
            )


@dataclass
class Peer:
    """A function of images, and the memory format that it is given them in."""

    run: Callable[[Tensor], object]
    memory_format: str = "contiguous"


def peers_of(
    name: str, model: nn.Module, size: int, folder: Path
) -> tuple[list[tuple[str, Peer]], dict[str, str]]:
    """The forms of a network, those of modules in both memory formats; and what is skipped, and why."""
    made: list[tuple[str, Peer]] = []
    for form, module in (("eager", model), ("prepared", for_inference(model))):
        for memory, memory_format in FORMATS.items():
            own = copy.deepcopy(module).to(memory_format=memory_format)
            made.append((f"{name} {form}", Peer(own, memory)))
    skipped = {}
    for form, (suffix, load) in FILES.items():
        try:
            path = models.export(model, folder / f"{name}{suffix}", (3, size, size)).path
        except UserError as error:
            skipped[f"{name} {form}"] = str(error)
            continue
        run = load(path)
        if run is None:
            skipped[f"{name} {form}"] = "onnxruntime is not installed; pip install twolevel[onnx]"
        else:
            made.append((f"{name} {form}", Peer(run)))
    return made, skipped


@torch.inference_mode()
def seconds(peers: list[tuple[str, Peer]], batch: int, size: int, settings: Settings) -> list[list[float]]:
    """Times of each peer, one for each turn."""
    clock = getattr(time, report.clock_name(settings.threads))
    taken: list[list[float]] = [[] for _ in peers]
    report.steady_memory()
    for _ in range(settings.turns):
        for (_, peer), times in zip(peers, taken, strict=True):
            for timed in (False, True):
                x = torch.randn(batch, 3, size, size).to(memory_format=FORMATS[peer.memory_format])
                start = clock()
                peer.run(x)
                end = clock()
                if timed:
                    times.append((end - start) / 1e9)
    return taken


def measure(settings: Settings) -> dict:
    """Milliseconds of each peer by the batch, modules in their faster memory format, and ratios to BASE."""
    size = models.image_size(settings.model)
    networks = {
        name: as_if_trained(models.create(settings.model, conv=conv, **options))
        for name, conv, options in (
            ("dense", "sc", {}),
            (settings.conv, settings.conv, {"groups": settings.groups}),
        )
    }
    peers: list[tuple[str, Peer]] = []
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in networks.items():
            made, without = peers_of(name, model, size, Path(folder))
            peers += made
            skipped |= without
        by_batch = {batch: _best(peers, seconds(peers, batch, size, settings)) for batch in settings.batches}
    ratios = {
        batch: {name: peer["median_ms"] / found[BASE]["median_ms"] for name, peer in found.items()}
        for batch, found in by_batch.items()
    }
    return {"size": size, "peers_by_batch": by_batch, "ratios_by_batch": ratios, "skipped": skipped}


def _best(peers: list[tuple[str, Peer]], taken: list[list[float]]) -> dict[str, dict]:
    """Of each peer the times in its faster memory format."""
    rows = [
        (name, {"memory_format": peer.memory_format, **report.summary(times)})
        for (name, peer), times in zip(peers, taken, strict=True)
    ]
    return {
        name: min((row for _, row in group), key=lambda row: row["median_ms"])
        for name, group in itertools.groupby(rows, key=lambda row: row[0])
    }


def table(found: dict, settings: Settings) -> str:
    rows = [
        [
            f"{settings.model}, ms",
            *(f"batch {batch}" for batch in settings.batches),
            *(f"of {BASE}, {batch}" for batch in settings.batches),
        ]
    ]
    names = next(iter(found["peers_by_batch"].values()))
    for name in names:
        ms = [found["peers_by_batch"][batch][name]["median_ms"] for batch in settings.batches]
        shares = [found["ratios_by_batch"][batch][name] for batch in settings.batches]
        rows.append([name, *(f"{value:.2f}" for value in ms), *(f"{share:.3f}" for share in shares)])
    skipped = [f"skipped {name}: {why}" for name, why in found["skipped"].items()]
    return "\n".join([report.table(rows, width=20), *skipped])


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "export", argv)
    facts = report.machine() | {"onnxruntime": _version()}
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    found = measure(settings)
    print(table(found, settings))
    report.write("export", argv, settings, facts, found)


def _version() -> str | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    return onnxruntime.__version__


if __name__ == "__main__":
    main(sys.argv[1:])
