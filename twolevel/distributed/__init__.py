"""Ranks: the mesh, what crosses it, and the ways to spread a network over it. Nothing else talks to ranks."""

from twolevel.distributed.buffers import sync_buffers
from twolevel.distributed.channel import split_channels
from twolevel.distributed.collectives import MeshAxis
from twolevel.distributed.fsdp import clip_sharded_gradients_, shard_parameters
from twolevel.distributed.gradients import clip_gradients_, gradient_norm
from twolevel.distributed.mesh import init_mesh
from twolevel.distributed.parallelize import parallelize, replicate
from twolevel.distributed.pipeline import Pipeline, clip_staged_gradients_
from twolevel.distributed.stages import Stage, cut_stages

__all__ = [
    "MeshAxis",
    "Pipeline",
    "Stage",
    "clip_gradients_",
    "clip_sharded_gradients_",
    "clip_staged_gradients_",
    "cut_stages",
    "gradient_norm",
    "init_mesh",
    "parallelize",
    "replicate",
    "shard_parameters",
    "split_channels",
    "sync_buffers",
]
