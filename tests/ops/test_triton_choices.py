"""How Triton kernels are laid out: groups to a tile, tiles by estimate, and measured choices that are kept on disk."""

from pathlib import Path

import pytest
import torch

from twolevel.errors import UserError
from twolevel.ops import Geometry
from twolevel.ops.kernels import triton as grouped
from twolevel.ops.kernels.triton import choices

pytest.importorskip("triton")
MEASURED = grouped.Config(32, 16, 16, 2, 2)


def test_narrow_groups_are_packed_until_a_tile_is_full():
    def pack(groups, inputs, outputs, maps=0, operation="forward"):
        shapes = (1, groups * inputs, 4, 4), (groups * outputs, inputs, 3, 3)
        geometry = Geometry(padding=(1, 1))
        return grouped.problem_of(*shapes, geometry, groups, torch.float16, maps).pack(operation)

    assert pack(16, 1, 1) == 16
    assert pack(16, 4, 4) == 4
    assert pack(16, 8, 8) == 2
    assert pack(4, 16, 16) == pack(4, 64, 64) == 1
    assert pack(2, 1, 1) == 2
    # Three outputs and the restriction of four groups are the sixteen columns of a tile.
    assert pack(16, 4, 3, maps=1) == pack(16, 4, 1, maps=3) == 4
    assert pack(16, 1, 4, operation="input_grad") == pack(16, 4, 1) == 4


def test_groups_that_begin_where_little_can_be_copied_at_a_time_are_packed():
    """Ten channels are 20 bytes: of two groups every copy is of 8 bytes, of four of 16."""

    def pack(inputs, operation):
        shapes = (1, 16 * inputs, 8, 8), (16 * inputs, inputs, 3, 3)
        return grouped.problem_of(*shapes, Geometry(padding=(1, 1)), 16, torch.bfloat16).pack(operation)

    assert pack(10, "forward") == pack(10, "input_grad") == 2
    assert pack(10, "weight_grad") == 4  # 40 of the 64 rows that are multiplied at once
    assert pack(20, "forward") == 1
    assert pack(20, "weight_grad") == 2
    assert pack(40, "forward") == pack(40, "weight_grad") == 1


@pytest.mark.parametrize("operation", grouped.OPERATIONS)
@pytest.mark.parametrize("width", [1, 16, 40, 160])
def test_estimate_has_no_tile_of_twice_the_channels(operation, width):
    problem = grouped.problem_of(
        (32, 4 * width, 32, 32), (4 * width, width, 3, 3), Geometry(padding=(1, 1)), 4, torch.bfloat16
    )
    for config in grouped.candidates(problem, operation):
        assert grouped.pick(problem, operation, override=config) == config
    best = grouped.pick(problem, operation)
    assert best in grouped.CONFIGS
    inputs = outputs = problem.pack(operation) * width
    if operation == "input_grad":  # every tap has outputs or inputs of its own
        outputs *= problem.taps
    else:
        inputs *= problem.taps
    assert -(-outputs // best.block_out) * best.block_out < 2 * max(16, outputs)
    assert -(-inputs // best.block_in) * best.block_in < 2 * max(16, inputs)


def test_choices_are_kept_on_disk_for_their_problem_and_card_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    problem = grouped.problem_of((2, 32, 8, 8), (32, 16, 3, 3), Geometry(), 2, torch.float16)
    other = grouped.problem_of((4, 32, 8, 8), (32, 16, 3, 3), Geometry(), 2, torch.float16)
    first, second = grouped.Choices(), grouped.Choices()
    first.keep("forward", problem, "card A", MEASURED)
    second.keep("forward", other, "card A", grouped.CONFIGS[0])  # beside what the first has written since
    read = grouped.Choices()
    assert read.get("forward", problem, "card A") == MEASURED
    assert read.get("forward", other, "card A") == grouped.CONFIGS[0]
    assert read.get("input_grad", problem, "card A") is None
    assert read.get("forward", problem, "card B") is None
    files = {path.name for path in (tmp_path / "twolevel").iterdir()}
    assert files == {read.path.name, read.path.with_suffix(".lock").name}  # nothing half written is left
    assert read.get("forward", problem, "card A", "tf32") is None
    assert grouped.pick(problem, "forward", measured=read.get("forward", problem, "card A")) == MEASURED


def test_choices_are_of_these_kernels_and_this_triton_alone(monkeypatch):
    problem, other = (
        grouped.problem_of((batch, 32, 8, 8), (32, 16, 3, 3), Geometry(), 2, torch.float16)
        for batch in (128, 80)
    )
    key = choices.key("forward", problem, "card A")
    assert key.endswith(choices.version())
    assert choices.key("forward", other, "card A") == key  # a smaller last batch is not measured anew
    found = {choices.version()}
    choices.version.cache_clear()
    monkeypatch.setattr(choices.importlib.metadata, "version", lambda name: "3.99")
    assert "triton 3.99 kernels " in choices.version()
    found.add(choices.version())
    choices.version.cache_clear()
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"other kernels")
    found.add(choices.version())
    choices.version.cache_clear()
    assert len(found) == 3


@pytest.mark.parametrize("damage", ["", "[1]", '{"KEY": 3}', '{"KEY": ["wide"]}', '{"KEY": null}'])
def test_damaged_choices_are_as_none(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    problem = grouped.problem_of((2, 32, 8, 8), (32, 16, 3, 3), Geometry(), 2, torch.float16)
    key = choices.key("forward", problem, "card A")
    (tmp_path / "twolevel").mkdir()
    (tmp_path / "twolevel" / choices.FILE).write_text(damage.replace("KEY", key))
    read = grouped.Choices()
    assert read.get("forward", problem, "card A") is None
    read.keep("forward", problem, "card A", MEASURED)
    assert read.get("forward", problem, "card A") == MEASURED


def test_nothing_is_measured_without_a_card():
    x = torch.zeros(1, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    with pytest.raises(UserError, match="x is on cpu"):
        grouped.tune("forward", x, torch.zeros(4, 2, 3, 3), Geometry(), 2)
