"""What the body of a rule may use to write an op on one rank's rows, where calling it as it is would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import fx

from ..placement.placements import (
    Placement,
    Sharded,
    Size,
)
from .op_call import OpCall


class LocalGraph(Protocol):
    """What a local body, or a conversion, may use to write one rank's graph."""

    parts: int
    """P, the number of ranks."""

    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node: ...

    def gather(self, value: fx.Node, placement: Sharded, role: str) -> fx.Node:
        """A sharded value made here, whole on every rank, on its way into sharded work; `role` names the node."""
        ...

    def rank(self) -> fx.Node:
        """This rank's place in the group, int64 `[1]`."""
        ...


class LocalOp(LocalGraph, Protocol):
    """What a local body may use to write the op on one rank's rows into the graph."""

    call: OpCall
    args: tuple[Any, ...]
    """The op's positional arguments, tensors already local."""
    kwargs: dict[str, Any]
    operands: tuple[Placement, ...]
    """The placement of each operand, as in `call.operands`."""
    results: tuple[Placement, ...]
    rng: str

    def operand(self, index: int) -> fx.Node:
        """The local value of operand `index`."""
        ...

    def size(self, size: Size) -> int | fx.Node:
        """A size as an argument: itself, or a node that computes it."""
        ...

    def mask_padding(self, value: fx.Node, placement: Placement, fill: float | int) -> fx.Node:
        """`value` with `fill` in the rows that are padding."""
        ...

    def refill_padding(self, value: fx.Node, placement: Sharded) -> fx.Node:
        """`value` with a real row in the rows that are padding."""
        ...

    def all_reduce(self, value: fx.Node, kind: str = "sum") -> fx.Node: ...

    def replicate(self, value: fx.Node) -> fx.Node:
        """A replicated value made here, such as a reduced one, on its way into sharded work."""
        ...

    def shard(self, value: fx.Node, placement: Sharded) -> fx.Node:
        """This rank's block of a replicated value."""
        ...

    def positions(self, placement: Sharded) -> fx.Node:
        """The global index of each local row, int64 `[local]`."""
        ...

    def select_rows(self, value: fx.Node, placement: Sharded, index: fx.Node) -> fx.Node:
        """The rows with global `index` (int64 `[n]`) of a sharded value, replicated."""
        ...

    def computed_again(self, value: fx.Node) -> fx.Node:
        """`value`, which is not kept for backward but computed once more."""
        ...

    def module(self, name: str, module: fx.GraphModule) -> fx.Node:
        """A graph as an argument: what a higher-order operator calls."""
        ...


Body = Callable[[LocalOp], "fx.Node | tuple[fx.Node, ...]"]
