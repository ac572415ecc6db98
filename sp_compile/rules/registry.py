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

from ..errors import RuleError
from ..rule import OpCall, OpShardingRule, parse_rule

RuleFunction = Callable[[OpCall], OpShardingRule | None]
"""None: this call (by its arguments) has no rule; the op is need-replication in every factor."""

Predicate = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Whole:
    """Why a rule's `!` factors have to be whole; see the module's docstring."""

    because: str = ""
    until: str = ""


_RULES: dict[OpOverload, RuleFunction] = {}
_WHOLE: dict[OpOverload, Whole] = {}
_DECOMPOSED: dict[OpOverload, Predicate] = {}


def rule(*targets: OpOverload, because: str = "", until: str = "") -> Callable[[RuleFunction], RuleFunction]:
    """Register a function from a call to its rule, and why its `!` factors have to be whole."""

    def register(function: RuleFunction) -> RuleFunction:
        for target in targets:
            if target in _RULES:
                raise RuleError(f"{target} has a sharding rule already")
            _RULES[target] = function
            if because or until:
                _WHOLE[target] = Whole(because, until)
        return function

    return register


def rules_from_text(table: Mapping[OpOverload, str], because: str = "", until: str = "") -> None:
    """Register rules that do not depend on the call's arguments."""
    for target, text in table.items():
        rule(target, because=because, until=until)(_from_text(text))


def _from_text(text: str) -> RuleFunction:
    return lambda call: parse_rule(text, call)


def has_rule(target: OpOverload) -> bool:
    """Whether an overload may be sharded; pointwise ops are known by their tag."""
    return target in _RULES or _is_pointwise(target)


def _is_pointwise(target: OpOverload) -> bool:
    return torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags


def decomposed_when(target: OpOverload) -> Callable[[Predicate], Predicate]:
    """Register a test of a call's arguments: where it holds, the op is captured in parts, which have rules."""

    def register(predicate: Predicate) -> Predicate:
        _DECOMPOSED[target] = predicate
        return predicate

    return register


def stays_whole(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a composite op is captured as one node: it has a rule that serves its arguments."""
    if not has_rule(target):
        return False
    if target not in _DECOMPOSED:
        return True
    names = [argument.name for argument in target._schema.arguments]
    return not _DECOMPOSED[target]({**dict(zip(names, args, strict=False)), **kwargs})


def rule_for(call: OpCall) -> OpShardingRule | None:
    """The rule of one call, or None if it has to run on whole values."""
    if call.target._schema.is_mutable or any(size == 0 for spec in call.operands for size in spec.shape):
        return None
    function = _RULES.get(call.target)
    if function is None and _is_pointwise(call.target):
        function = _RULES[torch.ops.aten.add.Tensor]
    try:
        return function(call) if function else None
    except RuleError:
        # Sizes that are equal for all lengths but are not known to be: without a rule the op is right all the same.
        if all(isinstance(size, int) for spec in call.operands for size in spec.shape):
            raise
        return None


def register_sharding_rule(op: OpOverload | OpOverloadPacket, text: str) -> None:
    """Tell how an op of your own may be sharded.

    `register_sharding_rule(torch.ops.mylib.scan, "b s! c, c -> b s! c")` says that the op runs right on a slice of its
    batch or channels, but needs the sequence `s` whole. See `sp_compile.rule` for the notation.

    Raises:
        RuleError: the op has a rule already, or the text does not parse.
    """
    overload = op.default if isinstance(op, OpOverloadPacket) else op
    rule(overload)(_from_text(text))
