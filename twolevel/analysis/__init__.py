"""Counting, the cost of a step, and figures."""

from twolevel.analysis.count import Collective, Count, LayerCount, count

__all__ = ["Collective", "Count", "LayerCount", "count"]
