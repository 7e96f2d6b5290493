"""A card's first hour goes on where it stopped, records what fails, and stops in time."""

import json
import textwrap
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import layers, report, step
from benchmarks.gpu import nccl, parity, plan, runner, tuning
from benchmarks.gpu.command import Settings, caches
from benchmarks.gpu.runner import Ledger, Step, run_steps
from benchmarks.kernels import Network
from twolevel.errors import UserError

CARD = {"gpu": "a card", "torch": "2.11"}
INFINITE = float("inf")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Makes a step of a few lines of Python, which can `write()` a result, in a folder that is not the repository."""
    monkeypatch.setattr(runner, "ROOT", tmp_path)

    def make(name: str, code: str, **options) -> Step:
        head = """
            import sys
            from pathlib import Path

            def write():
                Path(sys.argv[sys.argv.index("--output") + 1]).write_text("{}")
        """
        lines = textwrap.dedent(head) + textwrap.dedent(code)
        (tmp_path / f"step_{name}.py").write_text(lines)
        return Step(name, f"what {name} does", (f"step_{name}",), **{"takes_s": 1, **options})

    return make


def run(folder: Path, *steps: Step, budget_s: float = INFINITE, **options) -> tuple[dict, list[str]]:
    """What the ledger says of each step after a command of its own, and the steps that are left."""
    ledger = Ledger(folder, CARD)
    left = run_steps(steps, ledger, budget_s=budget_s, **options)
    return Ledger(folder, CARD).steps, [step.name for step in left]


def test_every_step_writes_its_result_and_what_it_printed(tiny, tmp_path, capsys):
    steps = [tiny(name, f"write(); print('table of {name}')") for name in ("first", "second")]
    found, left = run(tmp_path / "gpu", *steps)
    assert [(name, one["outcome"], one["reason"]) for name, one in found.items()] == [
        ("first", "done", None),
        ("second", "done", None),
    ]
    assert left == []
    assert (tmp_path / "gpu" / "first.json").read_text() == "{}"
    assert (tmp_path / "gpu" / "first.txt").read_text() == "table of first\n"
    assert json.loads((tmp_path / "gpu" / "steps.json").read_text())["machine"] == CARD
    out = capsys.readouterr().out
    assert out.index("[1/2] first: what first does (about 1 s)") < out.index("table of first")
    assert "second: done after" in out


def test_a_step_that_fails_is_recorded_and_the_next_goes_on(tiny, tmp_path):
    failing = tiny(
        "failing", "print('so far so good'); raise ValueError('no such kernel\\nframe #0: somewhere')"
    )
    silent, last = tiny("silent", "sys.exit(3)"), tiny("last", "write()")
    forgetful = tiny("forgetful", "print('nothing written')")
    ours = tiny("ours", "print('OldError: before'); sys.exit('benchmarks: 3 tests failed: a, b, c')")
    found, _ = run(tmp_path / "gpu", failing, silent, forgetful, ours, last)
    assert {name: (one["outcome"], one["reason"]) for name, one in found.items()} == {
        "failing": ("failed", "ValueError: no such kernel"),
        "silent": ("failed", "it ended with status 3"),
        "forgetful": ("failed", "it has written no result"),
        "ours": ("failed", "benchmarks: 3 tests failed: a, b, c"),
        "last": ("done", None),
    }
    assert "so far so good" in (tmp_path / "gpu" / "failing.txt").read_text()


def test_a_step_that_cannot_run_here_is_skipped_with_the_reason(tiny, tmp_path):
    found, _ = run(tmp_path / "gpu", tiny("nccl", f"print('there is one card'); sys.exit({runner.SKIP})"))
    assert (found["nccl"]["outcome"], found["nccl"]["reason"]) == ("skipped", "there is one card")


def test_a_step_that_hangs_is_ended_with_all_that_it_has_started(tiny, tmp_path):
    pid = tmp_path / "pid"
    hanging = tiny(
        "hanging",
        f"""
            import subprocess
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path({str(pid)!r}).write_text(str(child.pid))
            child.wait()
        """,
        limit_s=2,
    )
    found, _ = run(tmp_path / "gpu", hanging, tiny("next", "write()"))
    assert found["hanging"]["reason"] == "it was not done after 2 s"
    assert found["next"]["outcome"] == "done"
    status = Path("/proc", pid.read_text(), "stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"  # ended, whoever waits for it


def test_what_is_done_is_not_repeated_and_what_failed_is_tried_again_last(tiny, tmp_path, capsys):
    folder = tmp_path / "gpu"
    count = f"""
        seen = Path({str(tmp_path)!r}) / "order"
        seen.write_text((seen.read_text() if seen.exists() else "") + NAME + " ")
    """
    failing, done, late = (
        tiny(name, f"NAME = {name!r}\n{textwrap.dedent(count)}\n{'write()' * (name != 'failing')}")
        for name in ("failing", "done", "late")
    )
    run(folder, failing, done)
    assert (tmp_path / "order").read_text().split() == ["failing", "done"]
    run(folder, failing, done, late)
    assert (tmp_path / "order").read_text().split()[2:] == ["late", "failing"]
    run(folder, failing, done, late, again=["done"])
    assert (tmp_path / "order").read_text().split()[4:] == ["done", "failing"]


def test_a_result_of_an_earlier_try_does_not_pass_for_a_new_one(tiny, tmp_path):
    folder = tmp_path / "gpu"
    run(folder, tiny("step", "write()"))
    found, _ = run(folder, tiny("step", "pass"), again=["step"])
    assert found["step"]["outcome"] == "failed"
    assert not (folder / "step.json").exists()


def test_it_stops_before_a_step_that_does_not_fit(tiny, tmp_path, capsys):
    folder = tmp_path / "gpu"
    short, long = tiny("short", "write()", takes_s=10), tiny("long", "write()", takes_s=200)
    found, left = run(folder, short, long, budget_s=100)
    assert [*found] == ["short"] and left == ["long"]
    out = capsys.readouterr().out
    assert "[1/2] short: what short does (about 10 s, 100 s left)" in out
    assert "stopped before long (about 200 s, " in out and "the same command goes on there" in out
    found, left = run(folder, short, long, budget_s=300)
    assert found["long"]["outcome"] == "done" and left == []


def test_a_step_is_ended_when_the_budget_is(tiny, tmp_path):
    slow = tiny("slow", "import time; time.sleep(600)", takes_s=1)
    found, _ = run(tmp_path / "gpu", slow, budget_s=2)
    assert found["slow"]["reason"] == "it was not done after 2 s"


@pytest.mark.parametrize("other", [{"gpu": "another"}, {"torch": "2.14"}])
def test_results_of_another_machine_are_not_gone_on_with(tiny, tmp_path, other):
    folder = tmp_path / "gpu"
    run(folder, tiny("step", "write()"))
    with pytest.raises(UserError, match=r"--folder .*gpu holds results of .*; name another folder"):
        Ledger(folder, CARD | other)
    assert Ledger(folder).outcome("step") == "done"  # to be read alone


def test_steps_find_caches_that_travel_with_their_folder(tiny, tmp_path):
    environment = caches(tmp_path / "gpu")
    shown = tiny("shown", "import os; print(os.environ['XDG_CACHE_HOME']); write()")
    run(tmp_path / "gpu", shown, environment=environment)
    assert (tmp_path / "gpu" / "shown.txt").read_text().strip() == str(tmp_path / "gpu" / "cache")
    assert all(Path(environment[name]).is_relative_to(tmp_path) for name in environment if "CACHE" in name)


# ---- the plan ----


def test_names_are_unique_and_every_step_ends_within_eight_minutes():
    steps = plan.steps(processes=4)
    assert len({one.name for one in steps}) == len(steps)
    assert all(0 < one.takes_s <= one.limit_s <= 480 for one in steps)


def test_worth_orders_the_steps():
    kinds = list(dict.fromkeys(one.name.partition("-")[0] for one in plan.steps()))
    assert kinds == ["parity", "tuning", "step", "profile", "layers", "nccl"]


@pytest.mark.parametrize("one", plan.steps(processes=2), ids=lambda one: one.name)
def test_every_step_is_a_command_that_its_program_takes(one, monkeypatch, tmp_path):
    """Options are parsed as on a card, and peers are checked by their names; nothing is built."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    name, *options = one.command
    if name == "benchmarks":
        name, *options = options
    settings = {
        "benchmarks.gpu.parity": parity.Settings,
        "benchmarks.gpu.tuning": tuning.Settings,
        "benchmarks.gpu.profiling": step.Settings,
        "benchmarks.gpu.nccl": nccl.Settings,
        "step": step.Settings,
        "layers": layers.Settings,
    }[name]
    parsed = report.parse(settings, "gpu", [*options, "--output", str(tmp_path / "x.json")])
    assert parsed.output == tmp_path / "x.json"
    if settings is tuning.Settings:
        assert str(Network.named(parsed.network)).startswith("wrn-28-")


def test_the_command_needs_a_gpu_but_for_its_plan(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        benchmarks.main(["gpu", "--folder", str(tmp_path / "gpu")])
    assert "finds no GPU on this machine" in str(end.value.code)
    benchmarks.main(["gpu", "--folder", str(tmp_path / "gpu"), "--plan"])
    out = capsys.readouterr().out
    assert all(one.name in out for one in plan.steps())
    assert out.count("not tried") == len(plan.steps())


@pytest.mark.parametrize("option", ["only", "again"])
def test_a_step_that_there_is_not_is_named(option):
    with pytest.raises(UserError, match="unknown step 'tuning-10'; did you mean tuning-10-4"):
        Settings(**{option: ("tuning-10",)})
