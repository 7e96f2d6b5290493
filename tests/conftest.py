"""Fixtures for every test: the pool of ranks, the real data; one thread, so that runs repeat."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pool import RankPool  # before torch: it sets what torch and Gloo read when they are loaded

import torch  # isort: skip

torch.set_num_threads(1)


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
