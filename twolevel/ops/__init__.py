"""How the convolutions are computed. Ranks appear here only as an `Exchange` that the caller passes in."""

from twolevel.ops.geometry import Geometry
from twolevel.ops.overlapped import LOCAL, Exchange, Pending
from twolevel.ops.two_level import SCHEDULES, Schedule, dense_weight, two_level_conv2d

__all__ = [
    "LOCAL",
    "SCHEDULES",
    "Exchange",
    "Geometry",
    "Pending",
    "Schedule",
    "dense_weight",
    "two_level_conv2d",
]
