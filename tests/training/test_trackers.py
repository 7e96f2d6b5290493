"""What shows the records of a run elsewhere is told what `metrics.jsonl` holds, once, and can do the run no harm."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
from command import command, records
from pool import RankPool
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from twolevel.training import metrics, trackers
from twolevel.training.config import RunConfig
from twolevel.training.epoch import Epochs
from twolevel.training.trackers import aside
from twolevel.training.trackers.base import Tracked

Told = list[tuple[int, str, float]]
TAKEN = {"images_per_second", "seconds", "memory_mb", "utilisation", "exchange_exposed"}


class Notebook:
    """Writes down what it is told; "fails at" and "hangs at" are methods that do."""

    name = "trackio"
    rewinds = False
    fails_at, hangs_at = "", ""
    runs: dict[str, Told]
    told: list[str]

    def __init__(self):
        self.released = threading.Event()

    def _at(self, what: str) -> None:
        self.told.append(what)
        if what == self.hangs_at:
            self.released.wait(60)
        if what == self.fails_at:
            raise ConnectionError("the server is gone\nand a long story")

    def begin(self, run: Tracked) -> str:
        self._at("begin")
        assert run.name == "run" and run.settings["model"]["conv"] == "gc2l"
        self.id = run.id or f"id {len(self.runs)}"
        self.runs.setdefault(self.id, [])
        return self.id

    def record(self, step: int, values: dict[str, float]) -> None:
        self._at("record")
        self.runs[self.id] += [(step, name, value) for name, value in values.items()]

    def close(self, *, whole: bool) -> None:
        self._at("close")
        self.told.append("whole" if whole else "broken off")


@pytest.fixture
def notebook(monkeypatch) -> type[Notebook]:
    """The only tracker, in the place of Trackio."""
    fresh = type("Fresh", (Notebook,), {"runs": {}, "told": []})
    monkeypatch.setitem(trackers.TRACKERS, "trackio", fresh)
    return fresh


def expected(output: Path) -> Told:
    """What a tracker is to know of a run."""
    return [
        (record["step"], f"{record['kind']}/{name}", value)
        for record in metrics.read(output)
        for name, value in record.items()
        if isinstance(value, float)
    ]


def kill_at(step: int):
    """Ends a run in the middle of an epoch, without a checkpoint of where it is."""
    own = Epochs.step

    def stepped(self, *batch):
        if self.state.step == step:
            raise KeyboardInterrupt
        return own(self, *batch)

    return mock.patch.object(Epochs, "step", stepped)


def train(tiny, output: Path, *options: object):
    return command("train", *tiny, "--output", output, *options)


def test_a_tracker_is_told_every_number_of_the_records(tiny, tmp_path, notebook):
    assert train(tiny, tmp_path / "run", "--trackers", "trackio").code == 0
    assert notebook.runs == {"id 0": expected(tmp_path / "run")} and len(notebook.runs["id 0"]) > 40
    assert notebook.told[-1] == "whole" and not (tmp_path / "run" / "tensorboard").exists()


def test_a_run_that_goes_on_is_the_same_one_and_no_step_is_in_it_twice(tiny, tmp_path, notebook):
    output = tmp_path / "run"
    for step in (8, 7):  # from the checkpoint after step 6, and killed again before it has come as far
        with kill_at(step):
            assert (
                train(tiny, output, "--trackers", "trackio", *(["--resume"] if step == 7 else [])).code == 130
            )
        assert notebook.told[-1] == "broken off"
    assert train(tiny, output, "--trackers", "trackio", "--resume").code == 0
    told = notebook.runs["id 0"]
    # Of a step that was made again, what it took is that of the first time.
    kept = [
        [row for row in rows if row[1].rpartition("/")[2] not in TAKEN] for rows in (told, expected(output))
    ]
    assert len(notebook.runs) == 1 and kept[0] == kept[1]
    assert len({(step, name) for step, name, _ in told}) == len(told)


def test_a_damaged_note_of_the_tracker_begins_a_new_run_there(tiny, tmp_path, notebook):
    output = tmp_path / "run"
    assert train(tiny, output, "--trackers", "trackio", "--max-steps", 3).code == 0
    for text in ("{", "[]", '{"id": 3, "told": {}}', '{"id": "id 0", "told": {"step": "x"}}'):
        (output / "trackio.json").write_text(text)
        assert train(tiny, output, "--trackers", "trackio", "--resume", "--max-steps", 3).code == 0
    assert [*notebook.runs] == [f"id {number}" for number in range(5)]


def test_it_is_begun_anew_for_another_run(tiny, tmp_path, notebook):
    for place in ("a", "b"):
        assert train(tiny, tmp_path / place / "run", "--trackers", "trackio", "--max-steps", 1).code == 0
    assert len(notebook.runs) == 2


@pytest.mark.parametrize("method", ["begin", "record", "close"])
def test_one_that_fails_is_warned_of_once_and_the_run_goes_on(tiny, tmp_path, notebook, method):
    notebook.fails_at = method
    outcome = train(tiny, tmp_path / "run", "--trackers", "trackio")
    (line,) = outcome.err.splitlines()
    assert (
        line
        == "twolevel: warning: trackio is told no more of this run (the server is gone); metrics.jsonl has all"
    )
    assert outcome.code == 0 and len(records(tmp_path / "run", "step")) == 9
    assert notebook.told.count(method) == 1 or method == "close"


@pytest.mark.parametrize("method", ["begin", "record", "close"])
def test_one_that_does_not_answer_keeps_no_run_waiting(tiny, tmp_path, notebook, method, monkeypatch):
    """It answers after a minute, and a run is to wait for none of it."""
    notebook.hangs_at = method
    monkeypatch.setattr(metrics, "CLOSE_SECONDS", 0.0)
    monkeypatch.setattr(aside, "MOST_WAITING", 5)
    outcome = train(tiny, tmp_path / "run", "--trackers", "trackio")
    (line,) = outcome.err.splitlines()
    assert "it is 5 records behind" in line or "it has not taken all records at the end" in line
    assert outcome.code == 0 and len(records(tmp_path / "run", "step")) == 9


def test_going_back_is_not_shown_twice(tmp_path):
    """As `--on-not-finite back` does."""
    notebook = type("Fresh", (Notebook,), {"runs": {}, "told": []})()
    told = aside.Aside(notebook, tmp_path / "run", {"model": {"conv": "gc2l"}})
    log = metrics.MetricsLog(tmp_path / "run", 0, [told])
    for step in (1, 2, 3):
        log.write({"kind": "step", "step": step, "loss": 1.0})
    log.rewind(1)
    for step in (2, 3, 4):
        log.write({"kind": "step", "step": step, "loss": 2.0})
    log.close()
    assert notebook.runs["id 0"] == [
        (1, "step/loss", 1.0),
        (2, "step/loss", 1.0),
        (3, "step/loss", 1.0),
        (4, "step/loss", 2.0),
    ]
    assert json.loads((tmp_path / "run" / "trackio.json").read_text()) == {"id": "id 0", "told": {"step": 3}}


def test_tensorboard_shows_what_took_the_place_of_steps_made_again(tmp_path):
    board = aside.Aside(trackers.TRACKERS["tensorboard"](), tmp_path, {})
    log = metrics.MetricsLog(tmp_path, 0, [board])
    for step in (1, 2, 3):
        log.write({"kind": "step", "step": step, "loss": 1.0})
    log.rewind(1)
    log.write({"kind": "step", "step": 2, "loss": 2.0})
    log.close()
    again = aside.Aside(trackers.TRACKERS["tensorboard"](), tmp_path, {})
    log = metrics.MetricsLog(tmp_path, 2, [again])
    log.write({"kind": "step", "step": 3, "loss": 3.0})
    log.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("step/loss")
    assert [(each.step, each.value) for each in shown] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_names_are_given_once_or_none_alone():
    assert RunConfig().trackers == ("tensorboard",) and trackers.create(["none"]) == []
    for wrong in (["none", "mlflow"], ["mlflow", "mlflow"]):
        with pytest.raises(ValueError, match=r"trackers=.* is invalid; use each once, or none alone"):
            RunConfig(trackers=tuple(wrong))


def without(name: str, *argv: object):
    with mock.patch.dict(sys.modules, {name: None}):
        return command(*argv)


@pytest.mark.parametrize("name", ["mlflow", "wandb", "trackio"])
def test_a_missing_package_is_one_line_on_every_rank_before_anything_is_written(
    pool: RankPool, tiny, tmp_path, name
):
    argv = ["train", *tiny, "--output", tmp_path / "run", "--trackers", name]
    outcomes = pool.run(without, name, *argv, ranks=2, timeout=90, init=False)
    for outcome in outcomes:
        (line,) = outcome.err.splitlines()
        assert outcome.code == 2 and f"pip install twolevel[{name}], or leave it out of --trackers" in line
    assert not (tmp_path / "run").exists()


def loaded(*argv: object):
    """The packages of trackers that a command imports."""
    for name in ("mlflow", "tensorboard"):
        for module in [m for m in sys.modules if m.partition(".")[0] == name]:
            del sys.modules[module]
    assert command(*argv).code == 0
    return [name for name in ("mlflow", "tensorboard", "wandb", "trackio") if name in sys.modules]


def test_what_is_not_asked_for_is_not_imported(pool: RankPool, tiny, tmp_path):
    argv = ["train", *tiny, "--output", tmp_path / "run", "--trackers", "none", "--max-steps", 1]
    assert pool.run(loaded, *argv, ranks=2, timeout=90, init=False) == [[], []]


# ---- the services themselves, none over a network


def test_mlflow_shows_a_run_that_goes_on_as_one(tiny, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    output = tmp_path / "run"
    with kill_at(8):
        assert train(tiny, output, "--trackers", "mlflow").code == 130
    client = mlflow.MlflowClient()
    id = json.loads((output / "mlflow.json").read_text())["id"]
    assert client.get_run(id).info.status == "KILLED"
    outcome = train(tiny, output, "--trackers", "mlflow", "--resume")
    assert (outcome.code, outcome.err) == (0, "")
    experiment = client.get_experiment_by_name("twolevel")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status, run.info.run_name) == (id, "FINISHED", "run")
    assert run.data.params["conv"] == "gc2l" and run.data.params["epochs"] == "3"
    losses = [(m.step, m.value) for m in client.get_metric_history(id, "step/loss")]
    assert losses == [(r["step"], r["loss"]) for r in records(output, "step")]
    assert run.data.metrics["epoch/test_error"] == records(output, "epoch")[-1]["test_error"]


def test_a_server_of_mlflow_that_is_gone_is_warned_of(tiny, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    outcome = train(tiny, tmp_path / "run", "--trackers", "mlflow")
    (line,) = outcome.err.splitlines()
    assert (
        outcome.code == 0
        and "warning: mlflow is told no more of this run (API request to http://127.0.0.1:9" in line
    )


def in_a_process(tiny, output: Path, *options: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """For packages that read their environment once."""
    argv = [sys.executable, "-m", "twolevel", "train", *tiny, "--output", output, *options]
    environ = (
        {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        | {"OMP_NUM_THREADS": "1"}
        | environ
    )
    return subprocess.run([*map(str, argv)], env=environ, capture_output=True, text=True, timeout=120)


def test_wandb_takes_a_run_that_goes_on_offline_under_one_id(tiny, tmp_path):
    pytest.importorskip("wandb")
    output = tmp_path / "run"
    for options in (["--max-steps", 2], ["--resume", "--max-steps", 4]):
        done = in_a_process(tiny, output, "--trackers", "wandb", *options, WANDB_MODE="offline")
        assert (done.returncode, done.stderr) == (0, "")
    id = json.loads((output / "wandb.json").read_text())["id"]
    parts = [*(output / "wandb").glob(f"offline-run-*-{id}/run-{id}.wandb")]
    assert len(parts) == 2 and all(b"step/loss" in part.read_bytes() for part in parts)


def test_wandb_without_a_key_is_one_line(tiny, tmp_path):
    pytest.importorskip("wandb")
    done = in_a_process(
        tiny, tmp_path / "run", "--trackers", "wandb", HOME=str(tmp_path), NETRC=str(tmp_path / "none")
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "trackers=wandb needs WANDB_API_KEY or WANDB_MODE=offline" in line
    assert not (tmp_path / "run").exists()


def test_trackio_shows_a_run_that_goes_on_as_one(tiny, tmp_path):
    pytest.importorskip("trackio")
    output, environ = tmp_path / "run", {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    for options in (["--max-steps", 2], ["--resume", "--max-steps", 4]):
        done = in_a_process(tiny, output, "--trackers", "trackio", *options, **environ)
        assert (done.returncode, done.stderr) == (0, "")
    name = json.loads((output / "trackio.json").read_text())["id"]
    read = "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as s"
    read += f"; print(json.dumps([s.get_runs('twolevel'), s.get_logs('twolevel', {name!r})]))"
    done = subprocess.run(
        [sys.executable, "-c", read], env=os.environ | environ, capture_output=True, text=True, check=True
    )
    runs, logs = json.loads(done.stdout)
    assert runs == [name] and name.startswith("run-")
    assert [(log["step"], log["step/loss"]) for log in logs if "step/loss" in log] == [
        (record["step"], record["loss"]) for record in records(output, "step")
    ]
