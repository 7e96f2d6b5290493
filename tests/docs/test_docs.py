"""What the documentation says to type works, its site builds without a warning, and its reference is whole."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from documented import (
    CONFIGS,
    KNOWN_OPTIONS,
    check_options,
    commands_in,
    options_in,
    options_of,
    recipes_in,
    unbroken,
)
from narrow import BEGINNINGS, narrow_words, ranks_of, run_line, run_python

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT / "docs" / "pages")): path.read_text()
    for path in sorted((ROOT / "docs" / "pages").rglob("*.md"))
}
PACKAGES = ["nn", "models", "distributed", "analysis", "data", "ops"]


class Block(NamedTuple):
    language: str
    title: str
    text: str


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page. A title says where a block of shell runs, which is not here."""
    found = re.findall(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", PAGES[page], re.S | re.M)
    return [Block(*block) for block in found]


def lines_of(text: str) -> list[str]:
    return [line for line in unbroken(text) if line and not line.startswith("#")]


def test_every_fence_is_read():
    for page, text in PAGES.items():
        assert len(re.findall(r"^\s*```", text, re.M)) == 2 * len(blocks_of(page)), page
        assert {block.language for block in blocks_of(page)} <= {"sh", "python", "text"}, page


def test_no_line_of_code_is_cut():
    """A page 1280 points wide shows so many letters beside its two tables of contents; output may be longer."""
    shown = [(page, block) for page in PAGES for block in blocks_of(page) if block.language != "text"]
    long = [line for _, block in shown for line in block.text.splitlines() if len(line) > 80]
    assert shown and not long


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_what_a_page_shows_runs(page, pool, tmp_path, monkeypatch):
    """In order, in one folder, by the rule of narrow.py; what has a title takes its options."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for block in blocks_of(page):
        if block.language == "python":
            pool.run(run_python, block.text, ranks=1, timeout=90, init=False)
        elif block.title:
            for words in [*commands_in(block.text), *recipes_in(block.text)]:
                check_options(words)
        elif block.language == "sh":
            for line in lines_of(block.text):
                assert line.startswith(BEGINNINGS), f"{page}: {line} is not run; give its block a title"
                words = narrow_words(shlex.split(line, comments=True))
                outcomes = pool.run(run_line, words, ranks=ranks_of(words), timeout=90, init=False)
                # Of doctor 1 says that this machine has something to be warned of.
                right = {0, 1} if "doctor" in words else {0}
                assert {o.code for o in outcomes} <= right, f"{page}: {line}\n{outcomes[0].err}"


def test_every_option_that_is_named_exists():
    for page, text in PAGES.items():
        text = re.sub(r"`python -m benchmarks[^`]*`", "", text)  # which has options of its own
        assert options_in(text) <= KNOWN_OPTIONS, page


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the site, built where a warning is an error: links and anchors that lead nowhere too."""
    folder = tmp_path_factory.mktemp("site")
    build = ["build", "--strict", "--config-file", ROOT / "docs" / "mkdocs.yml", "--site-dir", folder]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *build],
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name(site, package):
    headings = re.findall(
        r'<h2 id="([\w.]+)" class="doc', (site / "reference" / f"{package}.html").read_text()
    )
    names = {heading.rpartition(".")[2] for heading in headings}
    assert names == {*importlib.import_module(f"twolevel.{package}").__all__}


@pytest.mark.parametrize("command", CONFIGS)
def test_the_reference_has_every_option(site, command):
    page = (site / "reference" / "commands.html").read_text()
    section = page[page.index(f'<h2 id="twolevel-{command}">') :].split("<h2 ")[1]
    assert {option for option in options_of(CONFIGS[command]) if option not in section} == set()
