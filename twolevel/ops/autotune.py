"""Times the forms of a layer on this machine, and stores the results on disk."""

import logging
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from twolevel.ops.clock import gpu_seconds
from twolevel.ops.kernels import native, triton
from twolevel.ops.problem import batch_class
from twolevel.ops.replay import replays
from twolevel.ops.store import Store, cache_folder

# Below so many multiplications a layer is too small to benchmark: the calls themselves are what takes longest.
SMALL_MACS = 10e6
# The same of a normalisation, by numbers of its input.
SMALL_VALUES = 1 << 16
# A measurement on a CPU, where time grows with the batch, takes so many images as make about this many.
CPU_MACS = 300e6
CPU_VALUES = 1 << 22
# Another form than the first, which is the best estimate, has to be faster by this: the noise of a measurement.
MARGIN = 0.03
TURNS = 3
GPU_RUNS = 3  # between two events: the launch of all but the first is hidden
MOST_PLANS = 4096  # where every image has another size; each takes about a kilobyte

log = logging.getLogger("twolevel.ops")


class Form(NamedTuple):
    """A way to compute a layer: the name of a schedule and that of a set of kernels."""

    schedule: str
    kernels: str

    def __str__(self) -> str:
        return f"{self.schedule} {self.kernels}"


class Decision(NamedTuple):
    """A form and why: milliseconds of each form that was measured; none where the best estimate is used."""

    form: Form
    milliseconds: Mapping[str, float]
    new: bool = False
    """Whether it was measured just now."""

    def why(self) -> str:
        """The form and the times that were measured, in one line."""
        if not self.milliseconds:
            return f"{self.form}, too small to measure or the only one"
        ranked = sorted(self.milliseconds.items(), key=lambda item: item[1])
        times = ", ".join(f"{form} {milliseconds:.2f} ms" for form, milliseconds in ranked)
        noise = "" if ranked[0][0] == str(self.form) else f", less than {MARGIN:.0%} from the fastest"
        return f"{self.form}{noise} ({times})"


Run = Callable[[], object]
"""Forward and backward of a layer by one form."""


class Sizes(Protocol):
    """A layer to be timed, by its sizes."""

    @property
    def batch(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def odd(self) -> str: ...

    def title(self) -> str:
        """All that its time depends on but the batch and the machine."""
        ...


Layer = TypeVar("Layer", bound=Sizes)
Chosen = TypeVar("Chosen")


class Plans(dict[tuple, Chosen]):
    """What was chosen by tensor sizes; emptied where it would grow beyond MOST_PLANS."""

    def __setitem__(self, key: tuple, chosen: Chosen) -> None:
        if len(self) >= MOST_PLANS:
            self.clear()
        super().__setitem__(key, chosen)


class Measurements:
    """The fastest form of each layer, in a file that the processes of a user share."""

    def __init__(self, store: Store):
        self.store = store

    def known(self, problem: Sizes, able: Sequence[Form]) -> Decision | None:
        """The stored measurement, or None."""
        kept = _valid(self.store.get(line(problem, able)), able)
        return None if kept is None else Decision(Form(*kept["form"]), kept["ms"])

    def measure(self, problem: Layer, able: Sequence[Form], runs: Callable[[Layer], list[Run]]) -> Decision:
        """Time `able`, whose `runs` are made of a problem, and keep the result; ranks that do so at once agree."""
        times = measure(problem, able, runs)
        milliseconds = {str(form): round(1e3 * seconds, 4) for form, seconds in times.items()}
        mine = {"form": [*_best(times, able)], "ms": milliseconds}
        kept = _valid(self.store.keep(line(problem, able), mine, replace=False), able) or mine
        decision = Decision(Form(*kept["form"]), kept["ms"], new=True)
        log.info("%s: %s", problem.title(), decision.why())
        return decision


@cache
def measurements() -> Measurements:
    """The store of this user."""
    return Measurements(Store(cache_folder() / "forms.json"))


def form_now(
    problem: Sizes, able: Sequence[Form], decide: Callable[..., Decision | None], *, may_measure: bool
) -> tuple[Form, bool]:
    """The form that computes a layer now, and whether it is settled.

    It is what `decide(problem, able, may_measure=...)` finds; where that is None, the best estimate, not settled.
    While a CUDA graph is captured nothing is measured.
    """
    if problem.odd:  # a measurement is of plain tensors: others compute nothing, or something else
        able = able[:1]
    capturing = problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    decision = decide(problem, able, may_measure=may_measure and not capturing)
    return (able[0], False) if decision is None else (decision.form, True)


def decide(
    problem: Layer,
    able: Sequence[Form],
    runs: Callable[[Layer], list[Run]],
    *,
    small: bool,
    may_measure: bool,
    waits: Mapping[Form, float] = {},
) -> Decision | None:
    """The fastest of `able`, or the first for a small layer; None where it is unknown and must not be measured now.

    `waits`: seconds of a form that a measurement on one rank does not see.
    """
    if len(able) == 1 or small or problem.device.type not in ("cpu", "cuda"):
        return Decision(able[0], {})
    known = measurements().known(problem, able)
    if known is None and may_measure:
        known = measurements().measure(problem, able, runs)
    return known if known is None or not waits else _with_waits(known, able, waits)


def _with_waits(decision: Decision, able: Sequence[Form], waits: Mapping[Form, float]) -> Decision:
    kept = decision.milliseconds
    times = {form: kept[str(form)] / 1e3 + waits.get(form, 0.0) for form in able if str(form) in kept}
    milliseconds = {str(form): round(1e3 * seconds, 4) for form, seconds in times.items()}
    return Decision(_best(times, able), milliseconds, decision.new)


def measure(problem: Layer, able: Sequence[Form], runs: Callable[[Layer], list[Run]]) -> dict[Form, float]:
    """Seconds of forward and backward by form, the least of a few runs. A form that runs out of memory is left out.

    On a GPU so is one that fails, as kernels may that a card has not been tried with, and forms are replayed as CUDA
    graphs, so that what the host needs to launch their kernels does not choose; unless one cannot be captured.
    """
    with saved_tensors_hooks(_as_it_is, _as_it_is):  # what is timed is no part of the pass around it
        return _times_of(problem, able, runs)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _times_of(problem: Layer, able: Sequence[Form], runs: Callable[[Layer], list[Run]]) -> dict[Form, float]:
    candidates = dict(zip(able, runs(problem), strict=True))
    on_gpu = problem.device.type == "cuda"
    times: dict[Form, float] = {}
    for turn in range(TURNS + 1):  # one to warm up
        for form, run in [*candidates.items()]:
            try:
                seconds = _seconds(run, problem.device)
            except Exception as error:
                full = isinstance(error, torch.OutOfMemoryError)
                if len(candidates) == 1 or not (full or on_gpu):
                    raise
                if not full:
                    log.warning("%s fails for layers of %s and is left out: %s", form, problem.title(), error)
                del candidates[form]
                times.pop(form, None)
                continue
            if turn:
                times[form] = min(seconds, times.get(form, seconds))
        if turn == 0 and on_gpu:
            candidates = replays(candidates) or candidates
    return times


def _seconds(run: Run, device: torch.device) -> float:
    if device.type == "cuda":
        return gpu_seconds(run, GPU_RUNS)
    # With one thread the time that it had a core: other ranks of the machine do not count.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    run()
    return clock() - begin


def _best(times: dict[Form, float], able: Sequence[Form]) -> Form:
    first = next(form for form in able if form in times)
    fastest = min(times, key=times.__getitem__)
    return fastest if times[fastest] < (1 - MARGIN) * times[first] else first


def _valid(kept: Any, able: Sequence[Form]) -> dict[str, Any] | None:
    """What a store holds for a layer; None where that is not valid, so that the layer is measured again."""
    if not isinstance(kept, dict) or kept.get("form") not in [[*form] for form in able]:
        return None
    times = kept.get("ms")
    if not isinstance(times, dict) or str(Form(*kept["form"])) not in times:
        return None
    return kept if all(isinstance(ms, float) and math.isfinite(ms) for ms in times.values()) else None


def line(problem: Sizes, able: Sequence[Form]) -> str:
    """Everything that a measurement depends on: the layer, its batch, the machine and the candidates."""
    if problem.device.type == "cuda":
        device = torch.cuda.get_device_name(problem.device)
        kernels = f"cudnn {torch.backends.cudnn.version()} {triton.version()}"
    else:
        device = f"{_processor()}, {torch.get_num_threads()} threads"
        kernels = native.version()
    candidates = " ".join("/".join(form) for form in able)
    versions = f"torch {torch.__version__} {kernels}"
    return f"{batch_class(problem.batch)} images, {problem.title()} | {device} | {versions} | {candidates}"


@cache
def _processor() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
