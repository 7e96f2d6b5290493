"""Fixtures for every test: ranks, real data, C kernels; one thread, so that runs repeat."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pool import RankPool  # before torch: it sets what torch and Gloo read when they are loaded

import torch  # isort: skip

from twolevel.ops.kernels import native
from twolevel.ops.kernels.native import build, call

torch.set_num_threads(1)
os.environ.pop(
    "COLUMNS", None
)  # the width of a terminal around the tests, as processes of pytest-xdist are told it


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Four ranks for the whole session; no process is started before the first run."""
    pool = RankPool(size=4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder that holds `cifar-10-batches-py`; the test is skipped where there is none."""
    root = os.environ.get("TWOLEVEL_DATA_ROOT")
    if not root:
        pytest.skip("set TWOLEVEL_DATA_ROOT to the folder that holds cifar-10-batches-py")
    if not (Path(root) / "cifar-10-batches-py").is_dir():
        pytest.fail(f"TWOLEVEL_DATA_ROOT={root} has no cifar-10-batches-py; unset it or correct it")
    return Path(root)


@pytest.fixture(
    scope="session", params=["-march=native", "-mavx2 -mfma", ""], ids=["native", "avx2", "least"]
)
def compiled(request, tmp_path_factory) -> ctypes.CDLL:
    """The kernels for this processor, and with the vectors of smaller ones."""
    if "avx2" in request.param and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no AVX2")
    if request.param == "-march=native":
        assert native.available() is None
        return build.library().functions
    folder = build.resources.files(build.__package__)
    sources = [path for path in folder.iterdir() if path.name.endswith(".c")]
    flags = [*build.FLAGS, *request.param.split()]
    path = build._compile(["cc"], flags, sources, tmp_path_factory.mktemp("kernels"), "test")
    return ctypes.CDLL(str(path))


@pytest.fixture
def kernels(compiled, monkeypatch):
    """`twolevel.ops.kernels.native` by one of these libraries."""
    monkeypatch.setattr(call, "library", lambda: build.Library(compiled, "test"))
    monkeypatch.setattr(call, "function", call.function.__wrapped__)
    return native
