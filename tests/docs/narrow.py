"""The rule by which what the documentation shows is run in tests, and what runs it in a rank of the pool.

- Every network `wrn-D-k` becomes wrn-10-1, every data set the sample, and nothing is fetched.
- A run takes one step, one that is resumed a second; two-level layers are computed by a form that needs no measurement.
- In Python an epoch has one batch, and so has the test set.
"""

import contextlib
import io
import os
import re
from itertools import islice
from pathlib import Path
from unittest import mock

from command import FIXED, Outcome, command

LAUNCHERS_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What a line that is run may begin with.
BEGINNINGS = ("twolevel ", "torchrun ", "python -m twolevel.torchrun ", "python examples/")


def narrow_text(text: str) -> str:
    return re.sub(r"\bwrn-\d+-\d+", "wrn-10-1", text)


def narrow_words(words: list[str]) -> list[str]:
    """The words of a line of shell, as they are run."""
    words = [narrow_text(word) for word in words if word != "--download"]
    if "--data" in words:
        words[words.index("--data") + 1] = "sample"
    if "train" not in words:
        return words
    if "--max-steps" in words:
        at = words.index("--max-steps")
        del words[at : at + 2]
    kind = words[words.index("--conv") + 1] if "--conv" in words else "gc2l"
    form = FIXED[FIXED.index("--schedule") :] if kind == "gc2l" and "--schedule" not in words else []
    return [*words, *form, "--max-steps", "2" if "--resume" in words else "1"]


def ranks_of(words: list[str]) -> int:
    return int(words[words.index("--nproc-per-node") + 1]) if "--nproc-per-node" in words else 1


def run_line(words: list[str]) -> Outcome:
    """What a line does, in one of the ranks that it would start."""
    if words[0] == "twolevel":  # no launcher
        for name in LAUNCHERS_VARIABLES:
            del os.environ[name]
    if "twolevel" in words:
        return command(*words[words.index("twolevel") + 1 :])
    (script,) = (word for word in words if word.endswith(".py"))
    return run_python(Path(script).read_text())


def run_python(text: str) -> Outcome:
    from twolevel.data import memory

    def first(whole):
        return lambda *arguments, **named: islice(whole(*arguments, **named), 1)

    train, test = memory.TrainInMemory, memory.EvalInMemory
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(train, "batches", first(train.batches)),
        mock.patch.object(test, "eval_batches", first(test.eval_batches)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        exec(compile(narrow_text(text), "block", "exec"), {"__name__": "__main__"})
    return Outcome(0, out.getvalue(), err.getvalue())
