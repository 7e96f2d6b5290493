"""Initial parameters: the same for any number of ranks, a stream of its own for each group, He's variance."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from twolevel.distributed import parallelize
from twolevel.models import create
from twolevel.nn import BalancedConv2d, TwoLevelConv2d, initialize

NETWORKS = [("wrn-10-1", "gc2l"), ("wrn-10-1", "gc"), ("wrn-10-1", "bgc"), ("mobilenetv2", "gc2l")]
SEED = 3


def part_of(name: str, conv: str, meta: bool) -> dict[str, torch.Tensor]:
    """The initial state of this rank: drawn in part, or cut from the whole."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "group"))
    if meta:
        with torch.device("meta"):
            model = create(name, conv=conv, groups=4, num_classes=10)
        initialize(parallelize(model, mesh), SEED, "cpu")
    else:
        model = parallelize(create(name, conv=conv, groups=4, num_classes=10, seed=SEED), mesh)
    return model.state_dict()


def join(parts: list[torch.Tensor], whole: torch.Tensor) -> torch.Tensor:
    """Parts put together along the dimension in which they are smaller than the whole."""
    smaller = [d for d, size in enumerate(whole.shape) if size != parts[0].shape[d]]
    if smaller:
        return torch.cat(parts, *smaller)
    assert all(torch.equal(part, parts[0]) for part in parts)
    return parts[0]


@pytest.mark.parametrize("meta", [True, False], ids=["drawn in part", "cut from the whole"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("name", "conv"), NETWORKS)
def test_parts_of_ranks_joined_are_the_single_process_state(pool, name, conv, ranks, meta):
    whole = create(name, conv=conv, groups=4, num_classes=10, seed=SEED).state_dict()
    parts = pool.run(part_of, name, conv, meta, ranks=ranks)
    for key, tensor in whole.items():
        assert torch.equal(join([part[key] for part in parts], tensor), tensor), key
    split = [key for key, tensor in whole.items() if parts[0][key].shape != tensor.shape]
    assert bool(split) == (ranks > 1)


def test_meta_device_gives_what_the_cpu_gives():
    with torch.device("meta"):
        model = create("wrn-10-1", conv="gc2l", groups=4)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    drawn = initialize(model, SEED, "cpu").state_dict()
    whole = create("wrn-10-1", conv="gc2l", groups=4, seed=SEED).state_dict()
    torch.testing.assert_close(drawn, whole, rtol=0, atol=0)


def test_same_seed_same_state_other_seed_other_weights():
    first, again, other = (create("wrn-10-1", conv="gc2l", groups=2, seed=s).state_dict() for s in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    drawn = [key for key, tensor in first.items() if tensor.dim() > 1]
    assert len(drawn) == 3 * 8 + 2
    for key in drawn:
        assert not torch.isclose(first[key], other[key]).all(), key


def test_state_does_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    first = create("wrn-10-1", conv="gc2l", groups=2).state_dict()
    torch.manual_seed(2)
    torch.testing.assert_close(create("wrn-10-1", conv="gc2l", groups=2).state_dict(), first, rtol=0, atol=0)


@pytest.mark.parametrize(("conv", "weights"), [(TwoLevelConv2d, 3), (BalancedConv2d, 2)])
def test_every_group_and_every_weight_has_its_own_stream(conv, weights):
    model = nn.Sequential(*(conv(16, 16, 3, groups=4) for _ in range(2)))
    parts = [part for p in initialize(model).parameters() if p.dim() > 1 for part in p.chunk(4)]
    firsts = [tuple(part.flatten()[:4].tolist()) for part in parts]
    assert len(set(firsts)) == len(firsts) == 2 * weights * 4


@pytest.mark.parametrize(
    ("key", "fan_in"),
    [
        ("stem.weight", 3 * 9),
        ("stages.1.0.conv1.local.weight", 16 // 4 * 10 * 9),
        ("stages.1.0.conv1.restriction.weight", 16 // 4 * 10 * 9),
        ("stages.1.0.conv1.coarse.weight", 4),
        ("stages.1.0.shortcut.local.weight", 16 // 4 * 10),
        ("classifier.weight", 640),
    ],
)
def test_variance_is_two_over_fan_in(key, fan_in):
    weight = create("wrn-10-10", conv="gc2l", groups=4).state_dict()[key].double()
    std, number = math.sqrt(2 / fan_in), weight.numel()
    # The mean of N normal numbers deviates by std / sqrt(N), their variance by std**2 sqrt(2 / N); five
    # times that would be drawn by chance once in two million seeds, and this seed is fixed.
    assert abs(weight.mean()) < 5 * std / math.sqrt(number)
    assert abs(weight.var() / std**2 - 1) < 5 * math.sqrt(2 / number)


def test_normalisations_start_at_one_and_all_else_at_zero():
    model = create("wrn-10-1", conv="gc2l", groups=4)
    with torch.no_grad():  # what training would have left
        for tensor in model.state_dict().values():
            tensor.fill_(7)
    state = initialize(model, SEED).state_dict()
    ones = {key for key in state if "bn" in key and key.endswith(("weight", "running_var"))}
    zeros = {key for key in state if key.endswith(("bias", "running_mean", "num_batches_tracked"))}
    assert all(torch.equal(state[key], torch.ones_like(state[key])) for key in ones)
    assert all(torch.equal(state[key], torch.zeros_like(state[key])) for key in zeros)
    drawn = state.keys() - ones - zeros
    assert all(state[key].std() > 0 for key in drawn)
    assert len(drawn) == 3 * 8 + 2
