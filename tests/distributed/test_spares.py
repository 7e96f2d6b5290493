"""Ranks beyond the mesh: who works, how the others wait, and how all meet in a store that others have used."""

import os
import signal
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore

from twolevel.distributed import meeting, spares
from twolevel.distributed.environment import start, stop
from twolevel.distributed.meeting import meet
from twolevel.distributed.spares import Spares, wait_for_the_end
from twolevel.errors import SpareEnded, Stopped, UserError
from twolevel.launchers import Ranks


def work_or_wait(workers: int, times: int = 1) -> list:
    """Size, local size and sum of rank + 1 of each world; None where this rank was a spare."""
    found = []
    for _ in range(times):
        try:
            world = start("cpu", 30, lambda came: workers)
        except SpareEnded:
            found.append(None)
            continue
        total = torch.tensor([world.rank + 1])
        dist.all_reduce(total)
        found.append((world.size, world.local_size, total.item(), world.spares and world.spares.number))
        stop(world)
    return found


@pytest.mark.parametrize("ranks, workers", [(2, 1), (3, 2), (4, 4)])
def test_the_first_ranks_work_and_the_others_wait_for_their_end(pool, ranks, workers):
    found = pool.run(work_or_wait, workers, ranks=ranks, init=False)
    number = ranks - workers or None
    total = workers * (workers + 1) // 2
    assert found[0] == [(workers, workers, total, number)]
    assert found[1:] == [[(workers, workers, total, None)]] * (workers - 1) + [[None]] * (ranks - workers)


def disagreeing() -> str:
    with pytest.raises(UserError) as caught:
        start("cpu", 30, lambda came: 3 if os.environ["RANK"] == "0" else 2)
    return str(caught.value)


def test_ranks_whose_settings_leave_different_numbers_to_work_are_refused(pool):
    for said in pool.run(disagreeing, ranks=3, init=False):
        assert said == (
            "ranks were started with different settings: by those of rank 1 2 of 3 ranks work, by those of rank 0 3; "
            "start every rank with the same arguments"
        )


def refused() -> str:
    def workers(came: int) -> int:
        raise UserError(f"{came} ranks have no mesh")

    with pytest.raises(UserError) as caught:
        start("cpu", 30, workers)
    return str(caught.value)


def test_a_number_that_cannot_work_is_an_error_on_all(pool):
    assert set(pool.run(refused, ranks=2, init=False)) == {"2 ranks have no mesh"}


def left_out_of_an_existing_group() -> str:
    with pytest.raises(UserError) as caught:
        start("cpu", 30, lambda came: came - 1)
    return str(caught.value)


def test_a_group_that_exists_leaves_no_rank_out(pool):
    for said in pool.run(left_out_of_an_existing_group, ranks=2):
        assert said.startswith("1 of 2 ranks can work, and a process group of all 2 exists")


def met(store: HashStore, number: int, monkeypatch: pytest.MonkeyPatch) -> list:
    """The reports that each of so many ranks reads, which are threads and meet in this store."""
    monkeypatch.setattr(meeting, "_store", lambda ranks, timeout: store)
    found: list = [None] * number

    def rank(index: int) -> None:
        ranks = Ranks(index, number, index, number, "torchrun")
        _, reports = meet(ranks, {"rank": index, "of": number, "error": None}, timedelta(seconds=30))
        found[index] = [(report["rank"], report["of"]) for report in reports]

    threads = [threading.Thread(target=rank, args=(index,)) for index in reversed(range(number))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_ranks_meet_in_a_store_that_other_numbers_of_ranks_have_used_and_some_have_left(monkeypatch):
    store = HashStore()
    for number in (3, 2, 4):
        assert met(store, number, monkeypatch) == [[(rank, number) for rank in range(number)]] * number
        # A rank of a round that never came about: killed before the others were there.
        store.set("hello 1", "of a process that is gone")


def test_the_first_rank_names_those_that_did_not_come(monkeypatch):
    monkeypatch.setattr(meeting, "_store", lambda ranks, timeout: HashStore())
    with pytest.raises(TimeoutError, match="ranks 1, 2 did not come"):
        meet(Ranks(0, 3, 0, 3, "torchrun"), {"error": None}, timedelta(seconds=0.01))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_spare_that_is_asked_to_stop_leaves_at_once_and_holds_nobody_up(monkeypatch, number):
    store = HashStore()
    before = signal.getsignal(number)
    monkeypatch.setattr(spares.time, "sleep", lambda seconds: signal.raise_signal(number))
    with pytest.raises(Stopped):
        wait_for_the_end(store, 1)
    assert signal.getsignal(number) == before
    Spares(store, 1).release()  # at once: the one spare has left


def test_a_spare_outlasts_the_signal_by_which_a_run_saves_itself(monkeypatch):
    store = HashStore()

    def asked(seconds: float) -> None:
        signal.raise_signal(signal.SIGUSR1)
        store.set(spares.ENDED, "")

    monkeypatch.setattr(spares.time, "sleep", asked)
    with pytest.raises(SpareEnded):
        wait_for_the_end(store, 1)


def test_a_spare_whose_rank_0_is_gone_says_so(monkeypatch):
    timeout = timedelta(seconds=30)
    servers = [TCPStore("127.0.0.1", 0, None, True, timeout, wait_for_workers=False)]
    client = TCPStore("127.0.0.1", servers[0].port, None, False, timeout)
    monkeypatch.setattr(spares.time, "sleep", lambda seconds: servers.clear())
    with pytest.raises(RuntimeError, match="the store of rank 0 was closed by peer"):
        wait_for_the_end(client, 1)
