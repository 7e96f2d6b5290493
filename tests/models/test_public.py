"""Weights in the layouts of public code, made here, and the same functions written from them alone."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from twolevel.errors import UserError
from twolevel.models import create, load_public

State = dict[str, Tensor]
HEADS = 4


class Layout:
    """Makes random values by name: of convolutions and linear layers, norms, and layers of DGC."""

    def __init__(self, xi: float = 0.0):
        self.random, self.state, self.xi = torch.Generator().manual_seed(0), {}, xi

    def normal(self, name: str, *shape: int) -> None:
        values = torch.randn(shape, generator=self.random, dtype=torch.float64)
        self.state[name] = values / max(1, values[0].numel()) ** 0.5 if len(shape) > 1 else values

    def norm(self, name: str, n: int, *, counted: bool = True) -> None:
        for part in ("weight", "bias", "running_mean"):
            self.normal(f"{name}.{part}", n)
        draws = torch.rand(n, generator=self.random, dtype=torch.float64)
        self.state[f"{name}.running_var"] = draws + 0.5
        if counted:
            self.state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def linear(self, name: str, n: int, m: int) -> None:
        self.normal(f"{name}.weight", m, n)
        self.normal(f"{name}.bias", m)

    def dgc(self, name: str, n: int, m: int, kernel: int) -> None:
        self.state[f"{name}._inactive_channels"] = torch.tensor([float(round(self.xi * n))])
        self.norm(f"{name}.norm", n)
        hidden = n // (8 if n < 80 else 16)
        for i in range(HEADS):
            self.normal(f"{name}.headconv_{i}.conv.weight", m // HEADS, n, kernel, kernel)
            self.normal(f"{name}.headconv_{i}.fc1.weight", hidden, n)
            self.linear(f"{name}.headconv_{i}.fc2", hidden, n)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    statistics = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *statistics)


def dgc(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """Channels whose saliency is no more than that of the last to drop are dropped, head by head."""
    x = norm(state, f"{name}.norm", x).relu()
    heads, dropped = [], int(state[f"{name}._inactive_channels"])
    for i in range(HEADS):
        part = {k.removeprefix(f"{name}.headconv_{i}."): v for k, v in state.items() if k.startswith(name)}
        hidden = F.linear(x.mean((2, 3)), part["fc1.weight"]).relu()
        g = F.linear(hidden, part["fc2.weight"], part["fc2.bias"]).relu()
        if dropped:
            g = g * (g > g.sort().values[:, dropped - 1 : dropped])
        weight = part["conv.weight"]
        heads.append(F.conv2d(x * g[..., None, None], weight, None, stride, weight.shape[-1] // 2))
    return torch.stack(heads, 2).flatten(1, 2)  # output j of head i is channel j H + i


def wrn(depth: int, widen: int) -> State:
    made, widths, n = Layout(), [16 * widen, 32 * widen, 64 * widen], 16
    made.normal("conv0", 16, 3, 3, 3)
    for group, m in enumerate(widths):
        for block in range((depth - 4) // 6):
            at = f"group{group}.block{block}"
            made.normal(f"{at}.conv0", m, n, 3, 3)
            made.normal(f"{at}.conv1", m, m, 3, 3)
            made.norm(f"{at}.bn0", n, counted=False)
            made.norm(f"{at}.bn1", m, counted=False)
            if n != m:
                made.normal(f"{at}.convdim", m, n, 1, 1)
            n = m
    made.norm("bn", n, counted=False)
    made.linear("fc", n, 10)
    return made.state


def wrn_logits(state: State, x: Tensor) -> Tensor:
    x = F.conv2d(x, state["conv0"], padding=1)
    at = sorted({name.rpartition(".conv0")[0] for name in state if name.endswith(".conv0")})
    for name in at:
        stride = 2 if name.endswith("block0") and not name.startswith("group0") else 1
        o = norm(state, f"{name}.bn0", x).relu()
        y = norm(state, f"{name}.bn1", F.conv2d(o, state[f"{name}.conv0"], None, stride, 1)).relu()
        dim = state.get(f"{name}.convdim")
        x = F.conv2d(y, state[f"{name}.conv1"], padding=1) + (
            x if dim is None else F.conv2d(o, dim, None, stride)
        )
    return F.linear(norm(state, "bn", x).relu().mean((2, 3)), state["fc.weight"], state["fc.bias"])


def resnet18(xi: float) -> State:
    made, n = Layout(xi), 64
    made.normal("conv1.weight", 64, 3, 7, 7)
    made.norm("bn1", 64)
    for stage, m in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            at = f"layer{stage}.{block}"
            made.dgc(f"{at}.conv1", n, m, 3)
            made.norm(f"{at}.bn1", m)
            made.dgc(f"{at}.conv2", m, m, 3)
            made.norm(f"{at}.bn2", m)
            if n != m:
                made.dgc(f"{at}.downsample.0", n, m, 1)
                made.norm(f"{at}.downsample.1.norm", m)
            n = m
    made.linear("fc", 512, 1000)
    return made.state


def resnet18_logits(state: State, x: Tensor) -> Tensor:
    x = norm(state, "bn1", F.conv2d(x, state["conv1.weight"], None, 2, 3)).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for stage in range(1, 5):
        for block in range(2):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = norm(state, f"{at}.bn1", dgc(state, f"{at}.conv1", x, stride)).relu()
            y = norm(state, f"{at}.bn2", dgc(state, f"{at}.conv2", y))
            if stride > 1:
                x = norm(state, f"{at}.downsample.1.norm", dgc(state, f"{at}.downsample.0", x, stride))
            x = (x + y).relu()
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


def condensenet(xi: float, depths=(8, 8, 8), growths=(8, 16, 32)) -> State:
    made, n = Layout(xi), 2 * growths[0]
    made.normal("features.init_conv.weight", n, 3, 3, 3)
    for stage, (depth, growth) in enumerate(zip(depths, growths, strict=True), 1):
        for layer in range(1, depth + 1):
            at = f"features.denseblock_{stage}.denselayer_{layer}"
            made.dgc(f"{at}.conv_1", n, 4 * growth, 1)
            made.norm(f"{at}.conv_2.norm", 4 * growth)
            made.normal(f"{at}.conv_2.conv.weight", growth, growth, 3, 3)  # 4 groups
            n += growth
    made.norm("bn_last", n)
    made.linear("classifier", n, 10)
    return made.state


def condensenet_logits(state: State, x: Tensor, depths=(8, 8, 8)) -> Tensor:
    x = F.conv2d(x, state["features.init_conv.weight"], padding=1)
    for stage, depth in enumerate(depths, 1):
        x = x if stage == 1 else F.avg_pool2d(x, 2)
        for layer in range(1, depth + 1):
            at = f"features.denseblock_{stage}.denselayer_{layer}"
            y = norm(state, f"{at}.conv_2.norm", dgc(state, f"{at}.conv_1", x)).relu()
            x = torch.cat([x, F.conv2d(y, state[f"{at}.conv_2.conv.weight"], padding=1, groups=4)], 1)
    x = norm(state, "bn_last", x).relu().mean((2, 3))
    return F.linear(x, state["classifier.weight"], state["classifier.bias"])


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def equal(model: torch.nn.Module, wanted: Tensor, size: int) -> None:
    """To 1e-12 of the largest logit: the same float64 products, added up in another order."""
    assert wanted.isfinite().all() and wanted.std() > 0
    got = model.eval()(images(size))
    assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def exported(state: State) -> dict[str, np.ndarray]:
    """As arrays, convolutions with `.weight`, in the spelling of the exported files."""
    renamed = {k.replace("convdim", "conv_dim"): v.numpy() for k, v in state.items()}
    return {f"{k}.weight" if "conv" in k else k: v for k, v in renamed.items()}


def split(state: State) -> dict[str, object]:
    """As the first version of the public training writes it."""
    stats = {k: v for k, v in state.items() if "running" in k}
    params = {k: v for k, v in state.items() if k not in stats}
    return {"params": params, "stats": stats, "epoch": 3, "optimizer": {"state": {}}}


WAYS = {
    "tensors": dict,
    "params": lambda state: {"params": state, "epoch": 3},
    "params and stats": split,
    "exported": exported,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("depth", "widen"), [(10, 1), (16, 2)])
def test_public_wide_resnet_gives_the_public_logits(depth, widen, way):
    state, model = wrn(depth, widen), create(f"wrn-{depth}-{widen}").double()
    load_public(model, WAYS[way](state), "wrn")
    equal(model, wrn_logits(state, images(32)), 32)


@pytest.mark.parametrize("way", ["tensors", "parallel", "old"])
@pytest.mark.parametrize("xi", [0.0, 0.75])
def test_public_condensenet_gives_the_public_logits(xi, way):
    state = condensenet(xi)
    model = create("condensenet-50", conv="dgc", groups=HEADS, xi=xi).double()
    kept = {k: v for k, v in state.items() if way != "old" or "num_batches" not in k}
    given = {"state_dict": {f"module.{k}": v for k, v in kept.items()}} if way == "parallel" else kept
    load_public(model, given, "dgc")
    equal(model, condensenet_logits(state, images(32)), 32)


def test_public_resnet18_gives_the_public_logits():
    state, model = resnet18(0.55), create("resnet18", conv="dgc", groups=HEADS, xi=0.55).double()
    load_public(model, state, "dgc")
    equal(model, resnet18_logits(state, images(64)), 64)


@pytest.mark.parametrize(
    ("name", "stages"), [("condensenet-86", (14,) * 3), ("condensenet-74", (4, 6, 8, 10, 8))]
)
def test_every_public_condensenet_has_its_place(name, stages):
    growths = (8, 16, 32, 64, 128)[: len(stages)]
    state, model = condensenet(0.75, stages, growths), create(name, conv="dgc", groups=HEADS, num_classes=10)
    load_public(model, state, "dgc")
    first = state["features.denseblock_3.denselayer_8.conv_1.headconv_2.fc2.bias"]
    layer = model.features[sum(stages[:2]) + 2 + 8].layers[0]
    torch.testing.assert_close(layer.offset[2].double(), first, rtol=1e-6, atol=1e-6)  # in float32


def test_what_does_not_fit_is_named_and_nothing_is_copied():
    state, model = wrn(10, 1), create("wrn-10-1").double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    del state["group0.block0.conv0"], state["bn.running_var"]
    state |= {"conv9": torch.zeros(1), "fc.bias": torch.zeros(100)}
    with pytest.raises(UserError) as caught:
        load_public(model, state, "wrn")
    assert str(caught.value) == (
        "the checkpoint does not fit this network by layout='wrn': missing: group0.block0.conv0, bn.running_var; "
        "left over: conv9; of another shape: fc.bias [100] where it has [10]"
    )
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    with pytest.raises(UserError, match=r"missing: conv0, group0\.block0\.bn0\.weight, .* and 36 more$"):
        load_public(model, {}, "wrn")


def test_a_number_of_dropped_channels_other_than_xi_says_is_refused_with_the_share_that_fits():
    state = condensenet(0.25)
    model = create("condensenet-50", conv="dgc", groups=HEADS, xi=0.75)
    drops = "the checkpoint drops 4 of 16 channels, and xi=0.75 means 12; "
    with pytest.raises(UserError) as caught:
        load_public(model, state, "dgc")
    assert str(caught.value) == f"{drops}create the network with xi=0.25"
    state["features.denseblock_2.denselayer_1.conv_1._inactive_channels"] += 1
    with pytest.raises(UserError) as caught:
        load_public(model, state, "dgc")
    assert str(caught.value) == f"{drops}use one of the end of its training"


@pytest.mark.parametrize(
    ("name", "options", "layout", "message"),
    [
        ("wrn-10-1", {}, "wrm", "unknown layout 'wrm'; did you mean wrn?"),
        ("resnet18", {}, "wrn", "layout='wrn' is of wrn-D-k, not of ResNet"),
        (
            "wrn-10-1",
            {"conv": "gc2l", "groups": 4},
            "wrn",
            "layout='wrn' has no stages.0.0.conv1 of TwoLevelConv2d; use wrn-D-k with conv='sc'",
        ),
        ("wrn-34-2", {}, "wrn", "layout='wrn' has no stem.0 of Conv2d; use wrn-D-k with conv='sc'"),
        (
            "wrn-10-1",
            {"conv": "gc", "groups": 4},
            "wrn",
            "the checkpoint does not fit this network by layout='wrn': of",
        ),
        (
            "resnet18",
            {},
            "dgc",
            "layout='dgc' is of resnet18 and condensenet-* with conv='dgc', not of ResNet without dgc",
        ),
        (
            "mobilenetv2",
            {"conv": "dgc", "groups": 4},
            "dgc",
            "layout='dgc' is of resnet18 and condensenet-* with conv='dgc', not of MobileNetV2",
        ),
        (
            "condensenet-50",
            {"conv": "dgc", "groups": 4, "threshold": "global"},
            "dgc",
            "threshold='global' is not in layout='dgc'; use threshold='head'",
        ),
    ],
)
def test_error_names_the_layout_and_what_it_is_of(name, options, layout, message):
    with pytest.raises(UserError) as caught:
        load_public(create(name, **options), wrn(10, 1), layout)
    assert str(caught.value).startswith(message)


def test_network_without_memory_is_refused():
    with torch.device("meta"):
        model = create("wrn-10-1")
    with pytest.raises(UserError, match="the network is on the meta device; create it where it has memory"):
        load_public(model, wrn(10, 1), "wrn")
