"""The page of a grid: what was found by kind and groups, beside what was published."""

import re
from xml.etree import ElementTree

import pytest

from twolevel.grids import published
from twolevel.grids.cases import Case, sections
from twolevel.grids.report import write_page


def line(conv, groups, seed, error, *, model="wrn-28-10", ranks=1, grid="a grid", **more):
    """Of a run by the published recipe, unless `more` says otherwise."""
    completed = {"data": "cifar10", "model": model, "conv": conv, "groups": groups, "seed": seed}
    completed |= {
        "recipe": "paper",
        "epochs": 200,
        "data_parallel": 1,
        "group_parallel": ranks,
        "xi": 0.75,
    } | more
    return {
        "grid": grid,
        "run": "a run",
        "settings": {"conv": conv} | more,
        "completed": completed,
        "final": {"test_error": error, "test_mirrored_error": max(0.0, error - 0.25)},
        "curve": [{"epoch": e, "train_loss": 2.0 / e + seed / 10} for e in (1, 2)],
        "seconds": 120.0,
        "counts": {"parameters": 10**7 // groups, "macs": 10**9 // groups},
        "machine": {"cpu": "a processor", "gpu": None},
        "torch": "2.14.1",
    }


LINES = [line("sc", 1, seed, 4.0 + seed) for seed in (0, 1)]
LINES += [line("gc", groups, seed, 5.0 + groups + seed) for groups in (4, 8) for seed in (0, 1)]
LINES += [line("gc2l", groups, 0, 4.5) for groups in (4, 8)] + [line("gc2l", 8, 0, 4.4, representatives=2)]


def rows_of(text: str) -> list[list[str]]:
    body = re.search(r"<tbody>(.*?)</tbody>", text)[1]
    return [re.findall(r"<td>(.*?)</td>", row) for row in body.split("</tr>")[:-1]]


def test_errors_are_means_over_seeds_beside_the_published(tmp_path):
    text = write_page(LINES, tmp_path / "page.html", [tmp_path / "lines.jsonl"]).read_text()
    rows = rows_of(text)
    assert rows[0][:7] == ["standard", "1", "2", "4.50 ± 0.71", "4.25", "4.19", "+0.31"]
    assert rows[1][:7] == ["group", "4", "2", "9.50 ± 0.71", "9.25", "5.32", "+4.18"]
    assert [row[0] for row in rows] == ["standard", "group", "group", "GC-2L", "GC-2L", "GC-2L, 2 repr."]
    assert rows[5][3:7] == ["4.40", "4.15", "", ""]  # with 2 representatives nothing is published
    assert text.count("<svg") == 6  # against groups, three costs, and curves of two kinds
    assert len(text) < 5e6


def test_figures_are_files_of_their_own_where_they_are_asked_for(tmp_path):
    lines = [*LINES, line("gc", 4, 0, 20.0, epochs=10, recipe="fast", grid="short")]  # a section of its own
    write_page(lines, tmp_path / "page.html", figures=tmp_path / "figures")
    name = "wrn-28-10-on-cifar10-test-error-against-"
    drawn = {path.stem: path.read_text() for path in (tmp_path / "figures").glob("*.svg")}
    assert len(drawn) == 6 + 5 and f"{name}the-number-of-groups" in drawn
    assert f"{name.replace('cifar10', 'cifar10-2')}the-number-of-groups" in drawn
    for stem, svg in drawn.items():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert "var(--" not in svg and "currentColor" not in svg  # there is no page around it
        rows = (tmp_path / "figures" / f"{stem}.csv").read_text().splitlines()
        assert len(rows) > 1
    groups = (tmp_path / "figures" / f"{name}the-number-of-groups.csv").read_text().splitlines()
    assert groups[:2] == ["kind,groups,seed,test_error", "standard,1,0,4.0"]


def test_networks_that_differ_are_not_compared(tmp_path):
    lines = [*LINES, line("gc", 4, 0, 20.0, model="wrn-10-2")]
    text = write_page(lines, tmp_path / "page.html").read_text()
    assert text.count("<h2>wrn-28-10 on cifar10") == text.count("<h2>wrn-10-2 on cifar10") == 1
    assert "published" not in re.findall(r"<thead>(.*?)</thead>", text)[1]


def test_a_run_that_was_trained_twice_counts_once():
    (section,) = sections([line("gc", 4, 0, 9.0), line("gc", 4, 0, 7.0, grid="another")])
    assert [[one["final"]["test_error"] for one in lines] for lines in section.cases.values()] == [[7.0]]


def test_recipes_and_lengths_are_compared_only_where_a_grid_varies_them(tmp_path):
    fast = {"recipe": "fast", "epochs": 10}
    apart = sections([line("gc", 4, 0, 9.0, grid="one"), line("gc", 4, 0, 8.0, grid="two", **fast)])
    assert [[case.kind for case in section.cases] for section in apart] == [["group"], ["group"]]
    (section,) = sections([line("gc", 4, 0, 9.0), line("gc", 4, 0, 8.0, **fast)])
    assert section.kinds == ["group, recipe fast, epochs 10", "group, recipe paper, epochs 200"]


def test_a_run_of_two_grids_is_in_the_sections_of_both():
    fast = {"recipe": "fast", "epochs": 10}
    of_one = [line("gc", 8, 0, 9.0, grid="groups", **fast), line("gc", 4, 0, 8.0, grid="groups", **fast)]
    of_two = [line("gc", 4, 0, 8.0, grid="recipes", **fast), line("gc", 4, 0, 7.0, grid="recipes")]
    for lines in (of_one + of_two, of_two + of_one):
        found = sorted(sorted(case.groups for case in section.cases) for section in sections(lines))
        assert found == [[4, 4], [4, 8]]


def test_what_a_grid_varies_beside_kinds_is_a_case_of_its_own_and_what_all_have_is_said_once(tmp_path):
    lines = [line("gc", 4, 0, 9.0, epochs=3), line("gc", 4, 0, 8.0, epochs=3, flip="random")]
    (section,) = sections(lines)
    assert section.kinds == ["group", "group, flip random"]
    text = write_page(lines, tmp_path / "page.html").read_text()
    assert [row[3] for row in rows_of(text)] == ["9.00", "8.00"]
    assert "All have: recipe paper, epochs 3." in text


def test_time_is_drawn_against_processors_where_they_differ(tmp_path):
    lines = [line("gc2l", 4, 0, 9.0, ranks=ranks) for ranks in (1, 2, 4)]
    text = write_page(lines, tmp_path / "page.html").read_text()
    assert "Time of a run against the number of processors." in text
    assert "number of processors" not in write_page(LINES, tmp_path / "page.html").read_text()


def test_errors_of_zero_curves_of_two_lengths_and_no_lines_make_a_page(tmp_path):
    short = line("gc", 4, 1, 0.0)
    short["curve"] = short["curve"][:1]
    assert [
        row[4] for row in rows_of(write_page([line("gc", 4, 0, 0.0), short], tmp_path / "a.html").read_text())
    ] == ["0.00"]
    assert "No run has finished yet." in write_page([], tmp_path / "b.html").read_text()


@pytest.mark.parametrize(
    ("case", "more", "error"),
    [
        (("gc2l", 16), {}, 4.95),
        (("flgc", 8), {"data": "cifar100"}, 30.78),
        (("gc", 16), {"data": "imagenet", "model": "wrn-34-2", "epochs": 90}, 43.18),
        (("shuffle", 16), {"data": "imagenet", "model": "mobilenetv2", "epochs": 90}, None),
        (("gc2l", 16), {"representatives": 2}, None),
        (("gc2l", 16), {"recipe": "fast", "epochs": 12}, None),
        (("gc2l", 16), {"epochs": 100}, None),
        (("gc", 4), {"model": "wrn-10-2"}, None),
        (("dgc", 4), {"model": "condensenet-50", "epochs": 300, "xi": 1 / 3}, 5.83),
        (("dgc", 4), {"model": "condensenet-50", "epochs": 300, "xi": 0.5}, None),
        (("lgc", 4), {"model": "condensenet-86", "epochs": 300}, 5.00),
        (("lgc", 4), {"model": "condensenet-86", "epochs": 300, "condensation": 4}, 5.00),
        (("lgc", 4), {"model": "condensenet-86", "epochs": 300, "condensation": 2}, None),
        (("lgc", 4), {"data": "imagenet", "model": "condensenet-74", "epochs": 120}, 26.2),
    ],
)
def test_a_published_error_is_of_the_same_training(case, more, error):
    one = line(*case, 0, 9.0)
    one["completed"] |= more
    completed = one["completed"]
    assert published.error_of(Case.of(one), completed["xi"], completed.get("condensation")) == error


def test_a_setting_that_a_case_varies_makes_it_another_training():
    assert published.error_of(Case.of(line("gc", 16, 0, 9.0), [("flip", "alternating")])) is None


def test_a_case_knows_its_name():
    assert Case.of(line("gc2l", 8, 0, 1.0, representatives=4)).kind == "GC-2L, 4 repr."
    assert Case.of(line("gc2l", 4, 0, 1.0, ranks=2)).kind == "GC-2L, 2 ranks"
