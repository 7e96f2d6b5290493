"""The page of some grids: errors by kind and groups, their cost, curves, and the published numbers beside them."""

import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
from twolevel.training.report import Report

NAMES = {
    "sc": "standard",
    "gc": "group",
    "shuffle": "shuffle",
    "flgc": "FLGC",
    "bgc": "BGC",
    "dgconv": "DGConv",
    "dgc": "DGC",
    "gc2l": "GC-2L",
}
# As in every figure: the order of the legend, and so the colours.
ORDER = [*NAMES.values(), "GC-2L, 2 repr.", "GC-2L, 4 repr."]
# What a case or its table says already, or what changes no result.
SAID = {"data", "model", "conv", "groups", "representatives", "recipe", "epochs", "seed", "precision"}
SAID |= {"data_parallel", "group_parallel", "mirrored_test", "image_size"}


class Case(NamedTuple):
    """What was trained, but for the seed."""

    data: str
    model: str
    conv: str
    groups: int
    representatives: int
    recipe: str
    epochs: int
    ranks: int
    variant: str
    """other settings that its grid declares"""

    @classmethod
    def of(cls, line: dict[str, Any]) -> "Case":
        got = line["completed"]
        variant = ", ".join(f"{name} {value}" for name, value in line["settings"].items() if name not in SAID)
        more = (got.get("representatives", 1), got["recipe"], got["epochs"], line["ranks"], variant)
        return cls(got["data"], got["model"], got["conv"], got["groups"], *more)

    @property
    def kind(self) -> str:
        more = [f"{self.representatives} repr."] if self.representatives > 1 else []
        more += [f"{self.ranks} ranks"] if self.ranks > 1 else []
        more += [self.variant] if self.variant else []
        return ", ".join([NAMES.get(self.conv, self.conv), *more])

    @property
    def setting(self) -> tuple[str, str, str, int]:
        """What cases have in common that may be compared."""
        return (self.data, self.model, self.recipe, self.epochs)


Found = dict[Case, list[dict[str, Any]]]


def cases_of(lines: Iterable[dict[str, Any]]) -> Found:
    """The lines of each case, by seed; of a seed that was trained twice the later."""
    found: dict[Case, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        found[Case.of(line)][line["completed"]["seed"]] = line
    order = {name: index for index, name in enumerate(ORDER)}
    cases = sorted(found, key=lambda case: (case.setting, order.get(case.kind, 99), case.groups))
    return {case: [found[case][seed] for seed in sorted(found[case])] for case in cases}


def errors_of(lines: list[dict[str, Any]]) -> list[float]:
    return [line["final"]["test_error"] for line in lines]


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation, 0 of a single one."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def write_page(
    lines: list[dict[str, Any]],
    path: Path,
    files: Iterable[Path] = (),
    runs: Mapping[Path, Report] | None = None,
) -> Path:
    """The page of these lines and of the pictures of these runs, which come from `files`."""
    found = cases_of(lines)
    page = Page("Errors of group convolutions" if lines else "What a run has learned")
    command = shlex.join(["twolevel", "report", *map(str, files)])
    settings: dict[tuple[str, str, str, int], Found] = defaultdict(dict)
    for case, of_case in found.items():
        settings[case.setting][case] = of_case
    for (data, model, recipe, epochs), cases in settings.items():
        page.section(f"{model} on {data}: {epochs} epochs of the {recipe} recipe")
        page.text(_sentence(cases))
        page.table(*_table(cases))
        for figure, caption, rows in _figures(cases):
            page.figure(figure, caption, command=command, data=rows)
    for folder, report in (runs or {}).items():
        page.section(folder.resolve().name)
        page.text(*filter(None, [report.note]))
        for file, what in report.files.items():
            page.figure(
                file, f"{what[0].upper()}{what[1:]}.", command=shlex.join(["twolevel", "report", str(folder)])
            )
    try:
        return page.write(path)
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be written: {error.strerror or error}") from error


def _sentence(cases: Found) -> str:
    seeds = sorted({len(lines) for lines in cases.values()})
    runs = sum(map(len, cases.values()))
    machines = sorted(
        {line["machine"]["gpu"] or line["machine"]["cpu"] for of in cases.values() for line in of}
    )
    torch = sorted({line["torch"] for of in cases.values() for line in of})
    hours = sum(line["seconds"] for of in cases.values() for line in of) / 3600
    each = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return (
        f"{runs} runs, {each} seeds each, {hours:.1f} hours of training on {', '.join(machines)}, torch "
        f"{', '.join(torch)}. Errors are of the test set after the last epoch; bands and what follows ± are one "
        "standard deviation over seeds."
    )


def _table(cases: Found) -> tuple[list[str], list[list[str]], str]:
    header = ["", "G", "seeds", "error, %", "with mirror images, %", "published, %", "difference"]
    header += ["parameters", "multiplications", "minutes"]
    rows = []
    for case, lines in cases.items():
        mean, deviation = spread(errors_of(lines))
        both = [line["final"].get("test_mirrored_error") for line in lines]
        theirs = published.error(case.data, case.model, case.conv, case.groups, case.representatives)
        counts = lines[0]["counts"]
        rows.append(
            [
                case.kind,
                str(case.groups),
                str(len(lines)),
                f"{mean:.2f}" + (f" ± {deviation:.2f}" if len(lines) > 1 else ""),
                "" if None in both else f"{statistics.fmean(filter(None, both)):.2f}",
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


def _figures(cases: Found) -> Iterable[tuple[Figure, str, list[dict[str, Any]]]]:
    yield _error_against_groups(cases)
    yield from _error_against_cost(cases)
    if len({case.ranks for case in cases}) > 1:
        yield _time_against_processors(cases)
    for conv in ("gc", "gc2l"):
        if any(case.conv == conv for case in cases):
            yield _loss_curves(cases, conv)


def _error_against_groups(cases: Found) -> tuple[Figure, str, list[dict[str, Any]]]:
    figure, (axes,) = new_figure()
    rows, series = [], {}
    for kind in dict.fromkeys(case.kind for case in cases if case.conv != "sc"):
        points = [
            (case.groups, *spread(errors_of(lines))) for case, lines in cases.items() if case.kind == kind
        ]
        groups, means, deviations = map(list, zip(*points, strict=True))
        low, high = ([m + s * d for m, d in zip(means, deviations, strict=True)] for s in (-1, 1))
        series[kind] = Series(groups, means, low, high)
    for case, lines in cases.items():
        rows += [
            {"kind": case.kind, "groups": case.groups, "seed": line["completed"]["seed"], "test_error": error}
            for line, error in zip(lines, errors_of(lines), strict=True)
        ]
    draw_lines(axes, series, looks_of([*ORDER, *series]))
    for case, lines in cases.items():
        if case.conv == "sc":
            axes.axhline(
                spread(errors_of(lines))[0], color=looks_of(ORDER)["standard"][0], ls="--", label="standard"
            )
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


def _error_against_cost(cases: Found) -> Iterable[tuple[Figure, str, list[dict[str, Any]]]]:
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
        draw_lines(axes, series, looks_of([*ORDER, *series]))
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


def _loss_curves(cases: Found, conv: str) -> tuple[Figure, str, list[dict[str, Any]]]:
    """Of a kind with each number of groups, and of standard convolution."""
    figure, (axes,) = new_figure()
    rows, series = [], {}
    for case, lines in cases.items():
        if case.conv not in ("sc", conv) or case.representatives > 1:
            continue
        name = case.kind if case.conv == "sc" else f"{case.kind}, G={case.groups}"
        epochs = [epoch["epoch"] for epoch in lines[0]["curve"]]
        losses = [[epoch["train_loss"] for epoch in line["curve"]] for line in lines]
        spreads = [spread(list(of_epoch)) for of_epoch in zip(*losses, strict=True)]
        means = [mean for mean, _ in spreads]
        low, high = ([m + s * d for m, d in spreads] for s in (-1, 1))
        series[name] = Series(epochs, means, low, high)
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
