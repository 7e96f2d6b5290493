"""The cast of autocast is that of torch's own convolution, in eager mode and in one compiled graph."""

import pytest
import torch
from torch.nn import functional as F

from twolevel.ops.autocast import cast_for_convolution, without_autocast

CASTS = [torch.bfloat16, torch.float16]
TYPES = [torch.float32, torch.float64]


def types(x, weight):
    """Those of what is cast, of it where autocast is off, and of torch's own convolution."""
    with without_autocast(x.device.type):
        inside = cast_for_convolution(x, weight)
    cast = cast_for_convolution(x, weight)
    return [*(t.dtype for t in cast), *(t.dtype for t in inside), F.conv2d(x, weight).dtype]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_cast_is_that_of_torch(way, dtype):
    x = torch.ones(1, 2, 3, 3, dtype=dtype)
    call = types if way == "eager" else torch.compile(types, backend="eager", fullgraph=True)
    assert call(x, x) == [dtype] * 5
    for cast in CASTS:
        own = torch.float64 if dtype == torch.float64 else cast
        with torch.autocast("cpu", cast):
            assert call(x, x) == [own, own, dtype, dtype, own]
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", TYPES)
def test_meta_tensors_are_not_cast(dtype):
    x = torch.ones(1, 2, 3, 3, dtype=dtype, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert types(x, x) == [dtype] * 5
