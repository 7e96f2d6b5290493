"""Machines and links by name: public figures of their makers, and shares of them that convolutions reach."""

from twolevel.analysis.planner.machine import Curve, Link, Machine
from twolevel.errors import unknown

GB = 1e9

# ---- what convolutions reach of the peak, by channels of a group (the narrower of input and output)
#
# bf16 on tensor cores: from training steps on an H200 (torch 2.11, bf16 autocast, channels_last, compiled, batch 128):
# dense WRN-28-10, -40 and -80 took 11.9, 114.9 and 444.9 ms, 640 channels of 32 x 32 reached 725 TFLOP/s alone.
# cuDNN's grouped convolutions: WRN-28-10 with 4 and 16 groups took 18.6 and 33.3 ms.
TENSOR_DENSE: Curve = ((16, 0.02), (64, 0.12), (160, 0.31), (320, 0.45), (640, 0.58), (1280, 0.62))
TENSOR_GROUPED: Curve = (
    (8, 0.004),
    (10, 0.005),
    (20, 0.011),
    (40, 0.057),
    (160, 0.064),
    (640, 0.2),
    (1280, 0.4),
)
# float32: cuDNN takes Winograd's algorithm for 3 x 3, so the share counted in direct multiply-accumulates can exceed 1.
# The only public times here are those of the GC-2L paper (Titan RTX), whose dense networks reach 22 to 35 TFLOP/s of
# the card's 16.3; wide layers were set by its dense WRN-28-40, narrow ones by its one rank of four of the same network.
# Grouped ones are an assumption: no public time says what they reach in float32.
SIMT_DENSE: Curve = ((16, 0.15), (64, 0.45), (160, 0.65), (320, 0.95), (640, 1.6), (1280, 1.75))
SIMT_GROUPED: Curve = ((8, 0.03), (16, 0.06), (40, 0.15), (160, 0.3), (640, 0.8), (1280, 1.2))
DENSE: dict[str, Curve] = {"float32": SIMT_DENSE, "bf16": TENSOR_DENSE}
GROUPED: dict[str, Curve] = {"float32": SIMT_GROUPED, "bf16": TENSOR_GROUPED}


# A matrix product fills a device when every multiprocessor has a tile of its output; 128 x 64 is a usual one.
TILE = 128 * 64


def _gpu(
    name: str,
    source: str,
    *,
    memory: float,
    bandwidth: float,
    multiprocessors: int,
    float32: float,
    bf16: float | None = None,
    representative: float = 0.0,
    fuses: bool = False,
) -> Machine:
    """A machine of GPUs; `memory` in GB, `bandwidth` in GB/s, `float32` and `bf16` in operations/s."""
    return Machine(
        name=name,
        source=source,
        memory=memory * GB,
        flops={"float32": float32} | ({"bf16": bf16} if bf16 else {}),
        bandwidth=bandwidth * GB,
        dense=DENSE,
        grouped=GROUPED,
        saturation=float(multiprocessors * TILE),
        representative=representative,
        fuses=fuses,
    )


_GPUS = [
    # NVIDIA Titan RTX: 24 GB GDDR6, 672 GB/s, 16.3 TFLOP/s float32 (NVIDIA's product page, 2018). No bfloat16.
    _gpu(
        "titan-rtx",
        "NVIDIA product page, 2018",
        memory=24,
        bandwidth=672,
        multiprocessors=72,
        float32=16.3e12,
    ),
    # NVIDIA Tesla V100 SXM2 data sheet: 32 GB HBM2, 900 GB/s, 15.7 TFLOP/s float32. No bfloat16.
    _gpu(
        "v100",
        "NVIDIA V100 data sheet (SXM2, 32 GB)",
        memory=32,
        bandwidth=900,
        multiprocessors=80,
        float32=15.7e12,
    ),
    # NVIDIA A100 data sheet: 312 TFLOP/s bfloat16 dense, 19.5 TFLOP/s float32; 1555 and 2039 GB/s.
    _gpu(
        "a100-40",
        "NVIDIA A100 data sheet (SXM, 40 GB)",
        memory=40,
        bandwidth=1555,
        multiprocessors=108,
        float32=19.5e12,
        bf16=312e12,
    ),
    _gpu(
        "a100-80",
        "NVIDIA A100 data sheet (SXM, 80 GB)",
        memory=80,
        bandwidth=2039,
        multiprocessors=108,
        float32=19.5e12,
        bf16=312e12,
    ),
    # NVIDIA H100 data sheet (SXM): 989 TFLOP/s bfloat16 dense, 67 TFLOP/s float32, 3.35 TB/s.
    _gpu(
        "h100",
        "NVIDIA H100 data sheet (SXM)",
        memory=80,
        bandwidth=3350,
        multiprocessors=132,
        float32=67e12,
        bf16=989e12,
    ),
    # NVIDIA H200 data sheet: as H100, with 141 GB at 4.8 TB/s. `representative`: one rank of 2 or 4 of two-level
    # WRN-28-40 and -80 by stock layers took 15 to 16 ms more than its dense part, whatever the width.
    _gpu(
        "h200",
        "NVIDIA H200 data sheet; shares of the peak from training steps",
        memory=141,
        bandwidth=4800,
        multiprocessors=132,
        float32=67e12,
        bf16=989e12,
        representative=9e-9,
        fuses=True,
    ),
    # NVIDIA Ada whitepaper: RTX 4090 24 GB GDDR6X, 1008 GB/s, 82.6 TFLOP/s float32, 165.2 bfloat16 (float32 sums).
    _gpu(
        "rtx-4090",
        "NVIDIA Ada GPU architecture whitepaper",
        memory=24,
        bandwidth=1008,
        multiprocessors=128,
        float32=82.6e12,
        bf16=165.2e12,
    ),
]
MACHINES: dict[str, Machine] = {machine.name: machine for machine in _GPUS}

# Bandwidths one way, of which collectives reach about the shares that nccl-tests and MPI benchmarks report: 80 % on
# NVLink, PCIe and InfiniBand, 90 % of Ethernet's line rate over TCP. Latencies are of one step of a collective.
# By name: seconds, bytes/s, source.
_LINKS = {
    "nvlink-v100": (8e-6, 0.8 * 150e9, "NVLink 2: 300 GB/s both ways (V100 data sheet)"),
    "nvlink-a100": (6e-6, 0.8 * 300e9, "NVLink 3: 600 GB/s both ways (A100 data sheet)"),
    "nvlink-h100": (5e-6, 0.8 * 450e9, "NVLink 4: 900 GB/s both ways (H100 data sheet)"),
    "pcie3": (1e-5, 0.8 * 15.75e9, "PCI Express 3.0 x16"),
    "pcie4": (1e-5, 0.8 * 31.5e9, "PCI Express 4.0 x16"),
    "infiniband-400g": (5e-6, 0.8 * 50e9, "InfiniBand NDR, 400 Gbit/s"),
    "infiniband-200g": (5e-6, 0.8 * 25e9, "InfiniBand HDR, 200 Gbit/s"),
    "infiniband-8x400g": (5e-6, 0.8 * 400e9, "eight InfiniBand NDR ports a node (DGX H100 data sheet)"),
    "ethernet-100g": (3e-5, 0.9 * 12.5e9, "100 Gbit/s Ethernet, TCP"),
    "ethernet-25g": (3e-5, 0.9 * 3.125e9, "25 Gbit/s Ethernet, TCP"),
    "ethernet-10g": (5e-5, 0.9 * 1.25e9, "10 Gbit/s Ethernet, TCP"),
    "ethernet-1g": (1e-4, 0.9 * 0.125e9, "1 Gbit/s Ethernet, TCP"),
    # Gloo between processes of one machine, where --calibrate was not started on two ranks or more.
    "loopback": (2e-4, 1.5e9, "Gloo over the loopback interface; assumed, not measured"),
}
LINKS: dict[str, Link] = {
    name: Link(name=name, latency=latency, bandwidth=bandwidth, source=source)
    for name, (latency, bandwidth, source) in _LINKS.items()
}
# What a machine has inside a node unless --link says otherwise.
USUAL_LINK = {"titan-rtx": "pcie3", "v100": "nvlink-v100", "a100-40": "nvlink-a100", "a100-80": "nvlink-a100"}
USUAL_LINK |= {"h100": "nvlink-h100", "h200": "nvlink-h100", "rtx-4090": "pcie4"}
USUAL_INTERNODE = "infiniband-200g"


def link(name: str) -> Link:
    """A link by name. Raises UserError for one that is not known."""
    if name not in LINKS:
        raise unknown("link", name, LINKS)
    return LINKS[name]


def machine(name: str) -> Machine:
    """A machine by name with its usual links. Raises UserError for one that is not known."""
    if name not in MACHINES:
        raise unknown("machine", name, MACHINES)
    return MACHINES[name].with_links(link(USUAL_LINK[name]), link(USUAL_INTERNODE), None)
