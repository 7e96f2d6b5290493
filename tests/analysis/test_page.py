"""A page is one file that asks for nothing else, and holds the data of its figures."""

import base64
import re
from html.parser import HTMLParser

from twolevel.analysis.page import Page
from twolevel.analysis.plots import Series, draw_lines, looks_of, new_figure


class Balanced(HTMLParser):
    """Fails where an element is closed that is not open; keeps what is asked for."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.links = [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def page(tmp_path) -> str:
    figure, (axes,) = new_figure()
    draw_lines(axes, {"a": Series([1, 2], [1, 2])}, looks_of(["a"]))
    picture = tmp_path / "a.png"
    figure.savefig(picture)
    made = Page("Errors < 5 %")
    made.section("First")
    made.text("x & y")
    rows = [{"groups": 4, "error": 1.5}, {"groups": 8, "kind": "a, b"}]
    made.figure(figure, "A figure.", command="twolevel report a.jsonl", data=rows)
    made.figure(picture, "A picture.", command="twolevel report run")
    made.table(["", "G"], [["<group>", "4"]], "What it shows.")
    return made.write(tmp_path / "below" / "page.html").read_text()


def test_it_is_whole_and_loads_nothing(tmp_path):
    text = page(tmp_path)
    parsed = Balanced(text)
    # Within the file: data, and the parts of a drawing that it names.
    assert all(link.startswith(("data:", "#")) for link in parsed.links)
    assert not re.search(r"url\((?!['\"]?#)|@import", text)
    assert "<title>Errors &lt; 5 %</title>" in text and "x &amp; y" in text and "&lt;group&gt;" in text


def test_figures_stand_together_with_command_and_data(tmp_path):
    text = page(tmp_path)
    assert text.count('<div class="figures">') == 1 and text.count("<figure>") == 2
    assert text.count("<code>twolevel report") == 2
    coded = re.search(r"data:text/csv;base64,([^\"]+)", text)[1]
    assert base64.b64decode(coded).decode() == 'groups,error,kind\n4,1.5,\n8,,"a, b"\n'


def test_it_follows_the_light_and_fits_narrow_screens_and_paper(tmp_path):
    text = page(tmp_path)
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert 'name="viewport" content="width=device-width' in text
