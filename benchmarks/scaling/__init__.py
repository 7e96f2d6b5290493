"""Strong and weak scaling of GC-2L and of what a user would pick instead: `python -m benchmarks scaling`.

command.py      the command line, and the file of results
cases.py        what is measured: cases, and jobs of cases that share their ranks
launch.py       starts the ranks of a job: on this machine, under mpirun, or on the two ends of a link
rank.py         what each rank does
rows.py         from times to speed-up, efficiency and exposed communication
projection.py   one rank of N on this device; the paper's table
show.py         tables and the picture
"""


def main(argv: list[str]) -> None:
    from benchmarks.scaling import command  # not above: ranks import this package, and need no picture

    command.main(argv)
