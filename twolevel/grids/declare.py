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
        mesh = self.config().mesh
        return mesh.data_parallel * (mesh.group_parallel or 1)

    @cached_property
    def name(self) -> str:
        """That of its folder: what it trains, its seed, and a few digits that change with any setting."""
        got, ranks = self.completed, f"-{self.ranks}-ranks" if self.ranks > 1 else ""
        settings = json.dumps(got | {"ranks": self.ranks}, sort_keys=True)
        digits = hashlib.sha256(settings.encode()).hexdigest()[:6]
        groups = f"-{got['groups']}" if got["groups"] != 1 else ""
        return f"{got['model']}-{got['conv']}{groups}{ranks}-{got['data']}-seed{got['seed']}-{digits}"

    def config(self, **more: Any) -> TrainConfig:
        """The settings of the run as `twolevel train` completes them. Raises UserError for what it would refuse."""
        given = self.settings | more
        sections: dict[str, dict[str, Any]] = {}
        for section in fields(TrainConfig):
            names = {setting.name for setting in fields(section.type)}  # pyright: ignore[reportArgumentType]
            sections[section.name] = {name: given[name] for name in given.keys() & names}
        strange = given.keys() - {name for section in sections.values() for name in section}
        if strange:
            raise UserError(f"{min(strange)!r} is no setting of `twolevel train`")
        if given.get("max_steps") is not None:
            raise UserError(
                f"max_steps={given['max_steps']} is invalid: a run of a grid ends with its last epoch; leave it out"
            )
        return from_dict(TrainConfig, sections, "settings")


def completed(config: TrainConfig) -> dict[str, Any]:
    """The settings of a run that its results depend on: no path, and not how it is computed."""
    on_resume = config.on_resume()
    return {name: value for name, value in config.flat().items() if on_resume[name] in ("fixed", "warned")}


@dataclass(frozen=True)
class Grid:
    """A named grid; its runs go seed by seed, so that a table is whole early and gains in certainty."""

    name: str
    about: str
    runs: list[Run]


def names() -> list[str]:
    """The grids of this package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read(name: str, seeds: tuple[int, ...] | None = None, **settings: Any) -> Grid:
    """The grid of this package with that name, or of a TOML file; `settings` replace those of every run.

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
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no TOML: {error}") from error
    if strange := text.keys() - set(KEYS):
        raise UserError(f"{path} has {min(strange)!r}, which a grid has not; use {', '.join(KEYS)}")
    common, cases = text.get("settings", {}), text.get("runs", [{}])
    drawn = text.get("seeds", [0]) if seeds is None else seeds
    if not drawn or not all(isinstance(seed, int) for seed in drawn):
        raise UserError(f"{path}: seeds={drawn} is invalid; use a list of integers, such as [0, 1, 2]")
    runs = [
        Run(common | case | settings | {"seed": seed})
        for seed in drawn
        for one in cases
        for case in _combinations(one)
    ]
    for run in runs:
        try:
            run.config()
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    if len({run.name for run in runs}) < len(runs):
        raise UserError(f"{path} declares a run twice; no two runs may have the same settings")
    return Grid(path.stem, text.get("about", ""), runs)


def _combinations(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Every choice of one value of each list."""
    values = [value if isinstance(value, list) else [value] for value in case.values()]
    return [dict(zip(case, chosen, strict=True)) for chosen in itertools.product(*values)]
