"""The operations of a hand-written sequence-parallel model, under their usual names; eager, or in a compiled function.

    grid = [[frames, height, width]]                                             # S = frames * height * width
    x = slice_inputs(x, dim=0)                                                   # [S, C]       -> [ceil(S/P), C]
    qkv = gather_seq_scatter_heads_qkv(to_qkv(x), seq_dim=0, qkv_shape=grid)     # [., 3*H*D]   -> [S, 3*H/P*D]
    x = gather_heads_scatter_seq(attention(qkv), head_dim=1, seq_dim=0)          # [S, H/P*D]   -> [ceil(S/P), H*D]
    y = gather_outputs(head(x), gather_dim=0, padding_dim=0, unpad_shape=grid)   # [., C]       -> [S, C]

The pair in the middle is Ulysses (DeepSpeed-Ulysses: Jacobs et al. 2023). Each function is a few calls of the `sp::`
ops that the compiled path runs on, and can be differentiated as often as one likes. `group` is a process group or a
mesh, `None` the group of `init_sequence_parallel`; without one, or with P = 1, every function is the identity. A
dimension may be negative. Rank r holds the rows from `r * ceil(S/P)` on. **Values are padded by repeating the last row,
gradients by zeros**; a gradient that arrives at padding is dropped.

Gradients. With x_r what rank r holds, g_r the gradient of its result, and g one that is the same on every rank because
every rank computes the same loss from the gathered value:

    function                       forward                     backward              when scaled
    slice_inputs, scatter_heads    y_r = x[rows of r]          cat_r(g_r)            cat_r(g_r) / P
    gather_outputs, gather_heads   y = cat_r(x_r)              g[rows of r]          P g[rows of r]
    all-to-all, all kinds          y_r = cat_s(x_s[.., r])     the exchange back     never

Scale all four or none. *None*: a parameter used on sharded values gets a part of its gradient on each rank, to be
summed over ranks; one used on replicated values gets all of it on every rank. *All*: between slice and gather gradients
are P times larger, and the *average* over ranks (DDP, FSDP) is the single-device gradient of every parameter and input,
wherever it is used. `gather_outputs` scales by default and the others do not: with it, scale `gather_heads` too, and
`slice_inputs` and `scatter_heads` where something trained lies before them.

Errors are `SequenceParallelError`s: a dimension that is not there, one dimension given as two, a device that the group
does not move, a packed dimension that is not q, k, v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast, overload

import torch
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.compiler import assume_constant_result
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName

from sp_compile.distributed.group import rank_tensor, resolve_group
from sp_compile.errors import SequenceParallelError
from sp_compile.ops import sp_ops as ops  # noqa: F401  defines torch.ops.sp
from sp_compile.placement.placements import block_rows

__all__ = [
    "Cache",
    "PendingAllToAll",
    "SeqAllToAll",
    "gather_heads",
    "gather_heads_scatter_seq",
    "gather_outputs",
    "gather_seq_scatter_heads",
    "gather_seq_scatter_heads_qkv",
    "pad_tensor",
    "remove_sequence_parallel_padding",
    "scatter_heads",
    "seq_all_to_all",
    "single_all_to_all",
    "slice_inputs",
    "unpad_tensor",
]

Group: TypeAlias = ProcessGroup | DeviceMesh | None
Shapes: TypeAlias = Tensor | Sequence[Sequence[int]]
_T = TypeVar("_T")
_sp = torch.ops.sp


class Cache:
    """Values that are the same all through a step, such as unpadded lengths, computed once per key.

        cache = Cache()                         # a new one for every step
        video = cache.namespace("video")        # the same store, under keys "video.…"
        length = video("length", lambda: int(shape.prod(-1).sum()))

    Args:
        disable: compute anew at every call, and store nothing.
        prefix: what every key begins with.
        cache: the store; a new one by default.
    """

    def __init__(self, disable: bool = False, prefix: str = "", cache: dict[str, Any] | None = None) -> None:
        self.disable = disable
        self.prefix = prefix
        self.cache: dict[str, Any] = {} if cache is None else cache

    def __call__(self, key: str, compute: Callable[[], _T]) -> _T:
        """The value of `key`: `compute()` at the first call, the same object afterwards."""
        if self.disable:
            return compute()
        if self.prefix + key not in self.cache:
            self.cache[self.prefix + key] = compute()
        value: _T = self.cache[self.prefix + key]
        return value

    def namespace(self, name: str) -> Cache:
        """A view of the same store whose keys cannot meet those of another stream."""
        return Cache(self.disable, f"{self.prefix}{name}.", self.cache)

    def get(self, key: str) -> Any:
        """The stored value of `key`; raises KeyError if nothing computed it."""
        return self.cache[self.prefix + key]


_NO_CACHE = Cache(disable=True)


class _Place(NamedTuple):
    """A group of more than one rank: its name, P, and the device types that it moves."""

    group: str
    parts: int
    devices: tuple[str, ...]


class _Ranks:
    """For each group and device an attribute: my rank, int64 `[1]`. A compiled function reads it as an input."""


_ranks = _Ranks()


# Dynamo keeps what these return and compiles anew when the groups change, since `init_sequence_parallel` resets it.
@assume_constant_result  # type: ignore[untyped-decorator]
def _find_place(name: str | None) -> _Place | None:
    group = _find_group(name)
    if group is None or group.size() == 1:
        return None
    return _Place(group.group_name, group.size(), tuple(sorted(device.type for device in group._device_types)))


@assume_constant_result  # type: ignore[untyped-decorator]
def _keep_rank(name: str, device: torch.device) -> str:
    """The name of the attribute of `_ranks`."""
    group, key = _find_group(name), f"rank in {name} on {device}"
    assert group is not None
    rank, kept = rank_tensor(group, device), getattr(_ranks, key, None)
    # The same tensor while nothing has changed: a graph reads it once.
    if kept is None or type(kept) is not Tensor or type(rank) is not Tensor or not torch.equal(kept, rank):
        setattr(_ranks, key, rank)
    return key


@assume_constant_result  # type: ignore[untyped-decorator]
def _rank_number(name: str) -> int:
    group = _find_group(name)
    assert group is not None
    return cast(int, rank_tensor(group, "cpu").item())  # under LocalTensorMode a SymInt, the rank of each


def _find_group(name: str | None) -> ProcessGroup | None:
    return resolve_group(None) if name is None else _resolve_process_group(GroupName(name))


def _group_name(group: Group) -> str | None:
    found = None if group is None else resolve_group(group)
    return None if found is None else found.group_name


def _rank(x: Tensor, place: _Place) -> Tensor:
    """My rank as data: all ranks compile the same text."""
    if not torch.compiler.is_compiling():
        group = _find_group(place.group)
        assert group is not None
        return rank_tensor(group, x.device)
    rank: Tensor = getattr(_ranks, _keep_rank(place.group, x.device))
    return rank


def _place(x: Tensor, group: Group) -> _Place | None:
    """Where `x` can be sent, or None if there is nobody to send it to."""
    place: _Place | None = _find_place(_group_name(group))
    if place is not None and x.device.type not in place.devices:
        raise SequenceParallelError(
            f"a tensor on the device {str(x.device)!r}, but the group of {place.parts} ranks moves tensors on "
            f"{' and '.join(place.devices)}: move the tensor there, or make a group with a backend for its device"
        )
    return place


def _dims(x: Tensor, **dims: int) -> list[int]:
    """The dimensions from the front; they are there, and no two are the same."""
    found: dict[int, str] = {}
    for name, dim in dims.items():
        if not -x.dim() <= dim < x.dim():
            valid = f"give {-x.dim()} to {x.dim() - 1}" if x.dim() else "it has none"
            raise SequenceParallelError(f"a tensor of shape {list(x.shape)} has no dimension {name}={dim}: {valid}")
        other = found.setdefault(dim % x.dim(), name)
        if other != name:
            raise SequenceParallelError(
                f"{other}={dims[other]} and {name}={dim} are the same dimension of a tensor of shape {list(x.shape)}: "
                "one becomes whole and the other is cut, so they must differ"
            )
    return list(found)


def _all_to_all(x: Tensor, gather_dim: int, scatter_dim: int, place: _Place) -> Tensor:
    gather, scatter = _lengths(x, gather_dim, place.parts), _lengths(x, scatter_dim)
    result: Tensor = _sp.all_to_all(x, gather_dim, *gather, scatter_dim, *scatter, place.group).contiguous()
    return result


def _all_gather(x: Tensor, dim: int, place: _Place, factor: float) -> Tensor:
    x = _sp.scale_gradient(x, factor) if factor != 1 else x
    result: Tensor = _sp.all_gather(x, _rank(x, place), dim, *_lengths(x, dim, place.parts), place.group)
    return result


def _shard(x: Tensor, dim: int, place: _Place, factor: float) -> Tensor:
    x = _sp.scale_gradient(x, factor) if factor != 1 else x
    result: Tensor = _sp.shard(x, _rank(x, place), dim, *_lengths(x, dim), place.group)
    return result


def _lengths(x: Tensor, dim: int, parts: int = 1) -> tuple[int, list[int], list[int]]:
    """Outer, sizes and granules of a dimension of which `x` holds one of `parts` equal parts."""
    return 1, [x.shape[dim] * parts], [1]


def _total(shapes: Shapes, cache: Cache) -> int:
    """The tokens of all sequences, `sum(prod(shapes))`; of a tensor on a device, one sync per cache key."""
    if isinstance(shapes, Tensor):
        return cache("unpad_dim_size", lambda: int(shapes.prod(-1).sum()))
    return sum(math.prod(shape) for shape in shapes)


@dataclass(eq=False)
class PendingAllToAll:
    """An all-to-all that is under way. `wait()` finishes it, transposition included.

    Attributes:
        output: `[P, ...]`, a piece from each rank; its contents are undefined before `wait()`. Its last dimension are
            bytes for a dtype that transports do not know (int16, bool, complex).
        layout: `(gather_dim, scatter_dim)` from the front: the pieces lie end to end along `gather_dim` of the result.
        finish: `finish(output)` waits, and lays out; what `wait()` calls once.

    `output, handle, layout = pending` works too; the handle is this object.
    """

    output: Tensor
    layout: tuple[int, int]
    finish: Callable[[Tensor], Tensor]
    _result: Tensor | None = field(default=None, repr=False)

    def wait(self) -> Tensor:
        """The result of the all-to-all, in its final layout; the same tensor at every call."""
        if self._result is None:
            self._result = self.finish(self.output)
        return self._result

    def __iter__(self) -> Iterator[Any]:
        return iter((self.output, self, self.layout))


@overload
def single_all_to_all(
    x: Tensor, scatter_dim: int, gather_dim: int, group: Group = ..., async_op: Literal[False] = ...
) -> Tensor: ...
@overload
def single_all_to_all(
    x: Tensor, scatter_dim: int, gather_dim: int, group: Group = ..., *, async_op: Literal[True]
) -> PendingAllToAll: ...
@overload
def single_all_to_all(
    x: Tensor, scatter_dim: int, gather_dim: int, group: Group = ..., async_op: bool = ...
) -> Tensor | PendingAllToAll: ...
def single_all_to_all(
    x: Tensor, scatter_dim: int, gather_dim: int, group: Group = None, async_op: bool = False
) -> Tensor | PendingAllToAll:
    """One all-to-all: `scatter_dim` is cut into P, `gather_dim` becomes P times as long. Also named `seq_all_to_all`.

    `[.., n, .., m, ..]` -> `[.., ceil(n/P), .., P*m, ..]`; `y_r = cat_s(x_s[.., r])`. An indivisible `scatter_dim` is
    padded by its last row. Backward is the exchange back, 0 at padding (Jacobs et al. 2023).

    Args:
        async_op: return at once, with a `PendingAllToAll` whose `wait()` gives the result. Its gradient is the same.

    Raises:
        SequenceParallelError: a dimension out of range, both the same, or a device that the group does not move.
    """
    scatter_dim, gather_dim = _dims(x, scatter_dim=scatter_dim, gather_dim=gather_dim)
    place = _place(x, group)
    layout = (gather_dim, scatter_dim)
    if place is None:
        return PendingAllToAll(x, layout, lambda output: output) if async_op else x
    if not async_op:
        return _all_to_all(x, gather_dim, scatter_dim, place)
    gather, dtype, name = _lengths(x, gather_dim, place.parts), x.dtype, place.group

    def finish(output: Tensor) -> Tensor:
        result: Tensor = _sp.finish_all_to_all(output, gather_dim, *gather, dtype, name)
        return result

    output = _sp.start_all_to_all(x, scatter_dim, *_lengths(x, scatter_dim), name)
    return PendingAllToAll(output, layout, finish)


# The ops are differentiable, so that the call with a gradient and the one without are the same.
seq_all_to_all = single_all_to_all


class SeqAllToAll:
    """`seq_all_to_all` in the usual spelling of an autograd Function; that is inside the `sp::` ops."""

    @staticmethod
    def apply(
        group: Group, x: Tensor, scatter_dim: int, gather_dim: int, async_op: bool = False
    ) -> Tensor | PendingAllToAll:
        """`seq_all_to_all(x, scatter_dim, gather_dim, group, async_op)`."""
        return seq_all_to_all(x, scatter_dim, gather_dim, group, async_op)


def gather_seq_scatter_heads(
    x: Tensor, seq_dim: int, head_dim: int, *, unpad_dim_size: int | None = None, group: Group = None
) -> Tensor:
    """Before attention: my part of the sequence, all heads -> the whole sequence, my heads.

    `[B, S/P, H, D]` -> `[B, S, ceil(H/P), D]`, for any two dimensions; backward is `gather_heads_scatter_seq`, 0 at
    padding (Jacobs et al. 2023). Heads that P does not divide are padded by the last head.

    Args:
        unpad_dim_size: S in tokens, to remove the padding of the sequence; else it stays: P times the local length.

    Raises:
        SequenceParallelError: as `single_all_to_all`, or S longer than what was gathered.
    """
    seq_dim, head_dim = _dims(x, seq_dim=seq_dim, head_dim=head_dim)
    place = _place(x, group)
    return x if place is None else _unpad_to(_all_to_all(x, seq_dim, head_dim, place), seq_dim, unpad_dim_size)


def gather_heads_scatter_seq(
    x: Tensor, head_dim: int, seq_dim: int, *, unpad_dim_size: int | None = None, group: Group = None
) -> Tensor:
    """After attention: the whole sequence, my heads -> my part of the sequence, all heads.

    `[B, S, H/P, D]` -> `[B, ceil(S/P), H, D]`, for any two dimensions; backward is `gather_seq_scatter_heads`, the
    padding dropped (Jacobs et al. 2023). A sequence that P does not divide is padded by its last token.

    Args:
        unpad_dim_size: H, to remove padded heads; else they stay: P times the local heads.

    Raises:
        SequenceParallelError: as `single_all_to_all`, or H more than what was gathered.
    """
    head_dim, seq_dim = _dims(x, head_dim=head_dim, seq_dim=seq_dim)
    place = _place(x, group)
    return x if place is None else _unpad_to(_all_to_all(x, head_dim, seq_dim, place), head_dim, unpad_dim_size)


def gather_seq_scatter_heads_qkv(
    qkv: Tensor,
    *,
    seq_dim: int,
    qkv_shape: Shapes | None = None,
    cache: Cache = _NO_CACHE,
    restore_shape: bool = True,
    heads: int | None = None,
    group: Group = None,
) -> Tensor:
    """`gather_seq_scatter_heads` of q, k and v packed in the last dimension, in one collective.

    `[.., S/P, .., 3*H*D]`, the last dimension read as `(3, H, D)` -> `[.., S, .., 3*ceil(H/P)*D]`. Backward is the
    exchange back, 0 at padding (Jacobs et al. 2023).

    Args:
        qkv_shape: the shape of each sequence, `[n, k]`, as a tensor or lists of ints: the padding behind the first
            `sum(prod(qkv_shape))` tokens is removed. A tensor on a device is read once per `cache` (one sync); a
            function compiled with `fullgraph=True` wants ints.
        cache: keeps that sum, as "unpad_dim_size", for tensors; one namespace for each stream of tokens.
        restore_shape: False leaves q, k and v a dimension: `[.., S, .., 3, ceil(H/P)*D]`, with one rank too.
        heads: H, so that heads which P does not divide are padded by the last one; without it P must divide H.

    Raises:
        SequenceParallelError: the last dimension is not three of a whole number of heads, P does not divide it and
            `heads` is not given, `seq_dim` is the last dimension; and as `gather_seq_scatter_heads`.
    """
    seq_dim, last = _dims(qkv, seq_dim=seq_dim, last_dim=-1)
    size = qkv.shape[last]
    if size % 3 or (heads is not None and size % (3 * heads)):
        packed = "q, k and v" if heads is None else f"q, k and v of {heads} heads each"
        raise SequenceParallelError(
            f"the last dimension of a tensor of shape {list(qkv.shape)} holds {packed}, so its size must be "
            f"divisible by {3 * (heads or 1)}; it is {size}"
        )
    place = _place(qkv, group)
    if place is not None:
        if heads is None and size // 3 % place.parts:
            raise SequenceParallelError(
                f"{place.parts} ranks cannot share the {size // 3} columns of q evenly: pass heads=, the number of "
                "heads in the last dimension, and they are padded by whole heads"
            )
        granule = 1 if heads is None else size // 3 // heads
        gather = _lengths(qkv, seq_dim, place.parts)
        qkv = _sp.all_to_all(qkv, seq_dim, *gather, last, 3, [size // 3], [granule], place.group)
        qkv = qkv if qkv_shape is None else _unpad_to(qkv, seq_dim, _total(qkv_shape, cache))
    return qkv if restore_shape else qkv.unflatten(-1, (3, -1))


def slice_inputs(x: Tensor, dim: int, padding: bool = True, *, scale_grad: bool = False, group: Group = None) -> Tensor:
    """This rank's part of a sequence that every rank holds: `[B, S, C]` -> `[B, ceil(S/P), C]`; no communication.

    `y_r = x[rows of r]`; backward gathers: `cat_r(g_r)`, the padding dropped, on every rank.

    Args:
        padding: pad the last parts by the last row to `ceil(S/P)` rows. If False they are shorter, perhaps empty, where
            P does not divide S: for values that stay on this rank, since collectives want equal parts.
        scale_grad: divide the gradient by P: the counterpart of `gather_outputs(scale_grad=True)`, wanted where
            something before this call is trained.

    Raises:
        SequenceParallelError: `dim` out of range, or a device that the group does not move.
    """
    (dim,) = _dims(x, dim=dim)
    place = _place(x, group)
    if place is None:
        return x
    part = _shard(x, dim, place, 1 / place.parts if scale_grad else 1)
    if padding or x.shape[dim] % place.parts == 0:
        return part
    unit = block_rows(x.shape[dim], 1, place.parts)
    return part.narrow(dim, 0, torch.sym_max(0, torch.sym_min(unit, x.shape[dim] - _rank_number(place.group) * unit)))


def scatter_heads(x: Tensor, dim: int, grad_scale: bool = False, *, group: Group = None) -> Tensor:
    """My heads of a replicated stream, such as text tokens beside sharded video tokens; no communication.

    `[B, S, H, D]` -> `[B, S, ceil(H/P), D]`, padded by the last head. Backward gathers: `cat_r(g_r)`, the padding
    dropped; divided by P if `grad_scale`, the counterpart of `gather_heads(grad_scale=True)`.

    Raises:
        SequenceParallelError: `dim` out of range, or a device that the group does not move.
    """
    return slice_inputs(x, dim, scale_grad=grad_scale, group=group)


def gather_heads(
    x: Tensor, dim: int, grad_scale: bool = False, *, unpad_dim_size: int | None = None, group: Group = None
) -> Tensor:
    """All heads of a stream, on every rank: `[B, S, H/P, D]` -> `[B, S, H, D]`, the inverse of `scatter_heads`.

    `y = cat_r(x_r)`; backward `g[heads of r]`, 0 at padding, multiplied by P if `grad_scale`.

    Args:
        unpad_dim_size: H, to remove padded heads; else they stay: P times the local heads.

    Raises:
        SequenceParallelError: `dim` out of range, a device that the group does not move, or H more than gathered.
    """
    (dim,) = _dims(x, dim=dim)
    place = _place(x, group)
    if place is None:
        return x
    return _unpad_to(_all_gather(x, dim, place, place.parts if grad_scale else 1), dim, unpad_dim_size)


def gather_outputs(
    x: Tensor,
    *,
    gather_dim: int,
    padding_dim: int | None = None,
    unpad_shape: Shapes | None = None,
    cache: Cache = _NO_CACHE,
    scale_grad: bool = True,
    group: Group = None,
) -> Tensor:
    """The whole result on every rank: `[B, ceil(S/P), C]` -> `[B, P*ceil(S/P), C]`, or `[B, S, C]` if told S.

    `y = cat_r(x_r)`; backward `g[rows of r]`, 0 at padding, multiplied by P if `scale_grad`: parameters used before
    this call then have the single-device gradient after *averaging* over ranks; without it after summing.

    Args:
        padding_dim: the dimension to remove padding from; given together with `unpad_shape`.
        unpad_shape: the shape of each sequence, `[n, k]`; `sum(prod(unpad_shape))` rows are left, as for
            `gather_seq_scatter_heads_qkv`.
        cache: keeps that sum, as "unpad_dim_size", for tensors.

    Raises:
        SequenceParallelError: a dimension out of range, a device that the group does not move, only one of
            `padding_dim` and `unpad_shape`, or more rows asked for than there are.
    """
    (gather_dim,) = _dims(x, gather_dim=gather_dim)
    (padding_dim,) = (None,) if padding_dim is None else _dims(x, padding_dim=padding_dim)
    if (padding_dim is None) != (unpad_shape is None):
        raise SequenceParallelError("padding_dim says where padding is, and unpad_shape how long the rest: give both")
    place = _place(x, group)
    if place is None:
        return x
    x = _all_gather(x, gather_dim, place, place.parts if scale_grad else 1)
    if padding_dim is None or unpad_shape is None:
        return x
    return _unpad_to(x, padding_dim, _total(unpad_shape, cache))


def remove_sequence_parallel_padding(x: Tensor, dim: int, unpad_dim_size: int, *, group: Group = None) -> Tensor:
    """The first `unpad_dim_size` rows of `dim`: `[B, P*ceil(S/P), C]` -> `[B, S, C]`, a view. Backward pads with zeros.

    Raises:
        SequenceParallelError: `dim` out of range, or there are fewer rows.
    """
    (dim,) = _dims(x, dim=dim)
    return x if _find_place(_group_name(group)) is None else _unpad_to(x, dim, unpad_dim_size)


def _unpad_to(x: Tensor, dim: int, size: int | None) -> Tensor:
    if size is None:
        return x
    # Symbolic sizes are not compared: that would be a guard.
    if isinstance(size, int) and isinstance(x.shape[dim], int) and not 0 <= size <= x.shape[dim]:
        raise SequenceParallelError(
            f"dimension {dim} of a tensor of shape {list(x.shape)} cannot be unpadded to {size} rows: "
            f"it has {x.shape[dim]}, padding included"
        )
    return x.narrow(dim, 0, size)


def pad_tensor(x: Tensor, dim: int, padding_size: int, padding_value: float = 0) -> Tensor:
    """`padding_size` rows of `padding_value` behind `dim`: `[n, C]` -> `[n + padding_size, C]`. Backward drops them.

    Raises:
        SequenceParallelError: `dim` out of range, or a negative size.
    """
    (dim,) = _dims(x, dim=dim)
    if padding_size < 0:
        raise SequenceParallelError(f"padding_size={padding_size} is negative; unpad_tensor removes rows")
    if padding_size == 0:
        return x
    return torch.cat([x, x.new_full([*x.shape[:dim], padding_size, *x.shape[dim + 1 :]], padding_value)], dim)


def unpad_tensor(x: Tensor, dim: int, padding_size: int) -> Tensor:
    """Without the last `padding_size` rows of `dim`, the inverse of `pad_tensor`, a view. Backward pads with zeros.

    Raises:
        SequenceParallelError: `dim` out of range, or there are fewer rows.
    """
    (dim,) = _dims(x, dim=dim)
    return _unpad_to(x, dim, x.shape[dim] - padding_size)
