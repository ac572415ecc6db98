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
import hashlib
import io
import pickle
from collections.abc import Generator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset, DistributedSampler

from sp_compile.errors import ConfigurationError, SequenceParallelError
from sp_compile.group import current_epoch, get_data_group, get_data_parallel_rank, get_data_parallel_world_size

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others to make the same call."""


class DataError(SequenceParallelError):
    """Inputs that ranks of an SP group cannot share, or calls in which they do not agree."""


class SPDistForward:
    """Goes through the batches of all ranks of the SP group, one a step, the same one on every rank.

    Called with this rank's batch it gives a generator of P batches, that of SP rank i at step i. The
    broadcast of the next runs while the caller works on this one, so that a rank holds its own batch
    and two more (three for the moment between steps).

    A batch is any picklable structure; lists, tuples, named tuples, dicts and dataclasses nest freely.
    Its tensors, of any shape and dtype, are broadcast: on every rank, the sender too, they arrive
    detached and contiguous. All else is pickled and travels when the loop starts. The sender must
    not write into its batch before that has come up.

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
            yield batch if self.device is None else tree_map_only(Tensor, self._place, batch)
            return
        place = f"SPDistForward({self.name!r}, comm_shape={self.comm_shape})"
        packed, failure = None, None
        try:
            packed = _pack(batch, self._place)
        except Exception as error:  # whatever pickle meets in the batch; all ranks must hear of it
            failure = f"{type(error).__name__}: {error}"
        del batch
        payload = b"" if packed is None else pickle.dumps((packed.specs, packed.skeleton))
        plans = [pickle.loads(text) for text in _meet(group, f"{place} at its start", payload, failure)]
        if not self.comm_shape:
            _check_equal([specs for specs, _ in plans], f"{place}: ", "Pass comm_shape=True if they may differ.")
        rank, last = dist.get_rank(group), group.size() - 1
        coming: _Transfer | None = None
        for step in range(last + 1):
            current = coming or self._start(group, step, plans, packed if step == rank else None)
            current.wait()
            if 0 < step < last:
                _meet(group, f"{place} at step {step}")
            coming = None
            if step < last:
                coming = self._start(group, step + 1, plans, packed if step + 1 == rank else None)
            if step + 1 >= rank:
                packed = None
            try:
                yield current.unpack()
            except BaseException:  # closed or freed, or the structure cannot be built here
                if coming is not None and get_data_group() is group:
                    coming.wait()
                    if step + 1 < last:
                        _leave(group, place)
                raise

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor if self.device is None else tensor.to(self.device, non_blocking=True)

    def _start(
        self, group: ProcessGroup, source: int, plans: list[tuple[list[_Spec], bytes]], packed: _Packed | None
    ) -> _Transfer:
        specs, skeleton = plans[source]
        if packed is None:
            tensors = [torch.empty(s.shape, dtype=s.dtype, device=self.device or s.device_type) for s in specs]
        else:
            tensors = packed.tensors
        works = [dist.broadcast(_bytes(t), group=group, group_src=source, async_op=True) for t in tensors if t.numel()]
        return _Transfer(skeleton, tensors, works)


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
    texts, failure = [b""], None
    if dist.get_rank(group) == sp_idx:
        try:
            texts = [pickle.dumps(data)]
        except Exception as error:  # whatever pickle meets in data
            failure = f"{type(error).__name__}: {error}"
    _meet(group, f"sync_data(sp_idx={sp_idx})", failure=failure)
    dist.broadcast_object_list(texts, group=group, group_src=sp_idx, device=torch.device("cpu"))
    received: T = data if dist.get_rank(group) == sp_idx else pickle.loads(texts[0])
    return received


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
    return DistributedSampler(
        dataset,
        num_replicas=get_data_parallel_world_size(),
        rank=get_data_parallel_rank(),
        shuffle=shuffle,
        seed=seed,
        drop_last=drop_last,
    )


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
    packed, failure = None, None
    try:
        packed = _pack(tensors, lambda tensor: tensor)
    except Exception as error:  # whatever pickle meets; all ranks must hear of it
        failure = f"{type(error).__name__}: {error}"
    specs = b"" if packed is None else pickle.dumps([_spec(tensor) for tensor in tensors])
    everyone = [pickle.loads(text) for text in _meet(group, "check_same_inputs", specs, failure)]
    _check_equal(everyone, "check_same_inputs: ", "All ranks of an SP group work on the same sample.")
    differing: tuple[int, str] | None = None
    for index, tensor in enumerate(tensors):
        mine = _prepared(tensor)
        theirs = mine if dist.get_rank(group) == 0 else torch.empty_like(mine)
        if mine.numel():
            dist.broadcast(_bytes(theirs), group=group, group_src=0)
        if differing is None and not torch.equal(_bytes(mine), _bytes(theirs)):
            at = int((_bytes(mine) != _bytes(theirs)).nonzero()[0]) // mine.element_size()
            values = f"{theirs.view(-1)[at].item()} on rank 0, {mine.view(-1)[at].item()}"
            differing = index, f"(flat) element {at} is {values}"
    found = [pickle.loads(text) for text in _meet(group, "check_same_inputs, values", pickle.dumps(differing))]
    if any(found):
        index, rank = min((entry[0], rank) for rank, entry in enumerate(found) if entry)
        raise DataError(
            f"check_same_inputs: tensor {index}, {_spec(tensors[index])}, differs: its {found[rank][1]} on rank "
            f"{rank} of the SP group. All its ranks work on the same sample: see sp_sampler and sync_inputs."
        )


@dataclass(frozen=True)
class _Spec:
    shape: tuple[int, ...]
    dtype: torch.dtype
    device_type: str

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)} on {self.device_type}"


@dataclass
class _Packed:
    """A batch taken apart: its tensors, and the pickled rest that numbers them."""

    skeleton: bytes
    tensors: list[Tensor]

    @property
    def specs(self) -> list[_Spec]:
        return [_spec(tensor) for tensor in self.tensors]


@dataclass
class _Transfer:
    """A batch on its way, or arrived."""

    skeleton: bytes
    tensors: list[Tensor]
    works: list[dist.Work]

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works = []

    def unpack(self) -> Any:
        """The batch; it is the caller's from then on."""
        tensors, self.tensors = self.tensors, []
        return _Unpickler(self.skeleton, tensors).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: dict[int, Tensor] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        numbers = {key: number for number, key in enumerate(self.tensors)}
        self.tensors.setdefault(id(obj), obj)
        return numbers.get(id(obj), len(numbers))


class _Unpickler(pickle.Unpickler):
    def __init__(self, skeleton: bytes, tensors: list[Tensor]) -> None:
        super().__init__(io.BytesIO(skeleton))
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]


class _Status(enum.Enum):
    HERE = enum.auto()
    FAILED = enum.auto()
    LEFT = enum.auto()


@dataclass
class _Meetings:
    """What a rank has said in the store of one group: the count, and the keys that others may yet read."""

    number: int = 0
    keys: list[str] = field(default_factory=list)


_meetings: WeakKeyDictionary[ProcessGroup, _Meetings] = WeakKeyDictionary()
