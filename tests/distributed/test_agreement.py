"""What fails on one rank fails on all, with the same words."""

import os

import pytest
import torch.distributed as dist

from twolevel.distributed import agreement
from twolevel.distributed.agreement import agree, require_equal, together
from twolevel.errors import UserError


def outcome(call) -> tuple[str, str] | None:
    """The type and message of what `call` raises; None if it returns."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        dist.barrier()  # hangs unless every rank has come through
    return None


def rank() -> int:
    return int(os.environ["RANK"])


def agree_on(errors: dict[int, Exception]):
    return outcome(lambda: agree(errors.get(rank())))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_without_an_error_all_go_on(pool, ranks):
    assert pool.run(agree_on, {}, ranks=ranks) == [None] * ranks


def test_an_error_of_one_rank_is_raised_on_all(pool):
    on_0, on_1, on_2, on_3 = pool.run(agree_on, {2: UserError("batch=0 is not positive")})
    assert on_2 == ("UserError", "batch=0 is not positive")
    assert on_0 == on_1 == on_3 == ("UserError", "rank 2: batch=0 is not positive")


def test_of_several_errors_the_first_ranks_is_raised(pool):
    errors = {1: UserError("one"), 3: UserError("three, and a longer one")}
    on_0, on_1, on_2, on_3 = pool.run(agree_on, errors)
    assert on_1 == ("UserError", "one")
    assert on_0 == on_2 == on_3 == ("UserError", "rank 1: one")


def fail_in_body(error: Exception, failing: int):
    def call():
        with together():
            if rank() == failing:
                raise error

    return outcome(call)


def test_a_body_that_fails_on_one_rank_fails_on_all(pool):
    on_0, on_1 = pool.run(fail_in_body, UserError("no such folder: a/é"), 1, ranks=2)
    assert on_1 == ("UserError", "no such folder: a/é")
    assert on_0 == ("UserError", "rank 1: no such folder: a/é")


def test_a_defect_keeps_its_type_and_the_others_hear_of_it(pool):
    on_0, on_1, on_2 = pool.run(fail_in_body, KeyError("weight"), 0, ranks=3)
    assert on_0 == ("KeyError", "'weight'")
    assert on_1 == on_2
    assert on_1 == ("UserError", "rank 0: KeyError: 'weight' (its traceback is on that rank)")


def test_a_defect_is_not_hidden_by_the_error_of_an_earlier_rank(pool):
    on_0, on_1 = pool.run(agree_on, {0: UserError("mine"), 1: KeyError("weight")}, ranks=2)
    assert (on_0, on_1) == (("UserError", "mine"), ("KeyError", "'weight'"))


def test_a_defect_keeps_its_traceback():
    def deep_inside():
        raise KeyError("weight")

    with pytest.raises(KeyError) as info, together():
        deep_inside()
    assert "deep_inside" in [entry.name for entry in info.traceback]


def require_equal_on(settings: list[dict]):
    return outcome(lambda: require_equal("configurations", settings[rank()]))


def test_equal_settings_pass(pool):
    same = {"conv": "gc2l", "groups": 4, "learning_rate": 0.1, "resume": None, "nan": float("nan")}
    assert pool.run(require_equal_on, [same] * 4) == [None] * 4


def test_settings_that_differ_are_named_on_every_rank(pool):
    settings = [{"conv": "gc", "learning_rate": 0.1} for _ in range(4)]
    settings[2]["learning_rate"] = 0.2
    expected = (
        "UserError",
        "ranks were started with different configurations: learning_rate is 0.2 on rank 2 and 0.1 "
        "on rank 0; start every rank with the same arguments",
    )
    assert pool.run(require_equal_on, settings) == [expected] * 4


def test_a_setting_that_one_rank_lacks_is_named(pool):
    [(_, message), other] = pool.run(require_equal_on, [{"conv": "gc"}, {}], ranks=2)
    assert 'conv is missing on rank 1 and "gc" on rank 0' in message
    assert other == ("UserError", message)


def test_of_many_differences_three_are_named():
    first = {name: "1" for name in "abcde"}
    words = agreement._differences({name: "2" for name in "abcde"}, 3, first)
    assert words.count("is 2 on rank 3 and 1 on rank 0") == 3
    assert words.endswith("and 2 more")


def test_one_process_needs_no_group():
    assert not dist.is_initialized()
    agree(None)
    require_equal("configurations", {"conv": "gc"})
    with together():
        pass
    with pytest.raises(UserError, match=r"^mine$"):
        agree(UserError("mine"))
