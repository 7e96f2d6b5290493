"""Grids of runs that last a moment."""

from pathlib import Path

import pytest

from twolevel.grids import declare

# Trains nothing: writes what a run leaves, as `twolevel train --config FILE --output FOLDER` does. The seed says how it
# ends; a run that is asked to stop leaves a checkpoint.
TRAINER = """
import json, pathlib, signal, sys, time
words = sys.argv[1:]
after = lambda name: words[words.index(name) + 1]
config, output = json.loads(pathlib.Path(after("--config")).read_text()), pathlib.Path(after("--output"))
seed, resumed = config["run"]["seed"], "--resume" in words
(output / "checkpoints").mkdir(parents=True, exist_ok=resumed)
def stop(*_):
    (output / "checkpoints" / "step-1").mkdir(exist_ok=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
with (output.parent / "started.txt").open("a") as file:
    file.write(f"{seed}{' resumed' if resumed else ''}\\n")
if seed == 13:
    sys.exit("the loss is nan at step 1")
(output / "config.json").write_text(json.dumps(config))
if seed == 99 and not resumed and not (output.parent / "go").exists():
    (output / "ready").touch()
    time.sleep(60)
records = [
    {"kind": "epoch", "epoch": e, "step": 3 * e, "train_loss": 2.0 - e / 10, "train_error": 50.0, "test_loss": 2.0,
     "test_error": 40.0 + seed - e, "seconds": 1.0}
    for e in range(1, config["optimiser"]["epochs"] + 1)
]
(output / "metrics.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in records))
"""

GRID = """
about = "a test"
seeds = [0, 1]

[settings]
model = "wrn-10-1"
epochs = 2

[[runs]]
conv = "sc"

[[runs]]
conv = ["gc", "gc2l"]
groups = [2, 4]
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "own.toml"
    path.write_text(GRID)
    return path


@pytest.fixture
def grid(file):
    """The grid of that file with some seeds."""
    return lambda *seeds: declare.read(str(file), seeds or None)


@pytest.fixture
def trainer(tmp_path) -> tuple[str]:
    path = tmp_path / "trainer.py"
    path.write_text(TRAINER)
    return (str(path),)
