"""Training on two ranks leaves no warning of torch, neither of what it deprecates nor of what is slow in it."""

import warnings

import pytest
import torch
from command import command

from twolevel.distributed import init_mesh
from twolevel.training.step import make_step

GC2L = {"conv": "gc2l", "groups": 4}
# Ranks on the data axis, and what they train: every collective, and every kind of gradient that buckets of DDP take.
CASES = {
    "group axis": (1, GC2L),
    "group axis, balanced": (1, {"conv": "bgc", "groups": 4}),
    "data axis": (2, {"conv": "sc"}),
    "data axis, synchronised": (2, {"conv": "sc", "sync_batch_norm": True}),
    "data axis, two-level": (2, {**GC2L, "sync_batch_norm": True}),
    "data axis, two-level in bf16": (2, {**GC2L, "precision": "bf16"}),
    "data axis, flgc": (2, {"conv": "flgc", "groups": 4}),
    "data axis, dgconv": (2, {"conv": "dgconv", "groups": 4}),
    "data axis, lgc": (2, {"conv": "lgc", "groups": 4}),
    "channel": (1, {"parallel": "channel"}),
    "fsdp": (2, {"parallel": "fsdp"}),
    "1f1b": (1, {"parallel": "1f1b"}),
}


def warned(data, options):
    """What is warned of in two steps and a test."""
    images, labels = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last), torch.arange(4)
    torch.set_warn_always(True)  # torch gives some of its warnings once a process
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mesh = init_mesh(data=data, device="cpu")
            step = make_step("wrn-10-2", mesh, "cpu", image_shape=(3, 8, 8), **options)
            for _ in range(2):
                step(images, labels)
            step.placed.logits(step.placed.model.eval(), images)
    finally:
        torch.set_warn_always(False)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("case", CASES)
def test_steps_leave_no_warning(pool, case):
    assert pool.run(warned, *CASES[case], ranks=2) == [[], []]


def command_warned_always(*argv):
    torch.set_warn_always(True)
    try:
        return command(*argv)
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize("options", ["--conv gc2l", "--conv flgc --data-parallel 2 --sync-batch-norm"])
def test_a_run_says_nothing_on_stderr(pool, tiny, tmp_path, options):
    argv = [*tiny, *options.split(), "--output", tmp_path / "run"]
    outcomes = pool.run(command_warned_always, "train", *argv, ranks=2, timeout=90, init=False)
    assert [(o.code, o.err) for o in outcomes] == [(0, "")] * 2
