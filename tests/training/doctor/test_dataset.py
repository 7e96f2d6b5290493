"""The files of a data set: where they are right and where not."""

import shutil

from command import write_image_folder
from doctor_settings import CPU
from torchvision.datasets import CIFAR10

from twolevel.data import DataConfig
from twolevel.distributed.environment import World
from twolevel.training.doctor import dataset
from twolevel.training.doctor.finding import Finding


def data_level(settings: DataConfig, local_rank: int = 0) -> Finding:
    where = World(local_rank, 2, local_rank, 2, CPU, "gloo", "none")
    return next(iter(dataset.check(where, settings)), None)


def test_folders_of_images(tmp_path):
    settings = DataConfig("imagenet", data_root=write_image_folder(tmp_path), image_size=16)
    good = data_level(settings)
    assert good.level == "ok" and "24 images in train, 7 images in val" in good.finding
    assert data_level(settings, local_rank=1) is None  # one of a machine looks
    broken = tmp_path / "val" / "class1" / "01.png"
    broken.write_bytes(broken.read_bytes()[:40])
    found = data_level(settings)
    assert found.level == "problem" and f"{broken} is not a readable image" in found.finding
    for path in (tmp_path / "val" / "class1").iterdir():
        path.unlink()
    assert "class1 holds no images" in data_level(settings).finding
    shutil.rmtree(tmp_path / "val" / "class1")
    assert "differ in 1 classes (class1)" in data_level(settings).finding


def test_files_of_cifar(tmp_path, monkeypatch):
    assert "no folder" in data_level(DataConfig("cifar10", data_root=tmp_path)).finding
    later = data_level(DataConfig("cifar10", data_root=tmp_path, download=True))
    assert later.level == "warning" and "fetches it when the run starts" in later.advice
    assert not any(tmp_path.iterdir())
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    for name in ("part", "meta"):
        (folder / name).write_bytes(b"x")
    md5 = "9dd4e461268c8034f5c8564e155c67a6"  # of b"x"
    monkeypatch.setattr(CIFAR10, "train_list", [["part", md5]])
    monkeypatch.setattr(CIFAR10, "test_list", [])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "md5": md5})
    assert data_level(DataConfig("cifar10", data_root=tmp_path)).level == "ok"
    (folder / "part").write_bytes(b"y")
    found = data_level(DataConfig("cifar10", data_root=tmp_path))
    assert found.level == "problem" and "part is damaged: its md5" in found.finding
    (folder / "part").unlink()
    assert "is incomplete: no file" in data_level(DataConfig("cifar10", data_root=tmp_path)).finding


def test_the_sample_is_always_there():
    assert data_level(DataConfig("sample")).level == "ok"
