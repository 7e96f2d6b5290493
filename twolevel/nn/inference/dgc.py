"""Dynamic group convolution as it runs in inference: only the kept channels are gathered and convolved.

                                one image, H heads, K kept channels each
t = ReLU(BN(x))                 [n, H, W]
g = saliency(sum of t)          [H, n]           the mean's 1/(H W) is applied after the ReLU, as a scalar
top K of g: values, indices     [H, K]           values no larger than the layer's bound, where it has one
image   rows of t               [H K, H, W]      copies of long contiguous rows
filters rows of weight, times g [H K, m/H k k]   scaled while they are copied
convolve in H groups, shuffle   [m, H', W']
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from twolevel.errors import UserError, unknown
from twolevel.nn.arguments import as_given, as_images
from twolevel.ops import Geometry
from twolevel.ops.autocast import without_autocast

if TYPE_CHECKING:
    from twolevel.nn.dgc import DynamicGroupConv2d

Form = Literal["product", "transposed", "transposed_last", "forward", "forward_last"]

# oneDNN's kernels for contiguous images take 16 channels at a time, and other numbers of them slowly.
LANES = 16


def possible_forms(kernel_size: tuple[int, int], geometry: Geometry) -> tuple[Form, ...]:
    """The ways in which this convolution can be computed.

    - product: a 1 x 1 convolution is a matrix product, and the gathered rows are its matrices.
    - transposed: one of stride 1 is the transposed convolution by the flipped filter, which takes its
      weight input channel first, just as it was gathered.
    - forward: any convolution, after a transposition of the gathered weight.

    "_last" computes in channels_last.
    """
    forms: list[Form] = ["forward", "forward_last"]
    if geometry.stride == (1, 1) and min(_transposed_padding(kernel_size, geometry)) >= 0:
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


def _transposed_padding(kernel_size: tuple[int, int], geometry: Geometry) -> tuple[int, ...]:
    sides = zip(kernel_size, geometry.padding, geometry.dilation, strict=True)
    return tuple(dilation * (k - 1) - padding for k, padding, dilation in sides)


class DynamicGroupInference(nn.Module):
    """What `DynamicGroupConv2d` computes in evaluation, to rounding, from `kept` channels a head.

    Input `[B, n, H, W]`, output `[B, m, H', W']` in the memory format of the input. It has buffers only,
    gives no gradient, and computes in the buffers' type, whatever autocast says. Images are computed one
    after the other, each by filters of its own; by a global threshold each has a `kept` of its own, that of
    the head that keeps most.

    Raises UserError for a `form` that is not one of `possible_forms`; `fastest_form` unless given.
    """

    # One image takes a few hundred microseconds, of which calls, attributes and views are a fifth: hence
    # all decisions that can be are made once, and `_image` is one block of calls.

    sign: Tensor
    shift: Tensor
    squeeze: Tensor
    excite: Tensor
    offset: Tensor
    threshold: Tensor
    rows: Tensor
    first_row: Tensor
    bags: Tensor
    order: Tensor

    def __init__(self, layer: "DynamicGroupConv2d", kept: int, form: Form | None = None):
        super().__init__()
        self.heads, self.in_channels, self.out_channels = layer.groups, layer.in_channels, layer.out_channels
        self.kernel_size, self.geometry, self.kept = layer.kernel_size, layer.geometry, kept
        self.outputs = self.out_channels // self.heads
        self.form = fastest_form(self.outputs, self.kernel_size, self.geometry) if form is None else form
        if self.form not in get_args(Form):
            raise unknown("form", self.form, get_args(Form))
        possible = possible_forms(self.kernel_size, self.geometry)
        if self.form not in possible:
            raise UserError(
                f"form={form!r} cannot compute kernel_size={self.kernel_size}, stride={self.geometry.stride}, "
                f"padding={self.geometry.padding}; use {' or '.join(possible)}"
            )
        self.convolve = CONVOLVE[self.form]
        self.transposed_padding = _transposed_padding(self.kernel_size, self.geometry)
        self.by_threshold = layer.by_threshold
        self.bound = layer.saliency_bound
        self.used = self._used(kept)
        # Where no hidden unit fires, saliency is the offset: equal ones tie, and the cut must be the layer's.
        self.ties = bool((layer.offset.detach().sort(dim=-1).values.diff(dim=-1) == 0).any())
        with torch.no_grad():
            for name, tensor in self._tensors(layer):
                self.register_buffer(name, tensor.clone(memory_format=torch.contiguous_format))
        self.flips = bool((self.sign != 1).any())
        self.simple = not (self.ties or self.by_threshold or self.used > kept)

    def _used(self, kept: int) -> int:
        """K: `kept`, but at least 1, and where more are faster to compute than to leave out, those too."""
        if self.form in ("transposed", "forward"):
            kept = -(-kept // LANES) * LANES
        return min(max(kept, 1), self.in_channels)

    def _tensors(self, layer: "DynamicGroupConv2d") -> Iterator[tuple[str, Tensor]]:
        """The buffers by name."""
        norm = layer.norm
        assert norm.running_mean is not None and norm.running_var is not None
        # ReLU(a x + b) = |a| ReLU(sign(a) x + b / |a|), and the weights take the factor |a|: a pass less.
        a = norm.weight / (norm.running_var + norm.eps).sqrt()
        b = norm.bias - norm.running_mean * a
        shift = b / a.abs()
        varies = shift.isfinite()
        factor = torch.where(varies, a.abs(), 1)
        yield "sign", torch.where(varies, a.sign(), 0)[:, None, None]
        yield "shift", torch.where(varies, shift, b)[:, None, None]
        yield "squeeze", (layer.squeeze * factor).t()  # [n, H r]
        yield "excite", layer.excite.view(self.heads, self.in_channels, -1).transpose(1, 2)  # [H, r, n]
        yield "offset", layer.offset[:, None]  # [H, 1, n]
        if self.by_threshold:
            yield "threshold", layer.threshold
        # [H, n, m/H, k, k]: all that head i does with channel c is one row.
        rows = (layer.weight * factor[:, None, None]).unflatten(0, (self.heads, -1)).transpose(1, 2)
        if self.form.startswith("transposed"):
            rows = rows.flip(-2, -1)
        if self.form == "transposed_last":
            rows = rows.permute(0, 1, 3, 4, 2)
        yield "rows", rows.flatten(0, 1).flatten(1)  # [H n, m/H k k]
        heads = torch.arange(self.heads, device=layer.weight.device)[:, None, None]
        yield "first_row", self.in_channels * heads  # [H, 1, 1]
        bags = self.heads * (self.in_channels if self.by_threshold else self.used)
        yield "bags", torch.arange(bags, device=heads.device)  # [H K]
        order = torch.arange(self.out_channels, device=heads.device)
        yield "order", order.view(self.heads, -1).t().flatten()  # [m]

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_grad_enabled() or torch.is_autocast_enabled(device):
            with torch.no_grad(), without_autocast(device):
                return self.forward(x)
        images = as_images(x, self.in_channels)
        if not images.is_contiguous():
            last = images.is_contiguous(memory_format=torch.channels_last)
            y = self.forward(images.contiguous())
            return as_given(y.contiguous(memory_format=torch.channels_last) if last else y, x)
        if len(images) == 0:
            return self.forward(images.new_zeros(1, *images.shape[1:]))[:0]
        if len(images) > 1:
            return torch.cat([self._image(image) for image in images.split(1)])
        return as_given(self._image(images), x)

    def _image(self, x: Tensor) -> Tensor:
        """`[1, n, H, W] -> [1, m, H', W']`"""
        heads = self.heads
        t = (x * self.sign).add_(self.shift) if self.flips else x + self.shift
        t.relu_()
        hidden = t.sum((2, 3)).mm(self.squeeze).relu_().view(heads, 1, -1)
        # Without the last ReLU: the order of channels below 0 changes nothing.
        g = torch.baddbmm(self.offset, hidden, self.excite, alpha=1 / (t.shape[2] * t.shape[3]))
        values, indices = g.topk(self.used, sorted=False) if self.simple else self._select(g)
        values = values.relu_() if self.bound is None else values.clamp_(0, self.bound)
        values = values.view(-1)
        rows = (indices + self.first_row).view(-1)
        # Sums of one row each: the only gather that scales while it copies, and prefetches rows.
        bags = self.bags if self.simple else self.bags[: len(rows)]
        filters = torch.embedding_bag(self.rows, rows, bags, mode=0, per_sample_weights=values)[0]
        return self.convolve(self, t, indices.view(-1), filters)

    def _select(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Values and indices `[H, 1, K]` of the channels to use; one that is used in excess has value 0."""
        kept = int((g > self.threshold).sum(-1).amax()) if self.by_threshold else self.kept
        used = self._used(kept)
        if self.ties:
            values, indices = (part[..., -used:].flip(-1) for part in g.relu().sort(dim=-1, stable=True))
        else:
            values, indices = g.topk(used)
        if used > kept:
            values[..., kept:] = 0
        if self.by_threshold:
            values *= values > self.threshold
        return values, indices

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, groups={self.heads}"
        return f"{text}, kept={'by threshold' if self.by_threshold else self.kept}, form={self.form!r}"


# From t [1, n, H, W], the indices [H K] of its channels and the filters [H K, m/H k k] to [1, m, H', W'].


def _product(self: DynamicGroupInference, t: Tensor, indices: Tensor, filters: Tensor) -> Tensor:
    heads, outputs, stride = self.heads, self.outputs, self.geometry.stride
    if stride != (1, 1):
        t = t[:, :, :: stride[0], :: stride[1]].contiguous()
    image = t.index_select(1, indices).view(heads, len(indices) // heads, -1)
    y = t.new_empty(1, self.out_channels, *t.shape[2:])
    shuffled = y.view(outputs, heads, -1).transpose(0, 1)
    torch.bmm(filters.view(heads, -1, outputs).transpose(1, 2), image, out=shuffled)
    return y


def _transposed(self: DynamicGroupInference, t: Tensor, indices: Tensor, filters: Tensor) -> Tensor:
    image, filters = t.index_select(1, indices), filters.view(-1, self.outputs, *self.kernel_size)
    dilation = self.geometry.dilation
    y = torch.conv_transpose2d(image, filters, None, 1, self.transposed_padding, 0, self.heads, dilation)
    return y.index_select(1, self.order)


def _transposed_last(self: DynamicGroupInference, t: Tensor, indices: Tensor, filters: Tensor) -> Tensor:
    image = t.index_select(1, indices).contiguous(memory_format=torch.channels_last)
    filters = filters.view(-1, *self.kernel_size, self.outputs).permute(0, 3, 1, 2)
    dilation = self.geometry.dilation
    y = torch.conv_transpose2d(image, filters, None, 1, self.transposed_padding, 0, self.heads, dilation)
    return _contiguous(y).index_select(1, self.order)


def _forward(self: DynamicGroupInference, t: Tensor, indices: Tensor, filters: Tensor) -> Tensor:
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


CONVOLVE: dict[Form, Callable[[DynamicGroupInference, Tensor, Tensor, Tensor], Tensor]] = {
    "product": _product,
    "transposed": _transposed,
    "transposed_last": _transposed_last,
    "forward": _forward,
    "forward_last": _forward,
}
