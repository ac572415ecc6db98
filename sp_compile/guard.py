"""Ranks that part are told so; they neither wait for each other for ever nor go on with a wrong result.

The ranks of an SP group come to the same *events* in the same order. At each, every rank tells the others a digest:

    compile    the plan, the options, shapes and dtypes    agreed on before the graph is compiled
    call       which graph, shapes and dtypes              agreed on before what it returns is returned
    backward   which graph                                 agreed on before gradients are returned

The first call of a graph waits, before it runs, until all agree on the values of inputs and parameters, by checksum,
and on the state of the generators that it draws from. Later calls wait for nothing: the digests are gathered on gloo
connections of the guard's own, beside the collectives of the step.

A thread looks after what is under way. Where digests differ, a rank does not come in time or its process has ended,
it ends the collectives that this rank waits in; each rank leaves in the store of the group where it is and why, reads
what the others left, and raises what follows from all of it: the same text on every rank.

The rank that compiles, for however long, has come: only between two events is there a timeout.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import json
import logging
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._C._distributed_c10d import AllgatherOptions, PrefixStore
from torch._ops import OpOverload
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from torch.utils._dtype_abbrs import dtype_abbrs

from .accounts import Account, Value, explain_accounts
from .checksums import checksums_of, generator_checksums
from .config import SequenceParallelConfig
from .debug import RewrittenGraph, format_graph
from .errors import ConfigurationError, SequenceParallelError
from .words import TRANSPORT, end_collectives, end_gloo

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]
POLL = 0.05
"""Seconds between two looks at what is under way."""

ASK = 1.0
"""Seconds between two looks in the store, for a rank that has failed while this one was elsewhere."""

GRACE = 3.0
"""Seconds that a rank which has failed waits for word of the others."""

COMPILING = timedelta(days=1).total_seconds()
"""How late a rank may be for the first call of a graph: it may have to compile what others found in a cache."""

_PLACE = re.compile(r"^# (.*)$", re.MULTILINE)
_BITS = (1 << 63) - 1


class Event:
    """A place that every rank comes to, and what each says of it."""

    def __init__(self, number: int, digest: int, account: Callable[[], Account], timeout: float) -> None:
        self.number, self.digest, self.account, self.timeout = number, digest, account, timeout
        self.started = time.monotonic()
        self.inside, self.agreed = True, False
        self.digests: Tensor | None = None
        self.work: Any = None


class Guard:
    """What one rank of an SP group says to the others and hears from them. A failure is final for the group."""

    def __init__(self, group: ProcessGroup, timeout: float) -> None:
        self._group = weakref.ref(group)
        self._rank, self._size = dist.get_rank(group), group.size()
        self._store = PrefixStore("sp_compile.guard", group.get_group_store())
        self._numbers = itertools.count()
        self._last: Event | None = None
        self._pending: list[Event] = []
        self._failing = threading.Lock()
        self._failure: tuple[type[SequenceParallelError], str] | None = None
        self._peers: Any = None
        self._timeout = timeout
        self._store_answers = True
        self._meet()

    def begin(self, digest: int, account: Callable[[], Account], timeout: float) -> Event:
        """Tell the others that this rank has come to an event."""
        self.raise_failure()
        for event in self._pending.copy():  # one that an exception left
            if event.work.is_completed():
                self.settle(event)
        peers = self._peers
        if peers is None:  # the thread is finding out why
            with self._failing:
                raise self._raised()
        event = self._last = Event(next(self._numbers), digest, account, timeout)
        own = torch.tensor([[digest]], dtype=torch.int64, device="cpu")
        event.digests = torch.empty(self._size, 1, dtype=torch.int64, device="cpu")
        options = AllgatherOptions()
        options.timeout = timedelta(seconds=timeout)
        event.work = peers._allgather_base(event.digests, own, options)
        self._pending.append(event)
        return event

    def settle(self, event: Event) -> None:
        """Wait until all ranks have come to an event; raise if they do not agree on it."""
        if event.agreed:
            return
        cause = self._cause(event)
        if cause:
            self.fail(cause)
            self.raise_failure()
        event.agreed = True
        if event.number == 0:
            self._store.delete_key(f"connections/0/{self._rank}")  # where the others, now connected, have found it
        if event in self._pending:
            self._pending.remove(event)

    def run(self, event: Event, call: Callable[..., Any], *args: Any) -> Any:
        """`call(*args)`, which is what the event announced."""
        try:
            result = call(*args)
        except Exception as error:
            if self._failure is None and isinstance(error, RuntimeError) and TRANSPORT.search(str(error)):
                self.fail("lost", str(error))
            if self._failure is not None or self._failing.locked():
                with self._failing:
                    raise self._raised() from error
            # Where the others raise as well they may all go on; one that does not is met by this.
            kind, message = type(error).__name__, str(error).partition("\n")[0][:200]
            account = event.account()
            account["what"] = f"raised {kind} ({message}) where it {account['what']}"
            self.begin(_digest("raised", event.digest, kind), lambda: account, event.timeout)
            raise
        self.settle(event)
        event.inside = False
        return result

    def fail(self, cause: str, text: str = "") -> None:
        """Leave word in the store, end what this rank and the others wait in, and say what all of that means."""
        with self._failing:
            if self._failure is None:
                account = self._account(cause, text)
                self._leave_word(account, "failed")
                group = self._group()
                if group is not None:
                    end_collectives(group)
                self._close_connections()
                self._failure = explain_accounts(self._accounts(account), self._size, self._store_answers)

    def raise_failure(self) -> None:
        """Raise what this rank has failed of, if it has."""
        if self._failure is not None:
            raise self._raised()

    def close(self) -> None:
        """Give up the connections. Others that still need this rank are told where it left."""
        with self._failing:
            if self._failure is None:
                if self._pending:
                    self._leave_word(self._account("left", ""))
                text = "the SP group that this model was compiled for has been destroyed; compile it for another"
                self._failure = ConfigurationError, text
            self._close_connections()

    def _meet(self) -> None:
        """Connect to the other ranks, which come here when they compile a sharded graph for the first time."""
        keys = [f"here/{rank}" for rank in range(self._size)]
        self._store.set(keys[self._rank], "")
        try:
            self._store.wait(keys, timedelta(seconds=self._timeout))
        except RuntimeError:
            self.fail("late")
        if self._store.check(["failed"]):
            self.fail("told")
        self.raise_failure()
        gloo, patience = PrefixStore("connections", self._store), timedelta(seconds=max(self._timeout, 30))
        self._peers = dist.ProcessGroupGloo(gloo, self._rank, self._size, patience)
        self._store.delete_key(keys[self._rank])
        threading.Thread(target=_look_after, args=(weakref.ref(self),), name="sp_compile guard", daemon=True).start()

    def look(self, ask: bool) -> bool:
        """What the thread does at each turn; whether there will be another."""
        group = self._group()
        if self._failure is not None:
            return False
        if group is None or not _is_registered(group):
            self.close()
            return False
        for event in self._pending.copy():
            cause = event.work.is_completed() and self._cause(event)
            if cause:
                self.fail(cause)
        if ask and self._store_answers and self._failure is None:
            try:
                if self._store.check(["failed"]):
                    self.fail("told")
            except RuntimeError:  # its process may have come to a good end; torch would warn at every try
                self._store_answers = False
        if self._failure is not None:
            log.error("%s", self._failure[1])
        return self._failure is None

    def _cause(self, event: Event) -> str:
        """Why an event failed, when all ranks have come to it or its time is over; "" if it did not."""
        try:
            event.work.wait()
        except RuntimeError:
            return "late" if time.monotonic() - event.started >= event.timeout else "lost"
        assert event.digests is not None
        return "differs" if bool((event.digests != event.digest).any()) else ""

    def _account(self, cause: str, text: str) -> Account:
        last, own = self._last, {"cause": cause, "text": text, "timeout": self._timeout}
        if last is not None:
            own |= {"number": last.number, "digest": last.digest, "inside": last.inside, "timeout": last.timeout}
            return own | last.account()
        what = "waits for the others, to agree on its first graph" if cause == "late" else "has compiled no graph"
        return own | {"number": -1 if cause == "late" else -2, "digest": 0, "inside": True, "what": what}

    def _leave_word(self, account: Account, *keys: str) -> None:
        try:
            self._store.set(f"account/{self._rank}", json.dumps(account))
            for key in keys:
                self._store.set(key, "")
        except RuntimeError:
            self._store_answers = False

    def _accounts(self, own: Account) -> dict[int, Account]:
        """By rank; of those that have left one within the time of grace."""
        found = {self._rank: own}
        keys = [f"account/{rank}" for rank in range(self._size)]
        try:
            with suppress(RuntimeError):  # not all came
                self._store.wait(keys, timedelta(seconds=GRACE if self._store_answers else 0.001))
            for rank, key in enumerate(keys):
                if rank != self._rank and self._store_answers and self._store.check([key]):
                    found[rank] = json.loads(self._store.get(key))
        except RuntimeError:
            self._store_answers = False
        return found

    def _raised(self) -> SequenceParallelError:
        assert self._failure is not None
        kind, text = self._failure
        return kind(text)

    def _close_connections(self) -> None:
        peers, self._peers = self._peers, None
        if peers is not None:
            end_gloo(peers)
        self._pending.clear()
        self._last = None  # its work would keep the descriptors and the thread of the connections


_guards: weakref.WeakKeyDictionary[ProcessGroup, Guard] = weakref.WeakKeyDictionary()


def _look_after(reference: weakref.ref[Guard]) -> None:
    rest = threading.Event()
    for turn in itertools.count(1):
        rest.wait(POLL)
        guard = reference()
        if guard is None or not guard.look(turn % round(ASK / POLL) == 0):
            return
        del guard


@atexit.register
def _close_all() -> None:
    """An interpreter that ends does not wait for ranks that do not come."""
    for guard in list(_guards.values()):
        guard.close()


def _is_registered(group: ProcessGroup) -> bool:
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError):
        return False
    return True


class GuardedGraph:
    """A rewritten graph whose calls are events."""

    def __init__(
        self,
        guard: Guard,
        config: SequenceParallelConfig,
        graph: RewrittenGraph,
        inputs: Sequence[fx.Node],
        example_inputs: Sequence[Any],
    ) -> None:
        self._guard, self._config = guard, config
        bodies = [m for m in graph.rewritten.modules() if isinstance(m, fx.GraphModule) and m is not graph.rewritten]
        self._plan = "\n".join([str(graph), *map(format_graph, bodies)])
        self._options = _comparable(config)
        place = _PLACE.search(self._plan)
        self._graph = f"{graph.name} ({place[1]})" if place else graph.name
        self._names = [_name(node) for node in inputs]
        self._kinds = ["parameter" if isinstance(value, Parameter) else "input" for value in example_inputs]
        self._specs = [_spec(value) for value in example_inputs]
        self._watched = [index for index, kind in enumerate(self._kinds) if kind == "input"]
        self._draws = any(_draws(node) for body in [graph.rewritten, *bodies] for node in body.graph.nodes)
        self._key = _digest(self._plan, self._options)
        self._backward_watched = False

    def agree(self) -> Event:
        """Wait until all ranks are about to compile this graph."""
        event = self._begin(_digest("compile", self._key, self._specs), "compiles", self._values)
        self._guard.settle(event)
        return event

    def watch(self, inner: Compiled) -> Compiled:
        """`inner`, whose calls and backward are events."""
        first = True

        def run(*args: Any) -> Any:
            nonlocal first
            if first or self._config.guards == "debug":
                event = self._begin_with_values(args, COMPILING if first else self._config.guard_timeout)
                first = False
                self._guard.settle(event)
            else:
                event = self._begin_with_shapes(args)
            outputs = self._guard.run(event, inner, *args)
            if not self._backward_watched:
                self._watch_backward(outputs)
            return outputs

        return run

    def _begin_with_shapes(self, args: Sequence[Any]) -> Event:
        watched = [args[index] for index in self._watched]
        seen = [(x.dtype, x.shape) if isinstance(x, Tensor) else x for x in watched]
        sizes = [
            (_DTYPES[x.dtype], *x.shape) if isinstance(x, Tensor) else x for x in watched if isinstance(x, Tensor | int)
        ]

        def values() -> list[Value]:
            specs = dict(zip(self._watched, map(_spec, seen), strict=True))
            return self._values([specs.get(index, spec) for index, spec in enumerate(self._specs)])

        return self._begin(_hash(self._key, _CALL, *sizes), "calls", values)

    def _begin_with_values(self, args: Sequence[Any], timeout: float) -> Event:
        args = args[: len(self._names)]
        checks = self._config.guards != "shapes"
        checksums: list[int | None] = checksums_of(args) if checks else [None] * len(args)
        random = generator_checksums(args) if checks and self._draws else {}
        specs = [_spec(value) for value in args]
        digest = _digest("call", self._key, specs, checksums, random)
        return self._begin(digest, "calls", lambda: self._values(specs, checksums), random, timeout)

    def _values(self, specs: Sequence[str] | None = None, checksums: Sequence[int | None] | None = None) -> list[Value]:
        specs = specs or self._specs
        rows = zip(self._names, self._kinds, specs, checksums or [None] * len(specs), strict=True)
        return [Value(*row) for row in rows]

    def _begin(
        self,
        digest: int,
        does: str,
        values: Callable[[], list[Value]] = list,
        random: Mapping[str, int] | None = None,
        timeout: float | None = None,
    ) -> Event:
        def account() -> Account:
            own = {"does": does, "what": f"{does} {self._graph}", "options": self._options, "plan": self._plan}
            return {**own, "values": values(), "random": random or {}}

        return self._guard.begin(digest, account, timeout or self._config.guard_timeout)

    def _watch_backward(self, outputs: Sequence[Any]) -> None:
        """AOTAutograd makes one autograd Function for a graph; its backward becomes an event as well."""
        made = (getattr(getattr(output, "grad_fn", None), "_forward_cls", None) for output in outputs)
        function = next((each for each in made if hasattr(each, "_aot_id")), None)
        if function is None:
            return
        backward, digest = function.backward, _hash(self._key, _BACKWARD)

        def watched(ctx: Any, *grads: Any) -> Any:
            return self._guard.run(self._begin(digest, "runs the backward of"), backward, ctx, *grads)

        function.backward = staticmethod(watched)
        self._backward_watched = True


_CALL, _BACKWARD = 1, 2


def guard_graph(
    group: ProcessGroup,
    config: SequenceParallelConfig,
    graph: RewrittenGraph,
    inputs: Sequence[fx.Node],
    example_inputs: Sequence[Any],
    compile_inner: Callable[[], Compiled],
) -> Compiled:
    """What `compile_inner()` gives, once all ranks of the SP group agree on the graph; its calls are guarded.

    Where they do not agree nothing is compiled, and the call raises: what a backend raises by itself would reach the
    user in a `BackendCompilerFailed`. Ranks that are simulated in one process have no guard.

    Args:
        inputs: the placeholders of the Dynamo graph, and `example_inputs` what it was traced with.
    """
    backends = {group._get_backend(device).name() for device in group._device_types}
    if config.guards == "off" or "fake" in backends or not dist.is_gloo_available():
        return compile_inner()
    try:
        guard = _guard_of(group, config.guard_timeout)
        guarded = GuardedGraph(guard, config, graph, inputs, example_inputs)
        event = guarded.agree()
    except SequenceParallelError as error:
        return _raises(error)
    return guarded.watch(guard.run(event, compile_inner))


def _guard_of(group: ProcessGroup, timeout: float) -> Guard:
    if group not in _guards:
        _guards[group] = Guard(group, timeout)
    return _guards[group]


def _raises(error: SequenceParallelError) -> Compiled:
    kind, text = type(error), str(error)

    def run(*args: Any) -> Any:
        raise kind(text)

    return run


def _comparable(config: SequenceParallelConfig) -> dict[str, str]:
    """The options on which ranks have to agree, as text."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    backend = values["inner_backend"]
    if not isinstance(backend, str):
        values["inner_backend"] = getattr(backend, "__qualname__", type(backend).__qualname__)
    return {name: repr(value) for name, value in values.items() if name not in ("group", "dump", "guard_timeout")}


_MEMBER = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")
_WRAPPED = re.compile(r"^L\['args'\]\[0\](?=\._)")
_ROOT = re.compile(r"\b[LG]\['([^']+)'\]")


def _name(node: fx.Node) -> str:
    """`L['self']._modules['q']._parameters['weight']` as one writes it: `self.q.weight`."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return str(node.target)
    return _ROOT.sub(r"\1", _MEMBER.sub(r".\1", _WRAPPED.sub("self", source.name)))


def _spec(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.dtype, value.shape
    if isinstance(value, tuple):
        return f"{dtype_abbrs[value[0]]}[{', '.join(map(str, value[1]))}]"
    return str(value) if isinstance(value, int) else type(value).__name__


_DTYPES = {dtype: index for index, dtype in enumerate(sorted(dtype_abbrs, key=str))}


def _draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers: a dropout that is off does not."""
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    arguments = node.target._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= dict(zip((a.name for a in arguments), node.args, strict=False)) | dict(node.kwargs)
    return given.get("dropout_p", 1) != 0 and given.get("p", 1) != 0 and given.get("train", True) is not False


def _digest(*parts: Any) -> int:
    """63 bits of what JSON can say, alike in every process."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") & _BITS


def _hash(*numbers: Any) -> int:
    """The same of numbers and tuples of them, in a microsecond: Python salts the hashes of text only."""
    return hash(numbers) & _BITS
