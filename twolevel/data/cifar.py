"""CIFAR-10 and CIFAR-100 as torchvision lays them out: reading, verifying, fetching.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).
"""

import hashlib
import io
import os
import pickle
import tarfile
import tempfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import download_url

from twolevel.data.config import DataConfig
from twolevel.data.memory import LabelledImages, in_memory
from twolevel.data.split import Data, View
from twolevel.errors import UserError

# What pickles of NumPy arrays name, of Python 2 and of NumPy 1 and 2.
ARRAYS = {("numpy", "ndarray"), ("numpy", "dtype")}
ARRAYS |= {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}

SOURCES = {"cifar10": CIFAR10, "cifar100": CIFAR100}

MEAN_STD = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""Mean and standard deviation of each channel, over every pixel of the 50,000 training images / 255."""


def prepare(config: DataConfig) -> None:
    """Fetch the data set if `config.download`, and verify it. Raises UserError as `download` and `verify` do."""
    (download if config.download else verify)(config.data, config.data_root)


def load(config: DataConfig, view: View) -> Data:
    """The data set as a rank sees it. Raises UserError as `read` and `in_memory` do."""
    train, test, classes = read(config.data, config.data_root)
    mean, std = MEAN_STD[config.data]
    return in_memory(config, view, train=train, test=test, classes=classes, mean=mean, std=std)


def read(name: str, root: Path) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """The training images, the test images and the names of the classes of data set `name`.

    Raises:
        UserError: a file is missing or damaged.
    """
    source = SOURCES[name]
    parts = {file: _unpickle(content) for file, content in _contents(name, root)}
    train, test = (
        _labelled([parts[file] for file, _ in files]) for files in (source.train_list, source.test_list)
    )
    return train, test, list(parts[source.meta["filename"]][source.meta["key"]])


def verify(name: str, root: Path) -> None:
    """Check that every file of data set `name` is there and has its published md5.

    Raises:
        UserError: one is missing or damaged; the message says which, and what to do.
    """
    for _ in _contents(name, root):
        pass


def _contents(name: str, root: Path) -> Iterator[tuple[str, bytes]]:
    """Every file of a data set and what is in it: the very bytes whose md5 is the published one."""
    folder = root / SOURCES[name].base_folder
    hint = "add --download, set --data-root to the folder that holds it, or use --data sample"
    if not folder.is_dir():
        raise UserError(f"{name} is not there: no folder {folder}; {hint}")
    for file, md5 in _files(name).items():
        path = folder / file
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{name} is incomplete: no file {path}; {hint}") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); {hint}") from None
        if (found := _md5(content)) != md5:
            raise UserError(f"{path} is damaged: its md5 is {found}, not {md5}; {hint}")
        yield file, content


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class _Plain(pickle.Unpickler):
    """Makes numbers, text, lists, dictionaries and NumPy arrays, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ARRAYS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a data set")


def _unpickle(content: bytes) -> dict[str, Any]:
    return _Plain(io.BytesIO(content), encoding="latin1").load()


def download(name: str, root: Path) -> None:
    """Fetch data set `name` into `root`, unless it is there and whole.

    Archive and files are written to a temporary folder, and each file is moved to its place only
    when all have been verified: an interrupted download leaves nothing that looks complete.

    Raises:
        UserError: it cannot be fetched, what came is not the published archive, or `root` cannot
            be written.
    """
    try:
        return verify(name, root)
    except UserError:
        pass
    source = SOURCES[name]
    folder = root / source.base_folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as partial:
            download_url(source.url, partial, source.filename, source.tgz_md5)
            with tarfile.open(Path(partial, source.filename)) as archive:
                for file, md5 in _files(name).items():
                    _take(archive, f"{source.base_folder}/{file}", md5, Path(partial, file))
            folder.mkdir(exist_ok=True)
            for file in _files(name):
                os.replace(Path(partial, file), folder / file)
    # torchvision reports a wrong md5 as a RuntimeError; a URLError is an OSError
    except (OSError, HTTPException, RuntimeError, KeyError, tarfile.TarError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name} could not be downloaded from {source.url} to {root} ({reason}); "
            f"copy {source.base_folder}/ there by hand, or use --data sample"
        ) from None


def _take(archive: tarfile.TarFile, member: str, md5: str, to: Path) -> None:
    """Write a member to a place that its name does not choose. Raises RuntimeError for one that was not published."""
    content = archive.extractfile(member)
    data = b"" if content is None else content.read()
    if _md5(data) != md5:
        raise RuntimeError(f"{member} in the archive is corrupted")
    to.write_bytes(data)


def _files(name: str) -> dict[str, str]:
    """The md5 of every file that torchvision reads."""
    source = SOURCES[name]
    return {**dict(source.train_list + source.test_list), source.meta["filename"]: source.meta["md5"]}


def _labelled(batches: list[dict[str, Any]]) -> LabelledImages:
    """The images [N, 3, 32, 32] of batches of `data` [n, 3072], and their labels."""
    images = torch.from_numpy(np.concatenate([batch["data"] for batch in batches])).view(-1, 3, 32, 32)
    labels = [label for batch in batches for label in batch.get("labels", batch.get("fine_labels", ()))]
    return LabelledImages(images, torch.tensor(labels))
