"""What each MPI rank of test_mpi_axis.py runs: it writes its answers to FOLDER/RANK.pt.

mpirun -n P python -m mpi4py mpi_script.py FOLDER
"""

import copy
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import DeviceMesh
from torch.nn import functional as F

from twolevel.distributed import init_mesh, mpi_axis, parallelize
from twolevel.distributed.environment import start, stop
from twolevel.distributed.mpi_axis import MPIAxis, exchange_of
from twolevel.errors import UserError
from twolevel.models import create

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def numbers(axis: MPIAxis, dtype: torch.dtype) -> dict:
    """gather and scatter_sum of two rows a rank, and sum, all in flight at once, and all_reduce_."""
    number = dist.get_rank() + 1
    parts = number * torch.arange(1, 2 * axis.ranks + 1, dtype=dtype)[:, None].expand(-1, 2).contiguous()
    gathering = axis.gather(torch.full((2, 2), number, dtype=dtype))
    scattering = axis.scatter_sum(parts)
    summing = axis.sum(torch.full((3,), number, dtype=dtype))
    total = torch.full((2, 3), number, dtype=dtype)
    axis.all_reduce_(total)
    return {
        "sum": summing.wait(),
        "summed": scattering.wait(),
        "gathered": gathering.wait(),
        "total": total,
    }


def odd_strides(axis: MPIAxis) -> torch.Tensor:
    """The gather of a tensor of one column, whose stride says nothing."""
    own = torch.full((9,), dist.get_rank() + 1.0).as_strided((2, 1), (1, 5))
    return axis.gather(own).wait()


def beyond_what_mpi_counts(axis: MPIAxis) -> dict:
    """Where MPI counts to 7: gathers of 60, 30 and 28 bytes a rank, and what sums of more numbers say."""
    number, found = dist.get_rank() + 1, {"said": []}
    limit, mpi_axis.MOST_ITEMS = mpi_axis.MOST_ITEMS, 7
    try:
        owns = [torch.full((3, 5), number, dtype=d) for d in (torch.float32, torch.bfloat16)]
        owns.append(torch.full((7,), number, dtype=torch.float32))
        found["gathered"] = [gathering.wait() for gathering in [axis.gather(own) for own in owns]]
        for collective in (axis.scatter_sum, axis.sum, axis.all_reduce_):
            try:
                collective(torch.ones(8 * axis.ranks))
            except UserError as error:
                found["said"].append(str(error))
    finally:
        mpi_axis.MOST_ITEMS = limit
    return found


def gradients(axis: MPIAxis) -> dict:
    """Of sum_logits and share_input, where rank p uses the result p + 1 times."""
    number, found = dist.get_rank() + 1.0, {}
    for name in ("sum_logits", "share_input"):
        x = torch.full((1, 2), number, requires_grad=True)
        y = getattr(axis, name)(x)
        (number * y).sum().backward()
        found[name] = y.detach(), x.grad
    return found


def training_step(model) -> dict:
    """Loss, and all gradients with the image's."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64).requires_grad_()
    loss = F.cross_entropy(model(images), torch.arange(4))
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), "image": images.grad, **grads}


def parity(mesh: DeviceMesh, conv: str, **options) -> dict:
    """This rank's part of a whole network's training step, and the step of the part."""
    whole = create("wrn-10-1", conv=conv, groups=4, num_classes=10, **options).double()
    part = parallelize(copy.deepcopy(whole), mesh, exchange="mpi")
    expected = {
        name: part.layout.cut(name, tensor) if name in part.layout.dims else tensor
        for name, tensor in training_step(whole).items()
    }
    return {"expected": expected, "part": training_step(copy.deepcopy(part))}  # a copy keeps its ranks


def refusal_of_a_tensor_elsewhere(axis: MPIAxis) -> list[str]:
    """What each collective says to a tensor that is on no CPU."""
    said = []
    for collective in (axis.gather, axis.scatter_sum, axis.sum, axis.all_reduce_):
        try:
            collective(torch.empty(4, 1, device="meta"))
        except UserError as error:
            said.append(str(error))
    return said


def without_mpi4py_on_the_last_rank(mesh: DeviceMesh) -> dict:
    """What asking for MPI says on each rank, and what "auto" takes instead, with its warnings."""
    modules = {name: sys.modules[name] for name in ("mpi4py", "mpi4py.MPI")}
    if dist.get_rank() == dist.get_world_size() - 1:
        sys.modules["mpi4py"] = None
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            axis = exchange_of(mesh, "auto")
        try:
            exchange_of(mesh, "mpi")
        except UserError as error:
            said = str(error)
    finally:
        sys.modules.update(modules)
    return {"type": type(axis).__name__, "warnings": [str(w.message) for w in caught], "error": said}


def a_rank_that_stays_away(group: dist.ProcessGroup) -> str:
    axis = MPIAxis(group, timeout_s=0.1)
    said = ""
    if dist.get_rank() == 0:
        try:
            axis.gather(torch.ones(1)).wait()
        except RuntimeError as error:
            said = str(error)
    return said


def main(folder: Path) -> None:
    world = start("cpu", timeout_s=60)
    torch.set_num_threads(1)
    mesh = init_mesh(device="cpu")
    axis = exchange_of(mesh, "mpi")
    answers = {
        "numbers": {str(dtype): numbers(axis, dtype) for dtype in DTYPES},
        "odd strides": odd_strides(axis),
        "beyond": beyond_what_mpi_counts(axis),
        "gradients": gradients(axis),
        "parity": {
            "overlapped": parity(mesh, "gc2l", schedule="overlapped"),
            "fused": parity(mesh, "gc2l", schedule="fused"),
            "balanced": parity(mesh, "bgc"),
        },
        "choices": {name: type(exchange_of(mesh, name)).__name__ for name in ("auto", "group", "mpi")},
        "elsewhere": refusal_of_a_tensor_elsewhere(axis),
        "missing": without_mpi4py_on_the_last_rank(mesh),
    }
    if world.size == 4:
        half = exchange_of(init_mesh(data=2, device="cpu"), "mpi")
        answers["half"] = half.gather(torch.tensor([world.rank])).wait()
    answers["away"] = a_rank_that_stays_away(mesh.get_group("group"))
    torch.save(answers, folder / f"{world.rank}.pt")
    stop(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
