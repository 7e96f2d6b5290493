"""The command line of `python -m benchmarks scaling`.

python -m benchmarks scaling                                     ranks on this machine and over emulated links
python -m benchmarks scaling --ranks 2 4 --weak batch width
python -m benchmarks scaling --carriers gloo mpi --links none
python -m benchmarks scaling --ranks --projection 1 16 1024     projections alone
"""

import shlex
import signal
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from benchmarks import report
from benchmarks.links import Link, Nodes, NoLink, joined
from benchmarks.scaling import launch, paper, show
from benchmarks.scaling.cases import STRONG, Case, Job, cases_of, with_peers
from benchmarks.scaling.projection import project
from benchmarks.scaling.rows import rows_of
from benchmarks.strategies import STRATEGIES
from twolevel.errors import UserError, unknown
from twolevel.settings import Device

NO_LINK = "none"


@dataclass
class Settings:
    """Time training steps over ranks: every strategy, by number of ranks, groups, link and carrier."""

    device: Device = "auto"
    """where to run; auto takes the GPUs where there are some, one for each rank"""

    ranks: tuple[int, ...] | None = None
    """numbers of ranks P; by default 2, on GPUs 2, 4 and so on, as many as there are. One rank is always timed too"""

    strategies: tuple[str, ...] = STRATEGIES
    """ways to use the ranks"""

    groups: tuple[int, ...] = (2, 4)
    """numbers of channel groups G of the strategy group, where P divides them"""

    weak: tuple[Literal["batch", "width"], ...] = ()
    """weak scaling too: P times the images, or a network P times as wide"""

    links: tuple[str, ...] = (NO_LINK, "1gbit", "100mbit")
    """links between two nodes of half of the ranks each: none (one machine), or like 1gbit, 100mbit, 1gbit+2ms"""

    carriers: tuple[Literal["gloo", "mpi"], ...] = ("gloo",)
    """what carries the representatives of the strategy group; with mpi, mpirun starts the ranks"""

    model: str = "wrn-16-4"
    """network, as for `twolevel train`"""

    conv: str = "gc2l"
    """convolution of the strategy group; gc exchanges nothing. The other strategies have dense ones"""

    batch: int | None = None
    """images in a step, over all ranks; by default 32, on a GPU 128"""

    turns: int = 10
    """timed steps of every case"""

    threads: int = 1
    """threads of torch in each rank"""

    memory: bool = True
    """also start every strategy in ranks of its own, to read their memory"""

    projection: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    """numbers of ranks N of which one is run on this device, nothing crossing: a projection"""

    paper: tuple[int, ...] | None = None
    """widths k of WRN-28-k to put beside the paper's wall clock, as projections; by default 2, on a GPU its 40 60 80"""

    output: Path | None = None
    """file to write, pictures beside it; by default results/scaling.json, on a GPU results/scaling-gpu.json"""

    def __post_init__(self) -> None:
        report.check_turns(self.turns)
        self.device = report.choose_device(self.device)
        on_gpu = self.device == "cuda"
        self.batch = self.batch or (128 if on_gpu else 32)
        if self.ranks is None:
            self.ranks = tuple(p for p in (2, 4, 8, 16) if p <= torch.cuda.device_count()) if on_gpu else (2,)
        if self.paper is None:
            self.paper = (40, 60, 80) if on_gpu else (2,)
        self.output = self.output or report.RESULTS / ("scaling-gpu.json" if on_gpu else "scaling.json")
        for strategy in self.strategies:
            if strategy not in STRATEGIES:
                raise unknown("strategy", strategy, STRATEGIES)
        for link in self.links:
            if link != NO_LINK:
                Link.parse(link)
        for option in ("ranks", "projection", "paper", "groups"):
            for value in getattr(self, option):
                if value < 1:
                    raise UserError(f"--{option} {value} is not positive; use 1 or more")


def jobs_of(settings: Settings) -> tuple[list[tuple[Job, list[Case]]], dict[str, str]]:
    """What is started, and the cases of each that become rows; what is not, with why."""
    jobs, skipped = [], {}
    exchanges = tuple({"gloo": "group", "mpi": "mpi"}[carrier] for carrier in settings.carriers)
    for ranks in settings.ranks:
        if settings.device == "cuda" and ranks > torch.cuda.device_count():
            skipped[f"P={ranks}"] = (
                f"{ranks} ranks take as many GPUs, and this machine has {torch.cuda.device_count()}"
            )
            continue
        for link in settings.links if settings.device == "cpu" else (NO_LINK,):
            if link != NO_LINK and ranks % 2:
                skipped[f"P={ranks} over {link}"] = "two nodes take an even number of ranks"
                continue
            here = exchanges
            if link != NO_LINK and "mpi" in exchanges:
                skipped[f"P={ranks} over {link}, mpi"] = (
                    "mpirun's own connections do not reach into the namespaces"
                )
                here = tuple(e for e in exchanges if e != "mpi")
            cases = cases_of(
                settings.strategies,
                settings.model,
                settings.conv,
                settings.groups,
                settings.batch,
                ranks,
                settings.weak,
                here,
            )
            if cases:
                launcher = "mpi" if "mpi" in here else "torchrun"
                jobs.append((Job(ranks, launcher, link, with_peers(cases)), cases))
    return jobs, skipped


def run_job(job: Job, settings: Settings, memory: bool = False) -> tuple[dict, dict | None]:
    """What the ranks found, and what the link was measured to give."""
    asked = {name: getattr(settings, name) for name in ("device", "turns", "threads")} | {"memory": memory}
    with joined(Link.parse(job.link)) if job.link != NO_LINK else nullcontext() as nodes:
        link = nodes.measure() if isinstance(nodes, Nodes) else None
        return launch.run(job, asked, nodes), link


def measure(settings: Settings) -> dict:
    """Rows of every job, with the memory of every strategy."""
    jobs, skipped = jobs_of(settings)
    rows, links = [], {}
    for job, cases in jobs:
        print(
            f"P={job.ranks}, link {job.link}, started by {job.launcher}: {len(job.cases)} steps", flush=True
        )
        try:
            found, link = run_job(job, settings)
        except NoLink as error:
            skipped[f"P={job.ranks} over {job.link}"] = str(error)
            continue
        if link:
            links[f"{job.link}, P={job.ranks}"] = link
        skipped |= {f"P={job.ranks}, {job.link}: {name}": why for name, why in found["skipped"].items()}
        rows += rows_of(job, cases, found)
    if settings.memory:
        add_memory(rows, jobs, settings)
    return {"rows": rows, "links": links, "skipped": skipped}


def add_memory(rows: list[dict], jobs: list[tuple[Job, list[Case]]], settings: Settings) -> None:
    """Start each case of strong scaling, and each one rank, alone in processes of their own; into its rows."""
    done = {}
    for _, cases in jobs:
        for case in cases:
            if case.scaling != STRONG or case.exchange != "group":
                continue
            for one in (case, case.alone()):
                if one not in done:
                    alone = Job(one.ranks, "torchrun", NO_LINK, (one,))
                    done[one] = run_job(replace(alone, link=NO_LINK), settings, memory=True)[0].get("ranks")
            fields = ("strategy", "model", "conv", "groups", "batch", "ranks")
            for row in rows:
                if all(row[field] == getattr(case, field) for field in fields) and row["scaling"] == STRONG:
                    row["memory"], row["memory_alone"] = done[case], done[case.alone()]


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "scaling", argv)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what ends the ranks
    facts = report.machine(settings.device)
    torch.set_num_threads(settings.threads)
    report.steady_memory()
    found = measure(settings)
    for name, link in found["links"].items():
        trip, rate = link["round_trip_us"], link["measured_mbit"]
        print(f"link {name}: {rate:.0f} Mbit/s and {trip:.0f} us there and back, by a plain socket")
    if found["rows"]:
        print(show.measured(found["rows"]))
    shared = {"turns": settings.turns, "threads": settings.threads, "device": settings.device}
    found["projection"] = found["paper"] = None
    if settings.projection:
        sizes = {"model": settings.model, "conv": settings.conv, "batch": settings.batch}
        found["projection"] = project(settings.strategies, settings.projection, **sizes, **shared)
        found["skipped"] |= found["projection"].pop("skipped")
        print(show.projected(found["projection"]))
    if settings.paper:
        found["paper"] = paper.measure(settings.paper, batch=settings.batch, **shared)
        print(show.paper(found["paper"]))
    for what, why in found["skipped"].items():
        print(f"skipped {what}: {why}")
    clocks = {"clock_of_ranks": "perf_counter", "clock_of_projections": report.clock_name(settings.threads)}
    command = shlex.join(["python", "-m", "benchmarks", "scaling", *argv])
    report.save(settings.output, command, facts, asdict(settings) | clocks, found)
    picture = settings.output.with_suffix(".png")
    if any(row["scaling"] == STRONG for row in found["rows"]):
        show.draw(found["rows"], picture)
    if found["projection"] and found["projection"]["rows"]:
        show.draw_projection(found["projection"], picture.with_stem(f"{picture.stem}-projection"))
