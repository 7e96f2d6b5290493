"""What a layer reads and writes is counted as one would by hand."""

import pytest
import torch

from benchmarks import traffic
from benchmarks.layers import Shape
from twolevel.errors import UserError
from twolevel.ops.kernels import native

SAME = Shape(channels=16, outputs=16, kernel=3, stride=1, height=8)

pytestmark = pytest.mark.skipif(native.available() is not None, reason=native.available() or "")

# The norm reads x and writes o; backward it reads x and go, and writes gx.
NORM = 2 + 3
# One walk: o and y; then gy, o and go.
ONE_WALK = 2 + 3
# By itself the restriction reads o, and C^T gy reads gy: the exchange is between.
FUSED = ONE_WALK + 1 + 1
# Local part (2) and coarse term (2) apart; gC apart; A^T gy, and r^T gz, which reads o and adds to go.
OVERLAPPED = 1 + 2 + 2 + 1 + 1 + 3 + 3


@pytest.mark.parametrize(
    ("ranks", "form", "passes"),
    [
        (1, "overlapped native", NORM + ONE_WALK),
        (4, "fused native", NORM + FUSED),
        (4, "overlapped native", NORM + OVERLAPPED),
    ],
)
def test_passes_of_a_layer_are_those_counted_by_hand(ranks, form, passes):
    found = traffic.count(SAME, groups=4, ranks=ranks, form=form)
    assert found["passes"] == passes


def test_a_sharded_rank_makes_no_more_than_twelve_passes():
    assert traffic.count(SAME, groups=4, ranks=4, form="fused native")["passes"] <= 12


def test_a_map_half_the_size_is_half_a_pass():
    """y of half as many numbers as x, of which one pass is the mean: 4/3 and 2/3."""
    shape = Shape(channels=16, outputs=32, kernel=3, stride=2, height=8)
    found = traffic.count(shape, groups=4, ranks=1, form="overlapped native")
    of_x, of_y = 2 + 1 + 1 + 1 + 3, 1 + 1
    assert found["passes"] == pytest.approx(of_x * 4 / 3 + of_y * 2 / 3)


def test_what_torch_does_is_counted_operation_by_operation():
    found = traffic.count(SAME, groups=4, ranks=1, form="torch")
    one = traffic.IMAGES * 16 * 8 * 8 * 4
    by_hand = {
        "native_batch_norm": 2 + 1,  # statistics, values; o
        "relu_": 2,
        "convolution": 2 + 1,  # local; x for the restriction
        "addmm_": 2,
        "mm": 1 + 1,  # gy for C^T gy and for gC
        "convolution_backward": 4 + 2,  # gx and gA; gr and what is added to gx
        "add_": 3,
        "threshold_backward": 3,
        "native_batch_norm_backward": 4 + 1,
    }
    assert {name: size / one for name, size in found["bytes"].items()} == by_hand


def test_operations_on_maps_and_nothing_else_are_counted():
    maps = torch.ones(traffic.IMAGES, 4)
    with traffic.Passes({maps.numel()}) as passes:
        maps.view(-1)
        torch.ones(traffic.IMAGES - 1, 4).add_(1)
        maps.add_(1)
        maps.copy_(torch.ones(4))
    assert passes.bytes == {"add_": 2 * maps.nbytes, "copy_": maps.nbytes}


def test_a_number_of_ranks_that_does_not_divide_the_groups_is_refused(tmp_path):
    with pytest.raises(UserError, match="--ranks 3 does not divide"):
        traffic.measure(traffic.Settings(ranks=3, output=tmp_path / "traffic.json"))
