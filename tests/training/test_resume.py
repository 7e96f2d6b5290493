"""A run that is interrupted goes on as if it had not been, on any number of ranks."""

import json

import pytest
import torch
from command import records, run, weights
from safetensors.torch import load_file

# Everything that has a state: momentum, moving average, a schedule that changes every step, a warm-up.
STATEFUL = (
    "--lr-schedule cosine --warmup-epochs 0.5 --ema-decay 0.9 --clip-norm 5 --label-smoothing 0.1".split()
)

# Sums over ranks are added in another order; twenty rounding errors of 1e-16, amplified by batch norm.
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def uninterrupted(pool, tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(pool, "train", *tiny, *STATEFUL, "--output", output, ranks=4)
    return output


def losses(output) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["learning_rate"]) for r in records(output, "step")]


def epochs_of(output) -> list[tuple[float, float, float, float]]:
    keys = ("train_loss", "train_error", "test_loss", "ema_test_loss")
    return [tuple(r[k] for k in keys) for r in records(output, "epoch")]


@pytest.mark.parametrize("ranks", [4, 2, 1])
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on(pool, tiny, uninterrupted, tmp_path, ranks):
    output = tmp_path / "stopped"
    argv = ["train", *tiny, *STATEFUL, "--output", output]
    run(pool, *argv, "--max-steps", 4, ranks=4)
    state = json.loads((output / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert (state["step"], state["epoch"], state["position"], state["ranks"]) == (4, 1, 1, 4)

    first = run(pool, *argv, "--resume", ranks=ranks)[0]
    assert "from step 4" in first.out

    assert len(losses(output)) == 9
    if ranks == 4:
        assert losses(output) == losses(uninterrupted)
        assert epochs_of(output) == epochs_of(uninterrupted)
    else:
        torch.testing.assert_close(losses(output), losses(uninterrupted), rtol=TOLERANCE, atol=0)
        torch.testing.assert_close(epochs_of(output), epochs_of(uninterrupted), rtol=TOLERANCE, atol=1e-9)
    for which in ("model", "ema"):
        tolerance = {"rtol": 0, "atol": 0} if ranks == 4 else {"rtol": TOLERANCE, "atol": TOLERANCE}
        expected = (
            weights(pool, uninterrupted, which)
            if ranks == 4
            else load_file(uninterrupted.parent / f"whole-{which}.safetensors")
        )
        torch.testing.assert_close(weights(pool, output, which), expected, **tolerance)


def test_replicas_of_parts_learn_what_one_process_learns(pool, tiny, uninterrupted, tmp_path):
    mesh = "--data-parallel 2 --group-parallel 2 --sync-batch-norm".split()
    run(pool, "train", *tiny, *STATEFUL, *mesh, "--output", tmp_path / "mesh", ranks=4)
    torch.testing.assert_close(losses(tmp_path / "mesh"), losses(uninterrupted), rtol=TOLERANCE, atol=0)


def test_a_resumed_run_does_not_repeat_its_records(pool, tiny, tmp_path):
    output = tmp_path / "run"
    argv = ["train", *tiny, "--output", output, "--checkpoint-steps", 2]
    run(pool, *argv, "--max-steps", 5)
    (output / "checkpoints" / "step-00000005" / "state.json").unlink()  # as if it had died while writing
    run(pool, *argv, "--resume", "--max-steps", 5)
    assert [r["step"] for r in records(output, "step")] == [1, 2, 3, 4, 5]


def test_only_the_newest_checkpoints_are_kept(pool, tiny, tmp_path):
    output = tmp_path / "run"
    run(
        pool,
        "train",
        *tiny,
        "--output",
        output,
        "--checkpoint-steps",
        1,
        "--keep-checkpoints",
        3,
        "--no-keep-best",
    )
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == [
        "step-00000007",
        "step-00000008",
        "step-00000009",
    ]


def test_resume_without_a_checkpoint_says_that_it_starts_anew(pool, tiny, tmp_path):
    (outcome,) = run(pool, "train", *tiny, "--output", tmp_path / "new", "--resume", "--max-steps", 1)
    assert "nothing to resume" in outcome.err


def test_a_changed_setting_is_named_when_a_run_goes_on(pool, tiny, tmp_path):
    argv = ["train", *tiny, "--output", tmp_path / "run"]
    run(pool, *argv, "--max-steps", 1)
    (outcome,) = run(pool, *argv, "--resume", "--learning-rate", 0.05, "--max-steps", 2)
    assert "resumed with learning_rate=0.05; it was 0.1 before" in outcome.err


@pytest.mark.parametrize(
    ("before", "after", "images"),
    [
        ("", "--data-parallel 2", (8, 4)),
        ("--accumulate 2", "", (4, 8)),
        ("--conv sc", "--conv sc --parallel fsdp", (8, 4)),
        ("--conv sc", "--conv sc --parallel gpipe --microbatches 4", (8, 2)),
        ("", "--data-parallel 2 --sync-batch-norm", None),
        ("--data-parallel 2 --sync-batch-norm", "--group-parallel 2", None),
        ("--data-parallel 2", "--accumulate 2", None),
        ("--conv sc --data-parallel 2", "--conv sc --parallel fsdp", None),
    ],
)
def test_a_run_that_goes_on_says_where_batch_norm_sees_other_images(
    pool, tiny, tmp_path, before, after, images
):
    argv = ["train", *tiny, "--groups", 1 if "sc" in before else 4, "--output", tmp_path / "run"]
    run(pool, *argv, *before.split(), "--max-steps", 1, ranks=2 if "parallel" in before else 1)
    parallel = "parallel" in after
    outcome = run(pool, *argv, *after.split(), "--resume", "--max-steps", 2, ranks=2 if parallel else 1)[0]
    said = "resumed with batch norm over {1} images at a time; it was {0} before"
    assert ("resumed with batch norm" in outcome.err) is (images is not None)
    assert images is None or said.format(*images) in outcome.err


def test_a_complete_run_says_so(pool, tiny, tmp_path):
    argv = ["train", *tiny, "--output", tmp_path / "run", "--epochs", 1]
    run(pool, *argv)
    (outcome,) = run(pool, *argv, "--resume")
    assert "is complete: 1 epochs; raise --epochs to go on" in outcome.out


@pytest.mark.parametrize(
    ("conv", "ends"),
    [
        (["--conv", "dgc", "--threshold", "global"], ("progress", ".threshold")),
        (["--conv", "lgc"], (".kept",)),
    ],
    ids=["dgc", "lgc"],
)
def test_the_average_keeps_the_choices_of_its_network(pool, tiny, tmp_path, conv, ends):
    run(pool, "train", *tiny, *conv, "--ema-decay", 0.99, "--output", tmp_path / "run")
    kept = [weights(pool, tmp_path / "run", which) for which in ("model", "ema")]
    names = [n for n in kept[0] if n.endswith(ends)]
    assert names
    assert all(torch.equal(kept[0][n], kept[1][n]) for n in names)
