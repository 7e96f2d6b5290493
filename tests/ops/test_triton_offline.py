"""What the Triton kernels compile to, without a card: no spills, tensor cores, loads of 16 bytes, memory that fits."""

from functools import cache

import pytest
import torch

from benchmarks import offline
from twolevel.ops import Geometry
from twolevel.ops.kernels.triton import OPERATIONS, candidates, launches, pick, problem_of
from twolevel.ops.kernels.triton.estimate import SHARED_KIB, shared_bytes

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(offline.unavailable() is not None, reason=str(offline.unavailable()))

# Each with its target, compute capability 80 or 90: groups, channels of a group in and out, kernel, stride, pixels.
LAYERS = {
    "wrn-28-10 G=4": (90, 4, 40, 40, 3, 1, 32),
    "wrn-28-10 G=4, on an A100": (80, 4, 40, 40, 3, 1, 32),
    "wrn-28-10 G=16": (80, 16, 10, 10, 3, 1, 32),
    "wrn-28-10 G=16, wider": (90, 16, 20, 40, 3, 2, 16),
    "one rank of wrn-28-40": (90, 1, 160, 320, 3, 2, 32),
    "its shortcut": (80, 1, 160, 320, 1, 2, 32),
    "wrn-16-4 G=16": (90, 16, 8, 8, 3, 1, 16),
    "restriction": (90, 4, 80, 1, 3, 1, 16),
    "packed": (80, 4, 4, 3, 3, 1, 8),
}
RESTRICTIONS = {"with restriction": 1, "with restriction of 4": 4}
KERNELS = [(layer, operation) for layer in LAYERS for operation in (*RESTRICTIONS, *OPERATIONS)]
every_kernel = pytest.mark.parametrize(("layer", "operation"), KERNELS)


def problem(layer: str, representatives: int = 0, batch: int = 128):
    _, groups, inputs, outputs, kernel, stride, size = LAYERS[layer]
    x, weight = (batch, groups * inputs, size, size), (groups * outputs, inputs, kernel, kernel)
    geometry = Geometry((stride, stride), (kernel // 2, kernel // 2))
    return problem_of(x, weight, geometry, groups, torch.bfloat16, representatives)


def launches_of(layer: str, operation: str, batch: int = 128) -> tuple[launches.Launch, ...]:
    """Those that multiply, in the configuration that is the best estimate."""
    one = problem(layer, RESTRICTIONS.get(operation, 0), batch)
    if operation == "input_grad":
        found = launches.input_grad(one, pick(one, "input_grad"), "tf32")
    elif operation == "weight_grad":
        found = launches.weight_grad(one, pick(one, "weight_grad"), "tf32")[:1]
    else:
        found = (launches.forward(one, pick(one, "forward"), "tf32"),)
    return tuple(launch for launch in found if launch.steps)


@cache
def compiled(layer: str, operation: str) -> list[offline.Compiled]:
    target = LAYERS[layer][0]
    return [offline.compiled(launch, torch.bfloat16, target) for launch in launches_of(layer, operation)]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Whatever was compiled before: this is compiled anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@every_kernel
def test_nothing_spills(layer, operation):
    assert [one.spilled_bytes for one in compiled(layer, operation)] == [0] * len(compiled(layer, operation))


@every_kernel
def test_products_are_of_tensor_cores(layer, operation):
    for one in compiled(layer, operation):
        assert one.products and all("BF16" in product for product in one.products)


@every_kernel
def test_groups_of_a_multiple_of_eight_channels_are_read_16_bytes_at_a_time(layer, operation):
    """Unless a whole tile is less for each thread, as few columns of a weight are."""
    _, _, inputs, outputs, *_ = LAYERS[layer]
    if inputs % 8 or outputs % 8:
        pytest.skip(f"groups of {inputs} to {outputs} channels begin elsewhere")
    for one in compiled(layer, operation):
        config = one.launch.config
        columns, depth = config.block_out, config.block_in  # or the other way round
        whole = columns * depth * torch.bfloat16.itemsize // (32 * config.num_warps)
        assert {*offline.loads(one.main_loop() or one.code)} <= {16, min(16, whole)}


@every_kernel
def test_shared_memory_is_what_the_configurations_are_chosen_by(layer, operation):
    for one in compiled(layer, operation):
        assert 0 < one.shared_bytes <= shared_bytes()


def test_hopper_multiplies_by_four_warps_at_once():
    for operation in OPERATIONS:
        for one in compiled("wrn-28-10 G=4", operation):
            assert all(product.startswith("HGMMA") for product in one.products)


@pytest.mark.parametrize("target", [80, 90])
def test_every_part_of_the_kernel_compiles_for_packed_groups(target):
    """Restriction and coarse term at once, and groups that do not fill their last pack."""
    geometry = Geometry((1, 2), (1, 0))
    for dtype in (torch.bfloat16, torch.float32):
        one = problem_of((2, 28, 6, 5), (21, 4, 3, 2), geometry, 7, dtype, representatives=2)
        assert all(one.pack(of) > 1 and one.groups % one.pack(of) for of in ("forward", "weight_grad"))
        for launch in (
            launches.forward(one, pick(one, "forward"), "tf32", maps=17),
            launches.weight_grad(one, pick(one, "weight_grad"), "tf32")[0],
        ):
            assert offline.compiled(launch, dtype, target).products


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_smaller_last_batch_compiles_nothing_anew(operation):
    """What is compiled for depends on constants, and on which sizes are 1 or multiples of 16."""
    for full, last in zip(*(launches_of("wrn-16-4 G=16", operation, b) for b in (128, 80)), strict=True):
        assert full.constants == last.constants
        assert full.sizes != last.sizes
        for sizes in (full.sizes, last.sizes):
            assert all(size > 1 and size % 16 == 0 for size in sizes.values())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_configurations_that_do_not_fit_a_card_are_no_candidates(operation):
    one = problem("one rank of wrn-28-40")
    by_card = {card: set(candidates(one, operation, card)) for card in (None, *SHARED_KIB)}
    assert by_card[None] == by_card[8, 6] < by_card[8, 0] <= by_card[9, 0]
    assert shared_bytes((8, 6)) == shared_bytes((8, 9)) == 99 << 10
    assert shared_bytes((8, 0)) == 163 << 10
    assert shared_bytes((9, 0)) == 227 << 10
    assert shared_bytes((7, 7)) == shared_bytes() == min(map(shared_bytes, SHARED_KIB))
