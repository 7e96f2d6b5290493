"""The weights of a trained network as the start of another one, whose convolutions may be of another kind."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from twolevel.errors import UserError
from twolevel.nn.base import dense_weight_of
from twolevel.nn.nearest import set_nearest_
from twolevel.nn.structure import ends


@dataclass
class Transfer:
    """What became of a network's tensors: the number that were copied, and those that were not.

    `errors` are of the convolutions that took the nearest weights W' to a dense W, ||W - W'|| / ||W||, by name. `drawn`
    are the tensors that stayed as they were, those of a classifier of other classes.
    """

    copied: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    drawn: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.copied} tensors copied"]
        if self.errors:
            low, high = min(self.errors.values()), max(self.errors.values())
            parts.append(
                f"{len(self.errors)} convolutions by nearest weights, relative error {low:.2f} to {high:.2f}"
            )
        if self.drawn:
            parts.append(f"{', '.join(self.drawn)} drawn anew, for other classes")
        return "; ".join(parts)


@torch.no_grad()
def transfer(new: nn.Module, trained: nn.Module) -> Transfer:
    """Give `new` the weights of `trained`, in place: of the same network, in one process each.

    What both have in one shape is copied, statistics of batch norm too. A convolution of another kind takes the weights
    nearest to the trained one's, where this is an nn.Conv2d and that one gc, gc2l or bgc (`nearest.set_nearest_` has
    the formulas). The last linear layer keeps its own where the numbers of classes differ.

    Raises UserError where the networks differ in more, or there are no nearest weights; `new` may then hold some of
    the weights.
    """
    done = Transfer()
    _take_nearest(new, trained, done.errors)
    fitted = tuple(f"{name}." for name in done.errors)
    own, theirs = (
        {key: tensor for key, tensor in network.state_dict().items() if not key.startswith(fitted)}
        for network in (new, trained)
    )
    for key in (*own, *theirs):
        if key not in own or key not in theirs:
            which = "the new" if key in own else "the trained"
            raise UserError(f"only {which} network has {key}; nearest weights are known from sc and gc alone")
    for key, tensor in own.items():
        if tensor.shape == theirs[key].shape:
            tensor.copy_(theirs[key])
            done.copied += 1
        elif _is_classifier(new, key, tensor, theirs[key]):
            done.drawn.append(key)
        else:
            raise UserError(f"{key} is {[*tensor.shape]}, and {[*theirs[key].shape]} in the trained network")
    return done


def _take_nearest(new: nn.Module, trained: nn.Module, errors: dict[str, float]) -> None:
    """Give the convolutions whose kinds differ the nearest weights, and enter their errors by name."""
    modules = dict(new.named_modules())
    for name, conv in trained.named_modules():
        one = modules.get(name)
        if not isinstance(conv, nn.Conv2d) or one is None or _shapes(one) == _shapes(conv):
            continue
        weight = dense_weight_of(conv)
        channels = (getattr(one, "out_channels", None), getattr(one, "in_channels", None))
        if channels != (weight.shape[0], weight.shape[1]):
            raise UserError(
                f"{name} takes {channels[1]} channels to {channels[0]}, in the trained network "
                f"{weight.shape[1]} to {weight.shape[0]}"
            )
        if conv.bias is not None:
            raise UserError(f"{name} has a bias in the trained network, which no other kind has; use convert")
        errors[name] = set_nearest_(one, weight)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in module.state_dict().items()}


def _is_classifier(new: nn.Module, key: str, own: Tensor, theirs: Tensor) -> bool:
    """Whether these are of the last linear layer, and differ in the number of classes alone."""
    _, classifier = ends(new)
    return new.get_submodule(key.rpartition(".")[0]) is classifier and own.shape[1:] == theirs.shape[1:]
