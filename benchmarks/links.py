"""Two nodes on one machine, joined by a link of chosen speed: what a network costs, without one.

    node 0: namespace             node 1: namespace
    10.77.0.1  link0 ===veth=== link0  10.77.0.2
               tc tbf: rate     tc tbf: rate          each way; netem adds the delay where the kernel has it

A namespace lives as long as the process that holds it, a `cat` that ends when the pipe to its parent closes: so
nothing is left behind, however the parent ends, and nothing in them has a name that another process could
take. Root is needed, and `unshare`, `nsenter`, `ip` and `tc`.

    with joined(Link.parse("100mbit")) as nodes:
        nodes.measure()                                what the link gives a plain socket
        Popen(nodes.command(0, argv), env=... | nodes.environment(rank=0, ranks=2))
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from twolevel.errors import UserError

NODES = 2
INTERFACE = "link0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29500  # free: nothing else runs in the namespaces
TOOLS = ("unshare", "nsenter", "ip", "tc")
MTU = 1500
CONGESTION_CONTROL = "cubic"
ENOUGH_S = 60  # for what takes milliseconds; measuring takes seconds

# Packets are let through in bursts of what passes in this time, or of three packets. A longer burst, after the
# pause before an exchange, would let a good part of a message of 100 kB pass at no cost.
BURST_S = 50e-6
# A queue so long that nothing is dropped: senders are held back by their own socket's limits, as by a real card.
QUEUE_S = 0.2


class NoLink(UserError):
    """This machine cannot make the link, and why."""


@dataclass(frozen=True)
class Link:
    """Bits per second each way, in millions, and milliseconds added each way."""

    rate_mbit: float
    delay_ms: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Link":
        """ "1gbit", "100mbit", "1gbit+2ms": rate, and delay each way. Raises UserError for anything else."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([mg])bit(?:\+(\d+(?:\.\d+)?)ms)?", text)
        if not match or not float(match[1]):
            raise UserError(f"{text!r} is no link; use a rate such as 100mbit or 1gbit, or 1gbit+2ms")
        return cls(float(match[1]) * {"m": 1, "g": 1000}[match[2]], float(match[3] or 0))

    @property
    def bytes_per_second(self) -> float:
        return self.rate_mbit * 1e6 / 8


@dataclass(frozen=True)
class Nodes:
    """Two namespaces that are joined: `pids` are of the processes that hold them."""

    link: Link
    pids: tuple[int, int]

    def command(self, node: int, argv: list[str]) -> list[str]:
        """The command line that runs `argv` on `node`."""
        return ["nsenter", f"--net=/proc/{self.pids[node]}/ns/net", *argv]

    def node_of(self, rank: int, ranks: int) -> int:
        """The first half of the ranks is on node 0. Raises UserError for an odd number of ranks."""
        if ranks % NODES:
            raise UserError(f"{ranks} ranks do not spread over {NODES} nodes; use an even number")
        return rank * NODES // ranks

    def environment(self, rank: int, ranks: int) -> dict[str, str]:
        """What torchrun would set for this rank, and the interface for Gloo."""
        node, local = self.node_of(rank, ranks), ranks // NODES
        values = {
            "RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_RANK": rank - node * local,
            "LOCAL_WORLD_SIZE": local,
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": PORT,
            "GLOO_SOCKET_IFNAME": INTERFACE,
        }
        return {name: str(value) for name, value in values.items()}

    def measure(self, seconds: float = 0.5) -> dict:
        """What a plain TCP socket gets: bytes per second one way, round trip of one byte, and how that was found."""
        number = int(self.link.bytes_per_second * seconds)
        probe = [sys.executable, "-m", "benchmarks.socket_probe"]
        root = Path(__file__).parents[1]
        server = subprocess.Popen(
            self.command(0, [*probe, "serve", ADDRESSES[0]]), stdout=subprocess.PIPE, text=True, cwd=root
        )
        with server:
            try:
                port = server.stdout.readline().strip()
                found = json.loads(
                    _run(self.command(1, [*probe, "ask", ADDRESSES[0], port, str(number)]), cwd=root)
                )
            finally:
                server.kill()
        mbit = found["bytes_per_second"] * 8e-6
        facts = {"measured_mbit": mbit, "share_of_rate": mbit / self.link.rate_mbit}
        return asdict(self.link) | found | facts | {"congestion_control": CONGESTION_CONTROL}


@contextmanager
def joined(link: Link) -> Iterator[Nodes]:
    """Two nodes joined by `link`, for the time of the body.

    Raises NoLink where the machine does not allow it or its kernel has no netem for a delay.
    """
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise NoLink(f"no emulated link: {', '.join(missing)} not found; install util-linux and iproute2")
    with ExitStack() as stack:
        pids = tuple(stack.enter_context(_namespace()) for _ in range(NODES))
        nodes = Nodes(link, pids)
        try:
            _run(
                nodes.command(
                    0, _ip("link add", INTERFACE, "type veth peer name", INTERFACE, f"netns {pids[1]}")
                )
            )
            for node in range(NODES):
                _set_up(nodes, node)
        except subprocess.CalledProcessError as error:
            raise NoLink(f"no emulated link: {_reason(error)}") from error
        yield nodes


def why_not() -> str | None:
    """Why no link can be made here; None where one can."""
    try:
        with joined(Link(1000)):
            return None
    except NoLink as error:
        return str(error)


@contextmanager
def _namespace() -> Iterator[int]:
    """A network namespace; the process that holds it."""
    pipe = subprocess.PIPE
    command = ["unshare", "--net", "cat"]
    with subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe) as holder:
        try:
            with suppress(BrokenPipeError):  # it has ended already, and says why
                holder.stdin.write(b"\n")
            if not holder.stdout.readline():  # `cat` echoes once the namespace is there
                why = holder.stderr.read().decode().strip()
                raise NoLink(
                    f"no emulated link: network namespaces are not allowed here ({why}); try as root"
                )
            yield holder.pid
        finally:
            holder.kill()


def _set_up(nodes: Nodes, node: int) -> None:
    """Bring the interface of one node up and slow it down."""
    link = nodes.link

    def inside(command: list[str]) -> str:
        return _run(nodes.command(node, command))

    inside(_ip("link set lo up"))
    inside(_ip("addr add", f"{ADDRESSES[node]}/30 dev", INTERFACE))
    inside(_ip("link set", INTERFACE, f"mtu {MTU} up"))
    burst = max(3 * MTU, int(link.bytes_per_second * BURST_S))
    limit = int(link.bytes_per_second * (QUEUE_S + link.delay_ms / 1e3)) + burst
    rate = f"rate {link.rate_mbit * 1e6:.0f}bit burst {burst} limit {limit}"
    inside(["tc", *f"qdisc add dev {INTERFACE} root handle 1: tbf {rate}".split()])
    if link.delay_ms:
        delay = f"qdisc add dev {INTERFACE} parent 1:1 handle 10: netem delay {link.delay_ms}ms limit 1000000"
        try:
            inside(["tc", *delay.split()])
        except subprocess.CalledProcessError as error:
            raise NoLink(
                f"no emulated delay of {link.delay_ms:g} ms: this kernel has no netem ({_reason(error)}); "
                "leave the delay out"
            ) from error
    # The one that most systems have. Of others, bbr sends almost nothing now and then, to look for the shortest
    # round trip, and that would fall on some steps and not on others. Set by route: a namespace may not set its
    # own default to one that the machine restricts.
    network = f"{ADDRESSES[0].rpartition('.')[0]}.0/30"
    inside(_ip("route change", network, "dev", INTERFACE, "congctl", CONGESTION_CONTROL))


def _ip(*words: str) -> list[str]:
    return ["ip", *" ".join(words).split()]


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ENOUGH_S, cwd=cwd)
    return done.stdout


def _reason(error: subprocess.CalledProcessError) -> str:
    lines = error.stderr.strip().splitlines()
    return lines[-1] if lines else f"{error.cmd} failed with status {error.returncode}"
