"""Batch norm's statistics before a test: those of training batches, on any ranks the same, and nothing else moves."""

import copy
from types import SimpleNamespace

import pytest
import torch
from command import command, records, run
from torch import nn

from twolevel.distributed import init_mesh
from twolevel.distributed.batch_norm import SyncedBatchNorm2d
from twolevel.models import create
from twolevel.training.config import RuleConfig
from twolevel.training.precise_batch_norm import recompute_statistics
from twolevel.training.rules import rules_for
from twolevel.training.step import make_step

# float64: sums over images, groups and ranks, in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
BATCH, NUMBER, EPOCH = 8, 3, 2


class Batches:
    """A training split of more batches than are asked for, as one data rank sees it."""

    steps_per_epoch = 5

    def __init__(self, rank=0, ranks=1):
        self.rank, self.ranks = rank, ranks

    def batches(self, epoch):
        for position in range(self.steps_per_epoch):
            generator = torch.Generator().manual_seed(10 * epoch + position)
            images = torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64) * (1 + position)
            yield (
                part.chunk(self.ranks)[self.rank] for part in (images, torch.zeros(BATCH, dtype=torch.long))
            )


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: b.clone() for k, b in model.named_buffers() if k.endswith(("running_mean", "running_var"))}


@torch.no_grad()
def by_the_formula(model: nn.Module, number: int = NUMBER) -> dict[str, torch.Tensor]:
    """mean = E[mean_b], var = E[var_b + mean_b²] - E[mean_b]², from what batch norms in training mode keep."""
    model.eval()
    seen = {name: [] for name in norms(model)}
    for name, norm in norms(model).items():
        norm.train()
        norm.momentum = 1.0

        def see(norm, inputs, _, seen=seen[name]):
            pixels = inputs[0].numel() // inputs[0].shape[1]
            seen.append((norm.running_mean.clone(), norm.running_var * (pixels - 1) / pixels))

        norm.register_forward_hook(see)
    for (images, _), _ in zip(Batches().batches(EPOCH), range(number), strict=False):
        model(images)
    found = {}
    for name, batches in seen.items():
        means, variances = (torch.stack(part) for part in zip(*batches, strict=True))
        found[f"{name}.running_mean"] = means.mean(0)
        found[f"{name}.running_var"] = (variances + means**2).mean(0) - means.mean(0) ** 2
    return found


def network(conv: str, **options) -> nn.Module:
    return create("wrn-10-1", conv=conv, groups=1 if conv == "sc" else 4, **options).double()


def alone() -> SimpleNamespace:
    """What recompute_statistics asks of a network that is placed on one rank."""
    mesh = init_mesh(device="cpu")
    return SimpleNamespace(
        mesh=mesh, logits=lambda network, images: network(images), end_forwards=lambda network: None
    )


# What is computed, and what stays as it was. In a rank, as one process has a mesh of one rank too.


def recomputed(conv, number):
    """The statistics, and the first batch as a test and as training computes it."""
    model = network(conv)
    recompute_statistics(alone(), model, Batches(), epoch=EPOCH, number=number)
    found = statistics(model)
    images, _ = next(Batches().batches(EPOCH))
    with torch.no_grad():
        tested = model.eval()(images)
        for norm in norms(model).values():
            norm.train()
        trained = model(images)
    return found, tested, trained


@pytest.mark.parametrize("conv", ["sc", "gc2l", "dgc"])
@pytest.mark.parametrize("number", [1, 3])
def test_statistics_are_those_of_all_batches_together(pool, conv, number):
    """And a test of the one batch that they are of gives what training gives."""
    ((found, tested, trained),) = pool.run(recomputed, conv, number, ranks=1)
    wanted = by_the_formula(network(conv), number)
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found, wanted, **CLOSE)
    if number == 1:
        torch.testing.assert_close(tested, trained, **CLOSE)
    else:
        assert not torch.allclose(tested, trained)


def statistics_on_ranks(way, data, group, conv, sync, number=NUMBER):
    """What a rank holds afterwards; and whether anything but the statistics moved."""
    mesh = init_mesh(data=data, group=group, device="cpu")
    options = {
        "conv": conv,
        "groups": 1 if conv == "sc" else 4,
        "image_shape": (3, 8, 8),
        "sync_batch_norm": sync,
    }
    step = make_step("wrn-10-1", mesh, "cpu", parallel=way, precision="float64", **options)
    assert any(isinstance(m, SyncedBatchNorm2d) for m in step.placed.model.modules()) == sync
    rules = rules_for(step.placed.model, RuleConfig())
    rest = {k: v.clone() for k, v in step.placed.model.state_dict().items() if "running" not in k}
    random = torch.get_rng_state()
    batches = Batches(mesh.get_local_rank("data"), data)
    recompute_statistics(step.placed, step.placed.model, batches, epoch=EPOCH, number=number)
    after = {k: v for k, v in step.placed.model.state_dict().items() if k in rest}
    same = all(torch.equal(whole(after[k]), whole(v)) for k, v in rest.items())
    same &= torch.equal(random, torch.get_rng_state()) and step.placed.model.training
    same &= not any(rule.take() for rule in rules if hasattr(rule, "take"))
    return statistics(step.placed.model), same


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def join(parts: list[dict], wanted: dict) -> dict:
    """Channels side by side, or equal on every rank that holds all; of a pipeline, the stages' own."""
    joined = {}
    for name, tensor in wanted.items():
        pieces = [part[name] for part in parts if name in part]
        joined[name] = pieces[0] if len(pieces[0]) == len(tensor) else torch.cat(pieces)
        assert all(torch.equal(p, joined[name]) for p in pieces if len(p) == len(tensor))
    return joined


WAYS = [
    ("group", 1, 1, "dgc", False),
    ("group", 1, 2, "gc2l", False),
    ("group", 1, 4, "gc2l", False),
    ("channel", 1, 4, "sc", False),
]
WAYS += [("group", 2, 1, conv, sync) for conv in ("gc2l", "dgc") for sync in (False, True)]
WAYS += [("fsdp", 2, 1, "sc", sync) for sync in (False, True)]
WAYS += [(way, 1, 2, "sc", False) for way in ("naive", "gpipe", "1f1b")]


@pytest.mark.parametrize(("way", "data", "group", "conv", "sync"), WAYS)
def test_ranks_get_what_one_process_gets_and_nothing_else_moves(pool, way, data, group, conv, sync):
    wanted = by_the_formula(network(conv))
    found = pool.run(statistics_on_ranks, way, data, group, conv, sync, ranks=data * group)
    assert all(same for _, same in found)
    torch.testing.assert_close(join([held for held, _ in found], wanted), wanted, **CLOSE)


def test_replicas_of_parts_get_what_one_process_gets(pool):
    """2 x 2 ranks: a channel is on two of them."""
    wanted = by_the_formula(network("gc2l"))
    found = pool.run(statistics_on_ranks, "group", 2, 2, "gc2l", False, ranks=4)
    for parts in (found[:2], found[2:]):
        torch.testing.assert_close(join([held for held, _ in parts], wanted), wanted, **CLOSE)
    torch.testing.assert_close([f for f, _ in found[:2]], [f for f, _ in found[2:]], rtol=0, atol=0)


def odd_layers():
    """A layer that drops out before its norm, one that keeps no statistics, and one that is not run."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Dropout(), nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)
    ).double()
    model.idle = nn.BatchNorm2d(4)
    model.forward = lambda x: nn.Sequential(*list(model)[:4])(x)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    recompute_statistics(alone(), model, Batches(), epoch=EPOCH, number=NUMBER)
    assert torch.equal(random, torch.get_rng_state())
    after = model.state_dict()
    images = torch.cat(
        [images for (images, _), _ in zip(Batches().batches(EPOCH), range(NUMBER), strict=False)]
    )
    var, mean = torch.var_mean(model[0](images), (0, 2, 3), correction=0)
    return before, after, mean.detach(), var.detach()


def test_what_is_dropped_out_in_training_counts_and_other_norms_stay(pool):
    ((before, after, mean, var),) = pool.run(odd_layers, ranks=1)
    torch.testing.assert_close(after.pop("2.running_mean"), mean, **CLOSE)
    torch.testing.assert_close(after.pop("2.running_var"), var, **CLOSE)
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name


def compiled():
    model = network("gc2l")
    placed = alone()
    model.compile(backend="eager")
    with torch.no_grad():
        images, _ = next(Batches().batches(EPOCH))
        model.eval()(images)  # compiled before there are hooks
    model.train()
    recompute_statistics(placed, model, Batches(), epoch=EPOCH, number=NUMBER)
    found = statistics(model)
    torch._dynamo.reset()
    return found


def test_a_compiled_network_gets_the_same(pool):
    (found,) = pool.run(compiled, ranks=1)
    torch.testing.assert_close(found, by_the_formula(network("gc2l")), **CLOSE)


# The command.


def losses(output, kind="step", name="loss"):
    return [r[name] for r in records(output, kind)]


@pytest.fixture(scope="module")
def precise(pool, tiny, tmp_path_factory):
    """A run of one process, with its moving average, and the same without the setting."""
    root = tmp_path_factory.mktemp("precise")
    options = [*tiny, "--ema-decay", 0.9]
    run(pool, "train", *options, "--output", root / "plain")
    run(pool, "train", *options, "--precise-batch-norm", 2, "--output", root / "precise")
    return root


def test_training_is_the_same_to_the_last_bit_and_tests_are_not(precise):
    plain, new = precise / "plain", precise / "precise"
    assert losses(new) == losses(plain)
    for name in ("test_loss", "ema_test_loss"):
        assert all(a != b for a, b in zip(*(losses(o, "epoch", name) for o in (plain, new)), strict=True))


@pytest.mark.parametrize(
    "mesh", ["--group-parallel 2", "--group-parallel 4", "--data-parallel 2 --sync-batch-norm"]
)
def test_tests_of_ranks_are_those_of_one_process(pool, tiny, precise, tmp_path, mesh):
    words = mesh.split()
    options = [*tiny, "--ema-decay", 0.9, "--precise-batch-norm", 2, *words, "--output", tmp_path / "run"]
    run(pool, "train", *options, ranks=int(words[1]))
    for name in ("test_loss", "ema_test_loss"):
        got, wanted = (losses(o, "epoch", name) for o in (tmp_path / "run", precise / "precise"))
        # Nine steps, each of whose rounding errors batch norm amplifies.
        assert got == pytest.approx(wanted, rel=1e-9)


def test_the_checkpoint_holds_what_was_tested(pool, precise):
    output = precise / "precise"
    for weights, prefix in (("model", ""), ("ema", "ema_")):
        (outcome,) = run(pool, "evaluate", output, "--weights", weights, "--precision", "float64")
        assert f"test loss {losses(output, 'epoch', f'{prefix}test_loss')[-1]:.4f} " in outcome.out


def test_a_run_that_goes_on_tests_the_same(pool, tiny, precise, tmp_path):
    options = [*tiny, "--ema-decay", 0.9, "--precise-batch-norm", 2, "--output", tmp_path / "run"]
    run(pool, "train", *options, "--max-steps", 4)
    run(pool, "train", *options, "--resume")
    for name in ("test_loss", "ema_test_loss"):
        assert losses(tmp_path / "run", "epoch", name) == losses(precise / "precise", "epoch", name)


def test_more_batches_than_an_epoch_has_are_refused(pool, tiny, tmp_path):
    argv = ["train", *tiny, "--precise-batch-norm", 4, "--output", tmp_path / "run"]
    (outcome,) = pool.run(command, *argv, ranks=1, init=False)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.endswith("precise_batch_norm=4 is more than the 3 batches of an epoch; use at most 3")
