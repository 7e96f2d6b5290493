"""`twolevel doctor`: look for what would break a long run or slow it down, or at what a run has left."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from twolevel.cli.config_file import take_config
from twolevel.cli.options import parse
from twolevel.errors import UserError
from twolevel.launchers import rank_of
from twolevel.training.config import MeshConfig, TrainConfig

if TYPE_CHECKING:
    from twolevel.training.doctor import Finding

# Options that say nothing of a run.
OF_NO_RUN = ("--json", "--machine", "--device", "--timeout")


@dataclass
class DoctorConfig:
    """Look for what would break a long run or slow it down: alone, or on the ranks that a launcher has started.

    Without options it looks at this machine and its ranks. With the options of `twolevel train` also at that run's
    data set, its output folder and the room for its checkpoints: put doctor in the place of train. Given the PATH of
    a run, it verifies what that has left, and changes nothing.

    The exit status is 0 where nothing is wrong, 1 with a warning or a problem, 2 for input that is invalid.
    """

    path: tyro.conf.Positional[Path | None] = None
    """folder of a run or a checkpoint, or an exported .safetensors file: to be verified"""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print JSON: a list of {what, level, finding, advice}"""

    machine: str | None = None
    """what the links should be, as for plan; what plan --calibrate measured here, or a preset, unless given"""

    train: TrainConfig = field(default_factory=TrainConfig)


def run(argv: list[str]) -> int:
    """Print what was found, on rank 0; the status is 1 where something is wrong, on every rank."""
    argv, default = take_config(argv)
    config = parse(DoctorConfig, "doctor", argv, None if default is None else DoctorConfig(train=default))
    options = {word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--")}
    of_run = sorted(options.difference(OF_NO_RUN)) + ["--config"] * (default is not None)
    if config.path is not None and of_run:
        raise UserError(
            f"{config.path} is a run of its own, and {of_run[0]} is of one to be started; leave it out, or use "
            f"--config {config.path}/config.json to go on with other options"
        )
    from twolevel.training.doctor import examine, examine_past

    mesh = config.train.mesh
    if config.path is None:
        found = examine(config.train, planned=bool(of_run), machine=config.machine)
    else:
        found = examine_past(config.path, MeshConfig(device=mesh.device, timeout=mesh.timeout))
    if not rank_of():
        print(json.dumps([asdict(each) for each in found], indent=1) if config.json else _text(found))
    return int(any(each.level != "ok" for each in found))


def _text(found: Sequence["Finding"]) -> str:
    from twolevel.training.doctor.finding import count

    wide = max(len(each.what) for each in found)
    lines = [
        f"{each.level:8} {each.what:{wide}}  {each.finding}{each.advice and '; '}{each.advice}"
        for each in found
    ]
    counts = [(level, sum(each.level == level for each in found)) for level in ("problem", "warning")]
    wrong = ", ".join(count(number, level) for level, number in counts if number)
    return "\n".join([*lines, "", wrong or "nothing is wrong"])
