"""Facts of the machine that this process runs on (imports no torch)."""

import os
import platform
from pathlib import Path


def usable_cores() -> list[int]:
    """The processor cores that this process may use, by number."""
    bound = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return bound or list(range(os.cpu_count() or 1))


def process_memory(field: str) -> int | None:
    """VmRSS, the resident bytes of this process, or VmHWM, the most so far; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(found[0]) if found else None


def processor() -> str:
    """The model of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
