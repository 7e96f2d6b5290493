"""Ranks: how they meet, what they exchange, and how each keeps its part of a network; no other package talks to ranks.

`strategies` has the ways to train on them, of which `parallelize` is one.
"""

from twolevel.distributed.collectives import MeshAxis
from twolevel.distributed.gather import gather
from twolevel.distributed.gradients import clip_gradients_, gradient_norm
from twolevel.distributed.mesh import init_mesh
from twolevel.distributed.parallelize import parallelize
from twolevel.distributed.replicas import replicate, sync_buffers

__all__ = [
    "MeshAxis",
    "clip_gradients_",
    "gather",
    "gradient_norm",
    "init_mesh",
    "parallelize",
    "replicate",
    "sync_buffers",
]
