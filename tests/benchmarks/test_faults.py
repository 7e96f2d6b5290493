"""Trials of faults: what they find out about a run by its files, how they are counted, and one for real."""

import json

import pytest

from benchmarks.faults import chain, command, cost, processes, trial
from twolevel.errors import UserError


def write(run, *records: dict) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(
    ("records", "saving", "place"),
    [
        ([], False, "start-up"),
        ([{"kind": "step", "step": 3}], False, "step"),
        ([{"kind": "step", "step": 3}], True, "save"),
        ([{"kind": "step", "step": 5}], False, "evaluation"),
        ([{"kind": "step", "step": 5}, {"kind": "epoch", "step": 5}], False, "step"),
    ],
)
def test_where_a_run_is_is_seen_by_its_files(tmp_path, records, saving, place):
    if records:
        write(tmp_path, *records)
    if saving:
        (tmp_path / "checkpoints" / ".step-00000004.unfinished").mkdir(parents=True)
    assert processes.place(tmp_path, 5) == place


def test_trials_are_counted_and_those_that_struck_nobody_are_not():
    good = {"kind": "kill", "struck": True, "finished": True, "bit_equal": True, "records_whole": True}
    lines = [
        good | {"place": "step", "to_next_step_s": 5.0},
        good | {"place": "save", "bit_equal": False, "to_next_step_s": 7.0},
        good | {"place": "step", "struck": False},
        good | {"kind": "stop", "place": "step", "named": True, "in_time": False, "named_after_s": 9.0},
    ]
    found = command.counts(lines)
    assert found["kill"] == {
        "trials": 2,
        "finished": 2,
        "bit_equal": 1,
        "records_whole": 2,
        "places": {"save": 1, "step": 1},
        "median_to_next_step_s": 6.0,
    }
    assert (found["stop"]["named"], found["stop"]["in_time"], found["stop"]["median_named_after_s"]) == (
        1,
        0,
        9,
    )
    assert "kill" in command.table(lines)
    with pytest.raises(UserError, match="no trial has been made yet"):
        command.table([])


def test_a_new_folder_goes_on_from_the_results(tmp_path):
    output, lines = tmp_path / "faults.json", tmp_path / "new" / "trials.jsonl"
    command.go_on(lines, output)
    assert not lines.exists()
    output.write_text(json.dumps({"trials": [{"kind": "kill", "trial": 0}, {"kind": "stop", "trial": 3}]}))
    command.go_on(lines, output)
    assert [line["trial"] for line in command.read(lines)] == [0, 3]
    output.write_text(json.dumps({"trials": []}))
    command.go_on(lines, output)  # its own are the newer ones
    assert len(command.read(lines)) == 2


def test_losses_of_changed_ranks_are_compared_step_by_step(tmp_path):
    assert chain.difference([2.0, 1.0, 0.5], [2.0, 1.25, 0.5]) == 0.25
    assert chain.difference([2.0, 1.0], [2.0, 1.0, 0.5]) == float("inf")
    found = {
        "ranks": (2, 1),
        "ended_after_step": [1, 3],
        "losses": [2.0, 1.0],
        "undisturbed": [2.0, 1.0, 0.5],
    }
    assert chain.draw([found | {"largest_difference": float("inf")}], tmp_path / "chains.png").stat().st_size


def test_the_cost_of_a_checkpoint_is_that_of_windows_with_and_without(monkeypatch):
    for name, small in {"WINDOW": 1, "PAIRS": 2, "NETWORK": {"model": "wrn-10-1", "groups": 4}}.items():
        monkeypatch.setattr(cost, name, small)
    found = cost.measure()
    assert len(found["windows_without_s"]) == len(found["windows_with_s"]) == 2
    assert found["saver_cpu_s"] > 0 and found["fingerprint_s"] > 0
    assert "fingerprint" in command.cost_table(found)


def test_a_kind_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match="unknown kind 'kil'; did you mean kill"):
        command.main(["--kinds", "kil", "--folder", str(tmp_path)])


def test_a_stopped_rank_is_named_and_the_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    """A trial for real, of two ranks: the second of the phases, a step."""
    monkeypatch.setattr(trial, "SILENCE_S", 3.0)
    kind = trial.Kind("SIGSTOP of one of 2 ranks", 2, fault="stop")
    found = trial.disturb(kind, 1, tmp_path / "trial", trial.undisturbed(kind, tmp_path / "reference"))
    assert found["struck"] and found["named"] and found["finished"], found
    assert found["bit_equal"] and found["records_whole"], found
    assert f"no sign of rank {found['rank']} " in found["line"] and "this rank waits in " in found["line"]
