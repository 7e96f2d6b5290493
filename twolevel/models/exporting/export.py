"""`twolevel.models.export`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from twolevel import durable
from twolevel.errors import UserError
from twolevel.models.exporting import onnx_graph, torch_program
from twolevel.models.exporting.check import Difference, compare
from twolevel.models.exporting.formats import format_of
from twolevel.models.exporting.prepare import Source

PROGRAMS = {"torch": torch_program, "onnx": onnx_graph}


class Exported(NamedTuple):
    """A file that was written, its format, and how it differs from the network: None where nothing here can run it."""

    path: Path
    format: str
    difference: Difference | None

    def __str__(self) -> str:
        if self.difference is None:
            return f"{self.path}: not checked, as onnxruntime is not installed (pip install twolevel[onnx])"
        return f"{self.path}: checked, the largest difference from the network is {self.difference}"


def export(
    model: nn.Module, path: Path | str, image_shape: Sequence[int], *, format: str | None = None
) -> Exported:
    """Write a whole network, of this package or converted, into a file that needs no twolevel to run.

    `torch`  a program of torch.export, suffix .pt2:   torch.export.load(path).module()(images)
    `onnx`   an ONNX file of standard operators, suffix .onnx, that holds its weights. It needs `twolevel[onnx]`.

    The network maps images `[B, *image_shape]`, normalised as in training, to one tensor `[B, ...]`; in both files B
    may be any number. They hold its evaluation mode in float32 as `twolevel.nn.for_inference` prepares it: groups
    that were learned are fixed, batch norm is folded, and a dynamic group convolution chooses the channels of every
    image. In ONNX the input is called `images` and the output `logits`.

    `format` is that of the suffix unless given. A file that is there is replaced, whole or not at all. What was
    written is loaded and compared with the network on random images; ONNX only where onnxruntime is installed.

    Raises UserError for an unknown format or suffix, a network that cannot be traced or is a part of one, images that
    it cannot compute, an output that is not one tensor, and a file that computes something else, which is not left.
    """
    path = Path(path)
    format = format_of(path, format)
    if format not in PROGRAMS:
        raise UserError(
            f"format={format} is of networks of models.create, which twolevel export writes; use "
            f"{' or '.join(PROGRAMS)}, or safetensors.torch.save_file(model.state_dict(), path)"
        )
    program = PROGRAMS[format]
    if format == "onnx":
        onnx_graph.require()
    if not path.absolute().parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    source = Source.of(model, tuple(image_shape))
    try:
        with durable.replacing(path) as made:
            program.write(source.program(), made)
            run = program.load(made)
            difference = None if run is None else compare(source, run)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return Exported(path, format, difference)
