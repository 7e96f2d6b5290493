"""Settings of the network and its convolutions."""

import re
from dataclasses import dataclass, field
from typing import Any

from twolevel.errors import UserError
from twolevel.settings import FIXED, FREE, UNGROUPED, Kernels, Schedule, Threshold
from twolevel.training.validation import check, check_finite, check_least

# Settings that one kind of convolution alone has.
CONV_OPTIONS = {
    "gc2l": ["representatives", "schedule", "kernels"],
    "shuffle": ["permutation_seed"],
    "dgc": ["xi", "threshold", "saliency_bound"],
    "lgc": ["condensation"],
}


@dataclass
class ModelConfig:
    """The network and its convolutions."""

    model: str = field(default="wrn-28-10", metadata=FIXED)
    """network: wrn-D-k, mobilenetv2, resnet18, resnext50, condensenet-50, ...; the documentation, "Compare
    convolutions", lists them all"""

    conv: str = field(default="gc2l", metadata=FIXED)
    """convolution: sc (standard), gc (group), gc2l (two-level), bgc (balanced), shuffle, flgc, dgconv, dgc, lgc"""

    groups: int | None = field(default=None, metadata=FIXED)
    """channel groups, of dgc the heads; 4 unless given (32 for ResNeXt), 1 for sc; dgconv learns them"""

    representatives: int = field(default=1, metadata=FIXED)
    """gc2l: channels of each group that the other groups see; more take more work and exchange, in the paper 1"""

    schedule: Schedule = field(default="auto", metadata=FREE)
    """gc2l: the order of its operations and the exchange; auto: the fastest, by a measurement stored on disk"""

    kernels: Kernels = field(default="auto", metadata=FREE)
    """gc2l: which kernels compute it: of torch (the first three), C on CPUs (native), Triton on GPUs"""

    permutation_seed: int | None = None
    """shuffle: a fixed random permutation of the channels from this seed, instead of the shuffle"""

    xi: float = 0.75
    """dgc: share of the input channels that each head drops in the end"""

    threshold: Threshold = "head"
    """dgc: at test time each head drops its least salient channels, or all heads those below one threshold"""

    saliency_bound: float | None = None
    """dgc: kept channels are multiplied by no more than this; the paper has no bound"""

    condensation: int | None = field(default=None, metadata=FIXED)
    """lgc: each group keeps one input in so many in the end; as many as groups unless given"""

    def __post_init__(self):
        if self.groups is None:
            default = 32 if self.model.startswith("resnext") else 4
            self.groups = 1 if self.conv in UNGROUPED else default
        check_finite(self)
        names = {"model": "a name of this package, like wrn-28-10; for a network of your own write a script"}
        names["conv"] = "a name, like gc2l"
        for name, what in names.items():  # parts of a folder's name
            check(self, name, bool(re.fullmatch(r"[\w.-]+", getattr(self, name))), what)
        seed = self.permutation_seed
        check(self, "permutation_seed", seed is None or -(2**63) <= seed < 2**64, "an integer of 64 bits")
        bound = self.saliency_bound
        check(self, "saliency_bound", bound is None or bound > 0, "a positive number, such as 6")
        check_least(self, 1, "representatives", "condensation")
        check(self, "xi", 0 <= self.xi < 1, "a number from 0 to below 1")
        for conv, names in CONV_OPTIONS.items():
            for name in names:
                value = getattr(self, name)
                if conv != self.conv and value != getattr(type(self), name):
                    raise UserError(
                        f"{name}={value} is of conv={conv}, not of conv={self.conv}; leave it out"
                    )

    def create_options(self, num_classes: int | None) -> dict[str, Any]:
        """Arguments of `twolevel.models.create`; without a number of classes the one that the network is made for."""
        options = {"name": self.model, "conv": self.conv, "groups": self.groups, "num_classes": num_classes}
        return options | {name: getattr(self, name) for name in CONV_OPTIONS.get(self.conv, ())}
