"""Whatever is wrong with the cache costs a warning and the memory of this process, and nothing else."""

import json
import logging
import os
import stat

import pytest
import torch

from twolevel.ops import Geometry, autotune, dispatch, store, two_level_conv2d
from twolevel.ops.store import Store, cache_folder


@pytest.fixture(autouse=True)
def said(caplog):
    """What is said of the cache, in order; each of its faults is said once a process."""
    store.warn.cache_clear()
    caplog.set_level(logging.WARNING, "twolevel.ops")
    yield lambda: caplog.messages
    store.warn.cache_clear()


def write(text: str | bytes):
    return lambda path: path.write_bytes(text.encode() if isinstance(text, str) else text)


def a_loop(path):
    path.symlink_to(path)


DAMAGE = {
    "empty": write(""),
    "truncated": write('{"a": [1'),
    "no text": write(b"\xff\xfe\x00"),
    "too deep": write("[" * 100_000),
    "no object": write("[1]"),
    "a folder": lambda path: path.mkdir(),
    "unreadable": a_loop,  # whose permissions root would pass over
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_left_alone_and_values_are_kept_for_this_process(tmp_path, said, damage):
    path = tmp_path / "two_level.json"
    DAMAGE[damage](path)
    before = path.read_bytes() if path.is_file() else None
    for _ in range(2):
        kept = Store(path)
        assert kept.get("a") is None
        assert kept.keep("a", 1) == 1
        assert kept.keep("a", 2, replace=False) == 1
        assert kept.get("a") == 1
    assert len(said()) == 1 and "\n" not in said()[0] and len(said()[0]) < 400
    assert str(tmp_path) in said()[0]
    assert "for this process alone" in said()[0] and ("delete" in said()[0] or "XDG_CACHE" in said()[0])
    assert before is None or path.read_bytes() == before


def test_a_file_damaged_while_it_is_used_loses_nothing_here(tmp_path, said):
    path = tmp_path / "two_level.json"
    kept = Store(path)
    kept.keep("a", 1)
    path.write_text("")
    assert kept.keep("b", 2) == 2
    assert (kept.get("a"), kept.get("b")) == (1, 2)
    assert len(said()) == 1


def test_a_folder_that_cannot_be_made_is_said_and_nothing_more(tmp_path, said):
    (tmp_path / "file").write_text("")
    kept = Store(tmp_path / "file" / "twolevel" / "two_level.json")
    assert kept.keep("a", 1) == kept.get("a") == 1
    assert len(said()) == 1 and str(tmp_path / "file" / "twolevel") in said()[0]


def test_no_file_yet_is_no_fault(tmp_path, said):
    kept = Store(tmp_path / "new" / "two_level.json")
    kept.keep("a", 1)
    assert json.loads(kept.path.read_text()) == {"a": 1} and said() == []


@pytest.fixture
def no_home(monkeypatch):
    """A process without HOME whose user the system does not know, as in many containers."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)


def test_without_a_home_a_layer_is_measured_and_kept_for_this_process(no_home, said, monkeypatch):
    autotune.measurements.cache_clear()
    monkeypatch.setattr(dispatch, "_plans", {})
    monkeypatch.setattr(autotune, "SMALL_MACS", 0)
    x, *weights = (torch.randn(shape) for shape in ((2, 4, 5, 5), (4, 2, 3, 3), (2, 2, 3, 3), (4, 2, 1, 1)))
    x = x.contiguous(memory_format=torch.channels_last)
    choices = []
    monkeypatch.setattr(
        autotune, "measure", lambda problem, able, runs: choices.append(able) or dict.fromkeys(able, 1.0)
    )
    for _ in range(2):
        two_level_conv2d(x, *weights, Geometry())
    autotune.measurements.cache_clear()
    assert len(choices) == 1
    assert len(said()) == 1 and "HOME" in said()[0] and "for this process alone" in said()[0]


def test_without_a_home_nothing_can_be_written_anywhere(no_home):
    folder = cache_folder()
    with pytest.raises(OSError):
        folder.mkdir(parents=True)
    assert not folder.exists()


def test_a_value_is_on_disk_before_its_name_is(tmp_path, monkeypatch):
    """Else a crash of the machine leaves an empty file of that name."""
    done = []
    sync, replace = os.fsync, os.replace

    def see(handle):
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    monkeypatch.setattr(os, "fsync", see)
    monkeypatch.setattr(os, "replace", lambda *names: done.append("rename") or replace(*names))
    Store(tmp_path / "two_level.json").keep("a", 1)
    assert done == ["file", "rename", "folder"]
