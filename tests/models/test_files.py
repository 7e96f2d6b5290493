"""Exported files: one that this version cannot use is refused in one line."""

import pytest
import torch
from safetensors.torch import save_file

from twolevel.errors import UserError
from twolevel.models import create
from twolevel.models.files import load, read, save

CREATE = {"name": "wrn-10-1", "conv": "gc2l", "groups": 2, "num_classes": 10}


@pytest.mark.parametrize(
    ("options", "data"),
    [
        (CREATE, [1]),
        ([1], {"data": "sample"}),
        (CREATE | {"num_classes": -10}, {"data": "sample"}),
        (CREATE | {"num_classes": 2**70}, {"data": "sample"}),
    ],
)
def test_what_describes_no_network_is_refused_in_one_line(tmp_path, options, data):
    path = tmp_path / "model.safetensors"
    save(path, create(**CREATE).state_dict(), options, data)
    with pytest.raises(UserError, match=r"does not say which network|does not describe a network") as raised:
        load(path)
    assert "\n" not in str(raised.value)


def test_brackets_without_end_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"twolevel": "[" * 100_000})
    with pytest.raises(UserError, match="cannot read"):
        read(path)


def test_a_file_does_not_choose_where_data_is_fetched_to(tmp_path):
    path = tmp_path / "model.safetensors"
    data = {"data": "cifar10", "image_size": 32, "data_root": "/etc", "download": True}
    save(path, create(**CREATE).state_dict(), CREATE, data)
    assert read(path)[1] == {"data": "cifar10", "image_size": 32}


def test_a_saved_network_loads_as_it_was(tmp_path):
    model = create(**CREATE)
    save(tmp_path / "model.safetensors", model.state_dict(), CREATE, {"data": "sample"})
    loaded = load(tmp_path / "model.safetensors").state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(tensor.equal(loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "data", "named"),
    [
        (CREATE | {"colour": 1}, {"data": "sample"}, "colour"),
        ({"conv": "gc"}, {"data": "sample"}, "name"),
        (CREATE, {"data": "sample", "colour": 1}, "colour"),
    ],
)
def test_settings_unknown_to_this_version_are_named_in_one_line(tmp_path, options, data, named):
    path = tmp_path / "model.safetensors"
    save(path, create(**CREATE).state_dict(), options, data)
    with pytest.raises(UserError, match=named) as raised:
        read(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
