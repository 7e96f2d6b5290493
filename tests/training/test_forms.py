"""By what layers are computed is state of a run: recorded, and replayed wherever the run goes on or is repeated."""

import json
import shutil
from unittest import mock

import pytest
import torch
from command import records, run, weights
from inductor import fresh_inductor, needs_compiler

from twolevel.ops import autotune, dispatch, normalise_dispatch
from twolevel.ops.autotune import Decision, Form

SAMPLE = "train --model wrn-10-1 --conv gc2l --groups 4 --data sample --batch-size 32 --log-steps 1".split()


def measured_by(order: str):
    """A measurement that finds the first or the last of the candidates the fastest, whatever it is."""

    def measure(problem, able, runs):
        assert problem.device.type == "cpu"
        ranked = able if order == "first" else able[::-1]
        return {form: 1.0 + index for index, form in enumerate(ranked)}

    return measure


def trained(order: str, cache: str, *argv):
    """A run on a machine of its own: another cache, on which other forms are fastest."""
    import os

    from command import command

    os.environ["XDG_CACHE_HOME"] = cache
    forget()
    names = ("measure", "SMALL_MACS", "SMALL_VALUES")
    before = [getattr(autotune, name) for name in names]
    autotune.measure, autotune.SMALL_MACS, autotune.SMALL_VALUES = measured_by(order), 0.0, 0
    try:
        return command(*argv)
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(autotune, name, value)
        forget()


def forget() -> None:
    autotune.measurements.cache_clear()
    dispatch._plans.clear()
    normalise_dispatch._chosen.clear()


def train_on(pool, tmp_path, order: str, *argv, ranks: int = 1) -> list:
    outcomes = pool.run(trained, order, str(tmp_path / order), *map(str, argv), ranks=ranks, init=False)
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].err
    return outcomes


def forms_of(output) -> dict[str, str]:
    return json.loads((output / "config.json").read_text())["run"]["forms"]


def of_convolutions(forms: dict[str, str]) -> dict[str, str]:
    return {title: form for title, form in forms.items() if not title.startswith("batch norm")}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_is_repeated_bit_for_bit_where_other_forms_are_faster(pool, tmp_path, ranks):
    first, again, anew = (tmp_path / name for name in ("one", "again", "anew"))
    train_on(pool, tmp_path, "first", *SAMPLE, "--max-steps", 3, "--output", first, ranks=ranks)
    train_on(pool, tmp_path, "last", *SAMPLE, "--max-steps", 3, "--output", anew, ranks=ranks)
    config = ["train", "--config", first / "config.json", "--output", again]
    train_on(pool, tmp_path, "last", *config, ranks=ranks)
    assert forms_of(first) == forms_of(again) != forms_of(anew)
    one, other, new = (weights(pool, output) for output in (first, again, anew))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], new[name]) for name in one)


def counted(*words):
    """As `trained`, and how many exchanges were timed."""
    with mock.patch("twolevel.training.forms._exchange", return_value=1.0) as timed:
        return trained(*words), timed.call_count


@pytest.mark.parametrize(("schedule", "timed"), [("auto", True), ("overlapped", False), ("fused", False)])
def test_an_exchange_is_timed_only_where_the_schedule_is_to_be_chosen(pool, tmp_path, schedule, timed):
    argv = [*SAMPLE, "--schedule", schedule, "--max-steps", 1, "--output", tmp_path / "run"]
    for outcome, exchanges in pool.run(
        counted, "first", str(tmp_path / "cache"), *map(str, argv), ranks=2, init=False
    ):
        assert outcome.code == 0, outcome.err
        assert (exchanges > 0) == timed


def test_a_run_goes_on_with_its_forms_on_a_machine_where_others_are_faster(pool, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "stopped"
    train_on(pool, tmp_path, "first", *SAMPLE, "--max-steps", 4, "--output", whole)
    train_on(pool, tmp_path, "first", *SAMPLE, "--max-steps", 2, "--output", output)
    argv = [*SAMPLE, "--max-steps", 4, "--output", output, "--resume"]
    (outcome,) = train_on(pool, tmp_path, "last", *argv)
    assert "chose kernels" not in outcome.out
    losses = [[r["loss"] for r in records(path, "step")] for path in (whole, output)]
    assert losses[0] == losses[1]
    one, other = weights(pool, whole), weights(pool, output)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_they_are_measured_again_on_request_alone(pool, tmp_path):
    output = tmp_path / "run"
    train_on(pool, tmp_path, "first", *SAMPLE, "--max-steps", 1, "--output", output)
    before = forms_of(output)
    argv = [*SAMPLE, "--max-steps", 2, "--output", output, "--resume", "--remeasure"]
    train_on(pool, tmp_path, "last", *argv)
    assert forms_of(output).keys() == before.keys() and forms_of(output) != before
    settings = json.loads((output / "config.json").read_text())["run"]
    assert "resume" not in settings and "remeasure" not in settings


def test_a_form_that_is_not_possible_here_is_replaced_and_that_is_said(pool, tmp_path):
    output = tmp_path / "run"
    train_on(pool, tmp_path, "first", *SAMPLE, "--max-steps", 1, "--output", output)
    config = json.loads((output / "config.json").read_text())
    title = next(iter(config["run"]["forms"]))
    config["run"]["forms"][title] = "overlapped triton"
    (tmp_path / "edited.json").write_text(json.dumps(config))
    argv = ["train", "--config", tmp_path / "edited.json", "--output", tmp_path / "again"]
    (outcome,) = train_on(pool, tmp_path, "first", *argv)
    assert f"layers of {title} are computed by" in outcome.err
    assert "not by overlapped triton as recorded" in outcome.err
    assert forms_of(tmp_path / "again")[title] != "overlapped triton"


def test_another_form_that_is_asked_for_is_not_called_impossible(pool, tmp_path):
    output = tmp_path / "run"
    train_on(pool, tmp_path, "first", *SAMPLE, "--max-steps", 1, "--output", output)
    argv = [
        "train",
        "--config",
        output / "config.json",
        "--kernels",
        "grouped",
        "--output",
        tmp_path / "asked",
    ]
    (outcome,) = train_on(pool, tmp_path, "first", *argv)
    assert "as recorded" not in outcome.err
    asked, before = forms_of(tmp_path / "asked"), forms_of(output)
    assert all(form.endswith(" grouped") for form in of_convolutions(asked).values())
    assert asked.items() - of_convolutions(asked).items() == before.items() - of_convolutions(before).items()


def test_the_choice_is_one_line_and_its_details_lie_in_the_folder(pool, tmp_path):
    output = tmp_path / "run"
    (outcome,) = train_on(pool, tmp_path, "last", *SAMPLE, "--max-steps", 1, "--output", output)
    lines = [line for line in outcome.out.splitlines() if "kernels" in line or "measured" in line]
    assert len(lines) == 1 and f"chose kernels for {len(forms_of(output))} sizes of layers in" in lines[0]
    why = json.loads((output / "forms.json").read_text())
    assert why.keys() == forms_of(output).keys()
    for title, form in forms_of(output).items():
        assert why[title].startswith(
            f"{form} ("
        )  # the fastest of the measurement below is the one that is taken
        first = why[title].partition("(")[2].partition(" ")[0:1]
        assert first[0] == form.split()[0]


def test_a_form_less_than_the_noise_slower_is_kept_and_that_is_said():
    decision = Decision(Form("fused", "grouped"), {"fused grouped": 1.0, "dense grouped": 0.99}, True)
    assert "fused grouped, less than 3% from the fastest (dense grouped 0.99 ms, fused" in decision.why()


def test_config_json_of_a_run_starts_another_beside_it(pool, tmp_path):
    output = tmp_path / "run"
    argv = [*SAMPLE, "--max-steps", 1, "--output", output]
    run(pool, *argv)
    for number in (2, 3):
        run(pool, "train", "--config", output / "config.json")
        assert (tmp_path / f"run-{number}" / "checkpoints" / "step-00000001").is_dir()
    shutil.copy(output / "config.json", tmp_path / "mine.json")
    (outcome,) = pool.run(
        trained,
        "first",
        str(tmp_path / "cache"),
        "train",
        "--config",
        str(tmp_path / "mine.json"),
        ranks=1,
        init=False,
    )
    assert outcome.code == 2 and "holds a run already" in outcome.err


def assert_all_recorded(forms, norms=3):
    """Of nine convolutions and seven norms of wrn-10-1; layers of one size are computed alike."""
    assert len(of_convolutions(forms)) == 7
    assert len(forms) - len(of_convolutions(forms)) == norms
    assert all(len(form.split()) == 2 for form in forms.values())


@pytest.mark.parametrize(
    "options",
    ["", "--data-parallel 2", "--parallel fsdp", "--parallel gpipe", "--precision bf16"],
)
def test_every_way_to_share_a_network_records_its_forms(pool, tmp_path, options):
    argv = [*SAMPLE, *options.split(), "--max-steps", 1, "--output", tmp_path / "run"]
    train_on(pool, tmp_path, "first", *argv, ranks=2)
    # The stages of a pipeline are graphs, in which norm and ReLU are two operations.
    assert_all_recorded(forms_of(tmp_path / "run"), norms=0 if "gpipe" in options else 3)


def compiled(order: str, cache: str, *argv):
    """As `trained`, and how many kernels were generated."""
    with fresh_inductor(cache) as kernels:
        return trained(order, cache, *argv), kernels()


@needs_compiler
def test_a_compiled_run_records_its_forms_and_learns_the_same(pool, tmp_path):
    outputs = [tmp_path / "eager", tmp_path / "compiled"]
    argv = [*SAMPLE, "--max-steps", 2, "--output"]
    train_on(pool, tmp_path, "first", *argv, outputs[0], ranks=2)
    words = ["first", str(tmp_path / "first"), *map(str, argv), str(outputs[1]), "--compile"]
    for outcome, kernels in pool.run(compiled, *words, ranks=2, timeout=300, init=False):
        assert outcome.code == 0, outcome.err
        assert kernels > 10
    forms = [forms_of(output) for output in outputs]
    assert_all_recorded(forms[1])
    assert forms[0] == forms[1]
    losses = [[r["loss"] for r in records(output, "step")] for output in outputs]
    # float32; the rounding of other code, amplified by a step of batch norm, came to 4e-7.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_choosing_leaves_no_trace_in_the_network(pool, tmp_path):
    """Neither running statistics nor random numbers are touched: an explicit form trains to the same bits."""
    explicit = ["--schedule", "overlapped", "--kernels", "grouped"]
    run(pool, *SAMPLE, *explicit, "--max-steps", 2, "--output", tmp_path / "given")
    config = json.loads((tmp_path / "given" / "config.json").read_text())
    config["model"]["schedule"] = config["model"]["kernels"] = "auto"
    (tmp_path / "auto.json").write_text(json.dumps(config))
    run(pool, "train", "--config", tmp_path / "auto.json", "--output", tmp_path / "auto")
    one, other = weights(pool, tmp_path / "given"), weights(pool, tmp_path / "auto")
    assert all(torch.equal(one[name], other[name]) for name in one)
