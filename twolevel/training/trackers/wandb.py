"""Weights & Biases: by its own settings, WANDB_MODE and others, in the project of WANDB_PROJECT or `twolevel`."""

import os
import secrets

from twolevel.errors import UserError
from twolevel.training.trackers.aside import CLOSE_SECONDS
from twolevel.training.trackers.base import PROJECT, Tracked, package


class WeightsAndBiases:
    """Its files lie in the folder `wandb/` of the run, or where WANDB_DIR says.

    Its rewinding of runs is not open to all accounts, and there is none offline: steps that are made again are not
    shown again. They are numbers of a run of their own, since its own count of steps cannot go back.
    """

    name = "wandb"
    rewinds = False

    def __init__(self):
        self.wandb = package("wandb")
        # Silent, it asks for no key at a terminal either.
        self.settings = self.wandb.Settings(silent=True, console="off", finish_timeout=CLOSE_SECONDS)
        if self.wandb.setup(settings=self.settings).settings.mode in ("offline", "dryrun", "disabled"):
            return
        try:
            self.wandb.login(verify=False)
        except Exception as error:
            raise UserError(
                f"trackers=wandb needs WANDB_API_KEY or WANDB_MODE=offline ({str(error).splitlines()[0]})"
            ) from error

    def begin(self, run: Tracked) -> str:
        id = run.id or secrets.token_hex(4)
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or run.name,
            dir=os.environ.get("WANDB_DIR") or run.output,
            id=id,
            resume="allow",
            config=run.settings,
            allow_val_change=True,
            reinit="create_new",
            settings=self.settings,
        )
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        return id

    def record(self, step: int, values: dict[str, float]) -> None:
        self.run.log({**values, "step": step})

    def rewind(self, step: int) -> None:
        raise NotImplementedError

    def close(self, *, whole: bool) -> None:
        self.run.finish(exit_code=0 if whole else 1)
