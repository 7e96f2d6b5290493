"""The lists of settings and what carries them out hold the same names."""

import subprocess
import sys

import pytest

from twolevel import settings
from twolevel.nn import KINDS
from twolevel.training.config import TrainConfig
from twolevel.training.trackers import TRACKERS


def test_listing_settings_imports_no_torch():
    code = "import sys, twolevel.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_convolution_listed_can_be_built_and_no_other():
    assert set(KINDS) == set(settings.CONVS)


def test_every_tracker_listed_can_be_told_and_no_other():
    assert {*TRACKERS, "none"} == set(settings.TRACKERS)


def test_pipelines_are_ways_to_share_a_network():
    assert set(settings.MICROBATCHED) < set(settings.PIPELINES) < set(settings.PARALLELS)


@pytest.mark.parametrize("policy", ["fixed", "free", "starting", "warned"])
def test_every_policy_on_resume_is_of_some_setting_and_no_other_is(policy):
    on_resume = TrainConfig().on_resume()
    assert policy in on_resume.values()
    assert set(on_resume.values()) <= {"fixed", "free", "starting", "warned"}


def test_what_the_state_of_a_checkpoint_depends_on_is_fixed_on_resume():
    fixed = [name for name, policy in TrainConfig().on_resume().items() if policy == "fixed"]
    of_model = ["model", "conv", "groups", "representatives", "condensation"]
    assert fixed == [*of_model, "data", "batch_size", "seed"]


def test_how_a_run_is_started_is_in_no_record_of_it():
    recorded = TrainConfig().to_dict()["run"]
    assert not {"resume", "remeasure"} & recorded.keys() and "forms" in recorded
