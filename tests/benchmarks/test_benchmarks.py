"""Benchmarks compare like with like, say what they skip, and write down what a number needs."""

import json
import re
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks import __main__ as command
from benchmarks import layers, normalise, peers, report, roofline, step
from benchmarks.export import Settings as ExportSettings
from benchmarks.inference.command import Settings as InferenceSettings
from benchmarks.stock import StockTwoLevelConv2d, ThreeConvolutions, TunedTwoLevelConv2d, to_stock
from twolevel import models
from twolevel.analysis import count
from twolevel.errors import UserError
from twolevel.nn import TwoLevelConv2d
from twolevel.ops.kernels import native

FORMS = [StockTwoLevelConv2d, TunedTwoLevelConv2d, ThreeConvolutions]
# The same sums of at most some hundred float64 products, in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-11}
TINY_STEP = ["--device", "cpu", "--model", "wrn-10-1", "--batch", "2", "--turns", "2", "--groups", "4"]
TINY_LAYERS = ["--device", "cpu", "--models", "wrn-10-1", "--batch", "1", "--turns", "2", "--groups", "4"]
TINY_NORMALISE = ["--device", "cpu", "--models", "wrn-10-1", "--batch", "1", "--turns", "2"]


@pytest.fixture(autouse=True)
def one_thread():
    """Benchmarks set the number of threads; other tests rely on it."""
    yield
    torch.set_num_threads(1)


def two_level(*arguments, **options) -> TwoLevelConv2d:
    torch.manual_seed(0)
    return TwoLevelConv2d(*arguments, **options, dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1, "groups": 4},
        {"kernel_size": 1, "stride": 2, "groups": 2},
        {"kernel_size": 3, "stride": (2, 1), "padding": "valid", "dilation": 2, "groups": 4},
        {"kernel_size": (1, 3), "padding": "same", "groups": 1},
    ],
)
def test_stock_layers_have_the_function_and_gradient_of_the_two_level_layer(form, options):
    ours = two_level(8, 12, **options)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64, requires_grad=True)
    outputs = [ours(x), form(ours)(x)]
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in outputs]
    torch.testing.assert_close(*outputs, **CLOSE)
    torch.testing.assert_close(*gradients, **CLOSE)


@pytest.mark.parametrize("form", FORMS)
def test_stock_layers_own_their_weights(form):
    ours = two_level(8, 8, 3, groups=2)
    theirs = form(ours)
    own = {weight.untyped_storage().data_ptr() for weight in ours.parameters()}
    assert own.isdisjoint(weight.untyped_storage().data_ptr() for weight in theirs.parameters())
    assert sum(w.numel() for w in theirs.parameters()) == sum(w.numel() for w in ours.parameters())


@pytest.mark.parametrize("form", [TunedTwoLevelConv2d, ThreeConvolutions])
def test_tuned_stock_layers_stay_in_channels_last_memory(form):
    layer = form(two_level(8, 8, 3, groups=4)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("form", FORMS)
def test_a_network_of_stock_layers_computes_the_same_and_has_none_of_ours(form):
    ours, theirs = (models.create("wrn-10-1", conv="gc2l", groups=4).double() for _ in range(2))
    assert to_stock(theirs, form) is theirs
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(theirs(x), ours(x), **CLOSE)
    assert not any(isinstance(module, TwoLevelConv2d) for module in theirs.modules())
    assert sum(isinstance(module, form) for module in theirs.modules()) == 8


def test_a_part_of_a_network_is_not_made_of_stock_layers():
    with pytest.raises(UserError, match=r"conv1 is one of 2 parts; convert a whole network"):
        to_stock(peers.one_rank("wrn-10-1", 4, 2))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_one_rank_holds_what_a_rank_holds_and_leaves_no_process_group(ranks):
    model = peers.one_rank("wrn-10-1", 4, ranks)
    whole = models.create("wrn-10-1", conv="gc2l", groups=4)
    assert sum(p.numel() for p in model.parameters()) == count(whole, (3, 32, 32), ranks=ranks).held
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert not dist.is_initialized()


def test_one_rank_of_one_is_the_whole_network():
    x = torch.randn(2, 3, 32, 32)
    whole = models.create("wrn-10-1", conv="gc2l", groups=4)
    torch.testing.assert_close(peers.one_rank("wrn-10-1", 4, 1)(x), whole(x))


def test_peers_take_turns_and_ratios_are_of_medians(monkeypatch):
    asked = []

    def fake(call, repeats=1):
        asked.append(call)
        turn, place = divmod(len(asked) - 1, 8)
        return place + 1 if turn else 100.0

    monkeypatch.setattr(report, "stopwatch", lambda device, threads: fake)
    arguments = [*TINY_STEP, "--no-compile", "--turns", "3"]
    found = step.measure(report.parse(step.Settings, "step", arguments))
    assert len(set(asked)) == 8
    assert asked == asked[:8] * 3
    by_name = {peer["peer"]: peer for peer in found["peers"]}
    rank = ["one rank of 4", "one rank of 4 fused"]
    assert [*by_name] == ["sc", "gc", "gc2l", "stock", "stock tuned", "stock three", *rank]
    assert by_name["gc2l"]["median_ms"] == 3000
    assert by_name["gc2l"]["to_sc"] == 3
    assert by_name["gc2l"]["to_stock"] == 3 / 4
    assert by_name["sc"]["to_stock"] is None


def test_a_step_trains(monkeypatch):
    settings = report.parse(step.Settings, "step", [*TINY_STEP, "--no-compile"])
    for key, one in step.ready(settings)[0].items():
        before = [p.detach().clone() for p in one.network.parameters()]
        one()
        changed = [not torch.equal(a, b) for a, b in zip(before, one.network.parameters(), strict=True)]
        assert all(changed), key


def test_a_compiler_that_fails_is_skipped_with_its_reason(monkeypatch):
    class Broken(nn.Sequential):
        def forward(self, x):
            raise RuntimeError("no compiler found\nby anyone")

    monkeypatch.setattr(torch, "compile", Broken)
    found = step.measure(report.parse(step.Settings, "step", TINY_STEP))
    assert found["skipped"] == {f"{peer} compiled, G=4": "no compiler found" for peer in ("gc2l", "stock")}
    assert len(found["peers"]) == 8


def test_any_other_peer_that_fails_is_an_error(monkeypatch):
    def broken(self, x):
        raise RuntimeError("defect")

    monkeypatch.setattr(ThreeConvolutions, "forward", broken)
    with pytest.raises(RuntimeError, match="defect"):
        step.measure(report.parse(step.Settings, "step", TINY_STEP))


@pytest.mark.parametrize("named", [("gc2l",), ("one rank of 4", "sc"), ("stock",)])
def test_peers_that_are_named_are_timed_alone(named, tmp_path):
    arguments = [*TINY_STEP, "--no-compile", "--peers", *named]
    settings = report.parse(step.Settings, "step", arguments)
    found = step.measure(settings)
    assert {peer["peer"] for peer in found["peers"]} == {*named}
    assert all((peer["to_sc"] is not None) == ("sc" in named) for peer in found["peers"])
    assert len(step.table(found).splitlines()) == 1 + len(named)
    picture = tmp_path / "picture.png"
    step.draw(found, settings, picture)
    assert picture.exists() == ("sc" in named)


@pytest.mark.parametrize(
    ("device", "names", "message"),
    [
        ("cpu", ("gc2", "sc"), "unknown peer 'gc2'; did you mean gc2l"),
        ("cpu", ("sc graph",), "unknown peer 'sc graph'"),
        ("cuda", ("sc", "gc2l graph"), "--peers 'gc2l graph' replays 'gc2l'; name that too"),
        ("cuda", ("stock three graph",), "unknown peer 'stock three graph'"),
    ],
)
def test_a_peer_that_there_is_not_is_named(monkeypatch, device, names, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    with pytest.raises(UserError, match=message):
        step.Settings(device=device, peers=names)


def test_on_a_gpu_a_peer_may_be_replayed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    step.Settings(device="cuda", peers=("gc2l", "gc2l graph", "gc2l compiled", "gc2l compiled graph"))


def test_a_peer_that_fills_the_card_costs_the_others_nothing(monkeypatch):
    def full(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    monkeypatch.setattr(ThreeConvolutions, "forward", full)
    found = step.measure(report.parse(step.Settings, "step", [*TINY_STEP, "--no-compile"]))
    assert found["skipped"] == {"stock three, G=4": "CUDA out of memory. Tried to allocate 2 GiB"}
    assert len(found["peers"]) == 7


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("step", [*TINY_STEP, "--no-compile"]),
        ("layers", TINY_LAYERS),
        ("normalise", TINY_NORMALISE),
        ("inference", ["--turns", "2", "--size", "32"]),
        ("recompute", ["--turns", "2", "--model", "wrn-10-1", "--convs", "gc2l", "--batch", "2"]),
        ("export", ["--turns", "2", "--model", "wrn-10-1", "--batches", "1", "2"]),
    ],
)
def test_results_name_their_command_machine_versions_and_date(name, options, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(roofline.PROBES, "cpu", (64, 16, 4, 1 << 16))
    output = tmp_path / "new" / "found.json"
    argv = [*options, "--output", str(output)]
    command.main([name, *argv])
    result = json.loads(output.read_text())
    assert result["command"] == " ".join(["python -m benchmarks", name, *argv])
    assert result["machine"]["torch"] == torch.__version__
    assert result["machine"].keys() >= {"cpu", "cores", "load_average", "load_average_after", "python"}
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d$", result["date"])
    assert result["settings"]["turns"] == 2
    assert f"wrote {output}" in capsys.readouterr().out
    assert output.with_suffix(".png").exists() == (name not in ("inference", "recompute", "export"))


def test_layers_are_the_distinct_convolutions_of_the_network_after_its_stem():
    found = layers.shapes("wrn-16-4")
    assert found[layers.Shape(64, 64, 3, 1, 32)] == 3
    assert found[layers.Shape(64, 128, 1, 2, 32)] == 1
    assert not any(shape.channels == 3 for shape in found)
    macs = Counter()
    for shape, times in found.items():
        per_pixel = shape.channels * shape.outputs * shape.kernel**2
        macs["convolutions"] += times * per_pixel * shape.output_height**2
    ends = 3 * 16 * 9 * 32**2 + 256 * 10
    assert macs["convolutions"] + ends == count(models.create("wrn-16-4"), (3, 32, 32)).macs


def test_layers_refuse_networks_whose_convolutions_they_cannot_describe():
    with pytest.raises(UserError, match=r"--models mobilenetv2-cifar: .* use a wrn-D-k"):
        layers.shapes("mobilenetv2-cifar")


@pytest.mark.parametrize("name", ["dense", *layers.PEERS])
def test_passes_are_the_layer_and_its_two_gradients(name):
    torch.manual_seed(0)
    shape = layers.Shape(8, 8, 3, 1, 5)
    layer = layers.PEERS[name](shape, 2) if name != "dense" else nn.Conv2d(*shape.arguments, bias=False)
    x = torch.randn(2, 8, 5, 5)
    calls = layers.passes(layer, x)
    assert [*calls] == [*layers.PASSES]
    y = calls["forward"]()
    assert not y.requires_grad
    torch.testing.assert_close(y, layer(x))
    assert [g.shape for g in calls["input gradient"]()] == [x.shape]
    assert [g.shape for g in calls["weight gradient"]()] == [p.shape for p in layer.parameters()]
    calls["input gradient"](), calls["weight gradient"]()  # as often as one likes


def test_the_roof_is_the_slower_of_arithmetic_and_memory():
    settings = layers.Settings(device="cpu", batch=2)
    shape = layers.Shape(4, 4, 1, 2, 4)  # 2 images, 2 x 2 pixels out of 4 x 4: 2 * 8 * 16 = 256 operations
    # float32 elements: 2 * 16 * 4 inputs, 8 * 4 outputs, 16 weights: 176, so 704 bytes.
    assert roofline.Roofline(128, 64, 1e9).seconds(shape, 16, settings) == 2
    assert roofline.Roofline(64, 128, 1e9).seconds(shape, 16, settings) == 2
    assert roofline.Roofline(1e9, 1e9, 352).seconds(shape, 16, settings) == 2


def test_norms_are_those_of_the_network_and_some_have_a_shortcut():
    found = normalise.shapes("wrn-16-4")
    assert sum(found.values()) == 13
    assert found[normalise.Shape(64, 32, False)] == 3
    assert found[normalise.Shape(64, 32, True)] == found[normalise.Shape(256, 8, True)] == 1
    with pytest.raises(UserError, match=r"--models mobilenetv2-cifar: only the norms of a wrn-D-k"):
        normalise.shapes("mobilenetv2-cifar")


@pytest.mark.skipif(native.available() is not None, reason="no C compiler")
@pytest.mark.parametrize("shortcut", [False, True])
def test_peers_of_a_norm_compute_the_same(shortcut):
    torch.manual_seed(0)
    x, go, more = (torch.randn(3, 8, 5, 5) for _ in range(3))
    torchs, ours = (
        normalise.passes(peer, normalise.Shape(8, 5, shortcut), x, go, more) for peer in ("torch", "native")
    )
    # float32 sums of 75 numbers.
    torch.testing.assert_close(ours["forward"](), torchs["forward"](), rtol=1e-5, atol=1e-5)
    for _ in range(2):  # as often as one likes
        torch.testing.assert_close(ours["backward"](), torchs["backward"](), rtol=1e-5, atol=1e-5)


def test_the_roof_of_a_norm_is_its_passes_over_memory():
    settings = normalise.Settings(device="cpu", batch=2)
    # float32 maps of 2 x 4 x 3 x 3 numbers: 288 bytes.
    assert normalise.Shape(4, 3, False).seconds("forward", settings, 288) == 3
    assert normalise.Shape(4, 3, False).seconds("backward", settings, 288) == 5
    assert normalise.Shape(4, 3, True).seconds("backward", settings, 288) == 6


@pytest.mark.parametrize("there", [False, True])
def test_all_benchmarks_run_where_they_can_and_the_rest_is_named(there, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(command, "run_one", lambda name, argv: ran.append((name, *argv)))
    command.main([])
    able = ("layers", "normalise", "step", "input", "scaling")
    names = [name for name in command.BENCHMARKS if name not in command.ALONE]
    on_cpu = [(name, *["--device", "cpu"] * (name in able)) for name in names]
    assert ran == on_cpu + [(name, "--device", "cuda") for name in able] * there
    out = capsys.readouterr().out
    for name in able:
        line = f"skipped {name} on a GPU: torch {torch.__version__} finds no GPU on this machine"
        assert (line in out) != there


@pytest.mark.parametrize("settings", [step.Settings, layers.Settings, normalise.Settings])
def test_a_gpu_that_is_not_there_is_an_error(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--device cuda: .* finds no GPU on this machine; use --device cpu"):
        settings(device="cuda")
    assert settings().device == "cpu"


@pytest.mark.parametrize("settings", [step.Settings, layers.Settings, normalise.Settings])
def test_a_gpu_has_larger_defaults_and_a_file_of_its_own(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = settings()
    assert (chosen.device, chosen.batch) == ("cuda", 128)
    assert chosen.output.stem.endswith("-gpu")


@pytest.mark.parametrize(
    "settings", [step.Settings, layers.Settings, normalise.Settings, InferenceSettings, ExportSettings]
)
def test_one_turn_is_refused_since_it_has_no_quartiles(settings):
    with pytest.raises(UserError, match="--turns 1 gives no spread; use 2 or more"):
        settings(turns=1)


def test_an_unknown_benchmark_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["layer"])
    assert end.value.code == "benchmarks: unknown benchmark 'layer'; did you mean layers?"


@pytest.mark.parametrize("name", command.BENCHMARKS)
def test_every_option_has_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([name, "--help"])
    assert end.value.code == 0
    counted = {
        "kernels": "--targets",
        "traffic": "--ranks",
        "gpu": "--budget-s",
        "faults": "--trials",
        "finetune": "--seeds",
    }  # the others are timed
    assert counted.get(name, "--turns") in capsys.readouterr().out


def test_help_names_every_benchmark(capsys):
    command.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in command.BENCHMARKS)
