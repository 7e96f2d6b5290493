"""`--config FILE` among the options of a run."""

import json
from itertools import count
from pathlib import Path

from twolevel.errors import UserError
from twolevel.training.config import TrainConfig


def take_config(argv: list[str]) -> tuple[list[str], TrainConfig | None]:
    """`--config FILE` gives other defaults: those of an earlier run's config.json."""
    if "--help" in argv or "-h" in argv:
        print("--config FILE   start from the settings in this config.json; further options change them\n")
    for index, word in enumerate(argv):
        if word == "--config" or word.startswith("--config="):
            inline = word.partition("=")[2]
            rest = argv[index + (1 if inline else 2) :]
            path = inline or (argv[index + 1] if index + 1 < len(argv) else "")
            try:
                settings = json.loads(Path(path).read_text())
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(f"--config {path!r} cannot be read: {error}") from error
            if isinstance(settings, dict) and isinstance(settings.get("run"), dict):
                settings["run"].pop("resume", None)  # how a run was started, not what it was
            config = TrainConfig.from_dict(settings, path)
            rest = argv[:index] + rest
            if any(word.partition("=")[0] == "--recipe" for word in rest):
                raise UserError(
                    f"--recipe completes settings, and those of {path} are complete; name what is to change, or "
                    "leave --config out"
                )
            if Path(path).resolve().parent == config.output.resolve() and "--resume" not in rest:
                config.run.output = _new_beside(config.output)  # the file is a run's own record
            return rest, config
    return argv, None


def _new_beside(folder: Path) -> Path:
    """NAME-2 of a folder NAME, or the next number that is free."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(path for path in numbered if not path.exists())
