"""torchrun, silent where a rank has said in one line why it ended: `python -m twolevel.torchrun` takes its arguments.

torchrun itself follows such a line with its own traceback and a report that knows the exit status alone. It also
restarts ranks (--max-restarts) whatever ended them, so what is wrong with the options of `twolevel train` is said here,
before there are ranks. Nothing of --standalone listens beyond this machine. With a range of machines (--nnodes 1:4)
every round of ranks gets a store of its own: of torchrun's, which outlives a round, a machine that comes later does not
hear (torch 2.11 to 2.14).
"""

import os
import re
import sys
from collections.abc import Sequence
from datetime import timedelta

# torch.distributed documents it, and its type hints leave it out.
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser
from torch.distributed.run import main as torchrun

from twolevel.distributed.meeting import on_loopback
from twolevel.errors import LOST_RANK, UserError
from twolevel.launchers import LOOPBACK, listening

# The statuses with which `twolevel.cli` ends after a line of its own.
EXPLAINED = (2, LOST_RANK, 130, 141)
TRAIN = ("-m", "twolevel", "train")


def main() -> None:
    """Start the ranks; the exit status is that of the first one that failed, where it said why."""
    try:
        _check(sys.argv[1:])
        if _is_elastic(sys.argv[1:]):
            os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        words, store = _on_loopback(sys.argv[1:])
        torchrun(words)
        del store
    except UserError as error:
        print(f"twolevel train: {error}", file=sys.stderr)
        sys.exit(2)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        # Where doctor finds something, its lines say what.
        if first.exitcode not in EXPLAINED and (first.exitcode, "doctor" in sys.argv) != (1, True):
            raise
        sys.exit(first.exitcode)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)


def _is_elastic(words: Sequence[str]) -> bool:
    """Whether the number of machines may change, by the options of torchrun or the variable that stands for one."""
    given = re.findall(r"--nnodes[= ](\S+)", " ".join(words)) or [os.environ.get("PET_NNODES", "")]
    least, _, most = given[0].partition(":")
    return least != (most or least)


def _on_loopback(words: list[str]) -> tuple[list[str], TCPStore | None]:
    """The words, and a store of this machine's own processes alone, to be held, in the place of --standalone.

    What torch starts for that listens on every interface, and unpickles what it finds there.
    """
    if "--standalone" not in words or not get_args_parser().parse_args(words).standalone:
        return words, None
    store = on_loopback(listening(), timedelta(minutes=10))
    place = words.index("--standalone")
    # torch uses the server that its process has at a port.
    static = ["--rdzv-backend=static", f"--master-addr={LOOPBACK}", f"--master-port={store.port}"]
    return [*words[:place], *static, *words[place + 1 :]], store


def _check(words: Sequence[str]) -> None:
    """Raise UserError where these words are to start `twolevel train` with options that it refuses."""
    from twolevel.cli.train import configure

    for begin in range(len(words)):
        end = begin + len(TRAIN)
        if tuple(words[begin:end]) == TRAIN:
            configure(list(words[end:]))
            return


if __name__ == "__main__":
    main()
