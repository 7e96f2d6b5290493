"""The configuration: what it refuses, what it derives, and that it costs no import of torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from twolevel.data import DataConfig, prepare
from twolevel.data.registry import DATA_SETS
from twolevel.errors import UserError


def test_importing_the_configuration_does_not_import_torch():
    code = "import sys; from twolevel.data.config import DataConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": "cifar-10"}, r"unknown data set 'cifar-10'; did you mean cifar10 or cifar100\?"),
        ({"data": "mnist"}, "use one of " + ", ".join(sorted(DATA_SETS))),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 12.5}, "batch_size=12.5"),
        ({"workers": -1}, "workers=-1"),
        ({"image_size": 0}, "image_size=0"),
        ({"data": "imagenet", "download": True}, "download=True"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**fields)


@pytest.mark.parametrize(("data", "classes"), [("sample", 10), ("cifar10", 10), ("cifar100", 100)])
def test_shapes_of_the_small_sets_are_known_without_reading(data, classes):
    config = DataConfig(data, Path("/nowhere"), image_size=224)
    assert config.num_classes == classes
    assert config.image_shape == (3, 32, 32)


def test_imagenet_has_the_classes_of_its_folder_and_the_asked_size(tmp_path):
    for name in ("cat", "dog", "emu"):
        (tmp_path / "train" / name).mkdir(parents=True)
    config = DataConfig("imagenet", tmp_path, image_size=96)
    assert config.num_classes == 3
    assert config.image_shape == (3, 96, 96)


def test_a_setting_without_effect_is_a_warning_that_names_it():
    with pytest.warns(UserWarning, match="image_size='96' is ignored.*data='sample'"):
        prepare(DataConfig(image_size=96))


def test_default_settings_warn_of_nothing(recwarn):
    prepare(DataConfig())
    assert not recwarn.list
