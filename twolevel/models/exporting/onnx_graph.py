"""A network as an ONNX graph of standard operators: input `images`, output `logits`, a batch of any size."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from twolevel.errors import UserError
from twolevel.models.exporting.check import Run
from twolevel.models.exporting.prepare import BATCH
from twolevel.models.exporting.quiet import quiet

INPUT, OUTPUT = "images", "logits"
OPSET = 18  # that of torch's exporter in every version that we allow, and of all run times of the last years
LARGEST = 2**31 - 2**20  # bytes of a file, by protobuf; room for all but the weights


def require() -> None:
    """Raise UserError where the exporter is not installed."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"format=onnx needs {' and '.join(missing)}; pip install twolevel[onnx]")


def write(program: ExportedProgram, path: Path) -> None:
    """Raises UserError for a network that is too large for one file."""
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size > LARGEST:
        raise UserError(f"the network has {size / 1e9:.1f} GB, an ONNX file at most 2.1; use format=torch")
    with quiet():
        made = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: BATCH},),
            opset_version=OPSET,
            custom_translation_table={torch.ops.aten.sort.stable: _sort},
            verbose=False,
        )
        assert made is not None
        _drop_records(made.model)
        made.save(path, external_data=False)


def _sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Sequence[Any]:
    """aten::sort.stable, which the exporter does not know: of equal values TopK takes that of lower index first."""
    from onnxscript import opset18

    op: Any = opset18
    size = op.Constant(value_ints=[x.shape[dim]])
    return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)


def _drop_records(model: Any) -> None:
    """Leave out what the exporter records of every operation: lines of code, by paths of this machine."""
    for part in (model.graph, *model.graph.all_nodes(), *model.graph.inputs, *model.graph.outputs):
        part.metadata_props.clear()
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()


def load(path: Path) -> Run | None:
    """The function of a file, by onnxruntime; None where that is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(logits)

    return run
