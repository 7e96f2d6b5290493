"""The pool itself: right values from healthy ranks, a clear failure from the others, no leftovers."""

import contextlib
import importlib
import multiprocessing
import os
import re
import signal
import sys
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from pool import RankFailure, RankPool


def add_up() -> tuple[int, int, torch.Tensor]:
    total = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total


def process() -> int:
    return os.getpid()


def echo(*args, **kwargs) -> tuple[tuple, dict]:
    return args, kwargs


def fail_on_one_while_others_wait() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the culprit")
    dist.barrier()


def fail_on_all() -> None:
    raise ArithmeticError("on every rank")


def fail_on_one_while_others_are_deaf() -> None:
    if dist.get_rank() == 0:
        raise KeyError("the culprit")
    wait_for_nobody()


def wait_for_nobody() -> None:
    threading.Event().wait()


def hang_on_one() -> None:
    if dist.get_rank() == 1:
        wait_for_nobody()


def exit_on_one_while_others_wait(code: int) -> None:
    if dist.get_rank() == 1:
        os._exit(code)
    dist.barrier()


def fall_to_signal_on_one_while_others_wait(number: int) -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), number)
    dist.barrier()


def leave_by_sys_exit() -> None:
    raise SystemExit(0)


def wait_for_one_that_has_returned() -> str:
    if dist.get_rank() == 0:
        return "returned"
    try:
        dist.irecv(torch.zeros(1), src=0).wait(timedelta(seconds=0.5))
    except RuntimeError as error:
        return str(error)
    return "received"


def torchrun_variables() -> dict[str, str]:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    return {name: os.environ[name] for name in names}


def make_group_and_add_up() -> tuple[int, int, torch.Tensor]:
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    return add_up()


def make_group_and_fail() -> None:
    dist.init_process_group("gloo")
    raise KeyError("the culprit")


def state() -> tuple:
    return (
        dict(os.environ),
        os.getcwd(),
        list(sys.argv),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.rand(2).tolist(),
    )


def change_state(then_fail: bool) -> None:
    os.environ["RANK"] = "7"
    os.environ["LEFT_BEHIND"] = "yes"
    del os.environ["OMP_NUM_THREADS"]
    os.chdir("/")
    sys.argv.append("--left-behind")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    torch.rand(1)
    if then_fail:
        raise KeyError("the culprit")


def corner_of_a_large_tensor() -> torch.Tensor:
    large = torch.arange(1_000_000.0, requires_grad=True) * 1
    return large[5:8]


def assert_works(pool: RankPool, ranks: int) -> None:
    results = pool.run(add_up, ranks=ranks)
    assert [rank for rank, _, _ in results] == list(range(ranks))
    assert {size for _, size, _ in results} == {ranks}
    assert {total.item() for _, _, total in results} == {ranks * (ranks + 1) // 2}


@pytest.mark.parametrize("ranks", [4, 2, 1])
def test_values_come_back_by_rank(pool, ranks):
    assert_works(pool, ranks)


def test_processes_are_kept_from_run_to_run(pool):
    assert pool.run(process, ranks=2) == pool.run(process, ranks=4)[:2]


def test_arguments_reach_the_body(pool):
    (args, kwargs), _ = pool.run(echo, 1, torch.tensor([2.0]), three=3, ranks=2)
    assert args == (1, torch.tensor([2.0]))
    assert kwargs == {"three": 3}


def test_ranks_see_what_torchrun_would_set(pool):
    first, second = pool.run(torchrun_variables, ranks=2)
    assert second["RANK"] == second["LOCAL_RANK"] == "1"
    assert second["WORLD_SIZE"] == second["LOCAL_WORLD_SIZE"] == "2"
    assert second["MASTER_ADDR"] == "127.0.0.1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]


def test_ranks_see_the_environment_and_directory_of_the_test(pool, monkeypatch, tmp_path):
    monkeypatch.setenv("SET_BY_THE_TEST", "yes")
    monkeypatch.chdir(tmp_path)
    environ, cwd, *_ = pool.run(state, ranks=1)[0]
    assert environ["SET_BY_THE_TEST"] == "yes"
    assert cwd == str(tmp_path)


def test_body_may_come_from_a_folder_that_is_added_later(pool, monkeypatch, tmp_path):
    pool.run(process, ranks=1)
    (tmp_path / "added_later.py").write_text("def body():\n    return __name__\n")
    monkeypatch.syspath_prepend(tmp_path)
    body = importlib.import_module("added_later").body
    assert pool.run(body, ranks=1) == ["added_later"]


def test_group_lives_until_every_rank_has_returned(pool):
    _, message = pool.run(wait_for_one_that_has_returned, ranks=2)
    assert "closed by peer" not in message
    assert "timed out" in message.lower()


def test_returned_tensor_is_a_leaf_with_only_its_own_elements(pool):
    (corner,) = pool.run(corner_of_a_large_tensor, ranks=1)
    assert corner.tolist() == [5.0, 6.0, 7.0]
    assert corner.is_leaf
    assert corner.untyped_storage().nbytes() == 3 * 4


def test_body_may_make_the_group_itself(pool):
    for _ in range(2):
        totals = [total.item() for _, _, total in pool.run(make_group_and_add_up, init=False)]
        assert totals == [10, 10, 10, 10]
    with pytest.raises(RankFailure, match="the culprit"):
        pool.run(make_group_and_fail, init=False, ranks=2)
    assert_works(pool, 2)


@pytest.mark.parametrize("then_fail", [False, True])
def test_process_is_restored_after_the_body(pool, then_fail):
    before = pool.run(state, ranks=1)[0]
    with pytest.raises(RankFailure) if then_fail else contextlib.nullcontext():
        pool.run(change_state, then_fail, ranks=1)
    after = pool.run(state, ranks=1)[0]
    before[0].pop("MASTER_PORT")
    after[0].pop("MASTER_PORT")
    assert after == before


def test_failing_rank_shows_its_traceback_while_others_wait(pool):
    processes = pool.run(process)
    with pytest.raises(RankFailure) as caught:
        pool.run(fail_on_one_while_others_wait)
    message = str(caught.value)
    assert message.startswith("test_pool.fail_on_one_while_others_wait failed on rank 1 of 4\n")
    assert 'raise KeyError("the culprit")' in message
    assert message.count("Traceback") == 1, "ranks that only lost their peer have no traceback"
    assert {int(rank) for rank in re.findall(r"^rank (\d)", message, re.M)} == {0, 1, 2, 3}
    assert pool.run(process)[1] == processes[1], "a rank that raises is kept"
    assert_works(pool, 4)


def test_same_failure_on_every_rank_is_shown_once(pool):
    with pytest.raises(RankFailure) as caught:
        pool.run(fail_on_all)
    assert str(caught.value).count("Traceback") == 1
    assert str(caught.value).count("the same") == 3


def test_busy_rank_is_ended_after_the_grace(pool, monkeypatch):
    monkeypatch.setattr(pool, "grace", 0.3)
    processes = pool.run(process, ranks=2)
    with pytest.raises(RankFailure, match="failed on rank 0") as caught:
        pool.run(fail_on_one_while_others_are_deaf, ranks=2)
    assert "rank 1 was still busy 0.3 s after" in str(caught.value)
    monkeypatch.undo()
    now = pool.run(process, ranks=2)
    assert now[0] == processes[0]
    assert now[1] != processes[1]
    assert_works(pool, 2)


def test_hanging_rank_fails_within_its_limit_and_shows_where_it_hangs(pool):
    processes = pool.run(process, ranks=2)
    with pytest.raises(RankFailure, match=r"failed on rank 1 of 2\n.* within 0.5 s") as caught:
        pool.run(hang_on_one, ranks=2, timeout=0.5)
    assert "in wait_for_nobody" in str(caught.value)
    now = pool.run(process, ranks=2)
    assert now[0] == processes[0]
    assert now[1] != processes[1]
    assert_works(pool, 2)


def test_dying_rank_shows_its_exit_code(pool):
    with pytest.raises(RankFailure, match="failed on rank 1 of 2\nrank 1 died with exit code 3"):
        pool.run(exit_on_one_while_others_wait, 3, ranks=2)
    assert_works(pool, 2)


def test_crashing_rank_shows_its_signal_and_stack(pool):
    with pytest.raises(RankFailure, match="failed on rank 1 of 2\nrank 1 died of SIGSEGV") as caught:
        pool.run(fall_to_signal_on_one_while_others_wait, signal.SIGSEGV, ranks=2)
    assert "in fall_to_signal_on_one_while_others_wait" in str(caught.value)
    assert_works(pool, 2)


def test_sys_exit_is_a_failure(pool):
    with pytest.raises(RankFailure, match="SystemExit"):
        pool.run(leave_by_sys_exit, ranks=1)
    assert_works(pool, 1)


def test_what_cannot_be_sent_or_placed_is_refused(pool):
    with pytest.raises(TypeError, match="top of a test module"):
        pool.run(lambda: None)
    with pytest.raises(TypeError, match="arguments that pickle"):
        pool.run(echo, threading.Lock())
    with pytest.raises(ValueError, match="ranks=5 is not in this pool; use 1 to 4"):
        pool.run(process, ranks=5)


def test_processes_start_with_the_first_run_and_end_with_the_pool():
    others = set(multiprocessing.active_children())
    pool = RankPool(size=2)
    assert set(multiprocessing.active_children()) == others
    (pid,) = pool.run(process, ranks=1)
    (started,) = set(multiprocessing.active_children()) - others
    assert started.pid == pid
    pool.close()
    assert started.exitcode == 0
