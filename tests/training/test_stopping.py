"""A run that is asked to stop leaves a checkpoint, and goes on from it as if it had not been asked."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from command import command, records, run

from twolevel.training import stopping
from twolevel.training.epoch import Epochs
from twolevel.training.stopping import SIGNALS, StopRequest


def await_agreement(stop: StopRequest) -> None:
    """Until the ranks have agreed, which another thread does meanwhile; one rank has nobody to ask."""
    if dist.get_world_size() > 1:
        assert stop.agreed.wait(60)


def asked_to_stop(number: int, place: str, step: int, *argv: str):
    """The command, in which the last rank alone gets a signal: within that training step, or in the test after it."""
    take_step, say = Epochs.step, Epochs.test

    def signalled(self):
        if dist.get_rank() == dist.get_world_size() - 1:
            signal.raise_signal(number)
        await_agreement(self.stop)

    def step_signalled(self, images, labels):
        rate = take_step(self, images, labels)
        if self.state.step + 1 == step:
            signalled(self)
        return rate

    def test_signalled(self):
        if self.state.step == step:
            signalled(self)
        return say(self)

    before = [signal.getsignal(each) for each in SIGNALS]
    setattr(Epochs, place, {"step": step_signalled, "test": test_signalled}[place])
    try:
        outcome = command(*argv)
    finally:
        Epochs.step, Epochs.test = take_step, say
    assert [signal.getsignal(each) for each in SIGNALS] == before
    return outcome


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_asked_to_stop_is_saved_and_goes_on(pool, tiny, tmp_path, ranks, number):
    """It is asked between two records: the sums of the steps since the last one are not lost."""
    options = [*tiny, "--log-steps", "2"]
    whole, output = tmp_path / "whole", tmp_path / "stopped"
    run(pool, "train", *options, "--output", whole, ranks=ranks)
    argv = [str(word) for word in ("train", *options, "--output", output)]
    for outcome in pool.run(asked_to_stop, number, "step", 5, *argv, ranks=ranks, init=False):
        assert outcome.code == 130
    steps = [path.name for path in (output / "checkpoints").iterdir()]
    assert max(steps) == "step-00000005"
    run(pool, "train", *options, "--output", output, "--resume", ranks=ranks)
    assert_same_epochs(whole, output)


def assert_same_epochs(whole, output):
    keys = ("epoch", "step", "train_loss", "train_error", "test_loss", "test_error", "ema_test_loss")
    found = [[[r.get(k) for k in keys] for r in records(path, "epoch")] for path in (whole, output)]
    assert len(found[0]) == 3
    for one, other in zip(*found, strict=True):
        # A sum over the steps of an epoch, in parts that end where one stopped: three numbers added in another order.
        assert one.pop(2) == pytest.approx(other.pop(2), rel=1e-15)
        assert one == other


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_asked_to_stop_in_a_test_makes_up_for_it(pool, tiny, tmp_path, ranks):
    options = [*tiny, "--ema-decay", "0.9", "--conv", "gc2l"]
    whole, output = tmp_path / "whole", tmp_path / "stopped"
    run(pool, "train", *options, "--output", whole, ranks=ranks)
    argv = [str(word) for word in ("train", *options, "--output", output)]
    for outcome in pool.run(asked_to_stop, signal.SIGTERM, "test", 6, *argv, ranks=ranks, init=False):
        assert outcome.code == 130
    assert len(records(output, "epoch")) == 1
    run(pool, "train", *options, "--output", output, "--resume", ranks=ranks)
    assert_same_epochs(whole, output)


def test_a_global_threshold_is_not_taken_twice_where_a_test_is_made_up_for(pool, tiny, tmp_path):
    options = [*tiny, "--conv", "dgc", "--threshold", "global"]
    whole, output = tmp_path / "whole", tmp_path / "stopped"
    run(pool, "train", *options, "--output", whole)
    argv = [str(word) for word in ("train", *options, "--output", output)]
    pool.run(asked_to_stop, signal.SIGTERM, "test", 3, *argv, ranks=1, init=False)
    run(pool, "train", *options, "--output", output, "--resume")
    thresholds = [[r["dgc_threshold"] for r in records(path, "epoch")] for path in (whole, output)]
    assert thresholds[0] == thresholds[1]


def stopped_in_statistics(*argv: str):
    """The command, asked to stop within the second of three batches for batch norm's statistics, and those it saw."""
    from twolevel.training import precise_batch_norm

    see = precise_batch_norm._Population._see

    def seen(self, norm, inputs):
        nonlocal batches
        see(self, norm, inputs)
        batches = max(batches, self.number)
        if self.number == 2 and stopped is not None and stopped.asked_at is None:
            signal.raise_signal(signal.SIGTERM)
            await_agreement(stopped)

    stopped, batches, enter = None, 0, StopRequest.__enter__

    def entered(self):
        nonlocal stopped
        stopped = self
        return enter(self)

    precise_batch_norm._Population._see, StopRequest.__enter__ = seen, entered
    try:
        return command(*argv), batches
    finally:
        precise_batch_norm._Population._see, StopRequest.__enter__ = see, enter


@pytest.mark.parametrize("options", ["", "--ranks 2", "--ranks 2 --parallel fsdp"])
def test_a_run_asked_to_stop_does_not_wait_for_all_of_batch_norms_statistics(pool, tiny, tmp_path, options):
    ranks, words = (2 if "--ranks" in options else 1), options.replace("--ranks 2", "").split()
    options = [*tiny, "--precise-batch-norm", "3", *words]
    whole, output = tmp_path / "whole", tmp_path / "stopped"
    run(pool, "train", *options, "--output", whole, ranks=ranks)
    argv = [str(word) for word in ("train", *options, "--output", output)]
    for outcome, batches in pool.run(stopped_in_statistics, *argv, ranks=ranks, init=False):
        assert outcome.code == 130, outcome.err
        assert batches == 2
    assert records(output, "epoch") == []
    assert (output / "checkpoints" / "step-00000003").is_dir()
    run(pool, "train", *options, "--output", output, "--resume", ranks=ranks)
    assert_same_epochs(whole, output)


def units_begun_by_rank(asked_in: int) -> int:
    """Ranks of which one is a unit ahead; the last is asked. Returns the number of units that this rank began."""
    stopping.INTERVAL = 0.01
    begun = 0
    with StopRequest() as stop:
        for unit in range(1000):
            if stop.due(unit):
                break
            begun += 1
            total = torch.ones(1)
            dist.all_reduce(total)  # as a step does
            if unit == asked_in:
                if dist.get_rank() == dist.get_world_size() - 1:
                    signal.raise_signal(signal.SIGTERM)
                if dist.get_rank() == 0:
                    await_agreement(stop)
    return begun


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_do_the_same_units_wherever_each_hears_of_the_stop(pool, ranks):
    """Others go on while rank 0 sits in its unit; collectives would hang if the ranks did not do the same."""
    begun = pool.run(units_begun_by_rank, 5, ranks=ranks)
    assert len(set(begun)) == 1 and 6 <= begun[0] < 1000


def one_rank_fails() -> str:
    """The last rank fails; the first sees how its own thread, which would ask for ever, comes to an end."""
    stopping.INTERVAL = 0.01
    try:
        with StopRequest() as stop:
            if dist.get_rank() == dist.get_world_size() - 1:
                raise OSError("disk")
            stop._thread.join(60)
            return "ended" if not stop._thread.is_alive() else "still asks"
    except OSError as error:
        return str(error)


def test_a_rank_that_fails_does_not_wait_for_the_others_nor_they_for_it(pool):
    assert pool.run(one_rank_fails, ranks=2) == ["ended", "disk"]


def test_a_fork_does_not_inherit_the_handler():
    """It ends by the signal as if there were none, and says nothing."""
    with StopRequest() as stop:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert stop.asked_at is None


def test_a_keypress_that_arrives_twice_is_one(capsys, monkeypatch):
    monkeypatch.setattr(stopping, "SAME_KEYPRESS", 1000.0)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.due(0)
        monkeypatch.setattr(stopping, "SAME_KEYPRESS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capsys.readouterr().err.count("stopping with a checkpoint") == 1


def test_data_workers_leave_signals_to_their_parent(pool, tiny, tmp_path):
    """A scheduler signals them too; the steps until the checkpoint need their images."""
    (outcome,) = pool.run(
        signalled_with_workers,
        *map(str, ("train", *tiny, "--workers", 2, "--output", tmp_path)),
        ranks=1,
        init=False,
    )
    assert outcome.code == 130, outcome.err
    assert outcome.err.count("SIGTERM") == 1
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()


def signalled_with_workers(*argv: str):
    import multiprocessing

    take_step = Epochs.step

    def signalled(self, images, labels):
        rate = take_step(self, images, labels)
        if self.state.step + 1 == 2:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGTERM)
                os.kill(worker.pid, signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        return rate

    Epochs.step = signalled
    try:
        return command(*argv)
    finally:
        Epochs.step = take_step
