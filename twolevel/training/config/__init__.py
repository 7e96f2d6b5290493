"""A training run as nested dataclasses, whose fields are the options of `twolevel train` (imports no torch).

Each section is a file. Each field is followed by its help text, and its metadata says what a resumed run may do to it
(`twolevel.settings`). Fields that default to None take the value of the recipe (`recipes.py`); `TrainConfig` fills
them in, so that the `config.json` of a run holds them all.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from twolevel.data.config import DataConfig
from twolevel.errors import UserError
from twolevel.settings import RECOMPUTED
from twolevel.training.config.mesh import MeshConfig
from twolevel.training.config.model import ModelConfig
from twolevel.training.config.optimiser import OptimiserConfig
from twolevel.training.config.recipes import fill_in, recipe_of
from twolevel.training.config.rules import RuleConfig
from twolevel.training.config.run import RunConfig
from twolevel.training.validation import from_dict

__all__ = ["MeshConfig", "ModelConfig", "OptimiserConfig", "RuleConfig", "RunConfig", "TrainConfig"]


@dataclass
class TrainConfig:
    """Train a network, sharded over the ranks that torchrun, mpirun or srun has started, or on one."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    rules: RuleConfig = field(default_factory=RuleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        recipe = recipe_of(self.optimiser.recipe, self.data, self.model.model, self.model.conv)
        fill_in(self.data, recipe)
        fill_in(self.optimiser, recipe)
        if self.run.output is None:
            self.run.output = Path(
                "runs", f"{self.model.model}-{self.model.conv}-{self.model.groups}-{self.data.data}"
            )
        self.optimiser.check_together()
        self.mesh.check_conv(self.model.conv)
        self.mesh.check_update(self.optimiser.update)
        if self.mesh.parallel == "fsdp" and self.optimiser.ema_decay is not None:
            raise UserError(
                f"ema_decay={self.optimiser.ema_decay} is invalid with parallel=fsdp, whose parameters have no copy "
                "on a rank; leave it out or use --data-parallel"
            )
        if self.run.recompute != "none":
            self._check_recompute()
        if self.run.simulate is not None:
            self._check_simulated()
        parts = self.mesh.data_parallel * self.optimiser.accumulate
        if self.data.batch % parts:
            raise UserError(
                f"batch_size={self.data.batch} does not divide by data_parallel={self.mesh.data_parallel} x "
                f"accumulate={self.optimiser.accumulate}; use a multiple of {parts}"
            )

    def _check_recompute(self) -> None:
        asked = f"recompute={self.run.recompute} is invalid with"
        if self.model.conv not in RECOMPUTED:
            raise UserError(
                f"{asked} conv={self.model.conv}, whose forward changes what training goes by; "
                f"it is for {', '.join(RECOMPUTED)}"
            )
        if self.mesh.parallel != "group":
            raise UserError(f"{asked} parallel={self.mesh.parallel}; it is for parallel=group")
        for name in ("compile", "cuda_graph"):
            if getattr(self.run, name):
                raise UserError(f"{asked} --{name.replace('_', '-')}; leave one of them out")

    def _check_simulated(self) -> None:
        asked = f"is invalid with simulate={self.run.simulate}"
        if self.mesh.parallel != "group":
            raise UserError(
                f"parallel={self.mesh.parallel} {asked}: one rank is simulated of parallel=group alone; "
                "leave one of them out"
            )
        if self.mesh.exchange == "mpi":
            raise UserError(f"exchange=mpi {asked}, which sends nothing; leave it out")

    @property
    def output(self) -> Path:
        """The folder of the run, given or by its name."""
        assert self.run.output is not None
        return self.run.output

    @property
    def epochs(self) -> int:
        """Passes over the training set, given or by the recipe."""
        assert self.optimiser.epochs is not None
        return self.optimiser.epochs

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as `config.json` holds them: what the run is, not how it was started."""
        on_resume = self.on_resume()
        return {
            section: {name: value for name, value in values.items() if on_resume[name] != "starting"}
            for section, values in self._values().items()
        }

    def flat(self) -> dict[str, Any]:
        """Every setting by its own name; names are unique across the sections."""
        return {name: value for section in self._values().values() for name, value in section.items()}

    def on_resume(self) -> dict[str, str]:
        """What a resumed run may do to each setting, by its name, in the order of the sections."""
        return {
            setting.name: setting.metadata.get("on_resume", "warned")
            for section in fields(self)
            for setting in fields(getattr(self, section.name))
        }

    def _values(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_dict(cls, sections: dict[str, Any], origin: str = "config") -> Self:
        """The inverse of `to_dict`. Raises UserError for a section or setting that does not exist."""
        optimiser = sections.get("optimiser") if isinstance(sections, dict) else None
        if isinstance(optimiser, dict) and isinstance(
            optimiser.get("nesterov"), bool
        ):  # of runs before `update`
            update = "nesterov" if optimiser["nesterov"] else "momentum"
            rest = {name: value for name, value in optimiser.items() if name != "nesterov"}
            sections = sections | {"optimiser": {"update": update} | rest}
        return from_dict(cls, sections, origin)
