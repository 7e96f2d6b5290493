"""What a run records of its machine: memory, utilisation, and the share of a step that its exchange is exposed."""

import csv
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from command import records, run

from twolevel.analysis import count
from twolevel.analysis.rate import product_rate
from twolevel.distributed import collectives, init_mesh, mpi_axis
from twolevel.distributed.collectives import axes_of
from twolevel.errors import UserError
from twolevel.models import create
from twolevel.training import meter
from twolevel.training.meter import Meter, training_operations
from twolevel.training.step import make_step

CPU = torch.device("cpu")
NAMES = ["memory_mb", "utilisation", "exchange_exposed"]


def waits_of_a_step(options):
    """How often a step waits for other ranks, by a clock that shows one second more at every look."""
    own, collectives.perf_counter = collectives.perf_counter, itertools.count().__next__
    try:
        mesh = init_mesh(data=1, device="cpu")
        step = make_step("wrn-10-1", mesh, "cpu", groups=4, image_shape=(3, 8, 8), **options)
        step(torch.randn(2, 3, 8, 8), torch.arange(2))
        return [axis.waited for axis in axes_of(step.placed.model)]
    finally:
        collectives.perf_counter = own


@pytest.mark.parametrize(("conv", "compile"), [("gc2l", False), ("bgc", False), ("gc2l", True)])
def test_every_exchange_of_a_step_is_waited_for_in_the_count(pool, conv, compile):
    model = create("wrn-10-1", conv=conv, groups=4, num_classes=10)
    exchanges = len(count(model, (3, 8, 8), ranks=2).collectives)
    options = {"conv": conv, "compile": compile}
    assert pool.run(waits_of_a_step, options, ranks=2, timeout=300) == [[exchanges]] * 2


def test_a_wait_over_mpi_is_counted(monkeypatch):
    monkeypatch.setattr(mpi_axis.time, "perf_counter", itertools.count().__next__)
    axis = SimpleNamespace(waited=0.0, timeout_s=60, poll_s=60)
    over = iter([False, True])
    request = SimpleNamespace(Test=lambda: next(over))
    result = torch.ones(2)
    assert mpi_axis._InFlight(request, result, result, torch.float32, axis, "all-gather").wait() is result
    assert axis.waited == 2.0  # begun, looked at once, over


def placed(model=None, device=CPU, precision="float32"):
    strategy = SimpleNamespace(precision=precision, dtype=torch.float32)
    return SimpleNamespace(device=device, model=model or torch.nn.Module(), strategy=strategy)


def test_utilisation_is_of_the_rate_of_all_ranks():
    """By hand: 100 images of 6e9 operations in 2 s are 3e11 a second, of 1e12."""
    found = Meter(placed(), 6e9, 1e12)
    found.begin()
    assert found.steps(100, 2.0)["utilisation"] == pytest.approx(0.3, rel=1e-12)
    for unknown in (Meter(placed(), None, 1e12), Meter(placed(), 6e9, None)):
        assert unknown.utilisation(100, 2.0) is None


@pytest.mark.parametrize(("conv", "groups"), [("sc", 1), ("gc2l", 4), ("flgc", 4), ("dgconv", 1)])
def test_a_training_step_takes_three_times_the_operations_of_forward(conv, groups):
    options = {"name": "wrn-10-1", "conv": conv, "groups": groups, "num_classes": 10}
    macs = count(create(**options), (3, 16, 16), ranks=1).macs
    assert training_operations(options, (3, 16, 16)) == 6 * macs


def test_a_network_that_cannot_be_counted_has_no_utilisation(monkeypatch):
    def refuse(*_, **__):
        raise UserError("unknown work")

    monkeypatch.setattr(meter, "count", refuse)
    options = {"name": "wrn-10-1", "conv": "sc", "groups": 1, "num_classes": 10}
    assert training_operations(options, (3, 16, 16)) is None


def meter_of_ranks():
    """A rank that cannot multiply; and an epoch in which rank p took p + 1 MB and waited (p + 1) / 4 of the time."""
    rank = dist.get_rank()
    own, meter.product_rate = meter.product_rate, lambda *_: rate_of(rank)
    options = {"name": "wrn-10-1", "conv": "sc", "groups": 1, "num_classes": 10}
    try:
        rates = []
        for broken in (False, True):
            rate_of.broken = broken
            rates.append(meter.make_meter(placed(), options, (3, 8, 8), first=rank == 0).rate)
    finally:
        meter.product_rate = own
    found = Meter(placed(), None, None)
    found.axes = [SimpleNamespace(waited=0.0)]
    found._memory = lambda: rank + 1.0
    for _ in range(2):
        found.begin()
        found.axes[0].waited += (rank + 1) / 2
        assert found.steps(1, 2.0)["exchange_exposed"] == (rank + 1) / 4
    return rates, found.epoch(2, 4.0), found.epoch(0, 1.0)


def rate_of(rank):
    if rank and rate_of.broken:
        raise RuntimeError("out of memory")
    return 10.0**rank


def test_an_epoch_has_the_largest_memory_and_the_mean_wait_of_ranks(pool):
    for rates, epoch, empty in pool.run(meter_of_ranks, ranks=2):
        assert rates == [11.0, None]
        assert epoch == {"memory_mb": 2.0, "utilisation": None, "exchange_exposed": 0.375}
        assert empty == dict.fromkeys(NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_measuring_a_rate_leaves_random_numbers_as_they_were(dtype):
    before = torch.get_rng_state()
    assert product_rate(CPU, dtype) > 1e6  # any processor that runs torch
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("ranks", "options"), [(2, []), (1, []), (2, ["--data-parallel", 2])])
def test_records_of_steps_and_epochs_have_what_a_run_made_of_its_machine(
    pool, tiny, tmp_path, ranks, options
):
    first, *_ = run(pool, "train", *tiny, *options, "--output", tmp_path / "run", ranks=ranks)
    exchanges = ranks == 2 and not options
    found = records(tmp_path / "run", "step") + records(tmp_path / "run", "epoch")
    assert len(found) == 12
    for record in found:
        assert 10 < record["memory_mb"] < 1e6 and record["utilisation"] > 0
        exposed = record["exchange_exposed"]
        assert 0 < exposed < 1 if exchanges else exposed is None
    with (tmp_path / "run" / "epochs.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [float(row["memory_mb"]) for row in rows] == [r["memory_mb"] for r in found[9:]]
    assert all((row["exchange_exposed"] != "") == exchanges for row in rows)
    assert first.out.count("  utilisation ") == 3 and first.out.count("exchange exposed") == (
        3 if exchanges else 0
    )
