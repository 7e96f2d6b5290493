"""The page of some grids: errors by kind and groups, their cost, curves, and the published numbers beside them."""

import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from twolevel.analysis.page import Page
from twolevel.analysis.plots import (
    Series,
    draw_lines,
    from_zero,
    looks_of,
    new_figure,
    one_legend,
    powers_of_two,
)
from twolevel.errors import UserError
from twolevel.grids import published
from twolevel.grids.cases import NAMES, Case, Found, Section, errors_of, sections, spread
from twolevel.training.report import Report

Looks = dict[str, tuple[str, str]]
"""Colour and marker of each kind."""


def write_page(
    lines: list[dict[str, Any]],
    path: Path,
    files: Iterable[Path] = (),
    runs: Mapping[Path, Report] | None = None,
    figures: Path | None = None,
) -> Path:
    """The page of these lines and of the pictures of these runs, which come from `files`.

    With a folder for `figures` those of the lines are files there too. Raises UserError for what cannot be written.
    """
    title = "Errors of group convolutions" if lines or not runs else "What a run has learned"
    try:
        return _page(Page(title, figures), lines, files, runs or {}).write(path)
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be written: {error.strerror or error}") from error


def _page(
    page: Page, lines: list[dict[str, Any]], files: Iterable[Path], runs: Mapping[Path, Report]
) -> Page:
    command = shlex.join(["twolevel", "report", *map(str, files)])
    if not lines and not runs:
        page.text("No run has finished yet.")
    for section in sections(lines):
        page.section(f"{section.model} on {section.data}")
        page.text(_sentence(section))
        page.table(*_table(section))
        for figure, caption, rows in _figures(section):
            page.figure(figure, caption, command=command, data=rows)
    for folder, report in runs.items():
        page.section(folder.resolve().name)
        page.text(*filter(None, [report.note]))
        for file, what in report.files.items():
            page.figure(
                file, f"{what[0].upper()}{what[1:]}.", command=shlex.join(["twolevel", "report", str(folder)])
            )
    return page


def _sentence(section: Section) -> str:
    lines = [line for of_case in section.cases.values() for line in of_case]
    seeds = sorted({len(of_case) for of_case in section.cases.values()})
    each = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    each += " seed" if each == "1" else " seeds"
    machines = sorted({line["machine"]["gpu"] or line["machine"]["cpu"] for line in lines})
    versions = ", ".join(sorted({line["torch"] for line in lines}))
    hours = sum(line["seconds"] for line in lines) / 3600
    common = ", ".join(f"{name} {value}" for name, value in section.common.items())
    return (
        f"{len(lines)} runs, {each} each, {hours:.1f} hours of training on {', '.join(machines)}, torch "
        f"{versions}. All have: {common or 'nothing in common'}. Errors are of the test set after the last epoch; "
        "bands and what follows ± are one standard deviation over seeds."
    )


def _table(section: Section) -> tuple[list[str], list[list[str]], str]:
    header = ["", "G", "seeds", "error, %", "with mirror images, %", "published, %", "difference"]
    header += ["parameters", "multiplications", "minutes"]
    rows = []
    for case, lines in section.cases.items():
        mean, deviation = spread(errors_of(lines))
        both = [line["final"].get("test_mirrored_error") for line in lines]
        completed = lines[0]["completed"]
        theirs = published.error_of(case, completed.get("xi"), completed.get("condensation"))
        counts = lines[0]["counts"]
        rows.append(
            [
                case.kind,
                str(case.groups),
                str(len(lines)),
                f"{mean:.2f}" + (f" ± {deviation:.2f}" if len(lines) > 1 else ""),
                "" if None in both else f"{statistics.fmean(both):.2f}",
                "" if theirs is None else f"{theirs:.2f}",
                "" if theirs is None else f"{mean - theirs:+.2f}",
                f"{counts['parameters']:,.0f}",
                f"{counts['macs'] / 1e6:,.1f} M",
                f"{statistics.median(line['seconds'] for line in lines) / 60:.1f}",
            ]
        )
    used = [index for index in range(len(header)) if any(row[index] for row in rows)]
    header, rows = [header[index] for index in used], [[row[index] for index in used] for row in rows]
    return (
        header,
        rows,
        "Parameters of the whole network; multiplications of one image, forward; minutes of a run.",
    )


def _figures(section: Section) -> Iterable[tuple[Figure, str, list[dict[str, Any]]]]:
    cases, looks = section.cases, looks_of(section.kinds)
    yield _error_against_groups(cases, looks)
    yield from _error_against_cost(cases, looks)
    if len({case.ranks for case in cases}) > 1:
        yield _time_against_processors(cases)
    for conv in ("gc", "gc2l"):
        if any(_has_curve(case, conv) for case in cases):
            yield _loss_curves(cases, conv)


def _band(x: list[float], values: Iterable[list[float]]) -> Series:
    """Means, and one standard deviation to either side."""
    spreads = [spread(of_one) for of_one in values]
    low, high = ([mean + sign * deviation for mean, deviation in spreads] for sign in (-1, 1))
    return Series(x, [mean for mean, _ in spreads], low, high)


def _error_against_groups(cases: Found, looks: Looks) -> tuple[Figure, str, list[dict[str, Any]]]:
    figure, (axes,) = new_figure()
    rows, series = [], {}
    for kind in dict.fromkeys(case.kind for case in cases if case.conv != "sc"):
        own = {case.groups: errors_of(lines) for case, lines in cases.items() if case.kind == kind}
        series[kind] = _band(list(own), own.values())
    for case, lines in cases.items():
        rows += [
            {"kind": case.kind, "groups": case.groups, "seed": line["completed"]["seed"], "test_error": error}
            for line, error in zip(lines, errors_of(lines), strict=True)
        ]
    draw_lines(axes, series, looks)
    for case, lines in cases.items():
        if case.conv == "sc":
            axes.axhline(spread(errors_of(lines))[0], color=looks[case.kind][0], ls="--", label=case.kind)
    from_zero(axes)
    powers_of_two(axes, [case.groups for case in cases if case.conv != "sc"] or [1])
    axes.set(xlabel="groups G", ylabel="test error, %")
    one_legend(figure)
    return figure, "Test error against the number of groups.", rows


COSTS = {
    "parameters": ("parameters, millions", 1e6, lambda line: line["counts"]["parameters"]),
    "multiplications": ("multiplications of an image, millions", 1e6, lambda line: line["counts"]["macs"]),
    "time": ("minutes of training", 60, lambda line: line["seconds"]),
}


def _error_against_cost(cases: Found, looks: Looks) -> Iterable[tuple[Figure, str, list[dict[str, Any]]]]:
    for cost, (label, unit, value_of) in COSTS.items():
        figure, (axes,) = new_figure()
        rows, series = [], {}
        for kind in dict.fromkeys(case.kind for case in cases):
            points = []
            for case, lines in cases.items():
                if case.kind == kind:
                    values = [value_of(line) / unit for line in lines]
                    points.append((statistics.median(values), spread(errors_of(lines))[0]))
                    rows += [
                        {"kind": kind, "groups": case.groups, label: value, "test_error": error}
                        for value, error in zip(values, errors_of(lines), strict=True)
                    ]
            x, y = map(list, zip(*sorted(points), strict=True))
            series[kind] = Series(x, y)
        draw_lines(axes, series, looks)
        from_zero(axes, x=True)
        axes.set(xlabel=label, ylabel="test error, %")
        one_legend(figure)
        yield figure, f"Test error against {'the time of a run' if cost == 'time' else cost}.", rows


def _time_against_processors(cases: Found) -> tuple[Figure, str, list[dict[str, Any]]]:
    figure, (axes,) = new_figure()
    rows, points = [], defaultdict(list)
    for case, lines in cases.items():
        minutes = [line["seconds"] / 60 for line in lines]
        name = case._replace(ranks=1).kind + (f", G={case.groups}" if case.groups > 1 else "")
        points[name].append((case.ranks, statistics.median(minutes)))
        rows += [{"kind": name, "processors": case.ranks, "minutes": value} for value in minutes]
    series = {name: Series(*map(list, zip(*sorted(of), strict=True))) for name, of in points.items()}
    draw_lines(axes, series, looks_of(series))
    from_zero(axes)
    powers_of_two(axes, [case.ranks for case in cases])
    axes.set(xlabel="processors", ylabel="minutes of training")
    one_legend(figure)
    return figure, "Time of a run against the number of processors.", rows


def _has_curve(case: Case, conv: str) -> bool:
    return case.conv == conv and case.representatives == case.ranks == 1 and not case.variant


def _loss_curves(cases: Found, conv: str) -> tuple[Figure, str, list[dict[str, Any]]]:
    """Of a kind with each number of groups, and of standard convolution."""
    figure, (axes,) = new_figure()
    rows, series = [], {}
    for case, lines in cases.items():
        if not _has_curve(case, "sc") and not _has_curve(case, conv):
            continue
        name = case.kind if case.conv == "sc" else f"{case.kind}, G={case.groups}"
        epochs = [epoch["epoch"] for epoch in min((line["curve"] for line in lines), key=len)]
        losses = [[epoch["train_loss"] for epoch in line["curve"]] for line in lines]
        series[name] = _band(epochs, map(list, zip(*losses, strict=False)))
        rows += [
            {
                "kind": name,
                "seed": line["completed"]["seed"],
                **{k: epoch[k] for k in ("epoch", "train_loss")},
            }
            for line in lines
            for epoch in line["curve"]
        ]
    draw_lines(axes, series, looks_of(series))
    from_zero(axes)
    axes.set(xlabel="epoch", ylabel="training loss, cross-entropy")
    one_legend(figure)
    return figure, f"Training loss of {NAMES[conv]} and standard convolution.", rows
