"""The figures of the documentation are those of benchmarks/results, and the files that it names are there."""

import csv
import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "pages"
RESULTS = ROOT / "benchmarks" / "results"


def page(name: str) -> str:
    return (PAGES / name).read_text()


def result(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table that has this header."""
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


KINDS = {
    "sc": "dense",
    "gc": "group convolution",
    "gc2l": "GC-2L",
    "bgc": "BGC",
    "shuffle": "shuffle",
    "flgc": "FLGC",
}


def trained(grid: str) -> list[dict]:
    """The lines of a grid."""
    return [*map(json.loads, (RESULTS / "accuracy" / f"{grid}.jsonl").read_text().splitlines())]


def by_kind() -> dict[str, list[str]]:
    """Of table3-small by kind and groups: seeds, test error, parameters and multiply-accumulates."""
    found = {}
    for line in trained("table3-small"):
        of = line["completed"]
        groups = f", G={of['groups']}" if of["conv"] != "sc" else ""
        more = f", r={of['representatives']}" if of["representatives"] > 1 else ""
        found.setdefault(f"{KINDS[of['conv']]}{groups}{more}", []).append(line)
    return {
        name: [
            str(len(lines)),
            error_of(lines),
            f"{lines[0]['counts']['parameters']:,}",
            f"{lines[0]['counts']['macs'] / 1e6:.1f} M",
        ]
        for name, lines in found.items()
    }


def error_of(lines: list[dict]) -> str:
    errors = [line["final"]["test_error"] for line in lines]
    assert len({line["completed"]["seed"] for line in lines}) == len(lines)
    deviation = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    return f"{statistics.fmean(errors):.2f}{deviation}"


def test_errors_of_every_kind():
    header = "| | seeds | test error, % | parameters | multiply-accumulates |"
    shown = {name: cells for name, *cells in rows(page("explanation/accuracy.md"), header)}
    assert shown == by_kind()
    figure = "accuracy/wrn-10-2-on-cifar10-test-error-against-the-number-of-groups"
    assert f"{figure}.svg" in page("explanation/accuracy.md")
    drawn = list(csv.DictReader((RESULTS / f"{figure}.csv").read_text().splitlines()))
    lines = trained("table3-small")
    assert sorted(float(row["test_error"]) for row in drawn) == sorted(
        line["final"]["test_error"] for line in lines
    )


def test_errors_by_number_of_groups():
    found = by_kind()
    header = "| | parameters | multiply-accumulates | test error, % |"
    shown = {name: cells for name, *cells in rows(page("how-to/choose-g-and-r.md"), header)}
    assert shown == {name: [*found[name][2:], found[name][1]] for name in shown} and len(shown) == 7
    readme = (ROOT / "README.md").read_text()
    for name, *cells in rows(readme, "| test error, % | G = 4 | G = 8 | G = 16 |"):
        assert cells == [found[f"{name}, G={groups}"][1] for groups in (4, 8, 16)]
    assert f"The dense network has {found['dense'][1]}." in " ".join(readme.split())
    fewest = min(int(found[name][0]) for name in shown)
    assert f"ten epochs, {['no', 'one', 'two', 'three'][fewest]} seeds" in " ".join(readme.split())


def test_the_fast_recipe_against_the_papers():
    """In a third of the steps the lower error, as the page says."""
    header = "| recipe | epochs | steps | seeds | test error, % |"
    lines = trained("fast-small")
    told = rows(page("explanation/accuracy.md"), header)
    for recipe, epochs, *cells in told:
        chosen = [
            line
            for line in lines
            if (line["settings"]["recipe"], line["settings"]["epochs"]) == (recipe, int(epochs))
            and line["settings"].keys() <= {*lines[0]["settings"], "lr_milestones"}
        ]
        assert cells == [f"{chosen[0]['final']['step']:,}", str(len(chosen)), error_of(chosen)]
    fast, paper = ((int(row[2].replace(",", "")), float(row[4].split()[0])) for row in told)
    assert 3 * fast[0] <= paper[0] and fast[1] < paper[1]


@pytest.mark.parametrize("groups", [4, 16])
def test_steps_against_the_dense_network(groups):
    step = result("step.json")
    shares = {(peer["peer"], peer["groups"]): f"{peer['to_sc']:.2f}" for peer in step["peers"]}
    names = {"two-level, this package": "gc2l", "two-level, stock layers, compiled": "stock compiled"}
    names["two-level, stock layers"] = "stock"
    text = page("index.md")
    for name, *figures in rows(text, "| | G=4 | G=16 |"):
        assert figures[[4, 16].index(groups)] == shares[names[name], groups]
    (dense,) = (peer["median_ms"] for peer in step["peers"] if peer["peer"] == "sc")
    assert f"takes {dense:.0f} ms a step" in text and step["date"][:10] in text


def test_steps_and_bytes_over_links():
    ways = {"GPipe": "gpipe", "DDP": "ddp", "channel-parallel": "channel"}
    measured = {(r["strategy"], r["groups"], r["link"]): r for r in result("scaling-links.json")["rows"]}
    table = rows(page("explanation/exchange.md"), "| | MB | 1 Gbit/s, ms | 100 Mbit/s, ms |")
    for name, *figures in table:
        kind, _, way = name.partition(", ")
        case = ("group", int(way.removeprefix("G="))) if kind == "GC-2L" else (ways[way], 1)
        over = [measured[(*case, link)] for link in ("1gbit", "100mbit")]
        sent = f"{over[0]['sent_by_ring_bytes'] / 1e6:.1f}"
        assert figures == [sent, *(f"{row['median_ms']:.0f}" for row in over)]
    both = [dict((name, cells) for name, *cells in table)[name] for name in ("GC-2L, G=2", "dense, DDP")]
    (ours, dense), text = both, page("index.md")
    assert f"send {ours[0]} MB a step for GC-2L with G=2, and {dense[0]} MB" in " ".join(text.split())
    assert f"takes {ours[2]} ms and {dense[2]} ms" in " ".join(text.split())


def test_what_carries_the_exchange():
    first, text = (
        result("exchange-mpi-2.json")["exchanges"][0],
        " ".join(page("explanation/exchange.md").split()),
    )
    assert (first["collective"], first["bytes_of_a_rank"]) == ("gather", 128 * 1024)
    us = {name: f"{time:.0f} µs" for name, time in first["us"].items()}
    assert f"takes {us['gloo']} over Gloo and {us['mpi']} over MPI" in text
    assert f"{us['gloo overlapped']} and {us['mpi overlapped']} to a matrix product" in text


def test_predictions_within_a_fifth():
    ratios = [case["ratio"] for case in result("predict.json")["cases"]]
    near = sum(abs(1 - ratio) <= 0.2 for ratio in ratios)
    assert f"{near} of {len(ratios)} steps" in " ".join(page("explanation/cost-model.md").split())


def test_what_was_tried_has_the_measured_shares():
    text = page("explanation/what-was-tried.md")
    shares = {peer["peer"]: peer["to_sc"] for peer in result("step.json")["peers"] if peer["groups"] == 4}
    assert f"{shares['stock']:.2f} of the dense step at G=4" in text
    assert f"(`stock three`) take {shares['stock three']:.2f}" in text
    fused, overlapped = shares["one rank of 4 fused"], shares["one rank of 4"]
    assert f"{fused:.3f} of the dense step by it and {overlapped:.3f} overlapped" in text
    passes = {mean["form"]: mean["passes"] for mean in result("traffic.json")["means"] if mean["ranks"] == 1}
    assert f"over its maps {passes['torch']:.0f} times" in text
    assert f"; {passes['overlapped native']:.0f} passes" in text


def test_blocks_computed_again():
    again = result("recompute.json")["networks"]["gc2l"]["computed again"]
    text = " ".join(page("how-to/save-memory.md").split())
    assert f"takes {again['memory_ratio']:.2f} of the memory" in text
    assert f"and {again['time_ratio']:.2f} of the time" in text


def test_errors_of_networks_that_start_from_nearest_weights():
    errors = result("finetune.json")["errors"]
    table = rows(page("how-to/your-own-network.md"), "| test error, % | after epoch 1")
    assert len(table) == len(errors) == 3
    for (_, *shown), by_seed in zip(table, errors.values(), strict=True):  # dense, nearest, anew
        means = [f"{statistics.fmean(of_one):.2f}" for of_one in zip(*by_seed.values(), strict=True)]
        deviation = statistics.stdev(of_seed[-1] for of_seed in by_seed.values())
        assert shown == [*means[:-1], f"{means[-1]} ± {deviation:.2f}"]


def test_exported_networks_against_the_dense_one():
    found = result("export.json")
    ratios = found["ratios_by_batch"]
    table = rows(page("explanation/measured.md"), "| | dense, batch 1 |")
    for (_, *shown), form in zip(table, ("eager", "torch", "onnx"), strict=True):
        assert shown == [
            f"{ratios[batch][f'{kind} {form}']:.2f}" for batch in "18" for kind in ("dense", "gc2l")
        ]
    assert found["date"][:10] in page("explanation/measured.md")


def test_trials_of_faults():
    """Each kind that is told of: how many of how many ended well."""
    said = re.findall(r"(\d+) of (\d+)", page("index.md"))
    counts = result("faults.json")["counts"].values()
    good = [(min(row["finished"], row["bit_equal"]), row["trials"]) for row in counts]
    assert said == [(str(number), str(trials)) for number, trials in good]


@pytest.mark.parametrize("path", sorted(PAGES.rglob("*.md")), ids=lambda path: str(path.relative_to(PAGES)))
def test_files_that_are_named_exist(path):
    text = path.read_text()
    named = re.findall(r"github\.com/twolevel/twolevel/(?:blob|tree)/main/([^)#]+)", text)
    named += re.findall(r"(?:tests|examples|launch)/[\w/.-]*\.\w+", text)
    assert [name for name in named if not (ROOT / name.split("#")[0]).exists()] == []
