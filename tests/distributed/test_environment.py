"""What a process reads of its launcher's environment, and the group that `start` makes from it."""

import os
import socket
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from twolevel.distributed import meeting, nccl
from twolevel.distributed.environment import start, stop
from twolevel.errors import UserError
from twolevel.launchers import Ranks, discover, first_host, rank_of

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "alpha",
    "MASTER_PORT": "29500",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-alpha-71@1",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
# Taken from `srun --nodes 2 --ntasks 3` of Slurm 22.05, in an sbatch script.
SBATCH = {
    "SLURM_JOB_ID": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "3",
    "SLURM_NODELIST": "n[1-2]",
    "SLURM_TASKS_PER_NODE": "2,1",
}
SRUN = {
    **SBATCH,
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
}


def test_torchrun_is_read():
    assert discover(TORCHRUN) == Ranks(5, 8, 1, 4, "torchrun", "alpha", 29500)


def test_open_mpi_is_read():
    assert discover(OPEN_MPI) == Ranks(2, 4, 0, 2, "mpi", job="prterun-alpha-71@1")


def test_mpich_is_read():
    assert discover(MPICH) == Ranks(3, 4, 1, 2, "mpi")


@pytest.mark.parametrize("launcher", [OPEN_MPI, MPICH, SRUN])
def test_a_given_address_and_port_are_honoured(launcher):
    ranks = discover({**launcher, "MASTER_ADDR": "beta", "MASTER_PORT": "1234"})
    assert (ranks.address, ranks.port) == ("beta", 1234)


def test_srun_is_read_and_its_ranks_meet_on_the_first_node():
    ranks = discover(SRUN)
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (1, 3, 1)
    assert (ranks.launcher, ranks.address) == ("slurm", "n1")
    assert ranks.local_world_size == 2
    other = discover({**SRUN, "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"})
    assert other.local_world_size == 1
    assert (other.address, other.port) == (ranks.address, ranks.port)


def test_tasks_of_a_node_are_counted_where_slurm_shortens_the_list():
    counts = {"SLURM_STEP_TASKS_PER_NODE": "1(x2),4", "SLURM_STEP_NUM_TASKS": "6"}
    last = {"SLURM_PROCID": "5", "SLURM_LOCALID": "3", "SLURM_NODEID": "2"}
    assert discover({**SRUN, **counts, **last}).local_world_size == 4


def test_steps_of_slurm_meet_at_different_ports():
    ports = {
        discover({**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port
        for job in (70, 71)
        for step in (0, 1)
    }
    assert len(ports) == 4
    assert all(1024 <= port < 32768 for port in ports)


def test_srun_on_one_node_needs_no_host_name():
    one = {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "3"}
    assert discover({**SRUN, **one}).address == "127.0.0.1"


def test_plain_python_in_an_sbatch_script_is_one_process():
    assert discover(SBATCH) == Ranks(0, 1, 0, 1, "none")


def test_no_launcher_is_one_process():
    assert discover({"MASTER_ADDR": "alpha", "RANK": ""}) == Ranks(0, 1, 0, 1, "none")


@pytest.mark.parametrize(
    ("environ", "rank"),
    [
        ({}, None),
        (TORCHRUN, 5),
        (OPEN_MPI, 2),
        (MPICH, 3),
        (SBATCH, None),
        ({"RANK": "", "PMI_RANK": ""}, None),
    ],
)
def test_a_message_names_the_rank_of_whichever_launcher(environ, rank):
    assert rank_of(environ) == rank


@pytest.mark.parametrize(("environ", "rank"), [({"RANK": "3"}, 3), ({**TORCHRUN, "RANK": "-1"}, None)])
def test_a_message_about_an_impossible_environment_has_a_rank_too_where_there_is_one(environ, rank):
    with pytest.raises(UserError):
        discover(environ)
    assert rank_of(environ) == rank


@pytest.mark.parametrize(
    "environ, launcher",
    [
        ({**SRUN, **MPICH, **OPEN_MPI, **TORCHRUN}, "torchrun"),
        ({**SRUN, **OPEN_MPI}, "mpi"),
        ({**SRUN, **MPICH}, "mpi"),  # mpiexec inside a job: Slurm's ranks are not ours
        ({**SRUN, "PMI_RANK": "1", "PMI_SIZE": "3"}, "slurm"),  # srun --mpi=pmi2
    ],
)
def test_the_innermost_launcher_is_believed(environ, launcher):
    assert discover(environ).launcher == launcher


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("alpha", "alpha"),
        ("alpha,beta", "alpha"),
        ("node[003-005,9],b1", "node003"),
        ("b1,node[3-5]", "b1"),
        ("gpu[09,11]-ib", "gpu09-ib"),
        ("rack[2-3]n[04-07]", "rack2n04"),
        ("a-1.site.org", "a-1.site.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", ",a", "node[", "node[]", "node[x-y]", "a,b["])
def test_what_is_no_node_list_is_an_error(nodes):
    with pytest.raises(UserError, match=r"no list of Slurm nodes.*MASTER_ADDR"):
        first_host(nodes)


@pytest.mark.parametrize(
    "launcher, missing",
    [(TORCHRUN, name) for name in TORCHRUN]
    + [(OPEN_MPI, name) for name in list(OPEN_MPI)[:4]]
    + [(MPICH, name) for name in MPICH]
    + [(SRUN, name) for name in ("SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NODELIST")],
)
def test_a_half_set_environment_names_what_is_missing(launcher, missing):
    environ = {name: value for name, value in launcher.items() if name != missing}
    with pytest.raises(UserError, match=rf"is set without {missing}; start with "):
        discover(environ)


def test_ranks_at_a_loopback_address_are_all_on_this_machine():
    environ = {**TORCHRUN, "MASTER_ADDR": "localhost"}
    del environ["LOCAL_WORLD_SIZE"]
    assert discover(environ).local_world_size == 8


@pytest.mark.parametrize(
    "launcher, name, value, message",
    [
        (TORCHRUN, "RANK", "8", "RANK=8 is not below WORLD_SIZE=8"),
        (TORCHRUN, "RANK", "-1", "RANK='-1' is not a whole number"),
        (TORCHRUN, "WORLD_SIZE", "two", "WORLD_SIZE='two' is not a whole number"),
        (TORCHRUN, "WORLD_SIZE", "0", "RANK=5 is not below WORLD_SIZE=0"),
        (TORCHRUN, "LOCAL_RANK", "4", "LOCAL_RANK=4 is not below LOCAL_WORLD_SIZE=4"),
        (TORCHRUN, "LOCAL_WORLD_SIZE", "9", "LOCAL_WORLD_SIZE=9 is more than WORLD_SIZE=8"),
        (TORCHRUN, "MASTER_PORT", "65536", "MASTER_PORT=65536 is no port"),
        (TORCHRUN, "MASTER_PORT", "0", "MASTER_PORT=0 is no port"),
        (OPEN_MPI, "OMPI_COMM_WORLD_RANK", "1.5", "OMPI_COMM_WORLD_RANK='1.5' is not a whole"),
        (MPICH, "PMI_RANK", "4", "PMI_RANK=4 is not below PMI_SIZE=4"),
        (SRUN, "SLURM_PROCID", "3", "SLURM_PROCID=3 is not below SLURM_STEP_NUM_TASKS=3"),
        (SRUN, "SLURM_NODEID", "2", "SLURM_NODEID=2 is not one of SLURM_STEP_TASKS_PER_NODE"),
        (SRUN, "SLURM_STEP_TASKS_PER_NODE", "2x2", "SLURM_STEP_TASKS_PER_NODE='2x2' is not of"),
    ],
)
def test_an_impossible_value_is_named(launcher, name, value, message):
    with pytest.raises(UserError, match=message):
        discover({**launcher, name: value})


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
