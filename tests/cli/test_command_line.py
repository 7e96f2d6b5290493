"""Help, which must not wait for heavy imports, and the commands that only print."""

import json
import os
import signal
import subprocess
import sys

import pytest
from command import command

import twolevel
from twolevel.cli import COMMANDS, main


def test_help_imports_nothing_heavy():
    script = "import sys; from twolevel.cli import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    assert "twolevel.cli" in loaded
    assert not {"torch", "numpy", "matplotlib", "tyro", "rich"} & set(loaded)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_help_of_a_command_needs_no_torch_and_explains_each_option(name):
    script = f"""
import sys
from twolevel.cli import main
try:
    main([{name!r}, '--help'])
except SystemExit as end:
    assert not end.code
print('torch' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *text, torch_loaded = done.stdout.splitlines()
    assert torch_loaded == "False"
    assert f"usage: twolevel {name}" in "\n".join(text)


def test_help_names_every_command(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed and text in printed for name, text in COMMANDS.items())


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"twolevel {twolevel.__version__}\n"


def test_the_module_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "twolevel", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("twolevel ")


def test_count_prints_the_published_sums(capsys):
    main(["count", "--model", "wrn-28-10", "--conv", "gc2l", "--groups", "4", "--no-layers"])
    printed = capsys.readouterr().out
    assert "9,254,234" in printed and "2,318,690" in printed and "1,340,332,288" in printed
    assert "27 all-gather, 27 reduce-scatter, 1 all-reduce" in printed


def test_count_lists_layers_and_speaks_json():
    table = command("count", "--model", "wrn-10-1", "--groups", 4).out
    assert "stages.2.0.shortcut" in table
    counted = json.loads(command("count", "--model", "wrn-10-1", "--groups", 4, "--json").out)
    assert counted["parameters"] == sum(layer["parameters"] for layer in counted["layers"])


def test_doctor_names_what_is_here():
    import torch

    printed = command("doctor").out
    assert torch.__version__ in printed and "rank 0 of 1" in printed


@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [
        ("--help", ""),
        ("plan --help", ""),
        ("count --model wrn-10-1", ""),
        ("count --model wrn-28-10 --json", ""),
        ("count --model wrn-28-10 --json", "1"),
        ("plan --model wrn-10-1 --ranks 4 --machine h100 --groups 4", ""),
    ],
)
def test_a_reader_that_has_read_enough_ends_a_command_quietly(words, unbuffered):
    """As `| head` does. It is gone from the start, so that every write finds nobody."""
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, "-m", "twolevel", *words.split()]
    environ = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, env=environ)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_broken_pipe_that_is_not_the_output_is_a_defect_with_its_traceback():
    script = """
import twolevel.cli as cli
def main():
    raise BrokenPipeError(32, "a worker is gone")
cli.main = main
cli.entry()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "BrokenPipeError: [Errno 32] a worker is gone" in done.stderr
