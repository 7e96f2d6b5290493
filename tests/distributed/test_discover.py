"""What a process reads of its launcher's environment: its rank, and where rank 0 can be met."""

import pytest

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
