"""Ways in which torch convolves the channels that a dynamic group convolution keeps, for inference."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from twolevel.ops import Geometry

if TYPE_CHECKING:
    from twolevel.nn.inference.dgc import DynamicGroupInference

# oneDNN's kernels for contiguous images take 16 channels at a time, and other numbers of them slowly.
LANES = 16

Form = Literal["product", "transposed", "transposed_last", "forward", "forward_last"]


def possible_forms(kernel_size: tuple[int, int], geometry: Geometry) -> tuple[Form, ...]:
    """The ways in which this convolution can be computed.

    - product: a 1 x 1 convolution is a matrix product, and the gathered rows are its matrices.
    - transposed: one of stride 1 is the transposed convolution by the flipped filter, which takes its
      weight input channel first, just as it was gathered.
    - forward: any convolution, after a transposition of the gathered weight.

    "_last" computes in channels_last.
    """
    forms: list[Form] = ["forward", "forward_last"]
    if geometry.stride == (1, 1) and min(transposed_padding(kernel_size, geometry)) >= 0:
        forms += ("transposed", "transposed_last")
    if kernel_size == (1, 1) and geometry.padding == (0, 0):
        forms.append("product")
    return tuple(forms)


def fastest_form(outputs: int, kernel_size: tuple[int, int], geometry: Geometry) -> Form:
    """The form to use for `outputs` = m/H output channels a head: a rule found by measuring all on a CPU.

    channels_last pays where 64 outputs fill its kernels, and where no multiple of 16 fills the others'.
    """
    forms = possible_forms(kernel_size, geometry)
    if "product" in forms:
        return "product"
    if outputs % LANES:
        return "transposed_last" if "transposed" in forms else "forward_last"
    if "transposed" in forms:
        return "transposed_last" if outputs % 64 == 0 else "transposed"
    return "forward"


def weight_places(form: Form, outputs: int, taps: int) -> tuple[int, int, int]:
    """Where the weights of one head and input channel lie in its row: from one output to the next, the first tap,
    from one tap to the next."""
    if form == "transposed_last":
        return 1, (taps - 1) * outputs, -outputs
    return (taps, taps - 1, -1) if form == "transposed" else (taps, 0, 1)


def transposed_padding(kernel_size: tuple[int, int], geometry: Geometry) -> tuple[int, ...]:
    sides = zip(kernel_size, geometry.padding, geometry.dilation, strict=True)
    return tuple(dilation * (k - 1) - padding for k, padding, dilation in sides)


# From t [1, n, H, W], the indices [H K] of its channels and the filters [H K, m/H k k] to [1, m, H', W'].


def _product(self: "DynamicGroupInference", t: Tensor, indices: Tensor, filters: Tensor) -> Tensor:
    heads, outputs, stride = self.heads, self.outputs, self.geometry.stride
    if stride != (1, 1):
        t = t[:, :, :: stride[0], :: stride[1]].contiguous()
    image = t.index_select(1, indices).view(heads, len(indices) // heads, -1)
    y = t.new_empty(1, self.out_channels, *t.shape[2:])
    shuffled = y.view(outputs, heads, -1).transpose(0, 1)
    torch.bmm(filters.view(heads, -1, outputs).transpose(1, 2), image, out=shuffled)
    return y


def _transposed(self: "DynamicGroupInference", t: Tensor, indices: Tensor, filters: Tensor) -> Tensor:
    image, filters = t.index_select(1, indices), filters.view(-1, self.outputs, *self.kernel_size)
    dilation = self.geometry.dilation
    y = torch.conv_transpose2d(image, filters, None, 1, self.transposed_padding, 0, self.heads, dilation)
    return y.index_select(1, self.order)


def _transposed_last(self: "DynamicGroupInference", t: Tensor, indices: Tensor, filters: Tensor) -> Tensor:
    image = t.index_select(1, indices).contiguous(memory_format=torch.channels_last)
    filters = filters.view(-1, *self.kernel_size, self.outputs).permute(0, 3, 1, 2)
    dilation = self.geometry.dilation
    y = torch.conv_transpose2d(image, filters, None, 1, self.transposed_padding, 0, self.heads, dilation)
    return _contiguous(y).index_select(1, self.order)


def _forward(self: "DynamicGroupInference", t: Tensor, indices: Tensor, filters: Tensor) -> Tensor:
    image = t.index_select(1, indices)
    if self.form == "forward_last":
        image = image.contiguous(memory_format=torch.channels_last)
    filters = filters.view(self.heads, -1, self.outputs, *self.kernel_size).transpose(1, 2).flatten(0, 1)
    y = torch.conv2d(image, filters, None, *self.geometry, self.heads)
    return _contiguous(y).index_select(1, self.order)


def _contiguous(y: Tensor) -> Tensor:
    if y.is_contiguous():
        return y
    # The copy of a transposed matrix is several times faster than that of a permuted image.
    return y.permute(0, 2, 3, 1).flatten(0, 2).t().contiguous().view(y.shape)


CONVOLVE: dict[Form, Callable[["DynamicGroupInference", Tensor, Tensor, Tensor], Tensor]] = {
    "product": _product,
    "transposed": _transposed,
    "transposed_last": _transposed_last,
    "forward": _forward,
    "forward_last": _forward,
}
