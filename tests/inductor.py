"""What generates code for torch.compile unless another backend is named, in a rank of the pool."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

# As in torch._inductor.config, which takes a second to import.
COMPILER = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"no C++ compiler {COMPILER}: install it or set CXX"
)


@contextlib.contextmanager
def fresh_inductor(cache: str) -> Iterator[Callable[[], int]]:
    """Generated code goes to this folder, which ranks share; yields what counts the kernels generated in here."""
    from torch._inductor import config, cpu_vec_isa, metrics

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # the pool puts it back
    metrics.reset()
    # Compiler processes would outlive the test; to find out what the processor can do takes as long as all kernels.
    with config.patch({"compile_threads": 1, "cpp.vec_isa_ok": False}):
        try:
            yield lambda: metrics.generated_kernel_count
        finally:
            torch.compiler.reset()
            cpu_vec_isa.valid_vec_isa_list.cache_clear()
