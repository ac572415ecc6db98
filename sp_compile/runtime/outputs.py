"""How the outputs of a rewritten graph leave it: whole, as a rank's own rows, or as DTensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..distributed.group import cached_while_groups_last, mesh_of
from ..ir.plan import LeavingOutput
from ..placement.placements import Sharded


def leaving(
    plans: Sequence[LeavingOutput], group: dist.ProcessGroup, given: dist.ProcessGroup | DeviceMesh | None
) -> Callable[[Sequence[Any]], list[Any]]:
    """What makes the outputs of a `ShardedGraph` those of the user: without padding, and as DTensors where asked.

    The gradient of a DTensor is that of the whole value, of which `from_local` hands each rank its rows: what "shard"
    calls the gradient of the sum of the ranks' losses, that sum being the one loss.
    """

    kept = weakref.ref(group)  # a compiled callable does not keep a group that its owner has destroyed

    @cached_while_groups_last
    def mesh(device_type: str) -> DeviceMesh:
        alive = kept()
        assert alive is not None
        return mesh_of(alive, given, device_type)

    def leave(outputs: Sequence[Any]) -> list[Any]:
        left, behind = list(outputs[: len(plans)]), iter(outputs[len(plans) :])
        for index, plan in enumerate(plans):
            if isinstance(plan.placement, Sharded):
                value, dim = left[index], plan.placement.dim
                order = _memory_order(value, plan.is_padded)
                if plan.is_padded:
                    value = value.index_select(dim, next(behind).nonzero().flatten())
                if plan.size is not None:
                    size = plan.size if isinstance(plan.size, int) else next(behind)
                    value = _as_dtensor(value, dim, size, order, mesh(value.device.type))
                left[index] = value
        return left

    return leave


def _memory_order(value: Tensor, is_padded: bool) -> list[int]:
    """The dimensions from the innermost in memory to the outermost; what padding is cut off is laid out anew."""
    strides = value.stride()
    return sorted(range(value.dim()), key=lambda dim: (0 if is_padded else strides[dim], -dim))


def _as_dtensor(value: Tensor, dim: int, size: int, order: Sequence[int], mesh: DeviceMesh) -> DTensor:
    """`size` is the global one of dimension `dim`, `order` that of the dimensions in memory."""
    shape = torch.Size([*value.shape[:dim], size, *value.shape[dim + 1 :]])
    strides, step = [0] * value.dim(), 1
    for d in order:
        strides[d], step = step, step * shape[d]
    return DTensor.from_local(value, mesh, [Shard(dim)], run_check=False, shape=shape, stride=tuple(strides))
