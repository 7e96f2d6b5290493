"""A file is replaced whole or not at all; what a disk does not take is added later."""

import errno
import os
from unittest import mock

import pytest

from twolevel import durable


def test_a_file_that_cannot_be_written_leaves_the_old_one_alone(tmp_path):
    path = tmp_path / "config.json"
    durable.write_text(path, "old")
    with pytest.raises(KeyError), durable.replacing(path) as made:
        made.write_text("half of the n")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["config.json"]


def test_a_replaced_file_has_the_mode_of_a_new_one(tmp_path):
    (tmp_path / "plain").touch()
    durable.write_text(tmp_path / "made", "text")
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("taken", [None, 3])
def test_lines_for_which_there_is_no_room_are_added_later(tmp_path, taken):
    """The disk takes nothing of the second line and the third, or their first three bytes."""
    file = durable.Appended(tmp_path / "lines", "head\n")
    file.add("one\n")
    write = os.write

    def full(handle, data):
        if taken is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data[:taken])

    with mock.patch("os.write", full):
        with pytest.warns(
            UserWarning, match=r"lines cannot be written \(No space left on device\)"
        ) as warned:
            file.add("two\n")
            file.add("three\n")
        assert len(warned) == 1
        assert (tmp_path / "lines").read_text() == "head\none\n"
    file.add("four\n")
    file.close()
    assert (tmp_path / "lines").read_text() == "head\none\ntwo\nthree\nfour\n"


def test_lines_that_were_never_written_are_counted_in_the_end(tmp_path):
    file = durable.Appended(tmp_path / "lines")
    with mock.patch("os.write", side_effect=OSError(errno.EDQUOT, "Disk quota exceeded")):
        with pytest.warns(UserWarning, match="Disk quota exceeded"):
            file.add("one\n")
        file.add("two\n")
        with pytest.warns(UserWarning, match="lacks the last 2 lines"):
            file.close()
