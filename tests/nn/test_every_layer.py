"""What holds for every convolution, as for nn.Conv2d."""

import pytest
import torch
from torch.autograd import gradgradcheck
from torch.func import functional_call

from twolevel.nn import make_conv

N, M = 8, 12
LAYERS = {
    "sc": {},
    "gc": {"groups": 4},
    "gc2l": {"groups": 4},
    "shuffle": {"groups": 4},
    "shuffle permuted": {"groups": 4, "permutation_seed": 3},
    "flgc": {"groups": 3},
    "dgconv": {},
    "dgc": {"groups": 2},
    "dgc global": {"groups": 2, "threshold": "global"},
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def layer(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    conv = make_conv(
        name.split()[0], N, M, (3, 2), (2, 1), (2, 1), dilation=(1, 2), dtype=torch.float64, **LAYERS[name]
    )
    if hasattr(conv, "set_progress"):
        conv.set_progress(0.5)  # some channels are dropped, and none because of a tie
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
