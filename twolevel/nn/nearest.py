"""The weights of a grouped form that come nearest to a dense convolution, in the least-squares sense."""

import math

import torch
from torch import Tensor, nn

from twolevel.errors import UserError
from twolevel.nn.balanced import BalancedConv2d
from twolevel.nn.two_level import TwoLevelConv2d

HAVE_NEAREST = ("gc", "gc2l", "bgc")
# ||r|| as it is drawn: n/G k k values of variance 2 / (n/G k k). C then learns as fast as a drawn one.
DRAWN_NORM = math.sqrt(2)


@torch.no_grad()
def set_nearest_(new: nn.Module, weight: Tensor) -> float:
    """Give `new` the weights whose dense form W' is nearest to `weight`, W `[m, n, k, k]`; returns ||W - W'|| / ||W||.

    With the blocks W_gh `[m/G, n/G, k, k]`, from group h to group g:

    - group convolution: A_g = W_gg;
    - two-level: A_g = W_gg and C_gg = 0; of each h, r_h and the C_gh of all other groups g are the R first singular
      vectors and values of the W_gh above each other (Eckart and Young, 1936), since they share r_h;
    - balanced: B_g / G is the mean of W_gh over h != g, and A_g = W_gg - B_g / G.

    Raises UserError for a convolution of another kind.
    """
    high = weight.double()
    groups = getattr(new, "groups", 1)
    blocks = (
        high.unflatten(0, (groups, -1)).unflatten(2, (groups, -1)).movedim(2, 1)
    )  # [G, G, m/G, n/G, k, k]
    own = torch.arange(groups)
    diagonal = blocks[own, own]
    if isinstance(new, TwoLevelConv2d):
        missed = _set_two_level_(new, blocks)
        local = diagonal
    elif isinstance(new, BalancedConv2d):
        shared = (blocks.sum(1) - diagonal) / max(groups - 1, 1)
        new.mean.weight.copy_(groups * shared.flatten(0, 1))
        local = diagonal - shared
        missed = (blocks - shared[:, None]).square().sum() - local.square().sum()
    elif type(new) is nn.Conv2d:
        new.weight.copy_(diagonal.flatten(0, 1))
        return _relative(high.square().sum() - diagonal.square().sum(), high)
    else:
        raise UserError(
            f"nearest weights are known for {', '.join(HAVE_NEAREST)}, not for a {type(new).__name__}"
        )
    new.local.weight.copy_(local.flatten(0, 1))
    return _relative(missed, high)


def _set_two_level_(new: TwoLevelConv2d, blocks: Tensor) -> Tensor:
    """Set r and C; the squares of what they do not reach."""
    groups, kept = new.groups, new.representatives
    restriction = new.restriction.weight.unflatten(0, (groups, kept))
    coarse = new.coarse.weight.flatten(1).unflatten(0, (groups, -1)).unflatten(2, (groups, kept))
    coarse.zero_()
    missed = blocks.new_zeros(())
    for h in range(groups):
        others = [g for g in range(groups) if g != h]
        if not others:
            break
        left, values, right = torch.linalg.svd(
            blocks[others, h].flatten(0, 1).flatten(1), full_matrices=False
        )
        missed += values[kept:].square().sum()
        for i in range(min(kept, len(values))):
            # The sign is free. By rule, so that every machine finds the same.
            scale = DRAWN_NORM * right[i, right[i].abs().argmax()].sign()
            restriction[h, i] = (scale * right[i]).view_as(restriction[h, i])
            coarse[others, :, h, i] = (
                (left[:, i] * values[i] / scale).unflatten(0, (groups - 1, -1)).to(coarse.dtype)
            )
    return missed


def _relative(missed: Tensor, weight: Tensor) -> float:
    """Of squares that may be negative by rounding, and of a weight that may be zero."""
    whole = weight.square().sum().item()
    return math.sqrt(max(missed.item(), 0.0) / whole) if whole else 0.0
