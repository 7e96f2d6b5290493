"""Figures begin at zero, cut nothing, have one legend, and take a page's colours."""

import pytest

from twolevel.analysis import plots
from twolevel.analysis.plots import Series, decades, draw_lines, from_zero, looks_of, new_figure, one_legend


def drawn(series: dict[str, Series], panes: int = 1):
    figure, axes = new_figure(1, panes)
    for one in axes:
        draw_lines(one, series, looks_of(series))
    return figure, axes


def labels(axis) -> list[str]:
    return [axis.get_major_formatter()(tick, 0) for tick in axis.get_majorticklocs()]


def test_axes_begin_at_zero_and_hold_every_point():
    _, (axes,) = drawn({"a": Series([1, 2], [3.0, 7.0], [2.5, 6.0], [3.5, 9.0])})
    from_zero(axes, x=True)
    assert axes.get_ylim()[0] == axes.get_xlim()[0] == 0
    assert axes.get_ylim()[1] > 9 and axes.get_xlim()[1] > 2


def test_an_axis_whose_values_span_a_decade_is_logarithmic_with_plain_ticks():
    _, (axes,) = drawn({"a": Series([0.03, 2], [3.0, 7.0])})
    from_zero(axes, x=True)
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[0] < 0.03 and axes.get_xlim()[1] > 2
    assert {"0.05", "0.1", "1"} <= set(labels(axes.xaxis))


def test_large_numbers_are_written_out():
    _, (axes,) = drawn({"a": Series([1, 2], [1e4, 2e6])})
    axes.set_yscale("log")
    decades(axes.yaxis)
    assert "1,000,000" in labels(axes.yaxis)


def test_there_is_one_legend_for_all_panes():
    figure, _ = drawn({"a": Series([1], [1]), "b": Series([1], [2])}, panes=2)
    one_legend(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert not any(axes.get_legend() for axes in figure.axes)


def test_series_differ_in_colour_and_marker():
    looks = looks_of(str(i) for i in range(len(plots.PALETTE)))
    colours, markers = zip(*looks.values(), strict=True)
    assert len(set(colours)) == len(colours) == len(set(markers))


@pytest.mark.parametrize("theme", [plots.PAGE, plots.PAPER])
def test_a_page_gives_a_figure_its_colours(theme):
    figure, (axes,) = new_figure(theme=theme)
    draw_lines(axes, {"a": Series([1, 2], [1, 2])}, looks_of(["a"]))
    svg = plots.svg_of(figure)
    assert svg.startswith("<svg") and "<?xml" not in svg
    assert ("currentColor" in svg and "var(--lines)" in svg) is (theme is plots.PAGE)
    assert plots.PAGE.text not in svg and plots.PAGE.lines not in svg
