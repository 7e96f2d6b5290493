"""Calls as CUDA graphs; skipped without a GPU. That forms are timed by them, and what if not, is in test_dispatch."""

import pytest
import torch
from torch.nn import functional as F

from twolevel.ops.replay import replay_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_a_replay_computes_again_what_the_call_computed():
    x, total = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
    replay = replay_of(lambda: total.add_(x))
    total.zero_()
    x.fill_(3)
    for _ in range(2):
        replay()
    assert total.tolist() == [6.0] * 4


def test_gradients_of_what_its_stream_has_computed_are_replayed():
    weight = torch.randn(8, 8, 3, 3, device="cuda", requires_grad=True)
    x, found = torch.randn(2, 8, 5, 5, device="cuda"), torch.empty(8, 8, 3, 3, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = F.conv2d(x, weight)
        gy = torch.randn_like(y)
        (wanted,) = torch.autograd.grad(y, weight, gy, retain_graph=True)
    replay = replay_of(lambda: found.copy_(torch.autograd.grad(y, weight, gy, retain_graph=True)[0]), stream)
    found.zero_()
    replay()
    # float32 (or tf32) sums of some tens of products; algorithms may differ between two calls.
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def test_what_waits_for_the_device_is_refused_and_the_stream_stays_what_it_was():
    before, x = torch.cuda.current_stream(), torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError):
        replay_of(lambda: x.item())
    assert torch.cuda.current_stream() == before
    assert (x + 1).item() == 2
