"""Fed and fixed steps differ in their images alone."""

import json

import pytest
import torch

from benchmarks import input as pipeline
from benchmarks import report
from benchmarks.step import Step
from twolevel.errors import UserError

TINY = "--device cpu --model wrn-10-1 --batch 2 --images 6 --steps 2 --turns 2".split()


@pytest.fixture(autouse=True)
def one_thread():
    yield
    torch.set_num_threads(1)


def settings(*options: str) -> pipeline.Settings:
    return report.parse(pipeline.Settings, "input", [*TINY, *options])


def test_fed_steps_see_every_batch_and_fixed_steps_always_the_same(monkeypatch):
    seen = []
    monkeypatch.setattr(Step, "__call__", lambda step: seen.append((step.images, step.labels)))
    steps = pipeline.peers(settings())
    for name in ("fixed", "fed", "fixed", "fed"):
        steps[name]()
    fixed, first, again, second = (images for images, _ in seen)
    assert torch.equal(fixed, again)
    assert not torch.equal(first, second)
    assert not torch.equal(fixed, first)
    batches = [*pipeline.loader(settings()).batches(0)]
    for (images, labels), (expected, its_labels) in zip((seen[0], seen[1], seen[3]), batches, strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, its_labels)


def test_batches_go_on_into_the_next_epoch():
    batches = pipeline.endless(pipeline.loader(settings()))
    images = [next(batches)[0] for _ in range(6)]  # two epochs of three
    for a in range(6):
        for b in range(a):
            assert not torch.equal(images[a], images[b])


def test_blocks_take_turns_and_ratios_are_of_medians(monkeypatch):
    asked = []

    def fake(call, repeats=1):
        asked.append((call.__name__, repeats))
        if call.__name__ == "epoch":
            return 0.3
        return {"fed": 4.0, "fixed": 2.0}[call.__name__] if len(asked) > 2 else 100.0

    monkeypatch.setattr(report, "stopwatch", lambda device, threads: fake)
    found = pipeline.measure(settings("--turns", "3", "--steps", "7"))
    assert asked == [("fed", 7), ("fixed", 7)] * 4 + [("epoch", 1)] * 2
    assert found["fed_to_fixed"] == 2
    assert found["added_ms"] == 2000
    assert found["loader"] == {"epoch_ms": 300, "batches": 3, "batch_ms": 100}
    assert found["loader_to_fixed"] == 0.05


def test_results_name_their_command_and_settings(tmp_path, capsys):
    output = tmp_path / "input.json"
    argv = [*TINY, "--output", str(output)]
    pipeline.main(argv)
    result = json.loads(output.read_text())
    assert result["command"] == " ".join(["python -m benchmarks input", *argv])
    assert result["settings"]["images"] == 6
    assert result["machine"]["torch"] == torch.__version__
    assert result["steps"].keys() == {"fed", "fixed"}
    assert "batch of the loader" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "resnet18"},
            "--model resnet18 takes larger images than CIFAR's; use one such as wrn-16-4",
        ),
        ({"steps": 0}, "--steps 0 is not positive; use 1 or more"),
        ({"turns": 1}, "--turns 1 gives no spread; use 2 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        pipeline.Settings(device="cpu", **options)
