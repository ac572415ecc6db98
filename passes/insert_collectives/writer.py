"""The graph that is written: its nodes and their names, sizes as arguments, placements as arguments of `sp::` ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from sp_compile.ops.sp_ops import MOVING_OPS
from sp_compile.placement.placements import Sharded, Size

RANK = "sp_rank"
_KEPT = ("stack_trace", "nn_module_stack", "recompute", "ac_graph_id")


class GraphWriter:
    """A new graph for the ranks of an SP group. Knows no plan."""

    def __init__(self, group: str) -> None:
        self.graph = fx.Graph()
        self.group = group
        self.current: fx.Node | None = None
        """The captured node that is being written."""
        self.rank: fx.Node | None = None
        """This rank's place in the group, an input."""
        self.origins: dict[str, str] = {}
        """The captured node that each new one is of, by name."""
        self.modules: dict[str, fx.GraphModule] = {}
        """Graphs among the arguments of calls."""
        self._sizes: dict[sympy.Expr, fx.Node] = {}

    def take_rank(self) -> None:
        """Make the rank an input: the last one."""
        self.rank = self.graph.placeholder(RANK)

    # Nodes

    def copy(self, node: fx.Node, argument: Callable[[fx.Node], Any]) -> fx.Node:
        """A captured node as it is, with `argument` of each node among its arguments."""
        copied = self.graph.node_copy(node, argument)
        self.origins[copied.name] = node.name
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
            self._sizes.setdefault(value.node.expr, copied)
        return copied

    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call that is of the current node."""
        return self.add(self.current, target, args, kwargs)

    def add(
        self, origin: fx.Node | None, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node:
        """A call that is of a captured node, or of none."""
        if isinstance(target, fx.GraphModule):
            assert origin is not None
            node = self.graph.call_module(str(origin.target), args, kwargs)
        else:
            node = self.graph.call_function(target, args, kwargs)
        if origin is not None:
            # What was received is saved: a checkpointed region is computed again in backward, not sent for again.
            kept = _KEPT[:2] if target in MOVING_OPS else _KEPT
            node.meta = {key: origin.meta[key] for key in kept if key in origin.meta}
            self.origins[node.name] = origin.name
        return node

    def named(self, node: fx.Node, name: str, value: fx.Node | None = None) -> fx.Node:
        """A new node under another name, and of another captured value if one is given."""
        origin = self.origins.pop(node.name, "")
        node._rename(name)
        self.origins[node.name] = value.name if value is not None else origin
        return node

    # Sizes

    def is_known(self, size: Size) -> bool:
        """Whether a size can be computed from the symbols that are inputs of the graph."""
        return isinstance(size, int) or all(symbol in self._sizes for symbol in size.free_symbols)

    def size(self, size: Size) -> int | fx.Node:
        """A size as an argument: itself, or the node that computes it from the graph's symbols."""
        if isinstance(size, int):
            return size
        if size not in self._sizes:
            tracer = fx.proxy.GraphAppendingTracer(self.graph)
            symbols = {symbol: fx.Proxy(self._sizes[symbol], tracer) for symbol in size.free_symbols}
            self._sizes[size] = sympy_interp(PythonReferenceAnalysis, symbols, size).node
        return self._sizes[size]

    # Placements

    def layout(self, placement: Sharded) -> tuple[Any, ...]:
        """`dim, outer, sizes, granules`."""
        layout = placement.layout
        sizes = [self.size(segment.size) for segment in layout.segments]
        granules = [self.size(segment.granule) for segment in layout.segments]
        return placement.dim, self.size(layout.outer), sizes, granules

    def windows(self, placement: Sharded, name: str = "windows") -> dict[str, list[int | fx.Node]]:
        """The argument for rows that are gone; none if there are none."""
        gone = [rows for segment in placement.layout.segments for rows in (segment.before, segment.after)]
        return {name: [self.size(rows) for rows in gone]} if any(rows != 0 for rows in gone) else {}

    def on_dim(self, op: torch._ops.OpOverload, local: fx.Node, placement: Sharded, *extra: Any) -> fx.Node:
        """A call `op(local, rank, layout, extra, group, windows)`."""
        layout = self.layout(placement)
        return self.emit(op, local, self.rank, *layout, *extra, self.group, **self.windows(placement))

    def refill_padding(self, local: fx.Node, placement: Sharded) -> fx.Node:
        """A local value with a real row in the rows that are padding."""
        return self.on_dim(torch.ops.sp.refill_padding.default, local, placement)

    def positions(self, placement: Sharded) -> fx.Node:
        """The global index of each local row, int64 `[local]`."""
        _, *layout = self.layout(placement)
        return self.emit(torch.ops.sp.positions.default, self.rank, *layout, self.group, **self.windows(placement))
