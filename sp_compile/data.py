"""Inputs inside an SP group, whose ranks work on one sample at a time: whose sample, and how it gets to all.

Either every rank loads the same sample (`sp_sampler`, checked by `check_same_inputs`), or each loads
one of its own and the group goes through them in turn, so that no loading is done twice:

    for batch in loader:                    # a batch per rank
        for shared in sync_inputs(batch):   # P steps: the batch of rank 0, then of rank 1, …
            train_step(shared)

Ranks first meet in the store of the data group, where they learn of one another's place in the program,
failures and shapes; then they broadcast what all have agreed on. So a rank that errs, leaves a loop or is
elsewhere is an error on every rank: no collective is launched that a rank will not join.
"""

from __future__ import annotations

import enum
import pickle
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import Store
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset, DistributedSampler

from sp_compile.distributed.group import (
    current_epoch,
    get_data_group,
    get_data_parallel_rank,
    get_data_parallel_world_size,
)
from sp_compile.distributed.structure import SHARED_CLASSES, Structure, build, dtype_of_name
from sp_compile.distributed.words import (
    FIRST_LOOK,
    as_json,
    ended_peers,
    gather_bytes,
    longer,
    lose,
    lost_rank,
    raise_if_lost,
    read_json,
    start_and_wait,
    tensor_of,
    timeout_of,
    wait_for,
)
from sp_compile.errors import ConfigurationError, DataError, RankLostError, SequenceParallelError

T = TypeVar("T")

STORE_BYTES = 1 << 16
"""A longer word goes by a collective instead of the store."""

FIRST_SLEEP, LAST_SLEEP = 0.0001, 0.05
"""Seconds between two questions to the store, more and more."""


class SPDistForward:
    """Goes through the batches of all ranks of the SP group, one a step, the same one on every rank.

    Called with this rank's batch it gives a generator of P batches, that of SP rank i at step i. The
    broadcast of the next runs while the caller works on this one, so that a rank holds its own batch
    and two more (three for the moment between steps). A P-step loop waits for its first broadcast only,
    where a step takes longer than a broadcast.

    In a batch, lists, tuples, sets, named tuples, dicts, other mappings (Hugging Face's BatchEncoding) and
    dataclasses nest freely. Its tensors, of any shape and dtype, are broadcast: on every rank, the sender
    too, they arrive detached and contiguous; on the sender they share the memory of its batch where that
    was contiguous, which it must not write to before that step. So are numpy's arrays, and bytes.

    All else is numbers, texts, None, and dtypes and devices of torch, which travel as JSON when the loop
    starts. What JSON cannot say, an image of PIL say, is an error: nothing is unpickled, so that a peer
    cannot make this rank execute anything. `sync_data` pickles. For the same reason a rank makes no class
    that only another one's batch has: a dataclass, a named tuple or a mapping of your own is in the batch of
    every rank or of none. It gets its fields or items and its other attributes, without those that have an
    underscore and cannot be sent; only tensors that occur twice arrive as one.

    Every rank iterates, and leaves the loop at the same step if it leaves it early. A rank that leaves
    alone, be it by an exception, does not hang: it completes the broadcast in flight, frees its buffers
    and goes. The others raise DataError at their next step, unless nothing was left to send. A loop
    is left when its generator is closed or freed, which `for … in sync_inputs(batch)` does by itself.

    Without an SP group, or in one of a single rank, it yields the batch once, as it is.

    Args:
        name: what errors call it; a rank in a loop of another name is an error.
        comm_shape: whether the tensors of ranks may differ in number, shape and dtype. If not, a
            difference is an error, before any data moves.
        device: where tensors arrive. Default: on the type of device that they were on (a GPU: the
            current one).

    Raises:
        DataError: on every rank, when the batches cannot be shared or ranks are in different calls; on
            those that wait, when not all came within the timeout of `init_sequence_parallel`.
        RankLostError: the process of a rank has ended; it is named, within seconds.
    """

    def __init__(self, name: str, comm_shape: bool, device: torch.device | str | None = None) -> None:
        self.name = name
        self.comm_shape = comm_shape
        self.device = None if device is None else torch.device(device)

    def __call__(self, batch: T) -> Generator[T, None, None]:
        group = get_data_group()
        if group is None or group.size() == 1:
            yield batch if self.device is None else tree_map_only(Tensor, lambda t: t.to(self.device), batch)
            return
        place = f"SPDistForward({self.name!r}, comm_shape={self.comm_shape})"
        own = _Packed()
        words = _meet(group, f"{place} at its start", partial(_pack, batch, self.device, own))
        plans = [_plan_of(word, rank, place) for rank, word in enumerate(words)]
        del batch, words
        _check_classes([plan.classes for plan in plans], place)
        if not self.comm_shape:
            _check_equal([plan.specs for plan in plans], place, "Pass comm_shape=True if they may differ.")
        rank, last = dist.get_rank(group), group.size() - 1

        def start(source: int) -> _Transfer:
            plan, at = plans[source], f"{place}, the batch of rank {source}"
            if source != rank:
                tensors = [torch.empty(s.shape, dtype=s.dtype, device=self.device or s.device_type) for s in plan.specs]
                coming = _Packed(tensors, [bytearray(size) for size in plan.sizes], own.classes)
                return _Transfer(group, source, at, plan.json, coming)
            transfer = _Transfer(group, source, at, plan.json, replace(own))
            own.tensors, own.buffers = [], []
            return transfer

        coming: _Transfer | None = start(0)
        for step in range(last + 1):
            current = cast(_Transfer, coming)
            current.wait()
            if 0 < step < last:
                _meet(group, f"{place} at step {step}")
            coming = start(step + 1) if step < last else None
            try:
                yield current.unpack()
            except BaseException:  # closed, freed, thrown into, or a batch that cannot be built here
                if coming is not None and get_data_group() is group:
                    with suppress(SequenceParallelError):  # what this rank leaves of, it raises
                        coming.wait()  # every rank has launched it
                        if step + 1 < last:
                            _say(group, place, _Status.LEFT)
                raise


sync_inputs = SPDistForward("sync_inputs", comm_shape=True)
"""The batch of each rank of the SP group in turn, whatever its shapes: see `SPDistForward`."""


def sync_data(data: T, sp_idx: int) -> T:
    """`data` of the rank `sp_idx` of the SP group, on all of its ranks; what the others pass is ignored.

    Any picklable object; it is the one call of this library that unpickles what another rank sent, and
    so executes what that rank wants: call it where you trust every process of the job. On the sender, and
    without an SP group, it is `data` itself. Tensors are pickled with the rest; for large ones, or on GPUs,
    take `sync_inputs`.

    Raises:
        ConfigurationError: there is no rank `sp_idx`.
        DataError: on every rank, when `data` cannot be pickled or ranks are in different calls; on those
            that wait, when not all came within the timeout of `init_sequence_parallel`.
        RankLostError: the process of a rank has ended; it is named, within seconds.
    """
    group = get_data_group()
    size = 1 if group is None else group.size()
    if not 0 <= sp_idx < size:
        raise ConfigurationError(f"sp_idx={sp_idx} is no rank of the SP group: it has {size}, from 0 to {size - 1}.")
    if group is None or size == 1:
        return data
    place, sends, text = f"sync_data(sp_idx={sp_idx})", dist.get_rank(group) == sp_idx, bytearray()

    def pack() -> int:
        text.extend(pickle.dumps(data) if sends else b"")
        return len(text)

    length = _meet(group, place, pack)[sp_idx]
    text = text if sends else bytearray(length)
    start_and_wait(dist.broadcast, tensor_of(text), group=group, place=place, group_src=sp_idx)
    return data if sends else cast(T, pickle.loads(text))


def sp_sampler(
    dataset: Dataset[Any], *, shuffle: bool = True, seed: int = 0, drop_last: bool = False
) -> DistributedSampler[Any]:
    """A sampler by which all ranks of an SP group draw the same samples, and each SP group its own.

    For loops without `sync_inputs`; with it every rank draws samples of its own, by a
    `DistributedSampler(dataset)` over the world. Call `set_epoch` before each epoch as usual.

    Args:
        dataset: of known length. Its random augmentations are seeded alike on the ranks of a group.
        shuffle, seed, drop_last: as in `torch.utils.data.DistributedSampler`.
    """
    world_size, rank = get_data_parallel_world_size(), get_data_parallel_rank()
    return DistributedSampler(dataset, world_size, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)


def check_same_inputs(*tensors: Tensor) -> None:
    """Check that all ranks of the SP group hold the same tensors, bit for bit: NaN equals itself, 0 not -0.

    Moves each tensor once and waits for it; meant for the first steps and for debugging.

    Raises:
        DataError: on every rank, with the first tensor that differs, by number, dtype, shape, type of
            device or values, and the first rank where it differs from that of rank 0.
    """
    group = get_data_group()
    if group is None or group.size() == 1:
        return
    call, advice = "check_same_inputs", "All ranks of an SP group work on the same sample: see sp_sampler."
    words = _meet(group, call, lambda: [_said(_prepared(tensor)) for tensor in tensors])
    _check_equal([[_Spec.of(each) for each in word] for word in words], call, advice)
    differing: tuple[int, str] | None = None
    for index, tensor in enumerate(tensors):
        mine = _prepared(tensor)
        theirs = mine if dist.get_rank(group) == 0 else torch.empty_like(mine)
        if mine.numel():
            start_and_wait(dist.broadcast, _bytes(theirs), group=group, place=call, group_src=0)
        if differing is None and not torch.equal(_bytes(mine), _bytes(theirs)):
            at = int((_bytes(mine) != _bytes(theirs)).nonzero()[0]) // mine.element_size()
            there, here = theirs.view(-1)[at].item(), mine.view(-1)[at].item()
            differing = index, f"its element {at}, in flat order, is {there} on rank 0 and {here}"
    words = _meet(group, f"{call}, after its broadcasts", lambda: differing)
    found = [(entry, rank) for rank, entry in enumerate(words) if entry is not None]
    if found:
        (index, values), rank = min(found, key=lambda entry: (entry[0][0], entry[1]))
        raise DataError(f"{call}: tensor {index}, {_Spec.of(_said(tensors[index]))}: {values} on rank {rank}. {advice}")


@dataclass(frozen=True)
class _Spec:
    shape: tuple[int, ...]
    dtype: torch.dtype
    device_type: str

    @staticmethod
    def of(said: Sequence[Any]) -> _Spec:
        shape, dtype, device_type = said
        return _Spec(tuple(shape), dtype_of_name(dtype), torch.device(device_type).type)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)} on {self.device_type}"


def _said(tensor: Tensor) -> list[Any]:
    """A `_Spec` as JSON."""
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.device.type]


@dataclass
class _Packed:
    """A batch on its way, without its structure."""

    tensors: list[Tensor] = field(default_factory=list)
    buffers: list[bytearray] = field(default_factory=list)
    classes: dict[str, type] = field(default_factory=dict)
    """Those of this rank's own batch."""


def _pack(batch: Any, device: torch.device | None, own: _Packed) -> list[Any]:
    """What this rank says of its batch, as JSON; what it will send goes to `own`."""
    structure = Structure(batch)
    build(structure.json, structure.tensors, structure.buffers, structure.classes)  # its classes can make it
    own.tensors = [_prepared(tensor, device) for tensor in structure.tensors]
    own.buffers, own.classes = structure.buffers, structure.classes
    return [structure.json, [*map(_said, own.tensors)], [*map(len, own.buffers)], [*own.classes]]


@dataclass(frozen=True)
class _Plan:
    """What a rank has said of its batch."""

    json: Any
    specs: list[_Spec]
    sizes: list[int]
    classes: list[str]


def _plan_of(word: Any, rank: int, place: str) -> _Plan:
    try:
        json, specs, sizes, classes = word
        return _Plan(json, [_Spec.of(each) for each in specs], [*map(int, sizes)], [*map(str, classes)])
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"{place}: what rank {rank} of the SP group said is no batch: {error}") from error


def _check_classes(of_ranks: Sequence[Sequence[str]], place: str) -> None:
    for rank, classes in enumerate(of_ranks):
        for other, has in enumerate(of_ranks):
            for each in classes:
                if each not in has and each not in SHARED_CLASSES:
                    raise DataError(
                        f"{place}: the batch of rank {rank} has a {each}, that of rank {other} has none, and a rank "
                        "makes no class that only another one names. Have it in the batch of every rank, as an empty "
                        "one say, use a dict or tuple instead, or send it with sync_data, which pickles."
                    )


class _Transfer:
    """The batch of one rank on its way to all, launched when made."""

    def __init__(self, group: ProcessGroup, source: int, place: str, json: Any, batch: _Packed) -> None:
        self._group, self._place, self._json, self._batch = group, place, json, batch
        sent = [_bytes(tensor) for tensor in batch.tensors if tensor.numel()]
        sent += [tensor_of(buffer) for buffer in batch.buffers if buffer]
        self._works = [
            (dist.broadcast(each, group=group, group_src=source, async_op=True), each.device.type) for each in sent
        ]

    def wait(self) -> None:
        """Until it is here; raises as `words.wait_for` does."""
        works, self._works = self._works, []
        for work, device_type in works:
            if device_type == "cpu":
                wait_for(work, self._group, self._place)
            else:
                work.wait()  # which is for the device to do

    def unpack(self) -> Any:
        """The batch, which is the caller's from then on. Raises `DataError` for one that cannot be built."""
        batch, self._batch = self._batch, _Packed()
        try:
            return build(self._json, batch.tensors, batch.buffers, batch.classes)
        except Exception as error:  # of any kind: it may come from a class of the user's
            raise DataError(f"{self._place} cannot be built here: {type(error).__name__}: {error}") from error


def _prepared(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a tensor was expected, not a {type(tensor).__name__}")
    if type(tensor) not in (Tensor, Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(
            f"a {type(tensor).__name__} of layout {tensor.layout} on {tensor.device.type} cannot be sent to other "
            "ranks: make it a plain dense tensor (a DTensor by to_local())"
        )
    return tensor.detach().to(device or tensor.device).resolve_conj().resolve_neg().contiguous()


def _bytes(tensor: Tensor) -> Tensor:
    """What travels, and is compared, in any dtype: transports refuse some, and NaN is not equal to itself."""
    return tensor.view(-1).view(torch.uint8)


def _check_equal(specs_of_ranks: list[list[_Spec]], call: str, advice: str) -> None:
    for index, row in enumerate(zip_longest(*specs_of_ranks)):
        for rank, spec in enumerate(row):
            if spec != row[0]:
                first, other = (s or "missing" for s in (row[0], spec))
                raise DataError(f"{call}: tensor {index} is {first} on rank 0 and {other} on rank {rank}. {advice}")


class _Status(enum.Enum):
    HERE = "here"
    FAILED = "failed"
    LEFT = "left"


@dataclass
class _Meetings:
    """What this rank has said in the store of a group: how often, and under which keys it is still there."""

    store: Store
    ranks: frozenset[int]
    number: int = 0
    keys: list[str] = field(default_factory=list)

    def forget(self, count: int) -> None:
        """Delete the first words, which all ranks have read."""
        with suppress(RuntimeError):  # the store may have ended with its world
            for key in self.keys[:count]:
                self.store.delete_key(key)
        del self.keys[:count]


_meetings: WeakKeyDictionary[ProcessGroup, _Meetings] = WeakKeyDictionary()
_last_words: list[_Meetings] = []
"""Also of groups that have ended: when they did, some rank may not have read the last word of this one."""


def _say(group: ProcessGroup, place: str, status: _Status, says: bytes = b"null") -> str:
    """Leave a word for the next meeting and wait for nobody; the prefix of its keys in the store.

    `says` is JSON. Of more than `STORE_BYTES` the others are told that it comes by a collective.
    """
    if group not in _meetings:
        ranks = frozenset(dist.get_process_group_ranks(group))
        _meetings[group] = _Meetings(group.get_group_store(), ranks)
        _last_words.append(_meetings[group])
    meetings = _meetings[group]
    meeting = f"sp_compile.data/{current_epoch()}/{meetings.number}/"
    meetings.number += 1
    meetings.keys.append(f"{meeting}{dist.get_rank(group)}")
    is_long = len(says) > STORE_BYTES
    word = as_json([place, status.value, is_long, "" if is_long else says.decode()])
    meetings.store.set(meetings.keys[-1], word)  # type: ignore[arg-type]  # bytes, whatever the stub says
    return meeting


def _meet(group: ProcessGroup, place: str, contribute: Callable[[], Any] = lambda: None) -> list[Any]:
    """What each rank contributes, of what JSON can say.

    Raises on every rank if one is at another place, fails to contribute, left, or does not come.
    """
    raise_if_lost(group)
    store, size = group.get_group_store(), group.size()
    try:
        status, says = _Status.HERE, as_json(contribute())
    except Exception as error:  # of any kind, met in the user's data: all ranks must hear of it
        status, says = _Status.FAILED, as_json(f"{type(error).__name__}: {error}"[:2000])
    meeting = _say(group, place, status, says)
    keys = [f"{meeting}{rank}" for rank in range(size)]
    _wait_for_words(group, keys, place)
    words = [_word_of(store.get(key), rank, place) for rank, key in enumerate(keys)]
    # Who is here has read all earlier words, so that none of this rank's will be asked for again.
    now = _meetings[group]
    for meetings in _last_words.copy():
        if meetings.ranks <= now.ranks:
            meetings.forget(len(meetings.keys) - (meetings is now))
            if not meetings.keys:
                _last_words.remove(meetings)
    for rank, (where, status, _, _) in enumerate(words):
        if status is _Status.LEFT:
            raise DataError(
                f"rank {rank} of the SP group left {where} early, while this rank went on to {place}. An exception "
                "there may be the cause; else leave the loop at the same step on every rank."
            )
        if where != words[0][0]:
            raise DataError(
                f"the ranks of the SP group are at different places: rank 0 at {words[0][0]}, rank {rank} at {where}. "
                "All its ranks make the same calls in the same order."
            )
    for rank, (_, status, _, said) in enumerate(words):
        if status is _Status.FAILED:
            raise DataError(
                f"{place}: rank {rank} of the SP group cannot send its data: {read_json(said.encode(), rank, place)}"
            )
    texts = [said.encode() for _, _, _, said in words]
    if any(is_long for _, _, is_long, _ in words):
        texts = gather_bytes(says, group, place)
    return [read_json(text, rank, place) for rank, text in enumerate(texts)]


def _word_of(word: bytes, rank: int, place: str) -> tuple[str, _Status, bool, str]:
    said = read_json(word, rank, place)
    try:
        where, status, is_long, text = said
        return str(where), _Status(status), bool(is_long), str(text)
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: what rank {rank} of the SP group said is no word of this call: {said!r}") from error


def _wait_for_words(group: ProcessGroup, keys: list[str], place: str) -> None:
    """Until all ranks have said something. Raises as `words.wait_for` does."""
    store, patience, started = group.get_group_store(), timeout_of(group) or dist.default_pg_timeout, time.monotonic()
    pause, sleep = FIRST_LOOK, FIRST_SLEEP
    look = pause.total_seconds()
    try:
        while not store.check(keys):  # `wait` with a timeout would write a warning at every look
            waited = time.monotonic() - started
            if waited >= look:
                pause = longer(pause)
                look = waited + pause.total_seconds()
                _look_after_peers(group, keys, place)
            if waited >= patience.total_seconds():
                absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
                raise lose(group, DataError, f"ranks {absent} of the SP group did not come to {place} in {patience}.")
            time.sleep(sleep)
            sleep = min(1.5 * sleep, LAST_SLEEP)
    except RuntimeError as error:
        if isinstance(error, SequenceParallelError):
            raise
        ended = ended_peers(group)
        text = f"{place}: the process that hosts the store of the job, most likely that of global rank 0, has ended."
        raise (lost_rank(group, place, ended) if ended else lose(group, RankLostError, text)) from error


def _look_after_peers(group: ProcessGroup, keys: list[str], place: str) -> None:
    ended = ended_peers(group)
    lost = [rank for rank in ended if not group.get_group_store().check([keys[rank]])]
    if lost:
        raise lost_rank(group, place, lost)
