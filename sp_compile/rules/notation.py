"""The notation of rules, `"b h q d!, b h k! d!, b h k! v -> b h q v"`: its text read, and fitted to one call.

See `rule` for what the signs mean.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverload

from ..errors import RuleError
from ..placement.placements import (
    Size,
    exact_quotient,
    product,
)
from .op_call import OpCall, TensorSpec
from .rule import Dim, Factors, OpShardingRule


@dataclass(frozen=True)
class _Term:
    """One operand or result of a rule's text."""

    dims: tuple[str | tuple[str, ...], ...]
    additive: bool
    metadata: bool


_TOKEN = re.compile(r"\.\.\.|\([a-z! ]*\)|[a-z]!?|1")


def _parse_term(text: str, rule: str, flagged: set[str]) -> _Term:
    body = text.strip()
    additive, metadata = body.startswith("+"), body.startswith("~")
    body = body.lstrip("+~")
    dims: list[str | tuple[str, ...]] = []
    rest = _TOKEN.sub("", body).strip()
    if rest:
        raise RuleError(
            f"sharding rule {rule!r}: cannot read {rest!r} in {text.strip()!r}; a dimension is a letter, "
            "`letter!`, `(a b)`, `...` or 1"
        )
    for token in _TOKEN.findall(body):
        names = re.findall(r"[a-z]!?", token)
        flagged |= {name[0] for name in names if name.endswith("!")}
        if token == "...":
            dims.append(token)
        else:
            dims.append(tuple(name[0] for name in names))
    return _Term(tuple(dims), additive, metadata)


def own_dimension(text: str, operand: int, factor: str) -> int | None:
    """Which dimension of an operand a factor is by itself, by the text alone; counted from the end behind `...`."""
    terms = text.partition("->")[0].split(",")
    dims = _parse_term(terms[operand], text, set()).dims if operand < len(terms) else ()
    if (factor,) not in dims:
        return None
    at = dims.index((factor,))
    return at - len(dims) if "..." in dims[:at] else at


def parse_rule(text: str, call: OpCall, **extra: Any) -> OpShardingRule:
    """Read a rule and fit it to the shapes of one call.

    Operands in the text stand for the tensor arguments of the op's schema, in order; arguments that are None are
    passed over. Sizes come from the shapes; a dimension of size 1 where the factor is larger broadcasts: the operand
    lacks the factor. Keyword arguments go to `OpShardingRule`.

    Raises:
        RuleError: the text does not parse, or does not fit the shapes.
    """
    left, arrow, right = text.partition("->")
    if not arrow:
        raise RuleError(f"sharding rule {text!r} has no '->'")
    flagged: set[str] = set()
    terms = [_parse_term(part, text, flagged) for part in left.split(",")]
    made = [_parse_term(part, text, flagged) for part in right.split(",")]
    assert isinstance(call.target, OpOverload)
    names = [a.name for a in call.target._schema.arguments if "Tensor" in str(a.type)]
    present = [term for term, name in zip(terms, names, strict=False) if name in call.operand_names]
    results = [spec for spec in call.results if spec is not None]
    if len(present) != len(call.operands) or len(made) != len(results):
        raise RuleError(
            f"sharding rule {text!r} has {len(terms)} operands and {len(made)} results; {call.target} was called with "
            f"{len(call.operands)} tensors and gave {len(results)}"
        )
    bound = [
        _expand_ellipsis(term, spec, text, call)
        for term, spec in zip([*present, *made], [*call.operands, *results], strict=True)
    ]
    sizes = _solve_sizes(bound, text, call)
    operands: list[tuple[Dim, ...]] = []
    produced: list[tuple[Dim, ...]] = []
    for index, (dims, spec) in enumerate(bound):
        placed = tuple(
            () if spec.shape[at] == 1 else tuple(f for f in dim if sizes[f] != 1) for at, dim in enumerate(dims)
        )
        (operands if index < len(present) else produced).append(placed)
    return OpShardingRule(
        tuple(operands),
        tuple(produced),
        sizes,
        frozenset(flagged),
        frozenset(i for i, term in enumerate(present) if term.additive),
        frozenset(i for i, term in enumerate(present) if term.metadata),
        **extra,
    )


Bound = tuple[tuple[Factors, ...], TensorSpec]


def _expand_ellipsis(term: _Term, spec: TensorSpec, text: str, call: OpCall) -> Bound:
    named = [dim for dim in term.dims if dim != "..."]
    extra = len(spec.shape) - len(named)
    if extra < 0 or (extra and "..." not in term.dims):
        raise RuleError(
            f"sharding rule {text!r} does not fit {call.target}: a shape of {len(spec.shape)} dimensions, "
            f"{tuple(map(str, spec.shape))}, for {len(named)}"
        )
    dims: list[Factors] = []
    for dim in term.dims:
        if dim == "...":
            dims.extend((f".{extra - index}",) for index in range(extra))
        else:
            dims.append(tuple(dim))
    return tuple(dims), spec


def _solve_sizes(bound: Sequence[Bound], text: str, call: OpCall) -> dict[str, Size]:
    """The size of each factor, from the dimensions in which it is the only unknown."""
    sizes: dict[str, Size] = {}
    dims = [(dim, size) for factors, spec in bound for dim, size in zip(factors, spec.shape, strict=True)]
    wanted = {factor for dim, _ in dims for factor in dim}
    while True:
        for dim, size in dims:
            unknown = [factor for factor in dim if factor not in sizes]
            if len(unknown) == 1 and (size != 1 or len(dim) > 1):
                known = product([sizes[f] for f in dim if f in sizes])
                quotient = exact_quotient(size, known)
                if quotient is None:
                    raise RuleError(
                        f"sharding rule {text!r} does not fit {call.target}: {known} does not divide {size}"
                    )
                sizes[unknown[0]] = quotient
                break
        else:
            # A single row may broadcast to a size that another dimension tells; these nothing else tells.
            ones = {factor for dim, size in dims if size == 1 for factor in dim if factor not in sizes}
            if not ones:
                break
            sizes |= dict.fromkeys(ones, 1)
    if wanted - set(sizes):
        raise RuleError(f"sharding rule {text!r}: nothing tells the size of {sorted(wanted - set(sizes))}")
    for dim, size in dims:
        if size != 1 and dim and product([sizes[f] for f in dim]) != size:
            raise RuleError(
                f"sharding rule {text!r} does not fit {call.target}: {' '.join(dim)} is "
                f"{product([sizes[f] for f in dim])} in one place and {size} in another"
            )
    return sizes
