"""What ranks must have alike, in a few numbers each, and who differs."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from twolevel.nn import layout_of

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Kind:
    """One number of a fingerprint: what it is of, and along which axis of the mesh it is the same, or `all`."""

    what: str
    axis: str


KINDS = {
    "step": Kind("the number of steps done", "all"),
    "batch": Kind("the images of a batch", "group"),
    "common": Kind("parameters that every rank holds whole", "all"),
    "own": Kind("the parameters of replicas", "data"),
}


def fingerprint(
    model: nn.Module, mesh: DeviceMesh, step: int, batch: Iterable[Tensor], *, shared: bool
) -> dict[str, int]:
    """Sums of the bits of what this rank should have in common with others; waits for the device.

    `shared`: ranks hold the parts of one network that its layout names, and replicas of them. Of other ways, in which
    no two ranks hold the same parameters, there are the step and the batch alone.
    """
    found = {"step": torch.tensor(step), "batch": _sum(batch)}
    parameters, layout = dict(model.named_parameters()), layout_of(model)
    if shared:
        found["common"] = _sum(p for name, p in parameters.items() if not layout.is_split(name))
    if shared and mesh["data"].size() > 1:
        found["own"] = _sum(parameters.values())
    # One copy to the host for all of them.
    device = next(iter(parameters.values())).device
    values = torch.stack([value.to(device) for value in found.values()]).tolist()
    return dict(zip(found, values, strict=True))


@torch.no_grad()
def _sum(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of the bits as integers, modulo 2^64: a tensor of no dimension."""
    sums = [t.detach().view(INTEGERS[t.element_size()]).sum(dtype=torch.int64) for t in tensors if t.numel()]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64)


def difference(prints: list[dict[str, int]], mesh_shape: tuple[int, int]) -> str | None:
    """What one rank has otherwise than those it should be like, in words; None where all agree.

    `prints` are in the order of ranks, `mesh_shape` the sizes of `data` and `group`, group innermost. Of two that
    differ, it is not known which is right; of more the one that is alone is named.
    """
    groups = mesh_shape[1]
    lines = {
        "all": [[*range(len(prints))]],
        "group": [[*range(first, first + groups)] for first in range(0, len(prints), groups)],
        "data": [[*range(first, len(prints), groups)] for first in range(groups)],
    }
    for name, kind in KINDS.items():
        for line in lines[kind.axis]:
            values = [prints[rank].get(name) for rank in line]
            if len({*values}) > 1:
                usual, _ = Counter(values).most_common(1)[0]
                odd = next(rank for rank, value in zip(line, values, strict=True) if value != usual)
                like = next(rank for rank, value in zip(line, values, strict=True) if value == usual)
                return f"rank {odd} and rank {like} differ in {kind.what}"
    return None
