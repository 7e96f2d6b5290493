"""Settings of what some convolutions add to the loss."""

from dataclasses import dataclass

from twolevel.settings import LassoForm
from twolevel.training.validation import check, check_finite, check_least


@dataclass
class RuleConfig:
    """What DGC, DGConv and LGC add to the loss; other convolutions have no such settings."""

    lasso: float = 1e-5
    """dgc: weight of the saliencies' L1 norm"""

    lasso_form: LassoForm = "paper"
    """dgc: sum over channels, mean over layers and heads (paper); public, the authors' code, the other way round"""

    threshold_steps: int = 50
    """dgc with threshold global: last steps of an epoch over which the threshold is computed"""

    complexity_divisor: float | None = None
    """dgconv: wanted complexity as a fraction of dense, 32 in public use; no budget unless given"""

    complexity_exponent: float = 0.02
    """dgconv: exponent of the excess over the wanted complexity"""

    group_lasso: float = 1e-5
    """lgc: weight of the L2 norms of each group's weights of each input, until the last inputs are dropped"""

    def __post_init__(self):
        check_finite(self)
        check(self, "lasso", self.lasso >= 0, "0 or more")
        check(self, "group_lasso", self.group_lasso >= 0, "0 or more")
        check_least(self, 1, "threshold_steps")
        divisor = self.complexity_divisor
        check(self, "complexity_divisor", divisor is None or divisor >= 1, "1 or more")
        check(self, "complexity_exponent", self.complexity_exponent > 0, "a positive number")
