"""What a rank hears of the others while it waits for them, and how long it waits: rule 5 of `guard`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._dynamo.callback import callback_handler

from ..distributed.peers import Peers
from .event import Event

TICK = 1.0
"""Seconds between two looks at what others say, at most; an eighth of `guard_timeout` where that is less."""

BEAT = 5.0
"""Seconds between two signs of life, at most; an eighth of `guard_timeout` where that is less."""


SILENT = 15.0
"""Seconds without a sign of life after which a rank is lost, at least: on a busy machine a thread may have to wait."""


class Watch:
    """Called by the thread of a guard, tick by tick."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._looked = self._beaten = self._waiting_since = time.monotonic()
        self._compiled, self._word = False, ""
        self._departures: dict[int, tuple[int, int]] = {}
        """By rank, the event that it last left by an exception, and how many collectives it had launched."""

    def look(self, inside: Event | None, last: Event | None, timeout: float) -> str:
        """Give a sign of life, and look for those of others. Returns the cause of a failure; "" if there is none.

        Args:
            inside: the event that this rank is inside of.
            last: that which it has come to last. What it launched there may still be under way on an accelerator.
            timeout: how late others may be, in seconds.
        """
        before, self._looked = self._looked, time.monotonic()
        if self._looked - before > 4 * min(TICK, timeout / 8) + 1:
            # This process has stood still, by a signal or a debugger: whom it has not heard of may have spoken.
            self._waiting_since = self._looked
            self._peers.forget_silence()
        self._beat(-1 if last is None else last.number, min(BEAT, timeout / 8))
        know_who_compiles()
        if self._peers.flag("failed") is not None or self._needs_departed(inside, last):
            return "told"
        return "" if inside is None else self._overdue(inside)

    def awaits_departed(self, event: Event, index: int) -> bool:
        """Whether the collective of this index in an event is one that some rank will not launch."""
        return any(number == event.number and launched <= index for number, launched in self._departures.values())

    def _beat(self, number: int, period: float) -> None:
        """Once in a period, and when this rank begins or ends to compile."""
        compiles = _tracing.is_set() or _backends > 0
        if compiles != self._compiled or self._looked - self._beaten >= period:
            self._beaten, self._compiled = self._looked, compiles
            self._peers.beat(number, compiles, period)

    def _needs_departed(self, *events: Event | None) -> bool:
        """Whether another rank has left one of these events by an exception, before what this one has launched."""
        word = self._peers.flag("raised")
        if word is not None and word != self._word:
            self._word = word
            heard = self._peers.heard("raised", range(self._peers.size))
            self._departures = {rank: (number, launched) for rank, (number, launched) in heard.items()}
        return any(event is not None and self.awaits_departed(event, event.launched - 1) for event in events)

    def _overdue(self, event: Event) -> str:
        """Whether this rank has waited too long for one that does not come, or that gives no sign of life."""
        now = self._looked
        if now - event.started < min(BEAT, event.timeout / 8):
            return ""
        beats = self._peers.beats().values()
        missing = [beat for beat in beats if beat.number < event.number]
        if not missing or event.agreed or any(beat.compiles for beat in missing):
            self._waiting_since = now
        elif now - max(event.started, self._waiting_since) >= event.timeout:
            return "late"
        silent = any(now - beat.heard >= max(event.timeout, SILENT) + beat.period for beat in beats)
        return "silent" if silent else ""


_tracing = threading.Event()
_backends = 0


@contextmanager
def compiling() -> Iterator[None]:
    """This process compiles. Dynamo tells of most of it, but not right after it was told to forget everything."""
    global _backends
    know_who_compiles()
    _backends += 1
    try:
        yield
    finally:
        _backends -= 1


def know_who_compiles() -> None:
    """Have Dynamo tell when it traces and compiles, backward graphs too; `torch._dynamo.reset` makes it forget."""
    if _starts not in callback_handler.start_callbacks:
        _tracing.clear()
        callback_handler.register_start_callback(_starts)
        callback_handler.register_end_callback(_ends)


def _starts(_: Any) -> None:
    _tracing.set()


def _ends(_: Any) -> None:
    _tracing.clear()
