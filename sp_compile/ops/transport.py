"""The launches: what goes from rank to rank, and as what, for transports take some dtypes only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _get_group_size_by_name
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..errors import SequenceParallelError

_collectives = torch.ops._c10d_functional

# What every transport takes, gloo too; anything else travels as a view of its bytes.
_INTEGERS = {torch.uint8, torch.int8, torch.int32, torch.int64}
HALVES = {torch.float16, torch.bfloat16}
_FLOATS = {torch.float32, torch.float64, *HALVES}
TRANSPORTED = {*_INTEGERS, *_FLOATS}


def group_size(group: str) -> int:
    return _get_group_size_by_name(GroupName(group))


def apart(x: Tensor) -> Tensor:
    """`x` as a tensor that autograd takes for no view: nobody else reads the memory that it is a view of.

    A view that a custom Function returns may not be written to. One without elements is returned as it is: torch's fake
    tensors tell other strides of it than real ones have.
    """
    if any(isinstance(size, int) and size == 0 for size in x.shape):
        return x
    result: Tensor = torch.ops.aten._unsafe_view.default(x, x.shape)
    return result


def as_transported(x: Tensor) -> Tensor:
    """`x`, or a view of its bytes, a new last dimension, if transports refuse it."""
    if x.dtype in TRANSPORTED:
        return x
    # A lazy conjugate or negative has no bytes of its own.
    return x.resolve_conj().resolve_neg().unsqueeze(-1).view(torch.uint8)


def as_before(data: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `as_transported`."""
    return data if dtype in TRANSPORTED else apart(data.contiguous().view(dtype).squeeze(-1))


def moved(move: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`x` after a move that looks at no value, in a dtype that it may be sent in."""
    return as_before(move(as_transported(x)), x.dtype)


def arrived(pending: Tensor) -> Tensor:
    """What a collective brings, once it is there."""
    result: Tensor = _collectives.wait_tensor(pending)
    return result


def start_exchange(pieces: Tensor, group: str) -> Tensor:
    """`[P, ..]`, a piece for every rank -> `[P, ..]`, a piece from every rank; to be waited for."""
    ones = [1] * group_size(group)
    received: Tensor = _collectives.all_to_all_single(pieces.contiguous(), ones, ones, group)
    return received


def start_gather(x: Tensor, group: str) -> Tensor:
    """`[1, ..]` -> `[P, ..]`, of every rank; to be waited for."""
    gathered: Tensor = _collectives.all_gather_into_tensor(x.contiguous(), group_size(group), group)
    return gathered


def sent_together(pieces: Sequence[Tensor], group: str) -> list[Tensor]:
    """`[P, ..]` each, a piece for every rank, or `[1, ..]`, the same for all -> `[P, ..]`, a piece from every rank.

    One launch for each dtype. Pieces of as many rows are laid side by side row by row, so that the rows of all ranks
    are a view of what came; others end to end.
    """
    parts = group_size(group)
    alike = {x.dtype: [at for at, other in enumerate(pieces) if other.dtype == x.dtype] for x in pieces}
    started = []
    for members in alike.values():
        to_each = max(pieces[at].shape[0] for at in members)
        first = pieces[members[0]].shape[1]
        side = 2 if all(statically_known_true(pieces[at].shape[1] == first) for at in members) else 1
        rows = [pieces[at].expand(to_each, *pieces[at].shape[1:]).unsqueeze(-1).flatten(side) for at in members]
        start = start_gather if to_each == 1 else start_exchange
        packed = start(torch.cat(rows, side) if len(rows) > 1 else rows[0], group)
        started.append((members, side, [row.shape[side] for row in rows], packed))
    received = list(pieces)
    for members, side, widths, packed in started:
        rows = arrived(packed).split(widths, side)
        for at, row in zip(members, rows, strict=True):
            received[at] = row.view(parts, *pieces[at].shape[1:])
    return received


def all_reduced(x: Tensor, kind: str, group: str) -> Tensor:
    """The sum, max or min over ranks, of a dtype that transports take."""
    return arrived(_collectives.all_reduce(x.contiguous(), kind, group))


def reduced(x: Tensor, kind: str, group: str) -> Tensor:
    """The sum, max or min over ranks; of half types in float32, where 131072 ones are finite."""
    if kind == "sum" and x.is_complex():
        return torch.view_as_complex(reduced(torch.view_as_real(x.resolve_conj()), kind, group))
    if x.dtype in HALVES:
        return all_reduced(x.float(), kind, group).to(x.dtype)
    if x.dtype == torch.bool and kind != "sum":
        return all_reduced(x.to(torch.uint8), kind, group).to(x.dtype)
    if x.dtype not in TRANSPORTED:
        raise SequenceParallelError(
            f"transports cannot reduce {x.dtype} over ranks ({kind}): convert the tensor to "
            "float32 or int64 before the operator that is reduced, and back after it"
        )
    return all_reduced(x, kind, group)
