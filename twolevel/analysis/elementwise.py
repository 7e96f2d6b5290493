"""Operations besides multiply-accumulates, as some papers count them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ACTIVATIONS = {F.relu, F.relu6, F.hardtanh, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
MEANS = {F.adaptive_avg_pool2d, torch.mean, Tensor.mean}
POOLS = {F.max_pool2d, F.avg_pool2d, torch.max_pool2d}


class ElementCounter(TorchFunctionMode):
    """Counts one operation for each element that an activation or a pooling reads.

    An element that windows share is read by each. So do the counters of the code of CondenseNet and DGC, and
    the MACs in those papers include it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in ACTIVATIONS or function in MEANS:
            self.operations += args[0].numel()
        elif function in POOLS:
            window = args[1] if len(args) > 1 else kwargs["kernel_size"]
            height, width = (window, window) if isinstance(window, int) else window
            self.operations += result.numel() * height * width
        return result
