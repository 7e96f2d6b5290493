"""What holds for every convolution, as for nn.Conv2d."""

import pytest
import torch
from torch.autograd import gradgradcheck
from torch.func import functional_call

from twolevel.nn import make_conv
from twolevel.nn.base import ReplicatedConv2d
from twolevel.settings import CONVS

N, M = 8, 12
LAYERS = {
    "sc": {},
    "gc": {"groups": 4},
    "gc2l": {"groups": 4},
    "bgc": {"groups": 4},
    "shuffle": {"groups": 4},
    "shuffle permuted": {"groups": 4, "permutation_seed": 3},
    "flgc": {"groups": 3},
    "dgconv": {},
    "dgc": {"groups": 2},
    "dgc global": {"groups": 2, "threshold": "global"},
    "lgc": {"groups": 4},
}
assert {name.split()[0] for name in LAYERS} == set(CONVS)
every_layer = pytest.mark.parametrize("name", LAYERS)


def layer(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    conv = make_conv(
        name.split()[0], N, M, (3, 2), (2, 1), (2, 1), dilation=(1, 2), dtype=torch.float64, **LAYERS[name]
    )
    if hasattr(conv, "set_progress"):
        conv.set_progress(0.5)  # some channels are dropped, and none because of a tie
    if hasattr(conv, "offset"):
        torch.nn.init.uniform_(conv.offset, 0.5, 2)
    return conv


def images(batch: int = 3, size: tuple[int, int] = (5, 6)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, N, *size, generator=generator, dtype=torch.float64)


@every_layer
def test_second_derivatives(name):
    """Of what is differentiable: logits and gates are not, their gradients are those of the papers."""
    conv = layer(name)
    names = [key for key, _ in conv.named_parameters() if "logits" not in key and key != "gates"]
    weights = [conv.get_parameter(key).detach().requires_grad_() for key in names]

    def compute(x, *weights):
        return functional_call(conv, dict(zip(names, weights, strict=True)), (x,))

    assert gradgradcheck(compute, (images(size=(3, 4)).requires_grad_(), *weights), fast_mode=True)


def inference(name: str) -> torch.nn.Module:
    return layer(name).eval().to_inference()


def forms() -> list:
    """Every layer in training and in evaluation, and in its inference form."""
    made = []
    for name in LAYERS:
        made += [
            pytest.param(lambda name=name: layer(name), id=name),
            pytest.param(lambda name=name: layer(name).eval(), id=f"{name} in evaluation"),
        ]
        inference_form = getattr(type(layer(name)), "to_inference", ReplicatedConv2d.to_inference)
        if inference_form is not ReplicatedConv2d.to_inference:
            made.append(pytest.param(lambda name=name: inference(name), id=f"{name} for inference"))
    return made


every_form = pytest.mark.parametrize("make", forms())


def results(conv, x):
    """The output, and the gradients of x and of every parameter that takes one; none where the output takes none."""
    x = x.clone().requires_grad_()
    y = conv(x)
    if not y.requires_grad:
        return [y, torch.zeros_like(x)]
    weights = [weight for weight in conv.parameters() if weight.requires_grad]
    return [
        y.detach(),
        *torch.autograd.grad(y, [x, *weights], torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)),
    ]


@every_form
@pytest.mark.parametrize("size", [(5, 6), (N, M)])  # as many rows as channels: dimensions cannot be mistaken
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_one_image_without_a_batch_is_a_batch_of_one(make, size, memory_format):
    x = images(1, size).to(memory_format=memory_format)
    wanted_y, wanted_x, *wanted = results(make(), x)
    y, gx, *grads = results(make(), x[0])
    torch.testing.assert_close([y[None], gx[None], *grads], [wanted_y, wanted_x, *wanted])


@every_form
def test_no_images_give_no_images(make):
    conv, x = make(), images(0)
    wanted = torch.nn.Conv2d(N, M, (3, 2), (2, 1), (2, 1), dilation=(1, 2), dtype=x.dtype)(x)
    y, gx, *grads = results(conv, x)
    assert (y.shape, y.dtype, gx.shape) == (wanted.shape, wanted.dtype, x.shape)
    assert not any(grad.any() for grad in grads)


@every_form
@pytest.mark.parametrize("shape", [(N + 1, 5, 6), (2, N + 1, 5, 6), (5, 6), (1, 2, N, 5, 6)], ids=str)
def test_other_shapes_are_refused(make, shape):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        make()(torch.ones(shape, dtype=torch.float64))
    assert "\n" not in str(caught.value)
