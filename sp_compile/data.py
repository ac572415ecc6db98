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
import io
import pickle
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset, DistributedSampler

from sp_compile.errors import ConfigurationError, DataError
from sp_compile.group import current_epoch, get_data_group, get_data_parallel_rank, get_data_parallel_world_size

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others to make the same call."""

STORE_BYTES = 1 << 16
"""More than this of structure and non-tensor leaves goes by a collective instead of the store."""


class SPDistForward:
    """Goes through the batches of all ranks of the SP group, one a step, the same one on every rank.

    Called with this rank's batch it gives a generator of P batches, that of SP rank i at step i. The
    broadcast of the next runs while the caller works on this one, so that a rank holds its own batch
    and two more (three for the moment between steps). A P-step loop waits for its first broadcast only,
    where a step takes longer than a broadcast.

    A batch is any picklable structure; lists, tuples, named tuples, dicts and dataclasses nest freely.
    Its tensors, of any shape and dtype, are broadcast: on every rank, the sender too, they arrive
    detached and contiguous; on the sender they share the memory of its batch where that was contiguous,
    which it must not write to before that step. All else is pickled and travels when the loop starts.

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
        DataError: on every rank, when the batches cannot be shared or ranks are in different calls.
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
        own: list[Tensor] = []
        texts = _meet(group, f"{place} at its start", partial(_pack, batch, self.device, own))
        plans = [pickle.loads(text) for text in texts]
        del batch, texts
        if not self.comm_shape:
            _check_equal([specs for specs, _ in plans], place, "Pass comm_shape=True if they may differ.")
        rank, last = dist.get_rank(group), group.size() - 1

        def start(source: int) -> _Transfer:
            specs, skeleton = plans[source]
            if source != rank:
                tensors = [torch.empty(s.shape, dtype=s.dtype, device=self.device or s.device_type) for s in specs]
                return _Transfer(group, source, skeleton, tensors)
            transfer = _Transfer(group, source, skeleton, own.copy())
            own.clear()
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
                    coming.wait()  # every rank has launched it
                    if step + 1 < last:
                        _say(group, place, _Status.LEFT)
                raise


sync_inputs = SPDistForward("sync_inputs", comm_shape=True)
"""The batch of each rank of the SP group in turn, whatever its shapes: see `SPDistForward`."""


def sync_data(data: T, sp_idx: int) -> T:
    """`data` of the rank `sp_idx` of the SP group, on all of its ranks; what the others pass is ignored.

    Any picklable object. On the sender, and without an SP group, it is `data` itself. Tensors are
    pickled with the rest; for large ones, or on GPUs, take `sync_inputs`.

    Raises:
        ConfigurationError: there is no rank `sp_idx`.
        DataError: on every rank, when `data` cannot be pickled or ranks are in different calls.
    """
    group = get_data_group()
    size = 1 if group is None else group.size()
    if not 0 <= sp_idx < size:
        raise ConfigurationError(f"sp_idx={sp_idx} is no rank of the SP group: it has {size}, from 0 to {size - 1}.")
    if group is None or size == 1:
        return data
    sends = dist.get_rank(group) == sp_idx
    texts: list[bytes] = []

    def pack() -> bytes:
        texts.append(pickle.dumps(data) if sends else b"")
        return b""

    _meet(group, f"sync_data(sp_idx={sp_idx})", pack)
    dist.broadcast_object_list(texts, group=group, group_src=sp_idx, device=torch.device("cpu"))
    return data if sends else cast(T, pickle.loads(texts[0]))


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
    texts = _meet(group, call, lambda: pickle.dumps([_spec(_prepared(tensor)) for tensor in tensors]))
    _check_equal([pickle.loads(text) for text in texts], call, advice)
    differing: tuple[int, str] | None = None
    for index, tensor in enumerate(tensors):
        mine = _prepared(tensor)
        theirs = mine if dist.get_rank(group) == 0 else torch.empty_like(mine)
        if mine.numel():
            dist.broadcast(_bytes(theirs), group=group, group_src=0)
        if differing is None and not torch.equal(_bytes(mine), _bytes(theirs)):
            at = int((_bytes(mine) != _bytes(theirs)).nonzero()[0]) // mine.element_size()
            there, here = theirs.view(-1)[at].item(), mine.view(-1)[at].item()
            differing = index, f"its element {at}, in flat order, is {there} on rank 0 and {here}"
    texts = _meet(group, f"{call}, after its broadcasts", lambda: pickle.dumps(differing))
    found = [(entry, rank) for rank, entry in enumerate(map(pickle.loads, texts)) if entry is not None]
    if found:
        (index, values), rank = min(found, key=lambda entry: (entry[0][0], entry[1]))
        raise DataError(f"{call}: tensor {index}, {_spec(tensors[index])}: {values} on rank {rank}. {advice}")


@dataclass(frozen=True)
class _Spec:
    shape: tuple[int, ...]
    dtype: torch.dtype
    device_type: str

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)} on {self.device_type}"


class _Transfer:
    """The batch of one rank on its way to all, launched when made."""

    def __init__(self, group: ProcessGroup, source: int, skeleton: bytes, tensors: list[Tensor]) -> None:
        self._skeleton = skeleton
        self._tensors = tensors
        self._works = [
            dist.broadcast(_bytes(tensor), group=group, group_src=source, async_op=True)
            for tensor in tensors
            if tensor.numel()
        ]

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works = []

    def unpack(self) -> Any:
        """The batch, which is the caller's from then on."""
        tensors, self._tensors = self._tensors, []
        return _Unpacker(self._skeleton, tensors).load()


class _Packer(pickle.Pickler):
    """Pickles all but tensors, which it numbers and lists; one that occurs twice is listed once."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._numbers[id(obj)]


class _Unpacker(pickle.Unpickler):
    def __init__(self, skeleton: bytes, tensors: list[Tensor]) -> None:
        super().__init__(io.BytesIO(skeleton))
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]


def _pack(batch: Any, device: torch.device | None, own: list[Tensor]) -> bytes:
    """The specs of the tensors in `batch` and the pickled rest of it; the tensors, ready to be sent, go to `own`."""
    skeleton = io.BytesIO()
    packer = _Packer(skeleton)
    packer.dump(batch)
    own.extend(_prepared(tensor, device) for tensor in packer.tensors)
    return pickle.dumps(([_spec(tensor) for tensor in own], skeleton.getvalue()))


def _spec(tensor: Tensor) -> _Spec:
    return _Spec(tuple(tensor.shape), tensor.dtype, tensor.device.type)


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
    HERE = enum.auto()
    FAILED = enum.auto()
    LEFT = enum.auto()


@dataclass
class _Meetings:
    """What this rank has said in the store of a group: how often, and under which keys it is still there."""

    number: int = 0
    keys: list[str] = field(default_factory=list)


_meetings: WeakKeyDictionary[ProcessGroup, _Meetings] = WeakKeyDictionary()


def _say(group: ProcessGroup, place: str, status: _Status, payload: bytes = b"") -> str:
    """Leave a word for the next meeting and wait for nobody; the prefix of its keys in the store."""
    meetings = _meetings.setdefault(group, _Meetings())
    meeting = f"sp_compile.data/{current_epoch()}/{meetings.number}/"
    meetings.number += 1
    meetings.keys.append(f"{meeting}{dist.get_rank(group)}")
    word = pickle.dumps((place, status, payload))
    group.get_group_store().set(meetings.keys[-1], word)  # type: ignore[arg-type]  # bytes, whatever the stub says
    return meeting


def _meet(group: ProcessGroup, place: str, contribute: Callable[[], bytes] = bytes) -> list[bytes]:
    """What each rank contributes; raises on every rank if one is at another place, fails to contribute, or left."""
    store, size = group.get_group_store(), group.size()
    try:
        status, payload = _Status.HERE, contribute()
    except Exception as error:  # of any kind, met in the user's data: all ranks must hear of it
        status, payload = _Status.FAILED, f"{type(error).__name__}: {error}".encode()
    # One byte more than the limit tells the others that it was passed.
    meeting = _say(group, place, status, payload[: STORE_BYTES + 1])
    keys = [f"{meeting}{rank}" for rank in range(size)]
    try:
        store.wait(keys, PATIENCE)
    except RuntimeError as error:  # a DistStoreError, but of a FileStore
        absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise DataError(f"ranks {absent} of the SP group did not come to {place} in {PATIENCE}.") from error
    words = [pickle.loads(store.get(key)) for key in keys]
    # Who is here has read all earlier words, so that none of this rank's will be asked for again.
    meetings = _meetings[group]
    for key in meetings.keys[:-1]:
        store.delete_key(key)
    del meetings.keys[:-1]
    for rank, (where, status, _) in enumerate(words):
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
    for rank, (_, status, word) in enumerate(words):
        if status is _Status.FAILED:
            raise DataError(
                f"{place}: rank {rank} of the SP group cannot send its data: {word.decode(errors='replace')}"
            )
    if max(len(word) for _, _, word in words) <= STORE_BYTES:
        return [word for _, _, word in words]
    everyone = [b""] * size
    dist.all_gather_object(everyone, payload, group=group)
    return everyone
