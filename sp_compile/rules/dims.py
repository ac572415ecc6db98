"""The dimensions of one call: negative ones wrapped, a factor for each that is larger than 1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..rule import Dim, Factors, OpCall, OpShardingRule, factors_of
from ..sharding import Size


def wrap(dims: int | Iterable[int] | None, ndim: int) -> tuple[int, ...]:
    """Dimensions as non-negative ints; all of them for None or none given."""
    given = [dims] if isinstance(dims, int) else list(dims or ())
    return tuple(dim % ndim if ndim else 0 for dim in given) if given else tuple(range(ndim))


def plain(shape: Sequence[Size], prefix: str = "d") -> list[Dim]:
    """A factor of its own for every dimension that is larger than 1."""
    return [(f"{prefix}{at}",) if size != 1 else () for at, size in enumerate(shape)]


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
