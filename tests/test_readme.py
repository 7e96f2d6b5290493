"""What the README says to type works, and its figures are those of the results."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documented import CONFIGS, KNOWN_OPTIONS, check_options, commands_in, options_in, recipes_in

from twolevel import models
from twolevel.cli.options import parse
from twolevel.models.files import save
from twolevel.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LAUNCH = (ROOT / "launch" / "README.md").read_text()


def shell_lines() -> list[list[str]]:
    """The words of every line in the README's shell blocks."""
    return commands_in("\n".join(line[4:] for line in README.splitlines() if line.startswith("    ")))


def recipe_lines() -> list[list[str]]:
    """The words of the recipes in launch/README.md that train."""
    return recipes_in("\n".join(re.findall(r"`([^`]*launch/[^`]*)`", LAUNCH)))


@pytest.mark.parametrize("words", [*shell_lines(), *recipe_lines()], ids=" ".join)
def test_every_command_takes_its_options(words):
    check_options(words)


def test_the_blocks_are_read_whole():
    names = [words[words.index("twolevel") + 1] for words in shell_lines()]
    assert {*names} == {*CONFIGS} and names.count("train") == 10
    assert len(recipe_lines()) == 7


def test_links_are_absolute_and_lead_somewhere():
    """The index that shows the README has no files beside it."""
    links = re.findall(r"\]\(([^)]+)\)", README)
    base = re.compile(
        r"https://(?:raw\.githubusercontent\.com/twolevel/twolevel|github\.com/twolevel/twolevel/blob)/main/"
    )
    own = [base.sub("", link) for link in links if base.match(link)]
    assert len(own) > 20 and all((ROOT / path).exists() for path in own)
    assert all(link.startswith("https://") for link in links)


def test_every_option_that_is_named_exists():
    assert options_in(README) | options_in(LAUNCH) <= KNOWN_OPTIONS


def test_the_python_block_runs_in_one_process(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    narrow = {"name": "wrn-10-1", "conv": "gc2l", "groups": 4, "num_classes": 10}
    save(tmp_path / "model.safetensors", models.create(**narrow).state_dict(), narrow, {})
    # On one rank the widest network would take 2.3 GB, and a minute to draw.
    assert block.count("wrn-28-80") == 1
    (tmp_path / "block.py").write_text(block.replace("wrn-28-80", "wrn-28-1"))
    done = subprocess.run(
        [sys.executable, "block.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "19 convolutions became gc2l" in done.stdout


def test_the_inference_table_is_that_of_its_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "inference.json").read_text())
    measured = (ROOT / "docs" / "pages" / "explanation" / "measured.md").read_text()
    text = measured[measured.index("All convolutions of a ResNet-18") :]
    text = text[: text.index("A whole network in its exported forms")]
    rows = {
        "group convolution alone": "gc",
        "FLGC, equal groups": "flgc",
        "FLGC, groups as drawn": "flgc drawn",
        "DGConv": "dgconv",
        "DGC, `xi` 0.75, its choice of channels included": "dgc",
    }
    by_groups = [results["resnet18_by_groups"][groups] for groups in ("4", "8")]
    for row, name in rows.items():
        shares = (f"{of['ratios']['dense'][name]:.3f}" for of in by_groups)
        assert f"| {row} | {' | '.join(shares)} |\n" in text
    assert text.count("\n| ") == len(rows) + 1
    dense = (of["peers"]["dense"]["pass_ms"] for of in by_groups)
    assert re.findall(r"[\d.]+ ms", text) == [f"{ms:.2f} ms" for ms in dense]
    of_dense = results["condensenet86"]["ratios"]
    shares = (of_dense[name]["dgc prepared"] for name in ("dense", "dense prepared"))
    assert re.findall(r"0\.\d+ of", text.split("condensenet-86")[1]) == [
        f"{share:.3f} of" for share in shares
    ]
    assert results["date"][:10] in text and results["machine"]["cpu"] in text
    assert results["settings"]["xi"] == 0.75 and results["machine"]["torch"].startswith("2.14")


def test_the_line_of_mpirun_runs_and_says_what_carries_the_exchange(tmp_path):
    """With more ranks than cores, and as root with the option that the README names."""
    pytest.importorskip("mpi4py")
    (line,) = (words for words in shell_lines() if words[0] == "mpirun")
    root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    small = ["--model", "wrn-10-1", "--data", "sample", "--max-steps", "1", "--output", str(tmp_path / "run")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [line[0], *root, *line[1:], *small],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "1 data x 4 group ranks on cpu (mpi), " in done.stdout


def test_make_demo_prints_commands_that_work_as_printed(tmp_path):
    """With twolevel in .venv alone: not on the PATH, and no environment active."""
    if not shutil.which("make") or not (Path(sys.prefix) / "pyvenv.cfg").exists():
        pytest.skip("needs make, and an environment to stand for .venv")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        (tmp_path / ".venv" / entry.name).symlink_to(entry)
    installed = tmp_path / ".venv" / "installed"
    installed.unlink(missing_ok=True)  # the link, if the environment has one
    installed.touch()

    def shell(line: str) -> str:
        places = [p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "twolevel").exists()]
        environ = os.environ | {"PATH": os.pathsep.join(places), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    printed = shell("make demo RANKS=2 EPOCHS=1")
    evaluate = re.search(r"^evaluate +(.*)", printed, re.M)[1]
    export = re.search(r"^export +(.*)", printed, re.M)[1]
    real = re.search(r"real data.*:\n((?:.*\\\n)*.*)", printed)[1].replace("\\\n", " ")
    assert "accuracy" in shell(evaluate)
    shell(export)
    assert (tmp_path / "runs" / "demo" / "model.safetensors").is_file()
    words = shlex.split(real)
    assert (tmp_path / words[0]).exists() and words[1:3] == ["-m", "twolevel.torchrun"]
    parse(TrainConfig, "train", words[words.index("train") + 1 :])
