"""Settings of the ranks and of how they share a network."""

from dataclasses import dataclass, field

from twolevel.errors import UserError
from twolevel.settings import FREE, MICROBATCHED, PIPELINES, Carrier, Device, MeshShape, Parallel
from twolevel.training.validation import check, check_finite, check_least

# The convolutions that a way to share a network can take; parallel=group takes all.
CONVS_OF = {"channel": ("sc", "gc"), "fsdp": ("sc", "gc", "gc2l", "bgc")}
CONVS_OF |= dict.fromkeys(PIPELINES, ("sc", "gc", "gc2l", "bgc", "shuffle"))

LONGEST_TIMEOUT = 1e9  # torch adds it to the time of day in nanoseconds, in 64 bits


@dataclass
class MeshConfig:
    """The ranks: data_parallel x group_parallel of them."""

    parallel: Parallel = field(default="group", metadata=FREE)
    """what ranks split: groups, filters of dense convolutions (channel), parameters (fsdp) or layers (others)"""

    mesh: MeshShape = field(default="given", metadata=FREE)
    """auto: the most ranks that can share the batch and the groups work, the others wait as spares; for elastic runs"""

    data_parallel: int = field(default=1, metadata=FREE)
    """replicas, each with its share of the batch; with fsdp all ranks, by default"""

    group_parallel: int | None = field(default=None, metadata=FREE)
    """ranks over which each replica's groups, filters or layers are split; all that data_parallel leaves"""

    microbatches: int | None = None
    """gpipe, 1f1b: parts of a batch that follow each other through the layers; one a rank unless given"""

    sync_batch_norm: bool = False
    """take batch statistics over all replicas instead of each rank's own"""

    device: Device = field(default="auto", metadata=FREE)
    """where to compute"""

    exchange: Carrier = field(default="auto", metadata=FREE)
    """what carries maps between groups: the process group (NCCL, Gloo) or mpi4py; auto: mpi under mpirun on CPUs"""

    timeout: float = field(default=600.0, metadata=FREE)
    """seconds after which a rank gives up waiting for the others"""

    silence: float = field(default=60.0, metadata=FREE)
    """seconds without a sign of life after which a rank is taken for lost, and the others end"""

    def __post_init__(self):
        check_finite(self)
        check_least(self, 1, "data_parallel", "group_parallel", "microbatches")
        in_range = 0 < self.timeout <= LONGEST_TIMEOUT
        check(self, "timeout", in_range, f"a positive number of seconds, at most {LONGEST_TIMEOUT:g}")
        check(
            self,
            "silence",
            0 < self.silence <= LONGEST_TIMEOUT,
            f"a positive number, at most {LONGEST_TIMEOUT:g}",
        )
        self._check_automatic()
        if self.microbatches is not None and self.parallel not in MICROBATCHED:
            raise UserError(
                f"microbatches={self.microbatches} are of parallel=gpipe and 1f1b, not of "
                f"parallel={self.parallel}; leave them out"
            )
        if self.parallel == "fsdp" and self.group_parallel not in (None, 1):
            raise UserError(
                f"group_parallel={self.group_parallel} is invalid with parallel=fsdp, which shards over all ranks; "
                "leave it out"
            )
        if self.parallel in PIPELINES and self.data_parallel > 1:
            raise UserError(
                f"data_parallel={self.data_parallel} is invalid with parallel={self.parallel}, which has no replicas "
                "here; leave it out"
            )

    def _check_automatic(self) -> None:
        if self.mesh != "auto":
            return
        for name in ("data_parallel", "group_parallel"):
            value = getattr(self, name)
            if value != getattr(type(self), name):
                raise UserError(
                    f"{name}={value} is invalid with mesh=auto, which chooses it; leave one of them out"
                )
        if self.parallel == "channel":
            raise UserError(
                "mesh=auto is invalid with parallel=channel, whose ranks divide the channels of every layer; "
                "name --data-parallel and --group-parallel"
            )

    def check_update(self, update: str | None) -> None:
        """Raise UserError for an update of kernels of which ranks hold parts that are no channel groups."""
        if update == "muon" and self.parallel in ("channel", "fsdp"):
            raise UserError(
                f"update=muon needs whole kernels, of which parallel={self.parallel} holds parts; use nesterov"
            )

    def check_conv(self, conv: str) -> None:
        """Raise UserError for a kind of convolution that this way to share a network cannot take."""
        convs = CONVS_OF.get(self.parallel, (conv,))
        if conv not in convs:
            raise UserError(
                f"parallel={self.parallel} takes conv={' or '.join(convs)}, not conv={conv}; "
                "use one of these or parallel=group"
            )
