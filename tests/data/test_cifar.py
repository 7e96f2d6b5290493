"""CIFAR in torchvision's layout: on a tiny stand-in for errors and downloads, on the real one for its facts."""

import functools
import hashlib
import pickle
import socket
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from twolevel.data import DataConfig, load, prepare
from twolevel.data.cifar import MEAN_STD, read
from twolevel.errors import UserError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write(path: Path, content: object) -> str:
    """Pickle `content` to `path`; the md5 of the file."""
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A root with a CIFAR-10 of 8 images a batch, which torchvision is told is the published one."""
    root = tmp_path / "root"
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def batch(name: str) -> list[str]:
        images = generator.integers(0, 256, (8, 3072), dtype=np.uint8)
        return [name, write(folder / name, {"data": images, "labels": list(range(8))})]

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch")])
    meta = {"md5": write(folder / "batches.meta", {"label_names": NAMES})}
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, **meta})
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:0")  # no test may reach the real one
    return root


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def web(tiny, tmp_path, monkeypatch):
    """The archive of `tiny`, which a server on this machine offers in place of the published one."""
    archive = tmp_path / "web" / CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tiny / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(Quiet, directory=archive.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        yield archive
        server.shutdown()


def config(root: Path, download: bool = False) -> DataConfig:
    return DataConfig("cifar10", root, download=download, batch_size=8)


def load_from(root: Path):
    return load(config(root), seed=0, device="cpu")


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def test_a_whole_folder_loads(tiny):
    prepare(config(tiny))
    data = load_from(tiny)
    assert (len(data.train), len(data.test), data.classes) == (40, 8, NAMES)


def test_bytes_become_channels_rows_and_columns_in_that_order(tiny):
    with open(tiny / CIFAR10.base_folder / "test_batch", "rb") as file:
        stored = pickle.load(file)
    _, test, _ = read("cifar10", tiny)
    assert torch.equal(test.images.flatten(1), torch.from_numpy(stored["data"]))
    assert test.labels.tolist() == stored["labels"]


@pytest.mark.parametrize("step", [prepare, lambda c: load(c, seed=0, device="cpu")])
def test_a_missing_folder_is_named_with_what_would_do(step, tmp_path):
    expected = r"cifar100 .*/cifar-100-python; add --download, .* or use --data sample"
    with pytest.raises(UserError, match=expected):
        step(DataConfig("cifar100", tmp_path))


@pytest.mark.parametrize("step", [prepare, lambda c: load(c, seed=0, device="cpu")])
def test_a_damaged_byte_is_found_and_its_file_named(step, tiny):
    path = tiny / CIFAR10.base_folder / "data_batch_3"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="data_batch_3 is damaged: its md5 is"):
        step(config(tiny))


@pytest.mark.parametrize("name", ["data_batch_2", "batches.meta"])
def test_a_missing_file_is_named(name, tiny):
    (tiny / CIFAR10.base_folder / name).unlink()
    with pytest.raises(UserError, match=f"cifar10 is incomplete: no file .*{name}"):
        load_from(tiny)


def test_download_fetches_what_is_missing_and_leaves_only_the_data(tiny, web, tmp_path):
    root = tmp_path / "new" / "root"
    prepare(config(root, download=True))
    assert files(root) == files(tiny)
    assert len(load_from(root).train) == 40


def test_download_replaces_a_damaged_file(tiny, web):
    (tiny / CIFAR10.base_folder / "data_batch_1").write_bytes(b"half a file")
    prepare(config(tiny, download=True))
    load_from(tiny)


def test_download_does_nothing_where_the_data_is_whole(tiny, web):
    web.unlink()
    prepare(config(tiny, download=True))


def test_load_never_downloads(web, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        load(config(tmp_path / "new", download=True), seed=0, device="cpu")
    assert not (tmp_path / "new").exists()


def assert_fails_without_a_trace(root: Path, reason: str) -> None:
    with pytest.raises(
        UserError, match=f"cifar10 could not be downloaded from .*{reason}.*--data sample"
    ) as e:
        prepare(config(root, download=True))
    assert "\n" not in str(e.value)
    assert list(root.iterdir()) == []


def test_a_download_without_a_network_is_one_line_and_leaves_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen: connections are refused
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{taken.getsockname()[1]}/cifar.tar.gz")
        assert_fails_without_a_trace(tmp_path / "new", "refused")


def test_an_archive_that_is_not_on_the_web_is_one_line_and_leaves_nothing(web, tmp_path):
    web.unlink()
    assert_fails_without_a_trace(tmp_path / "new", "404")


def test_a_truncated_archive_is_refused_and_leaves_nothing(web, tmp_path):
    web.write_bytes(web.read_bytes()[:-100])
    assert_fails_without_a_trace(tmp_path / "new", "corrupted")


def test_a_root_that_cannot_be_written_is_named(tiny, tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("")
    with pytest.raises(UserError, match=f"could not be downloaded from .* to {occupied}"):
        prepare(config(occupied, download=True))


@pytest.fixture(scope="module")
def real(data_root):
    return read("cifar10", data_root)


def test_real_data_has_its_published_counts(real):
    train, test, classes = real
    assert train.labels.bincount().tolist() == [5000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    assert train.images.shape == (50_000, 3, 32, 32) and classes == NAMES


def test_normalisation_constants_are_those_of_the_training_images(real):
    levels = torch.arange(256, dtype=torch.float64) / 255
    for channel, mean, std in zip(range(3), *MEAN_STD["cifar10"], strict=True):
        counts = real[0].images[:, channel].flatten().bincount(minlength=256).double()
        found_mean = (counts @ levels) / counts.sum()
        found_std = ((counts @ (levels - found_mean) ** 2) / counts.sum()).sqrt()
        assert (f"{found_mean:.4f}", f"{found_std:.4f}") == (f"{mean:.4f}", f"{std:.4f}")


class Calls:
    """Its pickle makes a file as it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_calls_nothing_even_where_its_md5_is_right(tiny, tmp_path, monkeypatch):
    md5 = write(tiny / CIFAR10.base_folder / "test_batch", {"data": Calls(tmp_path / "made"), "labels": []})
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5]])
    with pytest.raises(pickle.UnpicklingError, match="is no part of a data set"):
        read("cifar10", tiny)
    assert not (tmp_path / "made").exists()


def test_what_is_unpickled_is_what_was_verified(tiny, tmp_path, monkeypatch):
    """Every file is opened once, and replaced as soon as it was read."""
    opened = []
    read_bytes = Path.read_bytes

    def swapped(path: Path) -> bytes:
        content = read_bytes(path)
        opened.append(path.name)
        path.write_bytes(pickle.dumps(Calls(tmp_path / "made")))
        return content

    monkeypatch.setattr(Path, "read_bytes", swapped)
    train, test, _ = read("cifar10", tiny)
    assert (len(train), len(test)) == (40, 8) and len(opened) == len(set(opened)) == 7
    assert not (tmp_path / "made").exists()


def test_an_archive_writes_no_file_of_its_own_choice(tiny, web, tmp_path, monkeypatch):
    with tarfile.open(web, "w:gz") as tar:
        tar.add(tiny / CIFAR10.base_folder, CIFAR10.base_folder)
        tar.add(tiny / CIFAR10.base_folder / "test_batch", "../../outside")
        tar.add(tiny / CIFAR10.base_folder / "test_batch", f"{CIFAR10.base_folder}/more")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(web.read_bytes()).hexdigest())
    prepare(config(tmp_path / "a" / "b", download=True))
    assert files(tmp_path / "a") == files(tiny) and not (tmp_path / "outside").exists()
