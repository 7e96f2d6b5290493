"""Dynamic grouping convolution (DGConv): the number of groups is learnt by binary gates."""

import math
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twolevel.errors import UserError, unknown
from twolevel.nn.arguments import Padding, Size
from twolevel.nn.base import ReplicatedConv2d, he_normal_, set_blocks_
from twolevel.nn.channels import PermuteChannels
from twolevel.nn.inference.grouped import frozen_conv2d

Initial = Literal["random", "dense", "depthwise"]
INITIAL: tuple[str, ...] = get_args(Initial)


class DGConv2d(ReplicatedConv2d):
    """A convolution that learns into how many groups, and which, its channels divide.

        y = (U * W) conv x,   U = U_1 kron ... kron U_K,   U_k = g_k 1(2 x 2) + (1 - g_k) I(2),   g = step(gates)

    "Differentiable Learning-to-Group Channels via Groupable Convolutional Neural Networks", Zhang et al.
    (arXiv 1908.05867), dynamic grouping convolution. With n = a 2^K and m = b 2^K for the largest K,
    channels i and o have the numbers i // a and o // b; they connect where these agree in every bit whose
    gate is closed (0), gate 1 being that of the most significant bit: U is (kron U_k) kron 1(b x a). So all
    gates open is a dense convolution, all closed is 2^K groups, and j closed gates give 2^j groups: contiguous
    ones for the first j, interleaved ones for others.

    Input `[B, n, H, W]`, output `[B, m, H', W']`. Parameters: `weight [m, n, k, k]`, of which inference
    needs the connected part, and `gates [K]`, whose sign decides; the gradient passes the step unchanged
    ("straight through"). A gate is open at 0 and closed at -0, which is what rounding to half precision leaves
    of a small negative one. Weight decay must spare the gates (`undecayed`): it pulls them to the threshold.

    Where the gates start is left open by the paper: at `+gate_scale` or `-gate_scale`, so that with the small
    default the first step of the optimiser can change each of them, with signs by `initial` (`random`; `dense`, all
    open; `depthwise`, all closed), or such that there are `groups` contiguous groups. The weight has
    variance 2 / (n k k), as for a dense convolution.

    Raises UserError where n or m is odd (K = 0 leaves nothing to learn), for `groups` that are not a power
    of two up to 2^K or that come with another `initial`, an unknown `initial`, and a `gate_scale` that is
    not positive.
    """

    undecayed = ("gates",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = 0,
        *,
        groups: int | None = None,
        dilation: Size = 1,
        bias: bool = False,
        initial: Initial = "random",
        gate_scale: float = 1e-8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, bias=bias
        )
        number = _gates_of(in_channels, out_channels)
        if initial not in INITIAL:
            raise unknown("initial", initial, INITIAL)
        if groups is not None and initial != "random":
            raise UserError(
                f"initial={initial!r} and groups={groups} both say where the gates start; give one"
            )
        if groups is not None and groups not in (powers := [2**j for j in range(number + 1)]):
            raise UserError(
                f"groups={groups} cannot be made by the {number} gates of {in_channels} -> {out_channels} "
                f"channels; use one of {', '.join(map(str, powers))}"
            )
        if not gate_scale > 0:
            raise UserError(f"gate_scale={gate_scale} is not positive; use a small number such as 1e-8")
        self.initial = initial
        self.initial_groups = groups
        self.gate_scale = gate_scale
        options = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *self.kernel_size, **options))
        self.gates = nn.Parameter(torch.empty(number, **options))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        he_normal_(self.weight, generator)
        if self.gates.is_meta:
            return
        number = len(self.gates)
        if self.initial_groups is not None:
            closed = torch.arange(number) < self.initial_groups.bit_length() - 1
        elif self.initial == "random":
            closed = torch.rand(number, generator=generator, device="cpu") < 0.5
        else:
            closed = torch.full((number,), self.initial == "depthwise")
        self.gates.copy_(torch.where(closed, -self.gate_scale, self.gate_scale))

    def forward(self, x: Tensor) -> Tensor:
        mask = kronecker_mask(self._steps())
        sizes = self.out_channels // len(mask), self.in_channels // len(mask)
        mask = mask[:, None, :, None].expand(-1, sizes[0], -1, sizes[1])
        mask = mask.reshape(self.out_channels, self.in_channels, 1, 1)
        return F.conv2d(x, self.weight * mask, None, *self.geometry)

    def _steps(self) -> Tensor:
        """The gates as 0 and 1, exactly, with the gradient of the identity."""
        steps = torch.signbit(self.gates).logical_not().to(self.gates.dtype)
        return steps + (self.gates - self.gates.detach())

    def complexity(self) -> Tensor:
        """Connections, the non-zeros of U: a b prod_k 2 (1 + g_k), differentiable; times k k they are the weights.

        The product form is the one whose gradient the budget of the paper needs; that of 2^(K + sum g) differs.
        """
        steps = self._steps()
        steps = steps.to(torch.promote_types(steps.dtype, torch.float32))
        dense = self.in_channels * self.out_channels
        return torch.prod((1 + steps) / 2) * dense

    def open_gates(self) -> list[bool]:
        """Which gates are open now, the one of the most significant bit first."""
        return [not closed for closed in self._closed()]

    def channel_groups(self) -> int:
        """The number of groups now, 2^(number of closed gates)."""
        return 2 ** sum(self._closed())

    @torch.no_grad()
    def connectivity(self) -> Tensor:
        """Which channels connect now, bool `[m, n]`, on the CPU."""
        outputs, inputs = self._group_of_channels()
        return outputs[:, None] == inputs[None]

    def macs(self, pixels: int, *, nominal: bool = False) -> int:
        """Nominal and realised are the same: the connected weights, once for each output pixel."""
        return pixels * self.used_parameters()

    def used_parameters(self, *, nominal: bool = False) -> int:
        """Nominal and realised are the same: the connected weights; inference needs no gates."""
        return self.weight.numel() // self.channel_groups()

    def _closed(self) -> list[bool]:
        if self.gates.is_meta:
            raise UserError(
                "the gates are on the meta device and have no values; move the network to the cpu"
            )
        return torch.signbit(self.gates.detach()).tolist()

    def _group_of_channels(self) -> tuple[Tensor, Tensor]:
        """The group of each output and each input channel: the bits of its number whose gates are closed."""
        closed = self._closed()
        numbers, groups = torch.arange(2 ** len(closed)), torch.zeros(2 ** len(closed), dtype=torch.int64)
        for place, is_closed in enumerate(reversed(closed)):
            if is_closed:
                groups |= numbers & 1 << place
        scale = [channels // len(groups) for channels in (self.out_channels, self.in_channels)]
        return groups.repeat_interleave(scale[0]), groups.repeat_interleave(scale[1])

    @torch.no_grad()
    def to_inference(self) -> nn.Module:
        """One group convolution between two permutations of channels, or alone where its groups are contiguous.

        nn.Sequential(PermuteChannels, nn.Conv2d, PermuteChannels), or nn.Conv2d; frozen, in evaluation mode.
        `twolevel.nn.inference.fold.fold_permutations` removes permutations into neighbouring layers.
        """
        groups = self.channel_groups()
        # Stable: where the groups are contiguous already, the order is the identity.
        outputs, inputs = (g.argsort(stable=True).to(self.weight.device) for g in self._group_of_channels())
        rows, columns = outputs.view(groups, -1, 1), inputs.view(groups, 1, -1)
        filters = self.weight[rows, columns].flatten(0, 1)
        memory_format = torch.contiguous_format if self.weight.is_contiguous() else torch.channels_last
        conv = frozen_conv2d(filters.clone(memory_format=memory_format), self.geometry, groups)
        orders = inputs, outputs.argsort()
        before, after = ([] if _is_identity(order) else [PermuteChannels(order)] for order in orders)
        return nn.Sequential(*before, conv, *after).eval() if before or after else conv

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, *, gate_scale: float = 1e-8) -> Self:
        """The same function as a dense nn.Conv2d, exactly: its weight, and all gates open.

        Raises UserError for a convolution with groups, a bias or a padding other than zeros.
        """
        if conv.groups != 1:
            raise UserError(f"a convolution with groups={conv.groups} is not dense; use from_grouped")
        return cls.from_grouped(conv, gate_scale=gate_scale)

    @classmethod
    @torch.no_grad()
    def from_grouped(
        cls, conv: nn.Conv2d, *, gate_scale: float = 1e-8, generator: torch.Generator | None = None
    ) -> Self:
        """The same function as an nn.Conv2d of 2^j groups, exactly: the first j gates closed, the others open.

        The weights between its groups, which the gates hide, are drawn from `generator`: zeros would give
        the closed gates no gradient.

        Raises UserError for groups that the gates cannot make, a bias, or a padding other than zeros.
        """
        if conv.bias is not None or conv.padding_mode != "zeros":
            what = "a bias" if conv.bias is not None else f"padding_mode={conv.padding_mode!r}"
            raise UserError(
                f"the convolution has {what}, which DGConv2d does not support; use bias=False, zero padding"
            )
        layer = cls(
            *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding),
            groups=conv.groups,
            dilation=conv.dilation,
            gate_scale=gate_scale,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        layer.reset_parameters(generator)
        set_blocks_(layer.weight, conv)
        return layer.train(conv.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gates={len(self.gates)}"


def kronecker_mask(gates: Tensor) -> Tensor:
    """U_1 kron ... kron U_K of `gates [K]`, real ones too: `[2^K, 2^K]`, differentiable.

    With U_k = [[1, g], [g, 1]], entry (o, i) is the product of the gates of the bits in which o and i differ.
    """
    mask = gates.new_ones(1, 1)
    for gate in reversed(gates.unbind()):
        across = gate * mask
        mask = torch.cat([torch.cat([mask, across], 1), torch.cat([across, mask], 1)])
    return mask


def _gates_of(in_channels: int, out_channels: int) -> int:
    """K, such that 2^K is the largest power of two that divides both."""
    if in_channels % 2 or out_channels % 2:
        raise UserError(
            f"{in_channels} -> {out_channels} channels leave DGConv2d no gate to learn; "
            "use even numbers, or nn.Conv2d"
        )
    common = math.gcd(in_channels, out_channels)
    return (common & -common).bit_length() - 1


def _is_identity(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order), device=order.device))
