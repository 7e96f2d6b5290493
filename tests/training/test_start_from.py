"""`train --start-from`: a run begins with trained weights, the same ones on any number of ranks."""

import shutil

import pytest
import torch
from command import FIXED, command, losses, run, weights

from twolevel import models
from twolevel.nn import initialize, transfer

# Sums over ranks are added in another order; rounding errors of 1e-16, amplified by batch norm over three steps.
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def dense(pool, tiny, tmp_path_factory):
    """A trained network of standard convolutions."""
    output = tmp_path_factory.mktemp("dense") / "run"
    run(pool, "train", *tiny, "--conv", "sc", "--groups", 1, "--epochs", 1, "--output", output)
    return output


def started(pool, tiny, dense, output, ranks, *more):
    words = ["train", *tiny, *FIXED, "--start-from", dense, "--output", output, "--max-steps", 3, *more]
    first, *_ = run(pool, *words, ranks=ranks)
    return first.out


def test_the_first_steps_are_alike_on_every_number_of_ranks(pool, tiny, dense, tmp_path):
    for ranks in (1, 2, 4):
        said = started(pool, tiny, dense, tmp_path / str(ranks), ranks)
        assert f"started from {dense}: " in said and "convolutions by nearest weights, relative error" in said
    for ranks in (2, 4):
        torch.testing.assert_close(
            losses(tmp_path / str(ranks)), losses(tmp_path / "1"), rtol=TOLERANCE, atol=TOLERANCE
        )
    run(pool, "train", *tiny, *FIXED, "--output", tmp_path / "anew", "--max-steps", 3)
    assert losses(tmp_path / "anew")[0] != losses(tmp_path / "1")[0]


def test_the_weights_before_the_first_step_are_those_of_the_transfer(pool, tiny, dense, tmp_path):
    """With a learning rate so small that a step leaves float32's digits as they are."""
    started(pool, tiny, dense, tmp_path / "run", 2, "--learning-rate", 1e-12)
    options = {"name": "wrn-10-1", "num_classes": 3}
    old = models.create(**options, conv="sc", groups=1).double()
    old.load_state_dict(weights(pool, dense))
    new = initialize(models.create(**options, conv="gc2l", groups=4), 0).double()
    transfer(new, old)
    found = weights(pool, tmp_path / "run")
    for name, parameter in new.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("way", ["fsdp", "channel", "gpipe"])
def test_a_dense_network_starts_however_ranks_share_it(pool, tiny, dense, tmp_path, way):
    words = ["train", *tiny, "--conv", "sc", "--groups", 1, "--start-from", dense, "--max-steps", 1]
    more = ["--sync-batch-norm"] if way == "fsdp" else []
    run(pool, *words, "--output", tmp_path / "one")
    run(pool, *words, "--parallel", way, *more, "--output", tmp_path / "two", ranks=2)
    # Of one part of a batch, batch norm has other statistics: the loss of a step is not the same.
    tolerance = 1 if way == "gpipe" else TOLERANCE
    torch.testing.assert_close(
        losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=tolerance, atol=tolerance
    )


def test_a_run_that_goes_on_has_its_own_weights(pool, tiny, dense, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(dense, gone)
    words = ["train", *tiny, *FIXED, "--start-from", gone]
    run(pool, *words, "--output", tmp_path / "whole")
    run(pool, *words, "--output", tmp_path / "parts", "--max-steps", 4)
    shutil.rmtree(gone)
    (one,) = run(pool, *words, "--output", tmp_path / "parts", "--resume")
    assert "from step 4" in one.out and "started from" not in one.out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_an_exported_file_of_other_classes_gives_all_but_the_classifier(pool, tiny, tmp_path):
    sample = "--model wrn-10-1 --conv gc --groups 4 --data sample --max-steps 1".split()
    run(pool, "train", *sample, "--output", tmp_path / "ten")
    run(pool, "export", tmp_path / "ten", tmp_path / "ten.safetensors")
    said = started(pool, tiny, tmp_path / "ten.safetensors", tmp_path / "three", 1)
    assert "classifier.weight, classifier.bias drawn anew, for other classes" in said


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--start-from", "nowhere"], "nowhere does not exist; give a run's folder"),
        (["--conv", "shuffle", "--data-parallel", 2], "known for gc, gc2l, bgc, not for a ShuffleConv2d"),
        (["--model", "wrn-10-2"], "takes 16 channels to 32, in the trained network 16 to 16"),
    ],
)
def test_what_cannot_be_started_from_is_one_line_and_leaves_nothing(pool, tiny, dense, tmp_path, words, what):
    output = tmp_path / "run"
    argv = ["train", *tiny, "--start-from", dense, *words, "--output", output]
    for outcome in pool.run(command, *argv, ranks=2, init=False):
        assert outcome.code == 2 and len(outcome.err.splitlines()) <= 1, outcome.err
        if outcome.err:
            assert what in outcome.err
    assert not (output / "config.json").exists()


def test_a_dry_run_says_what_it_would_start_from(pool, tiny, dense, tmp_path):
    (one,) = run(pool, "train", *tiny, "--dry-run", "--start-from", dense, "--output", tmp_path / "run")
    assert f"a new run, from the weights of {dense}/checkpoints/step-" in one.out
    words = ["train", *tiny, "--dry-run", "--start-from", tmp_path, "--output", tmp_path / "run"]
    assert command(*words).code == 2
