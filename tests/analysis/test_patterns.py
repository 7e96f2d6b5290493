"""What is collected of learned and dynamic groups, on layers made by hand, and that it is what is drawn."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from twolevel.analysis import pattern_figures as draw
from twolevel.analysis.patterns import (
    Patterns,
    by_group,
    connections,
    group_numbers,
    group_sizes,
    kept_patterns,
    layers_of,
    spread,
)
from twolevel.nn import DGConv2d, DynamicGroupConv2d, FLGConv2d, LearnedGroupConv2d


def layer_by_brightness() -> DynamicGroupConv2d:
    """Head 0 wants the two brightest of four channels; head 1 the channels mirrored to those."""
    layer = DynamicGroupConv2d(4, 4, 1, groups=2, xi=0.5, reduction=1)
    layer.set_progress(1)
    with torch.no_grad():
        layer.squeeze.copy_(torch.eye(4).repeat(2, 1))
        layer.excite.copy_(torch.cat([torch.eye(4), torch.eye(4).flip(0)]))
        layer.offset.zero_()
    return layer


def images_of(*channels: list[float]) -> torch.Tensor:
    return torch.tensor(channels, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 3, 3)


BRIGHTNESS = images_of([1, 2, 3, 4], [4, 3, 2, 1], [4, 1, 3, 2], [1, 2, 4, 3])


def test_drops_are_counted_over_all_batches():
    layer = layer_by_brightness()
    batches = [
        (BRIGHTNESS[:3], torch.zeros(3, dtype=torch.int64)),
        (BRIGHTNESS[3:], torch.zeros(1, dtype=torch.int64)),
    ]
    patterns = kept_patterns(nn.Sequential(layer), {"0": layer}, batches, 1)
    # Dropped by head 0, image by image: 0 1, 2 3, 1 3, 0 1.
    expected = torch.tensor([[2, 3, 1, 2], [2, 1, 3, 2]], dtype=torch.float64) / 4
    assert torch.equal(patterns.dropped["0"], expected)
    assert patterns.num_images == 4


def test_kept_is_what_the_layer_keeps_of_its_own_input():
    torch.manual_seed(0)
    layers = [DynamicGroupConv2d(8, 8, 3, padding=1, groups=groups, xi=0.5) for groups in (2, 4)]
    for layer in layers:
        layer.set_progress(1)
    model = nn.Sequential(*layers).eval()
    images = torch.randn(5, 8, 6, 6)
    patterns = kept_patterns(model, layers_of(model, DynamicGroupConv2d), [(images, torch.arange(5))], 5)
    with torch.no_grad():
        inputs = [images, layers[0](images)]
    for name, layer, x in zip(["0", "1"], layers, inputs, strict=True):
        assert torch.equal(patterns.kept[name], layer.kept(x))
    assert not torch.equal(layers[1].kept(inputs[0]), patterns.kept["1"])  # the test can tell


@pytest.mark.parametrize(("number", "shown"), [(1, [3]), (3, [3, 1, 0]), (9, [3, 1, 0, 2])])
def test_the_images_shown_are_the_first_of_each_class(number, shown):
    layer = layer_by_brightness()
    labels = torch.tensor([3, 3, 1, 3, 1, 0, 3, 2])
    images = torch.arange(8.0)[:, None, None, None] + BRIGHTNESS.repeat(2, 1, 1, 1) / 8
    batches = [(images[at], labels[at]) for at in (slice(0, 2), slice(2, 5), slice(5, 8))]
    patterns = kept_patterns(nn.Sequential(layer), {"0": layer}, batches, number)
    first = [labels.tolist().index(label) for label in shown]
    assert patterns.labels.tolist() == shown
    assert torch.equal(patterns.images, images[first])
    assert torch.equal(patterns.kept["0"], layer.kept(images[first]))
    assert patterns.num_images == 8


@pytest.mark.parametrize("channels", [4, 3])
def test_the_network_is_left_as_it_was(monkeypatch, channels):
    """Also by a forward that fails."""
    layer = layer_by_brightness()
    model = nn.Sequential(layer, nn.BatchNorm2d(4)).train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = BRIGHTNESS[:, :channels], torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="takes") if channels == 3 else nullcontext():
        kept_patterns(model, {"0": layer}, [batch], 1)
    assert [m.training for m in (model, layer, layer.norm, model[1])] == [True, True, True, False]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    watched = []
    monkeypatch.setattr(layer, "kept", watched.append)
    model(BRIGHTNESS)
    assert not watched


@pytest.mark.parametrize("number", [1, 2, 5, 6, 7, 12, 33])
def test_chosen_layers_go_evenly_from_the_first_to_the_last(number):
    layers = {f"layer{i}": i for i in range(number)}
    chosen = [*spread(layers, 6).values()]
    assert len(chosen) == min(number, 6)
    assert (chosen[0], chosen[-1]) == (0, number - 1)
    steps = np.diff(chosen)
    assert number == 1 or (min(steps) >= 1 and max(steps) - min(steps) <= 1)


def gated(gates: list[bool], *shape: int) -> DGConv2d:
    layer = DGConv2d(*shape, 1)
    layer.gates.data = torch.tensor([1.0 if is_open else -1.0 for is_open in gates])
    return layer


def learned(inputs: list[int], outputs: list[int], groups: int) -> FLGConv2d:
    layer = FLGConv2d(len(inputs), len(outputs), 1, groups=groups)
    for logits, of in ((layer.input_logits, inputs), (layer.output_logits, outputs)):
        logits.data = nn.functional.one_hot(torch.tensor(of), groups).float()
    return layer


LAYERS = {
    "dense": (gated([True, True, True], 8, 8), [(8, 8)]),
    "contiguous": (gated([False, True, True], 8, 8), [(4, 4)] * 2),
    "interleaved": (gated([True, False, False], 8, 24), [(6, 2)] * 4),
    "unequal": (learned([1, 0, 1, 1, 2, 2], [2, 2, 0, 1], 3), [(1, 3), (1, 1), (2, 2)]),
    # Group 0 has no input: its outputs see nothing. Group 2 has no output: its input is not seen.
    "empty": (learned([2, 1, 3, 1], [0, 3, 1, 0, 3, 3], 4), [(1, 2), (3, 1)]),
}


def test_connections_of_learned_groups_are_the_weights_that_reach_the_output():
    layer = LearnedGroupConv2d(8, 12, 1, groups=4)
    layer.set_progress(0.4)
    with torch.no_grad():
        reached = layer(torch.eye(8)[:, :, None, None])[:, :, 0, 0].t()
    mask = connections(layer)
    assert torch.equal(mask, reached != 0)
    rows, _ = by_group(mask)
    assert all(len({row % 4 for row in group}) == 1 for group in rows.view(4, 3).tolist())


@pytest.mark.parametrize("name", LAYERS)
def test_connections_are_the_weights_that_reach_the_output(name):
    layer, _ = LAYERS[name]
    layer.weight.data.fill_(1.0)
    with torch.no_grad():
        reached = layer(torch.eye(layer.in_channels)[:, :, None, None])[:, :, 0, 0].t()
    assert torch.equal(connections(layer), reached != 0)


@pytest.mark.parametrize("name", LAYERS)
def test_ordered_by_group_a_mask_is_blocks_along_the_diagonal(name):
    layer, blocks = LAYERS[name]
    mask = connections(layer)
    rows, columns = by_group(mask)
    assert sorted(rows.tolist()) == [*range(len(mask))]
    assert sorted(columns.tolist()) == [*range(mask.shape[1])]
    diagonal = torch.block_diag(*(torch.ones(block) for block in blocks)).bool()
    expected = torch.zeros_like(mask)
    expected[: diagonal.shape[0], : diagonal.shape[1]] = diagonal
    assert torch.equal(mask[rows][:, columns], expected)


def test_records_give_the_groups_over_epochs():
    gates = [{"a": [True, True], "b": [True, False, True]}, {"a": [False, True], "b": [False] * 3}]
    numbers = group_numbers([{"epoch": i, "dgconv_gates": g} for i, g in enumerate(gates)])
    assert numbers == {"a": [1, 2], "b": [2, 8]}
    sizes = group_sizes([{"flgc_groups": {"a": [[3, 1], [5, 3]]}}, {"flgc_groups": {"a": [[2, 2], [8, 0]]}}])
    inputs, outputs = sizes["a"]
    assert inputs.tolist() == [[3, 1], [2, 2]] and outputs.tolist() == [[5, 3], [8, 0]]


def bitmaps(figure) -> list[torch.Tensor]:
    return [torch.tensor(np.asarray(axes.images[0].get_array())) for axes in figure.axes if axes.images]


@pytest.fixture
def patterns() -> Patterns:
    torch.manual_seed(0)
    kept = {"first": torch.rand(2, 4, 16) > 0.5, "last": torch.rand(2, 2, 40) > 0.5}
    dropped = {name: torch.rand(layer.shape[1:], dtype=torch.float64) for name, layer in kept.items()}
    return Patterns(torch.zeros(2, 3, 5, 5), torch.tensor([1, 0]), kept, dropped, 70)


def test_each_cell_is_what_the_heads_kept_of_its_image(patterns):
    pictures = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    figure = draw.kept_channels(patterns, pictures, ["cat", "dog"], "a run", "from there")
    drawn = bitmaps(figure)
    first, last = patterns.kept["first"], patterns.kept["last"]
    expected = [pictures[0], first[0], last[0], pictures[1], first[1], last[1]]
    for got, wanted in zip(drawn, expected, strict=True):
        assert torch.equal(got.double(), torch.as_tensor(wanted).double())
    dropped, kept = (sum(figure.axes[1].images[0].cmap(value)[:3]) for value in (0.0, 1.0))
    assert dropped < 1 < 2 < kept  # dark, light
    assert "a run" in figure.get_suptitle() and figure.get_supxlabel() == "from there"


def test_drop_frequencies_are_drawn_sorted_and_by_channel(patterns):
    figure = draw.drop_frequency(patterns, "a run")
    for column, (name, dropped) in enumerate(patterns.dropped.items()):
        above, below = figure.axes[column], figure.axes[column + 2]
        lines = torch.tensor(np.array([line.get_ydata() for line in above.lines]))
        assert torch.equal(lines, dropped.sort(1).values)
        assert torch.equal(torch.tensor(np.asarray(below.images[0].get_array())), dropped)
        assert below.images[0].get_clim() == (0, 1)
        assert above.get_title().startswith(name)
    assert "70 test images" in figure.get_suptitle()


def test_groups_are_drawn_over_their_epochs():
    numbers = {"first": [1, 2, 8], "last": [4, 4, 4]}
    left, right, _ = draw.groups_over_epochs([2, 3, 4], numbers, "a run").axes
    assert left.get_yscale() == "log"
    assert [[*line.get_xdata()] for line in left.lines] == [[2, 3, 4]] * 2
    assert [[*line.get_ydata()] for line in left.lines] == [*numbers.values()]
    assert right.collections[0].get_array().tolist() == [*numbers.values()]


def test_group_sizes_are_stacked_to_all_channels():
    sizes = {"layer": (torch.tensor([[3, 1], [2, 2]]), torch.tensor([[5, 3], [8, 0]]))}
    above, below = draw.group_sizes_over_epochs([1, 2], sizes, "a run").axes
    for axes, bounds in ((above, [[3, 2], [4, 4]]), (below, [[5, 8], [8, 8]])):
        drawn = [patch.get_data() for patch in axes.patches]
        assert [values.tolist() for values, _, _ in drawn] == bounds
        assert [np.broadcast_to(base, 2).tolist() for _, _, base in drawn] == [[0, 0], bounds[0]]
        assert drawn[0][1].tolist() == [0.5, 1.5, 2.5]


def test_a_mask_is_drawn_as_it_is_and_by_group():
    mask = connections(LAYERS["interleaved"][0])
    figure = draw.connectivity({"layer": mask}, "a run")
    rows, columns = by_group(mask)
    for got, wanted in zip(bitmaps(figure), (mask, mask[rows][:, columns]), strict=True):
        assert torch.equal(got.bool(), wanted)
    assert "25 % connected" in figure.axes[0].get_title()
