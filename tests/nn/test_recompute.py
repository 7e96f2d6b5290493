"""Blocks computed again in backward: the same bits, less memory, and nothing is sent, counted or drawn twice."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from twolevel.models import create
from twolevel.nn import recompute_blocks
from twolevel.ops.tape import TapedSchedule
from twolevel.settings import RECOMPUTED, UNGROUPED


def batch(number: int = 8, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(number, 3, size, size, generator=generator)
    return images, torch.randint(10, (number,), generator=generator)


def network(name: str = "wrn-10-1", conv: str = "gc2l", **options) -> nn.Module:
    if conv == "gc2l":  # one way to compute it, which no measurement chooses
        options = {"schedule": "overlapped", "kernels": "grouped"} | options
    return create(name, conv=conv, groups=1 if conv in UNGROUPED else 4, num_classes=10, **options).train()


def trained(model: nn.Module, steps: int = 3) -> dict:
    """Losses, gradients of the last step, parameters and statistics."""
    torch.manual_seed(0)  # of dropout
    images, labels = batch()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"losses": losses, "gradients": gradients, "state": model.state_dict()}


def assert_same_bits(found: dict, wanted: dict) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


NETWORKS = [("wrn-10-1", conv, 3) for conv in RECOMPUTED]
NETWORKS += [("resnet18", "gc2l", 8), ("mobilenetv2-cifar", "gc2l", 17), ("condensenet-50", "sc", 24)]


@pytest.mark.parametrize(("name", "conv", "blocks"), NETWORKS)
def test_training_is_the_same_to_the_last_bit(name, conv, blocks):
    model, plain = network(name, conv), network(name, conv)
    assert recompute_blocks(model) == blocks
    assert_same_bits(trained(model, 2), trained(plain, 2))


@pytest.mark.parametrize(
    "form", [("overlapped", "grouped"), ("fused", "grouped"), ("dense", "auto"), ("auto", "auto")]
)
def test_every_schedule_is_computed_again(form):
    options = dict(zip(("schedule", "kernels"), form, strict=True))
    model, plain = network(**options), network(**options)
    recompute_blocks(model)
    assert_same_bits(trained(model), trained(plain))


def test_nothing_reads_what_is_not_computed_again(monkeypatch):
    """The outputs that a wide block only adds up are left as memory happens to be: here, not a number."""
    skipped = []
    forward = TapedSchedule.forward

    def spoilt(self, *args):
        y, z = forward(self, *args)
        if self._skip:
            skipped.append(y.fill_(float("nan")))
        return y, z

    monkeypatch.setattr(TapedSchedule, "forward", spoilt)
    model = network()
    recompute_blocks(model)
    assert_same_bits(trained(model, 1), trained(network(), 1))
    assert len(skipped) == 5  # the second convolution of each block, and the two shortcuts of another shape


def test_dropout_drops_the_same_channels():
    def with_dropout() -> nn.Module:
        model = network()
        for stage in model.stages:
            for block in stage:
                block.conv2 = nn.Sequential(nn.Dropout(0.5), block.conv2)
        return model

    model, plain = with_dropout(), with_dropout()
    recompute_blocks(model)
    assert_same_bits(trained(model), trained(plain))


def held_after_forward(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes that a forward pass leaves for backward."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        logits = model(images)
    held = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
    assert logits.requires_grad  # alive, with all that it needs
    return held


def test_a_block_stores_its_input_and_the_representatives_alone():
    images, _ = batch(16, 32)
    plain = network("wrn-28-1")
    model = copy.deepcopy(plain)
    recompute_blocks(model)
    for one in (model, plain):
        one(images)  # what is made once
    without, bytes_held = held_after_forward(plain, images), held_after_forward(model, images)
    # Of the four maps of a block one is left; stem, first and last layers keep theirs.
    assert bytes_held < 0.35 * without


def test_a_test_and_a_forward_without_gradients_are_as_they_were():
    model, images = network().eval(), batch()[0]
    wanted = model(images)
    recompute_blocks(model)
    assert torch.equal(model(images), wanted)
    with torch.no_grad():
        assert torch.equal(model.train()(images), network()(images))


def test_copies_compute_again_in_their_own_blocks():
    model = network()
    recompute_blocks(model)
    twin = copy.deepcopy(model)
    assert_same_bits(trained(twin), trained(network()))
    assert_same_bits(model.state_dict(), network().state_dict())
    assert recompute_blocks(model) == 0  # nothing is left to do


def test_a_backward_may_be_repeated():
    model, plain, (images, labels) = network(), network(), batch()
    recompute_blocks(model)
    for one in (model, plain):
        loss = F.cross_entropy(one(images), labels)
        loss.backward(retain_graph=True)
        loss.backward()
    gradients = [{n: p.grad for n, p in one.named_parameters()} for one in (model, plain)]
    assert_same_bits(*gradients)
