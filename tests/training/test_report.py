"""`twolevel report`: the pictures of a run, what they are drawn from, and what stands against them."""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from command import Outcome, command, run

import twolevel.data
import twolevel.models
from twolevel.analysis.patterns import kept_patterns, layers_of, spread
from twolevel.data.augment import Normalise
from twolevel.data.sample import load_sample
from twolevel.nn import DynamicGroupConv2d
from twolevel.training import report
from twolevel.training.config import TrainConfig

PICTURES = {
    "gc2l": ["curve.png"],
    "dgc": ["curve.png", "kept_channels.png", "drop_frequency.png"],
    "dgconv": ["curve.png", "groups.png", "connectivity.png"],
    "flgc": ["curve.png", "groups.png", "connectivity.png"],
    "lgc": ["curve.png", "connectivity.png"],
}


@pytest.fixture(scope="module")
def trained(pool, tiny, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each kind, not to be written to."""
    runs = {conv: tmp_path_factory.mktemp("runs") / conv for conv in PICTURES}
    for conv, output in runs.items():
        run(pool, "train", *tiny, "--conv", conv, "--output", output)
    return runs


@pytest.fixture
def copied(trained, tmp_path):
    """Copies of the runs, to be written to."""

    def copy(conv: str) -> Path:
        shutil.copytree(trained[conv], tmp_path / conv)
        return tmp_path / conv

    return copy


def warnings(outcome: Outcome) -> list[str]:
    return [line.partition("warning: ")[2] for line in outcome.err.splitlines()]


@pytest.mark.parametrize("conv", PICTURES)
def test_each_kind_leaves_its_pictures_and_a_line_for_each(pool, copied, conv):
    output = copied(conv)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    (outcome,) = run(pool, "report", output)
    written = [output / "report" / name for name in PICTURES[conv]]
    lines = outcome.out.splitlines()
    page = output / "report" / "index.html"
    assert [line.split("  ")[0] for line in lines[: len(written)]] == [str(path) for path in written]
    assert sorted((output / "report").iterdir()) == sorted([*written, page])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    note = "conv=gc2l learns no groups and drops no channels: there is the curve alone"
    assert lines[len(written) :] == [*([note] if conv == "gc2l" else []), f"{page}  all of it in one page"]
    assert page.read_text().count('src="data:image/png;base64,') == len(written)
    assert not outcome.err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    run(pool, "report", output)  # again, in their place
    assert sorted((output / "report").iterdir()) == sorted([*written, page])


def arguments(picture: str, path: Path, eval_batch: int = 500, **options) -> tuple:
    """In a rank: what a report of the run passes on to the function that draws `picture`."""
    with (
        patch.object(report, "EVAL_BATCH", eval_batch),
        patch.object(report.draw, picture, wraps=getattr(report.draw, picture)) as drawing,
    ):
        report.write_report(path, **options)
    return drawing.call_args.args


def test_patterns_are_those_of_the_newest_weights_and_the_test_images(pool, copied, tmp_path):
    output = copied("dgc")
    ((drawn, _),) = pool.run(arguments, "drop_frequency", output, ranks=1, init=False)
    run(pool, "export", output, tmp_path / "whole.safetensors")
    model = twolevel.models.load(tmp_path / "whole.safetensors").eval()
    config = TrainConfig.from_dict(json.loads((output / "config.json").read_text()))
    test = twolevel.data.load(config.data, seed=0, device="cpu", dtype=torch.float64).test
    layers = spread(layers_of(model, DynamicGroupConv2d))
    expected = kept_patterns(model, layers, test.eval_batches(7), 6)
    assert expected.num_images == drawn.num_images == 7
    assert [*drawn.dropped] == [*layers]
    assert drawn.labels.tolist() == expected.labels.tolist() == [0, 1, 2]
    assert all(torch.equal(drawn.kept[name], expected.kept[name]) for name in layers)
    assert all(torch.equal(drawn.dropped[name], expected.dropped[name]) for name in layers)
    assert all(0 < share.mean() < 1 for share in drawn.dropped.values())


def test_images_and_batches_are_as_many_as_asked_for(pool, copied):
    asked = {"eval_batch": 3, "images": 2, "batches": 2}
    ((drawn, _),) = pool.run(arguments, "drop_frequency", copied("dgc"), **asked, ranks=1, init=False)
    assert (len(drawn.labels), drawn.num_images) == (2, 6)


def test_thumbnails_are_the_pixels_of_the_files():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    normalise = Normalise((0.4, 0.5, 0.6), (0.1, 0.2, 0.3), torch.device("cpu"), torch.float32)
    assert torch.equal(
        torch.from_numpy(report.thumbnails(normalise(pixels), normalise)), pixels.permute(0, 2, 3, 1)
    )


def test_before_the_end_of_an_epoch_there_is_no_curve(pool, cifar_run):
    (outcome,) = run(pool, "report", cifar_run, "--images", 2)
    missing = "has no record of an epoch: what is drawn over epochs is left out"
    assert warnings(outcome) == [f"{cifar_run}/metrics.jsonl {missing}"]
    written = sorted(path.name for path in (cifar_run / "report").iterdir())
    assert written == ["drop_frequency.png", "index.html", "kept_channels.png"]


def test_images_of_cifar_are_shown_with_their_source(pool, cifar_run):
    ((_, pictures, names, _, source),) = pool.run(
        arguments, "kept_channels", cifar_run, ranks=1, init=False, images=2, batches=1
    )
    test, classes = load_sample()[1:]
    assert "Krizhevsky" in source
    assert names == [classes[label] for label in test.labels[:2]]  # which are of two classes
    assert torch.equal(torch.from_numpy(pictures).permute(0, 3, 1, 2), test.images[:2])


@pytest.fixture(scope="module")
def cifar_run(pool, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "cifar"
    words = "--model wrn-10-1 --conv dgc --data sample --batch-size 4 --max-steps 1"
    run(pool, "train", *words.split(), "--output", output)
    return output


def rewrite(log: Path, change) -> None:
    records = [change(json.loads(line)) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(record) + "\n" for record in records if record))


@pytest.mark.parametrize(("conv", "what"), [("dgconv", "dgconv_gates"), ("flgc", "flgc_groups")])
def test_missing_records_are_named_and_the_rest_is_drawn(pool, copied, conv, what):
    output = copied(conv)
    log = output / "metrics.jsonl"

    rewrite(log, lambda r: None if (r["kind"], r["epoch"]) == ("epoch", 2) else r)
    (outcome,) = run(pool, "report", output)
    assert warnings(outcome) == [f"{log} lacks 1 of 3 epochs: 2"]
    assert "groups.png" in outcome.out

    rewrite(log, lambda r: {k: v for k, v in r.items() if k != what or r["epoch"] == 3})
    (outcome,) = run(pool, "report", output)
    assert f"{log} has no '{what}' in 1 of 2 epochs: groups.png shows the others" in warnings(outcome)
    assert "groups.png" in outcome.out

    rewrite(log, lambda r: {k: v for k, v in r.items() if k != what})
    (outcome,) = run(pool, "report", output)
    assert f"{log} has no '{what}' in 2 of 2 epochs: groups.png is left out" in warnings(outcome)
    assert "groups.png" not in outcome.out and "connectivity.png" in outcome.out

    log.unlink()
    (outcome,) = run(pool, "report", output)
    assert warnings(outcome) == [f"{log} is missing: what is drawn over epochs is left out"]
    assert "curve.png" not in outcome.out and "connectivity.png" in outcome.out


def test_options_without_effect_are_warned_of(pool, copied):
    (outcome,) = run(pool, "report", copied("flgc"), "--images", 2, "--data-root", "nowhere")
    assert warnings(outcome) == [
        "images='2' is ignored: no picture of conv=flgc takes test images",
        "data_root='nowhere' is ignored: no picture of conv=flgc takes test images",
    ]
    (outcome,) = run(pool, "report", copied("dgc"), "--images", 5)
    assert warnings(outcome) == [
        "images=5: there are only 3 classes in 7 test images, and one image of each is drawn"
    ]


def refuse(pool, *argv, ranks: int = 1) -> str:
    """The one line that the command ends with, on every rank."""
    outcomes = pool.run(command, "report", *argv, ranks=ranks, init=False)
    assert [outcome.code for outcome in outcomes] == [2] * ranks
    lines = {outcome.err.partition("twolevel report: ")[2] for outcome in outcomes}
    assert len(lines) == 1
    (line,) = lines.pop().splitlines()
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("RUN --images 0", "images=0 is invalid; use 1 to 50"),
        ("RUN --images 51", "images=51 is invalid; use 1 to 50"),
        ("RUN --batches 0", "batches=0 is invalid; use 1 or more"),
        ("RUN --workers -1", "workers=-1 is invalid; use an integer of 0 or more"),
        ("RUN --data-root nowhere", "nowhere/train"),
        ("nowhere", "nowhere is not a run's folder: it does not exist; give the --output of a run"),
        ("RUN/metrics.jsonl", "line 1 is not that of a finished run; remove it"),
        ("RUN/checkpoints/step-00000009", "step-00000009 is not a run's folder"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(pool, trained, options, message):
    assert message in refuse(pool, *options.replace("RUN", str(trained["dgc"])).split())
    assert not {"kept_channels.png", "drop_frequency.png"} & {p.name for p in trained["dgc"].rglob("*.png")}


def test_more_than_one_rank_is_refused(pool, trained):
    line = refuse(pool, trained["gc2l"], ranks=2)
    assert line == "report draws one set of pictures and takes one process, not 2 ranks"


def test_a_run_without_a_checkpoint_and_a_place_that_is_taken_are_refused(pool, copied):
    output = copied("flgc")
    (output / "report").write_text("")
    assert refuse(pool, output) == f"{output}/report cannot be written: File exists"
    shutil.rmtree(output / "checkpoints" / "step-00000009")
    for left in (output / "checkpoints").iterdir():
        shutil.rmtree(left)
    assert f"{output} holds no checkpoint" in refuse(pool, output)


def test_data_of_other_classes_are_refused(pool, copied, tmp_path, tiny):
    shutil.copytree(tiny[tiny.index("--data-root") + 1], tmp_path / "images")
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / "images" / split / "class2")
    line = refuse(pool, copied("dgc"), "--data-root", tmp_path / "images")
    assert line.startswith("imagenet has 2 classes, the network of ") and line.endswith(" 3")
