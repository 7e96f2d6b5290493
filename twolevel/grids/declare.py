"""A grid of runs, as a TOML file declares it (imports no torch).

about = "what it shows"
seeds = [0, 1, 2]

[settings]                    # of every run, by their names in `twolevel train`
model = "wrn-16-2"
data = "cifar10"
recipe = "fast"

[[runs]]                      # further settings of one run
conv = "sc"

[[runs]]                      # every combination of the values in lists
conv = ["gc", "gc2l"]
groups = [4, 8, 16]
"""

import hashlib
import itertools
import json
import tomllib
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from twolevel.errors import UserError, unknown
from twolevel.training.config import TrainConfig
from twolevel.training.validation import from_dict

FOLDER = Path(__file__).parent / "declared"
KEYS = ("about", "seeds", "settings", "runs")


@dataclass(frozen=True)
class Run:
    """One run of a grid: its settings by name, the seed among them."""

    settings: dict[str, Any]

    @cached_property
    def completed(self) -> dict[str, Any]:
        """All settings by name that results depend on, the recipe's among them."""
        return completed(self.config())

    @property
    def ranks(self) -> int:
        """Those that train it together."""
        return self.completed["data_parallel"] * self.completed["group_parallel"]

    @cached_property
    def name(self) -> str:
        """That of its folder: what it trains, its seed, and a few digits that change with any setting."""
        got, ranks = self.completed, f"-{self.ranks}-ranks" if self.ranks > 1 else ""
        digits = hashlib.sha256(json.dumps(got, sort_keys=True).encode()).hexdigest()[:6]
        groups = f"-{got['groups']}" if got["groups"] != 1 else ""
        return f"{got['model']}-{got['conv']}{groups}{ranks}-{got['data']}-seed{got['seed']}-{digits}"

    def config(self) -> TrainConfig:
        """The settings of the run as `twolevel train` completes them. Raises UserError for what it would refuse."""
        given = self.settings
        sections: dict[str, dict[str, Any]] = {}
        for section in fields(TrainConfig):
            names = {setting.name for setting in fields(section.type)}  # pyright: ignore[reportArgumentType]
            sections[section.name] = {name: given[name] for name in given.keys() & names}
        strange = given.keys() - {name for section in sections.values() for name in section}
        if strange:
            raise UserError(f"{min(strange)!r} is no setting of `twolevel train`")
        return from_dict(TrainConfig, sections, "settings")


# What a resumed run may change and results depend on all the same: how ranks share a network, and what is tested.
ALSO = ("parallel", "data_parallel", "group_parallel", "mirrored_test")
# Settings that are the grid's own, or the command's.
NOT_OF_A_RUN = {
    "seed": "declare seeds = [0, 1, 2]",
    "output": "it is --output of `twolevel grid`",
    "data_root": "it is --data-root of `twolevel grid`",
    "download": "it is --download of `twolevel grid`",
    "device": "it is --device of `twolevel grid`",
    "mesh": "declare data_parallel and group_parallel",
    "resume": "a grid goes on by itself",
    "start_from": "runs of a grid begin with weights that their seed draws",
    "max_steps": "a run of a grid ends with its last epoch",
}


def completed(config: TrainConfig) -> dict[str, Any]:
    """The settings of a run that its results depend on: no path, and not by which kernels it is computed."""
    on_resume = config.on_resume()
    flat = config.flat() | {"group_parallel": config.mesh.group_parallel or 1}
    return {k: v for k, v in flat.items() if on_resume[k] in ("fixed", "warned") or k in ALSO}


@dataclass(frozen=True)
class Grid:
    """A named grid; its runs go seed by seed, so that a table is whole early and gains in certainty."""

    name: str
    about: str
    runs: list[Run]


def names() -> list[str]:
    """The grids of this package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read(name: str, seeds: tuple[int, ...] | None = None) -> Grid:
    """The grid of this package with that name, or of a TOML file; `seeds` replace its own.

    Raises UserError where there is none, or its file declares what `twolevel train` would refuse.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        if path.parent != FOLDER:
            raise UserError(
                f"there is no file {name}; give a grid's TOML file or one of {', '.join(names())}"
            )
        raise unknown("grid", name, names())
    try:
        text = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is no TOML: {error}") from error
    if strange := text.keys() - set(KEYS):
        raise UserError(f"{path} has {min(strange)!r}, which a grid has not; use {', '.join(KEYS)}")
    common, cases = text.get("settings", {}), text.get("runs", [{}])
    drawn = text.get("seeds", [0]) if seeds is None else list(seeds)
    if not isinstance(common, dict):
        raise UserError(f"{path}: write [settings] once, with single brackets")
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise UserError(f"{path}: write [[runs]], with two brackets, before the settings of each run")
    if not isinstance(drawn, list) or not drawn or not all(isinstance(seed, int) for seed in drawn):
        where, such = (f"{path}: seeds", "[0, 1, 2]") if seeds is None else ("--seeds", "0 1 2")
        raise UserError(f"{where}={drawn} is invalid; give integers, such as {such}")
    for name in sorted({name for settings in (common, *cases) for name in settings} & NOT_OF_A_RUN.keys()):
        raise UserError(f"{path}: {name} is no setting of a grid's run: {NOT_OF_A_RUN[name]}")
    runs = [
        Run(common | case | {"seed": seed}) for seed in drawn for one in cases for case in _combinations(one)
    ]
    if not runs:
        raise UserError(f"{path} declares no run: an empty list has no value to take")
    seen: list[dict[str, Any]] = []
    for run in runs:
        try:
            again = run.completed in seen
        except UserError as error:
            hint = (
                "; in [[runs]] a list is its values one by one: write [[3, 6]]"
                if "tuple[" in str(error)
                else ""
            )
            raise UserError(f"{path}: {error}{hint}") from error
        if again:
            raise UserError(f"{path} declares {run.name} twice; no two runs may have the same settings")
        seen.append(run.completed)
    return Grid(path.stem, text.get("about", ""), runs)


def _combinations(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Every choice of one value of each list."""
    values = [value if isinstance(value, list) else [value] for value in case.values()]
    return [dict(zip(case, chosen, strict=True)) for chosen in itertools.product(*values)]
