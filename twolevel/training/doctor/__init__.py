"""What one looks at before a long run: whether something here would break it or slow it down.

A check is a function that gives `Finding`s, one line each: `ok`, `warning` (a run would be slower, or may end) or
`problem` (a run would end). It changes nothing. Where there are ranks, all of them call it, and rank 0's findings are
printed: what only one rank can see travels by `gather` and `from_ranks`, which fail on all ranks or on none.

    machine.py   what is installed          folder.py    the output folder: shared, renames, locks, speed
    cores.py     GPUs, cores and threads    room.py      bytes and files for the checkpoints, /dev/shm
    limits.py    of the system, its jobs    dataset.py   the files of the data set
    cgroup.py    of a container             past_run.py  the folder of a run, a checkpoint or an exported file
    links.py     between ranks, and each rank's own speed and clock
"""

from twolevel.training.doctor.examine import examine, examine_past
from twolevel.training.doctor.finding import Finding

__all__ = ["Finding", "examine", "examine_past"]
