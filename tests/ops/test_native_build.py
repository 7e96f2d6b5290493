"""The library of C kernels is compiled once, kept where nobody else can change it, or they say why it is not there."""

import ctypes
import logging
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from twolevel.ops import store
from twolevel.ops.kernels.native import build, call

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def why_unavailable(monkeypatch) -> str:
    monkeypatch.setattr(call, "library", build.library.__wrapped__)
    reason = call.available.__wrapped__()
    assert reason is not None and "\n" not in reason
    return reason


def test_without_a_compiler_they_say_so(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no-such-compiler" in why_unavailable(monkeypatch)


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-dM*) exit 0;; esac\necho "error: out of luck" >&2\nexit 1\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(compiler))
    assert "out of luck" in why_unavailable(monkeypatch)
    assert not any((tmp_path / "cache" / "twolevel").iterdir())


ONE = "int one(void) { return 1; }"


@pytest.fixture
def folder(monkeypatch, tmp_path, caplog):
    """A cache of its own, and kernels that are compiled in no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "source" / "one.c"
    source.parent.mkdir()
    source.write_text(ONE)
    monkeypatch.setattr(build.resources, "files", lambda package: source.parent)
    store.warn.cache_clear()
    caplog.set_level(logging.WARNING, "twolevel.ops")
    yield tmp_path / "twolevel"
    store.warn.cache_clear()


def load() -> build.Library:
    """As in a new process."""
    found = build.library.__wrapped__()
    assert found.functions.one() == 1
    return found


def kept(folder) -> Path:
    (path,) = folder.iterdir()
    return path


def test_many_that_start_at_once_find_one_whole_library(monkeypatch, folder, caplog):
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: load(), range(8)))
    assert len({library.key for library in found}) == 1
    assert kept(folder).name.startswith(f"kernels-{found[0].key}-")
    monkeypatch.setattr(build, "_compile", None)  # what is there already is not compiled again
    assert load().key == found[0].key
    assert caplog.messages == []


def test_a_truncated_library_is_compiled_again(folder):
    """Loaded, it ends a process with SIGBUS."""
    load()
    path = kept(folder)
    whole = path.read_bytes()
    path.unlink()  # this process has mapped it, and would end the same way when it exits
    path.write_bytes(whole[: len(whole) // 2])
    script = (
        "import sys, pathlib\n"
        "from twolevel.ops.kernels.native import build\n"
        "build.resources.files = lambda package: pathlib.Path(sys.argv[1])\n"
        "assert build.library().functions.one() == 1\n"
    )
    command = [sys.executable, "-c", script, str(folder.parent / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"{path} is damaged: it is compiled again\n"
    assert kept(folder).read_bytes() == whole


FAULTS = {
    "a file where the folder should be": lambda folder: folder.write_text(""),
    "a folder where the file should be": lambda folder: replaced(kept(folder), Path.mkdir),
    "others can write it": lambda folder: kept(folder).chmod(0o666),
    "its group can write it": lambda folder: kept(folder).chmod(0o664),
    "others can write the folder": lambda folder: folder.chmod(0o777),
}


def replaced(path, make):
    path.unlink()
    make(path)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_cache_that_cannot_be_used_is_named_and_kernels_are_compiled_for_this_process(
    folder, caplog, monkeypatch, tmp_path, fault
):
    if "where the folder" not in fault:
        load()
    FAULTS[fault](folder)
    before = sorted(tmp_path.rglob("*"))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(build.tempfile, "tempdir", str(temporary))
    for _ in range(2):
        load()
    assert not any(temporary.iterdir())  # a loaded library needs its file no more
    temporary.rmdir()
    assert sorted(tmp_path.rglob("*")) == before
    assert len(caplog.messages) == 1 and str(folder) in caplog.messages[0]
    assert "compiled and measured for this process alone; set XDG_CACHE_HOME" in caplog.messages[0]


def test_a_library_of_another_user_is_not_loaded(folder, caplog, monkeypatch):
    load()
    monkeypatch.setattr(build.os, "geteuid", lambda: kept(folder).stat().st_uid + 1)
    loaded = []
    cdll = ctypes.CDLL
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: loaded.append(path) or cdll(path))
    load()
    assert len(loaded) == 1 and str(kept(folder)) not in loaded
    assert len(caplog.messages) == 1 and "another user" in caplog.messages[0]


def test_a_new_cache_is_its_users_alone(folder):
    before = os.umask(0)
    try:
        load()
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755 and kept(folder).stat().st_mode & 0o022 == 0


def test_without_a_cache_and_a_temporary_folder_they_say_so(folder, monkeypatch):
    folder.write_text("")
    monkeypatch.setattr(build.tempfile, "tempdir", str(folder))
    with pytest.raises(build.Unavailable, match="Not a directory"):
        load()


def test_other_flags_make_another_library(monkeypatch, folder):
    keys = []
    for flags in (build.FLAGS, ("-O2", *build.FLAGS[1:]), build.FLAGS):
        monkeypatch.setattr(build, "FLAGS", flags)
        keys.append(load().key)
    assert keys[0] == keys[2] != keys[1]
    assert len([*folder.iterdir()]) == 2
