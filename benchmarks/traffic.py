"""How often a layer passes over its maps in training: batch norm, ReLU and convolution, forward and backward.

    python -m benchmarks traffic

Nothing is timed. Every map, input, output or gradient, that a kernel is given to read or to fill is counted with its
bytes: for operations of torch as they are dispatched, for our C kernels as they are called. What an operation of torch
reads twice counts twice (`AGAIN`); a C kernel goes image by image or channel by channel, and what it uses again is in
a cache then, so that a call of it is one pass over each of its maps.

    passes        bytes of all maps over those of one, the mean of x and y; in brackets those of representatives, and of
                  their gradients, which are maps of G channels
    1 of P        a layer as one of P ranks holds it, copies of its own representatives in place of the others'
    torch         nn.BatchNorm2d, ReLU and kernels of torch: what a layer did before there were others
"""

import inspect
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import report
from benchmarks.layers import Shape, shapes
from twolevel.errors import UserError
from twolevel.nn import TwoLevelConv2d
from twolevel.nn.batch_norm import batch_norm_relu
from twolevel.nn.structure import memory_format
from twolevel.ops import Copies
from twolevel.ops.kernels import native
from twolevel.ops.kernels.native import NativeNormaliser, two_level

# A prime number of images, by which no number of weights divides: what does is a map.
IMAGES = 23
# What these operations of torch read once more: for values after statistics; for each of two gradients.
AGAIN = {"native_batch_norm": [0], "native_batch_norm_backward": [0, 1], "convolution_backward": [0]}
WRITE_ONLY = {"copy_", "zero_", "fill_"}  # their first argument
NO_PASS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Arguments of the C kernels' calls that they read, and those they fill.
CALLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "forward": (("x", "z"), ("own", "y")),
    "backward": (("gy", "x", "z", "gz"), ("gz_of_all", "gx")),
}
FORMS = {
    "torch": ("overlapped", "grouped"),
    "overlapped native": ("overlapped", "native"),
    "fused native": ("fused", "native"),
}


@dataclass
class Settings:
    """Count the passes of every layer of a network over its maps."""

    model: str = "wrn-16-4"
    """network whose distinct convolutions are counted"""

    groups: tuple[int, ...] = (4, 16)
    """numbers of groups"""

    ranks: int = 4
    """P of the layers that one of P ranks holds; divides the groups"""

    output: Path = report.RESULTS / "traffic.json"
    """file to write"""


class Passes(TorchDispatchMode):
    """Bytes of maps read and written, by the kernel that does it. `maps`: the numbers of x and of y."""

    def __init__(self, maps: set[int]) -> None:
        super().__init__()
        self.maps = maps
        self.bytes: dict[str, int] = {}
        self.representatives: dict[str, int] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        found = op(*args, **(kwargs or {}))
        name = op.name().removeprefix("aten::").partition(".")[0]
        aliases = [returned.alias_info for returned in op._schema.returns]
        if name in NO_PASS or any(alias is not None and not alias.is_write for alias in aliases):  # a view
            return found
        read = tree_leaves((args[1:] if name in WRITE_ONLY else args, kwargs))
        if name != "convolution_backward" or all(args[-1][:2]):
            read += [args[index] for index in AGAIN.get(name, [])]
        self.add(name, read, tree_leaves(found))
        return found

    def add(self, name: str, *given: Iterable[Any]) -> None:
        """Count the maps among what a kernel reads and what it writes."""
        for tensor in (t for some in given for t in some if isinstance(t, Tensor)):
            if tensor.numel() and tensor.numel() % IMAGES == 0:
                by_image = tensor.dim() != 4 or len(tensor) == IMAGES  # representatives lie [G, B, H', W']
                into = self.bytes if by_image and tensor.numel() in self.maps else self.representatives
                into[name] = into.get(name, 0) + tensor.numel() * tensor.element_size()

    @contextmanager
    def counting(self) -> Iterator["Passes"]:
        """Count what the body does, on this thread and in backward."""
        with ExitStack() as stack:
            stack.enter_context(self)
            for name, roles in CALLS.items():
                call = getattr(two_level, name)
                stack.enter_context(mock.patch.object(two_level, name, self._counted(name, call, *roles)))
            for name in ("forward", "backward"):
                method = getattr(NativeNormaliser, name)
                stack.enter_context(
                    mock.patch.object(NativeNormaliser, name, self._norm_counted(name, method))
                )
            yield self

    def _norm_counted(self, name: str, method: Callable) -> Callable:
        def run(kernels, *given):
            found = method(kernels, *given)
            # Channels last, moments or sums are of all channels before the first of them is normalised.
            last = not given[0].is_contiguous()
            again = [t for t in given[: 1 if name == "forward" else 2] if last]
            self.add(f"twolevel_norm_{name}", tree_leaves(given), tree_leaves(found), again)
            return found

        return run

    def _counted(
        self, name: str, call: Callable, read: tuple[str, ...], written: tuple[str, ...]
    ) -> Callable:
        signature = inspect.signature(call)

        def run(*args, **kwargs):
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            reads = [given.arguments[of] for of in read]
            if given.arguments["local"] is None:  # then y, or gx, is added to
                reads += [given.arguments[of] for of in ("y", "gx") if of in given.arguments]
            if name == "backward" and given.arguments["wanted"][:2] == (None, None):
                reads = [t for t in reads if t is not given.arguments["x"]]
            self.add(f"twolevel_{name}", reads, [given.arguments[of] for of in written])
            return call(*args, **kwargs)

        return run


class Layer(nn.Module):
    """ReLU(BN(x)) and the convolution of that, as a block of a WideResNet has them."""

    def __init__(self, shape: Shape, groups: int, ranks: int, form: str):
        super().__init__()
        assert groups % ranks == 0, (groups, ranks)
        schedule, kernels = FORMS[form]
        inputs, outputs, *rest = shape.arguments
        self.form = form
        self.norm = nn.BatchNorm2d(inputs // ranks)
        self.norm.kernels = "native"  # however small
        self.conv = TwoLevelConv2d(
            inputs // ranks,
            outputs // ranks,
            *rest,
            groups=groups // ranks,
            schedule=schedule,
            kernels=kernels,
        )
        if ranks > 1:
            self.conv.coarse = nn.Conv2d(groups, outputs // ranks, 1, bias=False)
            self.conv.exchange = Copies(ranks)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "torch":
            return self.conv(F.relu(self.norm(x), inplace=True))
        return self.conv(batch_norm_relu(self.norm, x))


def count(shape: Shape, groups: int, ranks: int, form: str) -> dict:
    """The bytes of a layer's maps, kernel by kernel, and how many passes that is."""
    layer = Layer(shape, groups, ranks, form)
    channels = shape.channels // ranks
    memory = memory_format(layer, "cpu") if form != "torch" else torch.channels_last
    x = torch.randn(IMAGES, channels, shape.height, shape.height).to(memory_format=memory).requires_grad_()
    layer.to(memory_format=memory)
    y = layer(x)
    gy = torch.randn_like(y)
    y.backward(gy)  # allocates gradients, and chooses kernels
    layer.zero_grad()
    x.grad = None
    with Passes({x.numel(), y.numel()}).counting() as passes:
        layer(x).backward(gy)
    one = (x.nbytes + y.nbytes) / 2
    return {
        **asdict(shape),
        "label": str(shape),
        "groups": groups,
        "ranks": ranks,
        "form": form,
        "bytes": passes.bytes,
        "bytes_of_representatives": passes.representatives,
        "passes": sum(passes.bytes.values()) / one,
        "passes_of_representatives": sum(passes.representatives.values()) / one,
    }


def measure(settings: Settings) -> list[dict]:
    if settings.ranks < 1 or any(groups % settings.ranks for groups in settings.groups):
        raise UserError(f"--ranks {settings.ranks} does not divide --groups; use another number")
    if (why := native.available()) is not None:
        raise UserError(f"there are no C kernels to count: {why}")
    found = shapes(settings.model)
    return [
        {"times_in_model": times, **count(shape, groups, ranks, form)}
        for groups in settings.groups
        for ranks in dict.fromkeys((1, settings.ranks))
        for form in FORMS
        if ranks > 1 or form != "fused native"  # that waits for an exchange, and there is none
        for shape, times in found.items()
    ]


KINDS = ("passes", "passes_of_representatives")


def means(layers: list[dict]) -> list[dict]:
    """Passes a convolution, by number of groups, ranks and form: all bytes of a network over those of its maps."""
    sums: dict[tuple[int, int, str], list[float]] = {}
    for layer in layers:
        one = layer["times_in_model"] * sum(layer["bytes"].values()) / layer["passes"]
        total = sums.setdefault((layer["groups"], layer["ranks"], layer["form"]), [0.0, 0.0, 0.0])
        for index, weight in enumerate((1.0, *(layer[kind] for kind in KINDS))):
            total[index] += one * weight
    return [
        {"groups": groups, "ranks": ranks, "form": form}
        | {kind: total / one for kind, total in zip(KINDS, of_kind, strict=True)}
        for (groups, ranks, form), (one, *of_kind) in sums.items()
    ]


def table(layers: list[dict]) -> str:
    """Passes of every convolution, a block for each number of groups and ranks; then the network's mean."""
    blocks = []
    for groups, ranks in dict.fromkeys((layer["groups"], layer["ranks"]) for layer in layers):
        own = [layer for layer in layers if (layer["groups"], layer["ranks"]) == (groups, ranks)]
        forms = list(dict.fromkeys(layer["form"] for layer in own))
        rows = [[f"G={groups}" + (f", 1 of {ranks} ranks" if ranks > 1 else ""), *forms]]
        for label in dict.fromkeys(layer["label"] for layer in own):
            rows.append([label, *(cell(layer) for layer in own if layer["label"] == label)])
        rows.append(["all, as often as they occur", *map(cell, means(own))])
        blocks.append(report.table(rows, first=28, width=20))
    return "\n\n".join(blocks)


def cell(found: dict) -> str:
    return f"{found['passes']:.1f} ({found['passes_of_representatives']:.1f})"


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "traffic", argv)
    facts = report.machine()
    layers = measure(settings)
    print(f"{settings.model}, float32, {IMAGES} images, forward and backward")
    print(table(layers))
    command = shlex.join(["python", "-m", "benchmarks", "traffic", *argv])
    report.save(settings.output, command, facts, asdict(settings), {"means": means(layers), "layers": layers})
