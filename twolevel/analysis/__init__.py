"""Counting, the cost model (`planner`), and figures."""

from twolevel.analysis.count import Count, LayerCount, count
from twolevel.analysis.traffic import Collective

__all__ = ["Collective", "Count", "LayerCount", "count"]
