"""What is shown fits the terminal, and nothing of it is cut."""

import re
import sys

import pytest
from command import command

from twolevel.terminal import Column, Console, print_stacked, print_table, program


@pytest.fixture
def columns(monkeypatch):
    """Sets the terminal's width."""
    return lambda number: monkeypatch.setenv("COLUMNS", str(number))


def lines_of(words: str) -> list[str]:
    done = command(*words.split())
    assert done.code == 0, done.err
    return done.out.splitlines()


@pytest.mark.parametrize(
    "words",
    [
        "count --model wrn-28-80 --groups 16",
        "count --model mobilenetv2",
        "count --model condensenet-86 --conv dgc",
        "count --model condensenet-86 --conv lgc",
        "plan --model wrn-28-80 --ranks 4 --machine titan-rtx --groups 4",
        "plan --model wrn-16-4 --ranks 16 --machine h100 --batch-size 1024",
        "plan --model wrn-16-4 --ranks 8 --machine a100-80 --scaling",
    ],
)
def test_no_line_is_wider_than_the_terminal_and_what_is_left_out_is_named(columns, words):
    columns(1000)
    wide = lines_of(words)
    columns(80)
    narrow = lines_of(words)
    assert max(map(len, narrow)) <= 80
    narrow = " ".join(" ".join(narrow).split())
    assert "…" not in narrow
    if "--scaling" in words:
        assert set(" ".join(wide).split()) <= set(narrow.split())
    else:
        enough = re.search(r"Left out in 80 columns: .+\. COLUMNS=(\d+) or --json shows all\.", narrow)[1]
        columns(enough)
        assert " ".join(lines_of(words)).split() == " ".join(wide).split()


def test_the_least_needed_columns_are_left_out_and_named(columns, capsys):
    table = [
        Column("name", ["a", "long name"], 3, left=True),
        Column("first", ["1", "2"], 1),
        Column("second", ["10,000", "2"], 2),
    ]
    columns(24)
    print_table(Console(), table)
    assert (
        capsys.readouterr().out
        == "name       first  second\na              1  10,000\nlong name      2       2\n"
    )
    columns(23)
    print_table(Console(), table)
    shown, note = capsys.readouterr().out.split("\n\n")
    assert shown == "name       second\na          10,000\nlong name       2"
    assert " ".join(note.split()) == "Left out in 23 columns: first. COLUMNS=24 or --json shows all."


def test_columns_that_do_not_fit_side_by_side_go_on_below(columns, capsys):
    columns(10)
    print_stacked(Console(), Column("n", ["1"]), [Column("aaa", ["x"]), Column("bbb", ["y"])])
    assert capsys.readouterr().out == "n  aaa\n1    x\n\nn  bbb\n1    y\n"


@pytest.mark.parametrize(
    ("where", "on_the_path", "script", "words"),
    [
        ("env", True, True, "twolevel"),
        ("env", False, True, "env/twolevel"),
        ("env", False, False, "env/python -m twolevel"),
        ("my env", False, True, "'my env/twolevel'"),
        ("..", False, True, "{parent}/twolevel"),
    ],
)
def test_the_program_is_named_as_the_user_can_call_it(
    tmp_path, monkeypatch, where, on_the_path, script, words
):
    work = tmp_path / "work"
    folder = (work / where).resolve()
    for made in (work, folder):
        made.mkdir(exist_ok=True)
    if script:
        (folder / "twolevel").touch(mode=0o755)
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(folder if on_the_path else tmp_path / "elsewhere"))
    assert program() == words.format(parent=tmp_path)
