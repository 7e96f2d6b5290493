"""What documents say to type: commands in their text, by words, and whether these take their options."""

import re
import shlex
from dataclasses import fields, is_dataclass

from twolevel.cli.count import CountConfig
from twolevel.cli.doctor import DoctorConfig
from twolevel.cli.evaluate import EvaluateConfig
from twolevel.cli.export import ExportConfig
from twolevel.cli.grid import GridConfig
from twolevel.cli.options import parse
from twolevel.cli.plan import PlanConfig
from twolevel.cli.report import ReportConfig
from twolevel.training.config import TrainConfig

CONFIGS = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "count": CountConfig,
    "plan": PlanConfig,
    "grid": GridConfig,
    "doctor": DoctorConfig,
}
LAUNCHERS_OPTIONS = {
    "--standalone",
    *("--nproc-per-node", "--nnodes", "--local-addr", "--oversubscribe", "--bind-to", "--allow-run-as-root"),
    *("--nodes", "--help", "--config", "--max-restarts", "--rdzv-conf", "--rdzv-endpoint", "--requeue"),
    *("--gpus", "--cpus", "--min-workers", "--restarts", "--ranks"),
}


def unbroken(text: str) -> list[str]:
    """Its lines, with those that a backslash continues as one."""
    return text.replace("\\\n", " ").splitlines()


def commands_in(text: str) -> list[list[str]]:
    """The words of every line that starts twolevel, with the text's own shell variables replaced."""
    variables, lines = {}, []
    for line in unbroken(text):
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        if assigned := re.fullmatch(r'(\w+)="(.*)"', line):
            variables[assigned[1]] = assigned[2]
        elif re.match(r"(torchrun|mpirun|srun|twolevel|python -m twolevel.torchrun) ", line):
            lines.append(shlex.split(line, comments=True))
    return lines


def recipes_in(text: str) -> list[list[str]]:
    """The words of every line that hands options to a recipe of launch/, as those of `twolevel train`."""
    lines = [shlex.split(line, comments=True) for line in unbroken(text) if "launch/" in line]
    return [["twolevel", "train", *line[line.index("--model") :]] for line in lines if "--model" in line]


def check_options(words: list[str]) -> None:
    """Raises UserError where the command in these words does not take its options."""
    name, *options = words[words.index("twolevel") + 1 :]
    parse(CONFIGS[name], name, options)


def options_of(cls: type) -> set[str]:
    """The options of a command with this configuration, but for what has no name or no help there."""
    found = set()
    for field in fields(cls):
        if is_dataclass(field.type):
            found |= options_of(field.type)
        elif not {"Positional", "Suppress"} & {*map(str, getattr(field.type, "__metadata__", ()))}:
            name = field.name.replace("_", "-")
            found |= {f"--{name}"} | ({f"--no-{name}"} if field.type is bool else set())
    return found


def options_in(text: str) -> set[str]:
    return {*re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)}


KNOWN_OPTIONS = LAUNCHERS_OPTIONS.union(*map(options_of, CONFIGS.values()))
