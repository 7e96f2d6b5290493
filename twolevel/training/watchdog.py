"""A rank that stops answering is named, and ranks that have drifted apart, while the others wait in a collective.

Each rank gives a sign of life through the store at which the ranks met: a number that rises, where it is, and its
last fingerprints. Two threads do it, since a store that cannot be reached answers no more than a rank does:

    the messenger   every BEAT seconds: write the own sign, read those of all ranks
    the judge       every BEAT seconds: which sign is older than `silence`? is the messenger? do fingerprints differ?

What the judge finds ends the process, whose main thread may wait in a collective for ever: one line says why, and the
run goes on from its newest checkpoint.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# torch.distributed documents it, and its type hints leave it out.
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from twolevel.errors import LOST_RANK
from twolevel.training.fingerprint import difference

BEAT = 1.0
RANKS_A_BEAT = 64  # of more ranks each reads the signs of all less often: the store has one thread
KEPT = 4  # fingerprints of a rank: ranks are this many apart at most


@dataclass
class Sign:
    """A sign of life, as it is sent."""

    number: int = -1
    host: str = ""
    pid: int = 0
    where: str = ""
    since: float = 0.0
    """For how long it had been there, in seconds, when it said so."""
    waits: bool = False
    """Whether it is in a collective."""
    prints: dict[str, dict[str, int]] = field(default_factory=dict)
    done: bool = False

    def __str__(self) -> str:
        return f"({self.host}, process {self.pid})"


class Watchdog:
    """Watches the other ranks for as long as the context lasts; `whereabouts` says where this one is.

    `silence` is the number of seconds after which a rank without a sign of life is lost, `patience` that after which
    one is that gives signs, but keeps others waiting in a collective. `end` is called with the line that says so and
    the last signs of lost ranks; unless given it ends the process, and lost ones on the same machine.
    """

    def __init__(
        self,
        store: Store,
        mesh_shape: tuple[int, int],
        whereabouts: Callable[[], Any],
        *,
        silence: float,
        patience: float,
        end: Callable[[str, list[Sign]], None] | None = None,
    ):
        self.ranks = dist.get_world_size()
        self.mesh_shape, self.whereabouts = mesh_shape, whereabouts
        self.silence, self.patience, self.end = silence, patience, end or _end
        self.beat = BEAT * max(1, self.ranks // RANKS_A_BEAT)
        self.own, self.own_key = Sign(host=socket.gethostname(), pid=os.getpid()), f"sign {dist.get_rank()}"
        self.signs = [Sign() for _ in range(self.ranks)]
        self.store = store.clone()  # a connection of its own
        self.store.set_timeout(timedelta(seconds=silence))
        self.lost: list[Sign] = []
        self._done = threading.Event()

    def __enter__(self) -> "Watchdog":
        # When the store last answered, when each sign last changed, and since when this rank is where it is.
        self.reached = self._there_since = time.monotonic()
        self.changed = [self.reached] * self.ranks
        self._threads = [
            threading.Thread(target=each, name=f"twolevel {each.__name__}", daemon=True)
            for each in (self._messenger, self._judge)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._threads[1].join()
        self._threads[0].join(2 * BEAT)  # it may be waiting for the store

    def leave_fingerprint(self, step: int, numbers: dict[str, int]) -> None:
        """What the others compare with their own of the same step."""
        kept = [*self.own.prints.items(), (str(step), numbers)][-KEPT:]
        self.own.prints = dict(kept)

    def _messenger(self) -> None:
        keys = [f"sign {rank}" for rank in range(self.ranks)]
        try:
            self._send()
            while not self._done.wait(self.beat):
                self._send()
                texts, now = self.store.multi_get(keys), time.monotonic()
                for rank, sign in enumerate(Sign(**json.loads(text)) for text in texts):
                    if sign.number != self.signs[rank].number:
                        self.signs[rank], self.changed[rank] = sign, now
                self.reached = now
            self._send()
        except RuntimeError:
            pass  # the judge sees that it has stopped

    def _send(self) -> None:
        own, here, now = self.own, self.whereabouts(), time.monotonic()
        if str(here) != own.where:
            self._there_since = now
        own.number += 1
        own.where, own.waits, own.since = str(here), here.collective is not None, now - self._there_since
        own.done = self._done.is_set()
        self.store.set(self.own_key, json.dumps(vars(own)))

    def _judge(self) -> None:
        while not self._done.wait(BEAT):
            verdict = self._verdict(time.monotonic())
            if verdict is not None and not self._done.is_set():
                self.end(verdict, self.lost)
                return

    def _verdict(self, now: float) -> str | None:
        here = self.whereabouts()
        if now - self.reached > self.silence:
            return (
                f"no answer from the store of rank 0 for {now - self.reached:.0f} s: its machine, or the network "
                f"between, is lost; this rank was in {here}"
            )
        silent = [
            rank
            for rank, sign in enumerate(self.signs)
            if self.reached - self.changed[rank] > self.silence and not sign.done
        ]
        if silent:
            self.lost = [self.signs[rank] for rank in silent]
            named = " and ".join(f"rank {rank} {self.signs[rank]}" for rank in silent[:3])
            more = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
            return f"no sign of {named}{more} for {self.silence:.0f} s; this rank waits in {here}"
        late = [rank for rank, sign in enumerate(self.signs) if sign.since > self.patience and not sign.waits]
        if late and here.collective is not None and self.own.where == str(here):
            sign = self.signs[late[0]]
            return (
                f"rank {late[0]} {sign} has been in {sign.where} for {sign.since:.0f} s, and this rank waits for it "
                f"in {here}"
            )
        return self._differences()

    def _differences(self) -> str | None:
        steps = set.intersection(*({*sign.prints} for sign in self.signs))
        for step in sorted(steps, key=int):
            found = difference([sign.prints[step] for sign in self.signs], self.mesh_shape)
            if found is not None:
                return f"after step {step} {found}: the run cannot be right from there on; it is stopped"
        return None


def _end(line: str, lost: list[Sign]) -> None:
    rank = f"[rank {dist.get_rank()}] " if dist.is_initialized() else ""
    print(f"{rank}twolevel train: {line}; go on with --resume", file=sys.stderr, flush=True)
    for sign in lost:
        # A launcher waits for half a minute before it does so, and begins anew after that.
        if sign.host == socket.gethostname():
            with contextlib.suppress(OSError):
                os.kill(sign.pid, signal.SIGKILL)
    os._exit(LOST_RANK)
