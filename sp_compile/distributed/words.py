"""What the ranks of a group tell one another, and how long they wait for it.

They talk in JSON and tensors, never in pickles: to read what a peer wrote executes nothing. A wait ends when all have
come, when a peer is found to have ended, or when the timeout of the group is over. That a process has ended is known
from its connections, which the system closes: gloo connects every rank with every other when a group is made.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..errors import DataError, RankLostError, SequenceParallelError
from .peers import end_collectives

FIRST_LOOK = timedelta(seconds=0.25)
LAST_LOOK = timedelta(seconds=30)
"""A rank that waits looks after its peers, at first after a quarter of a second, then less often."""

GRACE = timedelta(seconds=0.5)
"""How long a rank that has closed its connections may take to say that it has not ended."""

TRANSPORT = re.compile(r"gloo|nccl|application timeout|connection (closed|reset)|broken pipe|socket", re.IGNORECASE)
"""What stands in the errors of collectives."""

_UNUSED_TAG = 1 << 30
"""Of messages that nobody sends."""


def timeout_of(group: ProcessGroup) -> timedelta | None:
    """How long a collective of `group` waits for its ranks; None where its backend does not say, as a fake one."""
    options = [group._get_backend(device).options for device in group._device_types]
    timeouts = [each._timeout for each in options if hasattr(each, "_timeout")]
    return min(timeouts, default=None)


def delete_addresses(group: ProcessGroup) -> None:
    """Take out of the store where the ranks of a new group find one another. Every rank of it calls this."""
    backend = _gloo_of(group)
    if backend is not None:
        with explaining_failures(group, "init_sequence_parallel"):
            backend.barrier().wait()  # the others are connected as well
        for device in group._device_types:
            group.get_group_store().delete_key(f"{device.type}//0/{backend.rank()}")


def ended_peers(group: ProcessGroup) -> list[int]:
    """The ranks of `group` that have closed their connection to this one: they ended, or destroyed the group.

    None are found where the group has no gloo backend.
    """
    backend = _gloo_of(group)
    if backend is None:
        return []
    nothing, closed = torch.empty(1, device="cpu"), []
    for peer in range(backend.size()):
        if peer != backend.rank():
            try:
                backend.recv([nothing], peer, _UNUSED_TAG)  # which an open connection takes note of, and forgets
            except RuntimeError as error:
                if "timeout" not in str(error):  # after one it is this rank that has closed all of its connections
                    closed.append(peer)
    if not closed:
        return []
    time.sleep(GRACE.total_seconds())
    return sorted({*closed} - {*_given_up(group)})


def raise_if_lost(group: ProcessGroup) -> None:
    """Raise what this rank has lost the group of, if it has."""
    if group in _losses:
        kind, text = _losses[group]
        raise kind(text)


def lose(group: ProcessGroup, kind: type[SequenceParallelError], text: str) -> SequenceParallelError:
    """End what this rank and its peers wait for in `group`. Returns the error to raise, there and from then on."""
    if group not in _losses:
        _losses[group] = kind, text
        # Whoever finds the connections of this rank closed knows by this that it has not ended.
        with suppress(RuntimeError):
            group.get_group_store().set(_word_of(dist.get_rank(group)), "")
        end_collectives(group)
    return _losses[group][0](_losses[group][1])


def lost_rank(group: ProcessGroup, place: str, ended: Sequence[int]) -> SequenceParallelError:
    """Lose a group some of whose ranks have ended. Returns the error, which names them."""
    text = (
        f"{named(ended)} of the SP group ended, or left the group, while others needed it in {place}. The cause is in "
        f"the output of {named(ended)}: an exception, or a process that the system killed for its memory. Then start "
        "all ranks anew."
    )
    return lose(group, RankLostError, text)


def lost_connection(group: ProcessGroup, place: str, error: Exception) -> SequenceParallelError:
    """Lose a group in which a collective has failed. Returns what that means."""
    ended = ended_peers(group)
    if ended:
        return lost_rank(group, place, ended)
    text = f"{place}: not all ranks of the SP group came in {timeout_of(group)}, or a connection broke: {error}"
    return lose(group, DataError, text)


def wait_for(work: Any, group: ProcessGroup, place: str) -> None:
    """Wait for a collective between CPUs that this rank has started in `group`.

    Raises:
        RankLostError: a rank ended; it is named.
        DataError: not all ranks came before the timeout of the group was over.
    """
    pause = FIRST_LOOK
    while True:
        try:
            work.wait(pause)
            return
        except RuntimeError as error:
            if work.is_completed():
                raise lost_connection(group, place, error) from error
            ended = ended_peers(group)
            if ended and not work.is_completed():
                raise lost_rank(group, place, ended) from error
        pause = longer(pause)


def longer(pause: timedelta) -> timedelta:
    """How long to wait until the next look."""
    return min(1.5 * pause, LAST_LOOK)


@contextmanager
def explaining_failures(group: ProcessGroup, place: str) -> Iterator[None]:
    """A collective inside that fails raises as `wait_for` does."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, SequenceParallelError) or not TRANSPORT.search(str(error)):
            raise
        raise lost_connection(group, place, error) from error


def gather_json(value: Any, group: ProcessGroup, place: str) -> list[Any]:
    """`value`, of what JSON can say, of each rank; every rank of the group calls it. Raises as `wait_for` does."""
    return [read_json(each, rank, place) for rank, each in enumerate(gather_bytes(as_json(value), group, place))]


def gather_bytes(mine: bytes, group: ProcessGroup, place: str) -> list[bytes]:
    """What each rank calls this with. Raises as `wait_for` does."""
    device = torch.device(dist.distributed_c10d._get_object_coll_device(group))
    parts = group.size()
    counts = torch.empty(parts, dtype=torch.int64, device=device)
    start_and_wait(dist.all_gather_single, counts, counts.new_tensor([len(mine)]), group=group, place=place)
    width = max(1, int(counts.max()))
    padded = tensor_of(bytearray(mine.ljust(width, b"\0"))).to(device)
    everyone = padded.new_empty(parts * width)
    start_and_wait(dist.all_gather_single, everyone, padded, group=group, place=place)
    read = bytearray(parts * width)
    tensor_of(read).copy_(everyone)
    return [bytes(read[at * width : at * width + count]) for at, count in enumerate(counts.tolist())]


def tensor_of(buffer: bytearray) -> Tensor:
    """The memory of `buffer`, which is not empty, as uint8."""
    return torch.frombuffer(buffer, dtype=torch.uint8)


def start_and_wait(collective: Callable[..., Any], *args: Any, group: ProcessGroup, place: str, **kwargs: Any) -> None:
    """Run a collective of torch.distributed to its end. Raises as `wait_for` does."""
    with explaining_failures(group, place):
        work = collective(*args, group=group, async_op=True, **kwargs)
        if any(isinstance(each, Tensor) and each.device.type != "cpu" for each in args):
            work.wait()
        else:
            wait_for(work, group, place)


def as_json(value: Any) -> bytes:
    """A word to other ranks. Raises TypeError for what JSON cannot say."""
    return json.dumps(value, separators=(",", ":")).encode()


def read_json(word: bytes, rank: int, place: str) -> Any:
    """What `rank` said. Raises `DataError` if that is no JSON."""
    try:
        return json.loads(word)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: what rank {rank} of the SP group said is no JSON, and is not read: does it run another version "
            "of sp_compile?"
        ) from error


def named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


_losses: WeakKeyDictionary[ProcessGroup, tuple[type[SequenceParallelError], str]] = WeakKeyDictionary()


def _given_up(group: ProcessGroup) -> list[int]:
    """The ranks that have closed their connections by `lose`."""
    store = group.get_group_store()
    try:
        return [rank for rank in range(group.size()) if store.check([_word_of(rank)])]
    except RuntimeError:  # the process that hosts it has ended
        return []


def _word_of(rank: int) -> str:
    return f"sp_compile.words/given up/{rank}"


def _gloo_of(group: ProcessGroup) -> Any:
    if not dist.is_gloo_available():
        return None
    backends = [group._get_backend(device) for device in group._device_types if device.type == "cpu"]
    return next((each for each in backends if isinstance(each, dist.ProcessGroupGloo)), None)
