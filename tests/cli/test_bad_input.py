"""Bad input: one line on every rank that says what was wrong, the value and what would do; nothing is lost."""

import json
import re
import shutil
from pathlib import Path

import pytest
from command import command, command_by_rank, run, seal, write_image_folder

import twolevel
from twolevel.training.config.mesh import LONGEST_TIMEOUT

TRAIN = ["train", "--model", "wrn-10-1", "--max-steps", "1"]


def refuse(pool, *argv, ranks: int = 2) -> str:
    """The line that a command ends with, the same on every rank but for the rank's number."""
    outcomes = pool.run(command, *argv, ranks=ranks, init=False)
    return check_refused(outcomes)


def check_refused(outcomes) -> str:
    lines = []
    for rank, outcome in enumerate(outcomes):
        assert outcome.code == 2
        errors = [line for line in outcome.err.splitlines() if "warning:" not in line]
        assert len(errors) == 1, outcome.err
        lines.append(errors[0].removeprefix(f"[rank {rank}] ").partition(": ")[2].removeprefix("rank 0: "))
    assert len(set(lines)) == 1
    return lines[0]


@pytest.fixture
def fresh(tmp_path, monkeypatch) -> Path:
    """An empty working directory, in which a refused command must leave no run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--groups 6", "groups=6 does not divide in_channels=16; use one of 1, 2, 4, 8, 16"),
        ("--groups 0", "groups=0 is not positive; use 1 or more"),
        ("--groups 1", "group=2 ranks do not divide groups=1; use one of 1 ranks"),
        ("--conv sc", "cannot be split over group=2 ranks; use conv='gc', 'gc2l' or 'bgc'"),
        ("--conv sc --groups 4", "conv='sc' is dense and takes groups=1, not groups=4; use gc, gc2l or bgc"),
        ("--model wrn28-10", "unknown model 'wrn28-10'; did you mean wrn-28-10"),
        ("--model wrn-12-1", "depth=12 is not 6 n + 4; use one of 10, 16, 22, 28, 34, 40, ..."),
        ("--conv gc3l", "unknown conv 'gc3l'; did you mean gc2l"),
        ("--data cifar11", "unknown data set 'cifar11'; did you mean cifar10 or cifar100?"),
        ("--data cifar10 --data-root nowhere", "cifar-10-batches-py"),
        ("--data imagenet --data-root nowhere", "nowhere/train"),
        ("--data-parallel 4 --group-parallel 2", "mesh data=4 x group=2 takes 8 ranks, but 2 were started"),
        ("--group-parallel 4", "mesh data=1 x group=4 takes 4 ranks, but 2 were started"),
        ("--data-parallel 3", "batch_size=128 does not divide by data_parallel=3"),
        ("--data-parallel 4", "mesh axis data=4 does not divide the 2 ranks"),
        ("--batch-size 5000", "batch_size=5000 is more than the 2000 training images"),
        ("--schedule dense", "schedule='dense' needs every channel on one rank"),
        ("--device cuda", "device=cuda"),
        ("--learning-rate -1", "learning_rate=-1.0 is invalid; use a positive number"),
        ("--weight-decay inf", "weight_decay=inf is invalid; use a finite number"),
        ("--timeout inf", "timeout=inf is invalid; use a finite number"),
        ("--timeout -1", "timeout=-1.0 is invalid; use a positive number of seconds, at most 1e+09"),
        ("--data-parallel 0", "data_parallel=0 is invalid; use 1 or more"),
        ("--learning-rate fast", "Error parsing --learning-rate: expected FLOAT, not 'fast'"),
        ("--lr 0.1", "Unrecognized options: --lr, 0.1; did you mean --learning-rate?"),
        ("--lerning-rate 0.1", "Unrecognized options: --lerning-rate, 0.1; did you mean --learning-rate?"),
        ("--precision half", "'half'"),
        ("--cuda-graph", "cuda_graph=True needs a GPU, and ranks compute on the cpu; leave it out"),
        ("--kernels native --precision float64", "it computes in float32 on CPUs; use auto"),
        ("--kernels triton", "kernels=triton is invalid for precision=float32 on cpu"),
        ("--kernels fast", "'fast'"),
        ("--config nowhere.json", "--config 'nowhere.json' cannot be read"),
    ],
)
def test_settings_that_cannot_be_honoured(pool, fresh, options, message):
    assert message in refuse(pool, *TRAIN, *options.split())
    assert not (fresh / "runs").exists() or not list(fresh.glob("runs/*/*"))


def test_a_recipe_beside_a_complete_configuration_is_refused(pool, fresh):
    (fresh / "own.json").write_text('{"optimiser": {"epochs": 2}}')
    message = "--recipe completes settings, and those of own.json are complete"
    assert message in refuse(pool, *TRAIN, "--config", "own.json", "--recipe", "fast")


def test_ranks_that_do_not_divide_the_groups(pool, fresh):
    message = "group=3 ranks do not divide groups=4; use one of 1, 2, 4 ranks"
    assert message in refuse(pool, *TRAIN, "--groups", 4, ranks=3)


def test_unknown_commands_are_refused_with_the_near_names(pool):
    assert refuse(pool, "trian", ranks=1) == "unknown command 'trian'; did you mean train?"


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("--verison", "twolevel: unknown option '--verison'; did you mean --version?"),
        ("--hlep", "twolevel: unknown option '--hlep'; did you mean --help?"),
        ("-v", "twolevel: unknown option '-v'; use one of --help, --version"),
    ],
)
def test_unknown_options_without_a_command_are_refused_with_the_near_names(word, line):
    done = command(word)
    assert (done.code, done.out, done.err) == (2, "", f"{line}\n")


def test_ranks_started_with_different_configurations(pool, fresh):
    argv = [[*TRAIN, "--learning-rate", rate] for rate in ("0.1", "0.2")]
    line = check_refused(pool.run(command_by_rank, argv, ranks=2, init=False))
    assert "different configurations: learning_rate is 0.2 on rank 1 and 0.1 on rank 0" in line


def test_ranks_started_with_different_meshes(pool, fresh):
    """They would wait for each other in process groups of other ranks."""
    argv = [[*TRAIN, "--data-parallel", data] for data in ("1", "2")]
    line = check_refused(pool.run(command_by_rank, argv, ranks=2, init=False))
    assert "data_parallel is 2 on rank 1 and 1 on rank 0" in line


def test_a_setting_that_only_one_rank_can_honour_stops_all(pool, fresh):
    """Rank 1 is told of a data set that is not there: both end, and both say which rank it was."""
    write_image_folder(fresh / "images")
    options = [*TRAIN, "--data", "imagenet", "--image-size", "16", "--workers", "0", "--batch-size", "8"]
    argv = [[*options, "--data-root", str(fresh / name)] for name in ("images", "nowhere")]
    check_refused(pool.run(command_by_rank, argv, ranks=2, init=False))


def test_a_damaged_data_set_is_named(pool, data_root, fresh):
    folder = fresh / "damaged" / "cifar-10-batches-py"
    shutil.copytree(data_root / "cifar-10-batches-py", folder)
    with (folder / "data_batch_3").open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"?")
    assert "data_batch_3" in refuse(pool, *TRAIN, "--data", "cifar10", "--data-root", fresh / "damaged")


@pytest.fixture(scope="module")
def finished(pool, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "finished"
    run(pool, *TRAIN, "--groups", 4, "--batch-size", 16, "--output", output)
    return output


def damage(finished: Path, fresh: Path) -> tuple[Path, Path]:
    """A copy of a run and its checkpoint, to be damaged."""
    copy = fresh / "copy"
    shutil.copytree(finished, copy)
    return copy, copy / "checkpoints" / "step-00000001"


def test_a_run_is_not_written_over(pool, finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    line = refuse(pool, *TRAIN, "--batch-size", 16, "--output", finished)
    assert "holds a run already; go on with --resume, or name another --output" in line
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model wrn-16-1", "model='wrn-16-1' but the checkpoint"),
        ("--groups 2", "groups=2 but the checkpoint"),
        ("--conv gc", "conv='gc' but the checkpoint"),
        ("--seed 1", "seed=1 but the checkpoint"),
        ("--batch-size 32", "batch_size=32 but the checkpoint"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(pool, finished, options, message):
    line = refuse(pool, *TRAIN, "--batch-size", 16, "--output", finished, "--resume", *options.split())
    assert message in line


def test_a_checkpoint_whose_tensors_are_of_another_model_is_refused(pool, finished, fresh):
    copy, checkpoint = damage(finished, fresh)
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["model"]["groups"] = 2
    (checkpoint / "state.json").write_text(json.dumps(state))
    seal(checkpoint)
    line = refuse(pool, "evaluate", copy)
    assert "is of another network: model." in line and "this one needs" in line


@pytest.mark.parametrize("section", ["model", "data", "rules"])
@pytest.mark.parametrize("version", ["9.1.0", None])
def test_a_setting_of_a_checkpoint_that_does_not_exist_is_named(finished, fresh, section, version):
    copy, checkpoint = damage(finished, fresh)
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["version"] == twolevel.__version__
    state["config"][section]["novelty"] = 1
    state.pop("version")
    state |= {"version": version} if version else {}
    (checkpoint / "state.json").write_text(json.dumps(state))
    seal(checkpoint)
    for argv in (["evaluate", copy], ["export", copy, fresh / "out.safetensors"], ["report", copy]):
        outcome = command(*argv)
        assert outcome.code == 2
        (line,) = outcome.err.splitlines()
        assert f"checkpoint {checkpoint}" in line and "has the setting 'novelty'" in line
        written = f"was written by twolevel 9.1.0, and this is {twolevel.__version__}"
        assert (written in line) == (version is not None)


@pytest.mark.parametrize("how", ["truncated", "missing", "scrambled header", "no json", "half a state"])
@pytest.mark.parametrize("command_words", [["evaluate"], ["export"], TRAIN])
def test_a_damaged_checkpoint_is_refused(pool, finished, fresh, how, command_words):
    copy, checkpoint = damage(finished, fresh)
    shard = next(checkpoint.glob("*.safetensors"))
    state = checkpoint / "state.json"
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-5000])
    elif how == "missing":
        shard.unlink()
    elif how == "scrambled header":
        shard.write_bytes(b"\xff" * 64 + shard.read_bytes()[64:])
    elif how == "no json":
        state.write_text("{")
    else:
        state.write_text(json.dumps({"config": {}, "step": 1}))
    if command_words == TRAIN:
        argv = [*TRAIN, "--max-steps", "2", "--batch-size", "16", "--output", copy, "--resume"]
    else:
        argv = [*command_words, copy, *([fresh / "out.safetensors"] if command_words == ["export"] else [])]
    line = refuse(pool, *argv, ranks=1 if command_words == ["export"] else 2)
    assert "damaged" in line and str(checkpoint) in line
    assert not (fresh / "out.safetensors").exists()


def test_what_holds_no_weights_is_refused(pool, fresh):
    (fresh / "a.safetensors").write_bytes(b"nothing")
    assert "nowhere does not exist" in refuse(pool, "evaluate", fresh / "nowhere")
    (fresh / "empty").mkdir()
    assert "empty holds no checkpoint" in refuse(pool, "evaluate", fresh / "empty")
    assert "cannot read" in refuse(pool, "evaluate", fresh / "a.safetensors")
    (fresh / "a.pt2").write_bytes(b"nothing" * 9)
    assert "; torch.export.load reads such files" in refuse(pool, "evaluate", fresh / "a.pt2")


def test_export_takes_one_process_and_overwrites_nothing(pool, finished, fresh):
    assert "not 2 ranks" in refuse(pool, "export", finished, fresh / "a.safetensors")
    (fresh / "a.safetensors").write_text("mine")
    assert "exists already" in refuse(pool, "export", finished, fresh / "a.safetensors", ranks=1)
    assert (fresh / "a.safetensors").read_text() == "mine"


def test_a_moving_average_that_was_not_kept_is_refused(pool, finished):
    assert "no moving average" in refuse(pool, "evaluate", finished, "--weights", "ema")


def test_a_loss_that_is_not_finite_stops_the_run(pool, fresh):
    options = ["--batch-size", "16", "--learning-rate", "1e30", "--log-steps", "1", "--max-steps", "9"]
    line = refuse(pool, *TRAIN, *options)
    assert "the loss is" in line and "--learning-rate" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ranks 3", "ranks=3 does not divide groups=4; use one of 1, 2, 4"),
        ("--model wrn-28", "unknown model"),
        ("--groups 5", "groups=5 does not divide"),
        ("--batch-size 0", "batch_size=0 is invalid; use 1 or more"),
        ("--image-size -32", "image_size=-32 is invalid; use 1 or more"),
        ("--num-classes 0", "num_classes=0 is invalid; use 1 or more"),
    ],
)
def test_count_refuses_what_cannot_be(pool, options, message):
    assert message in refuse(pool, "count", *options.split(), ranks=1)


def test_what_a_checkpoint_does_not_keep_is_not_resumed(pool, finished):
    line = refuse(pool, *TRAIN, "--batch-size", 16, "--output", finished, "--resume", "--ema-decay", 0.9)
    assert "the checkpoint keeps no moving average of the weights; leave --ema-decay out" in line


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        (
            "--lasso 3 --complexity-divisor 32 --sync-batch-norm",
            ["lasso=3.0", "complexity_divisor=32.0", "sync_batch_norm=True"],
        ),
        ("--lr-schedule cosine --lr-gamma 0.5", ["lr_gamma=0.5"]),
        ("--epochs 3 --lr-gamma 0.5", ["lr_gamma=0.5"]),
        ("--exchange mpi", ["exchange=mpi"]),
        ("--conv sc --data-parallel 2 --exchange group", ["exchange=group"]),
        ("--conv dgc --threshold-steps 3", ["threshold_steps=3"]),
        ("--conv dgconv --complexity-exponent 0.3", ["complexity_exponent=0.3"]),
        ("--schedule dense --kernels native", ["kernels=native"]),
        ("--model mobilenetv2-cifar --conv gc --remeasure", ["remeasure=True"]),
        ("--conv gc --remeasure", []),
        ("--conv gc --lr-coarse 2 --momentum-coarse 0.8", ["lr_coarse=2.0", "momentum_coarse=0.8"]),
        ("--weight-decay 0 --no-decay-norm", ["decay_norm=False"]),
        ("--conv dgc --group-lasso 0.1", ["group_lasso=0.1"]),
        ("--conv lgc --condensation 1 --group-lasso 0.1", ["group_lasso=0.1"]),
        ("--conv lgc --group-lasso 0.1 --lasso 0.1", ["lasso=0.1"]),
        # What a recipe or another setting fills in is not the user's.
        ("--epochs 3", []),
        ("--lr-schedule cosine", []),
        ("--weight-decay 0", []),
        ("--no-decay-norm", []),
        ("--lr-milestones 1 --lr-gamma 0.5", []),
        ("--conv dgc", []),
        ("--conv dgc --threshold global --threshold-steps 3", []),
        ("--conv dgconv --complexity-divisor 32 --complexity-exponent 0.3", []),
        ("--conv sc --data-parallel 2 --sync-batch-norm", []),
    ],
)
def test_settings_without_effect_are_warned_of(pool, fresh, options, ignored):
    ranks = 2 if "--data-parallel" in options else 1
    outcome = run(pool, *TRAIN, "--batch-size", 16, *options.split(), ranks=ranks)[0]
    warned = re.findall(r"warning: (\S+) is ignored: ", outcome.err)
    assert sorted(warned) == sorted(ignored)


def test_the_longest_timeout_is_one_that_torch_takes(pool, fresh):
    run(pool, *TRAIN, "--batch-size", 16, "--timeout", LONGEST_TIMEOUT, ranks=2)
