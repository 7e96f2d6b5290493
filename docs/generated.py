"""Pages that mkdocs makes of the package: the options of every command, and every public name.

The help of a command is what `--help` prints; the names are those that a package imports for its users. Figures of
measured results, which pages show by their address, come from the repository: the site fetches nothing.
"""

import ast
import contextlib
import io
import os
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from twolevel.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
PACKAGES = ["twolevel", "nn", "models", "distributed", "analysis", "data", "ops"]
FIGURES = ROOT / "benchmarks" / "results"
ADDRESS = "https://raw.githubusercontent.com/twolevel/twolevel/main/benchmarks/results/"
COLUMNS = "96"  # of the help: what a page shows without a scroll bar


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {f"reference/{package}.md": names_page(package) for package in PACKAGES}
    pages["reference/commands.md"] = commands_page()
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    for figure in (*FIGURES.rglob("*.png"), *FIGURES.rglob("*.svg")):
        place = figure.relative_to(FIGURES).as_posix()
        files.append(File.generated(config, f"figures/{place}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with the figures of this site; one that is not there becomes a link that leads nowhere, an error."""
    return markdown.replace(ADDRESS, "../" * page.file.src_uri.count("/") + "figures/")


def commands_page() -> str:
    parts = ["# Commands", "What `twolevel COMMAND --help` prints."]
    for command, about in COMMANDS.items():
        parts += [
            f"## twolevel {command}",
            f"{about[0].upper()}{about[1:]}.",
            f"```text\n{help_of(command)}\n```",
        ]
    return "\n\n".join(parts)


def help_of(command: str) -> str:
    printed = io.StringIO()
    before = dict(os.environ)
    os.environ |= {"COLUMNS": COLUMNS, "NO_COLOR": "1"}
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([command, "--help"])
    finally:
        os.environ.clear()
        os.environ.update(before)
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


def names_page(package: str) -> str:
    module = package if package == "twolevel" else f"twolevel.{package}"
    parts = [
        f"# {module}",
        f"::: {module}\n    options:\n      members: false\n      show_root_heading: false",
    ]
    homes = homes_of(module)
    rooms = [name for name in public(module) if name not in homes]
    if rooms:
        links = (f"[{name}]({name}.md)" if name in PACKAGES else name for name in rooms)
        parts.append(f"Packages, each loaded on first use: {', '.join(links)}.")
    parts += [f"::: {homes[name]}" for name in public(module) if name in homes]
    return "\n\n".join(parts)


def public(module: str) -> list[str]:
    """`__all__` of a package, read from its source."""
    for node in _source(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"{module} has no __all__")


def homes_of(module: str) -> dict[str, str]:
    """Where the public names of a package are defined; those that are packages themselves are left out."""
    homes, names = {}, public(module)
    for node in ast.walk(_source(module)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module != "twolevel":
            for name in (alias.name for alias in node.names if alias.name in names):
                of_package = _path(node.module).name == "__init__.py"
                homes[name] = homes_of(node.module)[name] if of_package else f"{node.module}.{name}"
    return homes


def _path(module: str) -> Path:
    folder = ROOT.joinpath(*module.split("."))
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def _source(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text())
