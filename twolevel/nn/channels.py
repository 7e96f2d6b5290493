"""Operations on single channels: put them in another order, select some, or add a bias."""

import torch
from torch import Tensor, nn

from twolevel.nn.arguments import as_given, as_images


def take_channels(x: Tensor, index: Tensor) -> Tensor:
    """x[:, index] for x `[B, n, H, W]`, in the memory format of x; channels may repeat or be left out."""
    if x.is_contiguous():
        return x.index_select(1, index)
    # Pixels as the rows of a matrix: half the time of the same along dim 1 of channels_last images.
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels).index_select(1, index)
    return rows.view(batch, height, width, len(index)).permute(0, 3, 1, 2)


class PermuteChannels(nn.Module):
    """`y[:, c] = x[:, index[c]]`, `[B, C, H, W] -> [B, C, H, W]`, in the memory format of x; index `[C]`.

    Raises UserError for an input of other channels, which indexing alone would accept.
    """

    index: Tensor
    shuffle: int
    """Groups of the channel shuffle that the index is; 0 where it is none."""

    def __init__(self, index: Tensor):
        super().__init__()
        self.register_buffer("index", index)
        self.register_load_state_dict_post_hook(_find_shuffle)
        _find_shuffle(self)

    def forward(self, x: Tensor) -> Tensor:
        images = as_images(x, self.index.shape[0], "PermuteChannels")
        # The shuffle has a kernel of its own on the CPU alone, and the compiler does not know its strides.
        if self.shuffle and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return as_given(torch.channel_shuffle(images, self.shuffle), x)
        return as_given(take_channels(images, self.index), x)

    def extra_repr(self) -> str:
        return f"{len(self.index)}"


def _find_shuffle(module: PermuteChannels, _: object = None) -> None:
    """Set `module.shuffle` to the groups of the channel shuffle that the index is, 0 where it is none."""
    channels, second = len(module.index), int(module.index[1:2].sum())
    module.shuffle = 0
    if 1 < second < channels and channels % second == 0:
        shuffled = torch.arange(channels, device=module.index.device).view(-1, second).t().flatten()
        module.shuffle = channels // second if torch.equal(module.index, shuffled) else 0


class ChannelBias(nn.Module):
    """x + b for each channel: x `[B, C, H, W]`, bias `[C]`. The bias of a converted convolution, apart from it."""

    bias: Tensor

    def __init__(
        self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias[:, None, None]
