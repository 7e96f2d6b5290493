"""Files that are whole or not there, also after a crash of the machine."""

import contextlib
import errno
import os
import secrets
import warnings
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Not every file system can do so for folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def publish(made: Path, path: Path) -> None:
    """Rename a whole file into place. After a crash of the machine there is the old one or the new one."""
    sync(made)
    os.replace(made, path)
    sync(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path`, to be written in the body, which takes its place unless that raises."""
    made = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield made
        publish(made, path)
    finally:
        made.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Put `text` in the place of what `path` holds, in one step."""
    with replacing(path) as made:
        made.write_text(text)


class Appended:
    """A file, of `text` at first, that whole pieces of text are added to.

    What the disk does not take is kept and added with the next piece: a warning says so, once until it succeeds.
    """

    def __init__(self, path: Path, text: str = ""):
        write_text(path, text)
        self.path, self._waiting = path, b""
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._size = os.fstat(self._file).st_size
        self._warned = False

    def add(self, text: str) -> None:
        self._waiting += text.encode()
        try:
            if not os.fstat(self._file).st_nlink:
                raise OSError(errno.ENOENT, "it was removed")
            written = os.write(self._file, self._waiting)
            if written < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)  # no half of a piece
            if not self._warned:
                warnings.warn(
                    f"{self.path} cannot be written ({error.strerror}); tried again later", stacklevel=3
                )
            self._warned = True
        else:
            self._size += written
            self._waiting, self._warned = b"", False

    def sync(self) -> None:
        with contextlib.suppress(OSError):  # `add` says what is wrong with a disk
            os.fsync(self._file)

    def close(self) -> None:
        """Warns of what was never written."""
        if self._waiting:
            self.add("")
        if self._waiting:
            lost = self._waiting.count(b"\n")
            warnings.warn(
                f"{self.path} lacks the last {lost} lines, which could not be written", stacklevel=3
            )
        os.close(self._file)
