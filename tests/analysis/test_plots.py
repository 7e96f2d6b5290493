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


@pytest.mark.parametrize("values", [[], [0.0], [float("nan")]])
def test_without_a_value_above_zero_there_is_an_axis_too(values):
    _, (axes,) = drawn({"a": Series([1.0] * len(values), values)})
    from_zero(axes)
    assert axes.get_ylim() == (0, 1)


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


def test_no_two_series_look_the_same():
    looks = [*looks_of(str(i) for i in range(40)).values()]
    assert len(set(looks)) == 40
    assert len({colour for colour, _ in looks[:10]}) == 10 and len({marker for _, marker in looks[:9]}) == 9


def test_long_names_take_fewer_columns():
    for name, columns in (("a", 3), ("a name of a good forty letters, more or less", 1)):
        figure, _ = drawn({f"{name}{i}": Series([1], [1]) for i in range(3)})
        one_legend(figure)
        assert figure.legends[0]._ncols == columns


@pytest.mark.parametrize("theme", [plots.PAGE, plots.PAPER])
def test_a_page_gives_a_figure_its_colours(theme):
    figure, (axes,) = new_figure(theme=theme)
    draw_lines(axes, {"a": Series([1, 2], [1, 2])}, looks_of(["a"]))
    svg = plots.svg_of(figure)
    assert svg.startswith("<svg") and "<?xml" not in svg
    assert ("currentColor" in svg and "var(--lines)" in svg) is (theme is plots.PAGE)
    assert plots.PAGE.text not in svg and plots.PAGE.lines not in svg
