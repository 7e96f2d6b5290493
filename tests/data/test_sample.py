"""The bundled sample, and through it the splits that live in memory."""

import pytest
import torch

from twolevel.data import DataConfig, load, memory, sample
from twolevel.data.cifar import MEAN_STD, read
from twolevel.errors import UserError

BATCH = 40


def sample_data(**arguments):
    config = DataConfig(batch_size=arguments.pop("batch_size", BATCH), augment=arguments.pop("augment", True))
    return load(config, **{"seed": 0, "device": "cpu", **arguments})


def stacked(batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def as_bytes(images: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in MEAN_STD["cifar10"])
    return ((images * std + mean) * 255).round().to(torch.uint8)


def test_sample_is_balanced():
    train, test, classes = sample.load_sample()
    assert train.images.shape == (2000, 3, 32, 32) and test.images.shape == (500, 3, 32, 32)
    assert train.labels.bincount().tolist() == [200] * 10
    assert test.labels.bincount().tolist() == [50] * 10
    assert classes[0] == "airplane" and classes[9] == "truck"


def test_sample_cites_its_origin():
    assert "Krizhevsky" in (sample.FOLDER / "labels.json").read_text()


def test_sample_is_the_first_images_of_each_class_of_the_real_data(data_root):
    *real_splits, classes = read("cifar10", data_root)
    *sample_splits, sample_classes = sample.load_sample()
    assert sample_classes == classes
    for real, ours, num in zip(real_splits, sample_splits, (200, 50), strict=True):
        seen = [0] * 10
        chosen = []
        for i, label in enumerate(real.labels.tolist()):
            if seen[label] < num:
                seen[label] += 1
                chosen.append(i)
        assert torch.equal(ours.images, real.images[chosen])
        assert torch.equal(ours.labels, real.labels[chosen])


def test_a_sheet_gives_back_the_images_written_to_it(tmp_path):
    images = sample.load_sample()[1].images[:50].flip(0)
    sample._write_sheet(tmp_path / "sheet.webp", images)
    assert torch.equal(sample._read_sheet(tmp_path / "sheet.webp"), images)


def test_a_damaged_installation_is_a_line_that_says_so(tmp_path):
    with pytest.raises(UserError, match=r"bundled sample is damaged .*labels\.json"):
        sample.load_sample(tmp_path)


def test_batches_are_float_images_in_channels_last_with_their_labels():
    data = sample_data()
    images, labels = next(data.train.batches(0))
    assert images.shape == (BATCH, *data.image_shape) and images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.shape == (BATCH,) and labels.dtype == torch.int64
    assert (data.num_classes, len(data.classes), len(data.train), len(data.test)) == (10, 10, 2000, 500)
    assert data.train.steps_per_epoch == len(list(data.train.batches(0))) == 50


def test_without_augmentation_an_epoch_is_the_images_themselves_once_each():
    images, labels = stacked(sample_data(augment=False).train.batches(0))
    train, _, _ = sample.load_sample()
    # The byte sums weighted by position identify an image: 2,000 different values in the sample.
    weights = torch.arange(1, 3073)
    keys = (train.images.flatten(1).long() * weights).sum(1)
    found = (as_bytes(images).flatten(1).long() * weights).sum(1)
    assert len(keys.unique()) == 2000
    assert torch.equal(found.sort().values, keys.sort().values)
    assert torch.equal(labels[found.argsort()], train.labels[keys.argsort()])


def test_augmented_images_are_crops_and_flips_of_the_drawn_images(monkeypatch):
    plain, labels = next(sample_data(augment=False).train.batches(5))
    augmented, same_labels = next(sample_data().train.batches(5))
    assert torch.equal(labels, same_labels)
    assert not torch.equal(plain, augmented)
    centred = torch.tensor([[4], [4], [0]])  # offset 4 of a padding of 4 is the image itself
    monkeypatch.setattr(memory, "draw_crops", lambda num, generator: centred.expand(3, num))
    centred_images, _ = next(sample_data().train.batches(5))
    assert torch.equal(plain, centred_images)


def test_batches_depend_on_seed_epoch_and_position_alone():
    torch.manual_seed(1)
    first = stacked(sample_data(seed=3).train.batches(2))[0]
    torch.manual_seed(2)
    data = sample_data(seed=3)
    list(data.train.batches(0))
    assert torch.equal(stacked(data.train.batches(2))[0], first)
    assert not torch.equal(stacked(data.train.batches(3))[0], first)
    assert not torch.equal(stacked(sample_data(seed=4).train.batches(2))[0], first)


def test_every_seed_epoch_and_position_has_its_own_crops(monkeypatch):
    seeds = []
    draw = memory.draw_crops
    monkeypatch.setattr(memory, "draw_crops", lambda num, g: seeds.append(g.initial_seed()) or draw(num, g))
    for seed in range(2):
        train = sample_data(seed=seed).train
        for epoch in range(2):
            list(train.batches(epoch))
    assert len(set(seeds)) == len(seeds) == 2 * 2 * 50


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_shards_of_the_ranks_join_to_the_single_batches(data_size):
    single = list(sample_data().train.batches(1))
    shards = [
        list(sample_data(data_rank=rank, data_size=data_size).train.batches(1)) for rank in range(data_size)
    ]
    for i, (images, labels) in enumerate(single):
        assert torch.equal(torch.cat([shard[i][0] for shard in shards]), images)
        assert torch.equal(torch.cat([shard[i][1] for shard in shards]), labels)


def test_start_gives_the_rest_of_the_epoch_and_computes_nothing_before_it(monkeypatch):
    train = sample_data().train
    whole = list(train.batches(1))
    calls = []
    draw = memory.draw_crops
    monkeypatch.setattr(memory, "draw_crops", lambda *args: calls.append(args) or draw(*args))
    rest = list(train.batches(1, start=47))
    assert len(rest) == len(calls) == 3
    for (images, labels), (expected, expected_labels) in zip(rest, whole[47:], strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


@pytest.mark.parametrize("data_size", [1, 2, 3, 4])
def test_every_test_image_is_seen_exactly_once_over_the_ranks(data_size):
    _, test, _ = sample.load_sample()
    images, labels = stacked(
        batch
        for rank in range(data_size)
        for batch in sample_data(batch_size=12, data_rank=rank, data_size=data_size).test.eval_batches(64)
    )
    assert torch.equal(as_bytes(images), test.images)
    assert torch.equal(labels, test.labels)


def test_evaluation_batches_have_at_most_the_asked_size():
    sizes = [len(labels) for _, labels in sample_data().test.eval_batches(64)]
    assert sizes == [64] * 7 + [52]


def test_dtype_is_the_asked_one():
    images, _ = next(sample_data(dtype=torch.float64).test.eval_batches(8))
    assert images.dtype == torch.float64


def test_batch_size_that_cannot_be_cut_is_refused_by_load():
    with pytest.raises(UserError, match="batch_size=40 does not divide over 3"):
        sample_data(data_size=3)
    with pytest.raises(UserError, match="batch_size=2001 is more than the 2000"):
        sample_data(batch_size=2001)
