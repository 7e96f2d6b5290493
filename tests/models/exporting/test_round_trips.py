"""Every kind of convolution and every network is exported in every format, and computes the same there."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from trained import check_close, images, network

from twolevel import models
from twolevel.models.exporting import onnx_graph, torch_program
from twolevel.models.exporting.prepare import Source
from twolevel.models.files import load, save
from twolevel.settings import CONVS

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

KINDS: dict[str, dict] = {conv: {"conv": conv} for conv in CONVS}
KINDS["gc2l"] |= {"representatives": 2}
KINDS["dgc"] |= {"saliency_bound": 1.0}
KINDS["dgc by a threshold"] = {"conv": "dgc", "saliency_bound": 1.0, "threshold": "global"}
# With a kind of convolution; those of wrn-D-k are wrn-10-1, above, deeper and wider.
NETWORKS = {
    "wrn-34-2": "gc2l",
    "mobilenetv2": "gc",
    "mobilenetv2-cifar": "shuffle",
    "resnet18": "flgc",
    "resnet50": "gc2l",
    "resnext50": "dgconv",
    "resnext101": "gc2l",
    "condensenet-50": "gc2l",
    "condensenet-74": "gc",
    "condensenet-86": "lgc",
}
assert NETWORKS.keys() >= {name for name in models.NAMES if not name.startswith("wrn")}


@cache
def of_kind(kind: str) -> nn.Module:
    return network("wrn-10-1", **KINDS[kind])


def check_torch(path: Path, model: nn.Module, size: int) -> None:
    program = torch.export.load(path)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {getattr(target, "namespace", "aten") for target in targets} == {"aten"}
    run = program.module()
    check_any_batch(run, model, size)
    assert not run(images(2, size)).requires_grad


def check_onnx(path: Path, model: nn.Module, size: int) -> None:
    assert [file.name for file in path.parent.glob("*onnx*")] == [path.name]  # its weights are in it
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    assert {node.domain for node in graph.graph.node} == {""} and not graph.functions
    assert [entry.domain for entry in graph.opset_import] == [""]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("images", ["batch", 3, size, size])
    assert (made.name, made.shape[0]) == ("logits", "batch")
    check_any_batch(lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), model, size)


def check_any_batch(run: Callable[[torch.Tensor], torch.Tensor], model: nn.Module, size: int) -> None:
    for batch in (1, 3):
        x = images(batch, size)
        check_close(run(x), model, x)


def check_safetensors(path: Path, model: nn.Module, create: dict) -> None:
    save(path, model.state_dict(), create, {})
    loaded = load(path).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(tensor.equal(loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_a_safetensors_file(kind, tmp_path):
    groups = {} if KINDS[kind]["conv"] in ("sc", "dgconv") else {"groups": 4}
    create = {"name": "wrn-10-1", "num_classes": 5, **KINDS[kind], **groups}
    check_safetensors(tmp_path / "model.safetensors", of_kind(kind), create)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_as_a_torch_program_of_stock_operations(kind, tmp_path):
    exported = models.export(of_kind(kind), tmp_path / "model.pt2", (3, 16, 16))
    assert exported.format == "torch" and exported.difference is not None
    check_torch(tmp_path / "model.pt2", of_kind(kind), 16)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_an_onnx_file_of_standard_operators(kind, tmp_path):
    exported = models.export(of_kind(kind), tmp_path / "model.onnx", (3, 16, 16))
    assert exported.format == "onnx" and exported.difference is not None
    check_onnx(tmp_path / "model.onnx", of_kind(kind), 16)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_in_every_format(name, tmp_path):
    size, conv = models.image_size(name) // (7 if models.image_size(name) == 224 else 2), NETWORKS[name]
    model = network(name, conv, size)
    groups = {} if conv == "dgconv" else {"groups": 4}
    create = {"name": name, "conv": conv, "num_classes": 5, **groups}
    check_safetensors(tmp_path / "model.safetensors", model, create)
    program = Source.of(model, (3, size, size)).program()  # once for both: `export` traces for each file
    torch_program.write(program, tmp_path / "model.pt2")
    check_torch(tmp_path / "model.pt2", model, size)
    onnx_graph.write(program, tmp_path / "model.onnx")
    check_onnx(tmp_path / "model.onnx", model, size)
