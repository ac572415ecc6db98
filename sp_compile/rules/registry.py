"""The table of rules. A family file fills it with `@rule(overload, ...)` functions or `rules_from_text({...})`.

A rule with `!` factors says why they have to be whole. `because`: the op mixes what the ranks would hold apart, and to
shard it would take another algorithm, or move as much. `until`: a local body would shard it, and is yet to be written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import GraphModule

from ..errors import RuleError
from .functions import function_rule
from .grouped import GroupedRows, grouped_rule
from .notation import own_dimension, parse_rule
from .op_call import Op, OpCall, argument_defaults
from .rule import OpShardingRule

RuleFunction = Callable[[OpCall], OpShardingRule | None]
"""None: this call (by its arguments) has no rule; the op is need-replication in every factor."""

Predicate = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Whole:
    """Why a rule's `!` factors have to be whole; see the module's docstring."""

    because: str = ""
    until: str = ""


@dataclass(frozen=True)
class AttentionRoles:
    """The operands of an attention op that are query, key and value, each with the dimension of its sequence."""

    query: tuple[int, int] = (0, -2)
    key: tuple[int, int] = (1, -2)
    value: tuple[int, int] = (2, -2)


_RULES: dict[Op, RuleFunction] = {}
_WHOLE: dict[Op, Whole] = {}
_DECOMPOSED: dict[Op, Predicate] = {}
_TAKES_EMPTY: set[Op] = set()
ATTENTION: dict[object, AttentionRoles] = {}
"""The ops that are an attention by themselves."""
READS_MEMORY: set[object] = set()
"""The ATen ops that demand how an operand lies in memory: what was exchanged or gathered may lie otherwise."""


def rule(
    *targets: Op, because: str = "", until: str = "", takes_empty: bool = False
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a function from a call to its rule, and why its `!` factors have to be whole.

    It is not asked for a call of which an operand has no elements, unless it `takes_empty` ones.
    """

    def register(function: RuleFunction) -> RuleFunction:
        for target in targets:
            if target in _RULES:
                raise RuleError(f"{target} has a sharding rule already")
            _RULES[target] = function
            if because or until:
                _WHOLE[target] = Whole(because, until)
            if takes_empty:
                _TAKES_EMPTY.add(target)
        return function

    return register


def rules_from_text(table: Mapping[OpOverload, str], because: str = "", until: str = "") -> None:
    """Register rules that do not depend on the call's arguments."""
    for target, text in table.items():
        rule(target, because=because, until=until)(_from_text(text))


def _from_text(text: str) -> RuleFunction:
    return lambda call: parse_rule(text, call)


def has_rule(target: Op) -> bool:
    """Whether an op may be sharded; pointwise ops are known by their tag."""
    return target in _RULES or _is_pointwise(target)


def _is_pointwise(target: Op) -> bool:
    tags = target.tags if isinstance(target, OpOverload) else ()
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def decomposed_when(target: OpOverload) -> Callable[[Predicate], Predicate]:
    """Register a test of a call's arguments: where it holds, the op is captured in parts, which have rules."""

    def register(predicate: Predicate) -> Predicate:
        _DECOMPOSED[target] = predicate
        return predicate

    return register


def stays_whole(target: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a composite or higher-order op is captured as one node: it has a rule for its arguments."""
    if not has_rule(target):
        return False
    if target not in _DECOMPOSED:
        return True
    return not _DECOMPOSED[target]({**dict(zip(argument_defaults(target), args, strict=False)), **kwargs})


def rule_for(call: OpCall) -> OpShardingRule | None:
    """The rule of one call, or None if it has to run on whole values."""
    mutates = isinstance(call.target, OpOverload) and call.target._schema.is_mutable
    is_empty = any(size == 0 for spec in call.operands for size in spec.shape)
    if mutates or (is_empty and call.target not in _TAKES_EMPTY):
        return None
    function = _RULES.get(call.target)
    if isinstance(call.target, GraphModule):
        function = grouped_rule if isinstance(call.target, GroupedRows) else function_rule
    if function is None and _is_pointwise(call.target):
        function = _RULES[torch.ops.aten.add.Tensor]
    try:
        return function(call) if function else None
    except RuleError:
        # Sizes that are equal for all lengths but are not known to be: without a rule the op is right all the same.
        if all(isinstance(size, int) for spec in call.operands for size in spec.shape):
            raise
        return None


def register_sharding_rule(op: OpOverload | OpOverloadPacket, text: str, *, attention: str | None = None) -> None:
    """Tell how an op of your own may be sharded.

    `register_sharding_rule(torch.ops.mylib.scan, "b s! c, c -> b s! c")` says that the op runs right on a slice of its
    batch or channels, but needs the sequence `s` whole. See `sp_compile.rules.rule` for the notation. Operands lie in
    memory as on one device, contiguous or transposed; gradients may lie otherwise, as autograd's may anywhere.

    `attention` says that the op is an attention, whose first three operands are query, key and value, and names the
    factors of the query and the key length; one name if they are one. It is then planned as
    `scaled_dot_product_attention` is. Grouped KV heads are `(g r)` for the query and `g` for key and value; the op has
    to take how many query heads share a KV head from the shapes, for a rank may hold a KV head per query head.

        register_sharding_rule(op, "b q (g r) d!, b k! g d!, b k! g v -> b q (g r) v", attention="q k")
        register_sharding_rule(packed, "t! h d!, t! h d!, t! h v, n! -> t! h v", attention="t")

    Raises:
        RuleError: the op has a rule already, or the text does not parse; or `attention` names no dimension of it.
    """
    overload = op.default if isinstance(op, OpOverloadPacket) else op
    roles = _roles(text, attention) if attention is not None else None
    rule(overload)(_from_text(text))
    if roles is not None:
        ATTENTION[overload] = roles


def _roles(text: str, attention: str) -> AttentionRoles:
    names = attention.split()
    if len(names) not in (1, 2):
        raise RuleError(f"attention={attention!r} has to name the factors of the query and of the key length, 'q k'")
    query, key = names[0], names[-1]
    ends = []
    for operand, (role, factor) in enumerate([("query", query), ("key", key), ("value", key)]):
        dim = own_dimension(text, operand, factor)
        if dim is None:
            raise RuleError(
                f"sharding rule {text!r} with attention={attention!r}: operand {operand}, the {role}, has no dimension "
                f"{factor!r}"
            )
        ends.append((operand, dim))
    return AttentionRoles(*ends)
