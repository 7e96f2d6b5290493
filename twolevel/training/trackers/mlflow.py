"""MLflow: where MLFLOW_TRACKING_URI says, in the experiment of MLFLOW_EXPERIMENT_NAME or `twolevel`."""

import logging
import os
import time
from importlib.util import find_spec
from urllib.parse import urlsplit

from twolevel.errors import UserError
from twolevel.training.trackers.base import PROJECT, Tracked, package

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
MOST_PARAMS = 100  # of one request


class MLflow:
    """Its server removes no metrics: steps that are made again are not shown again."""

    name = "mlflow"
    rewinds = False

    def __init__(self):
        self.mlflow = package("mlflow")
        uri = self.mlflow.get_tracking_uri()
        if urlsplit(uri).scheme.partition("+")[0] in DATABASES and find_spec("sqlalchemy") is None:
            raise UserError(
                f"trackers=mlflow cannot write {uri} with mlflow-skinny alone; set MLFLOW_TRACKING_URI to that of a "
                "server, or pip install mlflow"
            )

    def begin(self, run: Tracked) -> str:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it says how it makes tables
        self.client = self.mlflow.MlflowClient()
        if run.id is not None:
            self.client.update_run(run.id, status="RUNNING")
            self.id = run.id
            return self.id
        self.id = self.client.create_run(self._experiment(), run_name=run.name).info.run_id
        entities = package("mlflow.entities")
        params = [
            entities.Param(name, str(value)) for name, value in run.flat().items() if name != "forms"
        ]  # of which there are many, and forms.json has them
        for first in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(self.id, params=params[first : first + MOST_PARAMS])
        return self.id

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        known = self.client.get_experiment_by_name(name)
        return self.client.create_experiment(name) if known is None else known.experiment_id

    def record(self, step: int, values: dict[str, float]) -> None:
        metric, now = package("mlflow.entities").Metric, int(1e3 * time.time())
        self.client.log_batch(
            self.id, metrics=[metric(name, value, now, step) for name, value in values.items()]
        )

    def rewind(self, step: int) -> None:
        raise NotImplementedError

    def close(self, *, whole: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if whole else "KILLED")
