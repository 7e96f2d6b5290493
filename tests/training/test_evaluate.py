"""A test says how many images it could not compute, and takes loss and error without a silent nan."""

import json
import math
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from command import command, records
from torch.nn import functional as F

from twolevel.distributed import init_mesh
from twolevel.distributed.strategies import Placed
from twolevel.models import create
from twolevel.training.display import Display
from twolevel.training.evaluate import Tested, evaluate
from twolevel.training.metrics import MetricsLog, read
from twolevel.training.step import make_step

Tested.__test__ = False  # else pytest takes it, by its name, for a class of tests
NAN, INF = math.nan, math.inf


class Given:
    """A placed network of one rank, whose logits are its images."""

    model = torch.nn.Identity()
    device = torch.device("cpu")

    def eval_batches(self, model, test):
        yield from test

    def logits(self, model, images):
        return images

    def total(self, sums):
        return sums.tolist()


def evaluated(logits, labels, parts=1, dtype=torch.float32):
    logits, labels = torch.tensor(logits, dtype=dtype), torch.tensor(labels)
    batches = zip(logits.chunk(parts), labels.chunk(parts), strict=True)
    return evaluate(Given(), batches)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_loss_is_the_mean_of_finite_images_and_others_are_wrong(parts):
    # Of the others the largest logit, the first, is that of the label where there is one.
    logits = [[1.0, 0.0], [NAN, NAN], [INF, 0.0], [0.0, 2.0]]
    result = evaluated(logits, [0, 0, 0, 0], parts)
    wanted = [math.log(1 + math.exp(d)) for d in (-1, 2)]
    assert result.loss == pytest.approx(sum(wanted) / 2, rel=1e-6)  # float32
    assert result[1:] == (75.0, 4, 2, None)


class Pixels(Given):
    """A placed network whose logits are the first row of pixels of an image's first channel."""

    def logits(self, model, images):
        return images[:, 0, 0]


def test_a_mirrored_test_takes_the_mean_of_both_outputs_and_leaves_the_plain_ones():
    rows = [
        [3.0, 0.0, 2.0],
        [0.0, 5.0, 1.0],
        [0.0, 1.0, 2.5],
    ]  # of the second the middle is the largest, either way
    images = torch.tensor(rows)[:, None, None]
    labels = torch.tensor([0, 1, 0])  # of the third the mean is [1.25, 1, 1.25], whose first largest is 0
    plain = evaluate(Pixels(), [(images, labels)])
    both = evaluate(Pixels(), [(images, labels)], mirrored=True)
    assert both[:4] == plain[:4] and plain.error == pytest.approx(100 / 3)
    assert plain.mirrored_error is None and both.mirrored_error == 0
    assert "test_mirrored_error" in both.record() and "test_mirrored_error" not in plain.record()


def test_an_image_is_finite_where_its_logits_and_its_loss_are():
    hidden = [[0.0, -INF]]  # a loss of 0
    assert evaluated(hidden, [0]).not_finite == 1
    far = [[3e38, -3e38]]  # finite, but for their difference
    assert evaluated(far, [1]).not_finite == 1
    assert evaluated(far, [0]) == Tested(0.0, 0.0, 1, 0)
    assert evaluated([[1e30, 0.0]], [1]) == Tested(pytest.approx(1e30), 100.0, 1, 0)


@pytest.mark.parametrize("logits", [[[NAN, 0.0], [0.0, INF]], [[1e308, -1e307], [1e308, -1e307]]])
def test_no_mean_is_none(logits):
    """No image is finite, or the sum of their losses is not."""
    result = evaluated(logits, [1, 1], dtype=torch.float64)
    assert result.loss is None
    assert result.error == 100


# Every way to share a network, on four ranks where it takes them.

WAYS = [("group", 1, 1), ("group", 1, 4), ("group", 2, 2), ("channel", 2, 2)]
WAYS += [("fsdp", 4, 1), ("naive", 1, 2), ("gpipe", 1, 2), ("1f1b", 1, 2)]
BAD = [1, 2, 5]


def seven_images():
    """Seven images, of which three have a pixel that is not a number, or no sum."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(7, 3, 8, 8, generator=generator, dtype=torch.float64)
    images[1, 0, 0, 0], images[2, 1, 3, 3], images[5] = NAN, INF, -INF
    return images, torch.randint(0, 10, (7,), generator=generator)


class Images:
    """Their share of one rank."""

    def __init__(self, rank, ranks):
        self.images, self.labels = seven_images()
        self.own = slice(7 * rank // ranks, 7 * (rank + 1) // ranks)

    def __len__(self):
        return 7

    def eval_batches(self, size):
        yield from zip(self.images[self.own].split(size), self.labels[self.own].split(size), strict=True)


def evaluate_on_ranks(way, data, group, conv):
    mesh = init_mesh(data=data, group=group, device="cpu")
    options = {"conv": conv, "groups": 4 if conv == "gc2l" else 1, "image_shape": (3, 8, 8)}
    step = make_step("wrn-10-1", mesh, "cpu", parallel=way, precision="float64", **options)
    return evaluate(step.placed, Images(mesh.get_local_rank("data"), data))


@pytest.mark.parametrize(("way", "data", "group"), WAYS)
def test_ranks_count_together_what_is_not_finite(pool, way, data, group):
    conv = "gc2l" if way == "group" else "sc"
    images, labels = seven_images()
    good = [i for i in range(7) if i not in BAD]
    with torch.no_grad():
        logits = create("wrn-10-1", conv=conv, groups=4 if conv == "gc2l" else 1).double().eval()(images)
    loss = F.cross_entropy(logits[good], labels[good]).item()
    right = (logits[good].argmax(1) == labels[good]).sum().item()
    wanted = (pytest.approx(loss, rel=1e-12), pytest.approx(100 * (1 - right / 7), rel=1e-12), 7, 3)
    for result in pool.run(evaluate_on_ranks, way, data, group, conv, ranks=data * group):
        assert isinstance(result, Tested)
        assert result[:4] == wanted


# What becomes of it: records, lines, `twolevel evaluate`.


@contextmanager
def first_test_images_spoilt(number):
    """The logits of the first images of every test are not numbers."""
    whole = Placed.logits

    def logits(self, model, images):
        computed = whole(self, model, images)
        if not model.training:
            computed[:number] = NAN
        return computed

    with mock.patch.object(Placed, "logits", logits):
        yield


def spoilt_command(number, *argv):
    with first_test_images_spoilt(number):
        return command(*argv)


def test_records_lines_and_evaluate_say_how_many_images_were_not_finite(pool, tiny, tmp_path):
    output = tmp_path / "run"
    argv = [2, "train", *tiny, "--epochs", 1, "--ema-decay", 0.9, "--output", output]
    (trained,) = pool.run(spoilt_command, *argv, ranks=1, init=False)
    assert trained.code == 0, trained.err
    (epoch,) = records(output, "epoch")
    assert (epoch["test_images"], epoch["test_not_finite"], epoch["ema_test_not_finite"]) == (7, 2, 2)
    assert math.isfinite(epoch["test_loss"])
    assert epoch["test_error"] >= 100 * 2 / 7
    line = next(line for line in trained.out.splitlines() if line.startswith("epoch 1/1"))
    accuracy, averaged = (100 - epoch[f"{which}test_error"] for which in ("", "ema_"))
    assert f"accuracy {accuracy:.2f} % (EMA {averaged:.2f} %)  lr 0.1" in line
    assert "           2 (EMA 2) of 7 images not finite\n" in trained.out
    assert "test_not_finite" in (output / "epochs.csv").read_text().splitlines()[0].split(",")

    test = ["evaluate", output, "--precision", "float64"]
    (again,) = pool.run(spoilt_command, 2, *test, ranks=1, init=False)
    assert again.out == (
        f"test loss {epoch['test_loss']:.4f}  error {epoch['test_error']:.2f} %  accuracy {accuracy:.2f} %  "
        "(7 images, 2 of them not finite)\n"
    )
    (none,) = pool.run(spoilt_command, 7, *test, ranks=1, init=False)
    assert none.out == "test loss none  error 100.00 %  accuracy 0.00 %  (7 images, 7 of them not finite)\n"


RECORD = {"kind": "epoch", "epoch": 1, "step": 3, "train_loss": 2.5, "train_error": 90.0}
RECORD |= {"learning_rate": 0.1, "images_per_second": 10.0, "seconds": 1.0}


def test_a_line_of_finite_images_says_nothing_of_others_and_one_of_none_has_no_loss(capsys):
    display = Display(3, 0, shown=True)
    for result in (
        Tested(2.25, 60.0, 500, 0),
        Tested(1.23456e30, 60.0, 500, 0),
        Tested(None, 100.0, 500, 500),
    ):
        display.epoch(RECORD | result.record(), 1)
    finite, large, none, lost = capsys.readouterr().out.splitlines()
    assert "test loss 2.250  accuracy 40.00 %  lr 0.1" in finite
    assert "test loss 1.235e+30  accuracy 40.00 %  lr 0.1" in large
    assert "test loss none  accuracy 0.00 %  lr 0.1" in none
    assert lost == "           500 of 500 images not finite"


def test_every_record_is_json(tmp_path):
    """JSON has no nan and no infinity: they are null."""
    log = MetricsLog(tmp_path)
    log.write(RECORD | Tested(None, 100.0, 500, 500).record() | {"dgc_threshold": INF})
    log.close()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert record["test_loss"] is record["dgc_threshold"] is None
    assert [*read(tmp_path, "epoch")] == [record]


def test_a_curve_has_a_gap_where_there_is_no_loss(tmp_path):
    from twolevel.analysis.figures import training_curve

    step = {"step": 3, "loss": 2.5}
    epochs = [RECORD | Tested(loss, 90.0, 500, 0).record() for loss in (None, 2.0)]
    epochs[1] |= {"epoch": 2, "step": 6}
    for shown in (epochs, epochs[:1]):
        file = training_curve([step], shown, "run", tmp_path / "curve.png")
        assert file.read_bytes().startswith(b"\x89PNG")
