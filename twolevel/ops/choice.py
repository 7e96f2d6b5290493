"""Which schedule and which kernels compute a two-level convolution: measured once a problem, kept on disk.

A form is a schedule and a kind of kernel:

    overlapped  grouped, products, depthwise   operations of torch, by the way of the restriction
                native                         C kernels for the restriction and the coarse term (CPU, float32)
                narrow                         C kernels for the local part of narrow groups as well
                triton                         Triton kernels throughout (GPU)
    fused       grouped                        the paper's: one convolution with m/G + 1 outputs a group
                triton                         the same, the restriction in the padding of the local tile
    dense       grouped                        one dense convolution with the structured weight (one rank)
"""

import logging
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from twolevel.errors import UserError, unknown
from twolevel.ops import native, schedules
from twolevel.ops import triton as triton_kernels
from twolevel.ops.exchange import LOCAL, Copies
from twolevel.ops.native.two_level import NarrowParts, NativeParts
from twolevel.ops.parts import Parts, TorchParts
from twolevel.ops.problem import Problem
from twolevel.ops.restriction import WAYS, ways
from twolevel.ops.store import Store, cache_folder

Schedule = Literal["auto", "overlapped", "fused", "dense"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
Kernels = Literal["auto", "grouped", "products", "depthwise", "native", "narrow", "triton"]
KERNELS: tuple[str, ...] = get_args(Kernels)

# Below so many multiplications no measurement is worth its time: the calls themselves are what takes longest.
WORTH_MACS = 10e6
# A measurement on a CPU, where time grows with the batch, takes so many images as make about this many.
CPU_MACS = 300e6
# Another form than the first, which is the best estimate, has to be faster by this: the noise of a measurement.
MARGIN = 0.03
TURNS = 3

log = logging.getLogger("twolevel.ops")


class Form(NamedTuple):
    schedule: str
    kernels: str


class Decision(NamedTuple):
    """A form and why: the milliseconds of each that was measured, none where the best estimate is taken."""

    form: Form
    milliseconds: dict[str, float] = {}  # noqa: RUF012 (of a tuple: nothing writes to it)
    new: bool = False
    """Whether it was measured just now."""

    def why(self) -> str:
        """The form, and the times in which it was found the best, in one line."""
        if not self.milliseconds:
            return f"{' '.join(self.form)}, too small to measure or the only one"
        ranked = sorted(self.milliseconds.items(), key=lambda item: item[1])
        times = ", ".join(f"{form} {milliseconds:.2f} ms" for form, milliseconds in ranked)
        noise = "" if ranked[0][0] == " ".join(self.form) else f", less than {MARGIN:.0%} from the fastest"
        return f"{' '.join(self.form)}{noise} ({times})"


def schedule_of(form: Form) -> schedules.Schedule:
    """What carries out a form other than dense."""
    kind = schedules.Fused if form.schedule == "fused" else schedules.Overlapped
    return kind(_parts(form.kernels))


@cache
def _parts(kernels: str) -> Parts:
    if kernels == "native":
        return NativeParts()
    if kernels == "narrow":
        return NarrowParts()
    if kernels == "triton":
        return triton_kernels.TritonParts()
    return TorchParts(kernels)


def forms(problem: Problem) -> list[Form]:
    """All that can compute this problem here, the best estimate first. Triton comes last: it is never a guess."""
    x, local, restriction = problem.x, problem.local, problem.restriction
    found = [Form("overlapped", way) for way in ways(x, restriction)]
    if x.device.type == "cpu" and x.dtype == torch.float32:
        _say_if_without_c()
    if native.why_not(x, local, restriction, problem.coarse) is None:
        found.insert(0, Form("overlapped", "native"))
        if native.local_supports(x, local, problem.geometry, len(restriction)):
            wins = native.local_wins(x, local, problem.geometry, len(restriction))
            found.insert(0 if wins else 1, Form("overlapped", "narrow"))
    found.append(Form("fused", "grouped"))
    if problem.ranks == 1:
        found.append(Form("dense", "grouped"))
    if triton_kernels.supports(x, local, problem.geometry, len(restriction), restriction):
        found += [Form("overlapped", "triton"), Form("fused", "triton")]
    return found


@cache
def _say_if_without_c() -> None:
    """Once a process: that torch computes what C kernels would compute faster, and why."""
    if (why := native.available()) is not None:
        log.warning("two-level convolutions are computed without the C kernels: %s", why)


def choose(
    problem: Problem, schedule: Schedule = "auto", kernels: Kernels = "auto", *, may_measure: bool
) -> Form:
    """The form to use: what is asked for, and of what is left open the fastest as measured on this machine.

    Small problems take the best estimate, and so do those not measured yet where it is not the time for it: where the
    caller says so, and while a CUDA graph is captured. Raises UserError for an unknown name and for what cannot
    compute this problem here.
    """
    return decide(problem, able_forms(problem, schedule, kernels), may_measure=may_measure).form


def able_forms(problem: Problem, schedule: Schedule = "auto", kernels: Kernels = "auto") -> list[Form]:
    """Those of `forms` that are asked for, one at least. Raises UserError as `choose` does."""
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    if kernels not in KERNELS:
        raise unknown("kernels", kernels, KERNELS)
    able = [form for form in forms(problem) if _asked(form, schedule, kernels)]
    if not able:
        raise UserError(_cannot(problem, schedule, kernels))
    return able


def decide(problem: Problem, able: list[Form], *, may_measure: bool) -> Decision:
    """As `choose`, among `able`, and why."""
    if len(able) == 1 or problem.macs < WORTH_MACS or problem.x.device.type not in ("cpu", "cuda"):
        return Decision(able[0])
    capturing = problem.x.is_cuda and torch.cuda.is_current_stream_capturing()
    # Others, such as fakes, compute nothing or something else.
    timed = type(problem.x) in (Tensor, torch.nn.Parameter)
    return _choices().get(problem, able, may_measure and timed and not capturing)


def _asked(form: Form, schedule: str, kernels: str) -> bool:
    # A dense convolution restricts nothing: it is any of torch's kernels.
    by = kernels == "auto" or form.kernels == kernels or (form.schedule == "dense" and kernels in WAYS)
    return by and schedule in ("auto", form.schedule)


def _cannot(problem: Problem, schedule: str, kernels: str) -> str:
    x = problem.x
    where = f"{[*x.shape]} in {x.dtype} on {x.device}"
    if schedule == "dense" and problem.ranks > 1:
        return f"schedule='dense' needs every channel on one rank: this one of {problem.ranks}; use auto"
    why = _why_not(problem, kernels) or f"schedule={schedule!r} has no such kernels"
    fit = {form.kernels for form in forms(problem) if schedule in ("auto", form.schedule)}
    *some, last = "auto", *sorted(fit)
    return f"kernels={kernels!r} cannot compute {where}: {why}; use {', '.join(some)} or {last}"


def _why_not(problem: Problem, kernels: str) -> str | None:
    """Why these kernels cannot compute the problem by any schedule, None where they can."""
    x, local, restriction, coarse, geometry, _ = problem
    if kernels == "triton":
        return triton_kernels.why_not(x, local, geometry, len(restriction), restriction)
    if kernels in WAYS:
        return None if kernels in ways(x, restriction) else "they are for channels_last memory"
    why = native.why_not(x, local, restriction, coarse)
    if (
        why is None
        and kernels == "narrow"
        and not native.local_supports(x, local, geometry, len(restriction))
    ):
        inputs, outputs = local.shape[1], len(local) // len(restriction)
        why = f"groups of {inputs} to {outputs} channels do not fill its vectors"
    return why


class Choices:
    """Measured forms by problem, in a file that the processes of a user share."""

    def __init__(self, store: Store):
        self.store = store
        self._seen: dict[tuple, Decision] = {}

    def get(self, problem: Problem, able: list[Form], may_measure: bool) -> Decision:
        key = (*problem.sizes(), *able)
        found = self._seen.get(key)
        if found is None:
            line = problem.line(able)
            kept, new = _valid(self.store.get(line), able), False
            if kept is None and not may_measure:
                return Decision(able[0])
            if kept is None:
                times = measure(problem, able)
                best, new = _best(times, able), True
                milliseconds = {" ".join(form): round(1e3 * seconds, 4) for form, seconds in times.items()}
                mine = {"form": [*best], "ms": milliseconds}
                kept = _valid(self.store.keep(line, mine, replace=False), able) or mine
            found = Decision(Form(*kept["form"]), kept["ms"], new)
            log.log(logging.INFO if new else logging.DEBUG, "%s: %s", problem.title(), found.why())
            self._seen[key] = found._replace(new=False)
        return found


def _valid(kept: Any, able: list[Form]) -> dict | None:
    """What a store holds for a problem, None where that is not what was kept: it is measured again."""
    good = isinstance(kept, dict) and kept.get("form") in [[*form] for form in able]
    return kept if good and isinstance(kept.get("ms"), dict) else None


@cache
def _choices() -> Choices:
    return Choices(Store(cache_folder() / "forms.json"))


def measure(problem: Problem, able: list[Form]) -> dict[Form, float]:
    """Seconds of forward and backward by form, the least of a few turns. What does not fit a card is left out.

    Touches no random stream.
    """
    x = problem.x.detach()
    if not x.is_cuda:
        x = x[: max(1, int(len(x) * CPU_MACS / problem.macs))]
    problem = problem._replace(
        x=x,
        local=problem.local.detach(),
        restriction=problem.restriction.detach(),
        coarse=problem.coarse.detach(),
    )
    runs = {form: _run_of(form, problem) for form in able}
    times: dict[Form, float] = {}
    for turn in range(TURNS + 1):  # one to warm up
        for form, run in [*runs.items()]:
            try:
                seconds = _seconds(run, x)
            except torch.OutOfMemoryError:
                del runs[form]
                times.pop(form, None)
                continue
            if turn:
                times[form] = min(seconds, times.get(form, seconds))
    return times


def _run_of(form: Form, problem: Problem) -> Callable[[], None]:
    x, local, restriction, coarse, geometry, ranks = problem
    exchange = LOCAL if ranks == 1 else Copies(ranks)
    if form.schedule == "dense":
        leaves = [t.clone().requires_grad_() for t in (x, local, restriction, coarse)]

        def run_dense() -> None:
            y = schedules.dense(*leaves, geometry)
            torch.autograd.grad(y, leaves, y.detach())

        return run_dense
    schedule = schedule_of(form)

    def run() -> None:
        with torch.no_grad():
            y, z = schedule.forward(x, local, restriction, coarse, geometry, exchange)
            schedule.backward(y, x, local, restriction, coarse, z, geometry, exchange, (True,) * 4)

    return run


def _seconds(run: Callable[[], None], x: Tensor) -> float:
    if x.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    # With one thread the time that it had a core: other ranks of the machine do not count.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    run()
    return clock() - begin


def _best(times: dict[Form, float], able: list[Form]) -> Form:
    first = next(form for form in able if form in times)
    fastest = min(times, key=times.get)
    return fastest if times[fastest] < (1 - MARGIN) * times[first] else first
