"""The page of a grid: what was found by kind and groups, beside what was published."""

import re

import pytest

from twolevel.grids import published
from twolevel.grids.report import Case, cases_of, write_page


def line(conv, groups, seed, error, *, model="wrn-28-10", representatives=1, ranks=1, **more):
    completed = {"data": "cifar10", "model": model, "conv": conv, "groups": groups, "seed": seed}
    completed |= {"representatives": representatives, "recipe": "paper", "epochs": 2}
    return {
        "settings": {"conv": conv} | more,
        "completed": completed,
        "ranks": ranks,
        "final": {"test_error": error, "test_mirrored_error": error - 0.25},
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


def test_networks_that_differ_are_not_compared(tmp_path):
    lines = [*LINES, line("gc", 4, 0, 20.0, model="wrn-10-2")]
    text = write_page(lines, tmp_path / "page.html").read_text()
    assert "<h2>wrn-28-10 on cifar10" in text and "<h2>wrn-10-2 on cifar10" in text
    assert "published" not in re.findall(r"<thead>(.*?)</thead>", text)[0]  # wrn-10-2 comes first


def test_a_seed_that_was_trained_twice_counts_once():
    cases = cases_of([line("gc", 4, 0, 9.0), line("gc", 4, 0, 7.0)])
    assert [[one["final"]["test_error"] for one in lines] for lines in cases.values()] == [[7.0]]


@pytest.mark.parametrize(
    ("case", "error"),
    [
        (("cifar10", "wrn-28-10", "gc2l", 16), 4.95),
        (("cifar100", "wrn-28-10", "flgc", 8), 30.78),
        (("imagenet", "wrn-34-2", "gc", 16), 43.18),
        (("imagenet", "mobilenetv2", "shuffle", 16), None),
        (("cifar10", "wrn-10-2", "gc", 4), None),
    ],
)
def test_published_errors(case, error):
    assert published.error(*case) == error
    assert published.error(*case, representatives=2) is None


def test_time_is_drawn_against_processors_where_they_differ(tmp_path):
    lines = [line("gc2l", 4, 0, 9.0, ranks=ranks) for ranks in (1, 2, 4)]
    text = write_page(lines, tmp_path / "page.html").read_text()
    assert "Time of a run against the number of processors." in text
    assert "number of processors" not in write_page(LINES, tmp_path / "page.html").read_text()


def test_a_case_knows_its_name():
    assert Case.of(line("gc2l", 8, 0, 1.0, representatives=4)).kind == "GC-2L, 4 repr."
    assert Case.of(line("gc2l", 4, 0, 1.0, ranks=2)).kind == "GC-2L, 2 ranks"


def test_what_a_grid_varies_beside_kinds_is_a_case_of_its_own(tmp_path):
    lines = [line("gc", 4, 0, 9.0), line("gc", 4, 0, 8.0, flip="random")]
    assert [case.kind for case in cases_of(lines)] == ["group", "group, flip random"]
    rows = rows_of(write_page(lines, tmp_path / "page.html").read_text())
    assert [row[3] for row in rows] == ["9.00", "8.00"]
