"""A run on a GPU lets cuDNN time its algorithms, and leaves the process as it was."""

import pytest
import torch

from twolevel.training.cudnn import autotuned

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def settings():
    """The process's own settings, put back after each test; they can be set without a GPU."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    yield cudnn
    cudnn.benchmark, cudnn.deterministic = before


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("device", "within"), [(GPU, True), (CPU, None)])
def test_algorithms_are_timed_on_a_gpu_and_the_users_setting_is_back_afterwards(
    settings, device, within, own
):
    settings.benchmark = own
    with pytest.raises(ValueError), autotuned(device):
        assert settings.benchmark is (own if within is None else within)
        raise ValueError
    assert settings.benchmark is own


@pytest.mark.parametrize("asked_by", ["cudnn", "torch"])
def test_nothing_is_timed_where_algorithms_have_to_be_deterministic(settings, asked_by):
    settings.benchmark = False
    if asked_by == "cudnn":
        settings.deterministic = True
    else:
        torch.use_deterministic_algorithms(True)
    try:
        with autotuned(GPU):
            assert settings.benchmark is False
    finally:
        torch.use_deterministic_algorithms(False)
