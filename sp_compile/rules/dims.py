"""What rules and bodies share: the dimensions of a call as factors, and the call itself with other arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..placement.placements import Placement, Sharded, Size, size_of
from .local_op import LocalOp
from .op_call import OpCall
from .rule import Dim, Factors, OpShardingRule, factors_of


def wrap(dims: int | Iterable[int] | None, ndim: int) -> tuple[int, ...]:
    """Dimensions as non-negative ints; all of them for None or none given."""
    given = [dims] if isinstance(dims, int) else list(dims or ())
    return tuple(dim % ndim if ndim else 0 for dim in given) if given else tuple(range(ndim))


def plain(shape: Sequence[Size], prefix: str = "d") -> list[Dim]:
    """A factor of its own for every dimension that is larger than 1."""
    return [(f"{prefix}{at}",) if size != 1 else () for at, size in enumerate(shape)]


def factors(sizes: Mapping[str, Size], *names: str) -> Factors:
    """A dimension that is several factors, without those of size 1."""
    return tuple(name for name in names if sizes[name] != 1)


def broadcast_factors(shape: Sequence[Size], result: Sequence[Size]) -> tuple[Factors, ...] | None:
    """The factors of an operand that broadcasts to `result`: dimensions align at the right; size 1 has no factor.

    None if two sizes that have to be equal are not known to be.
    """
    offset = len(result) - len(shape)
    if offset < 0 or any(size not in (1, result[offset + at]) for at, size in enumerate(shape)):
        return None
    return tuple((f"d{offset + at}",) if size != 1 else () for at, size in enumerate(shape))


def fit(
    call: OpCall,
    operands: Sequence[Sequence[Dim]],
    results: Sequence[Sequence[Dim]],
    sizes: Mapping[str, Size] | None = None,
    **extra: Any,
) -> OpShardingRule:
    """A rule from its dimensions. `sizes` tells those of factors that are nowhere a dimension of their own."""
    known = dict(sizes or {})
    specs = [*call.operands, *(spec for spec in call.results if spec is not None)]
    for dims, spec in zip([*operands, *results], specs, strict=True):
        for dim, size in zip(dims, spec.shape, strict=True):
            if isinstance(dim, tuple) and len(dim) == 1:
                known[dim[0]] = size
    named = {factor for dims in (*operands, *results) for dim in dims for factor in factors_of(dim)}
    sizes = {factor: size for factor, size in known.items() if factor in named}
    return OpShardingRule(tuple(map(tuple, operands)), tuple(map(tuple, results)), sizes, **extra)


def with_arguments(local: LocalOp, **changed: Any) -> fx.Node:
    """The op on local operands, with other arguments."""
    given = pytree.tree_map_only(torch.SymInt, lambda size: local.size(size_of(size)), dict(local.call.arguments))
    operands = {name: local.operand(at) for at, name in enumerate(local.call.operand_names)}
    arguments = {**given, **operands, **changed}
    keywords = [argument.name for argument in local.call.overload._schema.arguments if argument.kwarg_only]
    own = {name: arguments.pop(name) for name in keywords}
    return local.emit(local.call.target, *arguments.values(), **own)


def local_count(local: LocalOp, placement: Placement, count: Size, inner: Size) -> int | fx.Node:
    """How many of the `count` outer parts of a sharded dimension `(count inner)` a rank has."""
    assert isinstance(placement, Sharded)
    layout = placement.layout.within(1, count, inner)
    assert layout is not None
    return local.size(layout.local_size(local.parts))
