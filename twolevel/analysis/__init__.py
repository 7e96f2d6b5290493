"""Counting, the cost model (`planning`), and figures."""

from twolevel.analysis.count import Collective, Count, LayerCount, count

__all__ = ["Collective", "Count", "LayerCount", "count"]
