"""The order of the images: a function of (seed, epoch, position), however many ranks share it."""

import pytest
import torch

from twolevel.data.order import Order, share
from twolevel.errors import UserError
from twolevel.streams import stream


def epoch_of(order: Order, epoch: int = 0, start: int = 0) -> torch.Tensor:
    """The indices [steps, b/D] of one epoch."""
    return torch.stack([index for _, index in order.batches(epoch, start)])


def test_a_stream_is_the_same_in_every_process():
    # The first eight bytes, little-endian, of `printf order/0/1 | sha256sum`.
    assert stream("order", 0, 1).initial_seed() == 0xC05C9D6D8DC5C7F3


def test_neighbouring_keys_have_different_streams():
    keys = [(seed, epoch, position) for seed in range(4) for epoch in range(4) for position in range(4)]
    draws = {torch.randint(2**62, (), generator=stream(*key)).item() for key in keys}
    assert len(draws) == len(keys)


def test_an_epoch_shows_no_image_twice_and_drops_the_partial_batch():
    epoch = epoch_of(Order(num_images=103, batch_size=10, seed=0))
    assert epoch.shape == (10, 10)
    assert len(epoch.unique()) == 100
    assert epoch.min() >= 0 and epoch.max() < 103


def test_no_image_is_left_out_for_good():
    order = Order(num_images=103, batch_size=10, seed=0)
    assert len(torch.cat([epoch_of(order, epoch) for epoch in range(10)]).unique()) == 103


def test_order_differs_between_seeds_and_epochs_only():
    first, again = (Order(100, 10, seed=3) for _ in range(2))
    assert torch.equal(epoch_of(first, epoch=2), epoch_of(again, epoch=2))
    assert not torch.equal(epoch_of(first, epoch=2), epoch_of(first, epoch=3))
    assert not torch.equal(epoch_of(first, epoch=2), epoch_of(Order(100, 10, seed=4), epoch=2))


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_rows_of_the_ranks_join_to_the_global_batch(data_size):
    shards = [epoch_of(Order(100, 12, 0, rank, data_size)) for rank in range(data_size)]
    assert torch.equal(torch.cat(shards, dim=1), epoch_of(Order(100, 12, 0)))


def test_start_skips_the_batches_before_it():
    order = Order(100, 10, seed=0)
    assert torch.equal(epoch_of(order, start=7), epoch_of(order)[7:])
    assert [position for position, _ in order.batches(0, start=7)] == [7, 8, 9]
    assert list(order.batches(0, start=10)) == []


@pytest.mark.parametrize("start", [-1, 11])
def test_a_start_outside_the_epoch_is_named(start):
    with pytest.raises(UserError, match=f"start={start} .* 10 batches"):
        next(Order(100, 10, seed=0).batches(0, start))


def test_a_batch_larger_than_the_split_is_named():
    with pytest.raises(UserError, match="batch_size=101 is more than the 100 training images"):
        Order(100, 101, seed=0)


def test_a_batch_that_does_not_divide_over_ranks_is_named_with_one_that_does():
    with pytest.raises(UserError, match=r"batch_size=10 .* 4 data-parallel ranks; .* such as 8"):
        Order(100, 10, seed=0, data_rank=0, data_size=4)


@pytest.mark.parametrize(("num_images", "data_size"), [(500, 1), (500, 3), (7, 4), (2, 4)])
def test_shares_cover_the_split_once_and_differ_by_at_most_one(num_images, data_size):
    shares = [share(num_images, rank, data_size) for rank in range(data_size)]
    assert [i for part in shares for i in part] == list(range(num_images))
    sizes = [len(part) for part in shares]
    assert max(sizes) - min(sizes) <= 1
