"""A network's norm and ReLU computed together are F.relu(norm(x)) in all that can be seen of them."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from twolevel.models import create
from twolevel.nn.batch_norm import batch_norm_relu, batch_norm_relu_and_input, watched_norms
from twolevel.ops import normalise_dispatch
from twolevel.ops.kernels import native
from twolevel.ops.kernels.normalise import TorchNormaliser

C = 6
FORMATS = [torch.contiguous_format, torch.channels_last]
OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.3, "eps": 0.1},
    {"affine": False},
    {"track_running_stats": False},
]
# By type: some hundred numbers of a channel, and gradients that cancel to a tenth of their parts.
CLOSE = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}

pytestmark = pytest.mark.skipif(native.available() is not None, reason="no C compiler")


class Together(TorchNormaliser):
    """Operations of torch in place of the C kernels, for float64."""

    name = "native"


@pytest.fixture
def called(monkeypatch) -> list:
    """The sizes of all maps that were normalised together, by kernels for any type."""
    calls = []

    class Noted(native.NativeNormaliser):
        def unsupported(self, problem):
            return None

        def forward(self, x, *rest):
            calls.append(x.shape)
            return super().forward(x, *rest) if x.dtype == torch.float32 else Together().forward(x, *rest)

        def backward(self, go, x, *rest):
            computed = super() if x.dtype == torch.float32 else Together()
            return computed.backward(go, x, *rest)

    monkeypatch.setitem(normalise_dispatch.SETS, "native", Noted())
    monkeypatch.setattr(normalise_dispatch, "_chosen", {})
    return calls


def norm_of(dtype=torch.float32, kernels="native", cls=nn.BatchNorm2d, **options) -> nn.BatchNorm2d:
    norm = cls(C, **options)
    if norm.affine:
        generator = torch.Generator().manual_seed(1)
        nn.init.uniform_(norm.weight, 0.5, 2, generator=generator)
        nn.init.normal_(norm.bias, generator=generator)
    norm.kernels = kernels
    return norm.to(dtype)


def images(step=0, shape=(3, C, 5, 4), memory_format=torch.channels_last, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(shape, generator=generator) * 2 + 1).to(memory_format=memory_format, dtype=dtype)


def composed(norm, x):
    return F.relu(norm(x)), x


def trained(norm, compute, memory_format=torch.channels_last, dtype=torch.float32) -> list:
    """Output, gradients and statistics of a few steps."""
    found = []
    for step in range(3):
        x = images(step, memory_format=memory_format, dtype=dtype).requires_grad_()
        o, again = compute(norm, x)
        loss = (o * o.detach().cos()).sum() + again.square().sum()
        grads = torch.autograd.grad(loss, [x, *norm.parameters()])
        found.append([o.detach(), *grads, *(buffer.clone() for buffer in norm.buffers())])
    return found


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_is_that_of_the_module_and_relu(called, options, memory_format, dtype):
    one, other = norm_of(dtype, **options), norm_of(dtype, **options)
    found = trained(one, batch_norm_relu_and_input, memory_format, dtype)
    wanted = trained(other, composed, memory_format, dtype)
    torch.testing.assert_close(found, wanted, **CLOSE[dtype])
    assert len(called) == 3
    assert one.num_batches_tracked is None or one.num_batches_tracked == 3


def test_where_torch_computes_it_is_bit_for_bit_the_module_and_relu(called):
    one, other = norm_of(kernels="torch"), norm_of(kernels="torch")
    found, wanted = trained(one, batch_norm_relu_and_input), trained(other, composed)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert not called


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_evaluation_is_the_modules_own(called, options):
    norm = norm_of(**options)
    batch_norm_relu(norm, images(0))
    del called[:]
    norm.eval()
    before = [b.clone() for b in norm.buffers()]
    assert torch.equal(batch_norm_relu(norm, images(1)), F.relu(norm(images(1))))
    assert not called and all(torch.equal(a, b) for a, b in zip(before, norm.buffers(), strict=True))


def test_without_gradients_the_statistics_follow_all_the_same(called):
    one, other = norm_of(), norm_of()
    with torch.no_grad():
        o = batch_norm_relu(one, images())
        torch.testing.assert_close(o, F.relu(other(images())), **CLOSE[torch.float32])
    assert not o.requires_grad and len(called) == 1
    torch.testing.assert_close(one.state_dict(), other.state_dict(), **CLOSE[torch.float32])


def test_hooks_of_the_module_fire(called):
    """It is called, and sees what it always saw."""
    register = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
    for name in register:
        seen, norm = [], norm_of()
        handle = getattr(norm, f"register_{name}")(lambda *args, seen=seen: seen.append(args))
        x = images().requires_grad_()
        batch_norm_relu(norm, x).sum().backward()
        assert len(seen) == 1 and not called, name
        handle.remove()
        batch_norm_relu(norm, x).sum().backward()
        assert len(called) == 1
        del called[:]


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_not_known_is_called(called):
    norm = norm_of(cls=Doubled)
    torch.testing.assert_close(batch_norm_relu(norm, images()), F.relu(2 * norm_of()(images())))
    norm = norm_of()
    norm.forward = lambda x: x + 7
    assert torch.equal(batch_norm_relu(norm, images()), F.relu(images() + 7))
    norm = nn.utils.parametrizations.weight_norm(norm_of(), dim=None)
    torch.testing.assert_close(batch_norm_relu(norm, images()), F.relu(norm_of()(images())))
    assert not called


@pytest.mark.parametrize(
    "x",
    [images(shape=(1, C, 1, 1)), images(shape=(2, C + 1, 3, 3)), images(shape=(2, C, 3, 1))[..., 0]],
    ids=["one number a channel", "other channels", "no images"],
)
def test_errors_are_those_of_the_module(called, x):
    with pytest.raises((ValueError, RuntimeError)) as wanted:
        norm_of()(x)
    with pytest.raises(wanted.type) as found:
        batch_norm_relu(norm_of(), x)
    assert str(found.value) == str(wanted.value)


def test_tensors_without_memory_stay_without():
    norm = norm_of(kernels="auto")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert batch_norm_relu(norm, mode.from_tensor(images())).shape == (3, C, 5, 4)
    meta = norm_of(kernels="auto").to("meta")
    assert batch_norm_relu(meta, images().to("meta")).device.type == "meta"


class Normed(nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.norm, self.compute = norm_of(track_running_stats=False), compute

    def forward(self, x):
        return self.compute(self.norm, x)[0]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own, for jvp
def test_transforms_of_torch_func_go_through(called):
    """Of the input, of the parameters, and forward mode."""

    def derivatives(compute):
        module, x = Normed(compute), images()
        parameters = {name: p.detach() for name, p in module.named_parameters()}

        def loss(parameters, x):
            return torch.func.functional_call(module, parameters, (x,)).square().sum()

        of_parameters, of_x = torch.func.grad(loss, (0, 1))(parameters, x)
        tangent = torch.func.jvp(lambda x: loss(parameters, x), (x,), (x.cos(),))
        return *torch.func.grad(loss)(parameters, x).values(), *of_parameters.values(), of_x, *tangent

    torch.testing.assert_close(derivatives(batch_norm_relu_and_input), derivatives(composed), rtol=0, atol=0)
    assert not called


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_under_autocast_are_those_of_torch(dtype):
    conv, norm = nn.Conv2d(C, C, 1), norm_of(kernels="auto")
    with torch.autocast("cpu", dtype):
        maps = conv(images())
        o, wanted = batch_norm_relu(norm, maps), F.relu(norm_of()(maps))
    assert o.dtype == wanted.dtype and torch.equal(o, wanted)


def test_copies_and_pickles_keep_the_choice():
    norm = norm_of()
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert other.kernels == "native" and type(other) is nn.BatchNorm2d
    assert norm.state_dict().keys() == nn.BatchNorm2d(C).state_dict().keys()


def test_whoever_watches_sees_every_norm_and_may_choose():
    network, seen = create("wrn-10-1").eval(), {}

    def watch(norm, problem):
        seen[norm] = problem.title()
        norm.kernels = "torch"

    with watched_norms(watch):
        network(torch.randn(2, 3, 8, 8))
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(seen) == set(norms)
    assert seen[network.bn] == "batch norm and ReLU of 64 channels of 2x2, float32 contiguous"
    network(torch.randn(2, 3, 8, 8))
    assert len(seen) == len(norms)


# ---- Networks ----


def network_of(kernels, **options):
    network = create("wrn-10-2", **options).to(memory_format=torch.channels_last)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.kernels = kernels
    return network


@pytest.mark.parametrize("conv", ["sc", "gc2l"])
def test_a_network_learns_the_same(called, conv):
    found = []
    for kernels in ("native", "torch"):
        torch.manual_seed(0)
        network = network_of(kernels, conv=conv, groups=4 if conv == "gc2l" else 1).double()
        x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
        loss = F.cross_entropy(network(x), torch.arange(4))
        found.append([loss.detach(), *torch.autograd.grad(loss, [*network.parameters()])])
        found[-1] += [b.clone() for b in network.buffers()]
    assert len(called) == 7  # each norm of a network with three blocks
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)  # layer by layer, 1e-12 of the largest


def test_the_gradient_of_a_shortcut_is_added_in_the_pass_of_the_norm(called, monkeypatch):
    """Of the second block of a stage, whose shortcut is its input."""
    given = []
    backward = type(normalise_dispatch.SETS["native"]).backward

    def noted(self, go, x, more, by):
        given.append(more is not None)
        return backward(self, go, x, more, by)

    monkeypatch.setattr(type(normalise_dispatch.SETS["native"]), "backward", noted)
    network = create("wrn-16-2")
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.kernels = "native"
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    assert given == [
        False,
        *[False, True, False, False] * 3,
    ]  # bn; of each stage bn2, bn1 of a block, of that before


def test_graphs_have_the_module_and_relu():
    network = network_of("native")

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return not any(True for _ in module.children())

    targets = [node.target for node in Tracer().trace(network).nodes]
    assert targets.count(F.relu) == 7
    assert "stages.0.0.bn1" in targets and "bn" in targets


def test_a_compiled_network_is_one_graph_and_learns_the_same(called):
    torch.compiler.reset()
    torch.manual_seed(0)
    network, x = network_of("native").double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    other = copy.deepcopy(network)
    found = torch.compile(network, backend="aot_eager", fullgraph=True)(x)
    assert not called
    torch.testing.assert_close(found, other(x), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(network.state_dict(), other.state_dict(), rtol=1e-9, atol=1e-11)
