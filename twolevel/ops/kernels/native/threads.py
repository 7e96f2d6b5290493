"""Work shared out among threads: those that torch's own operations run on.

OpenMP keeps the threads of a finished operation spinning for some milliseconds, as the next one may need them. Threads
of our own would find no free core beside them. So the parts are run by the OpenMP that torch has loaded, by a call that
every OpenMP library on Linux exports for code that GCC compiled. Where there is none, or in a forked process, whose
copy of it has lost its threads, the parts run on threads of Python.
"""

import ctypes
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

Part = Callable[[int], int]

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PROCESS = os.getpid()


class OpenMP(NamedTuple):
    """Of an OpenMP library: run a function on a team of threads; this thread's number, and the size of its team."""

    parallel: Callable[..., None]
    number: Callable[[], int]
    size: Callable[[], int]


def run(call: Part, parts: int) -> list[int]:
    """What `call(part)` returns for each part, all at once."""
    if parts == 1:
        return [call(0)]
    library = openmp() if os.getpid() == _PROCESS else None
    return _by_pool(call, parts) if library is None else _by_openmp(library, call, parts)


def _by_openmp(library: OpenMP, call: Part, parts: int) -> list[int]:
    found: list[int | BaseException] = [0] * parts

    def body(_: object) -> None:
        # There may be fewer threads than were asked for.
        for part in range(library.number(), parts, library.size()):
            try:
                found[part] = call(part)
            except BaseException as error:  # no exception passes through C
                found[part] = error

    library.parallel(_BODY(body), None, parts, 0)
    results = []
    for one in found:
        if isinstance(one, BaseException):
            raise one
        results.append(one)
    return results


def _by_pool(call: Part, parts: int) -> list[int]:
    # The last part is this thread's own. ctypes releases the GIL during a call.
    others = [_pool(os.getpid(), parts - 1).submit(call, part) for part in range(parts - 1)]
    own = call(parts - 1)
    return [*(other.result() for other in others), own]


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one does not inherit them."""
    return ThreadPoolExecutor(threads, "twolevel")


@cache
def openmp() -> OpenMP | None:
    """The OpenMP library that torch computes with; None where it is unknown."""
    maps = Path("/proc/self/maps")
    if "OpenMP" not in torch.__config__.parallel_info() or not maps.exists():
        return None
    loaded = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if _IS_OPENMP.search(line)}
    of_torch = {path for path in loaded if path.startswith(str(Path(torch.__file__).parent))}
    if len(of_torch or loaded) != 1:
        return None
    library = ctypes.CDLL((of_torch or loaded).pop())
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    if not all(hasattr(library, name) for name in names):
        return None
    parallel, number, size = (getattr(library, name) for name in names)
    parallel.argtypes, parallel.restype = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    number.restype = size.restype = ctypes.c_int
    return OpenMP(parallel, number, size)


_IS_OPENMP = re.compile(r"/lib(g|i)?omp\d*(-[0-9a-f]+)?\.so")
