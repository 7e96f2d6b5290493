"""Files that hold other things than they should: one line, whatever a program could trip over."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from command import Outcome, command, result_line, seal

from twolevel.analysis.planner import presets
from twolevel.training import checkpoint

TRAIN = ["train", "--model", "wrn-10-1", "--groups", "2", "--batch-size", "16", "--max-steps", "1"]
NO_DATA = ["--data", "cifar10", "--data-root", "nowhere"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    assert command(*TRAIN, "--output", output).code == 0
    return output


@pytest.fixture
def copy(trained, tmp_path, monkeypatch) -> Path:
    """The checkpoint of a copy of a run, beside which is the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "run")
    return next((tmp_path / "run" / "checkpoints").iterdir())


def refused(outcome: Outcome) -> str:
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state["config"]["run"].update(forms=[]), "forms=[] is invalid"),
        (
            lambda state: state["config"]["run"].update(forms={"a layer": "x"}),
            "forms: 'x' for layers of a layer",
        ),
        (lambda state: state["config"]["optimiser"].update(accumulate="x"), "accumulate='x' is invalid"),
        (lambda state: state["config"].update(rules="x"), "lacks rules"),
        (lambda state: state.update(untested={"kind": "epoch"}), "untested={'kind': 'epoch'} is invalid"),
        (lambda state: state.update(epoch_seconds="x"), "epoch_seconds='x' is invalid"),
    ],
)
def test_a_state_of_other_types_is_refused_on_resume(copy, change, says):
    state = json.loads((copy / "state.json").read_text())
    change(state)
    (copy / "state.json").write_text(json.dumps(state))
    seal(copy)
    assert says in refused(command(*TRAIN, "--output", "run", "--resume"))


@pytest.mark.parametrize("classes", [2**70, 2**40])
def test_a_network_for_which_there_is_no_memory_is_refused_before_it_is_made(copy, classes):
    state = json.loads((copy / "state.json").read_text()) | {"num_classes": classes}
    (copy / "state.json").write_text(json.dumps(state))
    seal(copy)
    line = refused(command("export", "run", "out.safetensors"))
    assert "does not describe a network" in line or "is of another network" in line
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize("offsets", ["x", [{}, "y"], 3])
def test_a_shard_whose_header_has_no_offsets_is_damaged(copy, offsets):
    shard = next(copy.glob("*.safetensors"))
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    (key,) = [name for name, text in header["__metadata__"].items() if text.startswith("{")]
    sharding = {one: {"saved_offsets": offsets} for one in json.loads(header["__metadata__"][key])}
    header["__metadata__"][key] = json.dumps(sharding)
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    seal(copy)
    assert "is damaged" in refused(command("export", "run", "out.safetensors"))


def test_an_older_checkpoint_of_other_types_stops_no_run(copy):
    older = copy.with_name("step-00000000")
    shutil.copytree(copy, older)
    state = json.loads((older / "state.json").read_text()) | {"test_error": "x", "epoch": {}}
    (older / "state.json").write_text(json.dumps(state))
    checkpoint.Retention(newest=1, epochs=1).prune(copy.parent, 1)
    assert [*checkpoint.complete(copy.parent)] == [1]


def test_brackets_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("deep.json").write_text("[" * 100_000)
    Path("deep.toml").write_text("runs = " + "[" * 100_000)
    assert "'deep.json' cannot be read" in refused(command("train", "--config", "deep.json"))
    assert "deep.toml is no TOML" in refused(command("grid", "deep.toml", "--list"))
    assert "deep.json' cannot be read" in refused(command("plan", "--machine", "deep.json"))


@pytest.mark.parametrize("option", ["--model", "--conv"])
@pytest.mark.parametrize("name", ["../../up", "/tmp/x", "a/b", ""])
def test_no_name_leads_out_of_the_folder_of_runs(tmp_path, monkeypatch, option, name):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert f"{option[2:]}={name} is invalid; use a name" in refused(command("train", *NO_DATA, option, name))
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "b"]


def test_what_a_message_quotes_does_not_break_its_line():
    assert refused(command("plan", "--output", "a\rb\nc")).endswith(
        "output=a b c is of calibrate; leave it out, or add --calibrate"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory", "x"),
        ("bandwidth", 0),
        ("flops", {"float32": -1}),
        ("ranks_per_node", 0.5),
        ("dense", {"float32": [[]]}),
    ],
)
def test_a_machine_of_which_no_plan_can_be_made_is_refused(tmp_path, name, value):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(asdict(presets.machine("titan-rtx")) | {name: value}))
    line = refused(command("plan", "--model", "wrn-10-1", "--ranks", "2", "--machine", path))
    assert "cannot be read" in line and str(path) in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seconds", "x"),
        ("final", {"test_error": {}}),
        ("machine", None),
        ("completed", {}),
        ("curve", {"a": 1}),
    ],
)
def test_a_line_of_results_of_other_types_is_named(tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(result_line()) + "\n")
    assert command("report", path).code == 0
    path.write_text(json.dumps(result_line() | {name: value}) + "\n")
    assert "line 1 is not that of a finished run" in refused(command("report", path))
