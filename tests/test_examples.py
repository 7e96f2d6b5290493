"""The examples run as they stand, and show what they say."""

import json
import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import torch

from twolevel import convert

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def test_a_network_of_ones_own_trains_on_four_ranks_and_is_whole_in_the_end(tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run(
        [sys.executable, *words, str(EXAMPLES / "own_network.py")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss ([\d.]+)", done.stdout)]
    assert len(losses) == 5 and losses[-1] < losses[0]
    (accuracy,) = re.findall(r"accuracy ([\d.]+)%", done.stdout)
    assert float(accuracy) > 15  # of ten classes
    state = torch.load(tmp_path / "network.pt", weights_only=True)
    assert state["1.local.weight"].shape == (128, 16, 3, 3)  # all four groups
    assert len((EXAMPLES / "own_network.py").read_text().splitlines()) <= 40


def test_a_network_of_torchvision_is_converted_and_fine_tuned(tmp_path, monkeypatch, capsys):
    spec = util.spec_from_file_location("finetune", EXAMPLES / "finetune.py")
    finetune = util.module_from_spec(spec)
    spec.loader.exec_module(finetune)
    monkeypatch.chdir(tmp_path)
    finetune.main(epochs=1)
    out = capsys.readouterr().out
    assert "19 convolutions became gc2l, 1 were left" in out and "nearest weights, relative error" in out
    (nearest,) = re.findall(r"nearest weights: accuracy .*, fine-tuned ([\d.]+)%", out)
    (again,) = re.findall(r"finetuned.pt: accuracy ([\d.]+)%", out)
    assert nearest == again
    saved = tmp_path / "weights.pt"
    torch.save(finetune.dense(None).state_dict(), saved)
    assert convert(finetune.dense(str(saved)), "gc2l", 4).conversion.replaced


def test_the_notebook_runs_and_shows_what_it_says(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((EXAMPLES / "one_layer.ipynb").read_text())["cells"]
    assert all(
        not cell["outputs"] for cell in cells if cell["cell_type"] == "code"
    )  # made anew by who runs it
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    names: dict = {}
    exec(compile(source, "one_layer.ipynb", "exec"), names)
    names["plt"].close("all")
    for weight in ("drawn", "trained"):
        alone, two_level = names["series"][f"GC, {weight}"], names["series"][f"GC-2L, {weight}"]
        assert alone[0] == two_level[0] == 0 and alone == sorted(alone)
        assert all(ours < theirs for ours, theirs in zip(two_level[1:], alone[1:], strict=True))
        assert two_level[-1] < two_level[-2]
    assert max(names["series"]["GC-2L, trained, R = 4"]) < max(names["series"]["GC-2L, trained"])
