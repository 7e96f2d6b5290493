"""The command line, run inside a rank of the pool."""

import contextlib
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from twolevel.cli import main

# Options of a run by one way to compute it, which no measurement chooses.
FIXED = ["--mesh", "auto", "--schedule", "overlapped", "--kernels", "grouped"]


@dataclass
class Outcome:
    """What one rank's command left: exit status and what it printed."""

    code: int
    out: str
    err: str


def command(*argv: object) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in argv])
    return Outcome(code, out.getvalue(), err.getvalue())


def command_by_rank(argv_by_rank: list[list]) -> Outcome:
    """As `command`, with other words on each rank."""
    import os

    return command(*argv_by_rank[int(os.environ["RANK"])])


def run(pool, *argv: object, ranks: int = 1, timeout: float = 90) -> list[Outcome]:
    """A command on that many ranks, which has to succeed."""
    outcomes = pool.run(command, *argv, ranks=ranks, timeout=timeout, init=False)
    assert [o.code for o in outcomes] == [0] * ranks, "\n".join(o.err for o in outcomes)
    return outcomes


def records(output: Path, kind: str) -> list[dict]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def losses(output: Path) -> list[tuple]:
    return [(r["step"], r["loss"], r["error"]) for r in records(output, "step")]


def weights(pool, output: Path, which: str = "model") -> dict[str, torch.Tensor]:
    """Those of a run's newest checkpoint, by name."""
    file = output.parent / f"{output.name}-{which}.safetensors"
    file.unlink(missing_ok=True)
    run(pool, "export", output, file, "--weights", which)
    return load_file(file)


def write_image_folder(root: Path, size: int = 16) -> Path:
    """An ImageNet-style folder of 24 training and 7 test images of noise, three classes."""
    import numpy as np

    noise = np.random.default_rng(0)
    for split, number in (("train", 24), ("val", 7)):
        for index in range(number):
            folder = root / split / f"class{index % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = noise.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return root


def seal(checkpoint: Path) -> None:
    """Give a checkpoint that a test has changed the checksums of what it holds now."""
    files = sorted(path for path in checkpoint.iterdir() if path.name != "SHA256SUMS")
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (checkpoint / "SHA256SUMS").write_text("".join(lines))


def result_line() -> dict:
    """As `twolevel grid` writes it of a run."""
    from twolevel.grids.declare import Run

    settings = {"model": "wrn-10-1", "epochs": 2, "batch_size": 16, "conv": "sc", "seed": 0}
    line = {"grid": "own", "run": "a", "settings": {}, "completed": Run(settings).completed, "seconds": 60.0}
    line |= {
        "final": {"epoch": 1, "test_error": 9.0},
        "curve": [{"epoch": 1, "train_loss": 1.0, "test_error": 9.0}],
    }
    line |= {"counts": {"parameters": 1, "macs": 2}, "machine": {"cpu": "x", "gpu": None}, "torch": "2"}
    return line
