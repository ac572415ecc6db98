"""Rows computed in the order of their groups, as one part of a graph: `(t k), t d!, e! -> (t k) d!`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from ..placement.placements import Size, exact_quotient
from .dims import factors, fit
from .op_call import OpCall
from .rule import Dim, OpShardingRule

PRODUCTS = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
"""`[t, i], [e, i, o], [e] -> [t, o]`: rows in the order of their groups by the matrix of each group; the third operand
says where each group ends."""


class GroupedRows(fx.GraphModule):
    """A part of a graph whose every result row is made of the same rows of some operands, and of others as a whole.

    `rows` says of each operand, and then of the result, how many rows of the longest each of its own stands for: 2 for
    tokens that go to two experts each; 0 is an operand that is needed whole.
    """

    def __init__(self, root: Mapping[str, Any], graph: fx.Graph, rows: Sequence[int]) -> None:
        super().__init__(dict(root), graph)
        self.rows = tuple(rows)


def grouped_rule(call: OpCall) -> OpShardingRule | None:
    """Sharded in the tokens alone."""
    assert isinstance(call.target, GroupedRows) and call.results[0] is not None
    each = max(call.target.rows)
    specs = [*call.operands, call.results[0]]
    longest = next(spec.shape[0] for spec, rows in zip(specs, call.target.rows, strict=True) if rows == 1)
    tokens = exact_quotient(longest, each)
    if tokens is None:
        return None
    sizes: dict[str, Size] = {"t": tokens, "k": each}
    whole: set[str] = set()

    def dims(at: int) -> list[Dim]:
        shape, rows = specs[at].shape, call.target.rows[at]  # type: ignore[union-attr, index]
        names = [f"o{at}_{dim}" if size != 1 else "" for dim, size in enumerate(shape)]
        whole.update(name for name in names[bool(rows) :] if name)
        own: list[Dim] = [(name,) if name else () for name in names]
        return [factors(sizes, "t", "k") if rows == 1 else factors(sizes, "t"), *own[1:]] if rows else own

    made = [dims(at) for at in range(len(specs))]
    # Which of k rows a token stands for is counted in the part: `order // k`, of all k.
    whole |= {"k"} if each != 1 and tokens != 1 else set()
    return fit(call, made[:-1], made[-1:], sizes, need_replication=frozenset(whole))
