"""Fused attention: `b h q d!, b h k! d!, b h k! v -> b h q v`; with grouped KV heads q is `b (g r) q d!`.

Packed, in documents that begin where `cu_seq` says: `q! h d!, k! h d!, k! h d!, n!, n! -> q! h d!, h q!`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.attention.varlen  # defines torch_attn::_varlen_attn
from torch import fx

from ...placement.placements import Sharded, Size, exact_quotient
from ..dims import fit
from ..local_op import Body, LocalOp
from ..op_call import OpCall
from ..registry import ATTENTION, AttentionRoles, decomposed_when, rule
from ..rule import Dim, OpShardingRule

aten = torch.ops.aten


packed_attention = torch.ops.torch_attn._varlen_attn.default

ATTENTION[aten.scaled_dot_product_attention.default] = AttentionRoles()
ATTENTION[packed_attention] = AttentionRoles((0, 0), (1, 0), (2, 0))


@decomposed_when(aten.scaled_dot_product_attention.default)
def _drops(arguments: Mapping[str, Any]) -> bool:
    """A fused kernel draws its dropout from the generator, alike on every rank; written out it is `aten.dropout`."""
    return bool(arguments.get("dropout_p", 0))


@rule(
    aten.scaled_dot_product_attention.default,
    because="a query weighs all keys by whole dot products: the site borrows the heads, or gathers keys and values",
)
def attention_rule(call: OpCall) -> OpShardingRule | None:
    """Batch, heads and queries pass; keys and the head dimension of q and k have to be whole.

    None with active dropout, which `_drops` has captured in parts.
    """
    result = call.results[0]
    if result is None or call["dropout_p"] != 0:
        return None
    query, key, value = (spec.shape for spec in call.operands[:3])
    lead = len(result.shape) - 2
    heads = head_factors(query, key, value, call["enable_gqa"])
    if heads is None:
        return None
    sizes: dict[str, Size] = {"q": query[-2], "k": key[-2], "d": query[-1], "v": value[-1]}
    outer = [f"b{at}" for at in range(lead - 1)]
    sizes |= dict(zip(outer, result.shape, strict=False))
    names = [*((name,) for name in outer), *heads[0][-lead:]] if lead else []
    grouped = [*((name,) for name in outer), *heads[1][-lead:]] if lead else []
    sizes |= heads[2]

    def dims(shape: Sequence[Size], lead_names: Sequence[tuple[str, ...]], *last: str) -> list[Dim]:
        """Aligned at the right; a dimension of size 1 broadcasts, or has nothing to shard."""
        named = [*lead_names, *((name,) for name in last)][-len(shape) :] if shape else []
        return [dim if size != 1 else () for dim, size in zip(named, shape, strict=True)]

    operands = [dims(query, names, "q", "d"), dims(key, grouped, "k", "d"), dims(value, grouped, "k", "v")]
    operands += [dims(mask.shape, names, "q", "k") for mask in call.operands[3:]]
    rule = fit(call, operands, [dims(result.shape, names, "q", "v")], sizes, need_replication=frozenset("kd"))
    fits = all(
        size == 1 or size == _size(rule, dim)
        for spec, own in zip(call.operands, operands, strict=True)
        for dim, size in zip(own, spec.shape, strict=True)
    )
    if not fits:
        return None
    bodies: dict[str, Body] = {"q": _causal} if call["is_causal"] else {}
    return fit(call, operands, rule.results, sizes, need_replication=rule.need_replication, bodies=bodies)


def head_factors(
    query: Sequence[Size], key: Sequence[Size], value: Sequence[Size], grouped: bool
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]], dict[str, Size]] | None:
    """The factors of the heads of q and of k and v, and their sizes; None if they do not fall into groups."""
    if len(query) < 3 or not grouped or query[-3] == key[-3] or key[-3] == 1:
        size = next((shape[-3] for shape in (query, key, value) if len(shape) > 2 and shape[-3] != 1), 1)
        return [("h",)], [("h",)], {"h": size}
    ratio = exact_quotient(query[-3], key[-3])
    if ratio is None or key[-3] != value[-3]:
        return None
    return [("g", "r")], [("g",)], {"g": key[-3], "r": ratio}


def _size(rule: OpShardingRule, dim: Dim) -> Size:
    assert isinstance(dim, tuple)
    total: Size = 1
    for factor in dim:
        total = total * rule.sizes[factor]
    return total


def _causal(local: LocalOp) -> fx.Node:
    """Causal attention for the queries of one rank: row i sees the keys up to its global position."""
    call, placement = local.call, local.operands[0]
    assert isinstance(placement, Sharded)
    query = call.operands[0]
    rows = local.emit(aten.unsqueeze.default, local.positions(placement), 1)
    size = local.size(call.operands[1].shape[-2])
    columns = local.emit(aten.arange.default, size, dtype=torch.int64, device=query.device)
    later = local.computed_again(local.emit(aten.lt.Tensor, rows, columns))
    # Additive: of a bool one the op would keep what it makes of it, `[S / P, S]` in the dtype of the query.
    zeros = local.computed_again(local.emit(aten.zeros_like.default, later, dtype=query.dtype))
    mask = local.computed_again(local.emit(aten.masked_fill.Scalar, zeros, later, -math.inf))
    operands = [local.operand(index) for index in range(3)]
    return local.emit(call.target, *operands, mask, 0.0, False, scale=call["scale"], enable_gqa=call["enable_gqa"])


@rule(packed_attention)
def packed_attention_rule(call: OpCall) -> OpShardingRule | None:
    """Heads pass. None for a paged cache, whose keys are in no order of tokens."""
    if call["block_table"] is not None:
        return None
    query, key, value = (spec.shape for spec in call.operands[:3])
    q, k, v = ((shape[1], shape[0], shape[2]) for shape in (query, key, value))  # heads before tokens
    heads = head_factors(q, k, v, call["enable_gqa"])
    if heads is None:
        return None
    of_query, of_key, sizes = heads
    lengths_and_heads = [(("q",), of_query[0], query), (("k",), of_key[0], key), (("k",), of_key[0], value)]
    operands: list[list[Dim]] = [
        [dim if size != 1 else () for dim, size in zip((length, head, ("d",)), shape, strict=True)]
        for length, head, shape in lengths_and_heads
    ]
    operands += [[()] * len(spec.shape) for spec in call.operands[3:]]
    made: list[list[Dim]] = [operands[0], [operands[0][1], operands[0][0]], [()]]
    bodies: dict[str, Body] = dict.fromkeys(of_query[0], _again)  # the state of the generator draws nothing
    return fit(call, operands, made, sizes, need_replication=frozenset("qkd"), bodies=bodies)


def _again(local: LocalOp) -> fx.Node:
    return local.emit(local.call.target, *local.args, **local.kwargs)
