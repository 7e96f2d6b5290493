"""One convolution as the kernels see it: its sizes, and whether its tensors are what they can read."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from twolevel.errors import UserError
from twolevel.ops.geometry import Geometry

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The smallest side of a tensor-core tile that `tl.dot` takes in every one of these dtypes.
TILE = 16
# The least rows of a product by four warps at once (Hopper's wgmma).
WARPGROUP_TILE = 64
# The widest copy from global memory by one thread.
COPY_BYTES = 16
# A copy costs about six instructions of the kernels (counted, benchmarks kernels), and in the time that a processor
# takes for them it multiplies so often: 137 times on an H100, 68 on an A100.
PRODUCTS_OF_A_COPY = 100
# Of a side of a kernel: the kernels keep a bit for each.
MOST_TAPS = 15
# Of a tensor, in 32-bit offsets; there is room for those of the last tile's padding.
MOST_ELEMENTS = 2**31 - 2**20

Operation = Literal["forward", "input_grad", "weight_grad"]


@dataclass(frozen=True)
class Problem:
    """x `[B, n, H, W]` convolved with `[m, n/G, kh, kw]` in G groups, perhaps with representatives of each, which
    are further outputs of its group.
    """

    batch: int
    inputs: int
    outputs: int
    groups: int
    height: int
    width: int
    kernel: tuple[int, int]
    geometry: Geometry
    dtype: torch.dtype
    representatives: int = 0

    def __post_init__(self):
        for name in ("inputs", "outputs"):
            if getattr(self, name) % self.groups:
                raise UserError(f"groups={self.groups} does not divide {name}={getattr(self, name)}")
        if min(self.out_size) < 1:
            raise UserError(
                f"a kernel of {self.kernel} with {self.geometry} does not fit an image of {self.height} x {self.width}"
            )

    @cached_property
    def out_size(self) -> tuple[int, int]:
        """(H', W')."""
        axes = zip((self.height, self.width), self.kernel, *self.geometry, strict=True)
        height, width = (
            (size + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, pad, dilation in axes
        )
        return height, width

    @cached_property
    def pixels(self) -> int:
        """B H' W'."""
        return self.batch * math.prod(self.out_size)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def group_inputs(self) -> int:
        return self.inputs // self.groups

    @property
    def group_outputs(self) -> int:
        return self.outputs // self.groups

    def pack(self, operation: Operation) -> int:
        """How many groups share a tile: the number with the least work a group, the smallest of equals.

        A tile of p groups multiplies p^2 blocks, of which p are wanted. That pays for groups that are narrower than a
        tile, and for those that begin where only a few bytes can be copied at a time.
        """
        inputs, outputs = self.group_inputs, self.group_outputs
        if operation == "forward":
            with_taps, other, read, tile = inputs, outputs + self.representatives, (inputs,), TILE
        elif operation == "input_grad":
            with_taps, other, read, tile = outputs, inputs, (outputs,), TILE
        else:
            with_taps, other, read, tile = inputs, outputs, (inputs, outputs), WARPGROUP_TILE

        def work(p: int) -> float:
            products = round_up(p * other, tile) * round_up(self.taps * p * with_taps, TILE) / p
            copies = sum(side * self.dtype.itemsize / self.copy_bytes(p * side) for side in read)
            return products + PRODUCTS_OF_A_COPY * self.taps * copies

        return min(range(1, min(self.groups, TILE) + 1), key=work)

    def packs(self, operation: Operation) -> int:
        """Tiles of groups: groups / pack, rounded up."""
        return -(-self.groups // self.pack(operation))

    def copy_bytes(self, channels: int) -> int:
        """The widest copy by one thread where every so many channels something begins."""
        return math.gcd(COPY_BYTES, channels * self.dtype.itemsize)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def problem_of(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    geometry: Geometry,
    groups: int,
    dtype: torch.dtype,
    representatives: int = 0,
) -> Problem:
    """The problem of these shapes; a UserError where they do not fit each other."""
    for name, shape in (("x", x_shape), ("weight", weight_shape)):
        if len(shape) != 4:
            raise UserError(f"{name} has shape {list(shape)}; it must have four dimensions")
    batch, inputs, height, width = x_shape
    outputs, depth, *kernel = weight_shape
    if groups < 1 or depth * groups != inputs:
        raise UserError(
            f"weight {list(weight_shape)} in groups={groups} needs x of {depth * groups} channels, not {inputs}"
        )
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}")
    geometry = Geometry(*geometry)
    if min(geometry.stride) < 1 or min(geometry.dilation) < 1 or min(geometry.padding) < 0:
        raise UserError(f"{geometry}: stride and dilation must be at least 1, padding at least 0")
    if max(kernel) > MOST_TAPS:
        raise UserError(f"a kernel of {tuple(kernel)} has more than {MOST_TAPS} taps a side")
    problem = Problem(
        batch,
        inputs,
        outputs,
        groups,
        height,
        width,
        (kernel[0], kernel[1]),
        geometry,
        dtype,
        representatives,
    )
    largest = max(
        math.prod(x_shape), problem.pixels * (outputs + representatives * groups), math.prod(weight_shape)
    )
    if largest >= MOST_ELEMENTS:
        raise UserError(
            f"a tensor of {largest} elements is beyond 32-bit offsets; split the batch of {batch}"
        )
    return problem


def representatives_of(restriction: Tensor | None, groups: int) -> int:
    """How many of a group `[R G, n/G, kh, kw]` has: none where it is not there."""
    return 0 if restriction is None else len(restriction) // groups


def check_image(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """A UserError unless the tensor is of this shape, channels_last, and of the dtype and device of `like`."""
    check_tensor(name, tensor, shape, like)
    if not tensor.is_contiguous(memory_format=torch.channels_last):
        raise UserError(
            f"{name} has strides {tensor.stride()}; it must be channels_last: "
            "use .contiguous(memory_format=torch.channels_last)"
        )


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """A UserError unless the tensor is of this shape and of the dtype and device of `like`."""
    if tuple(tensor.shape) != tuple(shape):
        raise UserError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}")
    for what in ("dtype", "device"):
        if getattr(tensor, what) != getattr(like, what):
            raise UserError(f"{name} has {what} {getattr(tensor, what)}; it must be {getattr(like, what)}")
