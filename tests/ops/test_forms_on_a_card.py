"""Every form computes the layers of a wide network on a card, and can be captured; skipped without a GPU."""

import pytest
import torch

from twolevel.ops import Geometry, two_level_conv2d
from twolevel.ops.autotune import Form
from twolevel.ops.dispatch import able_forms, runs
from twolevel.ops.kernels.triton import kernel_set
from twolevel.ops.problem import Problem
from twolevel.ops.replay import replay_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICE = torch.device("cuda", 0)
# groups, inputs, outputs, kernel, stride, height: of wrn-28-10, and of one rank of 4 of wrn-28-40.
CASES = {
    "stage 1": (4, 160, 160, 3, 1, 32),
    "into stage 2": (16, 160, 320, 3, 2, 32),
    "shortcut": (4, 160, 320, 1, 2, 32),
    "stage 3": (16, 640, 640, 3, 1, 8),
    "a rank's": (1, 320, 320, 3, 1, 16),
}
FORMS = [
    Form("overlapped", "grouped"),
    Form("overlapped", "products"),
    Form("overlapped", "depthwise"),
    Form("overlapped", "triton"),
    Form("fused", "grouped"),
    Form("fused", "triton"),
    Form("dense", "grouped"),
]
# Relative to the norm of the result: bfloat16 has 8 bits, and intermediate results are rounded too; float32 is
# multiplied as tf32, with 10 bits.
CLOSE = {torch.bfloat16: 2e-2, torch.float32: 4e-3}


def layer(case: str, dtype: torch.dtype) -> Problem:
    groups, inputs, outputs, kernel, stride, height = CASES[case]
    geometry = Geometry((stride, stride), (kernel // 2, kernel // 2))
    return Problem(
        batch=4,
        inputs=inputs,
        size=(height, height),
        outputs=outputs,
        kernel=(kernel, kernel),
        groups=groups,
        geometry=geometry,
        ranks=1,
        dtype=dtype,
        device=DEVICE,
        channels_last=True,
    )


@pytest.fixture
def quickly(tmp_path, monkeypatch):
    """One configuration a kernel, in a cache of its own: what is the fastest does not matter here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_set, "MOST", 1)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_computes_the_layer_and_its_gradients(quickly, case, dtype, form):
    one = layer(case, dtype)
    if form not in able_forms(one):
        pytest.skip(f"{form} cannot compute it")
    tensors = [tensor.requires_grad_() for tensor in one.tensors()]
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    y = two_level_conv2d(*tensors, one.geometry, schedule=form.schedule, kernels=form.kernels)
    wanted = two_level_conv2d(*wide, one.geometry, schedule="dense")
    gy = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, tensors, gy)]
    expected = [wanted, *torch.autograd.grad(wanted, wide, gy.double())]
    for name, a, b in zip(("y", "x", "local", "restriction", "coarse"), found, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < CLOSE[dtype], f"{name}: {error:.1e}"  # NaN is not below anything


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_can_be_captured(quickly, form):
    one = layer("stage 1", torch.bfloat16)
    (run,) = runs(one, [form])
    replay_of(run)()
    torch.cuda.synchronize()
