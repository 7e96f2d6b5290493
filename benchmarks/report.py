"""What all benchmarks share: clocks, facts of the machine, tables, pictures and files of results."""

import json
import os
import platform
import shlex
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import tyro

from twolevel.analysis import plots
from twolevel.errors import UserError
from twolevel.host import processor
from twolevel.ops.clock import gpu_seconds
from twolevel.settings import Device

RESULTS = Path(__file__).parent / "results"


def parse(cls: type, name: str, argv: list[str]) -> Any:
    """The settings of the benchmark `name` from its command line."""
    return tyro.cli(cls, prog=f"python -m benchmarks {name}", args=argv)


def choose_device(device: Device) -> str:
    """cpu or cuda; raises UserError for a GPU that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: {no_gpu()}; use --device cpu")
    return device


def no_gpu() -> str:
    """Why nothing runs on a GPU here."""
    return f"torch {torch.__version__} finds no GPU on this machine"


def check_turns(turns: int) -> None:
    """Quartiles take two times."""
    if turns < 2:
        raise UserError(f"--turns {turns} gives no spread; use 2 or more")


def steady_memory() -> None:
    """Let the C library keep freed memory instead of handing it back to the system after every layer.

    Which of the two it does depends on the largest block freed so far, so on the history of the process;
    a network's weights alone usually settle it.
    """
    torch.ones(31 << 18)


def clock_name(threads: int) -> str:
    """With one thread the time that the thread had a core, on a shared machine the less noisy; else the clock's."""
    return "thread_time_ns" if threads == 1 else "perf_counter_ns"


def stopwatch(device: str, threads: int) -> Callable[..., float]:
    """A function (call, repeats=1) that returns the seconds of one call, on a GPU those between two events."""
    clock = getattr(time, clock_name(threads))

    def on_cpu(call: Callable[[], object], repeats: int = 1) -> float:
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / 1e9 / repeats

    return on_cpu if device == "cpu" else gpu_seconds


def take_turns(
    calls: dict[Any, Callable[[], object]],
    turns: int,
    seconds: Callable[[Callable[[], object]], float],
    *,
    warm_up: int = 0,
) -> dict[Any, list[float]]:
    """Seconds of each call in each turn after `warm_up` others; what else the machine does falls on all calls."""
    found = {key: [] for key in calls}
    for _ in range(warm_up + turns):
        for key, call in calls.items():
            found[key].append(seconds(call))
    return {key: times[warm_up:] for key, times in found.items()}


@torch.no_grad()
def copy_rate(device: str, dtype: torch.dtype, elements: int, seconds: Callable[..., float]) -> float:
    """Bytes read and written a second by a copy of so many elements, the best of a few."""
    source, copy = (torch.ones(elements, device=device, dtype=dtype) for _ in range(2))
    copy.copy_(source)
    return 2 * source.nbytes / min(seconds(lambda: copy.copy_(source)) for _ in range(5))


def summary(seconds: list[float]) -> dict:
    """Median and quartiles in milliseconds."""
    ms = [1e3 * s for s in seconds]
    return {"median_ms": statistics.median(ms), "quartiles_ms": statistics.quantiles(ms)}


def machine(device: str = "cpu") -> dict:
    """What times are taken on; asked before a run, so that its own load does not count."""
    facts = {
        "cpu": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def write(name: str, argv: list[str], settings: Any, facts: dict, found: dict) -> None:
    """Save what `python -m benchmarks name argv` found to `settings.output`."""
    command = shlex.join(["python", "-m", "benchmarks", name, *argv])
    save(settings.output, command, facts, asdict(settings) | {"clock": clock_name(settings.threads)}, found)


def save(output: Path, command: str, facts: dict, settings: dict, found: dict) -> None:
    """Write the JSON of a run: its command, date, machine and settings, then what it found.

    `facts` are `machine()` from before the run.
    """
    result = {
        "command": command,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": facts | {"load_average_after": os.getloadavg()[0]},
        "settings": settings | {"output": output.name},
        **found,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {output}")


def table(rows: list[list[str]], first: int = 22, width: int = 17) -> str:
    """Rows of cells: the first column to the left, the others to the right."""
    return "\n".join(f"{row[0]:{first}}" + "".join(f"{cell:>{width}}" for cell in row[1:]) for row in rows)


def bars(
    panels: dict[str, dict[str, list[float | None]]],
    labels: list[str],
    path: Path,
    *,
    title: str,
    unit: str,
    marks: dict[str, dict[str, list[float]]] | None = None,
) -> None:
    """Draw bars: panel -> series -> one value (None: no bar) for each label; `marks` are lines over the bars."""
    number = len(labels) * max(map(len, panels.values()))
    room = 0.1 if marks else 0.38  # inches of a bar, and of the value over it
    width = max(8, 1.1 * len(labels) + 3, room * number + 3.5)
    figure, panes = plots.new_figure(len(panels), width=width, height=3.5, theme=plots.PAPER)
    looks = plots.looks_of(name for series in panels.values() for name in series)
    for axes, (panel, series) in zip(panes, panels.items(), strict=True):
        thick = 0.85 / len(series)
        for index, (name, values) in enumerate(series.items()):
            at = [x + (index - (len(series) - 1) / 2) * thick for x in range(len(labels))]
            shown = [(x, v) for x, v in zip(at, values, strict=True) if v is not None]
            drawn = axes.bar(*zip(*shown, strict=True), thick, color=looks[name][0], label=name)
            if not marks:
                axes.bar_label(drawn, fmt=lambda value: f"{value:.{0 if value >= 10 else 2}f}", fontsize=8)
            else:
                half = thick / 2
                roof = marks[panel][name]
                axes.hlines(roof, [x - half for x in at], [x + half for x in at], color="black", lw=1.5)
        axes.set(title=panel, ylabel=unit, xticks=range(len(labels)), xticklabels=labels)
        axes.grid(visible=False, axis="x")
        plots.from_zero(axes)
    plots.one_legend(figure, beside=True)
    figure.suptitle(title, x=0.01, horizontalalignment="left")  # the legend is on the right
    plots.save(figure, path)
    print(f"wrote {path}")
