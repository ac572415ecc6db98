"""Inputs of which each rank holds only its rows, so that nobody loads the whole sequence.

    batch = {"input_ids": my_rows, "labels": my_labels}              # i64[1, 4] on rank 0, i64[1, 3] on rank 1
    model(**sharded_inputs(batch, {"input_ids": 1, "labels": 1}))    # the model sees i64[1, 7]

Dynamo traces a model by the shapes that it sees. Plain local rows would give every rank a short sequence of its own:
positions from 0, a mask of its own rows. So the rows are given in a tensor of the *global* shape that stores nothing
else; the backend plans with it as with any value that is sharded, and a rank's program reads its rows. Wherever
something else than a compiled graph would read it, in eager code say, it raises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed import ProcessGroup
from torch.distributed._local_tensor import LocalTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from sp_compile.distributed.group import rank_tensor, resolve_group
from sp_compile.distributed.words import gather_json
from sp_compile.errors import DataError
from sp_compile.placement.placements import block_rows


class ShardedInput(Tensor):
    """A tensor of global shape of which this rank has its rows only; `sharded_input` makes one.

    `block` has the rows of this rank, padded to `ceil(S / P)` so that all ranks have as many, and its history:
    gradients arrive at what it was made from.
    """

    block: Tensor
    sharded_dim: int
    group_name: str

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, block: Tensor, shape: Sequence[int], stride: Sequence[int], sharded_dim: int, group_name: str
    ) -> ShardedInput:
        kind: dict[str, Any] = {"dtype": block.dtype, "device": block.device, "requires_grad": block.requires_grad}
        made = Tensor._make_wrapper_subclass(cls, shape, stride, **kind)
        assert isinstance(made, ShardedInput)
        made.block, made.sharded_dim, made.group_name = block, sharded_dim, group_name
        return made

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, str]]:
        return ["block"], (self.sharded_dim, self.group_name)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], meta: tuple[int, str], shape: Sequence[int], stride: Sequence[int]
    ) -> ShardedInput:
        return ShardedInput(inner["block"], shape, stride, *meta)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ShardedInput(shape={list(self.shape)}, sharded_dim={self.sharded_dim}, block={self.block})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def whole(value: Any) -> Any:
            if not isinstance(value, ShardedInput):
                return value
            block = value.block
            if isinstance(block, LocalTensor):  # of simulated ranks
                block = next(iter(block._local_tensors.values()))
            if type(block) is not FakeTensor:  # nor one that AOTAutograd wraps: another backend would compile it
                raise DataError(
                    f"{func} would read a sharded input of shape {list(value.shape)}, of which each rank holds its "
                    "rows only: a model compiled with backend='sp_compile' takes it, and no other code, such as what "
                    "a graph break leaves to Python. What has to be read there is given whole"
                )
            return block.new_empty(value.shape)  # Dynamo asks for shapes

        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(value, ShardedInput):
                raise DataError(
                    f"{func} writes to a sharded input of shape {list(value.shape)}: write to a clone of it"
                )
        args, kwargs = pytree.tree_map(whole, (args, kwargs or {}))
        return func(*args, **kwargs)


def sharded_input(
    rows: Tensor, dim: int, size: int | None = None, *, group: ProcessGroup | DeviceMesh | None = None
) -> Tensor:
    """A tensor of global shape for a compiled model, from the rows of dimension `dim` that this rank holds.

    Rank r holds chunk r of `torch.chunk(whole, P, dim)`, as the local tensor of a DTensor with `Shard(dim)`: of 7 rows
    on 2 ranks 4 and 3; the last ranks may hold none. Every rank calls it. Gradients arrive at `rows`, those of the
    whole value's rows. Without an SP group, or in one of a single rank, it is `rows`.

    Args:
        size: the global size of `dim`; given, the ranks need not tell each other how many rows they have.
        group: the SP group, as in the option of that name.

    Raises:
        DataError: the rows are not such chunks. Without `size`, on every rank.
        RankLostError: a rank has ended, without `size`.
    """
    group = resolve_group(group)
    if not -rows.dim() <= dim < rows.dim():
        raise DataError(f"a tensor of shape {list(rows.shape)} has no dimension {dim}")
    dim %= rows.dim()
    if group is None or group.size() == 1:
        return rows
    parts, rank, name = group.size(), rank_tensor(group, rows.device), group.group_name
    held = dict(_held_here(rows, dim, rank))
    if size is None:
        held = held if len(held) == parts else _rows_of_all(rows, dim, group)
        size = sum(held.values())
    for place, count in held.items():
        _check_rows(count, place, parts, size, dim)
    block = block_rows(size, 1, parts)
    padding = [*rows.shape[:dim], block, *rows.shape[dim + 1 :]]
    local = rows.contiguous()
    if size != block * parts:
        local = torch.cat([rows, rows.new_zeros(padding)], dim).narrow(dim, 0, block)
        local = torch.ops.sp.refill_padding(local, rank, dim, 1, [size], [1], name).contiguous()
    shape = [*rows.shape[:dim], size, *rows.shape[dim + 1 :]]
    return ShardedInput(local, shape, torch.empty(shape, device="meta").stride(), dim, name)


def sharded_inputs(
    batch: Mapping[str, Any], dims: Mapping[str, int], *, group: ProcessGroup | DeviceMesh | None = None
) -> dict[str, Any]:
    """A batch whose tensors named in `dims` are the rows of a dimension that this rank holds; see `sharded_input`.

    Raises `DataError` for a name that the batch does not have.
    """
    for name in dims:
        if not isinstance(batch.get(name), Tensor):
            raise DataError(f"the batch has no tensor {name!r}; it has {', '.join(map(repr, batch))}")
    return {
        name: sharded_input(value, dims[name], group=group) if name in dims else value for name, value in batch.items()
    }


def _held_here(rows: Tensor, dim: int, rank: Tensor) -> Iterator[tuple[int, int]]:
    """How many rows this rank holds, by its place in the group; or each of the ranks that this process simulates."""
    if isinstance(rank, LocalTensor):
        for simulated, place in rank._local_tensors.items():
            own = rows._local_tensors[simulated] if isinstance(rows, LocalTensor) else rows
            yield int(place), own.shape[dim]
    elif isinstance(rows.shape[dim], int):
        yield int(rank), rows.shape[dim]


def _rows_of_all(rows: Tensor, dim: int, group: ProcessGroup) -> dict[int, int]:
    """How many rows each rank holds; checks that nothing else differs."""
    others = [*rows.shape[:dim], *rows.shape[dim + 1 :]]
    said = gather_json([rows.shape[dim], dim, others, str(rows.dtype)], group, "sharded_input")
    for rank, each in enumerate(said):
        if each[1:] != said[0][1:]:
            ours, theirs = (f"dimension {d} of {dtype} beside {sizes}" for _, d, sizes, dtype in (said[0], each))
            raise DataError(f"rank 0 holds rows of {ours}, rank {rank} of {theirs}: ranks hold rows of one tensor")
    return {rank: each[0] for rank, each in enumerate(said)}


def _check_rows(count: int, rank: int, parts: int, size: int, dim: int) -> None:
    block = block_rows(size, 1, parts)
    expected = min(max(size - rank * block, 0), block)
    if count != expected:
        raise DataError(
            f"rank {rank} holds {count} rows of dimension {dim}; of {size} on {parts} ranks it holds {expected}, as "
            f"torch.chunk(whole, {parts}, {dim})[{rank}] does"
        )
