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
import platform
import time
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from twolevel.errors import UserError, unknown
from twolevel.ops import native, schedules
from twolevel.ops import triton as triton_kernels
from twolevel.ops.exchange import LOCAL, Copies
from twolevel.ops.geometry import Geometry
from twolevel.ops.native.two_level import NarrowParts, NativeParts
from twolevel.ops.parts import Parts, TorchParts
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


class Problem(NamedTuple):
    """One layer on one rank: tensors of its sizes, not necessarily its own."""

    x: Tensor
    local: Tensor
    restriction: Tensor
    coarse: Tensor
    geometry: Geometry
    ranks: int

    @property
    def macs(self) -> int:
        """Multiplications of the local part, forward."""
        (sh, sw), _, _ = self.geometry
        return self.x.shape[0] * self.x.shape[2] * self.x.shape[3] * self.local.numel() // (sh * sw)


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
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    if kernels not in KERNELS:
        raise unknown("kernels", kernels, KERNELS)
    able = [form for form in forms(problem) if _asked(form, schedule, kernels)]
    if not able:
        raise UserError(_cannot(problem, schedule, kernels))
    if len(able) == 1 or problem.macs < WORTH_MACS or problem.x.device.type not in ("cpu", "cuda"):
        return able[0]
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
    if kernels == "native":
        why = native.why_not(x, problem.local, problem.restriction, problem.coarse)
        return f"kernels='native' cannot compute {where}: {why}"
    able = ", ".join(sorted({" ".join(form) for form in forms(problem)}))
    return (
        f"schedule={schedule!r} with kernels={kernels!r} cannot compute {where}; use auto, or one of {able}"
    )


class Choices:
    """Measured forms by problem, in a file that the processes of a user share."""

    def __init__(self, store: Store):
        self.store = store
        self._seen: dict[tuple, Form] = {}

    def get(self, problem: Problem, able: list[Form], may_measure: bool) -> Form:
        key = (*_sizes(problem), *able)
        form = self._seen.get(key)
        if form is None:
            line = _line(problem, able)
            kept = self.store.get(line)
            if kept is None and not may_measure:
                return able[0]
            if kept is None:
                times = measure(problem, able)
                kept = self.store.keep(line, list(_best(times, able)), replace=False)
                log.info("%s: %s (%s)", _title(problem), " ".join(kept), _in_words(times))
            else:
                log.debug("%s: %s, measured before", _title(problem), " ".join(kept))
            form = self._seen[key] = Form(*kept)
        return form


@cache
def _choices() -> Choices:
    return Choices(Store(cache_folder() / "two_level.json"))


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


def _in_words(times: dict[Form, float]) -> str:
    ranked = sorted(times.items(), key=lambda item: item[1])
    return ", ".join(f"{' '.join(form)} {1e3 * seconds:.2f} ms" for form, seconds in ranked)


def _sizes(problem: Problem) -> tuple:
    x = problem.x
    batch = (
        1 << max(0, x.shape[0] - 1).bit_length()
    )  # up to the next power of two: last batches are not measured anew
    last = x.is_contiguous(memory_format=torch.channels_last)
    shapes = (batch, *x.shape[1:], *problem.local.shape, len(problem.restriction), problem.coarse.shape[1])
    return (*shapes, *problem.geometry, problem.ranks, x.dtype, last, x.device, torch.get_num_threads())


def _title(problem: Problem) -> str:
    """A layer in a few words."""
    (rows, _, *kernel), groups = problem.local.shape, len(problem.restriction)
    image, taps = "x".join(map(str, problem.x.shape)), "x".join(map(str, kernel))
    ranks = f" on one of {problem.ranks} ranks" if problem.ranks > 1 else ""
    return f"{image} to {rows} channels, {taps}, {groups} groups{ranks}"


def _line(problem: Problem, able: list[Form]) -> str:
    """Everything that a choice depends on, in one line."""
    batch, *image = _sizes(problem)[:4]
    x, threads = problem.x, torch.get_num_threads()
    form = "channels last" if x.is_contiguous(memory_format=torch.channels_last) else "contiguous"
    device = torch.cuda.get_device_name(x.device) if x.is_cuda else f"{_processor()}, {threads} threads"
    candidates = " ".join("/".join(one) for one in able)
    return (
        f"x {[batch, *image]} A {[*problem.local.shape]} in {len(problem.restriction)} of {problem.coarse.shape[1]} "
        f"groups {tuple(map(tuple, problem.geometry))} ranks {problem.ranks} | {x.dtype} {form} | {device} | "
        f"torch {torch.__version__} {native.version()} | {candidates}"
    )


@cache
def _processor() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
