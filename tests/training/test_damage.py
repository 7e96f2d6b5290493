"""Of a checkpoint that is not what was written none is used: it is named, and the one before taken."""

import json
import os
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from command import command, records, run, seal

from twolevel.errors import UserError
from twolevel.training import checkpoint

RANKS = 2
OLDER, NEWER = "step-00000002", "step-00000004"


@pytest.fixture(scope="module")
def trained(pool, tiny, tmp_path_factory) -> Path:
    """A run of two ranks with checkpoints after its steps 2 and 4."""
    output = tmp_path_factory.mktemp("damage") / "run"
    words = ["--checkpoint-steps", 2, "--max-steps", 4, "--keep-checkpoints", 5, "--no-keep-best"]
    run(pool, "train", *tiny, "--output", output, *words, ranks=RANKS)
    shutil.rmtree(output / "checkpoints" / "step-00000003")  # of the first epoch's end
    assert sorted(os.listdir(output / "checkpoints")) == [OLDER, NEWER]
    return output


def copy_of(trained: Path, to: Path) -> Path:
    """Its checkpoints alone, the newer one's files written again (links of the older ones are enough)."""
    to.mkdir()
    shutil.copytree(trained / "checkpoints" / OLDER, to / OLDER, copy_function=os.link)
    shutil.copytree(trained / "checkpoints" / NEWER, to / NEWER)
    return to / NEWER


def cut(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def zero(file: Path, rng: random.Random) -> None:
    """A page of it, as a file system leaves what it had no time to write."""
    content = bytearray(file.read_bytes())
    begin = rng.randrange(len(content))
    end = min(len(content), begin + 4096)
    if not any(content[begin:end]):
        begin, end = 0, len(content)
    content[begin:end] = bytes(end - begin)
    file.write_bytes(content)


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def remove(file: Path, rng: random.Random) -> None:
    file.unlink()


def lengthen(file: Path, rng: random.Random) -> None:
    with file.open("ab") as end:
        end.write(rng.randbytes(rng.randrange(1, 5000)))


def older(file: Path, rng: random.Random) -> None:
    """The same file of the checkpoint before."""
    shutil.copy(file.parents[1] / OLDER / file.name, file)


DAMAGES = [cut, zero, flip, remove, lengthen, older]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("which", ["shard-00001", "shard-00002", "state.json", "SHA256SUMS"])
def test_the_one_before_is_taken_and_the_damage_named(trained, tmp_path, damage, which):
    """The file is damaged in ten places, one after the other: 240 variants with what stands below."""
    rng = random.Random(f"{damage.__name__} {which}")
    for number in range(10):
        newer = copy_of(trained, tmp_path / str(number))
        (file,) = newer.glob(f"{which}*")
        damage(file, rng)
        with pytest.warns(UserWarning, match=f"{NEWER} is damaged: .*; taking {OLDER} instead"):
            assert checkpoint.newest_good(newer.parent) == newer.parent / OLDER


def test_swapped_shards_are_no_checkpoint(trained, tmp_path):
    newer = copy_of(trained, tmp_path / "swapped")
    first, second = sorted(newer.glob("*.safetensors"))
    first.rename(newer / "third")
    second.rename(first)
    (newer / "third").rename(second)
    with pytest.warns(UserWarning, match=rf"{first.name} is not what was written"):
        assert checkpoint.newest_good(newer.parent) == newer.parent / OLDER


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", ".hidden", "-x"])
def test_checksums_name_no_file_outside_of_the_checkpoint(trained, tmp_path, name):
    newer = copy_of(trained, tmp_path / "names")
    lines = (newer / checkpoint.SUMS).read_text().splitlines()
    (newer / checkpoint.SUMS).write_text("\n".join([*lines, f"{'0' * 64}  {name}", ""]))
    with pytest.raises(UserError, match="SHA256SUMS is not what was written"):
        checkpoint.verify(newer)


def test_a_shard_too_many_and_one_too_few_are_damage(trained, tmp_path):
    newer = copy_of(trained, tmp_path / "number")
    shutil.copy(next(newer.glob("*.safetensors")), newer / "another.safetensors")
    with pytest.raises(UserError, match=r"another\.safetensors is not one of its files"):
        checkpoint.verify(newer)
    seal(newer)  # with three shards of two ranks
    with pytest.raises(UserError, match="SHA256SUMS is not what was written"):
        checkpoint.verify(newer)


def whole(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, put together from its shards."""
    types = {"random": torch.uint8}
    shapes = checkpoint.shapes(path)
    tensors = {
        name: torch.zeros(shape, dtype=types.get(name.partition(".")[0], torch.float64))
        for name, shape in shapes.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process here
        checkpoint.load(path, tensors)
    return tensors


def test_a_good_checkpoint_is_taken_in_silence(trained, tmp_path, recwarn):
    newer = copy_of(trained, tmp_path / "good")
    assert checkpoint.newest_good(newer.parent) == newer
    assert not recwarn


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_to_the_same_end(
    pool, tiny, trained, tmp_path
):
    """Of the two ranks one alone reads the damaged shard."""
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "run"
    run(pool, "train", *tiny, "--output", undisturbed, "--max-steps", 6, ranks=RANKS)
    shutil.copytree(trained, output)
    flip(next((output / "checkpoints" / NEWER).glob("shard-00002*")), random.Random(0))
    first, _ = run(pool, "train", *tiny, "--output", output, "--resume", "--max-steps", 6, ranks=RANKS)
    assert f"{NEWER} is damaged" in first.err and f"is {NEWER}.damaged from now on" in first.err
    assert "from step 2" in first.out and (output / "checkpoints" / f"{NEWER}.damaged").is_dir()
    losses = [[r["loss"] for r in records(folder, "step")] for folder in (output, undisturbed)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    ends = [whole(folder / "checkpoints" / "step-00000006") for folder in (output, undisturbed)]
    assert ends[0].keys() == ends[1].keys() and any(name.startswith("momentum.") for name in ends[0])
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_where_all_are_damaged_the_run_does_not_start_anew(pool, tiny, trained, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    for state in output.glob("checkpoints/*/state.json"):
        state.write_text("{}")
    outcomes = pool.run(
        command, "train", *tiny, "--output", output, "--resume", ranks=RANKS, init=False, timeout=90
    )
    for outcome in outcomes:
        assert outcome.code == 2 and "can be used" in outcome.err
        assert OLDER in outcome.err and NEWER in outcome.err
    assert sorted(os.listdir(output / "checkpoints")) == [OLDER, NEWER]


@pytest.mark.parametrize(
    ("left", "then"),
    [
        ({".step-00000004.unfinished": 2}, [OLDER, NEWER]),
        ({".step-00000004.replaced": 4}, [OLDER, NEWER]),
        ({".step-00000006.replaced": 4}, [OLDER, NEWER, "step-00000006"]),
    ],
)
def test_what_a_crash_left_is_brought_in_order(trained, tmp_path, left, then):
    newer = copy_of(trained, tmp_path / "crash")
    for name, step in left.items():
        shutil.copytree(newer.parent / f"step-{step:08d}", newer.parent / name)
    checkpoint.recover(newer.parent)
    assert sorted(os.listdir(newer.parent)) == then


def test_damage_is_named_where_a_run_is_tested(pool, trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    state = copy / "checkpoints" / NEWER / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"step": 5}))
    (outcome,) = run(pool, "evaluate", copy)
    assert f"{NEWER} is damaged: state.json" in outcome.err and f"taking {OLDER} instead" in outcome.err
