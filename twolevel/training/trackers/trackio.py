"""Trackio: files of this user that `trackio show` reads, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says."""

import secrets

from twolevel.training.trackers.base import PROJECT, Tracked, package


class Trackio:
    """It removes no records: steps that are made again are not shown again. Its own words name a run by its name."""

    name = "trackio"
    rewinds = False

    def __init__(self):
        self.trackio = package("trackio")

    def begin(self, run: Tracked) -> str:
        name = run.id or f"{run.name}-{secrets.token_hex(2)}"
        self.run = self.trackio.init(
            project=PROJECT, name=name, resume="allow", config=run.settings, embed=False
        )
        return name

    def record(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def rewind(self, step: int) -> None:
        raise NotImplementedError

    def close(self, *, whole: bool) -> None:
        self.run.finish()
