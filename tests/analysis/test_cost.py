"""The cost model's messages against `count`, its times by hand."""

from collections import Counter
from dataclasses import astuple, replace

import pytest
import torch
from by_hand import SIMPLE, workload
from torch import nn

from twolevel import models
from twolevel.analysis import count
from twolevel.analysis.planner.costs.base import Setting
from twolevel.analysis.planner.costs.channel import channel_cost
from twolevel.analysis.planner.costs.fsdp import fsdp_cost
from twolevel.analysis.planner.costs.group import group_cost
from twolevel.analysis.planner.costs.pipeline import pipeline_cost
from twolevel.analysis.planner.machine import AXES, Link, Table
from twolevel.analysis.planner.timing import Timing
from twolevel.analysis.planner.tracing import trace
from twolevel.analysis.planner.workload import Work
from twolevel.errors import UserError


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("representatives", [1, 3])
def test_collectives_of_a_group_are_the_counted_ones(ranks, precision, representatives):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with torch.device("meta"):
        network = models.create("wrn-16-4", conv="gc2l", groups=8, representatives=representatives)
    counted = count(network, (3, 32, 32), ranks=ranks, batch_size=32, dtype=dtype)
    cost = group_cost(
        trace(network, (3, 32, 32)), Setting(SIMPLE, 32, precision), "gc2l", data=1, group=ranks
    )
    assert Counter((m.kind, m.bytes_in, m.bytes_sent) for m in cost.messages) == Counter(
        (c.kind, c.bytes_in, c.bytes_sent) for c in counted.collectives
    )
    assert cost.bytes_sent == pytest.approx(counted.bytes_sent)


def with_link(latency, bandwidth):
    link = Link(name="", latency=latency, bandwidth=bandwidth)
    return replace(SIMPLE, link=link, internode=link)


def test_exchange_hides_under_the_local_convolution_and_no_further():
    traced = workload("wrn-10-2", "gc2l", 4)
    free = group_cost(traced, Setting(with_link(0, 1e15), 4), "gc2l", data=1, group=4)
    assert free.exposed == pytest.approx(0, abs=1e-9)
    assert free.step == pytest.approx(free.compute)
    slow = group_cost(traced, Setting(with_link(10.0, 1e15), 4), "gc2l", data=1, group=4)
    # Three steps of a ring take 30 s; 10 s twice for logits by a tree: no layer hides more than its own seconds.
    layers = len([m for m in slow.messages if m.kind != "all-reduce"])
    assert slow.communication == pytest.approx(30 * layers + 40)
    timing = Setting(SIMPLE, 4).timing
    local = [timing(traced.work(layer, 4, 4)) for layer in traced.layers if layer.kind == "two-level"]
    assert slow.hidden == pytest.approx(sum(s.local_forward + s.local_backward for s in local))
    assert 0 < slow.hidden < slow.compute


def two_level(representatives):
    """A layer of 8 channels in 4 groups on 100 pixels."""
    sizes = {"channels_in": 8, "channels_out": 8, "pixels_in": 100, "pixels_out": 100}
    groups = {"groups": 4, "all_groups": 4, "representatives": representatives}
    return Work(kind="two-level", batch=1, taps=9, **groups, **sizes)


def test_a_measured_machine_takes_as_long_for_each_representative_as_for_the_first():
    def table(axes, forward, backward):
        return Table(tuple((axis, (1.0,)) for axis in axes), (forward,), (backward,))

    tables = {
        f"{kind} spatial": table(AXES[f"{kind} spatial"], *seconds)
        for kind, seconds in (("conv", (2.0, 5.0)), ("two-level", (3.0, 9.0)))
    }
    timing = Timing(replace(SIMPLE, tables=tables, precision="float32"))
    assert astuple(timing(two_level(1))) == pytest.approx((3.0, 9.0, 2.0, 5.0))
    assert astuple(timing(two_level(4))) == pytest.approx((6.0, 21.0, 2.0, 5.0))


@pytest.mark.parametrize("representatives", [1, 2, 8])
def test_a_preset_takes_the_products_of_all_representatives(representatives):
    """1 GFLOP/s and 1 GB/s: 2 m R G operations a pixel, or the input and twice the output of 4 bytes each."""
    machine = replace(SIMPLE, representative=1e-3)
    found = Timing(machine)(two_level(representatives))
    products, moved = 2 * 800 * 4 * representatives * 1e-9, 3 * 800 * 4e-9
    more = representatives * 100 * 1e-3 / 3  # a pixel and representative, a third of it forward
    assert found.forward - found.local_forward == pytest.approx(max(products, moved) + more)
    backward = max(2 * products, 5 * 800 * 4e-9)
    assert found.backward - found.local_backward == pytest.approx(backward + 2 * more)


def test_backward_hides_the_gradients_of_replicas():
    traced = workload("wrn-10-2")
    free = group_cost(traced, Setting(with_link(0, 1e15), 4), "sc", data=2, group=1)
    assert free.exposed == pytest.approx(0, abs=1e-6)
    slow = group_cost(traced, Setting(with_link(100.0, 1e15), 4), "sc", data=2, group=1)
    assert slow.collectives == {"all-reduce": 2, "broadcast": 2}
    # Each of the buckets takes 200 s, one after the other, from when the first is ready; statistics 100 s before.
    assert slow.exposed == pytest.approx(600, rel=0.01)
    assert slow.exposed < 600


def test_stages_work_one_after_the_other_and_microbatches_at_once():
    traced, setting = workload("wrn-10-2"), Setting(with_link(0, 1e15), 8)
    alone = group_cost(traced, setting, "sc", data=1, group=1)
    naive = pipeline_cost(traced, setting, "naive", stages=2, microbatches=1)
    # The same work; only the optimiser's is divided.
    assert naive.step == pytest.approx(alone.step, rel=0.05)
    gpipe, interleaved = (
        pipeline_cost(traced, setting, s, stages=2, microbatches=4) for s in ("gpipe", "1f1b")
    )
    assert gpipe.step == interleaved.step < naive.step
    assert interleaved.activation_bytes < gpipe.activation_bytes
    # Each of four microbatches takes a quarter, and the last stage waits once for the first one.
    assert gpipe.bubble == pytest.approx(naive.bubble / 4, rel=0.01)


def test_one_rank_communicates_nothing():
    traced, setting = workload("wrn-10-2", "gc2l", 4), Setting(SIMPLE, 4)
    dense = workload("wrn-10-2")
    for cost in (
        group_cost(traced, setting, "gc2l", data=1, group=1),
        fsdp_cost(dense, setting, "sc", ranks=1),
    ):
        assert cost.messages == ()
        assert cost.step == cost.compute
    assert channel_cost(dense, setting, data=1, ranks=1).messages == ()


def test_channel_parallelism_sends_every_channel_and_a_group_one_of_each():
    dense, grouped, setting = (
        workload("wrn-28-4", size=32),
        workload("wrn-28-4", "gc2l", 4, 32),
        Setting(SIMPLE, 4),
    )
    channel, group = (
        channel_cost(dense, setting, data=1, ranks=4),
        group_cost(grouped, setting, "gc2l", data=1, group=4),
    )
    assert channel.bytes_sent > 10 * group.bytes_sent


@pytest.mark.parametrize("conv", ["flgc", "dgconv", "dgc", "lgc", "shuffle", "bgc"])
def test_convolutions_that_are_not_known_are_refused(conv):
    with pytest.raises(UserError, match="the cost model knows conv sc, gc and gc2l"):
        trace(models.create("wrn-10-1", conv=conv, groups=1 if conv == "dgconv" else 4), (3, 16, 16))


def test_network_is_left_as_it_was():
    network = models.create("wrn-10-1", conv="gc2l", groups=4)
    network.bn.eval()
    modes = [module.training for module in network.modules()]
    trace(network, (3, 16, 16))
    assert [module.training for module in network.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_layer_that_is_the_whole_network():
    layers = trace(nn.Sequential(nn.Conv2d(4, 8, 3, bias=False)), (4, 8, 8)).layers
    assert [(layer.kind, layer.size) for layer in layers] == [("conv", 288)]
