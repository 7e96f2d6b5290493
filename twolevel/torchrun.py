"""torchrun, silent where a rank has said in one line why it ended: `python -m twolevel.torchrun` takes its arguments.

torchrun itself follows such a line with its own traceback and a report that knows the exit status alone.
"""

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

# The statuses with which `twolevel.cli` ends after a line of its own.
EXPLAINED = (2, 130, 141)


def main() -> None:
    """Start the ranks; the exit status is that of the first one that failed, where it said why."""
    try:
        torchrun()
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode not in EXPLAINED:
            raise
        sys.exit(first.exitcode)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)


if __name__ == "__main__":
    main()
