"""Ranks that are killed, stopped and cut off in the middle of runs: what is counted is what comes of the runs."""

from benchmarks.faults.command import main

__all__ = ["main"]
