"""Parts of a call run at once, each once, on the threads of torch's OpenMP or on others."""

import os
import threading

import pytest
import torch

from twolevel.ops.kernels.native import threads
from twolevel.ops.kernels.native.threads import OpenMP, openmp, run

WAYS = ["openmp", "pool"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    if request.param == "pool":
        monkeypatch.setattr(threads, "openmp", lambda: None)
    elif openmp() is None:
        pytest.skip("torch computes without an OpenMP library that is known")
    return request.param


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_every_part_runs_once_and_its_result_is_at_its_place(way, parts):
    ran = []

    def call(part: int) -> int:
        ran.append(part)
        return 10 * part

    for _ in range(20):
        ran.clear()
        assert run(call, parts) == [10 * part for part in range(parts)]
        assert sorted(ran) == [*range(parts)]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_two_parts_run_at_once(way):
    meeting = threading.Barrier(2, timeout=60)
    assert run(lambda part: meeting.wait() * 0 + part, 2) == [0, 1]


def test_parts_run_on_the_threads_of_torch():
    """Numbered by its library, so that no thread of ours is beside them."""
    if openmp() is None:
        pytest.skip("torch computes without an OpenMP library that is known")
    library, numbers = openmp(), set()
    run(lambda part: numbers.add(library.number()) or 0, 2)
    assert numbers == {0, 1}


def test_parts_that_got_no_thread_run_too(monkeypatch):
    """A library may give fewer threads than were asked for."""
    alone = OpenMP(lambda body, data, parts, flags: body(data), lambda: 0, lambda: 1)
    monkeypatch.setattr(threads, "openmp", lambda: alone)
    assert run(lambda part: part, 5) == [0, 1, 2, 3, 4]


def test_an_exception_in_a_part_is_raised(way):
    def call(part: int) -> int:
        if part == 1:
            raise MemoryError("no room")
        return 0

    with pytest.raises(MemoryError, match="no room"):
        run(call, 3)


def test_a_forked_process_has_threads_of_its_own():
    """That of the parent's OpenMP are lost there: waiting for them would not end."""
    run(lambda part: part, 2)
    torch.ones(1 << 20).add_(1)
    child = os.fork()
    if not child:
        try:
            os._exit(0 if run(lambda part: part, 2) == [0, 1] else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
