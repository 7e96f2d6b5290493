"""No input ends in a traceback, takes for ever, or makes a file where none was asked for.

TWOLEVEL_FUZZ=10000 runs so many cases in all, TWOLEVEL_FUZZ_SEED others.
"""

import os

import pytest
from fuzz import KINDS, fuzz, shares

CASES = shares(int(os.environ.get("TWOLEVEL_FUZZ", 280)))


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_input_is_refused_in_one_line_or_honoured(kind):
    ended, defects = fuzz(kind, CASES[kind], int(os.environ.get("TWOLEVEL_FUZZ_SEED", 0)))
    assert not defects, "\n".join(defects)
    assert ended.total() == CASES[kind]
