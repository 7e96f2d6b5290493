"""What a person sees of a run fits the terminal."""

import io
import sys

import pytest

from twolevel.training.display import Display

STEP = {
    "epoch": 187,
    "step": 72_987,
    "loss": 1.23456,
    "error": 45.678,
    "images_per_second": 12_345.6,
}
EPOCH = {
    "epoch": 187,
    "train_loss": 1.23456,
    "train_error": 0.0,
    "test_loss": 12.3456,
    "test_error": 54.321,
    "ema_test_error": 45.678,
    "test_images": 50_000,
    "test_not_finite": 0,
    "ema_test_not_finite": 0,
    "learning_rate": 0.000123456,
    "images_per_second": 1_234_567.8,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Makes standard output a terminal of so many columns, and returns it."""

    def of(columns: int) -> Terminal:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("OMPI_COMM_WORLD_RANK", raising=False)
        monkeypatch.setattr(sys, "stdout", Terminal())
        return sys.stdout

    return of


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (80, ["epoch 187", "loss 1.235", "acc 54.3 %", "12,346 img/s", "left"]),
        (140, ["epoch 187", "72987/78200", "loss 1.235", "accuracy 54.3 %", "12,346 images/s", "left"]),
    ],
)
def test_the_bar_is_one_line_of_the_terminal_with_every_number(terminal, columns, shown):
    terminal(columns)
    display = Display(78_200, 72_000, shown=True)
    display.step(STEP)
    (line,) = display.console.render_lines(display.progress.get_renderable(), pad=False)
    text = "".join(segment.text for segment in line)
    assert len(text) <= columns and "…" not in text
    assert all(part in text for part in [*shown, "━━━━", ":"])


@pytest.mark.parametrize(("columns", "lines"), [(80, 2), (139, 2), (140, 1)])
def test_the_line_of_an_epoch_fits_the_terminal(terminal, columns, lines):
    output = terminal(columns)
    Display(78_200, 0, shown=True).epoch(EPOCH, 200)
    printed = output.getvalue().splitlines()
    assert len(printed) == lines and max(map(len, printed)) <= columns
    for part in (
        "epoch 187/200",
        "train loss 1.235",
        "test loss 12.346",
        "lr 0.0001235",
        "1,234,568 images/s",
    ):
        assert part in output.getvalue()


@pytest.mark.parametrize(("columns", "lines"), [(80, 3), (140, 2)])
def test_what_an_epoch_made_of_the_machine_has_its_line_where_it_would_not_fit(terminal, columns, lines):
    output = terminal(columns)
    load = {"memory_mb": 139_876.5, "utilisation": 0.387, "exchange_exposed": 0.0512}
    Display(78_200, 0, shown=True).epoch(EPOCH | load, 200)
    printed = output.getvalue().splitlines()
    assert len(printed) == lines and max(map(len, printed)) <= columns
    assert printed[-1].strip() == "memory 139.9 GB  utilisation 39 %  exchange exposed 5 %"


def test_what_is_not_known_of_the_machine_is_not_printed(terminal):
    output = terminal(140)
    load = {"memory_mb": 412.3, "utilisation": None, "exchange_exposed": None}
    Display(78_200, 0, shown=True).epoch(EPOCH | load, 200)
    assert "memory 412 MB" in output.getvalue()
    assert "None" not in output.getvalue() and "utilisation" not in output.getvalue()


def test_a_line_without_a_terminal_fits_columns_too(terminal, monkeypatch):
    output = terminal(80)
    monkeypatch.setattr(output, "isatty", lambda: False)
    display = Display(78_200, 72_000, shown=True)
    display.last_line -= 60
    display.step(STEP)
    (line,) = output.getvalue().splitlines()
    assert line.startswith("epoch 187  72987/78200  loss 1.235") and len(line) <= 80


def test_what_looks_like_markup_is_printed_as_it_is(terminal):
    output = terminal(80)
    Display(1, 0, shown=True).say("runs/mk[/red]/curve.png :smile:")
    assert output.getvalue() == "runs/mk[/red]/curve.png :smile:\n"
