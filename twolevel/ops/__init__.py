"""How the convolutions are computed. Ranks appear here only as an `Exchange` that the caller passes in."""

from twolevel.ops.balanced import balanced_conv2d
from twolevel.ops.exchange import LOCAL, Copies, Exchange, Pending
from twolevel.ops.geometry import Geometry
from twolevel.ops.schedules import dense_weight
from twolevel.ops.two_level import two_level_conv2d

__all__ = [
    "LOCAL",
    "Copies",
    "Exchange",
    "Geometry",
    "Pending",
    "balanced_conv2d",
    "dense_weight",
    "two_level_conv2d",
]
