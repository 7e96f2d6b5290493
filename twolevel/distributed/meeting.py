"""How ranks meet: a store that all of them reach, and in it a place for this meeting alone.

torchrun's store outlives its ranks: it still holds what an earlier round of ranks has written, of another number
perhaps, some of whom never came. So every rank but the first asks by a word of its own, and rank 0 answers it:

    rank r   hello r = WORD     waits for: welcome WORD        PLACE/r = its report
    rank 0   answers every WORD with: welcome WORD = PLACE     until PLACE has all reports

Words of ranks that are gone are answered too, and nobody reads that.
"""

import contextlib
import json
import os
import secrets
import socket
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

# torch.distributed documents them, and its type hints leave them out.
from torch.distributed import HashStore, PrefixStore, Store, TCPStore, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from twolevel.errors import UserError
from twolevel.launchers import LOOPBACK, Ranks, listening, port_of

# Rank 0 looks for the others at first so often, then less and less (seconds).
LOOK_S, LOOK_AT_LEAST_S = 0.005, 0.2


def meet(ranks: Ranks, report: dict, timeout: timedelta) -> tuple[Store, list[dict]]:
    """A store of these ranks and this meeting alone, and every rank's report in the order of ranks.

    Raises:
        UserError: on all ranks if one reports an error.
        RuntimeError, OSError: the ranks do not meet in time.
    """
    shared = _store(ranks, timeout)
    if ranks.rank == 0:
        place = secrets.token_hex(8)
        store = PrefixStore(place, shared)
        store.set("0", json.dumps(report))
        _welcome(shared, place, ranks.world_size, timeout)
    else:
        word = secrets.token_hex(8)
        shared.set(f"hello {ranks.rank}", word)
        store = PrefixStore(_from(shared, f"welcome {word}", 0).decode(), shared)
        store.set(str(ranks.rank), json.dumps(report))
    reports = [json.loads(_from(store, str(rank), rank)) for rank in range(ranks.world_size)]
    # Rank 0 may hold the store, and may be about to fail: it stays until all have read.
    if store.add("readers", 1) == ranks.world_size:
        store.set("all have read", "")
    if ranks.rank == 0:
        store.get("all have read")
    failed = [rank for rank, report in enumerate(reports) if report["error"]]
    if failed:
        first = failed[0]
        prefix = "" if reports[first]["error"] == reports[ranks.rank]["error"] else f"rank {first}: "
        raise UserError(prefix + reports[first]["error"])
    return store, reports


def _from(store: Store, key: str, rank: int) -> bytes:
    """What this rank is to write. Raises TimeoutError, and names it, where it does not."""
    try:
        return store.get(key)
    except RuntimeError as error:
        if "timeout" not in str(error):
            raise
        raise TimeoutError(f"rank {rank} did not come") from error


def _welcome(shared: Store, place: str, world_size: int, timeout: timedelta) -> None:
    """Answer the other ranks until the reports of all are at `place`."""
    store, answered = PrefixStore(place, shared), set()
    missing, until, pause = [*range(1, world_size)], time.monotonic() + timeout.total_seconds(), LOOK_S
    while missing := [rank for rank in missing if not store.check([str(rank)])]:
        for rank in missing:
            if not shared.check([f"hello {rank}"]):
                continue
            word = shared.get(f"hello {rank}").decode()
            if word not in answered:
                shared.set(f"welcome {word}", place)
                answered.add(word)
        if time.monotonic() > until:
            some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise TimeoutError(f"rank{'s' * (len(missing) > 1)} {some} did not come")
        time.sleep(pause)
        pause = min(2 * pause, LOOK_AT_LEAST_S)


def did_not_meet(ranks: Ranks, timeout_s: float, error: Exception) -> str:
    """The message for ranks that did not meet because of `error`."""
    where = f"{ranks.address or 'the address of rank 0'}, port {ranks.port or 'any'}"
    return (
        f"rank {ranks.rank} of {ranks.world_size} did not meet the others at {where}, "
        f"timeout_s={timeout_s:g} ({first_line(error)}); check that all {ranks.world_size} ranks "
        "were started, that MASTER_ADDR is rank 0's machine and MASTER_PORT a free port of it, and "
        "that GLOO_SOCKET_IFNAME, if set, is the network between the machines"
    )


def first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0].rstrip(".")


def prefer_loopback() -> None:
    """Gloo over the loopback interface, unless GLOO_SOCKET_IFNAME says otherwise.

    Left alone, Gloo listens at the address that the machine's own name resolves to. On many a
    laptop, container and CI machine that name does not resolve, or only after a time-out.
    """
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])


# ---- the store -----------------------------------------------------------------------------------


def _store(ranks: Ranks, timeout: timedelta) -> Store:
    """A store that all ranks read and write."""
    if ranks.world_size == 1:
        return HashStore()
    if ranks.launcher == "torchrun":
        url = "env://"  # torch asks there whether torchrun's agent holds the store already
    else:
        if ranks.address is None or ranks.port is None:
            try:
                from mpi4py import MPI  # an extra; and the import calls MPI_Init
            except (ImportError, RuntimeError):  # RuntimeError: mpi4py is here, its MPI is not
                ranks = _without_mpi4py(ranks)
            else:
                return _meet_through_mpi(ranks, MPI.COMM_WORLD, timeout)
        assert ranks.address is not None
        host = f"[{ranks.address}]" if ":" in ranks.address else ranks.address
        url = f"tcp://{host}:{ranks.port}"
    if ranks.rank == 0 and ranks.one_machine and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        with contextlib.suppress(OSError):  # taken, perhaps by this process's last meeting: torch knows
            return on_loopback(listening(ranks.port or 0), timeout)
    store, _, _ = next(rendezvous(url, ranks.rank, ranks.world_size, timeout=timeout))
    store.set_timeout(timeout)
    return store


def on_loopback(listener: socket.socket, timeout: timedelta) -> TCPStore:
    """A store that this process holds, for ranks on this machine."""
    port = listener.getsockname()[1]
    return TCPStore(
        LOOPBACK,
        port,
        None,
        True,
        timeout,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )


def _meet_through_mpi(ranks: Ranks, comm: Any, timeout: timedelta) -> Store:
    """Rank 0 opens a store at a port that is free, and tells the others where."""
    if comm.Get_size() != ranks.world_size:
        raise UserError(
            f"mpirun started {ranks.world_size} ranks but mpi4py sees {comm.Get_size()}: they are "
            "of different MPIs; use one for both, or set MASTER_ADDR and MASTER_PORT for every rank"
        )
    host = ranks.address or (LOOPBACK if ranks.one_machine else socket.gethostname())
    store = error = None
    if ranks.rank == 0:
        try:
            if host == LOOPBACK:
                store = on_loopback(listening(ranks.port or 0), timeout)
            else:
                store = TCPStore(host, ranks.port or 0, None, True, timeout, wait_for_workers=False)
        except (RuntimeError, OSError) as e:  # the others wait for word, good or bad
            error = first_line(e)
    host, port, error = comm.bcast((host, store and store.port, error), root=0)
    if error is not None:
        raise RuntimeError(error)
    return store or TCPStore(host, port, None, False, timeout)


def _without_mpi4py(ranks: Ranks) -> Ranks:
    address, port = ranks.address, ranks.port
    if ranks.one_machine:
        address = address or LOOPBACK
        port = port or (port_of(ranks.job) if ranks.job else None)
    if address is None or port is None:
        raise UserError(
            f"{ranks.world_size} MPI ranks cannot agree where to meet without mpi4py; "
            "pip install twolevel[mpi], or set MASTER_ADDR and MASTER_PORT for every rank"
        )
    return replace(ranks, address=address, port=port)
