"""How every figure of the project is drawn: the rules stand here, once.

Axes of ratios and of quantities that have a zero are linear and begin there, unless their values span decades. Ticks
are plain numbers. There is one legend, outside of the axes, and no point is cut. Whoever reads without colours tells
series by their markers.
"""

import io
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

# Okabe and Ito's colours, told apart by whoever sees few; each is legible on white and on black.
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8A6FD1",
    "#999933",
    "#B2565B",
    "#7F7F7F",
)
MARKERS = "os^Dv<>PpX"
# In a page these stand for the colour of its text and of its lines, which follow the light.
TEXT, LINES = "#010203", "#040506"
PLAIN = FuncFormatter(lambda value, _: f"{value:,.6g}")
SPAN = 8  # of the highest value and the lowest, from which on an axis is logarithmic
WIDTH, HEIGHT = 4.9, 3.3  # inches: at 400 pixels as large as it is drawn


class Series(NamedTuple):
    """Points of one kind: x, y, and how far y reaches below and above, where that is known."""

    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


def new_figure(rows: int = 1, columns: int = 1, *, height: float = HEIGHT) -> tuple[Figure, list[Axes]]:
    """An empty figure for a page, and its axes from left to right and down."""
    figure = Figure(figsize=(WIDTH * columns, height * rows), layout="constrained")
    figure.patch.set_alpha(0)
    axes = [*figure.subplots(rows, columns, squeeze=False).flat]
    for one in axes:
        one.patch.set_alpha(0)
        one.tick_params(colors=TEXT)
        one.spines[:].set_color(LINES)
        for label in (one.xaxis.label, one.yaxis.label, one.title):
            label.set_color(TEXT)
        one.grid(color=LINES, lw=0.5)
        one.set_axisbelow(True)
    return figure, axes


def draw_lines(
    axes: Axes, series: Mapping[str, Series], looks: Mapping[str, tuple[str, str]], *, marked: bool = True
) -> None:
    """Lines with their bands; `looks` are colour and marker by name."""
    for name, (x, y, low, high) in series.items():
        colour, marker = looks[name]
        axes.plot(
            x, y, color=colour, marker=marker if marked else None, ms=5, lw=1.6, label=name, clip_on=False
        )
        if low is not None and high is not None:
            axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)


def looks_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each name, in their order."""
    return {
        name: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(dict.fromkeys(names))
    }


def from_zero(axes: Axes, *, x: bool = False) -> None:
    """Begin the y axis at zero, and the x axis if asked for, with room above the highest point.

    An x axis whose values span a decade is logarithmic instead.
    """
    axes.set_ylim(0, 1.06 * axes.dataLim.y1)
    axes.yaxis.set_major_formatter(PLAIN)
    if not x:
        return
    low, high = axes.dataLim.minposx, axes.dataLim.x1
    if high < SPAN * low:
        axes.set_xlim(0, 1.06 * high)
        axes.xaxis.set_major_formatter(PLAIN)
        return
    axes.set_xscale("log")
    axes.set_xlim(low / 1.15, 1.15 * high)
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PLAIN)


def powers_of_two(axes: Axes, values: Iterable[float]) -> None:
    """An x axis for numbers that double, with a tick at each of `values`."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PLAIN)


def one_legend(figure: Figure, *, columns: int = 3) -> None:
    """The series of all axes, once, below them."""
    found = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    legend = figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False
    )
    for text in legend.get_texts():
        text.set_color(TEXT)


def svg_of(figure: Figure) -> str:
    """The figure as an SVG element whose text and lines take the colours of the page around it."""
    stream = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "twolevel", "font.family": "sans-serif"}
    ):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    return text.replace(TEXT, "currentColor").replace(LINES, "var(--lines)")
