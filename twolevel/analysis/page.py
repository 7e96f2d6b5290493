"""One self-contained HTML page: figures with their data, tables, light and dark, narrow and in print."""

import base64
import csv
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from twolevel.analysis.plots import PAPER, svg_of

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --lines: #c9ced6; --soft: #59636e; --band: #f3f5f8 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ee; --back: #14171c; --lines: #3b424d; --soft: #9aa4b2; --band: #1d2229 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--text); background: var(--back);
       font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; line-height: 1.2 } h2 { font-size: 1.2rem; margin-top: 2rem }
p, li { max-width: 46rem } a { color: inherit } .soft, figcaption { color: var(--soft); font-size: .85rem }
.figures { display: grid; margin-top: 1.5rem; gap: 1.5rem;
           grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
figure { margin: 0; break-inside: avoid } figure svg, figure img { width: 100%; height: auto; display: block }
.wide { overflow-x: auto; padding-bottom: .6rem }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--lines); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } tbody tr:nth-child(even) { background: var(--band) }
code { font-size: .85em; overflow-wrap: anywhere }
@media print { :root { --text: #000; --back: #fff; --lines: #bbb; --soft: #333; --band: #f4f4f4 }
  body { max-width: none } .wide { overflow: visible } table { font-size: .7rem } }
"""


class Page:
    """A page that is filled from above to below.

    With a folder for `figures` what is drawn is written there too, each as an SVG file with its data as CSV beside it.
    """

    def __init__(self, title: str, figures: Path | None = None):
        self.title, self.figures = title, figures
        self.sections = [title]  # of the page itself: what comes before the first
        self.parts: list[str] = []
        self.open_figures = False

    def section(self, title: str) -> None:
        self.sections.append(title)
        self._add(f"<h2>{html.escape(title)}</h2>")

    def text(self, *paragraphs: str) -> None:
        self._add("".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs))

    def figure(
        self, figure: Figure | Path, caption: str, *, command: str, data: Sequence[dict[str, Any]] = ()
    ) -> None:
        """A figure, drawn or in a PNG file, beside those before and after it; its data are a link below it."""
        if isinstance(figure, Path):
            coded = base64.b64encode(figure.read_bytes()).decode()
            picture = f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{coded}">'
        else:
            if self.figures is not None:
                _write_figure(self.figures / self._file_name(caption), figure, data)
            picture = svg_of(figure).replace(
                "<svg", f'<svg role="img" aria-label="{html.escape(caption)}"', 1
            )
        link = f" {_link(data)}" if data else ""
        inner = f"{picture}<figcaption>{html.escape(caption)}{link}<br><code>{html.escape(command)}</code></figcaption>"
        if not self.open_figures:
            self.parts.append('<div class="figures">')
            self.open_figures = True
        self.parts.append(f"<figure>{inner}</figure>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
        """Cells of text: the first column to the left, others to the right."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        below = f'<p class="soft">{html.escape(caption)}</p>' if caption else ""
        self._add(f'<div class="wide">{table}</div>{below}')

    def write(self, path: Path) -> Path:
        self._add("")
        path.parent.mkdir(parents=True, exist_ok=True)
        title = html.escape(self.title)
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        path.write_text(
            f"<!doctype html><html lang=en><head>{head}<title>{title}</title><style>{STYLE}</style></head>"
            f"<body><h1>{title}</h1>{''.join(self.parts)}</body></html>\n"
        )
        return path

    def _file_name(self, caption: str) -> str:
        """Of the letters of section and caption; of sections that are called alike the later have numbers."""
        alike = self.sections.count(self.sections[-1])
        number = f" {alike}" if alike > 1 else ""
        return "-".join(re.findall(r"[a-z0-9]+", f"{self.sections[-1]}{number} {caption}".lower()))

    def _add(self, part: str) -> None:
        if self.open_figures:
            self.parts.append("</div>")
            self.open_figures = False
        self.parts.append(part)


def _write_figure(path: Path, figure: Figure, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".svg").write_text(svg_of(figure, PAPER))
    if rows:
        path.with_suffix(".csv").write_text(_csv(rows))


def _link(rows: Sequence[dict[str, Any]]) -> str:
    """A link that holds the rows as CSV."""
    coded = base64.b64encode(_csv(rows).encode()).decode()
    return f'<a download="data.csv" href="data:text/csv;base64,{coded}">data</a>'


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
