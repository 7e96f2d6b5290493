"""Dynamic group convolution as it runs in inference: only the kept channels are gathered and convolved.

                                one image, H heads, K kept channels each
t = ReLU(BN(x))                 [n, H, W]
g = saliency(sum of t)          [H, n]           the mean's 1/(H W) is applied after the ReLU, as a scalar
top K of g: values, indices     [H, K]           values no larger than the layer's bound, where it has one
image   rows of t               [H K, H, W]      copies of long contiguous rows
filters rows of weight, times g [H K, m/H k k]   scaled while they are copied
convolve in H groups, shuffle   [m, H', W']
"""

import dataclasses
import math
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor, nn

from twolevel.errors import UserError, unknown
from twolevel.nn.arguments import as_given, as_images
from twolevel.nn.inference.kept import (
    CONVOLVE,
    LANES,
    Form,
    fastest_form,
    possible_forms,
    transposed_padding,
    weight_places,
)
from twolevel.ops.autocast import without_autocast
from twolevel.ops.kernels.native import dynamic, gathered

if TYPE_CHECKING:
    from twolevel.nn.dgc import DynamicGroupConv2d


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

    numbers: Tensor
    first_row: Tensor
    bags: Tensor
    order: Tensor

    @torch.no_grad()
    def __init__(self, layer: "DynamicGroupConv2d", kept: int, form: Form | None = None):
        super().__init__()
        self.heads, self.in_channels, self.out_channels = layer.groups, layer.in_channels, layer.out_channels
        self.kernel_size, self.geometry, self.kept = layer.kernel_size, layer.geometry, kept
        self.outputs = self.out_channels // self.heads
        if form is None:
            form = fastest_form(self.outputs, self.kernel_size, self.geometry)
            weight = layer.weight.detach()
            # The C kernels read fastest what has an output's taps side by side.
            form = "transposed" if form == "transposed_last" and gathered.takes(weight, weight) else form
        self.form: Form = form
        if self.form not in get_args(Form):
            raise unknown("form", self.form, get_args(Form))
        possible = possible_forms(self.kernel_size, self.geometry)
        if self.form not in possible:
            raise UserError(
                f"form={form!r} cannot compute kernel_size={self.kernel_size}, stride={self.geometry.stride}, "
                f"padding={self.geometry.padding}; use {' or '.join(possible)}"
            )
        self.convolve = CONVOLVE[self.form]
        self.transposed_padding = transposed_padding(self.kernel_size, self.geometry)
        self.by_threshold = layer.by_threshold
        self.bound = layer.saliency_bound
        self.used = self._used(kept)
        # Where no hidden unit fires, saliency is the offset: equal ones tie, and the cut must be the layer's.
        self.ties = bool((layer.offset.detach().sort(dim=-1).values.diff(dim=-1) == 0).any())
        parts = self._parts_of(layer)
        self._hold(parts)
        self.flips = bool((parts["sign"] != 1).any())
        self.native = dynamic.DynamicLayer(
            *(self.heads, self.kernel_size, self.geometry, self.outputs, len(layer.squeeze) // self.heads),
            *(
                -1 if self.by_threshold else kept,
                *weight_places(self.form, self.outputs, math.prod(self.kernel_size)),
            ),
            bound=math.inf if self.bound is None else self.bound,
        )
        device = layer.weight.device
        heads = torch.arange(self.heads, device=device)[:, None, None]
        self.register_buffer("first_row", self.in_channels * heads)  # [H, 1, 1]
        bags = self.heads * (self.in_channels if self.by_threshold else self.used)
        self.register_buffer("bags", torch.arange(bags, device=device))  # [H K]
        order = torch.arange(self.out_channels, device=device)
        self.register_buffer("order", order.view(self.heads, -1).t().flatten())  # [m]
        self.simple = not (self.ties or self.by_threshold or self.used > kept)

    def _used(self, kept: int) -> int:
        """K: `kept`, but at least 1, and where more are faster to compute than to leave out, those too."""
        if self.form in ("transposed", "forward"):
            kept = -(-kept // LANES) * LANES
        return min(max(kept, 1), self.in_channels)

    def _parts_of(self, layer: "DynamicGroupConv2d") -> dict[str, Tensor]:
        """What `numbers` holds: by name, in the order and the shapes in which `_image` uses them."""
        norm = layer.norm
        assert norm.running_mean is not None and norm.running_var is not None
        # ReLU(a x + b) = |a| ReLU(sign(a) x + b / |a|), and the weights take the factor |a|: a pass less.
        a = norm.weight / (norm.running_var + norm.eps).sqrt()
        b = norm.bias - norm.running_mean * a
        shift = b / a.abs()
        varies = shift.isfinite()
        factor = torch.where(varies, a.abs(), 1)
        # [H, n, m/H, k, k]: all that head i does with channel c is one row.
        rows = (layer.weight * factor[:, None, None]).unflatten(0, (self.heads, -1)).transpose(1, 2)
        if self.form.startswith("transposed"):
            rows = rows.flip(-2, -1)
        if self.form == "transposed_last":
            rows = rows.permute(0, 1, 3, 4, 2)
        return {
            "sign": torch.where(varies, a.sign(), 0)[:, None, None],
            "shift": torch.where(varies, shift, b)[:, None, None],
            "squeeze": (layer.squeeze * factor).t(),  # [n, H r]
            "excite": layer.excite.view(self.heads, self.in_channels, -1).transpose(1, 2),  # [H, r, n]
            "offset": layer.offset[:, None],  # [H, 1, n]
            "threshold": layer.threshold.to(a.dtype).view(1) if self.by_threshold else a.new_zeros(1),
            "rows": rows.flatten(0, 1).flatten(1),  # [H n, m/H k k]
        }

    def parts(self) -> dict[str, Tensor]:
        """The parts of `numbers` by name, as views."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        return dict(
            zip(self.shapes, map(Tensor.view, self.numbers.split(sizes), self.shapes.values()), strict=True)
        )

    def weight(self) -> Tensor:
        """The filters `[m, n, k, k]`, head by head, of which `parts` has the rows in the order of the form."""
        rows = self.parts()["rows"].unflatten(0, (self.heads, -1))  # [H, n, m/H k k]
        if self.form == "transposed_last":
            rows = rows.unflatten(2, (*self.kernel_size, self.outputs)).permute(0, 1, 4, 2, 3)
        else:
            rows = rows.unflatten(2, (self.outputs, *self.kernel_size))
        rows = rows.flip(-2, -1) if self.form.startswith("transposed") else rows
        return rows.transpose(1, 2).flatten(0, 1)

    @torch.no_grad()
    def absorb(self, scale: Tensor, shift: Tensor) -> None:
        """Become scale y + shift for what is y now, `[m]` each."""
        scale, shift = (of.view(self.outputs, self.heads).t() for of in (scale, shift))  # [H, m/H]
        parts = {name: part.clone() for name, part in self.parts().items()}
        rows = parts["rows"].view(self.heads, self.in_channels, -1)
        # [H, n, m/H, k k], or the last two the other way round.
        by_output, last = scale[:, None, :, None], self.form == "transposed_last"
        rows = rows.unflatten(2, (-1, self.outputs) if last else (self.outputs, -1))
        rows *= by_output.transpose(2, 3) if last else by_output
        parts["bias"] = parts["bias"] * scale + shift if "bias" in parts else shift
        self._hold(parts)
        self.native = dataclasses.replace(self.native, has_bias=True)

    def absorb_relu(self) -> None:
        """Become max(0, y) for what is y now."""
        self.native = dataclasses.replace(self.native, relu=True)

    def _hold(self, parts: dict[str, Tensor]) -> None:
        self.shapes = {name: part.shape for name, part in parts.items()}
        self.register_buffer("numbers", torch.cat([part.flatten() for part in parts.values()]))

    def forward(self, x: Tensor) -> Tensor:
        images, numbers = as_images(x, self.in_channels), self.numbers
        if images.dtype is not numbers.dtype and images.dtype in (torch.bfloat16, torch.float16):
            images = images.to(numbers.dtype)
        if gathered.takes_frozen(images, numbers):
            return as_given(dynamic.convolve_kept(images, self.native, numbers), x)
        device = x.device.type
        if torch.is_grad_enabled() or torch.is_autocast_enabled(device):
            with torch.no_grad(), without_autocast(device):
                return self.forward(x)
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
        sign, shift, squeeze, excite, offset, threshold, weights, *bias = self.parts().values()
        t = (x * sign).add_(shift) if self.flips else x + shift
        t.relu_()
        hidden = t.sum((2, 3)).mm(squeeze).relu_().view(self.heads, 1, -1)
        # Without the last ReLU: the order of channels below 0 changes nothing.
        g = torch.baddbmm(offset, hidden, excite, alpha=1 / (t.shape[2] * t.shape[3]))
        values, indices = g.topk(self.used, sorted=False) if self.simple else self._select(g, threshold)
        values = values.relu_() if self.bound is None else values.clamp_(0, self.bound)
        values = values.view(-1)
        rows = (indices + self.first_row).view(-1)
        # Sums of one row each: the only gather that scales while it copies, and prefetches rows.
        bags = self.bags if self.simple else self.bags[: len(rows)]
        filters = torch.embedding_bag(weights, rows, bags, mode=0, per_sample_weights=values)[0]
        y = self.convolve(self, t, indices.view(-1), filters)
        if bias:
            y += bias[0].t().reshape(-1, 1, 1)
        return y.relu_() if self.native.relu else y

    def _select(self, g: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """Values and indices `[H, 1, K]` of the channels to use; one that is used in excess has value 0."""
        kept = int((g > threshold).sum(-1).amax()) if self.by_threshold else self.kept
        used = self._used(kept)
        if self.ties:
            values, indices = (part[..., -used:].flip(-1) for part in g.relu().sort(dim=-1, stable=True))
        else:
            values, indices = g.topk(used)
        if used > kept:
            values[..., kept:] = 0
        if self.by_threshold:
            values *= values > threshold
        return values, indices

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, groups={self.heads}"
        return f"{text}, kept={'by threshold' if self.by_threshold else self.kept}, form={self.form!r}"
