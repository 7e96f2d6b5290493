"""`twolevel.models.export` of any network, and what it refuses."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from trained import CLASSES, check_close, images, trained

import twolevel
from twolevel.errors import UserError
from twolevel.models import export
from twolevel.models.exporting import check, torch_program
from twolevel.models.exporting.prepare import Source
from twolevel.nn import DynamicGroupConv2d, TwoLevelConv2d

SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return trained(twolevel.models.create("wrn-10-1", conv="gc2l", groups=4, num_classes=CLASSES))


def refused(path, model, shape=SHAPE, **options) -> str:
    with pytest.raises(UserError) as caught:
        export(model, path, shape, **options)
    assert "\n" not in str(caught.value)
    assert not [*path.parent.iterdir()]
    return str(caught.value)


def test_a_converted_network_of_torchvision(tmp_path):
    model = torchvision.models.resnet18(num_classes=CLASSES)
    trained(twolevel.convert(model, conv="gc2l", groups=4), 32)
    exported = export(model, tmp_path / "model.pt2", (3, 32, 32))
    assert str(exported).startswith(
        f"{tmp_path / 'model.pt2'}: checked, the largest difference from the network is"
    )
    run = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 3):
        check_close(run(images(batch, 32)), model, images(batch, 32))


def test_the_network_stays_as_it_was(small, tmp_path):
    small.train()
    before = copy.deepcopy(small.state_dict())
    export(small, tmp_path / "model.pt2", SHAPE)
    assert all(module.training for module in small.modules())
    assert all(parameter.requires_grad for parameter in small.parameters())
    torch.testing.assert_close(small.state_dict(), before, rtol=0, atol=0)
    small.eval()


def test_a_network_of_float64_becomes_one_of_float32(small, tmp_path):
    export(copy.deepcopy(small).double(), tmp_path / "model.pt2", SHAPE)
    run = torch.export.load(tmp_path / "model.pt2").module()
    assert run(images(3)).dtype == torch.float32
    check_close(run(images(3)), small, images(3))


def test_a_file_that_is_there_is_replaced_only_by_a_whole_one(small, tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_text("before")

    def broken(program, made):
        made.write_text("half")
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"cannot write .*: No space left on device"),
    ):
        patch.setattr(torch_program, "write", broken)
        export(small, path, SHAPE)
    assert path.read_text() == "before" and [*tmp_path.iterdir()] == [path]
    export(small, path, SHAPE)
    assert path.stat().st_size > 1000 and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda y: y * 1.001, "what was written differs from the network by up to"),
        (lambda y: y * torch.nan, "what was written differs from the network by up to nan"),
        (lambda y: y[:2], r"what was written computes [2, 5] where the network computes [3, 5]"),
    ],
)
def test_what_computes_something_else_is_an_error_and_not_left(small, tmp_path, monkeypatch, wrong, message):
    load = torch_program.load
    monkeypatch.setattr(torch_program, "load", lambda path: lambda x: wrong(load(path)(x)))
    assert message in refused(tmp_path / "model.pt2", small)


def test_the_check_is_by_another_batch_than_was_traced(small, tmp_path, monkeypatch):
    seen = []

    def recording(source, run):
        return check.compare(source, lambda x: seen.append(len(x)) or run(x))

    monkeypatch.setattr("twolevel.models.exporting.export.compare", recording)
    export(small, tmp_path / "model.pt2", SHAPE)
    assert seen == [3]


class Branching(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class Several(nn.Sequential):
    def forward(self, x):
        return {"out": super().forward(x)}


@pytest.mark.filterwarnings("ignore:no permutation is folded", "ignore:no normalisation is folded")
def test_networks_that_cannot_be_exported_are_refused_in_one_line(small, tmp_path, capfd):
    path = tmp_path / "model.pt2"
    assert "Branching cannot be exported for batches of any size: " in refused(
        path, Branching(nn.Conv2d(3, 4, 1))
    )
    assert "the network returns a dict; export takes one that" in refused(path, Several(nn.Conv2d(3, 4, 1)))
    line = refused(path, small, (1, 16, 16))
    assert "the network cannot compute images of [1, 16, 16]: " in line
    with torch.device("meta"):
        meta = twolevel.models.create("wrn-10-1")
    assert "is on the meta device and has no values" in refused(path, meta)
    assert capfd.readouterr() == ("", "")  # torch.export prints the graph of what it cannot trace


def test_a_part_of_a_network_is_refused(tmp_path):
    class Exchange:
        ranks, key = 2, ""

    layer = TwoLevelConv2d(8, 8, 1, groups=2)
    layer.exchange = Exchange()
    assert "this rank holds a part of the network" in refused(tmp_path / "model.pt2", nn.Sequential(layer))


def test_safetensors_are_of_named_networks(small, tmp_path):
    assert "twolevel export writes; use torch or onnx" in refused(tmp_path / "model.safetensors", small)


@torch.no_grad()
def test_images_of_a_check_are_those_whose_choice_of_channels_is_clear():
    torch.manual_seed(0)
    layer = DynamicGroupConv2d(16, 8, 1, groups=2)
    layer.set_progress(1)
    layer.offset.uniform_(0.5, 1.5)
    source = Source.of(nn.Sequential(layer), (16, 4, 4))
    chosen = check._images(source)
    generator = torch.Generator().manual_seed(0)
    every = torch.randn(check.CANDIDATES, 16, 4, 4, generator=generator)
    gaps = []
    for image in every:
        seen = []
        handle = source.model[0].saliency.register_forward_hook(
            lambda *call, seen=seen: seen.append(call[2][0])
        )
        source.outputs(image[None])
        handle.remove()
        ordered = seen[0].sort(-1).values  # of the 16 channels 12 are dropped
        gaps.append(float(((ordered[:, 12] - ordered[:, 11]) / ordered[:, -1]).min()))
    best = sorted(range(check.CANDIDATES), key=gaps.__getitem__, reverse=True)[: check.IMAGES]
    assert torch.equal(chosen, every[best])
