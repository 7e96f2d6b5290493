"""Pictures of what learned and dynamic group convolutions chose."""

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from torch import Tensor

from twolevel.analysis.patterns import Patterns, by_group

DARK, LIGHT = "#22304a", "#f3e3b3"
# Where a layer has more channels than its cell has pixels, their mean is between the two.
DARK_TO_LIGHT = LinearSegmentedColormap.from_list("dark to light", [DARK, LIGHT])
MANY_COLOURS = 10  # up to here colours that differ as much as they can, then those of a scale


def kept_channels(
    patterns: Patterns, pictures: np.ndarray, names: list[str], title: str, source: str = ""
) -> Figure:
    """Images in rows, layers in columns, a bitmap heads x channels in each cell: kept is light, dropped dark.

    `pictures` `[N, H, W, 3]` (uint8) and `names` are those of the images of `patterns`; `source` is where
    they are from. The patterns are those of Su et al. (arXiv 2007.04242), section 4.
    """
    widths = [0.8, *(_inches(kept.shape[2]) for kept in patterns.kept.values())]
    width = max(8, sum(widths) + 0.6 * len(widths) + 1)
    figure = Figure(figsize=(width, 1.0 * len(names) + 1.4), layout="constrained")
    grid = figure.subplots(len(names), len(widths), squeeze=False, width_ratios=widths)
    for row, picture, name in zip(grid, pictures, names, strict=True):
        row[0].imshow(picture)
        row[0].set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for column, (layer, kept) in zip(grid.T[1:], patterns.kept.items(), strict=True):
        heads, channels = kept.shape[1:]
        for axes, bitmap in zip(column, kept, strict=True):
            _bitmap(axes, bitmap.float(), DARK_TO_LIGHT)
            axes.set_yticks([0, heads - 1])
            axes.tick_params(labelbottom=axes is column[-1])
        column[0].set_title(f"{layer}\n{channels} channels", fontsize=9)
        column[-1].set_xlabel("channel")
    grid[0, 1].set_ylabel("head")
    figure.legend(
        handles=[Patch(facecolor=LIGHT, edgecolor="gray", label="kept"), Patch(color=DARK, label="dropped")],
        loc="outside right upper",
    )
    figure.suptitle(f"Channels that each head keeps of an image\n{title}")
    if source:
        figure.supxlabel(source, fontsize=7)
    return figure


def drop_frequency(patterns: Patterns, title: str) -> Figure:
    """How often each channel is dropped: above sorted, a line for each head; below by channel, heads in rows."""
    layers = patterns.dropped
    figure = Figure(figsize=(max(7, 3 * len(layers)), 5.2), layout="constrained")
    grid = figure.subplots(2, len(layers), squeeze=False, height_ratios=[2, 1])
    for (above, below), (layer, dropped) in zip(grid.T, layers.items(), strict=True):
        heads, channels = dropped.shape
        for head, (share, colour) in enumerate(zip(dropped, _colours(heads), strict=True)):
            above.step(
                range(channels), share.sort().values.numpy(), color=colour, where="mid", label=f"head {head}"
            )
        mean = 100 * dropped.mean().item()
        above.set_title(f"{layer}\n{channels} channels, {mean:.3g} % dropped", fontsize=9)
        above.set(ylim=(-0.03, 1.03), xlabel="channels, sorted for each head")
        above.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        above.grid(alpha=0.3)
        picture = _bitmap(below, dropped, DARK_TO_LIGHT.reversed())
        below.set_yticks([0, heads - 1])
        below.set_xlabel("channel")
    grid[0, 0].set_ylabel("dropped, share of images")
    grid[1, 0].set_ylabel("head")
    grid[0, 0].legend(fontsize=7)
    figure.colorbar(picture, ax=[*grid.flat], label="dropped, share of images", pad=0.01)
    figure.suptitle(f"How often each channel is dropped, over {patterns.num_images:,} test images\n{title}")
    return figure


def groups_over_epochs(epochs: list[int], numbers: dict[str, list[int]], title: str) -> Figure:
    """The number of groups of each DGConv layer over epochs: as lines, and as a table that shows equal ones."""
    figure = Figure(figsize=(13, max(4.2, 1.4 + 0.16 * len(numbers))), layout="constrained")
    left, right = figure.subplots(1, 2)
    most = max(2, *(max(of_layer) for of_layer in numbers.values()))
    powers = [2**k for k in range(most.bit_length())]
    colours = [colormaps["plasma"](0.85 * i / max(1, len(numbers) - 1)) for i in range(len(numbers))]
    for (layer, groups), colour in zip(numbers.items(), colours, strict=True):
        left.plot(epochs, groups, color=colour, marker=".", label=layer)
    left.set_yscale("log", base=2)
    left.set(ylim=(0.85, 1.2 * most), ylabel="groups", title="Each layer, coloured as on the right")
    _powers_of_two(left.yaxis, powers)
    left.grid(alpha=0.3)

    edges = _edges(epochs)
    rows, table = np.arange(len(numbers) + 1) - 0.5, np.array([*numbers.values()])
    picture = right.pcolormesh(edges, rows, table, norm=LogNorm(1, most), cmap="viridis_r")
    right.invert_yaxis()  # the first layer on top
    right.set_yticks(range(len(numbers)), numbers, fontsize=7)
    for label, colour in zip(right.get_yticklabels(), colours, strict=True):
        label.set_color(colour)
    right.set(title="All layers, from the first to the last")
    for axes in (left, right):
        _epoch_axis(axes, edges)
    bar = figure.colorbar(picture, ax=right, label="groups")
    _powers_of_two(bar.ax.yaxis, powers)
    figure.suptitle(f"Groups that the gates make\n{title}")
    return figure


def group_sizes_over_epochs(epochs: list[int], sizes: dict[str, tuple[Tensor, Tensor]], title: str) -> Figure:
    """How many inputs (above) and outputs (below) the groups of each FLGC layer have, stacked, over epochs."""
    figure = Figure(figsize=(max(7, 2.7 * len(sizes)), 5.2), layout="constrained")
    grid = figure.subplots(2, len(sizes), squeeze=False, sharex=True)
    edges = _edges(epochs)
    for column, (layer, ends) in zip(grid.T, sizes.items(), strict=True):
        for axes, size in zip(column, ends, strict=True):  # [epochs, G]
            tops = size.cumsum(1)
            for group, colour in enumerate(_colours(size.shape[1])):
                bottom, top = (tops - size)[:, group].numpy(), tops[:, group].numpy()
                axes.stairs(top, edges, baseline=bottom, fill=True, color=colour, label=f"group {group}")
            axes.set_ylim(0, int(tops[0, -1]))
            _epoch_axis(axes, edges)
        column[0].set_title(layer, fontsize=9)
        column[0].set_xlabel("")
    grid[0, 0].set_ylabel("input channels")
    grid[1, 0].set_ylabel("output channels")
    if size.shape[1] <= MANY_COLOURS:
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(f"Channels of each group over epochs\n{title}")
    return figure


def connectivity(masks: dict[str, Tensor], title: str) -> Figure:
    """Masks `[m, n]`, connected is dark: above with channels in their order, below ordered by group."""
    figure = Figure(figsize=(max(5, 2.6 * len(masks)), 6.4), layout="constrained")
    grid = figure.subplots(2, len(masks), squeeze=False)
    for column, (layer, mask) in zip(grid.T, masks.items(), strict=True):
        rows, columns = by_group(mask)
        for axes, connected in zip(column, (mask, mask[rows][:, columns]), strict=True):
            _bitmap(axes, connected.float(), DARK_TO_LIGHT.reversed())
            axes.set_box_aspect(1)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        share = 100 * mask.float().mean().item()
        column[0].set_title(
            f"{layer}\n{mask.shape[1]} to {mask.shape[0]}, {share:.3g} % connected", fontsize=9
        )
        column[0].set_xlabel("input channel")
        column[1].set(xticks=[], yticks=[], xlabel="inputs by group")
    grid[0, 0].set_ylabel("output channel")
    grid[1, 0].set_ylabel("outputs by group")
    figure.suptitle(f"Channels that are connected\n{title}")
    return figure


def _bitmap(axes: Axes, values: Tensor, colours: LinearSegmentedColormap) -> AxesImage:
    """A matrix of values in [0, 1], stretched over the axes."""
    return axes.imshow(values.numpy(), cmap=colours, vmin=0, vmax=1, aspect="auto")


def _inches(channels: int) -> float:
    """The width of a bitmap in which single channels can be told from each other up to about 600."""
    return min(max(channels / 100, 1.6), 5.0)


def _edges(epochs: list[int]) -> np.ndarray:
    """The borders between epochs; one without a record is drawn as the last one with a record."""
    return np.array([*epochs, epochs[-1] + 1]) - 0.5


def _epoch_axis(axes: Axes, edges: np.ndarray) -> None:
    axes.set(xlim=(edges[0], edges[-1]), xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def _colours(number: int) -> list[Any]:
    if number <= MANY_COLOURS:
        return [colormaps["tab10"](i) for i in range(number)]
    return [colormaps["turbo"]((i + 0.5) / number) for i in range(number)]


def _powers_of_two(axis: Axis, powers: list[int]) -> None:
    axis.set_major_locator(FixedLocator(powers))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
