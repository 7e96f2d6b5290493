"""Augmentation in batches gives exactly what torchvision's transforms give image by image."""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from twolevel.data.augment import Normalise, crop_and_flip, draw_crops, draw_resized_crop
from twolevel.data.memory import LabelledImages, TrainInMemory
from twolevel.data.order import Order


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("size", "padding"), [((32, 32), 4), ((7, 5), 2)])
def test_crop_and_flip_is_torchvisions_for_every_offset(size, padding):
    edge = torch.arange(2 * padding + 1)
    dy, dx, flip = torch.cartesian_prod(edge, edge, torch.arange(2)).T
    images = random_images(len(dy), 3, *size)
    result = crop_and_flip(images, dy, dx, flip, padding)
    assert result.dtype == torch.uint8
    for i, image in enumerate(images):
        expected = TF.crop(TF.pad(image, [padding]), int(dy[i]), int(dx[i]), *size)
        if flip[i]:
            expected = TF.horizontal_flip(expected)
        assert torch.equal(result[i], expected)


def test_crop_and_flip_takes_any_memory_layout():
    images = random_images(6, 3, 32, 32)
    draws = draw_crops(6, torch.Generator().manual_seed(1))
    strided = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(crop_and_flip(strided, *draws), crop_and_flip(images, *draws))


def test_draws_are_uniform_over_offsets_and_flips():
    num = 90_000
    dy, dx, flip = draw_crops(num, torch.Generator().manual_seed(0))
    counts = torch.bincount(dy * 18 + dx * 2 + flip, minlength=162)
    # 162 cells of 556 expected images each; 6 standard deviations of a count
    assert ((counts - num / 162).abs() < 6 * (num / 162) ** 0.5).all()


# With the whole area asked for, no draw fits an image of 2 : 3, and with nearly all of it, the tenth may.
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.7, 0.9), (1.0, 1.0)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (300, 200), (200, 300), (40, 999), (1, 1)])
def test_resized_crop_is_drawn_as_torchvision_draws_it(height, width, scale):
    transform = v2.RandomResizedCrop(224, scale)
    for seed in range(100):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            theirs = transform.make_params([torch.empty(3, height, width)])
        ours = draw_resized_crop(height, width, torch.Generator().manual_seed(seed), scale)
        assert ours == tuple(theirs[key] for key in ("top", "left", "height", "width"))


def test_drawing_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    draw_resized_crop(300, 400, torch.Generator().manual_seed(0))
    draw_crops(8, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


# Byte / 255 is rounded once here and twice there, on values of at most 3: a few ulp of the type.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_normalise_is_torchvisions_in_channels_last(dtype, tolerance):
    images = random_images(4, 3, 8, 8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    result = Normalise(mean, std, torch.device("cpu"), dtype)(images)
    expected = TF.normalize(TF.to_dtype(images, dtype, scale=True), mean, std)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance, check_stride=False)


def test_alternating_flips_show_every_image_both_ways_in_two_epochs():
    order = Order(num_images=64, batch_size=64, seed=3)
    # Pixels whose left half is bright; crops of 4 pixels do not hide which half that is.
    pixels = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    pixels[..., :16] = 255
    data = LabelledImages(pixels, torch.arange(64))
    plain = Normalise((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), torch.device("cpu"), torch.float32)
    split = TrainInMemory(data, plain, order, augment=True, flip="alternating")

    def mirrored(epoch: int) -> torch.Tensor:
        images, labels = next(iter(split.batches(epoch)))
        right_is_brighter = images[..., 16:].sum((1, 2, 3)) > images[..., :16].sum((1, 2, 3))
        return right_is_brighter[labels.argsort()]

    first, second, third = map(mirrored, range(3))
    assert torch.equal(first, ~second) and torch.equal(first, third)
    assert 16 < first.sum() < 48  # 32 of a fair coin; these are four standard deviations
