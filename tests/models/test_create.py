"""A network by name."""

import pytest
import torch

from twolevel.errors import UserError
from twolevel.models import NAMES, create
from twolevel.nn import KINDS


@pytest.mark.parametrize("name", NAMES)
def test_every_listed_name_builds_with_every_kind(name):
    kinds = [kind for kind in KINDS if not (kind == "sc" and name.startswith("resnext"))]
    for conv in kinds:
        groups = 1 if conv in ("sc", "dgconv") else 2
        with torch.device("meta"):
            model = create(name, conv=conv, groups=groups)
        assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(("name", "classes"), [("wrn-16-1", 10), ("wrn-34-2", 1000), ("mobilenetv2", 1000)])
def test_number_of_classes(name, classes):
    with torch.device("meta"):
        assert create(name).classifier.out_features == classes
        assert create(name, num_classes=7).classifier.out_features == 7


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wrn_28_10", {}, "unknown model 'wrn_28_10'; did you mean wrn-28-10 or "),
        ("mobilenet", {}, "unknown model 'mobilenet'; did you mean mobilenetv2"),
        ("wrn-28", {}, "unknown model 'wrn-28'; did you mean wrn-28-"),
        ("wrn-27-10", {}, "depth=27 is not 6 n + 4; use one of 10, 16, 22, 28, 34, 40, ..."),
        ("wrn-10-1", {"conv": "gc3l", "groups": 2}, "unknown conv 'gc3l'; did you mean gc2l"),
        ("wrn-10-1", {"conv": "sc", "groups": 4}, "conv='sc' is dense and takes groups=1, not groups=4"),
        (
            "wrn-10-1",
            {"conv": "gc2l", "groups": 3},
            "groups=3 does not divide in_channels=16; use one of 1, 2",
        ),
        # 24 channels are the narrowest that MobileNetV2 groups, after 16 and 32.
        ("mobilenetv2", {"conv": "gc2l", "groups": 16}, "groups=16 does not divide out_channels=24; use"),
    ],
)
def test_error_names_what_would_do(name, options, message):
    with pytest.raises(UserError) as caught:
        create(name, **options)
    assert str(caught.value).startswith(message)
