"""A grid is what its TOML file declares, and its file is checked before anything is trained."""

import pytest

from twolevel.errors import UserError
from twolevel.grids import declare


def test_lists_are_combined_and_seeds_go_outermost(grid):
    settings = [run.settings for run in grid().runs]
    kinds = [("sc", None), ("gc", 2), ("gc", 4), ("gc2l", 2), ("gc2l", 4)]
    assert [(s["conv"], s.get("groups"), s["seed"]) for s in settings] == [
        (*kind, seed) for seed in (0, 1) for kind in kinds
    ]
    assert all(s["model"] == "wrn-10-1" and s["epochs"] == 2 for s in settings)


def test_a_name_changes_with_any_setting(file):
    before = {run.name for run in declare.read(str(file)).runs}
    file.write_text(file.read_text().replace("epochs = 2", "epochs = 3"))
    after = {run.name for run in declare.read(str(file)).runs}
    assert len(before) == len(after) == 10 and not before & after
    assert all(name.startswith("wrn-10-1-") for name in before)


def test_a_run_is_completed_as_train_completes_it(grid):
    config = grid().runs[1].config()
    assert (config.model.conv, config.model.groups, config.optimiser.learning_rate) == ("gc", 2, 0.1)


@pytest.mark.parametrize("name", declare.names())
def test_every_published_grid_can_be_read_and_says_what_it_is(name):
    grid = declare.read(name)
    assert grid.about and len(grid.runs) >= 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = [0", "is no TOML"),
        ("speeds = [0]", "has 'speeds', which a grid has not; use about, seeds, settings, runs"),
        ("seeds = []", r"seeds=\[\] is invalid; give integers"),
        ("seeds = 3", "seeds=3 is invalid; give integers"),
        ("[[settings]]\nepochs = 2", r"write \[settings\] once"),
        ("[runs]\nepochs = 2", r"write \[\[runs\]\], with two brackets"),
        ("runs = []", "declares no run"),
        ("[[runs]]\ngroups = []", "declares no run"),
        ('[settings]\nlearning = "deep"', "'learning' is no setting of `twolevel train`"),
        ('[settings]\nconv = "dense"\ngroups = "four"', "groups='four' is invalid"),
        (
            "[settings]\nmax_steps = 3",
            "max_steps is no setting of a grid's run: a run of a grid ends with its last epoch",
        ),
        ("[settings]\nseed = 7", "seed is no setting of a grid's run: declare seeds"),
        ('[[runs]]\ndata_root = "x"', "data_root is no setting of a grid's run: it is --data-root"),
        ("[[runs]]\nlr_milestones = [3, 6]", r"write \[\[3, 6\]\]"),
        ('[[runs]]\nconv = "gc"\n[[runs]]\nconv = "gc"', "wrn-28-10-gc-4-sample-seed0-.* twice"),
        (
            "[[runs]]\nwarmup_epochs = 0\n[[runs]]\nwarmup_epochs = 0.0",
            "twice; no two runs may have the same settings",
        ),
    ],
)
def test_what_cannot_be_trained_is_named_with_its_file(tmp_path, text, message):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        declare.read(str(path))
    assert str(path) in str(caught.value)


def test_ranks_and_how_they_share_a_network_make_another_run(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(
        '[settings]\nconv = "gc2l"\n[[runs]]\ndata_parallel = 2\n[[runs]]\ngroup_parallel = 2\n[[runs]]\n'
    )
    runs = declare.read(str(path)).runs
    assert [run.ranks for run in runs] == [2, 2, 1] and len({run.name for run in runs}) == 3


def test_an_unknown_grid_names_those_there_are():
    with pytest.raises(UserError, match="unknown grid 'table1-smal'; did you mean table1-small"):
        declare.read("table1-smal")
    with pytest.raises(UserError, match=r"there is no file nowhere\.toml"):
        declare.read("nowhere.toml")
