"""Hostile input: whatever a command is given, it succeeds or says in one line what is wrong, and does so soon.

python tests/fuzz.py [CASES] [KIND ...]      so many cases in all, and how they ended
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from command import Outcome, command, result_line, seal
from mutations import (
    changed_bytes,
    changed_json,
    changed_safetensors,
    changed_tree,
    command_line,
    options_of,
    toml,
    word,
)

from twolevel import models
from twolevel.cli import COMMANDS
from twolevel.errors import UserError
from twolevel.ops import autotune

CPU_SECONDS, SECONDS = 20, 120
"""What a case may take, of processor time and by the clock."""

MODEL = ["--model", "wrn-10-1", "--groups", "2", "--batch-size", "16", "--max-steps", "1"]
# Whatever else is asked of `train` and `evaluate`: they end where the data is read, and nothing is fetched or measured.
NO_DATA = ["--data", "cifar10", "--data-root", "nowhere"]
NO_RUN = [*NO_DATA, "--no-download"]


Case = list[Any] | Callable[[], object]
"""The words of a command, or what else reads a file."""


class Defect(AssertionError):
    """A case that ended as none may."""


class Sandbox:
    """A working directory two folders below `root`, a home and a cache, and a run to be damaged."""

    def __init__(self, root: Path):
        self.root, self.here = root, root / "a" / "b"
        self.here.mkdir(parents=True)
        (root / "home").mkdir()
        self.run, self.copy, self.exported = root / "run", self.here / "copy", root / "exported.safetensors"

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        places = {"HOME": str(self.root / "home"), "XDG_CACHE_HOME": str(self.root / "cache")}
        with contextlib.chdir(self.here), mock.patch.dict(os.environ, places):
            made = [
                command("train", *MODEL, "--output", self.run),
                command("export", self.run, self.exported),
            ]
            assert [outcome.code for outcome in made] == [0, 0], made
            self.state = json.loads(next(self.run.glob("checkpoints/*/state.json")).read_text())
            yield

    def files(self) -> set[Path]:
        return {path for path in self.root.rglob("*") if path.is_file()}

    def fresh_copy(self) -> Path:
        """A copy of the run; its checkpoint."""
        shutil.copytree(self.run, self.copy)
        return next(self.copy.glob("checkpoints/*"))

    def clear(self) -> None:
        for path in self.here.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# ---- the kinds: each prepares a case and returns what runs it ------------------------------------


def words(rng: random.Random, box: Sandbox) -> Case:
    """A command line."""
    name = rng.choice([*COMMANDS])
    first = {"evaluate": [box.run], "export": [box.run, "out.safetensors"], "report": [box.run]}
    first |= {"grid": [rng.choice(["table1", "figure5", "x.toml"])], "train": MODEL}
    if name == "report" and rng.random() < 0.9:  # draws, which takes long
        first |= {"report": ["nowhere"]}
    if rng.random() < 0.05:
        argv = [word(rng) for _ in range(rng.randrange(5))]
    else:
        options = _options(name)
        options.pop("calibrate", None)
        argv = command_line(rng, name, options, [str(one) for one in first.get(name, [])])
    last = {"train": NO_RUN, "evaluate": NO_DATA, "grid": ["--list"], "plan": []}
    return [*argv, *last.get(argv[0] if argv else "", [])]


def _options(name: str) -> dict[str, type]:
    import importlib

    from twolevel.training.config import TrainConfig

    module = importlib.import_module(f"twolevel.cli.{name}")
    cls = TrainConfig if name == "train" else getattr(module, f"{name.capitalize()}Config", None)
    return {} if cls is None else options_of(cls)


def config(rng: random.Random, box: Sandbox) -> Case:
    """A configuration file of a new run."""
    settings = box.state["config"]
    Path("own.json").write_bytes(changed_json(rng, settings))
    return ["train", "--config", "own.json", *NO_RUN]


def state(rng: random.Random, box: Sandbox) -> Case:
    """What a checkpoint holds beside tensors, with right checksums."""
    checkpoint = box.fresh_copy()
    (checkpoint / "state.json").write_bytes(changed_json(rng, box.state))
    seal(checkpoint)
    return _reader_of(rng, box)


def shard(rng: random.Random, box: Sandbox) -> Case:
    """The header of a checkpoint's shard, with right checksums."""
    checkpoint = box.fresh_copy()
    file = next(checkpoint.glob("*.safetensors"))
    file.write_bytes(changed_safetensors(rng, file.read_bytes()))
    seal(checkpoint)
    return _reader_of(rng, box)


def sums(rng: random.Random, box: Sandbox) -> Case:
    """A checkpoint's checksums."""
    file = box.fresh_copy() / "SHA256SUMS"
    lines = file.read_bytes()
    if rng.random() < 0.3:
        name = rng.choice(
            ["../../x", "/etc/passwd", "state.json", "..", "é.safetensors", "a b", "x.safetensors"]
        )
        file.write_text(lines.decode() + "0" * rng.choice([64, 63, 1]) + f"  {name}\n")
    else:
        file.write_bytes(changed_bytes(rng, lines))
    return _reader_of(rng, box)


def _reader_of(rng: random.Random, box: Sandbox) -> Case:
    """A command that reads the copy of the run."""
    argv = ["export", "copy", "out.safetensors"]
    if rng.random() < 0.15:
        argv = ["train", *MODEL, "--output", "copy", "--resume"]
    elif rng.random() < 0.2:
        argv = ["evaluate", "copy", *NO_DATA]
    return argv


def exported(rng: random.Random, box: Sandbox) -> Case:
    """An exported file."""
    Path("x.safetensors").write_bytes(changed_safetensors(rng, box.exported.read_bytes()))
    if rng.random() < 0.3:
        return ["evaluate", "x.safetensors", *NO_DATA]

    return lambda: models.load("x.safetensors")


def store(rng: random.Random, box: Sandbox) -> Case:
    """The measured choices of kernels, and a measured machine."""
    if rng.random() < 0.5:
        from dataclasses import asdict

        from twolevel.analysis.planner import presets

        Path("own.json").write_bytes(changed_json(rng, asdict(presets.machine("titan-rtx"))))
        argv = ["plan", "--model", "wrn-10-1", "--ranks", "2", "--groups", "2", "--machine", "own.json"]
        return argv
    problem, able = _Layer(), [autotune.Form("overlapped", name) for name in ("grouped", "products")]
    kept = {autotune.line(problem, able): {"form": [*able[0]], "ms": {str(form): 1.0 for form in able}}}
    Path("forms.json").write_bytes(changed_json(rng, kept))

    def look_up() -> None:
        measurements = autotune.Measurements(autotune.Store(Path("forms.json")))
        with mock.patch.object(autotune, "measurements", lambda: measurements):
            nothing = lambda _: [lambda: None] * 2  # noqa: E731
            for waits in ({}, dict.fromkeys(able, 0.5)):
                found = autotune.decide(problem, able, nothing, small=False, may_measure=True, waits=waits)
                assert found is not None and found.form in able
                found.why()

    return look_up


class _Layer:
    """As much of a layer as its measurement needs."""

    batch, device, odd = 8, torch.device("cpu"), ""

    def title(self) -> str:
        return "a layer"


GRID = {"about": "x", "seeds": [0, 1], "settings": {"model": "wrn-10-1", "epochs": 2, "batch_size": 16}}
GRID |= {"runs": [{"conv": "sc"}, {"conv": ["gc", "gc2l"], "groups": [2, 4]}]}


def grid(rng: random.Random, box: Sandbox) -> Case:
    """A grid's declaration."""
    if rng.random() < 0.75:
        tree = changed_tree(rng, GRID)
        content = toml(tree if isinstance(tree, dict) else {"runs": tree}).encode(errors="replace")
    else:
        content = changed_bytes(rng, toml(GRID).encode())
    Path("own.toml").write_bytes(content)
    return ["grid", "own.toml", "--list"]


def lines(rng: random.Random, box: Sandbox) -> Case:
    """The lines of finished runs."""
    line = result_line()
    Path("own.jsonl").write_bytes(changed_json(rng, line).replace(b"\n", b" ") + b"\n")
    if rng.random() < 0.2:
        return ["report", "own.jsonl"]
    Path("own.toml").write_text(toml(GRID))
    return ["grid", "own.toml", "--list", "--lines", "own.jsonl"]


KINDS = {kind.__name__: kind for kind in (words, config, state, shard, sums, exported, store, grid, lines)}
SHARES = {"words": 3, "config": 2, "state": 2, "exported": 2}
"""Parts of all cases that a kind has; one unless said."""


def shares(cases: int) -> dict[str, int]:
    """How many cases each kind has of so many."""
    parts = {kind: SHARES.get(kind, 1) for kind in KINDS}
    found = {kind: cases * part // sum(parts.values()) for kind, part in parts.items()}
    return found | {"words": found["words"] + cases - sum(found.values())}


# ---- running them --------------------------------------------------------------------------------


def fuzz(kind: str, cases: int, seed: int = 0, *, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Run cases of a kind: how often one `succeeded`, was `refused` or was a `defect`, and the defects."""
    ended, defects = Counter(), []
    with tempfile.TemporaryDirectory(prefix="twolevel-fuzz-") as root:
        box = Sandbox(Path(root).resolve())
        with box.entered():
            for number in range(first, first + cases):
                rng = random.Random(f"{kind} {seed} {number}")
                try:
                    ended[_outcome(kind, rng, box)] += 1
                except Defect as defect:
                    ended["defect"] += 1
                    defects.append(f"{kind} {number} of seed {seed}: {defect}")
                box.clear()
    return ended, defects


def _outcome(kind: str, rng: random.Random, box: Sandbox) -> str:
    case = KINDS[kind](rng, box)
    before = box.files()
    try:
        with _limited():
            outcome = _run(case)
    except Exception as error:
        raise Defect(f"{case}: {''.join(traceback.format_exception(error)[-6:])}") from error
    errors = [
        line
        for line in outcome.err.splitlines()
        if "warning:" not in line and not line.startswith("machine:")
    ]
    if outcome.code not in (0, 2) or (outcome.code == 2 and len(errors) != 1):
        raise Defect(f"{case}: status {outcome.code}, {outcome.err!r:.600}")
    if re.search(r"warning: .*\(/.*:\d+\)$", outcome.err, re.M):
        raise Defect(f"{case}: {outcome.err!r:.600}")
    own = [box.copy, box.here / "runs", box.root / "cache", box.run / "report"]
    strange = {path for path in box.files() - before if not any(path.is_relative_to(one) for one in own)}
    if outcome.code == 0:  # what was asked for by name
        strange = {path for path in strange if path.parent != box.here}
    if strange:
        raise Defect(f"{case}: made {sorted(map(str, strange))[:3]}")
    return "succeeded" if outcome.code == 0 else "refused"


def _run(case: Case) -> Outcome:
    try:
        if isinstance(case, list):
            return command(*case)
        case()
    except UserError as error:
        return Outcome(2, "", f"{error}\n")
    except SystemExit as end:  # --help
        return Outcome(end.code if isinstance(end.code, int) else 0, "", "")
    return Outcome(0, "", "")


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raises where the body takes longer than a case may."""

    def late(number: int, frame: object) -> None:
        raise Defect(f"it takes more than {CPU_SECONDS} s: " + "".join(traceback.format_stack(frame)[-4:]))

    timers = {
        signal.ITIMER_PROF: (signal.SIGPROF, CPU_SECONDS),
        signal.ITIMER_REAL: (signal.SIGALRM, SECONDS),
    }
    before = {number: signal.signal(number, late) for number, _ in timers.values()}
    try:
        for timer, (_, seconds) in timers.items():
            signal.setitimer(timer, seconds)
        yield
    finally:
        for timer, (number, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def main(argv: list[str]) -> int:
    total = int(argv[0]) if argv else 10_000
    failed = False
    for kind, cases in shares(total).items():
        if argv[1:] and kind not in argv[1:]:
            continue
        ended, defects = fuzz(kind, cases)
        print(
            f"{kind:10} {cases:6}  " + ", ".join(f"{ended[how]} {how}" for how in sorted(ended)), flush=True
        )
        print("\n".join(defects), flush=True) if defects else None
        failed |= bool(defects)
    return int(failed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
