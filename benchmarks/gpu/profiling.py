"""Where the time of a training step goes on a card: kernel by kernel, and how long it waits for the host.

    python -m benchmarks.gpu.profiling --model wrn-28-10 --groups 4 --peers gc2l --output FILE

Takes the options of `benchmarks step`. Kernels are sorted into kinds by their names, which is a guess.
"""

import importlib.util
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks import report
from benchmarks.step import Settings, ready

STEPS = 5
SHOWN = 20
OURS = "our Triton kernels"
# Of the kernels that are not ours: the first that fits a kernel's name.
KINDS = (
    ("copies, casts, layouts", r"nchw.*nhwc|nhwc.*nchw|copy|Memcpy|Memset|CatArray|transpose"),
    ("fused by the compiler", r"^triton_"),
    ("batch norm", r"batch_?norm|bn_fw|bn_bw"),
    ("convolutions", r"conv|cudnn|fprop|dgrad|wgrad|xmma"),
    ("products", r"gemm|nvjet|cutlass|splitK|gemv"),
    ("optimiser", r"multi_tensor_apply|FusedSgd"),
    ("NCCL", r"^nccl"),
    ("sums", r"reduce"),
    ("elementwise", r"elementwise"),
)


class Span(NamedTuple):
    """A kernel on the device, from when to when in microseconds."""

    name: str
    start: float
    end: float


@cache
def our_kernels() -> frozenset[str]:
    """The names of the package's own Triton kernels; none where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        return frozenset()
    from triton.runtime.jit import KernelInterface

    from twolevel.ops.kernels.triton import kernels, normalise_kernels

    functions = vars(kernels) | vars(normalise_kernels)
    return frozenset(name for name, value in functions.items() if isinstance(value, KernelInterface))


def kind(name: str) -> str:
    """What a kernel of this name is for."""
    if name in our_kernels():
        return OURS
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.I)), "other")


def profiled(call: Callable[[], object], steps: int, *, on_gpu: bool) -> list[Span]:
    """The kernels of some calls; on the CPU, torch's operations."""
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        for _ in range(steps):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    device = DeviceType.CUDA if on_gpu else DeviceType.CPU
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        # Ranges with a name, as the optimiser's step, are drawn over the kernels in them.
        if event.device_type == device and not getattr(event, "is_user_annotation", False)
    ]


def busy(spans: Iterable[Span]) -> float:
    """Microseconds in which at least one kernel runs."""
    total, last = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, last))
        last = max(last, span.end)
    return total


def breakdown(spans: list[Span], steps: int, wall_ms: float) -> dict[str, Any]:
    """Milliseconds of a step by kind and by kernel, the longest first, and the share in which the device idles.

    `wall_ms` is the time of a step that is not profiled: a profiler slows the host.
    """
    by_name, calls, kinds = defaultdict(float), defaultdict(int), defaultdict(float)
    for span in spans:
        ms = (span.end - span.start) / 1e3 / steps
        by_name[span.name] += ms
        calls[span.name] += 1
        kinds[kind(span.name)] += ms
    busy_ms = busy(spans) / 1e3 / steps
    longest = sorted(by_name.items(), key=lambda item: -item[1])
    return {
        "wall_ms": wall_ms,
        "busy_ms": busy_ms,
        "idle": max(0.0, 1 - busy_ms / wall_ms),
        "kinds_ms": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "kernels": [
            {"name": name, "kind": kind(name), "ms": ms, "calls": calls[name] / steps} for name, ms in longest
        ],
    }


def table(title: str, found: dict[str, Any]) -> str:
    """The kinds, then the longest kernels."""
    head = f"{title}: {found['wall_ms']:.2f} ms a step, kernels for {found['busy_ms']:.2f}, idle {found['idle']:.0%}"
    kinds = ", ".join(f"{kind} {ms:.2f}" for kind, ms in found["kinds_ms"].items())
    rows = [["kernel", "kind", "calls", "ms"]]
    for kernel in found["kernels"][:SHOWN]:
        rows.append([kernel["name"][:60], kernel["kind"], f"{kernel['calls']:.1f}", f"{kernel['ms']:.3f}"])
    return "\n".join([head, f"  {kinds}", report.table(rows, first=62, width=24)])


def measure(settings: Settings) -> dict[str, Any]:
    """The breakdown of a step of every peer."""
    torch.set_num_threads(settings.threads)
    torch.backends.cudnn.benchmark = True
    on_gpu = settings.device == "cuda"
    steps, _, skipped = ready(settings)
    seconds = report.stopwatch(settings.device, settings.threads)
    found = {}
    for (peer, groups), step in steps.items():
        step()
        wall = sorted(seconds(step) for _ in range(settings.turns))[settings.turns // 2]
        name = f"{peer}, G={groups}"
        found[name] = breakdown(profiled(step, STEPS, on_gpu=on_gpu), STEPS, 1e3 * wall)
        print(table(name, found[name]) + "\n", flush=True)
    return {"profiles": found, "skipped": skipped}


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "gpu", argv)
    facts = report.machine(settings.device)
    found = measure(settings)
    for what, why in found["skipped"].items():
        print(f"skipped {what}: {why}")
    report.write("gpu", argv, settings, facts, found)


if __name__ == "__main__":
    main(sys.argv[1:])
