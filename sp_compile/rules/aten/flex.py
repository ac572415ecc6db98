"""`flex_attention`: `b h q! d!, b h k! d!, b h k! v! -> b h q v, b h q, b h q`; grouped KV heads make h `(g r)`, or g.

A rank's batch entries and heads are numbered anew, so a `score_mod` or `mask_mod` that reads the number of one is told
the global one. The rank is data, one more buffer that the mod captures. Seven heads on two ranks:

    def score_mod(score, b, h, q, k, slopes):         def score_mod(score, b, h, q, k, slopes, rank):
        return score + slopes[h] * (k - q)        →       h = (h + rank[0] * 4).clamp(max=6)
                                                          return score + slopes[h] * (k - q)

A `BlockMask` is in blocks of the whole sequence, which is why the queries have to be whole as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import fx

from ...placement.placements import Sharded, Size
from ..dims import fit
from ..local_op import LocalOp
from ..op_call import OpCall
from ..registry import ATTENTION, AttentionRoles, rule
from ..rule import Dim, OpShardingRule
from .attention import head_factors

aten = torch.ops.aten
flex_attention = torch.ops.higher_order.flex_attention

ATTENTION[flex_attention] = AttentionRoles()

GlobalIndex = Callable[[Any, Any], Any]

_BUFFERS = ("score_mod_other_buffers", "mask_mod_other_buffers")


@rule(flex_attention)
def flex_attention_rule(call: OpCall) -> OpShardingRule | None:
    """Batch and heads pass. Block masks are cut along them where they have them; what the mods capture is whole."""
    query, key, value = (call[name].shape for name in ("query", "key", "value"))
    heads = head_factors(query, key, value, grouped=True)
    if heads is None:
        return None
    of_query, of_key, sizes = heads
    lead: dict[int, tuple[Dim, Size]] = {0: (("b",), query[0]), 1: (of_query[0], query[1])}
    masks = []
    for spec in (call.operands[at] for at, name in enumerate(call.operand_names) if name == "block_mask"):
        dims: list[Dim] = [()] * len(spec.shape)
        for at, (dim, size) in lead.items():
            if spec.shape[at] not in (1, size):
                return None
            dims[at] = dim if spec.shape[at] != 1 else ()
        masks.append(dims)
    captured: list[list[Dim]] = [
        [()] * len(spec.shape) for spec, name in zip(call.operands, call.operand_names, strict=True) if name in _BUFFERS
    ]

    def dims_of(shape: tuple[Size, ...], *named: Dim) -> list[Dim]:
        return [dim if size != 1 else () for dim, size in zip(named, shape, strict=True)]

    b, q, k, d, v = (("b",), ("q",), ("k",), ("d",), ("v",))
    operands = [
        dims_of(query, b, of_query[0], q, d),
        dims_of(key, b, of_key[0], k, d),
        dims_of(value, b, of_key[0], k, v),
        *masks,
        *captured,
    ]
    made = [dims_of((*query[:3], value[3]), b, of_query[0], q, v), *[dims_of(query[:3], b, of_query[0], q)] * 2]
    sizes = {**sizes, "b": query[0], "q": query[2], "k": key[2], "d": query[3], "v": value[3]}
    bodies = dict.fromkeys(("b", *of_query[0]), _with_global_indices)
    return fit(call, operands, made, sizes, need_replication=frozenset("qkdv"), bodies=bodies)


def _with_global_indices(local: LocalOp) -> fx.Node:
    """The op on the batch entries or heads of one rank, its mods told which these are."""
    call, placement = local.call, local.operands[0]
    assert isinstance(placement, Sharded)
    given: dict[str, Any] = {**dict.fromkeys(_BUFFERS, ()), **dict(zip(call.arguments, local.args, strict=False))}
    given |= local.kwargs
    mods = {"score_mod": (call["score_mod"], 1 + placement.dim), "mask_mod": (call["block_mask"][-1], placement.dim)}
    indexed = {name: at for name, (mod, at) in mods.items() if mod.graph.find_nodes(op="placeholder")[at].users}
    block = _block(placement, local.parts)
    global_index: GlobalIndex = getitem
    if block is not None:
        buffer, global_index = local.rank(), partial(_of_rank, block=block, size=placement.layout.size)
    elif indexed:
        buffer = local.positions(placement)
    for name, at in indexed.items():
        mod = local.module(name, _with_index(mods[name][0], at, global_index))
        given[f"{name}_other_buffers"] = (*given[f"{name}_other_buffers"], buffer)
        if name == "score_mod":
            given["score_mod"] = mod
        else:
            given["block_mask"] = (*given["block_mask"][:-1], mod)
    for name in ("query", "key", "value"):
        # Inductor's CPU template takes no view of what an exchange received.
        given[name] = local.emit(aten.clone.default, given[name], memory_format=torch.contiguous_format)
    return local.emit(call.target, *(given[name] for name in call.arguments))


def _block(placement: Sharded, parts: int) -> int | None:
    """How many rows in a row each rank holds, if that is all there is to a layout.

    The positions of any layout would do as a buffer, but Inductor wants one that is no result of others on CPU.
    """
    layout = placement.layout
    rows, local = layout.size, layout.local_size(parts)
    if layout.outer != 1 or len(layout.segments) > 1 or not isinstance(rows, int) or not isinstance(local, int):
        return None
    return local if layout.segments[0].granule == 1 or rows == local * parts else None


def _of_rank(rank: Any, index: Any, block: int, size: int) -> Any:
    """Padding repeats the last row."""
    return (index + rank[0] * block).clamp(max=size - 1).to(torch.int32)


def _with_index(mod: fx.GraphModule, position: int, global_index: GlobalIndex) -> fx.GraphModule:
    """A mod that reads `global_index(buffer, index)` for its argument `position`; the buffer is a last argument."""
    mod = copy.deepcopy(mod)
    placeholders = mod.graph.find_nodes(op="placeholder")
    index, users = placeholders[position], dict(placeholders[position].users)
    tracer = fx.proxy.GraphAppendingTracer(mod.graph)
    with mod.graph.inserting_after(placeholders[-1]):
        buffer = mod.graph.placeholder("rank")
    with mod.graph.inserting_before(buffer.next):
        made = global_index(fx.Proxy(buffer, tracer), fx.Proxy(index, tracer)).node
    for user in users:
        user.replace_input_with(index, made)
    mod.recompile()
    return mod
