"""What a user would pick instead of two-level convolution trains by the same command, with the same checkpoints."""

import json

import pytest
import torch
from command import command, records, run
from safetensors.torch import load_file

# Sums over ranks are added in another order; rounding errors of 1e-16, amplified by batch norm over six steps.
TOLERANCE = 1e-10

DENSE = ["--conv", "sc", "--groups", 1, "--epochs", 2]
STATEFUL = "--lr-schedule cosine --warmup-epochs 0.5 --clip-norm 5 --label-smoothing 0.1".split()
AVERAGE = ["--ema-decay", 0.9]

# Options, and the number of parts in which a single process takes a batch to see the same statistics.
WAYS = {
    "channel": (AVERAGE, 1),
    "fsdp": (["--sync-batch-norm"], 1),
    "naive": (AVERAGE, 1),
    "gpipe": ([*AVERAGE, "--microbatches", 4], 4),
    "1f1b": (AVERAGE, 2),
}


@pytest.fixture(scope="module")
def alone(pool, tiny, tmp_path_factory):
    """Runs of a single process, by the parts of a batch."""
    root, done = tmp_path_factory.mktemp("alone"), {}

    def of(parts):
        if parts not in done:
            done[parts] = root / str(parts)
            options = [*tiny, *DENSE, *STATEFUL, *AVERAGE, "--accumulate", parts]
            run(pool, "train", *options, "--output", done[parts])
        return done[parts]

    return of


def losses(output):
    return [(r["step"], r["loss"], r["error"]) for r in records(output, "step")]


def epoch_losses(output, prefix=""):
    return [r[f"{prefix}test_loss"] for r in records(output, "epoch")]


def weights(pool, output, which="model"):
    file = output.parent / f"{output.name}-{which}.safetensors"
    if not file.exists():
        run(pool, "export", output, file, "--weights", which)
    return file


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_learn_what_one_process_learns_stop_and_go_on(pool, tiny, alone, tmp_path, way):
    options, parts = WAYS[way]
    argv = ["train", *tiny, *DENSE, *STATEFUL, "--parallel", way, *options]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(pool, *argv, "--output", whole, ranks=2)
    run(pool, *argv, "--output", stopped, "--max-steps", 4, ranks=2)
    first, second = run(pool, *argv, "--output", stopped, "--resume", ranks=2)
    assert "from step 4" in first.out and second.out == ""
    assert len(losses(whole)) == 6

    # As if it had not been interrupted, to the last bit.
    assert losses(stopped) == losses(whole)
    assert epoch_losses(stopped) == epoch_losses(whole)
    files = [weights(pool, output) for output in (whole, stopped)]
    torch.testing.assert_close(*map(load_file, files), rtol=0, atol=0)

    # As one process.
    reference = alone(parts)
    close = {"rtol": TOLERANCE, "atol": TOLERANCE}
    torch.testing.assert_close(losses(whole), losses(reference), **close)
    torch.testing.assert_close(epoch_losses(whole), epoch_losses(reference), **close)
    torch.testing.assert_close(load_file(files[0]), load_file(weights(pool, reference)), **close)
    if "--ema-decay" in options:
        torch.testing.assert_close(epoch_losses(whole, "ema_"), epoch_losses(reference, "ema_"), **close)
        averages = [load_file(weights(pool, output, "ema")) for output in (whole, reference)]
        torch.testing.assert_close(*averages, **close)

    # Its checkpoint and its export are tested by one process and by ranks that share the network the same way.
    expected = f"error {records(whole, 'epoch')[-1]['test_error']:.2f} %"
    root = tiny[tiny.index("--data-root") + 1]
    for source in (whole, files[0]):
        test = ["evaluate", source, "--data-root", root, "--workers", 0, "--precision", "float64"]
        (one,) = run(pool, *test)
        first, second = run(pool, *test, "--parallel", way, ranks=2)
        assert expected in one.out and first.out == one.out and second.out == ""


def test_a_run_goes_on_with_another_way_to_share_the_network(pool, tiny, alone, tmp_path):
    argv = ["train", *tiny, *DENSE, *STATEFUL, "--output", tmp_path / "run"]
    run(pool, *argv, "--parallel", "fsdp", "--sync-batch-norm", "--max-steps", 1, ranks=4)
    for step, ranks, way in ((2, 4, "channel"), (4, 2, "naive"), (5, 1, "group")):
        run(pool, *argv, "--resume", "--parallel", way, "--max-steps", step, ranks=ranks)
    run(pool, *argv, "--resume", "--parallel", "fsdp", "--sync-batch-norm", ranks=2)
    torch.testing.assert_close(losses(tmp_path / "run"), losses(alone(1)), rtol=TOLERANCE, atol=TOLERANCE)
    assert [r["ranks"] for r in states(tmp_path / "run")][-2:] == [1, 2]


def states(output):
    return [json.loads(p.read_text()) for p in sorted(output.glob("checkpoints/*/state.json"))]


@pytest.mark.parametrize("way", WAYS)
def test_four_ranks_take_steps_in_bf16(pool, tiny, tmp_path, way):
    options = ["--precision", "bf16", "--parallel", way, "--max-steps", 2]
    run(pool, "train", *tiny, *DENSE, *options, "--output", tmp_path / "run", ranks=4)
    assert len(losses(tmp_path / "run")) == 2


REFUSED = [
    ("--parallel channel --conv gc2l", "parallel=channel takes conv=sc or gc, not conv=gc2l"),
    ("--parallel fsdp --conv dgc", "parallel=fsdp takes conv=sc or gc or gc2l or bgc, not conv=dgc"),
    (
        "--parallel 1f1b --conv dgconv",
        "parallel=1f1b takes conv=sc or gc or gc2l or bgc or shuffle, not conv=dgconv",
    ),
    ("--parallel fsdp --conv sc --ema-decay 0.9", "ema_decay=0.9 is invalid with parallel=fsdp"),
    ("--parallel fsdp --conv sc --group-parallel 2", "group_parallel=2 is invalid with parallel=fsdp"),
    (
        "--parallel fsdp --conv sc --data-parallel 4",
        "mesh data=4 x group=1 takes 4 ranks, but 2 were started",
    ),
    ("--parallel gpipe --conv sc --data-parallel 2", "data_parallel=2 is invalid with parallel=gpipe"),
    ("--parallel naive --conv sc --microbatches 2", "microbatches=2 are of parallel=gpipe and 1f1b"),
    ("--parallel gpipe --conv sc --microbatches 0", "microbatches=0 is invalid; use 1 or more"),
    ("--parallel 1f1b --conv sc --microbatches 1", "microbatches=1 is fewer than the 2 stages"),
    (
        "--parallel gpipe --conv sc --microbatches 3",
        "batch_size=128 does not divide by microbatches=3 x accumulate=1",
    ),
    (
        "--parallel fsdp --conv sc --batch-size 129",
        "batch_size=129 does not divide over 2 data-parallel ranks",
    ),
    (
        "--parallel fsdp --conv sc --batch-size 6 --accumulate 2",
        "batch_size=6 does not divide by data_parallel=2 x accumulate=2; use a multiple of 4",
    ),
    ("--parallel channel --conv sc --model condensenet-50", "cat"),
    ("--parallel pipe --conv sc", "invalid choice 'pipe'"),
    ("--recompute blocks --conv dgc", "recompute=blocks is invalid with conv=dgc, whose forward changes"),
    (
        "--recompute blocks --conv sc --parallel fsdp",
        "recompute=blocks is invalid with parallel=fsdp; it is for",
    ),
    ("--recompute blocks --compile", "recompute=blocks is invalid with --compile; leave one of them out"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_combined_is_one_line_on_every_rank(pool, tmp_path, options, message):
    argv = ["train", "--model", "wrn-10-1", "--max-steps", 1, "--output", tmp_path / "run", *options.split()]
    outcomes = pool.run(command, *argv, ranks=2, init=False)
    for outcome in outcomes:
        assert outcome.code == 2
        (line,) = [line for line in outcome.err.splitlines() if "warning:" not in line]
        assert message in line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_settings_without_effect_are_warned_of(pool, tiny, tmp_path):
    options = ["--parallel", "naive", "--exchange", "group", "--sync-batch-norm", "--max-steps", 1]
    first, _ = run(pool, "train", *tiny, *DENSE, *options, "--output", tmp_path / "run", ranks=2)
    for text in ("exchange=group is ignored: parallel=naive", "sync_batch_norm=True is ignored"):
        assert text in first.err
