"""The tests that need a card, in several processes at once: most of their time is the compilation of kernels.

python -m benchmarks.gpu.parity --output FILE
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import report
from benchmarks.gpu.runner import ROOT

# How a file of tests asks whether there is a card.
ASKS = "torch.cuda.is_available()"
# Runs the kernels in Triton's interpreter, which takes minutes and needs no card.
ELSEWHERE = ("test_everything_in_the_interpreter",)


@dataclass
class Settings:
    """Run the tests that need a card and record what they say."""

    output: Path
    """file to write"""

    processes: int = os.cpu_count() or 1
    """processes among which the tests are shared out"""


def files() -> list[Path]:
    """The files of tests that ask for a card."""
    return [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if ASKS in path.read_text()]


def collected(paths: list[Path]) -> list[str]:
    """The tests in some files, by the names that pytest gives them."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--collect-only", *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    if done.returncode or not names:
        sys.exit(f"benchmarks: the tests cannot be collected: {(done.stdout + done.stderr).strip()[-500:]}")
    return [name for name in names if not any(part in name for part in ELSEWHERE)]


def run(names: list[str], processes: int) -> dict[str, Any]:
    """Run some tests, shared out one by one among processes, and count what has become of them."""
    with tempfile.TemporaryDirectory() as folder:
        shares = {Path(folder, f"{i}.xml"): names[i::processes] for i in range(min(processes, len(names)))}
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "pytest", f"--junitxml={file}", *share], cwd=ROOT, text=True
            )
            for file, share in shares.items()
        ]
        for process in started:
            process.wait()
        return counted(list(shares), len(names))


def counted(reports: list[Path], number: int) -> dict[str, Any]:
    """Of JUnit reports on `number` tests: how many passed, were skipped, failed or were never heard of, and why."""
    counts, failed, slowest = Counter(), {}, {}
    for file in reports:
        # Of a process that has crashed there is none.
        for case in ElementTree.parse(file).iter("testcase") if file.exists() else ():
            name = f"{case.get('classname')}::{case.get('name')}"
            slowest[name] = float(case.get("time") or 0)
            bad = next(
                (case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None
            )
            kind = "failed" if bad is not None else "passed" if case.find("skipped") is None else "skipped"
            counts[kind] += 1
            if bad is not None:
                failed[name] = (bad.get("message") or "").partition("\n")[0]
    counts["lost"] = number - counts.total()
    slowest = dict(sorted(slowest.items(), key=lambda item: -item[1])[:10])
    return {"tests": number, **counts, "failures": failed, "slowest_s": slowest}


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "gpu", argv)
    facts, began = report.machine("cuda"), time.perf_counter()
    found = run(collected(files()), settings.processes)
    found["seconds"] = time.perf_counter() - began
    report.save(settings.output, "python -m benchmarks.gpu.parity", facts, asdict(settings), found)
    passed, bad = found.get("passed", 0), found.get("failed", 0) + found["lost"]
    print(f"{passed} of {found['tests']} tests passed, {found.get('skipped', 0)} were skipped")
    if bad:
        for name, why in found["failures"].items():
            print(f"{name}: {why}")
        sys.exit(
            f"benchmarks: {bad} of {found['tests']} tests failed: {', '.join(found['failures']) or 'lost'}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
