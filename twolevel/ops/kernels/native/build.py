"""Compiles the C kernels once for a processor and compiler, and loads them.

The library lies in `$XDG_CACHE_HOME/twolevel` (`~/.cache/twolevel`) under a name that depends on everything it is made
of, so a new processor, compiler or source makes a new one beside it. It is renamed into place when whole: any number of
processes may start at once. The name ends in a digest of the file, as to load half a library ends the process. Where
the cache cannot be used, a process compiles its own in a temporary folder.
"""

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from twolevel.durable import publish
from twolevel.ops.store import cache_folder, make_folder, warn, warn_of_cache

FLAGS = ("-O3", "-shared", "-fPIC")
# How compilers name the processor they run on; without any of them code is for the least of its family.
NATIVE = (("-march=native",), ("-mcpu=native",), ())
SECONDS = 300  # for one run of the compiler, which takes a few


class Unavailable(Exception):
    """Why there are no kernels, in one line."""


class Library(NamedTuple):
    """The loaded library and its key: what it was made of, as a few hexadecimal digits."""

    functions: ctypes.CDLL
    key: str


@cache
def library() -> Library:
    """Compile unless that has been done before, and load. Raises Unavailable."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    with resources.as_file(resources.files("twolevel.ops.kernels.native")) as folder:
        sources = sorted(path for path in folder.iterdir() if path.suffix in (".c", ".h"))
        native, processor = _target(compiler)
        flags = [*FLAGS, *native]
        key = _key([*compiler, *flags, processor], sources)

        def make(folder: Path) -> Path:
            return _compile(
                compiler, flags, [source for source in sources if source.suffix == ".c"], folder, key
            )

        cache = cache_folder()
        try:
            return _load(_kept(cache, key) or make(cache), key)
        except OSError as error:
            warn_of_cache(cache, error)
        try:
            with tempfile.TemporaryDirectory(prefix="twolevel-") as private:
                return _load(make(Path(private)), key)  # what is loaded needs its file no more
        except OSError as error:
            raise Unavailable(f"cannot write or load compiled kernels: {error}") from error


def _load(path: Path, key: str) -> Library:
    return Library(ctypes.CDLL(str(path)), key)


def _kept(folder: Path, key: str) -> Path | None:
    """The library compiled before, None without one. Raises OSError for one that others may have written, or may."""
    for path in folder.glob(f"kernels-{key}-*.so"):
        _check_owner(os.stat(folder), "it")
        with open(path, "rb") as file:
            _check_owner(os.fstat(file.fileno()), path.name)
            if path == _path(folder, key, file.read()):
                return path
        warn(f"{path} is damaged: it is compiled again")
    return None


def _check_owner(status: os.stat_result, what: str) -> None:
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{what} is of another user, or others can write it: chmod go-w")


def _path(folder: Path, key: str, library: bytes) -> Path:
    return folder / f"kernels-{key}-{hashlib.sha256(library).hexdigest()[:16]}.so"


def _target(compiler: list[str]) -> tuple[tuple[str, ...], str]:
    """Flags for this processor, and all that the compiler then predefines: its version and the instructions it uses."""
    for native in NATIVE:
        asked = [*compiler, *native, "-dM", "-E", "-x", "c", os.devnull]
        found = _run(asked)
        if found.returncode == 0:
            return native, found.stdout
    raise Unavailable(f"{shlex.join(asked)} failed: {_last_line(found)}")


def _key(words: list[str], sources: list[Path]) -> str:
    digest = hashlib.sha256()
    for part in [*(word.encode() for word in words), *(source.read_bytes() for source in sources)]:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _compile(compiler: list[str], flags: list[str], sources: list[Path], folder: Path, key: str) -> Path:
    """The library, in a folder that is made where there is none. Raises Unavailable, and OSError from the folder."""
    make_folder(folder)
    handle, name = tempfile.mkstemp(dir=folder, prefix=f"kernels-{key}", suffix=".part")
    os.close(handle)
    made = Path(name)
    try:
        asked = [*compiler, *flags, "-o", name, *map(str, sources)]
        found = _run(asked)
        if found.returncode:
            raise Unavailable(f"{shlex.join(asked)} failed: {_last_line(found)}")
        made.chmod(0o644)
        path = _path(folder, key, made.read_bytes())
        publish(made, path)
        return path
    finally:
        made.unlink(missing_ok=True)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        # errors="replace": the messages of a compiler follow the user's locale, whatever its encoding.
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
        )
    except OSError as error:
        raise Unavailable(f"no C compiler: {error}; install one or set CC to it") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{shlex.join(command)} took more than {SECONDS} s") from error


def _last_line(found: subprocess.CompletedProcess[str]) -> str:
    lines = found.stderr.strip().splitlines()
    return next(
        (line for line in lines if "error" in line), lines[-1] if lines else f"exit {found.returncode}"
    )
