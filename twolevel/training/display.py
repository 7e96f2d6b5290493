"""What a person sees of a run: a live bar on a terminal, lines elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.status import Status
from rich.table import Column

from twolevel.launchers import discover
from twolevel.terminal import Console, width

WIDE = 140  # columns that the long forms take, whatever the numbers
NARROW = 80  # and the short ones
LINE_SECONDS = 15.0  # between two lines where there is no terminal


class Display:
    """Shows a run of `total` steps from step `start` on rank 0; on other ranks nothing."""

    def __init__(self, total: int, start: int, *, shown: bool):
        self.console = Console(file=sys.stdout, quiet=not shown)
        self.wide = width() >= WIDE
        self.live = shown and _is_live(self.console)
        self.total, self.start = total, start
        self.began = self.last_line = time.monotonic()
        # The bar alone gives way: rich would cut any column that may wrap.
        fixed = Column(no_wrap=True)
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")]
        if self.wide:
            columns.insert(2, MofNCompleteColumn(table_column=fixed))
            columns.append(TimeElapsedColumn(table_column=fixed))
        columns += [TextColumn("left"), TimeRemainingColumn(table_column=fixed)]
        self.progress = Progress(*columns, console=self.console, disable=not self.live)
        self.task = self.progress.add_task("training", total=total, completed=start, text="")

    def __enter__(self) -> "Display":
        self.progress.start()
        self.warnings = _Warnings(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.warnings.close()
        self.progress.stop()

    def say(self, text: str) -> None:
        self.console.print(text)

    def step(self, record: dict[str, Any]) -> None:
        accuracy, speed = 100 - record["error"], record["images_per_second"]
        text = f"loss {record['loss']:.3f}  "
        text += (
            f"accuracy {accuracy:.1f} %  {speed:,.0f} images/s"
            if self.wide
            else f"acc {accuracy:.1f} %  {speed:,.0f} img/s"
        )
        epoch = f"epoch {record['epoch']}"
        self.progress.update(self.task, completed=record["step"], text=text, description=epoch)
        now = time.monotonic()
        if not self.live and now - self.last_line > LINE_SECONDS:
            self.last_line = now
            left = (now - self.began) / (record["step"] - self.start) * (self.total - record["step"])
            step = f"{'step ' if self.wide else ''}{record['step']}/{self.total}"
            self.say(f"{epoch}  {step}  {text}  {left / 60:.1f} min left")

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        names = {"test_mirrored_error": "with mirror images", "ema_test_error": "EMA"}
        others = [f"{name} {100 - record[key]:.2f} %" for key, name in names.items() if key in record]
        others = f" ({', '.join(others)})" if others else ""
        epoch = f"epoch {record['epoch']}/{epochs}  "
        train = f"train loss {record['train_loss']:.3f}  accuracy {100 - record['train_error']:.2f} %  "
        test = f"test loss {loss_text(record['test_loss'])}  accuracy {100 - record['test_error']:.2f} %{others}  "
        rate, speed = f"lr {record['learning_rate']:.4g}", f"{record['images_per_second']:,.0f} images/s"
        load, indent = _load(record), " " * len(epoch)
        lines = (
            [f"{epoch}{train}{test}{rate}  {speed}"]
            if self.wide
            else [f"{epoch}{train}{speed}", f"{indent}{test}{rate}"]
        )
        if load:
            last = f"{lines[-1]}  {load}"
            fits = len(last) <= (WIDE if self.wide else NARROW)
            lines[-1:] = [last] if fits else [lines[-1], f"{indent}{load}"]
        self.say("\n".join(lines))
        if lost := _not_finite(record):
            self.say(f"{'':{len(epoch)}}{lost}")
        self.last_line = time.monotonic()


def _is_live(console: Console) -> bool:
    # mpirun gives ranks terminals of their own, whose bars it then mixes into one stream.
    return console.is_terminal and discover().launcher != "mpi"


def loss_text(loss: float | None, digits: int = 3) -> str:
    """A test's loss; there is none where it is not finite, and a huge one is not spelt out."""
    if loss is None:
        return "none"
    return f"{loss:.{digits}f}" if loss < 1e6 else f"{loss:.{digits}e}"


def _load(record: dict[str, Any]) -> str:
    """What an epoch made of the machine, as far as it is known."""
    memory, used, exposed = (record.get(name) for name in ("memory_mb", "utilisation", "exchange_exposed"))
    size = "" if memory is None else f"{memory:.0f} MB" if memory < 1000 else f"{memory / 1000:.1f} GB"
    words = [f"memory {size}"] if size else []
    words += [] if used is None else [f"utilisation {100 * used:.0f} %"]
    words += [] if exposed is None else [f"exchange exposed {100 * exposed:.0f} %"]
    return "  ".join(words)


def _not_finite(record: dict[str, Any]) -> str:
    """How many test images the epoch's network could not compute, where there are some."""
    number, average = record["test_not_finite"], record.get("ema_test_not_finite")
    if not number and not average:
        return ""
    ema = "" if average is None else f" (EMA {average})"
    return f"{number}{ema} of {record['test_images']} images not finite"


class _Warnings(logging.Handler):
    """Says what the layers warn of, such as a C compiler that is missing."""

    def __init__(self, display: Display):
        super().__init__(logging.WARNING)
        self.display, self.log = display, logging.getLogger("twolevel.ops")
        self.log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.display.say(record.getMessage())

    def close(self) -> None:
        self.log.removeHandler(self)
        super().close()


@contextmanager
def waiting(text: str, *, shown: bool) -> Iterator[Callable[[str], None]]:
    """Shows on a terminal that there is something to wait for, for as long as the context lasts.

    What it gives says how far that has come: there, or elsewhere in a line now and then.
    """
    console = Console(file=sys.stdout, quiet=not shown)
    last_line = time.monotonic()

    def say(progress: str) -> None:
        nonlocal last_line
        if isinstance(status, Status):
            status.update(progress)
        elif time.monotonic() - last_line > LINE_SECONDS:
            last_line = time.monotonic()
            console.print(progress)

    with console.status(text) if shown and _is_live(console) else nullcontext() as status:
        yield say
