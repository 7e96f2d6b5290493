"""A run that is asked to stop leaves a checkpoint, and goes on from it as if it had not been asked."""

import signal

import pytest
import torch.distributed as dist
from command import command, records, run

from twolevel.training.loop import Trainer


def asked_to_stop(number, step, *argv):
    """The command, in which the last rank alone gets a signal in that step."""
    take_step = Trainer._step

    def signalled(self, images, labels):
        rate = take_step(self, images, labels)
        if self.state.step + 1 == step and dist.get_rank() == dist.get_world_size() - 1:
            signal.raise_signal(number)
        return rate

    before = signal.getsignal(number)
    Trainer._step = signalled
    try:
        outcome = command(*argv)
    finally:
        Trainer._step = take_step
    assert signal.getsignal(number) is before
    return outcome


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_asked_to_stop_is_saved_and_goes_on(pool, tiny, tmp_path, ranks, number):
    whole, output = tmp_path / "whole", tmp_path / "stopped"
    run(pool, "train", *tiny, "--output", whole, ranks=ranks)
    options = [str(word) for word in ("train", *tiny, "--output", output)]
    for outcome in pool.run(asked_to_stop, number, 4, *options, ranks=ranks, init=False):
        assert outcome.code == 130 and "go" in outcome.err and "--resume" in outcome.err
    assert sorted(path.name for path in (output / "checkpoints").iterdir())[-1] == "step-00000004"
    run(pool, "train", *tiny, "--output", output, "--resume", ranks=ranks)
    losses = [[r["loss"] for r in records(path, "step")] for path in (whole, output)]
    assert losses[0] == losses[1] and len(losses[0]) == 9
