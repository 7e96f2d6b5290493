"""Operations besides multiply-accumulates, as some papers count them."""

from collections.abc import Callable, Collection
from typing import Any

from torch.overrides import TorchFunctionMode

from twolevel.nn.structure import ACTIVATIONS, ADAPTIVE_POOLS, WINDOW_POOLS, functions_of

READ_ONCE = functions_of((*ACTIVATIONS, *ADAPTIVE_POOLS, "mean"))
READ_BY_WINDOW = functions_of(WINDOW_POOLS)


class ElementCounter(TorchFunctionMode):
    """Counts one operation for each element that an activation or a pooling reads.

    An element that windows share is read by each. The published code of CondenseNet and DGC counts the same, and
    the MACs in those papers include it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function in READ_ONCE:
            self.operations += args[0].numel()
        elif function in READ_BY_WINDOW:
            window = args[1] if len(args) > 1 else kwargs["kernel_size"]
            height, width = (window, window) if isinstance(window, int) else window
            self.operations += result.numel() * height * width
        return result
