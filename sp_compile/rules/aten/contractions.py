"""Contractions. A sharded contraction factor leaves each rank a term of a sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from ...placement.placements import Sharded, Size
from ..dims import fit
from ..local_op import Body, LocalOp
from ..notation import parse_rule
from ..op_call import OpCall
from ..registry import rule
from ..rule import OpShardingRule

aten = torch.ops.aten

Contract = Callable[[LocalOp, Sequence[fx.Node]], fx.Node]
Finish = Callable[[LocalOp, fx.Node], fx.Node]


def sum_over_ranks(contract: Contract, finish: Finish | None = None) -> Body:
    """A body: 0 at the padding of every operand, the local terms summed, additive operands added once.

    Autocast casts the operands of the op but not those of an addition, so the sum has to be cast as the op's result is.
    """

    def body(local: LocalOp) -> fx.Node:
        operands = [
            local.mask_padding(local.operand(at), each, 0) if isinstance(each, Sharded) else local.operand(at)
            for at, each in enumerate(local.operands)
        ]
        total = local.all_reduce(contract(local, operands))
        if finish is None:
            return total
        (result,) = local.call.results
        assert result is not None
        casts = any(each.dtype.is_floating_point and each.dtype != result.dtype for each in local.call.operands)
        made = finish(local, total)
        return local.emit(aten.to.dtype, made, result.dtype) if casts else made

    return body


def _again(local: LocalOp, operands: Sequence[fx.Node]) -> fx.Node:
    return local.emit(local.call.target, *operands)


def _add_scaled(local: LocalOp, total: fx.Node, alpha: Any, beta: Any) -> fx.Node:
    """`beta * self + alpha * total`"""
    scaled = local.emit(aten.mul.Scalar, total, alpha) if alpha != 1 else total
    if beta == 0:  # torch then passes over what `self` holds, be it nan
        return scaled
    return local.emit(aten.add.Tensor, scaled, local.operand(0), alpha=beta)


@rule(aten.linear.default)
def linear_rule(call: OpCall) -> OpShardingRule | None:
    """`... i, o i, +o -> ... o`"""

    def contract(local: LocalOp, operands: Sequence[fx.Node]) -> fx.Node:
        return local.emit(aten.linear.default, operands[0], operands[1])

    def add_bias(local: LocalOp, total: fx.Node) -> fx.Node:
        return local.emit(aten.add.Tensor, total, local.operand(2)) if len(call.operands) == 3 else total

    text = "... i, o i, +o -> ... o" if len(call.operands[1].shape) == 2 else "... i, i, + -> ..."
    return parse_rule(text, call, bodies={"i": sum_over_ranks(contract, add_bias)})


@rule(aten.matmul.default)
def matmul_rule(call: OpCall) -> OpShardingRule | None:
    """`... m k, ... k n -> ... m n`; a vector has no m, or no n."""
    row, column = (len(spec.shape) == 1 for spec in call.operands)
    left, m = ("k", "") if row else ("... m k", "m")
    right, n = ("k", "") if column else ("... k n", "n")
    lead = "" if row and column else "..."
    return parse_rule(f"{left}, {right} -> {lead} {m} {n}", call, bodies={"k": sum_over_ranks(_again)})


@rule(aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.vdot.default)
def product_rule(call: OpCall) -> OpShardingRule | None:
    texts: dict[object, str] = {
        aten.mm.default: "m k, k n -> m n",
        aten.bmm.default: "b m k, b k n -> b m n",
        aten.mv.default: "m k, k -> m",
        aten.dot.default: "k, k ->",
        aten.vdot.default: "k, k ->",
    }
    return parse_rule(texts[call.target], call, bodies={"k": sum_over_ranks(_again)})


@rule(aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
def added_product_rule(call: OpCall) -> OpShardingRule | None:
    """`+m n, m k, k n -> m n`, and the same with `b` or without `n`: `beta * self + alpha * (mat1 @ mat2)`."""
    multiply, left, right, made = {
        aten.addmm.default: (aten.mm.default, "m k", "k n", "m n"),
        aten.baddbmm.default: (aten.bmm.default, "b m k", "b k n", "b m n"),
        aten.addmv.default: (aten.mv.default, "m k", "k", "m"),
    }[call.overload]
    alpha, beta = call["alpha"], call["beta"]

    def contract(local: LocalOp, operands: Sequence[fx.Node]) -> fx.Node:
        return local.emit(multiply, operands[1], operands[2])

    names = made.split()[-len(call.operands[0].shape) :] if call.operands[0].shape else []
    text = f"+{' '.join(names)}, {left}, {right} -> {made}"
    return parse_rule(text, call, bodies={"k": sum_over_ranks(contract, partial(_add_scaled, alpha=alpha, beta=beta))})


@rule(aten.addr.default)
def added_outer_rule(call: OpCall) -> OpShardingRule | None:
    """`m n, m, n -> m n`"""
    names = "mn"[-len(call.operands[0].shape) :] if call.operands[0].shape else ""
    return parse_rule(f"{' '.join(names)}, m, n -> m n", call)


@rule(aten.addbmm.default)
def added_batch_rule(call: OpCall) -> OpShardingRule | None:
    """`+m n, b m k, b k n -> m n`: the batch is summed as well."""
    alpha, beta = call["alpha"], call["beta"]

    def contract(local: LocalOp, operands: Sequence[fx.Node]) -> fx.Node:
        return local.emit(aten.einsum.default, "bmk,bkn->mn", list(operands[1:]))

    body = sum_over_ranks(contract, partial(_add_scaled, alpha=alpha, beta=beta))
    names = "mn"[-len(call.operands[0].shape) :] if call.operands[0].shape else ""
    return parse_rule(f"+{' '.join(names)}, b m k, b k n -> m n", call, bodies={"b": body, "k": body})


@rule(aten.bilinear.default)
def bilinear_rule(call: OpCall) -> OpShardingRule | None:
    """`... i, ... j, o i j, +o -> ... o`"""

    def contract(local: LocalOp, operands: Sequence[fx.Node]) -> fx.Node:
        return local.emit(aten.bilinear.default, *operands[:3])

    def add_bias(local: LocalOp, total: fx.Node) -> fx.Node:
        return local.emit(aten.add.Tensor, total, local.operand(3)) if len(call.operands) == 4 else total

    body = sum_over_ranks(contract, add_bias)
    return parse_rule("... i, ... j, o i j, +o -> ... o", call, bodies={"i": body, "j": body})


@rule(aten._cdist_forward.default, aten._euclidean_dist.default, until="a sum of powers over the ranks, and its root")
def distance_rule(call: OpCall) -> OpShardingRule | None:
    """`... p m!, ... r m! -> ... p r`"""
    return parse_rule("... p m!, ... r m! -> ... p r", call)


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
    bodies = {dim[0]: sum_over_ranks(_einsum) for dims in operands for dim in dims if dim and dim[0] not in passed}
    return fit(call, operands, [made], bodies=bodies, movement=len(operands) == 1 and not bodies)


def _einsum(local: LocalOp, operands: Sequence[fx.Node]) -> fx.Node:
    return local.emit(aten.einsum.default, local.call["equation"], list(operands))


def _einsum_dims(term: str, shape: Sequence[Size]) -> list[tuple[str, ...]]:
    head, dots, tail = term.partition("...")
    hidden = len(shape) - len(head) - len(tail)
    names = [*head, *(f".{hidden - at}" for at in range(hidden if dots else 0)), *tail]
    return [(name,) if size != 1 else () for name, size in zip(names, shape, strict=True)]
