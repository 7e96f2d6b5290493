"""Second derivatives are right in every form on one rank, for a Hessian or the penalty of a gradient."""

import pytest
import torch
from torch.autograd import gradgradcheck

from twolevel.ops import Geometry, two_level_conv2d
from twolevel.ops.kernels import native

FORMS = [("overlapped", way) for way in ("grouped", "products", "depthwise")]
FORMS += [("fused", "grouped"), ("dense", "grouped")]
GEOMETRIES = [
    Geometry(),
    Geometry(stride=(2, 1), padding=(1, 2)),
    Geometry(padding=(2, 2), dilation=(2, 1)),
    Geometry(stride=(2, 3), padding=(2, 1), dilation=(1, 2)),
]


def make(groups=2, width=2, rows=1, kernel=(2, 3), batch=2, size=(4, 5), dtype=torch.float64):
    """x in channels_last memory, which every kernel takes, and the weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, groups * width, *size), (groups * rows, width, *kernel), (groups, width, *kernel)]
    x, *weights = (
        torch.randn(shape, generator=generator, dtype=dtype)
        for shape in (*shapes, (groups * rows, groups, 1, 1))
    )
    return [t.requires_grad_() for t in (x.contiguous(memory_format=torch.channels_last), *weights)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("schedule", "kernels"), FORMS)
def test_gradgradcheck(schedule, kernels, geometry):
    assert gradgradcheck(
        lambda *t: two_level_conv2d(*t, geometry, schedule=schedule, kernels=kernels), make()
    )


@pytest.mark.parametrize("frozen", range(4))
def test_gradgradcheck_where_one_tensor_takes_no_gradient(frozen):
    tensors = make()
    tensors[frozen].requires_grad_(False)
    assert gradgradcheck(lambda *t: two_level_conv2d(*t, Geometry(), schedule="overlapped"), tensors)


def hessian_vector_product(compute, tensors):
    """Of the sum of squares, for a vector of ones."""
    grads = torch.autograd.grad(compute(*tensors).square().sum(), tensors, create_graph=True)
    return torch.autograd.grad(sum(grad.sum() for grad in grads), tensors)


@pytest.mark.skipif(native.available() is not None, reason="no C compiler")
@pytest.mark.parametrize("schedule", ["overlapped", "fused"])
def test_what_no_kernel_differentiates_twice_torch_does(schedule):
    geometry = Geometry(stride=(1, 2), padding=(1, 1))
    arguments = {"groups": 16, "width": 4, "rows": 4, "kernel": (3, 3), "size": (6, 7)}
    tensors = make(**arguments, dtype=torch.float32)
    found = hessian_vector_product(
        lambda *t: two_level_conv2d(*t, geometry, schedule=schedule, kernels="native"), tensors
    )
    wide = [t.detach().double().requires_grad_() for t in tensors]
    wanted = hessian_vector_product(lambda *t: two_level_conv2d(*t, geometry, schedule="dense"), wide)
    for one, other in zip(found, wanted, strict=True):
        # Sums of some thousand products of float32, whose errors cancel.
        assert (one.double() - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("schedule", ["overlapped", "fused"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_layer_is_right_or_refuses(backend, schedule):
    """The compilers behind AOTAutograd refuse any second derivative themselves."""
    torch.compiler.reset()
    tensors = make()

    def compute(*tensors):
        return two_level_conv2d(*tensors, Geometry(padding=(1, 1)), schedule=schedule)

    compiled = torch.compile(compute, fullgraph=True, backend=backend)
    if backend == "aot_eager":
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            hessian_vector_product(compiled, tensors)
        return
    wanted = hessian_vector_product(compute, tensors)
    torch.testing.assert_close(hessian_vector_product(compiled, tensors), wanted, rtol=1e-10, atol=1e-10)
