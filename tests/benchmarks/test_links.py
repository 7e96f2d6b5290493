"""An emulated link is what was asked for, is measured, and is gone afterwards, however its user ends."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import links
from benchmarks.links import Link, NoLink, joined
from twolevel.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def allowed() -> None:
    reason = links.why_not()
    if reason:
        pytest.skip(reason)


def ended(pid: int, seconds: float = 20) -> bool:
    """Whether a process ends within that time; it may be any process, not only a child."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        return bool(poll.poll(1e3 * seconds))
    finally:
        os.close(watched)


@pytest.mark.parametrize(
    ("text", "link"),
    [("100mbit", Link(100)), ("1gbit", Link(1000)), ("2.5gbit+0.5ms", Link(2500, 0.5))],
)
def test_a_link_is_named_by_rate_and_delay(text, link):
    assert Link.parse(text) == link


@pytest.mark.parametrize("text", ["fast", "0mbit", "100", "1gbit+2", "-1gbit", ""])
def test_a_link_that_makes_no_sense_is_refused(text):
    with pytest.raises(
        UserError, match=rf"'{text.replace('+', '.')}' is no link; use a rate such as 100mbit"
    ):
        Link.parse(text)


def test_a_link_is_no_faster_than_asked_for(allowed):
    """An upper bound, which no load of the machine breaks; 1.02 for the burst before the rate takes hold."""
    with joined(Link(100)) as nodes:
        found = nodes.measure(seconds=0.2)
    assert 0 < found["measured_mbit"] <= 1.02 * 100
    assert found["share_of_rate"] == pytest.approx(found["measured_mbit"] / 100)
    assert found["round_trip_us"] > 0
    assert found["probe_bytes"] == 2_500_000


def test_a_delay_is_added_or_refused_by_name(allowed):
    try:
        with joined(Link(100, delay_ms=5)) as nodes:
            assert nodes.measure(seconds=0.05)["round_trip_us"] >= 2 * 5000  # each way
    except NoLink as error:
        assert "no emulated delay of 5 ms: this kernel has no netem" in str(error)


def test_each_node_has_its_own_end_and_nothing_else_of_this_machine(allowed):
    with joined(Link(1000)) as nodes:
        for node, address in enumerate(links.ADDRESSES):
            interfaces = subprocess.check_output(nodes.command(node, ["ip", "-o", "addr"]), text=True)
            assert {line.split()[1] for line in interfaces.splitlines()} == {"lo", links.INTERFACE}
            assert f"{address}/30" in interfaces
    assert links.INTERFACE not in os.listdir("/sys/class/net")


def test_links_do_not_meet(allowed):
    """Two at once, with the same names and addresses."""
    with joined(Link(1000)) as one, joined(Link(100)) as other:
        assert len({*one.pids, *other.pids}) == 4
        assert one.measure(seconds=0.05)["rate_mbit"] == 1000


def test_nothing_is_left_of_a_link_whose_user_fails(allowed):
    with pytest.raises(ZeroDivisionError), joined(Link(1000)) as nodes:
        raise ZeroDivisionError
    assert all(ended(pid, 0) for pid in nodes.pids)


def test_nothing_is_left_of_a_link_whose_user_is_killed(allowed):
    body = (
        "import signal\n"
        "from benchmarks.links import *\n"
        "with joined(Link(1000)) as nodes:\n"
        "    print(*nodes.pids, flush=True)\n"
        "    signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", body], cwd=ROOT, stdout=subprocess.PIPE, text=True) as user:
        pids = [int(pid) for pid in user.stdout.readline().split()]
        user.send_signal(signal.SIGKILL)
    assert len(pids) == 2
    assert all(ended(pid) for pid in pids)


def test_ranks_are_told_where_the_first_is_and_who_shares_their_node():
    nodes = links.Nodes(Link(1000), (1, 2))
    told = [nodes.environment(rank, 4) for rank in range(4)]
    assert [(e["RANK"], e["LOCAL_RANK"], e["LOCAL_WORLD_SIZE"], e["WORLD_SIZE"]) for e in told] == [
        (str(rank), str(rank % 2), "2", "4") for rank in range(4)
    ]
    assert [nodes.node_of(rank, 4) for rank in range(4)] == [0, 0, 1, 1]
    assert {e["MASTER_ADDR"] for e in told} == {links.ADDRESSES[0]}
    assert {e["GLOO_SOCKET_IFNAME"] for e in told} == {links.INTERFACE}
    with pytest.raises(UserError, match="3 ranks do not spread over 2 nodes; use an even number"):
        nodes.environment(0, 3)


def test_a_machine_without_the_tools_says_which(monkeypatch):
    monkeypatch.setattr(links, "TOOLS", ("unshare", "no-such-tool"))
    if not links.shutil.which("unshare"):
        pytest.skip("no unshare here")
    assert links.why_not() == "no emulated link: no-such-tool not found; install util-linux and iproute2"


def test_a_machine_that_forbids_namespaces_says_so(monkeypatch, tmp_path):
    forbidding = tmp_path / "unshare"
    forbidding.write_text("#!/bin/sh\necho 'unshare failed: Operation not permitted' >&2\nexit 1\n")
    forbidding.chmod(0o755)
    for tool in ("nsenter", "ip", "tc"):
        (tmp_path / tool).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert links.why_not() == (
        "no emulated link: network namespaces are not allowed here "
        "(unshare failed: Operation not permitted); try as root"
    )
