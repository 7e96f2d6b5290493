"""The training rules of DGC, DGConv, FLGC and LGC."""

import pytest
import torch
from torch import nn

from twolevel.nn import DGConv2d, DynamicGroupConv2d, FLGConv2d, LearnedGroupConv2d, TwoLevelConv2d
from twolevel.training.config import OptimiserConfig, RuleConfig
from twolevel.training.optimiser import make_optimiser
from twolevel.training.rules import (
    ComplexityBudget,
    Condensation,
    GlobalThreshold,
    GroupLasso,
    ProgressivePruning,
    SaliencyLasso,
    copy_choices,
    rules_for,
)


def dynamic_layers(number: int = 2, **options) -> dict[str, DynamicGroupConv2d]:
    torch.manual_seed(
        0
    )  # some draws leave channels whose saliencies all tie at 1, where no hidden unit fires
    return {f"layer{i}": DynamicGroupConv2d(16, 8, 3, padding=1, groups=4, **options) for i in range(number)}


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_network_gets_the_rules_of_its_convolutions():
    def kinds(*layers):
        return [type(rule).__name__ for rule in rules_for(nn.Sequential(*layers), RuleConfig())]

    assert kinds(nn.Conv2d(4, 4, 1), TwoLevelConv2d(4, 4, 1, groups=2)) == []
    assert kinds(DGConv2d(8, 8, 1)) == ["ComplexityBudget"]
    assert kinds(FLGConv2d(8, 8, 1, groups=2)) == ["GroupRecord"]
    assert kinds(LearnedGroupConv2d(8, 8, 1, groups=2)) == ["Condensation", "GroupLasso"]
    head, by_threshold = dynamic_layers(1), dynamic_layers(1, threshold="global")
    assert kinds(*head.values()) == ["ProgressivePruning", "SaliencyLasso"]
    assert kinds(*by_threshold.values()) == ["ProgressivePruning", "SaliencyLasso", "GlobalThreshold"]


@pytest.mark.parametrize(("progress", "dropped"), [(0, 0), (1 / 12, 0), (5 / 12, 6), (3 / 4, 12), (1, 12)])
def test_pruning_follows_the_progress_of_training(progress, dropped):
    layers = dynamic_layers(xi=0.75)
    ProgressivePruning(layers).begin_step(progress)
    assert [int(layer.num_dropped()) for layer in layers.values()] == [dropped, dropped]


@pytest.mark.parametrize("form", ["paper", "public"])
def test_lasso_is_that_of_the_paper_or_of_the_authors_code(form):
    """The paper's: the mean over layers and heads of the L1 norm. The code's: their sum of the mean over channels."""
    torch.manual_seed(0)  # see dynamic_layers
    widths = (16, 24)
    layers = {str(n): DynamicGroupConv2d(n, 8, 3, padding=1, groups=4) for n in widths}
    rule = SaliencyLasso(layers, 0.1, form)
    seen = []
    for n, layer in zip(widths, layers.values(), strict=True):
        layer.saliency.register_forward_hook(lambda *call: seen.append(call[2]))
        layer(images(5, n, 6, 6))
    assert [g.shape for g in seen] == [(5, 4, n) for n in widths]
    loss = rule.loss(torch.tensor(2.0))
    if form == "paper":
        heads = [sum(abs(value) for value in g[b, h]) for g in seen for b in range(5) for h in range(4)]
        expected = sum(heads) / 5 / (2 * 4)
    else:
        heads = [g[:, h].mean() for g in seen for h in range(4)]
        expected = sum(heads)
    torch.testing.assert_close(loss, 2 + 0.1 * expected)
    loss.backward()
    assert all(layer.squeeze.grad.abs().sum() > 0 for layer in layers.values())


@pytest.mark.parametrize(("depth", "heads"), [(19, 4), (42, 4)])
def test_public_lasso_does_not_become_smaller_with_layers_and_heads(depth, heads):
    """All saliencies are 1: lambda for each head, as many as 76 in ResNet-18 and 168 in CondenseNet-86."""
    layers = {str(i): DynamicGroupConv2d(8, 8, 1, groups=heads) for i in range(depth)}
    for form, expected in (("public", 0.5 * depth * heads), ("paper", 0.5 * 8)):
        rule = SaliencyLasso(layers, 0.5, form)
        rule.seen = [torch.ones(3, heads, 8) for _ in layers]
        assert rule.loss(torch.zeros(())).item() == pytest.approx(expected)


def test_lasso_sees_each_forward_once_and_none_in_evaluation():
    layers = dynamic_layers(1)
    rule, layer = SaliencyLasso(layers, 1.0, "paper"), layers["layer0"]
    layer(images(2, 16, 4, 4))
    assert len(rule.take()) == 1 and rule.take() == []
    layer.eval()(images(2, 16, 4, 4))
    assert rule.take() == []


def test_global_threshold_is_the_quantile_of_the_last_steps():
    layers = dynamic_layers(2, threshold="global", xi=0.75)
    rule = GlobalThreshold(layers, steps=2)
    seen = []
    for step in range(3):
        rule.begin_step(step / 3)
        now = []
        for layer in layers.values():
            handle = layer.saliency.register_forward_hook(lambda *call, now=now: now.append(call[2]))
            layer(images(3, 16, 4, 4, seed=step))
            handle.remove()
        seen.append(torch.cat([g.detach().flatten() for g in now]))
        rule.loss(torch.zeros(()))
    record = rule.end_epoch()
    values = torch.cat(seen[1:])
    threshold = record["dgc_threshold"]
    assert (values <= threshold).float().mean() == pytest.approx(0.75, abs=1 / len(values))
    assert [layer.threshold.item() for layer in layers.values()] == [threshold] * 2


def gated(gates: list[float]) -> DGConv2d:
    layer = DGConv2d(8, 8, 1)
    layer.gates.data = torch.tensor(gates)
    return layer


@pytest.mark.parametrize(
    ("gates", "factor"),
    [
        ([1.0, 1.0, 1.0], (64 / 32) ** 0.02),  # dense: twice the wanted complexity
        ([1.0, -1.0, 1.0], 1.0),  # two groups: as wanted
        ([-1.0, -1.0, -1.0], 1.0),  # less than wanted costs nothing
    ],
)
def test_budget_multiplies_the_loss_where_complexity_is_exceeded(gates, factor):
    rule = ComplexityBudget({"a": gated(gates)}, divisor=2, exponent=0.02)
    assert rule.loss(torch.tensor(3.0)).item() == pytest.approx(3 * factor, rel=1e-6)


def test_budget_pushes_gates_shut_and_its_absence_does_not():
    layer = gated([1.0, 1.0, 1.0])
    ComplexityBudget({"a": layer}, divisor=2, exponent=0.02).loss(torch.tensor(3.0)).backward()
    assert (layer.gates.grad > 0).all()
    assert ComplexityBudget({"a": layer}, None, 0.02).loss(torch.tensor(3.0)).item() == 3.0


def test_gates_and_logits_are_spared_weight_decay():
    model = nn.Sequential(DGConv2d(8, 8, 1), FLGConv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8))
    sgd = make_optimiser(model, OptimiserConfig(learning_rate=0.1, momentum=0.9, weight_decay=0.01))
    decay = {id(p): group["weight_decay"] for group in sgd.param_groups for p in group["params"]}
    got = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert {name for name, value in got.items() if value == 0} == {
        "0.gates",
        "1.input_logits",
        "1.output_logits",
    }
    sgd = make_optimiser(
        model, OptimiserConfig(learning_rate=0.1, momentum=0.9, weight_decay=0.01, decay_norm=False)
    )
    decay = {id(p): group["weight_decay"] for group in sgd.param_groups for p in group["params"]}
    assert decay[id(model[2].weight)] == 0 and decay[id(model[0].weight)] == 0.01


def condensed_layers(**options) -> dict[str, LearnedGroupConv2d]:
    torch.manual_seed(0)
    return {
        f"layer{i}": LearnedGroupConv2d(n, 8, k, groups=4, **options)
        for i, (n, k) in enumerate([(8, 1), (12, 3)])
    }


def test_inputs_are_dropped_stage_by_stage_and_how_many_are_kept_is_recorded():
    layers = condensed_layers()
    rule, seen = Condensation(layers), []
    for step in range(12):
        rule.begin_step(step / 12)
        kept = rule.end_epoch()["lgc_kept"]
        assert all(len(set(groups)) == 1 and len(groups) == 4 for groups in kept.values())
        seen.append(tuple(groups[0] for groups in kept.values()))
    assert seen == [(8, 12)] * 2 + [(6, 9)] * 2 + [(4, 6)] * 2 + [(2, 3)] * 6


def test_each_stage_is_computed_once():
    layers = condensed_layers()
    rule = Condensation(layers)
    rule.begin_step(0.2)
    (layer, _) = layers.values()
    version = layer.kept._version
    rule.begin_step(0.3)
    assert layer.kept._version == version
    rule.begin_step(0.4)
    assert layer.kept._version > version


@pytest.mark.parametrize(
    ("progress", "shares"), [(0.1, 1.0), (0.2, 0.75), (0.4, 0.5), (0.5, 0.0), (0.9, 0.0)]
)
def test_group_lasso_is_the_norms_of_kept_inputs_until_the_last_are_dropped(progress, shares):
    layers = condensed_layers(dtype=torch.float64)
    rule = GroupLasso(layers, 0.1)
    for one in (Condensation(layers), rule):
        one.begin_step(progress)
    expected, counted = 0.0, 0
    for layer in layers.values():
        for group in range(4):
            for j in range(layer.in_channels):
                if layer.kept[group, j]:
                    squares = [w**2 for row in layer.weight[group::4].tolist() for w in _flat(row[j])]
                    expected += sum(squares) ** 0.5
                    counted += 1
    assert (counted == shares * 4 * (8 + 12)) == (progress < 0.5)
    got = rule.loss(torch.tensor(2.0, dtype=torch.float64))
    assert got.item() == pytest.approx(2 + (0.1 * expected if shares else 0), rel=1e-12)


def _flat(taps: list[list[float]]) -> list[float]:
    return [tap for row in taps for tap in row]


def test_group_lasso_pulls_at_kept_weights_alone_and_is_safe_at_zero():
    layers = condensed_layers()
    Condensation(layers).begin_step(0.2)
    (layer, _) = layers.values()
    with torch.no_grad():
        layer.weight[:, 0] = 0
    GroupLasso(layers, 1.0).loss(torch.zeros(())).backward()
    kept = layer.mask() & (layer.weight != 0)[:, :, 0, 0]
    assert torch.equal(layer.weight.grad[:, :, 0, 0] != 0, kept)
    assert layer.weight.grad.isfinite().all()


def test_without_condensation_there_is_no_group_lasso():
    rule = GroupLasso(condensed_layers(condensation=1), 1.0)
    assert rule.loss(torch.tensor(3.0)).item() == 3.0


def test_an_average_keeps_the_inputs_that_its_network_keeps():
    network, average = (nn.Sequential(LearnedGroupConv2d(8, 8, 1, groups=4)) for _ in range(2))
    network[0].set_progress(0.4)
    average[0].set_progress(1)
    copy_choices(network, average)
    assert torch.equal(average[0].kept, network[0].kept)


def test_a_small_network_condenses_while_it_learns():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), LearnedGroupConv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(32, 2)
    )
    x, labels = images(16, 3, 6, 6), torch.arange(16) % 2
    rules, losses = rules_for(model, RuleConfig()), []
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    for step in range(40):
        for rule in rules:
            rule.begin_step(step / 40)
        loss = nn.functional.cross_entropy(model(x), labels)
        losses.append(loss.item())
        for rule in rules:
            loss = rule.loss(loss)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    assert rules[0].end_epoch() == {"lgc_kept": {"2": [2, 2, 2, 2]}}
    assert losses[-1] < losses[0] / 2
