"""A job goes on with a run that it has begun itself, and with no other."""

import dataclasses

import pytest
import torch

from twolevel.training.job import Job

CPU = torch.device("cpu")


def job(monkeypatch: pytest.MonkeyPatch, **changes) -> Job:
    """The job of this process, whose parent counts as torchrun."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    return dataclasses.replace(Job.of(CPU), **changes)


def test_other_processes_of_the_same_torchrun_go_on(monkeypatch, tmp_path):
    began = job(monkeypatch, process="an earlier one")
    assert not began.goes_on_in(tmp_path)
    began.record(tmp_path)
    assert job(monkeypatch).goes_on_in(tmp_path)
    assert not job(monkeypatch, agents=["another"]).goes_on_in(tmp_path)
    # Machines came and went: one of the first is still there.
    assert job(monkeypatch, agents=["another", *began.agents]).goes_on_in(tmp_path)


def test_a_process_that_trains_twice_is_not_started_again(monkeypatch, tmp_path):
    job(monkeypatch).record(tmp_path)
    assert not job(monkeypatch).goes_on_in(tmp_path)


def test_ranks_that_were_refused_a_folder_and_started_again_are_refused_it_again(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (tmp_path / "config.json").write_text("{}")  # another run's
    assert not job(monkeypatch).goes_on_in(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"process": 1, "agents": 2}', '{"agents": []}'])
def test_a_record_that_says_nothing_is_none(monkeypatch, tmp_path, text):
    (tmp_path / ".job").write_text(text)
    assert not job(monkeypatch).goes_on_in(tmp_path)


def test_without_torchrun_nothing_is_recorded(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    alone = Job.of(CPU)
    alone.record(tmp_path)
    assert not [*tmp_path.iterdir()] and not alone.goes_on_in(tmp_path)
