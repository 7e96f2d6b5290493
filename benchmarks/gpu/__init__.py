"""`python -m benchmarks gpu`: what to measure first where there is a GPU, in steps that can be resumed."""

from benchmarks.gpu.command import main

__all__ = ["main"]
