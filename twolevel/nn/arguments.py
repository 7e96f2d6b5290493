"""The arguments and images that all convolutions take, checked and brought to one form."""

from collections.abc import Sequence

from torch import Tensor

from twolevel.errors import UserError, unknown
from twolevel.ops import Geometry

Size = int | Sequence[int]
"""One number for height and width, or both."""

Padding = Size | str


def pair(value: Size) -> tuple[int, int]:
    """(height, width) from one number for both, or from two."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return height, width


def check_divides(what: str, divisor: int, /, **numbers: int) -> None:
    """Raise UserError unless `divisor`, called `what`, is a positive divisor of each of the named numbers."""
    if divisor < 1:
        raise UserError(f"{what}={divisor} is not positive; use 1 or more")
    for name, number in numbers.items():
        if number % divisor:
            fits = [d for d in range(1, number + 1) if all(n % d == 0 for n in numbers.values())]
            some = ", ".join(map(str, fits[:8])) + (", ..." if len(fits) > 8 else "")
            raise UserError(f"{what}={divisor} does not divide {name}={number}; use one of {some}")


def check_groups(groups: int, /, **channels: int) -> None:
    """Raise UserError unless `groups` is a positive divisor of each of the named channel numbers."""
    check_divides("groups", groups, **channels)


def check_no_bias(bias: bool) -> None:
    """Raise UserError for a bias, which none of our convolutions has: `bias` is an argument since nn.Conv2d has it."""
    if bias:
        raise UserError(
            "bias=True is invalid: none of these convolutions has a bias; leave it out, as before a batch norm, or "
            "replace nn.Conv2d by twolevel.convert, which keeps its bias apart"
        )


def as_images(x: Tensor, channels: int, what: str = "the convolution") -> Tensor:
    """x `[B, channels, H, W]`; one image `[channels, H, W]`, which nn.Conv2d takes too, as a batch of one.

    Raises UserError for another shape. `as_given` brings the result back to the form of x.
    """
    images = x[None] if x.dim() == 3 else x
    if images.dim() != 4 or images.shape[1] != channels:
        raise UserError(f"{what} takes [B, {channels}, H, W] or [{channels}, H, W], got {[*x.shape]}")
    return images


def as_given(y: Tensor, x: Tensor) -> Tensor:
    """The result y `[B, m, H', W']` for x, without the batch that `as_images` gave to one image."""
    return y[0] if x.dim() == 3 else y


def geometry(kernel_size: Size, stride: Size, padding: Padding, dilation: Size) -> Geometry:
    """nn.Conv2d's arguments, numbers or pairs, with the paddings "same" and "valid" worked out.

    Raises UserError where "same" would have to pad one side more than the other.
    """
    kernel_size, dilation = pair(kernel_size), pair(dilation)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        if pair(stride) != (1, 1):
            raise UserError(f"padding='same' takes stride=1, not stride={stride}; use numbers")
        reach = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        if any(r % 2 for r in reach):
            raise UserError(
                f"padding='same' with kernel_size={kernel_size} pads unevenly; use an odd kernel or numbers"
            )
        padding = (reach[0] // 2, reach[1] // 2)
    elif isinstance(padding, str):
        raise unknown("padding", padding, ("same", "valid"))
    return Geometry(pair(stride), pair(padding), dilation)
