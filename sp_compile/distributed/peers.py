"""What the ranks of a group hear of each other beside their collectives: numbers on gloo, words in the store.

    gather    a few numbers of every rank, on connections of their own; a rank whose process ends is an error at once
    say       a word of this rank, for whoever asks the store
    beat      a sign of life: how far this rank has come, and whether it compiles

The store is reached by a connection of its own, where it can: one that somebody waits with is busy for as long.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, PrefixStore
from torch.distributed import ProcessGroup

NO_END = timedelta(days=30)
"""Who is late is found by those who wait; gloo would not know who compiles."""

ASK = 0.05
"""Seconds between two looks for a word that is waited for."""


@dataclass
class Beat:
    """The last sign of life of a rank."""

    count: int = -1
    number: int = -1
    compiles: bool = False
    period: float = 0.0
    """Seconds after which the next one is due."""
    heard: float = field(default_factory=time.monotonic)
    """When the count last rose, on the clock of who heard it."""


class Peers:
    """The connections of this rank to the others of a group. `store_answers` turns False when the store has ended."""

    def __init__(self, group: ProcessGroup) -> None:
        self.rank, self.size = dist.get_rank(group), group.size()
        self.ranks = frozenset(dist.get_process_group_ranks(group))
        self.store_answers = True
        self._store: Any = PrefixStore("sp_compile.guard", _connected_anew(group.get_group_store()))
        self._gloo: Any = None
        self._beats = 0
        self._heard = {rank: Beat() for rank in range(self.size) if rank != self.rank}

    def missing(self) -> list[int]:
        """Say that this rank is ready to connect. Returns the ranks that are not."""
        self.raise_flag(f"here/{self.rank}")
        return [rank for rank in range(self.size) if self.flag(f"here/{rank}") is None]

    def connect(self, timeout: float) -> None:
        """Connect to the other ranks, all of which do. Raises RuntimeError after `timeout` seconds."""
        self.beat(-1, False, timeout)
        self._try(lambda: self._store.delete_key(f"account/{self.rank}"))  # of an exception before
        gloo, patience = PrefixStore("connections", self._store), timedelta(seconds=timeout)
        self._gloo = dist.ProcessGroupGloo(gloo, self.rank, self.size, patience)
        self._gloo.barrier().wait()
        # All are connected, and have left the groups before this one.
        self._forget(f"connections/0/{self.rank}")
        for store, key, ranks in _left.copy():
            if ranks <= self.ranks:
                with suppress(RuntimeError):
                    store.delete_key(key)
                _left.remove((store, key, ranks))

    def gather(self, own: Tensor) -> tuple[Any, Tensor] | None:
        """Start to gather a row of each rank. Returns the work to wait for, and what will hold them.

        None: the connections have been closed.
        """
        gloo, options = self._gloo, AllgatherOptions()
        if gloo is None:
            return None
        options.timeout = NO_END
        said = torch.empty(self.size, own.numel(), dtype=own.dtype, device="cpu")
        return gloo._allgather_base(said, own.view(1, -1), options), said

    def say(self, key: str, word: Any) -> None:
        """Leave a word in the store."""
        self._try(lambda: self._store.set(f"{key}/{self.rank}", json.dumps(word)))

    def raise_flag(self, name: str, text: str = "") -> None:
        """Leave a word that is of no rank; `flag` reads it."""
        self._try(lambda: self._store.set(name, text))

    def flag(self, name: str) -> str | None:
        """The text of a flag that some rank has raised; None if none has."""
        text: str | None = self._try(lambda: self._store.get(name).decode() if self._store.check([name]) else None)
        return text

    def heard(self, key: str, ranks: Iterable[int], grace: float = 0.0) -> dict[int, Any]:
        """By rank, what others have said; waits for up to `grace` seconds until all of them have."""
        found: dict[int, Any] = {}
        silent, ends = [rank for rank in ranks if rank != self.rank], time.monotonic() + grace
        while True:
            for rank in silent.copy():
                text = self.flag(f"{key}/{rank}")
                if text is not None:
                    found[rank] = json.loads(text)
                    silent.remove(rank)
            if not silent or not self.store_answers or time.monotonic() >= ends:
                return found
            time.sleep(ASK)

    def beat(self, number: int, compiles: bool, period: float) -> None:
        """Give a sign of life; the next one comes within `period` seconds."""
        self._beats += 1
        self.say("beat", [self._beats, number, compiles, period])

    def beats(self) -> dict[int, Beat]:
        """The last sign of life of each other rank."""
        now = time.monotonic()
        for rank, (count, number, compiles, period) in self.heard("beat", self._heard).items():
            if count != self._heard[rank].count:
                self._heard[rank] = Beat(count, number, compiles, period, now)
        return self._heard

    def forget_silence(self) -> None:
        """This process has stood still itself: whom it has not heard of may have spoken."""
        for beat in self._heard.values():
            beat.heard = time.monotonic()

    def connections(self) -> list[Any]:
        """What would end with this object."""
        return [self._gloo, self._store]

    def close(self) -> None:
        """End the connections, and what anybody waits for on them."""
        gloo, self._gloo = self._gloo, None
        if gloo is not None:
            end_gloo(gloo)

    def leave(self) -> None:
        """Give up the store too, after the last word: a closure that outlives the group would keep its descriptor."""
        if self._store is not None:
            self._forget(f"beat/{self.rank}")
            _left.append((self._store, f"account/{self.rank}", self.ranks))
            self.store_answers, self._store = False, None

    def _forget(self, key: str) -> None:
        self._try(lambda: self._store.delete_key(key))

    def _try(self, ask: Callable[[], Any]) -> Any:
        """None where the store has ended: its process may have ended well, and torch would warn at every try."""
        if self.store_answers:
            try:
                return ask()
            except RuntimeError:
                self.store_answers = False
        return None


def _connected_anew(store: Any) -> Any:
    """A connection of its own to a store; of one that somebody has written in Python, the same."""
    try:
        return store.clone()
    except RuntimeError:
        return store


_left: list[tuple[Any, str, frozenset[int]]] = []
"""Of groups that have ended: some rank may not have read yet why this one left."""


def end_collectives(group: ProcessGroup) -> None:
    """Make what this process waits for in a group fail, there and on the ranks that wait for it. The group is lost."""
    for device in group._device_types:
        backend = group._get_backend(device)
        if isinstance(backend, dist.ProcessGroupGloo):
            end_gloo(backend)
        else:
            backend.abort()


def end_gloo(backend: Any) -> None:
    """`abort` of a gloo group does nothing (torch 2.13). A receive that times out closes all of its connections.

    One from a rank that has closed its own fails at once, and closes nothing: so each of them is asked.
    """
    nothing, others = torch.zeros(1, device="cpu"), set(range(backend.size())) - {backend.rank()}
    for tag, other in itertools.product(range(8), others):  # each network interface has a context, by the tag
        with suppress(RuntimeError):
            backend.recv([nothing], other, tag).wait(timedelta(milliseconds=1))
