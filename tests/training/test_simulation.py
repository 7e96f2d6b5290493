"""`train --simulate N`: one process holds, computes and exchanges what rank 0 of N would."""

import re
from collections import Counter
from unittest import mock

import pytest
import torch
from command import FIXED, command, run

from twolevel import models
from twolevel.analysis import count
from twolevel.analysis.planner import presets
from twolevel.distributed.simulation import SimulatedAxis
from twolevel.training.step import TrainStep

WARM_UP = 3
ONE = ["--max-steps", 1]


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """No machine is measured here."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "twolevel"


def rows(out: str) -> dict[str, str]:
    """The words of each row of the table, by its name."""
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines()[1:])


def before_step(number: int, argv: list) -> dict[str, torch.Tensor]:
    """What this rank of a `train` holds, and is given, before its step `number` from 0 on."""
    calls, seen = [], {}
    step = TrainStep.__call__

    def recorded(self, images, labels):
        if len(calls) == number:
            seen.update({k: v.clone() for k, v in self.placed.model.state_dict().items()})
            seen.update(images=images.clone(), labels=labels.clone())
        calls.append(number)
        return step(self, images, labels)

    with mock.patch.object(TrainStep, "__call__", recorded):
        done = command("train", *argv)
    assert done.code == 0, done.err
    assert seen
    return seen


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ("--conv gc2l", 2),
        ("--conv gc2l", 4),
        ("--conv gc", 4),
        ("--conv bgc --data-parallel 2", 4),
        ("--conv bgc --data-parallel 2 --group-parallel 1", 2),
        ("--conv gc2l --data-parallel 2 --sync-batch-norm", 4),
        ("--conv gc2l --mesh auto", 4),
        ("--conv flgc --data-parallel 2", 2),
        ("--conv dgc --data-parallel 2", 2),
        ("--conv lgc --data-parallel 2", 2),
        ("--conv dgconv --groups 1 --data-parallel 2", 2),
    ],
)
def test_it_holds_and_is_given_what_rank_0_of_a_real_run_is_before_its_first_step(
    pool, tiny, tmp_path, words, ranks
):
    argv = [*tiny, *words.split(), *ONE]
    argv += FIXED[FIXED.index("--schedule") :] if "gc2l" in words else []
    real = pool.run(
        before_step, 0, [*argv, "--output", tmp_path / "run"], ranks=ranks, timeout=90, init=False
    )
    alone = before_step(0, [*argv, "--simulate", ranks])
    assert alone.keys() == real[0].keys()
    for name, value in real[0].items():
        assert torch.equal(alone[name], value), name
    if "gc2l" in words and "--data-parallel" not in words:
        assert any(not torch.equal(alone[k], real[1][k]) for k in alone)  # another rank holds others


def test_of_one_rank_its_steps_are_those_of_the_run(tiny, tmp_path):
    argv = [*tiny, *FIXED[FIXED.index("--schedule") :]]
    real = before_step(WARM_UP, [*argv, "--max-steps", WARM_UP + 1, "--output", tmp_path / "run"])
    alone = before_step(WARM_UP, [*argv, "--simulate", 1, *ONE])
    assert all(torch.equal(alone[name], value) for name, value in real.items())


@pytest.mark.parametrize(
    ("conv", "ranks", "parts"), [("gc2l", 2, 1), ("gc2l", 4, 1), ("bgc", 2, 1), ("gc2l", 2, 2)]
)
def test_it_exchanges_what_is_counted_of_a_step_of_a_rank(tiny, conv, ranks, parts, monkeypatch):
    seen: list[Counter] = []

    def listed(original, kind):
        def call(self, tensor):
            if seen:  # not what chooses forms
                seen[-1][kind, tensor.nbytes] += 1
            return original(self, tensor)

        return call

    kinds = {
        "gather": "all-gather",
        "scatter_sum": "reduce-scatter",
        "sum": "all-reduce",
        "all_reduce_": "all-reduce",
    }
    for name, kind in kinds.items():
        monkeypatch.setattr(SimulatedAxis, name, listed(getattr(SimulatedAxis, name), kind))
    step = TrainStep.__call__

    def counted(self, images, labels):
        seen.append(Counter())
        return step(self, images, labels)

    monkeypatch.setattr(TrainStep, "__call__", counted)
    fixed = FIXED[FIXED.index("--schedule") :] if conv == "gc2l" else []
    done = command(
        *("train", *tiny, *fixed, "--conv", conv, "--accumulate", parts, "--simulate", ranks, *ONE)
    )
    assert done.code == 0, done.err
    whole = models.create("wrn-10-1", conv=conv, groups=4, num_classes=3)
    counts = count(whole, (3, 16, 16), ranks=ranks, batch_size=8 // parts, dtype=torch.float64)
    expected = Counter({(c.kind, c.bytes_in): 0 for c in counts.collectives})
    for collective in counts.collectives:
        expected[collective.kind, collective.bytes_in] += parts
    assert seen == [expected] * (WARM_UP + 1)
    said = rows(done.out)["a real step"]
    assert f"{parts * counts.bytes_sent / 1e6:.2f} MB" in said
    for kind, number in counts.collectives_by_kind().items():
        assert f"{parts * number} {kind}" in said


def test_a_rank_of_more_holds_less(tiny):
    whole = models.create("wrn-10-1", conv="gc2l", groups=4, num_classes=3)
    held = {}
    for ranks in (1, 2, 4):
        done = command("train", *tiny, *FIXED, "--simulate", ranks, *ONE)
        held[ranks] = int(rows(done.out)["this rank"].split()[0].replace(",", ""))
        assert held[ranks] == count(whole, (3, 16, 16), ranks=ranks).held
    split = count(whole, (3, 16, 16), ranks=1).held - 3  # all but the classifier's bias
    assert [held[ranks] - 3 for ranks in (1, 2, 4)] == [split, split // 2, split // 4]


def test_it_says_first_what_it_is_and_then_what_a_step_takes_and_writes_nothing(
    tiny, tmp_path, own_cache, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    argv = ["train", *tiny, *FIXED[FIXED.index("--schedule") :], "--simulate", 8, "--data-parallel", 2]
    done = command(*argv, "--max-steps", 5, "--output", tmp_path / "deep" / "run")
    assert (done.code, done.err) == (0, "")
    assert not list(tmp_path.iterdir())
    first = "simulating rank 0 of 8 (data=2 x group=4) on cpu: nothing is sent, losses mean nothing, "
    assert done.out.splitlines()[0] == first + "and nothing is written"
    said = rows(done.out)
    assert said["mesh"] == "2 data x 4 group ranks on cpu, threads: 1"
    assert said["this rank"].endswith(" parameters, 4 images a step")
    assert re.fullmatch(r"[\d.]+ m?s, the median of 5 \(half of them .*\), after 3 others", said["step"])
    assert "images/s of the 8 ranks, without exchange" in said["upper bound"]
    assert "of gradients over 2 replicas" in said["a real step"]
    assert said["exchange"] == "time not known: the cost model has no float64"
    assert not re.search(r"loss \d|accuracy", done.out)


def test_the_time_of_an_exchange_is_a_projection_of_the_plan(tiny, own_cache):
    argv = ["train", *tiny, *FIXED, "--simulate", 4, *ONE, "--precision", "float32"]
    assert rows(command(*argv).out)["exchange"].startswith("time not known: no machine is measured; ")
    presets.machine("a100-40").save(own_cache / "machine-x.json")
    said = rows(command(*argv).out)["exchange"]
    assert re.match(
        r"[\d.]+ m?s, of which [\d.]+ m?s exposed, so steps of [\d.]+ m?s: a projection, by", said
    )
    assert "a100-40" in said
    assert rows(command(*argv[:-4], "--simulate", 1, *ONE).out)["exchange"] == "none with one rank"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--simulate 0", "simulate=0 is invalid; use 1 or more"),
        ("--simulate 2 --dry-run", "simulate=2 is invalid with --dry-run: "),
        ("--simulate 2 --resume", "simulate=2 is invalid with --resume: "),
        ("--simulate 2 --profile 3", "simulate=2 is invalid with --profile: "),
        *(
            (
                f"--simulate 2 --parallel {name} {rest}",
                f"parallel={name} is invalid with simulate=2: one rank",
            )
            for name, rest in (
                ("fsdp", ""),
                ("channel", "--conv sc --groups 1"),
                ("gpipe", ""),
                ("1f1b", ""),
                ("naive", ""),
            )
        ),
        ("--simulate 2 --exchange mpi", "exchange=mpi is invalid with simulate=2, which sends nothing"),
        ("--simulate 2 --group-parallel 4", "mesh data=1 x group=4 takes 4 ranks, but 2 were simulated"),
        ("--simulate 3", "group=3 ranks do not divide groups=4; use one of 1, 2, 4 ranks"),
        ("--simulate 2 --conv shuffle", "replicate"),
        ("--simulate 3 --data-parallel 3", "batch_size=8 does not divide by data_parallel=3"),
        ("--simulate 2 --cuda-graph", "cuda_graph=True needs a GPU"),
        ("--simulate 2 --batch-size 400", "batch_size=400 is more than the 24 training images"),
    ],
)
def test_what_cannot_be_honoured_is_one_line(tiny, tmp_path, words, why):
    done = command("train", *tiny, *words.split(), "--output", tmp_path / "run")
    assert done.code == 2 and why in done.err and done.err.count("\n") == 1, done.err
    assert not list(tmp_path.iterdir())
    assert not torch.distributed.is_initialized()


def test_more_than_one_real_rank_is_refused(pool, tiny):
    done = pool.run(command, "train", *tiny, "--simulate", 2, ranks=2, init=False)
    assert [outcome.code for outcome in done] == [2, 2]
    for rank, outcome in enumerate(done):
        assert outcome.out == ""
        assert outcome.err.startswith(
            f"[rank {rank}] twolevel train: simulate=2 takes one process, and torchrun has"
        )


def test_one_rank_of_a_launcher_may_simulate(pool, tiny):
    run(pool, "train", *tiny, *FIXED, "--simulate", 2, *ONE)


def test_ctrl_c_ends_it_in_one_line(tiny, monkeypatch):
    def interrupted(self, images, labels):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    done = command("train", *tiny, *FIXED, "--simulate", 2)
    assert done.code == 130
    assert done.err == "twolevel train: interrupted; a simulation has nothing to save\n"


def test_steps_go_on_beyond_an_epoch(tiny):
    done = command("train", *tiny, *FIXED, "--simulate", 2, "--max-steps", 7)  # of 3 steps an epoch
    assert done.code == 0 and "the median of 7 (" in done.out


def test_no_run_s_record_says_that_it_was_simulated(tiny):
    from twolevel.cli.train import configure

    config = configure([str(word) for word in (*tiny, "--simulate", 2)])
    assert config.run.simulate == 2 and "simulate" not in config.to_dict()["run"]
