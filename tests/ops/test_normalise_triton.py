"""The Triton kernels of batch norm compute what torch does, in the interpreter or on a card.

Kernels are decorated for one of the two when Triton is first imported: with a card this process tests them; without,
`test_everything_in_the_interpreter` runs this file again in a child.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from twolevel.ops.kernels.normalise import Running
from twolevel.ops.kernels.triton import TritonNormaliser
from twolevel.ops.normalise import batch_norm
from twolevel.ops.normalise_problem import NormaliseProblem

pytest.importorskip("triton")
CHILD = os.environ.get("TRITON_INTERPRET") == "1"
REPOSITORY = Path(__file__).parents[2]

if CHILD:
    DEVICE, DTYPES = "cpu", [torch.float32, torch.float16]
else:
    DEVICE, DTYPES = "cuda", [torch.float32, torch.bfloat16] if torch.cuda.is_available() else []

NO_CARD = "no card; the child in the interpreter runs it"
ran_here = pytest.mark.skipif(not DTYPES, reason=NO_CARD)
parent_alone = pytest.mark.skipif(CHILD, reason="the parent runs it")
# Maps are rounded once to their type; everything else is float32, sums of some thousand numbers.
CLOSE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
FORMATS = [torch.contiguous_format, torch.channels_last]
# Odd images, few channels, more than a block of them, one image, one pixel, several splits of the pixels.
SHAPES = [(4, 17, 7, 7), (2, 3, 5, 4), (1, 64, 9, 9), (9, 16, 1, 1), (3, 130, 2, 3), (2, 5, 70, 90)]
EPS = 1e-5
KERNELS = TritonNormaliser()


def maps(shape, dtype, memory_format=torch.contiguous_format):
    """x, weight, bias, and the gradients of o and of x from elsewhere."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    x, go, more = (random(*shape).to(dtype).to(memory_format=memory_format) for _ in range(3))
    return x * 3 + 5, random(shape[1]), random(shape[1]), go, more


def computed(x, weight, bias, go, more, **how):
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    o, again = batch_norm(*leaves, EPS, kernels=KERNELS, **how)
    return o.detach(), *torch.autograd.grad((o, again), leaves, (go, more))


def composed(x, weight, bias, go, more, above):
    """By torch in float64, ReLU with the signs that were found: near 0 rounding decides."""
    x, weight, bias, go, more = (t.double() for t in (x, weight, bias, go, more))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    o = F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS) * above
    return o.detach(), *torch.autograd.grad((o * go).sum() + (x * more).sum(), leaves)


def assert_close(found, wanted, dtype):
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        error = (one.double() - other).abs().max() / other.abs().max().clamp_min(1e-3)
        assert error <= CLOSE[dtype], float(error)


@parent_alone
def test_everything_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert " passed" in child.stdout and NO_CARD not in child.stdout, child.stdout[-2000:]


@ran_here
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_batch_norm_and_relu_of_torch(dtype, shape, memory_format, relu):
    tensors = maps(shape, dtype, memory_format)
    found = computed(*tensors, relu=relu)
    assert_close(found, composed(*tensors, found[0] > 0 if relu else 1), dtype)
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == torch.float32
    assert all(t.is_contiguous(memory_format=memory_format) for t in found[:2])


@ran_here
@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)], ids=str)
def test_weight_and_bias_may_be_missing(given):
    x, weight, bias, go, _ = maps((2, 17, 5, 4), torch.float32)
    parameters = [p if there else None for p, there in zip((weight, bias), given, strict=True)]
    x.requires_grad_()
    o, _ = batch_norm(x, *parameters, EPS, relu=True, kernels=KERNELS)
    wide = x.detach().double().requires_grad_()
    parameters = [p if p is None else p.double() for p in parameters]
    wanted = F.batch_norm(wide, None, None, *parameters, True, 0.0, EPS) * (o > 0)
    gradients = torch.autograd.grad(o, x, go)[0], torch.autograd.grad(wanted, wide, go.double())[0]
    assert_close((o, gradients[0]), (wanted, gradients[1]), torch.float32)


@ran_here
@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_large_mean_costs_no_digit_of_the_variance(memory_format):
    generator = torch.Generator().manual_seed(0)
    x = 1e4 + torch.randn(4, 5, 33, 31, generator=generator)
    x[0, 3, 0, 0] = 0
    x[:2, 4] -= 2e4
    x = x.to(DEVICE).to(memory_format=memory_format)
    moments = KERNELS.moments(x)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert ((moments.mean.double() - mean).abs() <= 1e-6 * (var.sqrt() + mean.abs())).all()
    torch.testing.assert_close(moments.var.double(), var, rtol=1e-5, atol=0)


@ran_here
def test_moments_may_be_given_and_statistics_follow():
    tensors = maps((3, 18, 6, 5), torch.float32)
    running = [
        Running(torch.ones(18, device=DEVICE), torch.ones(18, device=DEVICE), rate)
        for rate in (0.25, torch.tensor(0.25, dtype=torch.float64, device=DEVICE), 0.25)
    ]
    own = computed(*tensors, relu=True, running=running[0])
    rate_on_device = computed(*tensors, relu=True, running=running[1])
    given = computed(*tensors, relu=True, running=running[2], moments=KERNELS.moments(tensors[0]))
    mean, var = torch.ones(2, 18, dtype=torch.float64, device=DEVICE)
    F.batch_norm(tensors[0].double(), mean, var, None, None, True, 0.25, EPS)
    for found, follows in zip((own, rate_on_device, given), running, strict=True):
        assert_close(found, [t.double() for t in own], torch.float32)
        assert_close(follows[:2], (mean, var), torch.float32)


@ran_here
@pytest.mark.parametrize("memory_format", FORMATS)
def test_what_is_not_a_number_stays_in_its_channel_and_edges_are_as_in_torch(memory_format):
    x, weight, bias, go, more = maps((2, 20, 5, 7), torch.float32, memory_format)
    x[1, 3, 4, 4] = torch.nan
    x[1, 18, 4, 6] = torch.inf
    weight[5], bias[5] = 0, -0.0  # v is 0 or -0: no gradient passes
    x[:, 7] = 3  # without any spread: v is the bias
    bias[8] = torch.nan
    found = computed(x, weight, bias, go, more, relu=True)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    o = F.relu(F.batch_norm(leaves[0], None, None, *leaves[1:], True, 0.0, EPS))
    wanted = o.detach(), *torch.autograd.grad((o * go).sum() + (leaves[0] * more).sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_what_they_cannot_compute_they_say():
    def reason(dtype=torch.float32, batch=2, memory="channels_last", odd=""):
        sizes = (batch, 8, (4, 4), True, 1, dtype, torch.device(DEVICE), memory, odd)
        return KERNELS.unsupported(NormaliseProblem(*sizes)) or ""

    assert "float64" in reason(torch.float64)
    assert "32-bit" in reason(batch=1 << 25)
    assert "memory" in reason(memory="strided")
    assert "a FakeTensor" in reason(odd="a FakeTensor")


# A kernel's arguments that are maps, and numbers; all others are float32 of channels.
MAPS = {"x", "o", "go", "gx", "more"}
SIZES = {"num_pixels", "channels", "plane", "tiles"}


@parent_alone
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "planes"])
@pytest.mark.parametrize("kernel", ["moments_of_splits", "apply", "sums_of_splits", "input_grad"])
def test_maps_are_moved_16_bytes_at_a_time(kernel, rows, capability, tmp_path, monkeypatch):
    """Triton compiles for a card that is not there, for sizes that are multiples of 16; nothing spills either."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from twolevel.ops.kernels.triton import normalise_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(normalise_kernels, kernel)
    flags = ("RELU", "HAS_WEIGHT", "HAS_BIAS", "HAS_MORE")
    constants = {flag: True for flag in flags if flag in function.arg_names}
    constants |= {"IN_ROWS": rows, "BLOCK_PIXELS": 64 if rows else 1024, "BLOCK_CHANNELS": 64 if rows else 4}
    signature, aligned = {}, {}
    for index, name in enumerate(function.arg_names):
        kind = "*bf16" if name in MAPS else "i32" if name in SIZES else "fp32" if name == "part" else "*fp32"
        signature[name] = "constexpr" if name in constants else kind
        if signature[name].startswith("*") or name in ("num_pixels", "channels", "plane"):
            aligned[(index,)] = [["tt.divisibility", 16]]
    compiled = compile(
        ASTSource(function, signature, constants, aligned), target=GPUTarget("cuda", capability, 32)
    )
    ptx = compiled.asm["ptx"]
    assert "ld.local" not in ptx and "st.local" not in ptx
    loads = re.findall(r"ld\.global\S*?\.(v4\.b32|v2\.b32|b32|b16)", ptx)
    stores = re.findall(r"st\.global\S*?\.(v4\.b32|v2\.b32|b32|b16)", ptx)
    # Alone: the first number of each channel, from which moments are taken; and sums, which are stored by channel.
    alone = 4 if kernel == "moments_of_splits" and not rows else 0
    assert loads.count("v4.b32") >= 4 and len(loads) - loads.count("v4.b32") <= alone, loads
    assert kernel.endswith("of_splits") or set(stores) == {"v4.b32"}, stores
