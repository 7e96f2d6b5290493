"""What a launch of a Triton kernel compiles to for a card that need not be there, read from its machine code.

`triton.compile` with a target in the place of a card, and the ptxas and cuobjdump that come in Triton's wheel, say
all that is here; no CUDA driver is asked.
"""

import importlib.util
import math
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from twolevel.ops.kernels.triton.estimate import REGISTERS, SHARED_KIB
from twolevel.ops.kernels.triton.launches import Launch

# What a processor of such a card has: NVIDIA, "CUDA C++ Programming Guide", technical specifications by compute
# capability.
TARGETS = (80, 90)
WARPS, PROGRAMS = 64, 32
SYSTEM_SHARED_BYTES = 1 << 10  # of every program
REGISTERS_AT_ONCE = 256  # a warp's registers come in such blocks

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)([^;]*);")
_LOADS = ("LDG", "LDGSTS")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


class Instruction(NamedTuple):
    """One line of machine code."""

    address: int
    name: str  # "LDG.E.128"
    operands: str

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def bytes(self) -> int:
        """That a load or store moves for one thread."""
        return next((_WIDTHS[part] for part in self.name.split(".") if part in _WIDTHS), 4)

    @property
    def macs(self) -> int:
        """Multiplications of a warp by a tensor-core instruction; 0 for others."""
        if self.kind == "HGMMA":  # of four warps together
            return math.prod(map(int, re.findall(r"\d+", self.name.split(".")[1]))) // 4
        if self.kind == "HMMA":
            m, n, k = re.fullmatch(r"(16)(8)(\d+)", self.name.split(".")[1]).groups()
            return int(m) * int(n) * int(k)
        return 0

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.kind == "BRA" else None
        return None if found is None else int(found[1], 16)


class Compiled(NamedTuple):
    """The machine code of a launch for one target."""

    launch: Launch
    target: int
    registers: int
    shared_bytes: int
    code: list[Instruction]

    @property
    def spilled_bytes(self) -> int:
        """That a thread writes to local memory and reads from it, counted in the code."""
        return sum(one.bytes for one in self.code if one.kind in ("STL", "LDL"))

    @property
    def products(self) -> list[str]:
        """The kinds of tensor-core instructions."""
        return sorted({one.name for one in self.code if one.macs})

    @property
    def programs_per_processor(self) -> int:
        """As many as registers, shared memory and warps allow at once."""
        warps = self.launch.config.num_warps
        of_a_warp = -(-32 * self.registers // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
        return min(
            REGISTERS // (of_a_warp * warps),
            (SHARED_KIB[divmod(self.target, 10)] << 10) // (self.shared_bytes + SYSTEM_SHARED_BYTES),
            WARPS // warps,
            PROGRAMS,
        )

    def main_loop(self) -> list[Instruction]:
        """The first innermost loop with tensor-core instructions; nothing where it is unrolled to its end."""
        loops = []
        for one in self.code:
            if one.target is not None and one.target < one.address:
                body = [other for other in self.code if one.target <= other.address <= one.address]
                if any(other.macs for other in body):
                    loops.append(body)
        innermost = [a for a in loops if not any(b is not a and set(b) < set(a) for b in loops)]
        return innermost[0] if innermost else []

    @property
    def step_macs(self) -> float:
        """Multiplications of a warp in one step of the launch."""
        config = self.launch.config
        return config.block_pixels * config.block_out * config.block_in / config.num_warps

    def issued(self) -> int:
        """Instructions that a warp executes: those of the main loop as often as the steps ask for, all others once."""
        loop = self.main_loop()
        if not loop:
            return len(self.code)
        outside = macs(self.code) - macs(loop)
        turns = max(0.0, self.launch.steps * self.step_macs - outside) / macs(loop)
        return len(self.code) - len(loop) + round(turns * len(loop))

    def counts(self) -> dict:
        """All that is counted, for a JSON file. `steps` of a loop are tiles that one turn multiplies."""
        loop = self.main_loop()
        return {
            "registers": self.registers,
            "spilled_bytes": self.spilled_bytes,
            "shared_bytes": self.shared_bytes,
            "programs_per_processor": self.programs_per_processor,
            "products": self.products,
            "instructions": len(self.code),
            "issued": self.issued(),
            "loads": loads(self.code),
            "loop": {
                "instructions": len(loop),
                "products": sum(one.macs > 0 for one in loop),
                "steps": max(1, round(macs(loop) / self.step_macs)),
                "loads": loads(loop),
            }
            if loop
            else None,
        }


def macs(code: list[Instruction]) -> int:
    return sum(one.macs for one in code)


def loads(code: list[Instruction]) -> dict[int, int]:
    """How many loads from global memory there are by their bytes a thread, the widest first."""
    found = Counter(one.bytes for one in code if one.kind in _LOADS)
    return dict(sorted(found.items(), reverse=True))


def instructions(listing: str) -> list[Instruction]:
    """Of a listing by cuobjdump, but those that fill up its end."""
    found = _INSTRUCTION.findall(listing)
    return [
        Instruction(int(address, 16), name, operands) for address, name, operands in found if name != "NOP"
    ]


def unavailable() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from triton import knobs

    from twolevel.ops.kernels.triton import kernels

    if kernels.INTERPRETED:
        return "TRITON_INTERPRET=1 is set; without it kernels are compiled"
    for tool in ("ptxas", "cuobjdump"):
        try:
            getattr(knobs.nvidia, tool)
        except RuntimeError:
            return f"this Triton comes without {tool}"
    return None


def versions() -> dict[str, str]:
    """Of what compiles."""
    import triton
    from triton import knobs

    return {"triton": triton.__version__, "ptxas": knobs.nvidia.ptxas.version}


def compiled(launch: Launch, dtype: torch.dtype, target: int) -> Compiled:
    """The launch as it is compiled for `target`, a compute capability: 80 or 90.

    Its arguments are specialised as at a launch: integers of 1 are constants, multiples of 16 are known to be, and
    tensors begin at multiples of 16 bytes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from twolevel.ops.kernels.triton import kernels

    function = getattr(kernels, launch.kernel)
    constants = launch.constants | {name: 1 for name, size in launch.sizes.items() if size == 1}
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        element = "fp32" if name == "partials" else _ELEMENTS[dtype]
        signature[name] = "i32" if name in launch.sizes else f"*{element}"
        if launch.sizes.get(name, 16) % 16 == 0:
            attributes[place,] = [["tt.divisibility", 16]]
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    source = ASTSource(function, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    listing = _listing(made.asm["cubin"])
    found = re.search(r"REG:(\d+)", listing)
    assert found is not None
    return Compiled(launch, target, int(found[1]), made.metadata.shared, instructions(listing))


_ELEMENTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _listing(binary: bytes) -> str:
    """Its resources and machine code as text."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        command = [knobs.nvidia.cuobjdump.path, "-sass", "--dump-resource-usage", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
