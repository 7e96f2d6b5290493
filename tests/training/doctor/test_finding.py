"""What ranks say together."""

import pytest
import torch.distributed as dist

from twolevel.errors import UserError
from twolevel.training.doctor import finding
from twolevel.training.doctor.finding import ok, problem, warning


def test_what_all_ranks_say_is_said_once():
    wrong = warning("limit", "3 of 4", "raise it")
    reports = [("a", [wrong]), ("b", [wrong])]
    assert finding.merge(reports) == [wrong]
    assert finding.merge([("a", [ok("limit", "5")]), ("b", [ok("limit", "6")])]) == [ok("limit", "5")]


def test_of_what_only_some_say_they_are_named():
    good = ok("limit", "9 of 4")
    reports = [
        ("a", [good]),
        ("b", [warning("limit", "3 of 4", "raise it")]),
        ("b", [warning("limit", "2 of 4", "raise it")]),
        ("c", [problem("limit", "none", "give some")]),
    ]
    assert finding.merge(reports) == [
        warning("limit", "ranks 1, 2 on b: 3 of 4", "raise it"),
        problem("limit", "rank 3 on c: none", "give some"),
    ]


def test_a_rank_that_does_not_look_is_not_counted():
    lost = problem("data", "lost", "find it")
    assert finding.merge([("a", [lost]), ("a", [])]) == [lost]


def test_many_ranks_are_not_all_named():
    assert finding.naming(range(40), ["a"] * 40) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 32 more on a"


@pytest.mark.parametrize(("number", "text"), [(5, "5 bytes"), (2**26, "64.0 MiB"), (1.5 * 2**40, "1.5 TiB")])
def test_bytes_for_people(number, text):
    assert finding.size(number) == text


def fail_on_rank_1() -> str:
    def look():
        if dist.get_rank() == 1:
            raise PermissionError(13, "Permission denied", "/x")
        return 1

    try:
        finding.gather(look)
    except UserError as error:
        return str(error)
    return "nothing"


def test_a_look_that_fails_on_one_rank_fails_on_all(pool):
    first, second = pool.run(fail_on_rank_1, ranks=2)
    assert (first, second) == ("rank 1: /x: Permission denied", "/x: Permission denied")


def test_an_error_of_a_check_is_its_finding():
    def check():
        yield ok("a", "b")
        raise UserError("x=3 is invalid; use 2; or 4")

    assert finding.guarded("x", check) == [problem("x", "x=3 is invalid", "use 2; or 4")]
