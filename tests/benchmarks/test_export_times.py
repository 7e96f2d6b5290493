"""What `benchmarks export` times computes the same, and its ratios are to the dense network in eager torch."""

import pytest
import torch

from benchmarks import export, report
from benchmarks.inference.peers import FORMATS, as_if_trained
from twolevel import models
from twolevel.errors import UserError
from twolevel.models.exporting import onnx_graph

pytest.importorskip("onnxruntime")
TINY = ["--model", "wrn-10-1", "--batches", "1", "3", "--turns", "2"]
FORMS = ["eager", "prepared", "torch", "onnx"]


def settings(*options: str) -> export.Settings:
    return report.parse(export.Settings, "export", [*TINY, *options])


@torch.no_grad()
def test_every_form_computes_what_the_network_does(tmp_path):
    torch.manual_seed(0)
    model = as_if_trained(models.create("wrn-10-1", conv="gc2l", groups=4))
    peers, skipped = export.peers_of("gc2l", model, 32, tmp_path)
    assert not skipped
    assert [name for name, _ in peers] == [
        f"gc2l {form}" for form in ["eager", *FORMS[:1], "prepared", *FORMS[1:]]
    ]
    x = torch.randn(3, 3, 32, 32)
    wanted = model(x)
    for _, peer in peers:
        # Float32, ten layers of some hundred products, added in another order.
        got = peer.run(x.to(memory_format=FORMATS[peer.memory_format]))
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def test_the_faster_memory_format_counts_and_ratios_are_to_the_dense_network_in_eager_torch(monkeypatch):
    def fake(peers, batch, size, settings):
        return [[float(batch * (index + 1))] * 2 for index in range(len(peers))]

    monkeypatch.setattr(export, "seconds", fake)
    found = export.measure(settings())
    of_three = found["peers_by_batch"][3]
    assert [*of_three] == [f"{name} {form}" for name in ("dense", "gc2l") for form in FORMS]
    assert of_three["gc2l eager"] == {
        "memory_format": "contiguous",
        "median_ms": 21000,
        "quartiles_ms": [21000] * 3,
    }
    assert found["ratios_by_batch"][1]["dense eager"] == 1
    assert found["ratios_by_batch"][1]["gc2l onnx"] == 12
    lines = export.table(found, settings()).splitlines()
    assert len(lines) == 9 and lines[-1].split() == [
        "gc2l",
        "onnx",
        "12000.00",
        "36000.00",
        "12.000",
        "12.000",
    ]


def test_what_cannot_run_here_is_skipped_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_graph, "require", lambda: (_ for _ in ()).throw(UserError("not installed")))
    found = export.measure(settings())
    assert found["skipped"] == {f"{name} onnx": "not installed" for name in ("dense", "gc2l")}
    assert "skipped gc2l onnx: not installed" in export.table(found, settings())


def test_batches_without_images_are_refused():
    with pytest.raises(UserError, match="--batches 1 0: use positive numbers"):
        export.Settings(batches=(1, 0))
