"""Muon orthogonalises the step of each channel group's kernel alone, on one rank or several."""

import pytest
import torch
from command import command, records, run

from twolevel import models
from twolevel.nn.init import initialize
from twolevel.training.config import OptimiserConfig, TrainConfig
from twolevel.training.muon import Muon, orthogonal
from twolevel.training.optimiser import make_optimiser

MUON = "--update muon --lr-matrices 0.02 --lr-restriction 0.5 --lr-coarse 0.25 --momentum-coarse 0.8".split()

# Sums over ranks are added in another order; rounding errors of 1e-16, amplified by batch norm over nine steps.
TOLERANCE = 1e-10


@pytest.mark.parametrize("shape", [(1, 5, 40), (3, 16, 16), (2, 40, 5), (4, 1, 9)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = orthogonal(matrices)
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    core = u.mT @ got @ vt.mT
    values = core.diagonal(dim1=1, dim2=2)
    # The quintic's band; the smallest value of a square matrix may still be on its way up.
    assert values.min() > 0 and values.max() < 1.3
    assert values.median() > 0.65
    assert (core - torch.diag_embed(values)).abs().max() < 1e-12  # a polynomial in the singular values


def test_a_zero_gradient_makes_no_step():
    assert torch.equal(orthogonal(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def settings(**options) -> OptimiserConfig:
    given = {"update": "muon", "lr_matrices": 0.02} | options
    return TrainConfig(optimiser=OptimiserConfig(**given)).optimiser


def optimiser_of(conv: str, groups: int, **options) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = initialize(models.create("wrn-10-1", conv=conv, groups=groups, num_classes=10))
    return model, make_optimiser(model, settings(**options))


def test_a_step_is_the_formula():
    model, optimiser = optimiser_of("gc2l", 4, weight_decay=0.1)
    kernel = model.get_submodule("stages.0.0.conv1.local").weight
    start = kernel.detach().clone()
    gradients = [torch.randn_like(kernel), torch.randn_like(kernel)]
    for gradient in gradients:
        kernel.grad = gradient.clone()
        optimiser.step()
    momentum, wanted = torch.zeros_like(kernel), start
    for gradient in gradients:
        momentum = 0.9 * momentum + gradient
        step = (gradient + 0.9 * momentum).view(4, len(kernel) // 4, -1)
        update = torch.cat([orthogonal(one[None]) for one in step]).view(kernel.shape)
        wanted = (1 - 0.1 * 0.1) * wanted - 0.1 * update  # the learning rate of SGD, until a step sets it
    torch.testing.assert_close(kernel.detach(), wanted, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize(
    ("conv", "groups"),
    [("gc2l", 4), ("gc2l", 16), ("gc", 4), ("shuffle", 4), ("sc", 1), ("flgc", 4), ("lgc", 4), ("bgc", 4)],
)
def test_kernels_are_of_muon_with_their_groups_and_the_rest_of_sgd(conv, groups):
    model, optimiser = optimiser_of(conv, groups)
    assert isinstance(optimiser, Muon)
    of_muon = {p: group["groups"] for group in optimiser.kernels for p in group["params"]}
    of_sgd = [p for group in optimiser.rest.param_groups for p in group["params"]]
    assert len(of_muon) + len(of_sgd) == len([*model.parameters()])
    assert all(p.dim() == 4 for p in of_muon) and all(p.dim() != 4 for p in of_sgd)
    inner = [p for name, p in model.named_parameters() if p.dim() == 4 and "stages.1" in name]
    assert {of_muon[p] for p in inner} == {1 if conv in ("flgc", "lgc") else groups}


def test_restriction_and_coarse_have_rates_of_their_own():
    model, optimiser = optimiser_of("gc2l", 4, learning_rate=0.1, lr_restriction=0.5, lr_coarse=3.0)
    scale = {p: group["scale"] for group in optimiser.param_groups for p in group["params"]}
    layer = model.get_submodule("stages.0.0.conv1")
    found = [scale[getattr(layer, name).weight] for name in ("local", "restriction", "coarse")]
    assert found == pytest.approx([0.2, 0.1, 0.6])


@pytest.mark.parametrize("update", ["momentum", "muon"])
def test_restriction_and_coarse_have_momenta_of_their_own(update):
    """By what is kept after two gradients of one: 1 + mu."""
    own = {"local": 0.9, "restriction": 0.5, "coarse": 0.75}
    options = {f"momentum_{part}": value for part, value in own.items() if part != "local"}
    if update == "momentum":
        options["lr_matrices"] = None
    model, optimiser = optimiser_of("gc2l", 4, update=update, weight_decay=0.0, **options)
    layer = model.get_submodule("stages.0.0.conv1")
    weights = {part: layer.get_submodule(part).weight for part in own}
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimiser.step()
    for part, momentum in own.items():
        kept = optimiser.state[weights[part]]["momentum_buffer"]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 + momentum))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_learn_what_one_process_learns(pool, tiny, tmp_path, ranks):
    for name, number in (("one", 1), ("several", ranks)):
        run(pool, "train", *tiny, *MUON, "--output", tmp_path / name, ranks=number)
    one, several = ([r["loss"] for r in records(tmp_path / name, "step")] for name in ("one", "several"))
    assert one == pytest.approx(several, rel=TOLERANCE)


def test_a_stopped_run_goes_on(pool, tiny, tmp_path):
    run(pool, "train", *tiny, *MUON, "--output", tmp_path / "whole")
    run(pool, "train", *tiny, *MUON, "--output", tmp_path / "stopped", "--max-steps", 4)
    run(pool, "train", *tiny, *MUON, "--output", tmp_path / "stopped", "--resume")
    whole, stopped = ([r["loss"] for r in records(tmp_path / name, "step")] for name in ("whole", "stopped"))
    assert whole == stopped


@pytest.mark.parametrize("parallel", ["fsdp", "channel"])
def test_parts_of_kernels_are_refused(pool, tiny, tmp_path, parallel):
    options = ["--conv", "sc", "--groups", 1, "--parallel", parallel, *MUON[:4], "--output", tmp_path / "run"]
    outcomes = pool.run(command, "train", *tiny, *options, ranks=2, init=False)
    assert [o.code for o in outcomes] == [2, 2]
    assert f"update=muon needs whole kernels, of which parallel={parallel} holds parts" in outcomes[0].err
