"""Full, read-only and vanished disks, damaged images, a clock that jumps, little shared memory, few open files.

A run carries on, or ends with one line that says what to do; gone on with in better times, it ends as if undisturbed.
"""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
from command import command, write_image_folder

from twolevel.host import usable_cores
from twolevel.training import loop, metrics
from twolevel.training.epoch import Epochs
from twolevel.training.trackers.aside import Aside
from twolevel.training.trackers.tensorboard import TensorBoard

WORKERS = min(2, len(usable_cores()))  # of more than there are cores torch warns


def mount(*words: object) -> None:
    try:
        subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("nothing can be mounted here")


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own, which is made larger or taken away."""
    place = tmp_path / "disk"
    place.mkdir()
    yield place
    while not subprocess.run(["umount", "-l", place], capture_output=True).returncode:
        pass


def weights(run: Path, to: Path) -> bytes:
    assert command("export", run, to).code == 0
    return to.read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert command("train", *tiny, "--output", folder / "run").code == 0
    return weights(folder / "run", folder / "weights.safetensors")


def check_goes_on(tiny: list[str], run: Path, undisturbed: bytes) -> None:
    outcome = command("train", *tiny, "--output", run, "--resume")
    assert outcome.code == 0, outcome.err
    assert weights(run, run / "weights.safetensors") == undisturbed


@contextlib.contextmanager
def before_step(step: int, do):
    """Have something happen while a run trains."""
    own = Epochs.step

    def stepped(self, *batch):
        if self.state.step == step:
            do()
        return own(self, *batch)

    with mock.patch.object(Epochs, "step", stepped):
        yield


def last_line(outcome) -> str:
    """Of a run that has failed: all it says besides is warnings."""
    *others, last = outcome.err.splitlines()
    assert outcome.code == 2 and all("warning:" in line for line in others), outcome.err
    return last


@pytest.mark.parametrize(
    ("kilobytes", "says"),
    [
        (8, "run cannot be written: No space left on device"),  # before the first step
        (76, "step-00000009: OSError: [Errno 28] No space left on device"),  # its records
        (600, "step-00000009: OSError: [Errno 28] No space left on device"),  # its second checkpoint
    ],
)
def test_a_full_disk(tiny, undisturbed, disk, kilobytes, says):
    mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk)
    outcome = command("train", *tiny, "--output", disk / "run")
    assert says in last_line(outcome)
    mount("-o", "remount,size=50m", disk)
    check_goes_on(tiny, disk / "run", undisturbed)


def test_a_disk_without_room_for_the_curve_has_the_network(tiny, undisturbed, disk):
    mount("-t", "tmpfs", "-o", "size=5m", "tmpfs", disk)
    draw = loop.draw_curve

    def fill_and_draw(output):
        with pytest.raises(OSError, match="No space left"), (disk / "filler").open("wb") as filler:
            filler.write(bytes(2**23))
        return draw(output)

    with mock.patch.object(loop, "draw_curve", fill_and_draw):
        outcome = command("train", *tiny, "--output", disk / "run")
    assert outcome.code == 0 and "curve.png is not drawn: No space left on device" in outcome.err
    assert not [*(disk / "run").glob("*curve*")]
    (disk / "filler").unlink()
    check_goes_on(tiny, disk / "run", undisturbed)


def test_a_disk_that_becomes_read_only(tiny, undisturbed, disk, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    mount("--bind", source, disk)

    def fail() -> None:
        subprocess.run(["umount", "-l", disk], check=True)
        mount("--bind", source, disk)
        mount("-o", "remount,bind,ro", disk)

    with before_step(4, fail):
        assert "Read-only file system" in last_line(command("train", *tiny, "--output", disk / "run"))
    again = command("train", *tiny, "--output", disk / "run", "--resume")
    assert last_line(again).endswith("cannot be written: Read-only file system")
    mount("-o", "remount,bind,rw", disk)
    check_goes_on(tiny, disk / "run", undisturbed)


def test_a_disk_that_goes_away_is_not_written_around(tiny, undisturbed, disk, tmp_path):
    """Nothing is written into the folder on which it was mounted."""
    source = tmp_path / "source"
    source.mkdir()
    mount("-t", "tmpfs", "tmpfs", source)
    try:
        mount("--bind", source, disk)
        with before_step(4, lambda: subprocess.run(["umount", "-l", disk], check=True)):
            outcome = command("train", *tiny, "--output", disk / "run")
        assert "run: its file system is gone; mount it again" in last_line(outcome)
        assert not [*disk.iterdir()]
        mount("--bind", source, disk)
        check_goes_on(tiny, disk / "run", undisturbed)
    finally:
        subprocess.run(["umount", "-l", source], check=True)


def test_a_folder_that_is_removed_has_its_next_checkpoints(tiny, undisturbed, tmp_path):
    run = tmp_path / "run"

    def remove() -> None:
        # At once: a checkpoint may be on its way into it.
        gone = run.rename(tmp_path / "gone")
        shutil.rmtree(gone, ignore_errors=True)

    with before_step(4, remove):
        outcome = command("train", *tiny, "--output", run)
    assert outcome.code == 0 and "metrics.jsonl cannot be written (it was removed)" in outcome.err
    assert all("warning:" in line for line in outcome.err.splitlines()), outcome.err
    check_goes_on(tiny, run, undisturbed)


def test_the_thread_of_tensorboard_says_nothing_of_a_disk(tmp_path, capfd):
    board = TensorBoard()
    log = metrics.MetricsLog(tmp_path / "run", 0, [Aside(board, tmp_path / "run", {})])
    begun = threading.Event()
    log.trackers[0]._ask(begun.set)
    assert begun.wait(60)
    shutil.rmtree(tmp_path / "run" / "tensorboard")
    record = {"kind": "step", "step": 1, "loss": 1.0}
    with pytest.warns(UserWarning, match="tensorboard is told no more of this run .No such file"):
        log.write(record)
        log.trackers[0]._ask(board.board.flush)  # its thread ends
        log.write(record)
        log.close()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["truncated", "deleted", "text"])
def test_an_image_that_is_damaged_while_it_is_read(tiny, undisturbed, tmp_path, workers, how):
    root = write_image_folder(tmp_path / "images")
    argv = [*tiny, "--data-root", root, "--workers", workers]
    image = root / "train" / "class1" / "04.png"
    content = image.read_bytes()
    damage = {
        "truncated": lambda: os.truncate(image, 100),
        "deleted": image.unlink,
        "text": lambda: image.write_text("an error page"),
    }
    with before_step(3, damage[how]):
        assert f"{image} is not a readable image" in last_line(
            command("train", *argv, "--output", tmp_path / "run")
        )
    image.write_bytes(content)
    check_goes_on(argv, tmp_path / "run", undisturbed)


def test_a_clock_that_goes_back_and_forth_changes_nothing(tiny, undisturbed, tmp_path):
    jumps = iter([-7200, 3600, -86400] * 100_000)
    with mock.patch.object(time, "time", lambda: time.time_ns() / 1e9 + next(jumps)):
        words = ["--output", tmp_path / "run", "--checkpoint-minutes", "60"]
        outcome = command("train", *tiny, *words)
    assert outcome.code == 0 and not outcome.err
    assert weights(tmp_path / "run", tmp_path / "weights.safetensors") == undisturbed
    assert all(record["seconds"] < 3600 for record in metrics.read(tmp_path / "run", "epoch"))


def in_a_process(*argv: object, prefix: tuple[str, ...] = (), files: int | None = None) -> tuple[int, str]:
    """Status and standard error of a command."""

    def limit() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    words = [*prefix, sys.executable, "-m", "twolevel", *map(str, argv)]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environ, capture_output=True, text=True, preexec_fn=limit, timeout=240)
    return done.returncode, done.stderr


def test_little_shared_memory_is_said_and_does_not_hang(tiny, undisturbed, tmp_path):
    prefix = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=4k tmpfs /dev/shm && exec "$@"', "sh")
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    argv = ["train", *tiny, "--output", tmp_path / "run", "--workers", WORKERS]
    code, err = in_a_process(*argv, prefix=prefix)
    (line,) = err.splitlines()
    assert code == 2 and "shared memory (/dev/shm) is too small" in line and "--shm-size" in line
    check_goes_on(tiny, tmp_path / "run", undisturbed)


@pytest.mark.parametrize("files", [64, 28, 21])
def test_few_open_files_are_enough_or_said(tiny, undisturbed, tmp_path, files):
    code, err = in_a_process("train", *tiny, "--output", tmp_path / "run", "--workers", WORKERS, files=files)
    assert (code, err) == (0, "") or (code == 2 and len(err.splitlines()) == 1), err
    check_goes_on(tiny, tmp_path / "run", undisturbed)
