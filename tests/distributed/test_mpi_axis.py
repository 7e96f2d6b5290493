"""The exchange over MPI, run by a real mpirun (mpi_script.py): what crosses, its gradients, a whole network."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_launchers import command, environment
from torch.distributed.device_mesh import init_device_mesh

from twolevel.distributed import MeshAxis
from twolevel.distributed.mpi_axis import exchange_of
from twolevel.errors import UserError

SCRIPT = Path(__file__).with_name("mpi_script.py")
TOTAL = {2: 3, 4: 10}  # rank p holds the number p + 1


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def answers(request, tmp_path_factory) -> list[dict]:
    """What the script found, by rank."""
    pytest.importorskip("mpi4py")
    folder, ranks = tmp_path_factory.mktemp("answers"), request.param
    root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    launcher = [command("mpirun"), *root, "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    result = subprocess.run(
        [*launcher, sys.executable, "-m", "mpi4py", str(SCRIPT), str(folder)],
        env=environment(PYTHONPATH=str(SCRIPT.parents[2])),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def test_gather_is_in_order_of_rank_and_scatter_sums(answers):
    ranks = len(answers)
    for rank, answer in enumerate(answers):
        for name, found in answer["numbers"].items():
            assert {str(t.dtype) for t in found.values()} == {name}
            assert found["gathered"][:, 0].tolist() == [p + 1 for p in range(ranks) for _ in range(2)]
            assert found["summed"][:, 1].tolist() == [TOTAL[ranks] * (2 * rank + r + 1) for r in range(2)]
            assert found["total"].unique().tolist() == found["sum"].unique().tolist() == [TOTAL[ranks]]
        assert answer["odd strides"].flatten().tolist() == [p + 1 for p in range(ranks) for _ in range(2)]


def test_a_gather_of_more_than_mpi_counts_is_whole_and_a_sum_is_refused(answers):
    ranks = len(answers)
    for answer in answers:
        for gathered in answer["beyond"]["gathered"]:
            rows = gathered.view(ranks, -1)
            assert [row.unique().tolist() for row in rows] == [[p + 1] for p in range(ranks)]
        assert answer["beyond"]["said"] == [
            f"exchange=mpi adds up 7 numbers a rank at most, not {number}; use group"
            for number in (8, 8 * ranks, 8 * ranks)
        ]


def test_logits_pass_their_gradient_and_the_input_sums_it(answers):
    total = TOTAL[len(answers)]
    for rank, answer in enumerate(answers):
        (logits, its), (x, shared) = answer["gradients"]["sum_logits"], answer["gradients"]["share_input"]
        assert logits.tolist() == [[total, total]]
        assert its.tolist() == [[rank + 1, rank + 1]]
        assert x.tolist() == [[rank + 1, rank + 1]]
        assert shared.tolist() == [[total, total]]


def test_network_over_mpi_is_the_single_process_network(answers):
    for answer in answers:
        for name, found in answer["parity"].items():
            # Float64, and only the order of some sums differs.
            torch.testing.assert_close(
                found["part"],
                found["expected"],
                rtol=1e-10,
                atol=1e-12,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def test_auto_takes_mpi_under_mpirun_on_cpus(answers):
    for answer in answers:
        assert answer["choices"] == {"auto": "MPIAxis", "group": "MeshAxis", "mpi": "MPIAxis"}


def test_an_axis_of_part_of_the_world_has_its_own_ranks(answers):
    if len(answers) != 4:
        pytest.skip("two axes of two ranks take four")
    assert [answer["half"].tolist() for answer in answers] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_what_one_rank_lacks_is_an_error_on_all_or_a_warning_of_the_first(answers):
    last = len(answers) - 1
    for rank, answer in enumerate(answers):
        prefix = "" if rank == last else f"rank {last}: "
        assert answer["missing"]["error"].startswith(f"{prefix}exchange=mpi needs mpi4py")
        assert "pip install twolevel[mpi]" in answer["missing"]["error"]
        assert answer["missing"]["type"] == "MeshAxis"
        assert len(answer["missing"]["warnings"]) == (rank == 0)


def test_a_tensor_that_is_not_on_the_cpu_is_refused(answers):
    for answer in answers:
        assert answer["elsewhere"] == ["exchange=mpi carries CPU tensors, not one on meta; use group"] * 4


def test_a_rank_does_not_wait_for_ever(answers):
    assert "not over after timeout=0.1 s" in answers[0]["away"]


# Ranks that MPI did not start.


def ask_for_mpi(world: type) -> tuple[str, str, bool]:
    """What asking for MPI says where mpi4py sees such a world; what auto takes, and whether it looked for MPI."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "group"))
    loaded = "mpi4py" in sys.modules
    auto = type(exchange_of(mesh, "auto")).__name__
    looked = not loaded and "mpi4py" in sys.modules
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=world)))
        with pytest.raises(UserError) as caught:
            exchange_of(mesh, "mpi")
    return str(caught.value), auto, looked


class OneRank:
    """mpi4py's world in a process that mpirun did not start."""

    Get_rank = staticmethod(lambda: 0)
    Get_size = staticmethod(lambda: 1)


def test_ranks_that_mpirun_did_not_start_cannot_have_mpi(pool):
    for said, auto, looked in pool.run(ask_for_mpi, OneRank, ranks=2):
        assert said.endswith(
            "exchange=mpi, but MPI sees rank 0 of 1 in what is rank 0 of 2; "
            "start the ranks with mpirun, or use group"
        )
        assert auto == MeshAxis.__name__
        assert not looked


def test_a_mesh_of_gpus_cannot_have_mpi():
    mesh = SimpleNamespace(device_type="cuda", get_group=lambda axis: None)
    with pytest.raises(UserError, match=r"exchange=mpi .* not those of cuda; use group"):
        exchange_of(mesh, "mpi")


def test_an_unknown_exchange_is_named():
    with pytest.raises(UserError, match="unknown exchange 'gloo'; use one of auto, group, mpi"):
        exchange_of(SimpleNamespace(device_type="cpu"), "gloo")
