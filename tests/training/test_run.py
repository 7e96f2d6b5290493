"""What a run does with its settings, and what it leaves behind."""

import csv
import json
import shlex

import pytest
import torch
from command import records, run
from torch.nn import functional as F

import twolevel.models
from twolevel.training.config import TrainConfig


def test_a_run_leaves_records_curve_and_checkpoint(pool, tiny, tmp_path):
    output = tmp_path / "run"
    (outcome,) = run(pool, "train", *tiny, "--output", output)
    assert "epoch 3/3" in outcome.out and "twolevel evaluate" in outcome.out
    assert [r["step"] for r in records(output, "step")] == [*range(1, 10)]
    with (output / "epochs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["test_error"]) == records(output, "epoch")[2]["test_error"]
    assert (output / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((output / "tensorboard").iterdir())
    assert (output / "checkpoints" / "step-00000009" / "state.json").exists()


def test_the_name_of_an_output_is_printed_as_it_is(pool, tiny, tmp_path):
    output = (
        tmp_path / "mk[" / "red]:fire:"
    )  # "[/red]" ends a colour that never began, and ":fire:" is an emoji
    (outcome,) = run(pool, "train", *tiny, "--output", output)
    assert f"twolevel evaluate {shlex.quote(str(output))}\n" in outcome.out


def test_its_config_json_reproduces_a_run(pool, tiny, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    odd = ["--learning-rate", "0.03", "--lr-milestones", "1", "2", "--no-augment", "--seed", "5"]
    run(pool, "train", *tiny, *odd, "--output", first)
    run(pool, "train", "--config", first / "config.json", "--output", second)
    losses = [[r["loss"] for r in records(output, "step")] for output in (first, second)]
    assert losses[0] == losses[1]
    settings = [json.loads((output / "config.json").read_text()) for output in (first, second)]
    for config in settings:
        del config["run"]["output"]
    assert settings[0] == settings[1]


def test_the_rate_follows_its_milestones(pool, tiny, tmp_path):
    run(pool, "train", *tiny, "--lr-milestones", 1, 2, "--output", tmp_path / "run")
    rates = [r["learning_rate"] for r in records(tmp_path / "run", "step")]
    assert rates == pytest.approx([0.1] * 3 + [0.01] * 3 + [0.001] * 3, rel=1e-12)


def test_the_export_is_the_network_that_was_tested(pool, tiny, tmp_path):
    output, file = tmp_path / "run", tmp_path / "whole.safetensors"
    run(pool, "train", *tiny, "--output", output, ranks=2)
    run(pool, "export", output, file)
    model = twolevel.models.load(file)
    single = twolevel.models.create("wrn-10-1", conv="gc2l", groups=4, num_classes=3)
    single.load_state_dict(model.state_dict())  # same names and shapes
    assert next(model.parameters()).dtype == torch.float64

    reported = records(output, "epoch")[-1]["test_loss"]
    config = TrainConfig.from_dict(json.loads((output / "config.json").read_text()))
    images, labels = next(
        twolevel.data.load(config.data, seed=0, device="cpu", dtype=torch.float64).test.eval_batches(7)
    )
    with torch.no_grad():
        loss = F.cross_entropy(model.eval()(images), labels).item()
    # Seven images through one forward; the sum over ranks of the logits is the only difference.
    assert loss == pytest.approx(reported, rel=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_evaluate_takes_a_run_a_checkpoint_or_a_file_on_any_ranks(
    pool, tiny, tmp_path_factory, ranks, trained
):
    output, file, root = trained
    printed = set()
    for source in (output, output / "checkpoints" / "step-00000009", file):
        first, *others = run(
            pool,
            "evaluate",
            source,
            "--data-root",
            root,
            "--workers",
            0,
            "--precision",
            "float64",
            ranks=ranks,
        )
        assert all(o.out == "" for o in others)
        printed.add(first.out)
    error = records(output, "epoch")[-1]["test_error"]
    assert len(printed) == 1
    assert f"error {error:.2f} %" in printed.pop()


@pytest.fixture(scope="module")
def trained(pool, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(pool, "train", *tiny, "--output", folder / "run", ranks=4)
    run(pool, "export", folder / "run", folder / "whole.safetensors")
    return folder / "run", folder / "whole.safetensors", tiny[tiny.index("--data-root") + 1]


def test_parts_one_after_the_other_learn_what_replicas_learn(pool, tiny, tmp_path):
    """Batch norm sees half a batch in both, so the losses agree to rounding."""
    run(pool, "train", *tiny, "--accumulate", 2, "--output", tmp_path / "parts")
    replicas = ["--data-parallel", 2, "--group-parallel", 1]
    run(pool, "train", *tiny, *replicas, "--output", tmp_path / "replicas", ranks=2)
    parts, both = ([r["loss"] for r in records(tmp_path / name, "step")] for name in ("parts", "replicas"))
    assert parts == pytest.approx(both, rel=1e-10)


@pytest.mark.parametrize(
    "option",
    [
        ["--precision", "bf16"],
        ["--no-decay-norm"],
        ["--update", "nesterov"],
        ["--update", "muon", "--lr-matrices", "0.02"],
        ["--lr-schedule", "linear", "--warmup-epochs", "0.5"],
        ["--lr-coarse", "0.5"],
        ["--conv", "gc"],
        ["--conv", "bgc"],
        ["--conv", "sc", "--groups", "1"],
    ],
    ids=" ".join,
)
def test_settings_are_carried_out(pool, tiny, tmp_path, option):
    run(pool, "train", *tiny, *option, "--output", tmp_path / "run", "--max-steps", 3)
    run(pool, "train", *tiny, "--output", tmp_path / "plain", "--max-steps", 3)
    got, plain = ([r["loss"] for r in records(tmp_path / name, "step")] for name in ("run", "plain"))
    assert got != plain


def test_real_cifar10_is_learned_from(pool, data_root, tmp_path):
    argv = "--model wrn-10-1 --groups 4 --data cifar10 --batch-size 64 --max-steps 40 --log-steps 10".split()
    run(pool, "train", *argv, "--data-root", data_root, "--output", tmp_path / "run", ranks=2)
    losses = [r["loss"] for r in records(tmp_path / "run", "step")]
    assert losses[-1] < losses[0] - 0.1  # 2.3 is chance; forty steps bring it to about 1.9
