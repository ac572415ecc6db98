"""Contractions and convolutions. A sharded contraction factor leaves each rank a term of a sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..rule import Body, Dim, LocalOp, OpCall, OpShardingRule, parse_rule
from ..sharding import Sharded, Size, exact_quotient
from .dims import fit
from .registry import rule

aten = torch.ops.aten

Contract = Callable[[LocalOp, Sequence[fx.Node]], fx.Node]
Finish = Callable[[LocalOp, fx.Node], fx.Node]


def _sum_over_ranks(contract: Contract, finish: Finish | None = None) -> Body:
    """A body: 0 at the padding of every operand, the local terms summed, additive operands added once."""

    def body(local: LocalOp) -> fx.Node:
        operands = [
            local.mask_padding(local.operand(at), each, 0) if isinstance(each, Sharded) else local.operand(at)
            for at, each in enumerate(local.operands)
        ]
        total = local.all_reduce(contract(local, operands))
        return finish(local, total) if finish else total

    return body


def _again(local: LocalOp, operands: Sequence[fx.Node]) -> fx.Node:
    return local.emit(local.call.target, *operands)


@rule(aten.linear.default)
def linear_rule(call: OpCall) -> OpShardingRule | None:
    """`... i, o i, +o -> ... o`"""

    def contract(local: LocalOp, operands: Sequence[fx.Node]) -> fx.Node:
        return local.emit(aten.linear.default, operands[0], operands[1])

    def add_bias(local: LocalOp, total: fx.Node) -> fx.Node:
        return local.emit(aten.add.Tensor, total, local.operand(2)) if len(call.operands) == 3 else total

    text = "... i, o i, +o -> ... o" if len(call.operands[1].shape) == 2 else "... i, i, + -> ..."
    return parse_rule(text, call, bodies={"i": _sum_over_ranks(contract, add_bias)})


@rule(aten.matmul.default)
def matmul_rule(call: OpCall) -> OpShardingRule | None:
    """`... m k, ... k n -> ... m n`; a vector has no m, or no n."""
    row, column = (len(spec.shape) == 1 for spec in call.operands)
    left, m = ("k", "") if row else ("... m k", "m")
    right, n = ("k", "") if column else ("... k n", "n")
    lead = "" if row and column else "..."
    return parse_rule(f"{left}, {right} -> {lead} {m} {n}", call, bodies={"k": _sum_over_ranks(_again)})


@rule(aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def product_rule(call: OpCall) -> OpShardingRule | None:
    texts: dict[object, str] = {
        aten.mm.default: "m k, k n -> m n",
        aten.bmm.default: "b m k, b k n -> b m n",
        aten.mv.default: "m k, k -> m",
        aten.dot.default: "k, k ->",
    }
    return parse_rule(texts[call.target], call, bodies={"k": _sum_over_ranks(_again)})


@rule(aten.addmm.default, aten.baddbmm.default)
def added_product_rule(call: OpCall) -> OpShardingRule | None:
    """`+m n, m k, k n -> m n`, and the same with `b`: `beta * self + alpha * (mat1 @ mat2)`."""
    batched = call.target is aten.baddbmm.default
    alpha, beta = call["alpha"], call["beta"]

    def contract(local: LocalOp, operands: Sequence[fx.Node]) -> fx.Node:
        return local.emit(aten.bmm.default if batched else aten.mm.default, operands[1], operands[2])

    def add(local: LocalOp, total: fx.Node) -> fx.Node:
        scaled = local.emit(aten.mul.Scalar, total, alpha) if alpha != 1 else total
        if beta == 0:  # torch then passes over what `self` holds, be it nan
            return scaled
        return local.emit(aten.add.Tensor, scaled, local.operand(0), alpha=beta)

    b = "b" if batched else ""
    names = f"{b}mn"[-len(call.operands[0].shape) :] if call.operands[0].shape else ""
    text = f"+{' '.join(names)}, {b} m k, {b} k n -> {b} m n"
    return parse_rule(text, call, bodies={"k": _sum_over_ranks(contract, add)})


@rule(aten.einsum.default)
def einsum_rule(call: OpCall) -> OpShardingRule | None:
    """The equation is the rule; a diagonal (`ii`) has none."""
    left, arrow, right = call["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    if any(len(set(term.replace("...", ""))) != len(term.replace("...", "")) for term in terms):
        return None
    if not arrow:
        letters = left.replace("...", "").replace(",", "")
        right = ("..." if "..." in left else "") + "".join(sorted(x for x in letters if letters.count(x) == 1))
    result = call.results[0]
    assert result is not None
    shapes = [*(spec.shape for spec in call.operands), result.shape]
    operands = [_einsum_dims(term, shape) for term, shape in zip([*terms, right], shapes, strict=True)]
    made = operands.pop()
    # An operand of size 1 broadcasts against a larger one of the same letter.
    passed = {factor for dim in made for factor in dim}
    bodies = {dim[0]: _sum_over_ranks(_einsum) for dims in operands for dim in dims if dim and dim[0] not in passed}
    return fit(call, operands, [made], bodies=bodies)


def _einsum(local: LocalOp, operands: Sequence[fx.Node]) -> fx.Node:
    return local.emit(aten.einsum.default, local.call["equation"], list(operands))


def _einsum_dims(term: str, shape: Sequence[Size]) -> list[tuple[str, ...]]:
    head, dots, tail = term.partition("...")
    hidden = len(shape) - len(head) - len(tail)
    names = [*head, *(f".{hidden - at}" for at in range(hidden if dots else 0)), *tail]
    return [(name,) if size != 1 else () for name, size in zip(names, shape, strict=True)]


@rule(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
)
def convolution_rule(call: OpCall) -> OpShardingRule | None:
    """`b (g i!) l!, (g o) i! k!, (g o) -> b (g o) m!`: a depthwise one has `g` channels, and passes them."""
    if call.arguments.get("transposed"):
        return None
    (x, weight), result = call.operands[:2], call.results[0]
    assert result is not None
    groups, spatial = call["groups"], len(weight.shape) - 2
    outputs = exact_quotient(weight.shape[0], groups)
    if not isinstance(groups, int) or outputs is None:
        return None
    sizes: dict[str, Size] = {"g": groups, "i": weight.shape[1], "o": outputs}

    def factors(*names: str) -> Dim:
        return tuple(name for name in names if sizes[name] != 1)

    def window(prefix: str, shape: Sequence[Size]) -> list[Dim]:
        return [(f"{prefix}{at}",) if size != 1 else () for at, size in enumerate(shape[-spatial:])]

    batch: list[Dim] = [("b",) if x.shape[0] != 1 else ()] if len(x.shape) == spatial + 2 else []
    operands = [
        [*batch, factors("g", "i"), *window("l", x.shape)],
        [factors("g", "o"), factors("i"), *window("k", weight.shape)],
        [factors("g", "o")],
    ]
    made = [*batch, factors("g", "o"), *window("m", result.shape)]
    whole = {"i", *(f"{prefix}{at}" for prefix in "lkm" for at in range(spatial))}

    def fewer_groups(local: LocalOp) -> fx.Node:
        placement = local.operands[1]
        assert isinstance(placement, Sharded)
        layout = placement.layout.within(1, groups, outputs)
        assert layout is not None
        arguments: dict[str, Any] = {**call.arguments, "groups": local.size(layout.local_size(local.parts))}
        arguments |= {name: local.operand(index) for index, name in enumerate(call.operand_names)}
        return local.emit(call.target, *arguments.values())

    rule = fit(call, operands[: len(call.operands)], [made], sizes, need_replication=frozenset(whole))
    return replace(rule, bodies={"g": fewer_groups})


@rule(
    aten.avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.max_pool2d_with_indices.default,
    aten.upsample_nearest2d.default,
    aten.upsample_bilinear2d.default,
    aten.upsample_bicubic2d.default,
)
def pooling_rule(call: OpCall) -> OpShardingRule | None:
    """`... h! w! -> ... y! x!`"""
    return parse_rule(", ".join(["... h! w! -> ... y! x!", *["... y! x!"] * (len(call.results) - 1)]), call)
