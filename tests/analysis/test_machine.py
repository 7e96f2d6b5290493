"""Machines, their files, and the arithmetic of curves, tables and collectives, by hand."""

from dataclasses import replace

import pytest
import torch

from twolevel.analysis.planner import presets
from twolevel.analysis.planner.calibrate import Calibration, Grid, measured
from twolevel.analysis.planner.machine import Link, Machine, Table, on_curve
from twolevel.analysis.planner.messages import (
    Axis,
    all_gather,
    all_reduce,
    axes,
    broadcast,
    buckets,
    drain,
)
from twolevel.analysis.planner.timing import Timing
from twolevel.analysis.planner.workload import Work
from twolevel.errors import UserError

IN = Link(name="in", latency=1.0, bandwidth=100.0)
OUT = Link(name="out", latency=10.0, bandwidth=10.0)
TINY = Grid((2, 4), (1, 2), (1, 2), ((1, 4), (2, 4)), (4, 8), (256, 512))


def axis_of(*, ranks, per_node):
    return Axis(ranks=ranks, per_node=per_node, link=IN, internode=OUT)


def convolution(*, batch=1, taps=1):
    """2 to 2 channels on 2 x 2 pixels."""
    return Work(kind="conv", batch=batch, channels_in=2, channels_out=2, pixels_in=4, pixels_out=4, taps=taps)


def roofline(*, curve, **more):
    return Machine(
        name="",
        source="",
        memory=0,
        flops={"float32": 100.0},
        bandwidth=1e12,
        dense=curve,
        grouped=curve,
        overhead=0.0,
        **more,
    )


def test_curve_passes_its_points_and_is_level_outside():
    curve = ((10.0, 0.1), (40.0, 0.4))
    assert [on_curve(curve, x) for x in (1, 10, 20, 40, 100)] == pytest.approx([0.1, 0.1, 0.2, 0.4, 0.4])


def test_table_is_exact_for_powers_between_and_beyond_its_points():
    def forward(a, b):
        return 3 * a**2 * b**0.5

    axes = (("a", (1.0, 2.0, 8.0)), ("b", (1.0, 10.0)))
    found = [forward(a, b) for a in axes[0][1] for b in axes[1][1]]
    table = Table(axes, tuple(found), tuple(2 * f for f in found))
    for a, b in [(1, 1), (2, 10), (3, 4), (16, 100), (0.5, 0.1)]:
        assert table.at(a=a, b=b) == pytest.approx((forward(a, b), 2 * forward(a, b)))


def test_axis_of_one_point_counts_for_nothing():
    table = Table((("a", (4.0,)), ("b", (1.0, 2.0))), (1.0, 2.0), (1.0, 2.0))
    assert table.at(a=100, b=2) == pytest.approx((2.0, 2.0))


@pytest.mark.parametrize("name", sorted(presets.MACHINES))
def test_every_preset_knows_its_source_and_survives_a_file(name, tmp_path):
    machine = presets.machine(name)
    assert machine.source and machine.link.source and machine.internode.source
    machine.save(tmp_path / "m.json")
    assert Machine.load(tmp_path / "m.json") == machine


def test_what_is_not_known_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^unknown machine 'h20'; did you mean h200"):
        presets.machine("h20")
    with pytest.raises(UserError, match=r"^unknown link 'pcie5'; did you mean pcie[34]"):
        presets.link("pcie5")
    (tmp_path / "m.json").write_text("{}")
    with pytest.raises(UserError, match=r"^machine file '.*m.json' cannot be read .*--calibrate"):
        Machine.load(tmp_path / "m.json")
    with pytest.raises(
        UserError, match=r"^machine file '.*m.json/m.json' cannot be written .*--output FILE$"
    ):
        presets.machine("h200").save(tmp_path / "m.json" / "m.json")
    with pytest.raises(UserError, match=r"^machine titan-rtx has no rate for bf16; use float32$"):
        Timing(presets.machine("titan-rtx"), "bf16")


def test_ring_within_a_node_takes_its_steps():
    axis = axis_of(ranks=4, per_node=4)
    assert all_gather(axis, 400) == 3 * (1 + 100 / 100)
    assert all_reduce(axis, 4000) == 2 * 3 * (1 + 1000 / 100)  # a ring for much,
    assert all_reduce(axis, 4) == 2 * 2 * (1 + 4 / 100)  # a tree for little
    assert broadcast(axis, 100) == 2 * (1 + 1)


def test_ring_over_nodes_is_as_slow_as_the_link_between_them():
    axis = axis_of(ranks=8, per_node=4)
    assert axis.nodes == 2
    assert all_gather(axis, 800) == 7 * (10 + 100 / 10)


def test_two_level_gather_crosses_nodes_once_for_each():
    axis = axis_of(ranks=8, per_node=4)
    # One step between two nodes, in which each sends its half; three within, each of a quarter of the whole.
    assert all_gather(axis, 800, two_level=True) == (10 + 400 / 10) + 3 * (1 + 200 / 100)
    assert all_gather(axis_of(ranks=4, per_node=4), 400, two_level=True) == all_gather(
        axis_of(ranks=4, per_node=4), 400
    )


def test_inner_axis_stays_within_a_node_where_it_fits():
    machine = replace(presets.machine("h100"), ranks_per_node=8)
    data, inner = axes(machine, 4, 4)
    assert (inner.nodes, data.nodes) == (1, 2)
    assert data.sharing == 4  # the four ranks of a replica all have gradients to send
    data, inner = axes(machine, 2, 16)
    assert (inner.nodes, data.nodes) == (2, 2)


def test_one_rank_sends_nothing():
    axis = axis_of(ranks=1, per_node=1)
    assert all_gather(axis, 100) == all_reduce(axis, 100) == broadcast(axis, 100) == 0


def test_link_drains_jobs_in_turn():
    assert drain([(0, 5), (1, 5)], until=8) == 2
    assert drain([(0, 1), (6, 1)], until=8) == 0
    assert drain([], until=8) == 0


def test_buckets_close_once_they_are_full():
    mb = 1 << 20
    assert buckets([mb, 10 * mb, 10 * mb, 10 * mb, mb]) == [[0], [1, 2, 3], [4]]
    assert buckets([]) == []


def test_roofline_is_the_slower_of_arithmetic_and_memory():
    curve = {"float32": ((1.0, 0.5), (2.0, 0.5))}
    machine = roofline(curve=curve, streaming=1.0)
    work = convolution(taps=9)
    assert work.macs == 4 * 9 * 4
    seconds = Timing(machine)(work)
    assert (seconds.forward, seconds.backward) == pytest.approx((2 * 144 / 50, 4 * 144 / 50))
    slow = Timing(replace(machine, flops={"float32": 1e12}, bandwidth=4.0))(work)
    assert slow.forward == pytest.approx(8 + 8 + 36)  # input, output and weights, four bytes each, 4 bytes/s
    first = Timing(machine)(replace(work, input_grad=False))  # the image needs no gradient
    assert first.backward == pytest.approx(seconds.backward / 2)


def test_half_empty_device_takes_as_long():
    curve = {"float32": ((1.0, 1.0), (2.0, 1.0))}
    machine = roofline(curve=curve, saturation=16.0)
    one, two = (Timing(machine)(convolution(batch=batch)) for batch in (1, 2))
    assert one.forward == pytest.approx(two.forward)


def test_calibration_measures_every_table_and_its_machine_survives_a_file(tmp_path):
    calibration = Calibration("cpu", "float32", TINY, depth=1)
    tables = dict(calibration.run())
    assert len(tables) == calibration.num_tables
    machine = measured(tables, "cpu", "float32", IN, OUT)
    machine.save(tmp_path / "m.json")
    assert Machine.load(tmp_path / "m.json") == machine
    timing = Timing(machine)
    for kind in ("conv", "two-level", "norm", "activation", "add", "mean", "pool", "linear"):
        work = Work(
            kind=kind,
            batch=2,
            channels_in=8,
            channels_out=8,
            pixels_in=16,
            pixels_out=16,
            taps=9,
            groups=2,
            all_groups=4,
        )
        seconds = timing(work)
        assert 0 < seconds.forward < 1 and 0 < seconds.backward < 1, kind
    assert 0 < timing.optimiser(10, 1000) < 1
    with pytest.raises(UserError, match=r"was measured in float32, not in bf16"):
        Timing(machine, "bf16")


def test_calibration_times_one_rank_of_several():
    """A rank of P reads its own channels, and adds the representatives of all."""
    from twolevel.analysis.planner.calibrate import _layer

    layer = _layer("two-level", 4, 2, 3, 3)
    assert layer.local.weight.shape == (8, 4, 3, 3)
    assert layer.restriction.weight.shape == (2, 4, 3, 3)
    assert layer.coarse.weight.shape == (8, 6, 1, 1)
    x = torch.randn(1, 8, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape


def test_layers_of_too_many_channels_are_scaled_by_their_groups():
    grid = replace(TINY, most_channels=4)
    table = Calibration("cpu", "float32", grid, depth=1)._convolutions("two-level", 9)
    # In row order: width (2, 4), groups (1, 2), ranks (1, 2), pixels (16, 32). Two groups of 4 channels are too many.
    assert table.forward[12:16] == pytest.approx([2 * seconds for seconds in table.forward[8:12]])
    assert table.forward[4:8] != pytest.approx([2 * seconds for seconds in table.forward[0:4]], rel=1e-6)


def test_points_that_take_too_long_are_scaled_by_their_pixels(monkeypatch):
    monkeypatch.setattr("twolevel.analysis.planner.calibrate.LONGEST", 0.0)
    table = Calibration("cpu", "float32", TINY, depth=1)._convolutions("conv", 9)
    assert table.forward[1] == pytest.approx(2 * table.forward[0])
