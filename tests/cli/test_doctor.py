"""`twolevel doctor`: what it says of a machine, a run to come and a run that was, and with which status it ends."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from command import command, run, seal, write_image_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from twolevel.training import output as training_output
from twolevel.training.doctor import examine, folder, links

SMALL = ["--model", "wrn-10-1", "--groups", "4", "--data", "sample"]


def no_machine(*argv: object):
    """A command that finds nothing to say of the machine, which may be any."""
    with mock.patch.object(sys.modules[examine.__module__], "_of_machine", lambda *_: []):
        return command(*argv)


def found(outcome) -> dict[str, dict]:
    """The findings of a command with --json, by what they are of."""
    return {each["what"]: each for each in json.loads(outcome.out)}


def levels(outcome) -> dict[str, str]:
    return {what: each["level"] for what, each in found(outcome).items()}


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


# ---- a machine, and a run to come


def test_without_options_it_looks_at_the_machine_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command("doctor", "--json")
    assert {"torch", "ranks", "threads", "open files", "memory limit"} <= levels(done).keys()
    assert not {"data", "room", "folder", "latency"} & levels(done).keys()
    assert done.code == int({*levels(done).values()} != {"ok"})
    assert [*tmp_path.iterdir()] == []


def test_what_is_wrong_is_a_line_with_advice_and_status_1(monkeypatch, tmp_path):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 100))
    done = command("doctor")
    (line,) = (line for line in done.out.splitlines() if " open files " in line)
    assert line.startswith("warning ") and "100 for each process" in line and "; run ulimit -n 1024" in line
    assert done.code == 1 and done.out.splitlines()[-1].endswith(("warning", "warnings"))


def test_a_run_to_come_leaves_no_trace(tmp_path):
    done = no_machine("doctor", *SMALL, "--output", tmp_path / "runs" / "new", "--json")
    assert done.code == 0, done.out
    assert [*levels(done)] == ["data", "room", "files", "folder", "renames", "locks", "writing"]
    assert [*tmp_path.iterdir()] == []


def test_the_last_line_says_that_nothing_is_wrong(tmp_path):
    assert no_machine("doctor", *SMALL, "--output", tmp_path).out.endswith("\n\nnothing is wrong\n")


def test_data_that_is_missing(tmp_path):
    argv = ["doctor", *SMALL[:-1], "cifar10", "--data-root", tmp_path, "--output", tmp_path / "run", "--json"]
    done = no_machine(*argv)
    assert done.code == 1 and "cifar-10-batches-py" in found(done)["data"]["finding"]
    assert "--download" in found(done)["data"]["advice"] and levels(done)["folder"] == "ok"


def test_the_settings_of_a_run_are_taken_from_its_config(tmp_path):
    root = write_image_folder(tmp_path / "images")
    settings = [*SMALL[:-1], "imagenet", "--data-root", root, "--image-size", 16, "--batch-size", 8]
    settings += ["--workers", 0]
    assert command("train", *settings, "--max-steps", 1, "--output", tmp_path / "run").code == 0
    config = tmp_path / "run" / "config.json"
    beside = no_machine("doctor", "--config", config, "--json")
    assert beside.code == 0 and "run-2" in found(beside)["folder"]["finding"]
    again = no_machine("doctor", "--config", config, "--resume", "--json")
    assert again.code == 0 and "from step-00000001" in found(again)["resume"]["finding"]
    assert not (tmp_path / "run-2").exists()


def test_a_folder_that_holds_a_run_already(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = no_machine("doctor", *SMALL, "--output", tmp_path, "--json")
    assert done.code == 1 and "holds a run already" in found(done)["folder"]["finding"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    done = no_machine("doctor", *SMALL, "--output", tmp_path / "file" / "run", "--json")
    assert done.code == 1 and "cannot be written" in found(done)["folder"]["finding"]


@pytest.mark.parametrize(
    ("function", "result", "what", "level", "words"),
    [
        ("write_seconds", 1e6, "writing", "warning", "MB/s to the disk"),
        ("lock", "No locks available", "locks", "warning", "cannot be locked (No locks available)"),
        ("appears", False, "renames", "problem", "do not see what rank 0 has renamed"),
    ],
)
def test_a_folder_on_a_poor_file_system(tmp_path, monkeypatch, function, result, what, level, words):
    monkeypatch.setattr(folder, function, lambda *_: result)
    done = no_machine("doctor", *SMALL, "--output", tmp_path / "run", "--json")
    assert done.code == 1 and found(done)[what]["level"] == level
    assert words in found(done)[what]["finding"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--groups 6", "groups=6 does not divide in_channels=16"),
        ("--data cifar11", "twolevel doctor: unknown data set 'cifar11'"),
        ("--device cuda", "device=cuda"),
        ("--lerning-rate 1", "did you mean --learning-rate?"),
        ("nowhere", "nowhere is not there; give a run's folder"),
        (".", ". holds no run; give a run's folder"),
        (". --groups 4", ". is a run of its own, and --groups is of one to be started"),
    ],
)
def test_input_that_is_invalid(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    done = command("doctor", *words.split())
    assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1
    assert [*tmp_path.iterdir()] == []


# ---- ranks


def test_rank_0_speaks_and_all_end_alike(pool, tmp_path):
    first, second = pool.run(
        command, "doctor", *SMALL, "--output", tmp_path / "run", "--json", ranks=2, init=False
    )
    assert second.out == "" and first.code == second.code
    named = {"latency", "bandwidth", "pairs of ranks", "speed of a rank", "clocks", "folder", "locks"}
    assert named <= levels(first).keys()
    assert {levels(first)[what] for what in ("clocks", "data", "room", "folder", "renames", "locks")} == {
        "ok"
    }
    assert "rank 0 of 2" in found(first)["ranks"]["finding"]
    assert [*tmp_path.iterdir()] == []


def with_a_clock_ahead(*argv: object):
    import time

    ahead = 5.0 * int(os.environ["RANK"])
    with mock.patch.object(links, "now", lambda: time.time() + ahead):
        return command(*argv)


def test_a_clock_that_is_off_on_one_rank_ends_all_with_status_1(pool):
    outcomes = pool.run(with_a_clock_ahead, "doctor", "--json", ranks=2, init=False)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert "+5.0 s beside rank 0" in found(outcomes[0])["clocks"]["finding"]


def in_a_folder_of_its_own(root: str, *argv: object):
    os.chdir(Path(root, os.environ["RANK"]))
    with mock.patch.object(training_output, "APPEARS_SECONDS", 0.2):  # no network between these folders
        return no_machine(*argv)


def test_ranks_that_do_not_share_the_folder(pool, tmp_path):
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    argv = ["doctor", *SMALL, "--output", "run", "--json"]
    outcomes = pool.run(in_a_folder_of_its_own, str(tmp_path), *argv, ranks=2, init=False)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    problem = found(outcomes[0])["folder"]
    assert "rank 1: " in problem["finding"] and "is not the folder that rank 0 writes" in problem["finding"]
    assert "an absolute --output" in problem["advice"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def where_locks_do_not_hold(*argv: object):
    with mock.patch.object(folder, "lock", lambda path, held: path.touch()):
        return no_machine(*argv)


def test_locks_that_do_not_hold_between_ranks(pool, tmp_path):
    argv = ["doctor", *SMALL, "--output", tmp_path, "--json"]
    first, _ = pool.run(where_locks_do_not_hold, *argv, ranks=2, init=False)
    assert first.code == 1 and "ranks 1 could too" in found(first)["locks"]["finding"]


# ---- a run that was


@pytest.fixture(scope="module")
def trained(pool, tmp_path_factory) -> Path:
    """A run of two ranks with checkpoints of steps 2 and 3, and an exported file beside it."""
    root = tmp_path_factory.mktemp("trained")
    argv = ["train", *SMALL, "--max-steps", 3, "--checkpoint-steps", 1, "--output", root / "run"]
    run(pool, *argv, ranks=2)
    assert command("export", root / "run", root / "run.safetensors").code == 0
    return root


@pytest.fixture
def past(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def newest(past: Path) -> Path:
    return past / "checkpoints" / "step-00000003"


def test_a_run_as_it_should_be(past):
    before = contents(past)
    done = command("doctor", past, "--json")
    assert done.code == 0, done.out
    about = found(done)
    assert [*about][:4] == ["in use", "step-00000002", "step-00000003", "resume"]
    assert "step 3, not tested, 4 files of" in about["step-00000003"]["finding"]
    assert "goes on from step-00000003" in about["resume"]["finding"]
    assert {"leftovers", "metrics.jsonl", "config.json", "room", "files"} <= about.keys()
    assert contents(past) == before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit of a shard": lambda path: flip(min(path.glob("*.safetensors"))),
    "a shard": lambda path: min(path.glob("*.safetensors")).unlink(),
    "the checksums": lambda path: (path / "SHA256SUMS").unlink(),
    "the state": lambda path: (path / "state.json").write_text("{"),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named(pool, past, damage, ranks):
    damage(newest(past))
    before = contents(past)
    outcomes = pool.run(command, "doctor", past, "--json", ranks=ranks, init=False)
    assert [outcome.code for outcome in outcomes] == [1] * ranks
    about = found(outcomes[0])
    assert about["step-00000003"]["level"] == "problem" and "is damaged" in about["step-00000003"]["finding"]
    assert about["step-00000002"]["level"] == "ok"
    assert "goes on from step-00000002" in about["resume"]["finding"]
    assert contents(past) == before
    assert command("doctor", newest(past)).code == 1


def test_a_run_without_a_good_checkpoint(past):
    for path in (past / "checkpoints").iterdir():
        flip(path / "state.json")
    assert found(command("doctor", past, "--json"))["resume"]["level"] == "problem"
    shutil.rmtree(past / "checkpoints")
    assert found(command("doctor", past, "--json"))["resume"]["level"] == "warning"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (".step-00000004.unfinished", "leftovers"),
        (".step-00000003.replaced", "leftovers"),
        ("step-00000001.damaged", "set aside"),
    ],
)
def test_what_a_crash_left_is_named_and_stays(past, name, what):
    (past / "checkpoints" / name).mkdir()
    done = command("doctor", past, "--json")
    assert done.code == 1 and name in found(done)[what]["finding"]
    assert (past / "checkpoints" / name).is_dir()


def test_a_run_that_goes_on_now(past):
    script = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX)"
    script += "; print('held', flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", script, past / ".lock"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "held\n"
        (past / "checkpoints" / ".step-00000004.unfinished").mkdir()
        done = command("doctor", past, "--json")
        owner.stdin.close()
    assert done.code == 0 and found(done)["in use"]["finding"] == "a run holds the folder now"


def test_records_that_are_damaged(past):
    with (past / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st\n[]\n')
    done = command("doctor", past, "--json")
    assert done.code == 1 and found(done)["metrics.jsonl"]["finding"].startswith("2 of ")
    (past / "metrics.jsonl").unlink()
    assert levels(command("doctor", past, "--json"))["metrics.jsonl"] == "problem"


@pytest.mark.parametrize("text", ["{", '{"model": {"modle": 1}}', "[]"])
def test_settings_that_cannot_be_read(past, text):
    (past / "config.json").write_text(text)
    done = command("doctor", past, "--json")
    assert done.code == 1 and levels(done)["config.json"] == "problem"


def test_a_single_checkpoint(past):
    done = command("doctor", newest(past))
    assert done.code == 0 and done.out.startswith("ok       step-00000003  step 3, not tested")
    state = json.loads((newest(past) / "state.json").read_text())
    (newest(past) / "state.json").write_text(json.dumps(state | {"test_error": 12.345}))
    seal(newest(past))
    assert "test error 12.35 %" in command("doctor", newest(past)).out


def test_an_exported_file(past):
    path = past.with_suffix(".safetensors")
    done = command("doctor", path, "--json")
    assert done.code == 0 and "all finite" in found(done)["file"]["finding"]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, path, metadata=metadata)
    done = command("doctor", path, "--json")
    assert done.code == 1 and f"not finite, {name} among them" in found(done)["file"]["finding"]
    path.write_bytes(path.read_bytes()[:100])
    assert command("doctor", path).code == 1
