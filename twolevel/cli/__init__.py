"""The command line: `twolevel train | evaluate | export | report | grid | count | plan | doctor`.

A command is a module of this package, whose `run` takes the words after its name, and a line of COMMANDS. It imports
torch only when it runs, so that help appears at once.
"""

import importlib
import os
import re
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import TextIO

from twolevel.errors import LOST_RANK, LostRank, SpareEnded, Stopped, UserError, unknown
from twolevel.launchers import rank_of

COMMANDS = {
    "train": "train a network on the ranks that a launcher started, or on one",
    "evaluate": "test a run, a checkpoint or an exported file",
    "export": "write a run's whole network into one file: safetensors, torch.export or ONNX",
    "report": "make a page of runs and grids: curves, errors, and what learned or dynamic groups chose",
    "grid": "train the runs of a published table or figure, or of your own grid",
    "count": "count parameters, multiply-accumulates and bytes exchanged",
    "plan": "list the ways to train a network on so many processors, their cost, and which to take",
    "doctor": "look for what would break a long run or slow it down; or at what a run has left",
}

OPTIONS = ("--help", "--version")

EXAMPLES = """examples:
  twolevel train --model wrn-16-2 --data sample --epochs 5
  torchrun --nproc-per-node 4 -m twolevel train --model wrn-28-10 --conv gc2l --groups 4 --data cifar10
  twolevel count --model wrn-28-10 --conv gc2l --groups 16
  twolevel plan --model wrn-28-80 --ranks 4 --machine titan-rtx"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status.

    0; or after a line that says why 2 where the input cannot be honoured, 130 where it was asked to stop, LOST_RANK
    where another rank is gone or did not come. A command may have one of its own: that of `doctor` is 1 where
    something is wrong.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("--help", "-h"):
        print(_help())
        return 0
    if argv[0] == "--version":
        from twolevel import __version__

        print(f"twolevel {__version__}")
        return 0
    name, *rest = argv
    try:
        if name not in COMMANDS:
            raise (
                unknown("option", name, OPTIONS)
                if name.startswith("-")
                else unknown("command", name, COMMANDS)
            )
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if rank_of():
                warnings.simplefilter("ignore")
            return importlib.import_module(f"twolevel.cli.{name}").run(rest) or 0
    except UserError as error:
        rank = rank_of()
        prefix = "" if rank is None else f"[rank {rank}] "
        command = f" {name}" if name in COMMANDS else ""
        line = " ".join(str(error).splitlines())  # it may quote what was given
        print(f"{prefix}twolevel{command}: {line}", file=sys.stderr, flush=True)
        return LOST_RANK if isinstance(error, LostRank) else 2
    except Stopped as stopped:
        if not rank_of():
            print(f"twolevel {name}: {stopped}", file=sys.stderr, flush=True)
        return 130
    except SpareEnded:
        return 0
    except KeyboardInterrupt:
        print(
            f"twolevel {name}: interrupted; a run goes on from its newest checkpoint with --resume",
            file=sys.stderr,
        )
        return 130
    except OSError as error:
        if error.filename is None:
            raise
        print(f"twolevel {name}: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        if not _LOST_RANK.search(str(error)):
            raise
        first = str(error).splitlines()[0]
        print(
            f"twolevel {name}: lost another rank, whose own message says why ({first})",
            file=sys.stderr,
            flush=True,
        )
        return LOST_RANK


def entry() -> None:
    """Run a command and end the process with its status, without what Python does at exit where there are ranks."""
    try:
        code = _run()
    except BrokenPipeError:
        # The status of other tools where `head` has read enough. Python itself would flush again, and complain.
        os._exit(128 + signal.SIGPIPE)
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None and "torch.distributed" not in sys.modules:
        sys.exit(code)
    if mpi is not None and not code and not mpi.Is_finalized():
        mpi.Finalize()  # after a failure it would wait for ranks that wait for this one
    # Threads of Gloo may still release a tensor, which aborts the process while Python shuts down.
    os._exit(code)


def _run() -> int:
    """A command's status, once its output is written. Raises BrokenPipeError where nobody reads that."""
    try:
        code = main()
    except SystemExit as end:  # --help
        code = end.code if isinstance(end.code, int) else 0
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_gone():
            raise
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        print(end="", file=stream, flush=True)  # a stream that was closed before the start is None
    return code


def _reader_gone() -> bool:
    """Whether nobody reads standard output or error any more; a data worker or a rank can break a pipe too."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


# How Gloo, NCCL and the store say that another rank has gone.
_LOST_RANK = re.compile(
    r"closed by peer|reset by peer|broken pipe|remote process exited|connection (was )?closed|timed out waiting",
    re.I,
)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    head = "usage: twolevel COMMAND [options]      (twolevel COMMAND --help explains each option)"
    about = "Train wide convolutional networks, their convolutions split by channel group over processors."
    return "\n".join([head, "", about, "", "commands:", *lines, "", EXAMPLES])


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    where = "" if issubclass(category, UserWarning) else f" ({filename}:{lineno})"
    print(f"twolevel: warning: {message}{where}", file=sys.stderr, flush=True)
