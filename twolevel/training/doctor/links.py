"""The ranks beside each other: what their link takes, and which of them is slow or has another clock."""

import socket
import statistics
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from twolevel.analysis.planner import presets
from twolevel.analysis.planner.calibrate_links import SIZES, measure_link
from twolevel.analysis.planner.command import find_machine
from twolevel.analysis.planner.machine import Link, Machine
from twolevel.distributed.agreement import all_gather, together
from twolevel.distributed.environment import World
from twolevel.distributed.mesh import init_mesh
from twolevel.distributed.mpi_axis import MPIAxis, exchange_of
from twolevel.ops.store import cache_folder
from twolevel.settings import Carrier
from twolevel.training.doctor.finding import Finding, gather, naming, ok, warning

# How much slower than assumed, or than the other ranks, is worth a word; of a rank's own speed, as all wait for it.
FAR, SLOW_RANK = 3.0, 2.0
# A second or two on the links that the presets know: more bytes where GPUs are, whose links are faster.
GPU_SIZES, TURNS = (1 << 10, 1 << 20, 1 << 23), 5
PAIR_BYTES = 1 << 20
COMPUTE_SECONDS = 0.5  # many times as long as another process holds a core
CLOCK_SECONDS, CLOCK_TURNS = 1.0, 5
# What a GPU's name holds, and the preset of it.
GPUS = {"H200": "h200", "H100": "h100", "A100": "a100-80", "V100": "v100", "TITAN RTX": "titan-rtx"}
GPUS |= {"RTX 4090": "rtx-4090"}


def check_link(world: World, machine: str | None, exchange: Carrier) -> Iterator[Finding]:
    """An all-gather between all ranks, by what would carry it in a run (`exchange`), beside what the planner assumes.

    Every rank calls this.
    """
    with together():
        assumed = assumed_link(world, machine)
    axis = exchange_of(init_mesh(device=world.device.type), exchange)
    carrier = "MPI" if isinstance(axis, MPIAxis) else world.backend
    sizes = GPU_SIZES if world.device.type == "cuda" else SIZES
    found = measure_link(axis, world.device, carrier, sizes=sizes, turns=TURNS)
    yield from compare(found, assumed, one_machine=world.local_size == world.size)


def compare(found: Link, assumed: Link, *, one_machine: bool) -> Iterator[Finding]:
    """What was measured of a link beside what is assumed of it."""
    says = f"{assumed.name}: {assumed.source or 'given'}"
    latency = f"{found.latency * 1e6:.0f} us a step of an all-gather by {found.name}"
    latency += f", assumed {assumed.latency * 1e6:.0f} us"
    rate = f"{found.bandwidth / 1e9:.2f} GB/s in an all-gather, assumed {assumed.bandwidth / 1e9:.2f} GB/s"
    for what, text, slower in (
        ("latency", latency, found.latency / assumed.latency),
        ("bandwidth", rate, assumed.bandwidth / found.bandwidth),
    ):
        if slower < FAR:
            yield ok(what, f"{text} ({says})")
            continue
        network = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the fast network between the machines"
        advice = "see what else runs on its cores" if one_machine else f"see that {network}"
        yield warning(what, f"{text} ({says}), {slower:.1f} times slower", advice)


def assumed_link(world: World, machine: str | None) -> Link:
    """The planner's link between these ranks: of the machine named, of one measured here, or of a preset."""
    between = world.local_size < world.size
    known = _calibrated(world) if machine is None else find_machine(machine)
    if known is not None:
        return known.internode if between else known.link
    if "nccl" not in world.backend:
        return presets.link("ethernet-10g" if between else "loopback")
    name = torch.cuda.get_device_properties(world.device).name.upper()
    preset = next((preset for part, preset in GPUS.items() if part in name), None)
    if between:
        return presets.link(presets.USUAL_INTERNODE)
    return presets.link(presets.USUAL_LINK[preset] if preset else "pcie3")


def _calibrated(world: World) -> Machine | None:
    """What `plan --calibrate` measured last on such devices, if it measured the link that is between these ranks."""
    files = cache_folder().glob(f"machine-{world.device.type}-*.json")
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        machine = Machine.load(path)
        link = machine.internode if world.local_size < world.size else machine.link
        if link.source.startswith("measured"):
            return machine
    return None


# ---- one of them slower than the others


def check_speed(world: World) -> Iterator[Finding]:
    """The same computation on every rank at once. Every rank calls this."""
    all_gather(None)  # together
    reports = gather(lambda: {"host": socket.gethostname(), "seconds": compute_seconds(world.device)})
    seconds, hosts = [r["seconds"] for r in reports], [r["host"] for r in reports]
    usual = statistics.median_low(seconds)
    found = f"{usual * 1e3:.1f} ms for a matrix product on the median rank"
    slow = [rank for rank, own in enumerate(seconds) if own > SLOW_RANK * usual]
    if not slow:
        yield ok("speed of a rank", f"{found}, {max(seconds) * 1e3:.1f} ms on the slowest")
    for rank in slow:
        yield warning(
            "speed of a rank",
            f"{naming([rank], hosts)} takes {seconds[rank] * 1e3:.1f} ms, {seconds[rank] / usual:.1f} times the median",
            "all ranks wait for the slowest: see what else runs there, or whether it is throttled",
        )


def compute_seconds(device: torch.device) -> float:
    """The median time of a matrix product."""
    number = 4096 if device.type == "cuda" else 384
    a = torch.ones(number, number, device=device)
    times: list[float] = []
    while len(times) < 12 or sum(times) < COMPUTE_SECONDS:
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def check_pairs(world: World) -> Iterator[Finding]:
    """Messages between ranks that follow each other. Every rank calls this."""
    mine: dict[str, float] = {}
    for pairs in rounds(world.size):
        all_gather(None)  # together
        for pair in pairs:
            if world.rank in pair:
                seconds = pair_seconds(world, *pair)
                if world.rank == pair[0]:
                    mine[f"{pair[0]} {pair[1]}"] = seconds
    reports = gather(lambda: {"host": socket.gethostname(), "pairs": mine})
    seconds = {tuple(map(int, name.split())): value for r in reports for name, value in r["pairs"].items()}
    yield slow_links(seconds, [report["host"] for report in reports])


def rounds(ranks: int) -> list[list[tuple[int, int]]]:
    """The pairs of a ring, (rank, next), in rounds in which no rank is in two."""
    pairs = [(rank, (rank + 1) % ranks) for rank in range(ranks if ranks > 2 else 1)]
    last = [pairs.pop()] if len(pairs) % 2 and len(pairs) > 1 else []
    return [each for each in (pairs[::2], pairs[1::2], last) if each]


def pair_seconds(world: World, one: int, other: int) -> float:
    """The median time of a message there and back."""
    device = world.device if "nccl" in world.backend else "cpu"  # Gloo sends no tensors of GPUs
    message = torch.zeros(PAIR_BYTES // 4, device=device)
    times = []
    for _ in range(TURNS + 1):
        start = time.perf_counter()
        if world.rank == one:
            dist.send(message, other)
            dist.recv(message, other)
        else:
            dist.recv(message, one)
            dist.send(message, one)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def slow_links(seconds: dict[tuple[int, ...], float], hosts: list[str]) -> Finding:
    """The rank all of whose messages are slow beside those of others, else the pair."""
    what, usual = "pairs of ranks", statistics.median_low(seconds.values())
    found = f"{PAIR_BYTES >> 20} MiB there and back takes {usual * 1e3:.1f} ms"
    slow: list[tuple[tuple[int, ...], float]] = []
    for rank in range(len(hosts)):
        own = [value for pair, value in seconds.items() if rank in pair]
        others = [value for pair, value in seconds.items() if rank not in pair]
        if others and len(own) > 1 and min(own) > FAR * statistics.median(others):
            slow.append(((rank,), min(own)))
    named = {rank for (rank,), _ in slow}
    for pair, value in seconds.items():
        others = [other for second, other in seconds.items() if second != pair]
        if others and not named & {*pair} and value > FAR * statistics.median(others):
            slow.append((pair, value))
    if not slow:
        most = max(seconds.values())
        return ok(what, f"{found} between neighbours, {most * 1e3:.1f} ms between the slowest")
    worst = "; ".join(f"{naming(ranks, hosts)} {value * 1e3:.1f} ms" for ranks, value in slow)
    return warning(
        what, f"{found} between neighbours, but {worst}", "see the cable, port or load of that machine"
    )


# ---- clocks


def check_clocks() -> Iterator[Finding]:
    """The time of day on each rank beside that of rank 0, when both leave a collective. Every rank calls this."""
    turns: list[list[float]] = []
    for _ in range(CLOCK_TURNS):
        all_gather(None)  # together
        turns.append(all_gather(now()))
    hosts = all_gather(socket.gethostname())
    offsets = [statistics.median(turn[rank] - turn[0] for turn in turns) for rank in range(len(hosts))]
    off = [rank for rank, offset in enumerate(offsets) if abs(offset) > CLOCK_SECONDS]
    if not off:
        most = max(map(abs, offsets))
        yield ok("clocks", f"within {max(1, round(most * 1e3))} ms of rank 0's")
    for host in dict.fromkeys(hosts[rank] for rank in off):
        ranks = [rank for rank in off if hosts[rank] == host]
        yield warning(
            "clocks",
            f"{naming(ranks, hosts)}: {offsets[ranks[0]]:+.1f} s beside rank 0",
            "times in logs and of files cannot be compared: synchronise the clocks (chrony or ntpd)",
        )


def now() -> float:
    return time.time()
