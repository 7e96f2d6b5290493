"""The group that `start` makes of the ranks that a launcher describes, and the device of each."""

import os
import socket
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from test_discover import TORCHRUN

from twolevel.distributed import meeting, nccl
from twolevel.distributed.environment import start, stop
from twolevel.errors import UserError


def start_and_sum(device: str = "cpu", threads: str | None = None) -> tuple:
    """The world, its description taken from an existing group, and the sum of all rank + 1."""
    if threads is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    else:
        os.environ["OMP_NUM_THREADS"] = threads
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    world = start(device, timeout_s=30)
    again = start(device)
    total = torch.tensor([world.rank + 1])
    dist.all_reduce(total)
    stop(again)
    assert dist.is_initialized(), "stop ended a group that another start had made"
    stop(world)
    assert not dist.is_initialized()
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    return world, again, total.item(), torch.get_num_threads(), interface


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_started_ranks_reach_each_other(pool, ranks):
    results = pool.run(start_and_sum, ranks=ranks, init=False)
    for rank, (world, again, total, _, interface) in enumerate(results):
        assert (world.rank, world.size, world.local_rank, world.local_size) == (rank, ranks) * 2
        assert (world.device, world.backend) == (torch.device("cpu"), "gloo")
        assert world.launcher == "torchrun"
        assert again == world
        assert total == ranks * (ranks + 1) // 2
        assert interface in ("lo", "lo0")


def test_ranks_that_share_cores_divide_them_as_threads(pool):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for ranks in (1, 2):
        for result in pool.run(start_and_sum, ranks=ranks, init=False):
            assert result[3] == max(1, cores // ranks)


def test_the_users_number_of_threads_stays(pool):
    # The pool sets one thread; start would set all cores.
    [result] = pool.run(start_and_sum, threads="1", ranks=1, init=False)
    assert result[3] == 1


def start_alone() -> tuple:
    for name in TORCHRUN:
        os.environ.pop(name, None)
    with mock.patch.dict(sys.modules, {"mpi4py": None}):  # not to be asked, even where it is
        return start_and_sum()


def test_one_process_without_a_launcher_is_a_world_of_one(pool):
    [(world, _, total, _, _)] = pool.run(start_alone, ranks=1, init=False)
    assert (world.rank, world.size, world.launcher, total) == (0, 1, "none", 1)


def join_existing() -> tuple:
    world = start("cpu")
    stop(world)
    return world, dist.is_initialized(), dist.get_backend()


def test_an_existing_group_is_joined_and_outlives_stop(pool):
    for rank, (world, alive, backend) in enumerate(pool.run(join_existing, ranks=2)):
        assert (world.rank, world.size, world.backend) == (rank, 2, backend)
        assert alive


def start_error(device: str, rank_without: int | None = None) -> str:
    """The message of `start`, on ranks of which one has no GPU (None: no rank has one)."""
    has_gpu = rank_without is not None and int(os.environ["RANK"]) != rank_without
    with fake_gpus(1 if has_gpu else 0), pytest.raises(UserError) as info:
        start(device, timeout_s=30)
    return str(info.value)


def fake_gpus(count: int, uuid=str):
    """torch.cuda as if there were `count` GPUs."""
    return mock.patch.multiple(
        torch.cuda,
        is_available=lambda: count > 0,
        device_count=lambda: count,
        set_device=lambda index: None,
        get_device_properties=lambda index: SimpleNamespace(uuid=uuid(index)),
    )


def test_cuda_that_is_not_there_is_an_error(pool):
    for message in pool.run(start_error, "cuda", ranks=2, init=False):
        assert "device=cuda but torch" in message and "use cpu" in message


def test_a_gpu_missing_on_one_rank_is_an_error_on_all(pool):
    on_0, on_1 = pool.run(start_error, "cuda", rank_without=1, ranks=2, init=False)
    assert on_0 == f"rank 1: {on_1}"
    assert on_1.startswith("device=cuda but torch")
    messages = pool.run(start_error, "auto", rank_without=1, ranks=2, init=False)
    assert all("a GPU on rank 0 but none on rank 1; use device cpu" in m for m in messages)


def start_on_fake_gpus(visible: int, private: bool) -> tuple:
    """World and warnings; `private`: the launcher shows each rank GPUs of its own."""
    rank = os.environ["RANK"]
    owner = rank if private else "all"
    with (
        fake_gpus(visible, lambda index: f"{owner}-{index}"),
        mock.patch.object(dist, "init_process_group") as init,
        mock.patch.object(dist, "is_nccl_available", lambda: True),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        world = start(timeout_s=30)
    assert init.call_args.args == (world.backend,)
    options, bound = (init.call_args.kwargs[name] for name in ("pg_options", "device_id"))
    if "nccl" in world.backend:
        assert options.is_high_priority_stream and bound == world.device
    else:
        assert options is None and bound is None
    return world, [str(w.message) for w in caught]


@pytest.mark.parametrize("visible, private", [(2, False), (1, True), (4, False)])
def test_nccl_carries_tensors_of_ranks_with_a_gpu_each(pool, visible, private):
    results = pool.run(start_on_fake_gpus, visible, private, ranks=2, init=False)
    for rank, (world, warned) in enumerate(results):
        assert world.backend == "cpu:gloo,cuda:nccl"
        assert world.device == torch.device("cuda", 0 if private else rank)
        assert not warned


def test_ranks_that_share_a_gpu_use_gloo_and_rank_0_warns(pool):
    results = pool.run(start_on_fake_gpus, 2, False, ranks=4, init=False)
    assert [world.device.index for world, _ in results] == [0, 1, 0, 1]
    assert {world.backend for world, _ in results} == {"gloo"}
    (warning,), *others = [warned for _, warned in results]
    assert "4 ranks share 2 GPUs" in warning
    assert others == [[], [], []]


def start_on_one_shared_gpu(version: tuple[int, ...], asked: bool) -> str:
    with (
        mock.patch("torch.cuda.nccl.version", lambda: version),
        mock.patch.dict(os.environ, {nccl.SHARING: "1"} if asked else {}),
    ):
        world, _ = start_on_fake_gpus(1, private=False)
    assert world.device == torch.device("cuda", 0)
    return world.backend


@pytest.mark.parametrize(
    "version, asked, backend",
    [((2, 30, 7), True, "cpu:gloo,cuda:nccl"), ((2, 30, 7), False, "gloo"), ((2, 28, 9), True, "gloo")],
)
def test_an_nccl_that_can_share_a_gpu_does_so_if_asked(pool, version, asked, backend):
    assert pool.run(start_on_one_shared_gpu, version, asked, ranks=2, init=False) == [backend] * 2


def start_on_gpus_apart() -> str:
    """The message where NCCL finds no way between the GPUs."""

    def fail(*args, **kwargs):
        raise dist.DistBackendError("NCCL error, invalid usage\nncclInvalidUsage: of NCCL library.")

    with (
        fake_gpus(2),
        mock.patch.object(dist, "init_process_group", fail),
        mock.patch.object(dist, "is_nccl_available", lambda: True),
        pytest.raises(UserError) as info,
    ):
        start(timeout_s=30)
    return str(info.value)


def test_gpus_that_nccl_cannot_connect_are_an_error_in_one_line(pool):
    for rank, message in enumerate(pool.run(start_on_gpus_apart, ranks=2, init=False)):
        assert message == (
            f"rank {rank} of 2 cannot connect cuda:{rank} to the others (NCCL error, invalid usage); "
            "NCCL_DEBUG=INFO says why, device cpu goes without"
        )


def start_where(port: int | None) -> str:
    """The message of rank 0 of 2, whose partner never comes or whose port is taken."""
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = "2"
    if port:
        os.environ["MASTER_PORT"] = str(port)
    with pytest.raises(UserError) as info:
        start("cpu", timeout_s=1)
    return str(info.value)


def test_a_port_that_is_taken_is_an_error_in_one_line(pool):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        [message] = pool.run(start_where, port, ranks=1, init=False)
    assert f"127.0.0.1, port {port}" in message
    assert "address already in use" in message
    assert "MASTER_PORT" in message and "\n" not in message


def test_ranks_that_do_not_come_are_an_error_in_one_line(pool):
    [message] = pool.run(start_where, None, ranks=1, init=False)
    assert "rank 0 of 2 did not meet the others at 127.0.0.1" in message
    assert "timeout_s=1" in message
    assert "check that all 2 ranks were started" in message and "\n" not in message


def test_of_a_long_reason_the_first_line_is_told(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no such host\nframe #0: c10::Error")

    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "rendezvous", fail)
    with pytest.raises(UserError, match=r"at alpha, port 29500, .*\(no such host\); check") as info:
        start("cpu")
    assert "frame" not in str(info.value)


@pytest.mark.parametrize("arguments, message", [(("gpu",), "unknown device"), (("cpu", 0), "timeout_s=0")])
def test_an_argument_that_start_cannot_honour_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        start(*arguments)
