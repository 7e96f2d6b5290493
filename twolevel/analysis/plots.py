"""How every figure of the project is drawn: the rules stand here, once.

Axes of ratios and of quantities that have a zero are linear and begin there, unless their values span decades. Ticks
are plain numbers. There is one legend, outside of the axes, and no point is cut. Whoever reads without colours tells
series by their markers.
"""

import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
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
MARKERS = "os^Dv<>Pp"  # one less than colours: pairs do not repeat for long


class Theme(NamedTuple):
    """Colours of text, of lines beside it, and of what is behind."""

    text: str
    lines: str
    back: str


# In a page two colours stand for those of its text and of its lines, which follow the light.
PAGE = Theme("#010203", "#040506", "none")
PAPER = Theme("black", "#c9ced6", "white")
PLAIN = FuncFormatter(lambda value, _: f"{value:,.10g}")
SPAN = 8  # of the highest value and the lowest, from which on an axis is logarithmic
LEGEND_LETTERS = 60  # on a line of a legend below axes of WIDTH
WIDTH, HEIGHT = 4.9, 3.3  # inches: at 400 pixels as large as it is drawn


class Series(NamedTuple):
    """Points of one kind: x, y, and how far y reaches below and above, where that is known."""

    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = WIDTH, height: float = HEIGHT, theme: Theme = PAGE
) -> tuple[Figure, list[Axes]]:
    """An empty figure, and its axes, of so many inches each, from left to right and down."""
    size = (width * columns, height * rows)
    figure = Figure(figsize=size, layout="constrained", facecolor=theme.back)
    axes = [*figure.subplots(rows, columns, squeeze=False).flat]
    for one in axes:
        one.set_facecolor(theme.back)
        one.tick_params(colors=theme.text)
        one.spines[:].set_color(theme.lines)
        for label in (one.xaxis.label, one.yaxis.label, one.title):
            label.set_color(theme.text)
        one.grid(color=theme.lines, lw=0.5)
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
    top = 1.06 * axes.dataLim.y1
    axes.set_ylim(0, top if 0 < top < math.inf else 1)  # there may be nothing, or zeros
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
    decades(axes.xaxis)


def decades(axis: Axis) -> None:
    """Plain ticks of a logarithmic axis."""
    axis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(PLAIN)


def powers_of_two(axes: Axes, values: Iterable[float]) -> None:
    """An x axis for numbers that double, with a tick at each of `values`."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PLAIN)


def one_legend(figure: Figure, *, columns: int = 3, beside: bool = False) -> None:
    """The series of all axes, once, below them in so many columns, fewer where names are long, or on their right."""
    found = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    widest = max(map(len, found), default=1)
    columns = max(1, min(columns, LEGEND_LETTERS * len(figure.axes) // (widest + 6)))
    place = "outside right upper" if beside else "outside lower center"
    # matplotlib documents the "outside" places, and its type hints leave them out.
    legend = figure.legend(
        found.values(),
        found.keys(),
        loc=place,  # pyright: ignore[reportArgumentType]
        ncols=1 if beside else columns,
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_color(figure.axes[0].xaxis.label.get_color())


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def svg_of(figure: Figure, theme: Theme | None = None) -> str:
    """A figure in PAGE's colours as an SVG element: with a theme's, else with those of the page around it."""
    stream = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "twolevel", "font.family": "sans-serif"}
    ):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    if theme is None:
        return text.replace(PAGE.text, "currentColor").replace(PAGE.lines, "var(--lines)")
    text = text.replace("<svg", f'<svg style="background: {theme.back}"', 1)
    return text.replace(PAGE.text, theme.text).replace(PAGE.lines, theme.lines)
