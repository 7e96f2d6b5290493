"""Where a process is: the collective and the layer in which one of its threads waits, read from the stacks.

Nothing is noted down while all is well, so that a step costs no more for it.
"""

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from twolevel.nn.base import ShardedConv2d

PACKAGE = str(Path(__file__).parents[1])
TORCH = str(Path(torch.__file__).parent)
# How functions of torch.distributed and of `distributed.collectives` are called, and what they do.
COLLECTIVES = {
    "all_gather": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_single": "all-gather",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "all_to_all_single": "reduce-scatter",
    "barrier": "barrier",
    "broadcast": "broadcast",
    "recv": "receive",
    "reduce_scatter_single": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "scatter_sum": "reduce-scatter",
    "gather": "all-gather",
    "send": "send",
}


@dataclass(frozen=True)
class Whereabouts:
    """`collective` is None where a thread waits for no other rank, `layer` where it is in none; `line` is the code."""

    collective: str | None
    layer: str | None
    backward: bool
    line: str

    def __str__(self) -> str:
        """As after "in "."""
        if self.collective is None and self.layer is None:
            return self.line
        what = f"the {self.collective}" if self.collective else "the computation"
        where = f" of {self.layer}" if self.layer else ""
        return f"{what}{where}{' (backward)' if self.backward else ''}"


class Finder:
    """Reads the whereabouts of the thread that makes it, and of autograd's threads that work for it.

    With `replicas` a backward pass without another collective is in that of their gradients, which C++ code of torch
    starts and waits for.
    """

    def __init__(self, *, replicas: bool = False):
        self.replicas = replicas
        self.thread = threading.get_ident()
        self.modules: dict[int, str] = {}
        self.parameters: dict[int, str] = {}

    def follow(self, model: nn.Module) -> None:
        """Name the layers of this network from now on."""
        self.modules = {id(module): name for name, module in model.named_modules() if name}
        self.parameters = {_address(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
        for name, module in model.named_modules():
            if isinstance(module, ShardedConv2d):  # made of several convolutions
                self.parameters |= dict.fromkeys(map(_address, module.parameters()), name)
        self.own = [*model.modules()]  # so that no id is used again

    def find(self) -> Whereabouts:
        """The whereabouts now; a thread that waits for other ranks comes before one that computes."""
        # Public, if with an underscore: "sys._current_frames" is in the manual of Python.
        frames = sys._current_frames()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        others = [frame for ident, frame in frames.items() if names.get(ident, "Dummy").startswith("Dummy")]
        found = [self._of(frame) for frame in (frames[self.thread], *others)]
        return next((place for place in found if place.collective), found[0])

    def _of(self, frame: FrameType) -> Whereabouts:
        stack = [*_outwards(frame)]
        collective = layer = None
        backward = False
        for each in stack:
            name, variables = each.f_code.co_name, each.f_locals
            if collective is None and _is_ours_or_torchs(each):
                collective = _in_flight(variables) if name == "wait" else COLLECTIVES.get(name)
            backward = backward or (name == "backward" and "ctx" in variables)
            layer = layer or self._layer(variables)
        if collective is None and self.replicas and any(_is_autograd(each) for each in stack):
            collective, layer, backward = "all-reduce", "the gradients of replicas", True
        ours = next((each for each in stack if each.f_code.co_filename.startswith(PACKAGE)), stack[0])
        file = ours.f_code.co_filename.removeprefix(f"{Path(PACKAGE).parent}/")
        return Whereabouts(collective, layer, backward, f"{ours.f_code.co_name} ({file}:{ours.f_lineno})")

    def _layer(self, variables: dict[str, Any]) -> str | None:
        """The layer that a frame belongs to: its module, or that of a weight which it holds."""
        owner = self.modules.get(id(variables.get("self")))
        if owner is not None:
            return owner
        for value in variables.values():
            if isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter):
                owner = self.parameters.get(_address(value))
                if owner is not None:
                    return owner
        return None


def _is_autograd(frame: FrameType) -> bool:
    return frame.f_code.co_name == "backward" and frame.f_code.co_filename.startswith(f"{TORCH}/autograd")


def _in_flight(variables: dict[str, Any]) -> str | None:
    """What a thread waits for that is in a `wait`: of ours, which say it, or of torch's."""
    return getattr(variables.get("self"), "what", None)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_ours_or_torchs(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith((f"{PACKAGE}/distributed", f"{TORCH}/distributed"))


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # no memory of its own
        return 0
