"""Ranks that part are told so; they neither wait for each other for ever nor go on with a wrong result.

The ranks of an SP group come to the same *events*, which are numbered, in the same order:

    compile     a graph is about to be compiled     digest of plan, options, shapes and dtypes
    call        a compiled graph is called          digest of graph, shapes, dtypes, integers; samples of other inputs
    backward    its backward runs                   digest of graph
    exchange    a collective outside of all these   digest of its kind and sizes (backward of inner backend "eager")
    raised      an exception left one of these      digest of that event, the exception's type, collectives launched

The protocol is five rules.

1. *Tell, then go on.* Where an event begins, a rank starts to gather a digest and samples of all ranks, on gloo
   connections of the guard's own, and goes on with its work.
2. *No collective before agreement.* The first collective of an event waits until all ranks have come to the event and
   say the same of it (`gate`): a collective of an event meets those of the same event only. It would have to wait for
   the others anyway. What launches no collective waits at its end. So nothing is returned of which ranks disagree.
3. *Who leaves by an exception says so.* It leaves word in the store, of how many collectives it had launched, and goes
   on to the event "raised". Whoever needs one collective more of it fails; whoever does not has had all of it. Where
   all ranks raise alike, after as many collectives, they agree on "raised", and the group is as good as before.
4. *A failure is final, and everybody's.* Who finds one leaves word, ends the collectives of the group that this and
   other ranks wait in, and closes its connections. Each rank leaves in the store where it is and why, reads what the
   others left, and raises what follows from all of it. `init_sequence_parallel` makes another group.
5. *Waiting has an end, of which compiling is no part.* A process that ends is known by its connections, which are made
   with the group. A thread gives signs of life and looks for those of others: a rank that does not come to an event for
   `guard_timeout` seconds, in none of which it compiles, is late; one that gives no sign for as long has stopped.

What a rank may rely on: a collective that it has launched is met by the same collective of the same event on every
rank, or fails. For a rank launches in event N only after all have come to N, and no rank launches anything later than N
before this one has come to that, hence has left N.

What becomes of a fault, by where it strikes one rank:

    before an event       another event, shape or value: all are told before anything is computed together
                          (1, 2). None: it is late (5). Its process ends: the others' gather fails at once (5)
    in planning           an exception, as of a full disk: the others, who are about to compile, are told of it (3)
    in compiling          the same, as soon as the others have compiled
    in a call, backward   an exception: see 3. Its process ends: the collectives that need it fail, and are
                          explained (4). It is slow: nothing. It stops: found by the thread (5)
    after an event        nothing is missing; the next event tells

AOTAutograd and Inductor make one function of a backward, which is an event. The inner backend "eager" does not: each
collective of its backward is an "exchange", which costs more; an exception there is not told in words, but that ranks
part is. On an accelerator the host runs ahead and a captured CUDA graph passes no gate: there ranks agree before a call
runs, and values, which would hold up the host, are compared at the next event.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils import _pytree as pytree

from ..distributed.peers import ASK, Peers, end_collectives
from ..distributed.samples import LateSamples, Samples
from ..distributed.words import TRANSPORT
from ..errors import ConfigurationError, SequenceParallelError, in_words, raised_at
from .accounts import Account, explain_accounts
from .event import DTYPES, Event, digest_of, hash_of, unseen
from .gate import COLLECTIVES, Gate, Waiting
from .watch import TICK, Watch, know_who_compiles

log = logging.getLogger(__name__)

GRACE = 3.0
"""Seconds that a rank which has failed waits for word of the others."""

MEETING = 600.0
"""Seconds that ranks may come later than others to where they connect."""

FORKED = (
    "this process was forked from a rank of the SP group, and is none itself: call the compiled model in the rank, or "
    "the uncompiled one here"
)

_EXCHANGE = 3


class Guard:
    """What one rank of an SP group says to the others and hears from them. A failure is final for the group."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group, self._process = weakref.ref(group), os.getpid()
        self._peers = Peers(group)
        self._rank, self._size = self._peers.rank, self._peers.size
        self._numbers = itertools.count()
        self._entering = threading.Lock()
        self._open: list[Event] = []
        """The events that this process is inside of, the innermost last."""
        self._pending: list[Event] = []
        """Those on which agreement has not been seen, in order."""
        self._last: Event | None = None
        self._late: LateSamples | None = None
        """Values of the last call, which the next event tells of."""
        self._departure: tuple[Event | None, Account] | None = None
        """The event "raised" of the exception that left an event last, until all agree on it, and its account."""
        self._failing = threading.Lock()
        self._failure: tuple[type[SequenceParallelError], str] | None = None
        self._latest: SequenceParallelError | None = None
        """What was raised last of the failure."""
        self._told = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._timeout = MEETING
        self._watch = Watch(self._peers)
        self.gate = Gate(group, self._admit)

    def connect(self) -> None:
        """Connect to the other ranks, all of which call it."""
        self._peers.connect(self._timeout)
        know_who_compiles()
        self._thread = threading.Thread(target=self._look_after, name="sp_compile guard", daemon=True)
        self._thread.start()

    def take(
        self,
        digest: int,
        account: Callable[[], Account],
        timeout: float,
        call: Callable[..., Any],
        *args: Any,
        samples: Samples | None = None,
        late: LateSamples | None = None,
        ahead: bool = False,
    ) -> Any:
        """`call(*args)`, as an event. Returns what it returns, once all ranks agree.

        Args:
            digest: 63 bits in which the ranks have to agree.
            account: tells what this rank is at, for the others to read if they do not agree.
            timeout: seconds that a rank may come later than others.
            samples: values in which they have to agree up to rounding.
            late: values that are known only later, and compared at the next event.
            ahead: wait for agreement before the call, not at its first collective.
        """
        self._timeout = timeout
        event = self._enter(digest, account, samples)
        self._late = late
        try:
            if ahead:
                self.settle(event)
            result = call(*args)
            self.settle(event)
        except BaseException as error:
            self._left(event, error)
            raise
        finally:
            event.inside = False
            self._open.remove(event)
        return result

    def raised(self, error: BaseException, account: Account) -> None:
        """Tell the others that an exception leaves what the account tells, outside of an event."""
        if self._failure is None and self._thread is not None:
            self._begin_raised(error, account, 0, -1, 0)
        elif self._failure is None:  # they wait in `_meet`, if anywhere
            self._peers.say("account", self._said_departure(error, account, -1, 0))

    def settle(self, event: Event) -> None:
        """Wait until all ranks have come to an event, and to those before; raise if they do not agree on one."""
        while not event.agreed:
            first = self._pending[0]
            cause = self._cause(first)
            if cause:
                self.fail(cause)
                self.raise_failure()
            first.agreed = True
            self._pending.remove(first)
            if self._departure is not None and self._departure[0] is first:
                self._departure = None

    def fail(self, cause: str, text: str = "") -> None:
        """Leave word in the store, end what this rank and the others wait in, and say what all of that means."""
        with self._failing:
            if self._failure is None:
                account = self._account(cause, text)
                self._peers.say("account", account)
                self._peers.raise_flag("failed")
                group = self._group()
                if group is not None:
                    end_collectives(group)
                self._peers.close()
                accounts = {self._rank: account, **self._peers.heard("account", range(self._size), GRACE)}
                self._failure = explain_accounts(accounts, self._size, self._peers.store_answers)

    def raise_failure(self) -> None:
        """Raise what this rank has failed of, if it has."""
        if self._failure is not None:
            raise self._raised()

    def close(self, why: str = "") -> None:
        """Give up the connections. Others that still need this rank are told where it left, and why."""
        with self._failing:
            if self._failure is None:
                if why or self._pending or self._open:
                    self._peers.say("account", self._account("left", why))
                text = "the SP group that this model was compiled for has been destroyed; compile it for another"
                self._failure = ConfigurationError, text
            self._told.set()
            self._peers.close()
            self._peers.leave()
            self.gate.close()
            # Their works would keep the descriptors and the threads of the connections.
            self._last, self._departure = None, None
            self._pending.clear()
        self._ended.set()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join(GRACE)

    def look(self) -> bool:
        """What the thread does at each tick. Returns whether there will be another."""
        group = self._group()
        if self._ended.is_set() or (self._failure is not None and self._told.is_set()):
            return False
        if group is None or not _is_registered(group):
            self.close()
            return False
        if self._failure is not None:
            # Whoever waits for this rank elsewhere, in a collective of the user's say, may never come to raise it.
            log.error("%s", self._raised())
            return False
        cause = self._watch.look(self._inside(), self._last, self._timeout)
        if cause:
            self.fail(cause)
        return True

    def connections(self) -> list[Any]:
        """What would end with this object."""
        return [self.gate, *self._peers.connections()]

    def _look_after(self) -> None:
        while self.look():
            # After a failure long enough that whoever raises it comes first.
            self._ended.wait(self._tick() if self._failure is None else GRACE)

    def _tick(self) -> float:
        return min(TICK, self._timeout / 8)

    def _inside(self) -> Event | None:
        """The innermost event that this process is inside of, as a thread beside may see it."""
        return next(iter(self._open[-1:]), None)

    def _enter(
        self,
        digest: int,
        account: Callable[[], Account],
        samples: Samples | None = None,
    ) -> Event:
        if self._process != os.getpid():
            raise ConfigurationError(FORKED)
        with self._entering:
            alone = not self._open or self._open[-1].thread == threading.get_ident()
            if alone:
                event = self._begin(digest, account, samples)
                self._open.append(event)
        if not alone:
            self._refuse_thread()
        return event

    def _begin(self, digest: int, account: Callable[[], Account], samples: Samples | None = None) -> Event:
        """Tell the others that this rank has come to an event."""
        self.raise_failure()
        if self._thread is None:
            self._meet()
        while self._pending and self._pending[0].work.is_completed():  # one that an exception left
            self.settle(self._pending[0])
        late, self._late = self._late, None
        with unseen():
            if late is not None:
                checksums, samples = late.read()
                inputs = partial(late.inputs, checksums, samples)
                digest, account = hash_of(digest, *checksums), partial(_with_inputs, account, inputs)
            samples = samples or Samples()
            samples.words[0] = digest
            event = Event(next(self._numbers), digest, account, samples, self._timeout)
            gathering = self._peers.gather(samples.words)
        if gathering is None:  # the thread is finding out why
            self.fail("lost")
            raise self._raised()
        event.work, event.said = gathering
        self._last = event
        self._pending.append(event)
        return event

    def _admit(self, index: int, args: tuple[Any, ...]) -> Waiting | None:
        """Rule 2: called before each collective of the group's compiled graphs."""
        event = self._inside()
        if event is None:
            return self._admit_alone(index, args)
        if event.thread != threading.get_ident():
            self._refuse_thread()
        if not event.agreed:
            self.settle(event)
        if self._watch.awaits_departed(event, event.launched):
            self.fail("told")
            self.raise_failure()
        event.launched += 1
        return None

    def _admit_alone(self, index: int, args: tuple[Any, ...]) -> Waiting:
        """A collective outside of all other events is one by itself. Returns what waits for it."""
        sent = [(x.dtype, tuple(x.shape)) for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
        sizes = [(DTYPES[dtype], *shape) for dtype, shape in sent]

        def account() -> Account:
            shapes = ", ".join(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for dtype, shape in sent)
            return {"does": "exchanges", "what": f"launches {COLLECTIVES[index]} of {shapes} outside of a graph's call"}

        event = self._enter(hash_of(_EXCHANGE, index, *sizes), account)
        try:
            self.settle(event)
            event.launched = 1
        finally:
            event.inside = False
            self._open.remove(event)
        return partial(self._wait, event)

    def _wait(self, event: Event, work: Any) -> None:
        event.inside, event.started, event.thread = True, time.monotonic(), threading.get_ident()
        self._open.append(event)
        try:
            work.wait()
        except RuntimeError as error:
            self._raise_if_lost(event, error)
            raise
        finally:
            event.inside = False
            self._open.remove(event)

    def _refuse_thread(self) -> None:
        self.fail("threads")
        self.raise_failure()

    def _left(self, event: Event, error: BaseException) -> None:
        """Rule 3: `error` is leaving an event. Raises the failure of the group in its place, if that is the cause."""
        if isinstance(error, Exception):
            self._raise_if_lost(event, error)
        if self._failure is None:
            self._begin_raised(error, event.account(), event.digest, event.number, event.launched)

    def _raise_if_lost(self, event: Event, error: Exception) -> None:
        if error is self._latest:
            return
        broke = event.launched and isinstance(error, RuntimeError) and TRANSPORT.search(str(error))
        if broke and self._failure is None:
            self.fail("lost", str(error))
        if self._failure is not None or self._failing.locked():
            with self._failing:
                failure = self._raised()
            raise failure from error

    def _begin_raised(self, error: BaseException, account: Account, digest: int, number: int, launched: int) -> None:
        account = self._said_departure(error, account, number, launched)
        event = self._begin(digest_of("raised", digest, type(error).__name__, launched), lambda: account)
        event.inside = False
        self._departure = event, account

    def _said_departure(self, error: BaseException, account: Account, number: int, launched: int) -> Account:
        """Leave word of what has left an event. Returns the account of this rank since."""
        kind = type(error).__name__
        raised = {"kind": kind, "text": in_words(error), "line": raised_at(error), "launched": launched}
        account = {**account, "raised": raised, "what": f"raised {kind} where it {account['what']}"}
        self._departure = None, account
        self._peers.say("raised", (number, launched))
        self._peers.raise_flag("raised", f"{self._rank} {number} {launched} {time.time()}")
        return account

    def _meet(self) -> None:
        """Wait until all ranks come to their first event, and connect to them: of a group that was not made by us."""
        started, cause = time.monotonic(), ""
        while not cause and (missing := self._peers.missing()):
            waited = time.monotonic() - started
            if self._peers.flag("failed") is not None or (waited > GRACE and self._peers.heard("raised", missing)):
                cause = "told"
            elif waited >= self._timeout:
                cause = "late"
            else:
                time.sleep(ASK)
        if cause:
            self.fail(cause)
        self.raise_failure()
        self.connect()

    def _cause(self, event: Event) -> str:
        """Why an event failed, once all ranks have come to it; "" if it did not."""
        try:
            event.work.wait()
        except RuntimeError:
            return "lost"
        assert event.said is not None
        with unseen():
            said = event.said.tolist()
            own = said[self._rank]
            agree = all(row[0] == own[0] and event.samples.are_close_to(row) for row in said if row != own)
        return "" if agree else "differs"

    def _account(self, cause: str, text: str) -> Account:
        own = {"cause": cause, "text": text, "timeout": self._timeout, "number": -2, "digest": 0, "inside": True}
        event = next(iter(self._pending), None) or self._last
        if event is not None:
            own |= {"number": event.number, "digest": event.digest, "inside": event.inside, "timeout": event.timeout}
            own |= event.account()
        elif cause == "late":
            own |= {"number": -1, "what": "waits for the others, to agree on its first graph"}
        else:
            own |= {"what": "has compiled no graph"}
        if self._departure is not None:
            _, departed = self._departure
            own |= {"raised": departed["raised"], "what": departed["what"]}
        return own

    def _raised(self) -> SequenceParallelError:
        assert self._failure is not None
        kind, text = self._failure
        if self._latest is not None and not self._ended.is_set():
            text = "\n".join(line for line in text.splitlines() if not line.startswith("  "))
        self._latest = kind(text)
        self._told.set()
        return self._latest


def _is_registered(group: ProcessGroup) -> bool:
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError):
        return False
    return True


def _with_inputs(account: Callable[[], Account], inputs: Callable[[], Any]) -> Account:
    return {**account(), "values": inputs()}
