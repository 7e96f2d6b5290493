"""What the cost model says of a run, for those commands that print it beside the rest."""

from dataclasses import replace
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from twolevel.analysis.planner.single import Estimate, Way, estimate
from twolevel.distributed.strategies import Strategy
from twolevel.training.config import TrainConfig


def project(config: TrainConfig, strategy: Strategy, mesh: DeviceMesh, options: dict[str, Any]) -> Estimate:
    """Memory and time of a step of the network of `models.create(**options)`, as far as the model knows such runs."""
    precision, parts = config.run.precision, config.optimiser.accumulate
    way = Way(
        parallel=config.mesh.parallel,
        conv=config.model.conv,
        data=mesh["data"].size(),
        inner=mesh["group"].size(),
        batch=config.data.batch // parts,
        precision="bf16" if precision == "bf16" else "float32",
        microbatches=strategy.microbatches,
        recompute=config.run.recompute == "blocks",
    )
    found = estimate(way, options, config.data.image_shape)
    if precision == "float64":
        return replace(found, time=None, why_no_time="the cost model has no float64")
    if parts > 1:
        return replace(found, time=None, why_no_time="the cost model has no accumulate")
    return found
