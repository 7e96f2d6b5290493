"""The command line of `python -m benchmarks faults`: trials until there are as many as asked for, and their counts."""

import json
import shlex
import shutil
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.faults import chain, cost, trial
from benchmarks.links import why_not
from twolevel.errors import UserError, unknown

# How many trials of each kind make a result.
WANTED = {"kill": 100, "kill-replicas": 20, "kill-mpi": 20, "stop": 20, "link": 20}
SHOWN = ("finished", "bit_equal", "records_whole", "named", "in_time")


@dataclass
class Settings:
    """Disturb runs at random moments, and count what becomes of them; goes on where an earlier command stopped, by the
    trials in its folder or else by those in its results.
    """

    kinds: tuple[str, ...] = tuple(trial.KINDS)
    """what to do to them"""

    trials: int | None = None
    """trials of each kind in all; by default 100 of kill and 20 of the others"""

    folder: Path = Path("runs/faults")
    """where they run, and where trials.jsonl keeps a line of each"""

    output: Path = report.RESULTS / "faults.json"
    """file for the counts and all trials"""

    cost: bool = False
    """measure what checkpoints and fingerprints cost a step, on a machine that does nothing else, instead of trials"""

    chains: bool = False
    """runs whose number of ranks changes under way, with a picture of their losses, instead of trials"""

    keep: bool = False
    """keep the folder of a trial that went well too"""


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "faults", argv)
    for name in settings.kinds:
        if name not in trial.KINDS:
            raise unknown("kind", name, trial.KINDS)
    command = shlex.join(["python", "-m", "benchmarks", "faults", *argv])
    if settings.cost:
        facts, found = report.machine(), cost.measure()
        print(cost_table(found))
        output = settings.output.with_name(f"{settings.output.stem}-cost.json")
        report.save(output, command, facts, {}, found)
        return
    if settings.chains:
        facts, found = report.machine(), chain.measure(settings.folder)
        output = settings.output.with_name(f"{settings.output.stem}-chains.json")
        print(f"picture: {chain.draw(found, output.with_suffix('.png'))}")
        report.save(output, command, facts, {}, {"chains": found})
        return
    lines = settings.folder / "trials.jsonl"
    go_on(lines, settings.output)
    skipped = {}
    for name in settings.kinds:
        why = _why_not(name)
        if why is not None:
            skipped[name] = why
            print(f"skipped {name}: {why}", flush=True)
            continue
        _trials(name, settings.trials or WANTED[name], settings, lines)
    done = read(lines)
    print(table(done))
    found = {"counts": counts(done), "skipped": skipped, "wanted": WANTED, "trials": done}
    report.save(
        settings.output, command, report.machine(), asdict(settings) | {"folder": settings.folder.name}, found
    )


def cost_table(found: dict[str, Any]) -> str:
    rows = [
        ["a step", f"{found['step_s'] * 1e3:.1f} ms"],
        ["a checkpoint every 50 steps", f"{found['checkpoint_every_50_steps']:+.2%}"],
        ["  its processor time", f"{found['saver_cpu_of_window']:.2%}"],
        ["a fingerprint every 100 steps", f"{found['fingerprint_every_100_steps']:.3%}"],
    ]
    return report.table(rows, first=32)


def _why_not(name: str) -> str | None:
    launcher = trial.KINDS[name].launcher
    if launcher == "nodes":
        return why_not()
    if launcher == "mpi" and shutil.which("mpirun", path=trial.PATH) is None:
        return "there is no mpirun; pip install 'twolevel[mpi]'"
    return None


def _trials(name: str, wanted: int, settings: Settings, lines: Path) -> None:
    kind = trial.KINDS[name]
    done = {line["trial"] for line in read(lines) if line["kind"] == name}
    left = [number for number in range(wanted) if number not in done]
    if not left:
        return
    print(f"{name}: {kind.what}; {len(left)} of {wanted} trials to go", flush=True)
    reference = trial.undisturbed(kind, settings.folder / f"reference-{name}")
    for number in left:
        folder = settings.folder / f"{name}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        found = trial.disturb(kind, number, folder, reference)
        with lines.open("a") as file:
            file.write(trial.as_line(name, number, found) + "\n")
        good = all(found.get(key, True) for key in SHOWN)
        print(f"  {number}: {'good' if good else 'BAD'} {trial.as_line(name, number, found)}", flush=True)
        if good and not settings.keep:
            shutil.rmtree(folder, ignore_errors=True)


def go_on(lines: Path, output: Path) -> None:
    """Have a new folder begin with the trials of the results that there are."""
    if not lines.exists() and output.exists():
        lines.parent.mkdir(parents=True, exist_ok=True)
        trials = json.loads(output.read_text())["trials"]
        lines.write_text("".join(json.dumps(line) + "\n" for line in trials))


def read(lines: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []


def counts(done: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each kind the trials, how many went well in each respect, and medians of seconds."""
    found = {}
    for name in trial.KINDS:
        of_kind = [line for line in done if line["kind"] == name and line.get("struck")]
        if not of_kind:
            continue
        row: dict[str, Any] = {"trials": len(of_kind)}
        row |= {key: sum(line[key] for line in of_kind if key in line) for key in SHOWN if key in of_kind[0]}
        places = [line["place"] for line in of_kind]
        row["places"] = {place: places.count(place) for place in sorted({*places})}
        for key in ("to_next_step_s", "named_after_s"):
            values = [line[key] for line in of_kind if key in line]
            row |= {f"median_{key}": round(statistics.median(values), 2)} if values else {}
        found[name] = row
    return found


def table(done: list[dict[str, Any]]) -> str:
    rows = [["", "trials", *(key.replace("_", " ") for key in SHOWN), "to next step, s", "named after, s"]]
    for name, row in counts(done).items():
        medians = [str(row.get(f"median_{key}", "")) for key in ("to_next_step_s", "named_after_s")]
        rows.append([name, str(row["trials"]), *(str(row.get(key, "")) for key in SHOWN), *medians])
    if len(rows) == 1:
        raise UserError("no trial has been made yet")
    return report.table(rows)
