"""ImageNet's layout, on a tiny folder of PNG files, with and without worker processes."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from twolevel.data import DataConfig, load, prepare
from twolevel.data.imagenet import MEAN_STD
from twolevel.errors import UserError

CLASSES = ["n01", "n02", "n03"]
SIZES = [(40, 30), (30, 40), (33, 33), (60, 20)]


@pytest.fixture
def root(tmp_path) -> Path:
    """Three classes of four training and two test images of various sizes, every one different."""
    generator = torch.Generator().manual_seed(0)
    for split, num in (("train", 4), ("val", 2)):
        for name in CLASSES:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(num):
                pixels = torch.randint(0, 256, (3, *SIZES[i]), dtype=torch.uint8, generator=generator)
                TF.to_pil_image(pixels).save(folder / f"{i}.png")
    return tmp_path


def folder_data(root: Path, workers: int = 0, augment: bool = True, **arguments):
    config = DataConfig("imagenet", root, batch_size=4, workers=workers, augment=augment, image_size=16)
    return load(config, **{"seed": 0, "device": "cpu", **arguments})


def stacked(batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def assert_same(batches, expected):
    for ours, theirs in zip(batches, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_batches_have_the_common_form(root):
    data = folder_data(root)
    images, labels = next(data.train.batches(0))
    assert images.shape == (4, *data.image_shape) == (4, 3, 16, 16) and images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
    assert (len(data.train), len(data.test), data.train.steps_per_epoch) == (12, 6, 3)
    assert data.classes == CLASSES and data.num_classes == 3


def test_batches_depend_on_seed_epoch_and_position_alone(root):
    first = stacked(folder_data(root).train.batches(1))
    assert_same(stacked(folder_data(root).train.batches(1)), first)
    assert not torch.equal(stacked(folder_data(root).train.batches(2))[0], first[0])
    assert not torch.equal(stacked(folder_data(root, seed=1).train.batches(1))[0], first[0])


def test_workers_decode_the_same_batches_as_the_rank_itself(root):
    alone, helped = folder_data(root), folder_data(root, workers=2)
    assert_same(stacked(helped.train.batches(1)), stacked(alone.train.batches(1)))
    assert_same(stacked(helped.test.eval_batches(4)), stacked(alone.test.eval_batches(4)))


def test_reading_leaves_the_global_stream_alone(root):
    before = torch.get_rng_state()
    list(folder_data(root).train.batches(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_is_cropped_anew_for_each_epoch_and_seed(root):
    for split in ("train", "val"):  # one image in all
        for name in CLASSES[1:]:
            shutil.rmtree(root / split / name)
        for i in range(1, 4):
            (root / split / CLASSES[0] / f"{i}.png").unlink(missing_ok=True)
    config = DataConfig("imagenet", root, batch_size=1, workers=0, image_size=16)
    crops = [
        next(load(config, seed=seed, device="cpu").train.batches(epoch))[0].flatten()
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len(torch.stack(crops).unique(dim=0)) == 3


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_shards_of_the_ranks_join_to_the_single_batches(root, data_size):
    shards = [
        list(folder_data(root, data_rank=rank, data_size=data_size).train.batches(0))
        for rank in range(data_size)
    ]
    for i, (images, labels) in enumerate(folder_data(root).train.batches(0)):
        assert torch.equal(torch.cat([shard[i][0] for shard in shards]), images)
        assert torch.equal(torch.cat([shard[i][1] for shard in shards]), labels)


def test_start_gives_the_rest_of_the_epoch_and_reads_nothing_before_it(root):
    train = folder_data(root).train
    whole = list(train.batches(0))
    rest = list(train.batches(0, start=2))
    assert len(rest) == 1
    assert_same(rest[0], whole[2])


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_every_test_image_is_seen_once_as_torchvision_shows_it(root, data_size):
    images, labels = stacked(
        batch
        for rank in range(data_size)
        for batch in folder_data(root, data_rank=rank, data_size=data_size).test.eval_batches(2)
    )
    transform = v2.Compose([
        v2.Resize(18), v2.CenterCrop(16),  # 18 is 16 * 256/224, rounded
        v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*MEAN_STD),
    ])  # fmt: skip
    paths = sorted((root / "val").rglob("*.png"))
    expected = torch.stack([transform(Image.open(path)) for path in paths])
    # a value of at most 3, rounded once more there than here
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-6, check_stride=False)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_without_augmentation_training_shows_the_images_as_testing_does(root):
    shutil.rmtree(root / "val")
    shutil.copytree(root / "train", root / "val")
    data = folder_data(root, augment=False)
    trained, tested = (
        images[images.flatten(1).sum(1).argsort()]
        for images, _ in (stacked(data.train.batches(0)), stacked(data.test.eval_batches(4)))
    )
    assert torch.equal(trained, tested)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_is_named(root, split):
    shutil.rmtree(root / split)
    with pytest.raises(UserError, match=f"needs the folder {root / split}, which is missing"):
        prepare(DataConfig("imagenet", root))


def test_a_split_without_classes_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path / 'train'} has no class folders"):
        prepare(DataConfig("imagenet", tmp_path))


def test_classes_that_one_split_lacks_are_named(root):
    shutil.rmtree(root / "val" / "n02")
    with pytest.raises(UserError, match=r"differ in 1 classes \(n02\)"):
        folder_data(root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class_is_named(root, split):
    for path in (root / split / "n02").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=f"{root / split / 'n02'} holds no images"):
        folder_data(root)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["not an image", "truncated"])
def test_an_unreadable_image_is_named_in_one_line(root, workers, damage):
    path = root / "train" / "n03" / "1.png"
    path.write_bytes(b"no image" if damage == "not an image" else path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=f"{path} is not a readable image") as caught:
        list(folder_data(root, workers).train.batches(0))
    assert "\n" not in str(caught.value)


def test_a_start_outside_the_epoch_is_named(root):
    with pytest.raises(UserError, match="start=4"):
        list(folder_data(root, workers=1).train.batches(0, start=4))
