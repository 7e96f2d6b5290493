"""Ranks: the mesh, what crosses it, and the one place that cuts a network. Nothing else talks to ranks."""

from twolevel.distributed.buffers import sync_buffers
from twolevel.distributed.collectives import MeshAxis
from twolevel.distributed.gradients import clip_gradients_, gradient_norm
from twolevel.distributed.mesh import init_mesh
from twolevel.distributed.parallelize import parallelize, replicate

__all__ = [
    "MeshAxis",
    "clip_gradients_",
    "gradient_norm",
    "init_mesh",
    "parallelize",
    "replicate",
    "sync_buffers",
]
