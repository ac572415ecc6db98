"""`flex_attention`: `b h q! d!, b h k! d!, b h k! v! -> b h q v, b h q, b h q`; grouped KV heads make h `(g r)`, or g.

A rank's batch entries and heads are numbered anew, so a `score_mod` or `mask_mod` that reads the number of one is given
the global one: row `h` of a buffer that holds the global index of each local head.

    def score_mod(score, b, h, q, k, slopes):         def score_mod(score, b, h, q, k, slopes, heads):
        return score + slopes[h] * (k - q)        →       return score + slopes[heads[h]] * (k - q)

A `BlockMask` is in blocks of the whole sequence, which is why the queries have to be whole as well.
"""

from __future__ import annotations

import copy
from operator import getitem
from typing import Any

import torch
from torch import fx

from ..rule import Dim, LocalOp, OpCall, OpShardingRule
from ..sharding import Sharded, Size
from .attention import head_factors
from .dims import fit
from .registry import ATTENTION, AttentionRoles, rule

aten = torch.ops.aten
flex_attention = torch.ops.higher_order.flex_attention

ATTENTION[flex_attention] = AttentionRoles()

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
    score_mod = _indexed(call["score_mod"], 1 + placement.dim)
    mask_mod = _indexed(call["block_mask"][-1], placement.dim)
    index: tuple[fx.Node, ...] = ()
    if score_mod is not None or mask_mod is not None:
        index = (local.emit(aten._to_copy.default, local.positions(placement), dtype=torch.int32),)
    if score_mod is not None:
        given["score_mod"] = local.module("score_mod", score_mod)
        given["score_mod_other_buffers"] += index
    if mask_mod is not None:
        given["block_mask"] = (*given["block_mask"][:-1], local.module("mask_mod", mask_mod))
        given["mask_mod_other_buffers"] += index
    return local.emit(call.target, *(given[name] for name in call.arguments))


def _indexed(mod: fx.GraphModule, position: int) -> fx.GraphModule | None:
    """A mod whose argument `position` is looked up in its last one, a new buffer; None if it does not read it."""
    if not mod.graph.find_nodes(op="placeholder")[position].users:
        return None
    mod = copy.deepcopy(mod)
    *_, last = placeholders = mod.graph.find_nodes(op="placeholder")
    index = placeholders[position]
    with mod.graph.inserting_after(last):
        buffer = mod.graph.placeholder("global_index")
    with mod.graph.inserting_after(buffer):
        looked_up = mod.graph.call_function(getitem, (buffer, index))
    index.replace_all_uses_with(looked_up, delete_user_cb=lambda user: user is not looked_up)
    mod.recompile()
    return mod
