"""A network as a program of torch.export: `torch.export.load(path).module()` needs torch alone."""

from pathlib import Path

import torch
from torch.export import ExportedProgram

from twolevel.models.exporting.check import Run
from twolevel.models.exporting.quiet import quiet


def write(program: ExportedProgram, path: Path) -> None:
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    with quiet(), path.open("wb") as file:
        torch.export.save(program, file)


def load(path: Path) -> Run:
    """The function of a file."""
    with quiet():
        return torch.export.load(path).module()
