"""Write a sharding plan into a graph: `sp::` ops where placements change, and local sizes.

    h = embedding(w, ids)          slice_ids = sp.shard(ids, S(1: 32))                              i64[1, 16 of 32]
    …                              replicate_w = sp.replicate(w)
    out = attention(q, k, v)       h = embedding(replicate_w, slice_ids)                            f32[1, 16 of 32, 64]
    y = linear(out, w_out)         …
                                   gather_seq_scatter_heads_q = sp.all_to_all(q, gather S(2: 32), scatter S(1: 4))
                                   out = attention(gather_seq_scatter_heads_q, …)
                                   gather_heads_scatter_seq = sp.all_to_all(out, gather S(1: 4), scatter S(2: 32))
                                   y = linear(gather_heads_scatter_seq, replicate_w_out)

A conversion stands before its first consumer and serves all consumers of the same region: one ends where the gradient
mode or autocast changes. The law of gradients: a replicated value on its way into work that is sharded on a factor
which it lacks passes `sp.replicate`, whose backward sums over ranks. The rank is an input, `sp_rank`; never a constant.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from operator import getitem
from typing import Any

import sympy
import torch
from torch import fx
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.fx._lazy_graph_module import _make_graph_module
from torch.utils import _pytree as pytree
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from sp_compile.ir.effects import GRAD_MODE, has_effect, memory_order
from sp_compile.ir.graph import GraphRules, is_tensor, op_of, source_of
from sp_compile.ir.plan import (
    COMPUTED_AGAIN,
    LeavingOutput,
    Output,
    RandomNumbers,
    ShardedGraph,
    ShardingPlan,
    SitePlan,
)
from sp_compile.ops.sp_ops import MOVING_OPS
from sp_compile.placement.placements import (
    REPLICATED,
    GroupedHeads,
    Placement,
    Replicated,
    Sharded,
    Size,
    held_rows,
    local_shape,
    moved_rows,
    size_of,
    whole_layout,
)
from sp_compile.rules.halo import neighbouring_rows
from sp_compile.rules.op_call import argument_defaults, in_order
from sp_compile.rules.registry import READS_MEMORY

aten = torch.ops.aten
RANK = "sp_rank"
_KEPT = ("stack_trace", "nn_module_stack", "recompute", "ac_graph_id")


def insert_collectives(
    graph_module: fx.GraphModule,
    rules: GraphRules,
    plan: ShardingPlan,
    group: str,
    outputs: Sequence[Output],
    *,
    rng: RandomNumbers = "parallel",
    local_gradients: bool = False,
) -> ShardedGraph:
    """Rewrite a captured graph for the SP group named `group`; the given graph stays as it is.

    Args:
        outputs: how each of its outputs is to leave.
        rng: the option of this name.
        local_gradients: whether a parameter's gradient is a rank's own sum, times P.
    """
    return _Writer(graph_module, rules, plan, group, outputs, rng, local_gradients).write()


class _Writer:
    def __init__(
        self,
        graph_module: fx.GraphModule,
        rules: GraphRules,
        plan: ShardingPlan,
        group: str,
        outputs: Sequence[Output],
        rng: RandomNumbers,
        local_gradients: bool,
    ) -> None:
        self.graph_module, self.rules, self.plan, self.group = graph_module, rules, plan, group
        self.outputs, self.rng, self.local_gradients = outputs, rng, local_gradients
        self.graph = fx.Graph()
        self.written: dict[fx.Node, fx.Node] = {}
        self.converted: dict[tuple[fx.Node, Placement | str, int], fx.Node] = {}
        self.sizes: dict[sympy.Expr, fx.Node] = {}
        self.origins: dict[str, str] = {}
        self.region = 0
        self.grad_mode: bool | None = None
        """What the graph has set last; None: nothing yet, so that it is that of the caller."""
        self.grad_modes: dict[fx.Node, bool | None] = {}
        """That of each captured node."""
        self.current: fx.Node | None = None
        self.rank: fx.Node | None = None
        self.modules: dict[str, fx.GraphModule] = {}
        self.trained = rules.trained
        self.roles = _roles(plan.sites)

    def write(self) -> ShardedGraph:
        nodes = list(self.rules.graph.nodes)
        for node in (n for n in nodes if n.op == "placeholder"):
            self._copy(node)
        self.rank = self.graph.placeholder(RANK)
        outputs: tuple[LeavingOutput, ...] = ()
        for node in nodes:
            self.current, self.grad_modes[node] = node, self.grad_mode
            if node.op == "output":
                outputs = self._write_output(node)
            elif node.op != "placeholder":
                self._write_node(node)
        # A view that is an output is made anew of the whole value: nobody may ask for its rows any more.
        self.graph.eliminate_dead_code(has_effect)
        self.graph.lint()
        values = self._values()
        root = copy.copy(self.graph_module) if self.modules else self.graph_module
        for name, each in self.modules.items():
            root.add_module(name, each)
        module = _make_graph_module(root, self.graph)
        return ShardedGraph(module, self.origins, outputs, values)

    def _values(self) -> tuple[tuple[str, str, Placement], ...]:
        held = {(new, value): self._made(value) for value, new in self.written.items() if _has_value(value)}
        for (value, target, _), new in self.converted.items():
            held.setdefault((new, value), REPLICATED if isinstance(target, str) else target)
        order = {node: at for at, node in enumerate(self.graph.nodes)}
        found = [each for each in held if each[0] in order]
        found.sort(key=lambda each: (order[each[0]], self.rules.position(each[1])))
        return tuple((new.name, value.name, held[new, value]) for new, value in found)

    # Nodes

    def _write_node(self, node: fx.Node) -> None:
        op, value, plan = op_of(node), node.meta.get("val"), self.plan.nodes.get(node)
        if node in self.written:
            return  # one of the results that a body made
        if node.op == "get_attr":
            self._copy(node)
        elif op is None:
            if isinstance(value, torch.SymInt) and self._known(size_of(value)):
                return  # written where it is used, from the symbols
            if not _has_value(node):
                self.region += 1
            if node.target is GRAD_MODE:
                (self.grad_mode,) = node.args  # type: ignore[assignment]
            self._copy(node)
        elif isinstance(value, torch.SymInt) and self._known(size_of(value)):
            return
        elif plan is None or plan.sharding is None:
            operands = self.laid_out(node, self._whole_operands(node))
            self.written[node] = self._named(self._add(node, op, *self._arguments(node, operands)), node.name)
        else:
            local = _GraphOp(self, node)
            rule = self.rules.rule(node)
            assert rule is not None
            written = (rule.body(plan.sharding) or _call_locally)(local)
            if isinstance(written, tuple):
                for user in node.users:
                    self.written[user] = written[source_of(user)[1]]
            else:
                self.written[node] = self._named(written, node.name)

    def _copy(self, node: fx.Node) -> None:
        copy = self.graph.node_copy(node, self._local_argument)
        self.origins[copy.name] = node.name
        self.written[node] = copy
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
            self.sizes.setdefault(value.node.expr, copy)

    def _local_argument(self, node: fx.Node) -> int | fx.Node:
        """What a node outside the plan takes: `getitem` its source as it is, all else whole values."""
        if self.current is not None and self.current.target is getitem:
            return self.written[node]
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and self._known(size_of(value)):
            return self.size(size_of(value))
        return self.convert(node, REPLICATED) if is_tensor(node) else self.written[node]

    def _arguments(self, node: fx.Node, operands: Sequence[fx.Node]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with these operands and global sizes."""
        left = list(operands)

        def rewrite(value: Any) -> Any:
            if isinstance(value, fx.Node):
                if is_tensor(value):
                    return left.pop(0)
                inner = value.meta.get("val")
                if isinstance(inner, torch.SymInt) and self._known(size_of(inner)):
                    return self.size(size_of(inner))
                return self.written[value]
            return value

        op = op_of(node)
        assert op is not None
        args, kwargs = pytree.tree_map(rewrite, in_order(op, node.args, node.kwargs))
        return args, kwargs

    def laid_out(self, node: fx.Node, operands: Sequence[fx.Node]) -> list[fx.Node]:
        """The operands of an op; of a foreign one, that may read its memory, as they lie there on one device."""
        foreign = node.op == "call_module" and self.rules.rule(node) is None
        if isinstance(node.target, torch._ops.OpOverload):
            foreign = node.target.namespace not in ("aten", "prims") or node.target in READS_MEMORY
        if not foreign:
            return list(operands)
        alone = self.rules.operands(node)
        orders = [memory_order(each.meta["val"]) for each in alone]
        return [self._in_order(local, order) for local, order in zip(operands, orders, strict=True)]

    def _in_order(self, value: fx.Node, order: Sequence[int]) -> fx.Node:
        """A value whose dimensions lie in memory in an order, the outermost first; no copy of one that lies so."""
        if list(order) == sorted(order):
            return self.emit(aten.contiguous.default, value)
        laid = self.emit(aten.contiguous.default, self.emit(aten.permute.default, value, list(order)))
        return self.emit(aten.permute.default, laid, [order.index(dim) for dim in range(len(order))])

    def _whole_operands(self, node: fx.Node) -> list[fx.Node]:
        """Every operand whole, but for those of which only dtype and device matter."""
        rule = self.rules.rule(node)
        metadata = rule.metadata if rule is not None else frozenset()
        operands = enumerate(self.rules.operands(node))
        return [self.written[v] if at in metadata else self.convert(v, REPLICATED) for at, v in operands]

    def _write_output(self, node: fx.Node) -> tuple[LeavingOutput, ...]:
        leaving: list[LeavingOutput] = []
        outputs: list[Any] = []
        gathered_before: dict[fx.Node, fx.Node] = {}
        returned = node.args[0]
        assert isinstance(returned, tuple)
        shared = _shared_memory([each for each in returned if isinstance(each, fx.Node) and is_tensor(each)])
        for index, (output, kind) in enumerate(zip(returned, self.outputs, strict=True)):
            placement, gathered = self._leaves(output, kind, shared)
            if not isinstance(output, fx.Node):
                outputs.append(output)
            elif not is_tensor(output):
                outputs.append(self._local_argument(output))
            elif output in shared:
                outputs.append(self._view_again(output))
            elif isinstance(placement, Replicated):
                if output not in gathered_before:  # what is returned twice is one tensor
                    whole = self._gather_output(output, f"gather_output_{index}")
                    twice = returned.count(output) > 1 and _viewed(whole) is not None
                    gathered_before[output] = _in_memory_of_its_own(self, whole) if twice else whole
                self.converted.setdefault((output, "output", index), gathered_before[output])
                outputs.append(gathered_before[output])
            else:
                outputs.append(self.convert(output, placement))
            padded = isinstance(placement, Sharded) and not placement.layout.is_even(self.plan.parts)
            size = placement.layout.size if isinstance(placement, Sharded) and kind == "dtensor" else None
            leaving.append(LeavingOutput(placement, padded, size, gathered))
        for each in leaving:
            if each.is_padded:
                assert isinstance(each.placement, Sharded)
                outputs.append(self._real_rows(each.placement))
            if each.size is not None and not isinstance(each.size, int):
                outputs.append(self.size(each.size))
        self.graph.output(tuple(outputs)).meta = dict(node.meta)
        return tuple(leaving)

    def _leaves(self, output: Any, kind: Output, shared: Collection[fx.Node]) -> tuple[Placement, str]:
        """The placement that an output leaves in, and why it is whole though it was to stay sharded."""
        placement = self.plan.placement(output) if isinstance(output, fx.Node) else REPLICATED
        if kind == "gather" or not isinstance(placement, Sharded):
            return REPLICATED, ""
        home = self.plan.home(output)
        if isinstance(home, Sharded) and home.dim != placement.dim:
            placement = home
        elif not isinstance(home, Sharded) and kind == "shard":
            return REPLICATED, "which of its dimensions is the sequence is not known: 'dtensor' says which is sharded"
        if output in shared:
            return REPLICATED, "it shares its memory with another output or an input: return a clone"
        if kind == "dtensor" and not placement.layout.is_chunked(self.plan.parts):
            return REPLICATED, f"no DTensor has rows that lie on the ranks as {placement}: take 'shard' for it"
        return placement, ""

    def _gather_output(self, value: fx.Node, role: str) -> fx.Node:
        """A whole output, laid out in memory as the captured one: code behind a graph break may look at it there."""
        placement, order = self.plan.placement(value), memory_order(value.meta["val"])
        if not isinstance(placement, Sharded):
            whole = self.convert(value, REPLICATED, role)
            return self._in_order(whole, order) if _has_own_memory(value) else whole
        if order == sorted(order):
            return self.convert(value, REPLICATED, role)
        local = self.emit(aten.permute.default, self.convert(value, placement), order)
        moved = Sharded(order.index(placement.dim), placement.layout)
        whole = self._named(self._on_dim(torch.ops.sp.all_gather.default, local, moved), role)
        return self.emit(aten.permute.default, whole, [order.index(dim) for dim in range(len(order))])

    def _view_again(self, value: fx.Node) -> fx.Node:
        """A whole value that is a view of another, as a view: what is written to the one shows in the other."""
        base = _viewed(value)
        key = (value, "view", self.region)
        if key not in self.converted and base is None:
            whole = self._gather_output(value, f"gather_output_{value}")
            self.converted[key] = whole if value.op == "placeholder" else _in_memory_of_its_own(self, whole)
        elif key not in self.converted and base is not None:
            source, result = source_of(value)
            assert isinstance(source.target, torch._ops.OpOverload)
            args, kwargs = self._arguments(source, [self._view_again(base)])
            with self._in_grad_mode_of(source):
                view = self._add(value, source.target, args, kwargs)
            self.converted[key] = view if source is value else self._add(value, getitem, (view, result), {})
        return self.converted[key]

    @contextmanager
    def _in_grad_mode_of(self, node: fx.Node) -> Iterator[None]:
        """What is written inside has a gradient if what a captured node made had one."""
        there, here = self.grad_modes[node], self.grad_mode
        differs = there is not None is not here and there != here
        if differs:
            self._add(None, GRAD_MODE, (there,), {})
        yield
        if differs:
            self._add(None, GRAD_MODE, (here,), {})

    def _real_rows(self, placement: Sharded) -> fx.Node:
        positions = self._positions(placement)
        marked = self._on_dim(torch.ops.sp.mask_padding.default, positions, Sharded(0, placement.layout), -1)
        return self.emit(aten.ge.Scalar, marked, 0)

    # Conversions

    def convert(self, value: fx.Node, target: Placement, role: str | None = None) -> fx.Node:
        """A captured value on this rank, in the placement that is wanted."""
        if value not in self.written:
            raise AssertionError(f"{value} is used before it is written")
        key = (value, target, self.region)
        if key not in self.converted:
            made = self._made(value)
            delivered = self.plan.placement(value)
            if target == made:
                return self.written[value]  # a neighbour that borrows the same dimension: no way home and back
            home = (value, delivered, self.region)
            if home not in self.converted:
                self.converted[home] = self._move(self.written[value], value, made, delivered, None)
            if key not in self.converted:
                self.converted[key] = self._move(self.converted[home], value, delivered, target, role)
        return self.converted[key]

    def _made(self, value: fx.Node) -> Placement:
        source, result = source_of(value)
        plan = self.plan.nodes.get(source)
        return plan.results()[result] if plan else REPLICATED

    def replicate(self, value: fx.Node) -> fx.Node:
        """A replicated value on its way into sharded work."""
        key = (value, "replicate", self.region)
        if key not in self.converted:
            whole = self.convert(value, REPLICATED)
            if value in self.trained and self.local_gradients and isinstance(value.meta["val"], torch.nn.Parameter):
                scaled = self.emit(torch.ops.sp.scale_gradient.default, whole, float(self.plan.parts))
                whole = self._named(scaled, f"scale_gradient_{value}", value)
            elif value in self.trained or whole.target is torch.ops.sp.all_gather.default:
                # Also where no gradient comes back: what is gathered for sharded work is gathered again in backward.
                summed = self.emit(torch.ops.sp.replicate.default, whole, self.group)
                whole = self._named(summed, f"replicate_{value}", value)
            self.converted[key] = whole
        return self.converted[key]

    def _move(self, local: fx.Node, value: fx.Node, source: Placement, target: Placement, role: str | None) -> fx.Node:
        """Bring the local value of `value` from one placement to another."""
        sp, name = torch.ops.sp, value.name
        if source == target:
            return local
        if isinstance(source, Replicated) and isinstance(target, Sharded):
            verb = "slice" if value.op == "placeholder" else "shard"
            return self._named(self._on_dim(sp.shard.default, local, target), role or f"{verb}_{name}", value)
        if isinstance(source, Sharded) and isinstance(target, Replicated):
            if 0 in self.rules.shape(value):  # no elements to send: as many of none as the whole has
                of_none = self.emit(aten.new_zeros.default, local, [self.size(source.layout.size)], dtype=torch.int64)
                return self.emit(aten.index_select.default, local, source.dim, of_none)
            role = role or self.roles.get((value, "all_gather"), f"all_gather_{name}")
            return self._named(self._on_dim(sp.all_gather.default, local, source), role, value)
        if isinstance(source, Sharded) and isinstance(target, Sharded) and source.dim != target.dim:
            layouts = (*self._dim(source), *self._dim(target))
            windows = self._windows(source, "gather_windows") | self._windows(target, "scatter_windows")
            moved = self.emit(sp.all_to_all.default, local, *layouts, self.group, **windows)
            return self._named(moved, role or self.roles.get((value, "all_to_all"), f"all_to_all_{name}"), value)
        if isinstance(source, Sharded) and isinstance(target, GroupedHeads) and source.dim != target.dim:
            moved = self.emit(
                sp.all_to_all_kv.default,
                local,
                self.rank,
                *self._dim(source),
                target.dim,
                target.query_heads,
                self.group,
                **self._windows(source, "gather_windows"),
            )
            return self._named(moved, role or self.roles.get((value, "all_to_all"), f"all_to_all_{name}"), value)
        if isinstance(source, Replicated) and isinstance(target, GroupedHeads):
            heads = self.rules.shape(value)[target.dim]
            assert isinstance(heads, int)
            times = target.query_heads // heads
            repeated = self.emit(aten.repeat_interleave.self_int, local, times, target.dim)
            return self._move(repeated, value, REPLICATED, Sharded(target.dim, whole_layout(target.query_heads)), role)
        if isinstance(source, Sharded) and isinstance(target, Sharded):
            wanted = held_rows(target.layout, self.plan.parts)
            if wanted is not None and moved_rows(source.layout, target.layout, self.plan.parts) is not None:
                rows = neighbouring_rows(_LocalGraph(self), local, source, wanted, value.meta["val"].device)
                return rows if target.layout.is_even(self.plan.parts) else self._refill_padding(rows, target)
        whole = self._move(local, value, source, REPLICATED, None)
        return self._move(whole, value, REPLICATED, target, role)

    def _dim(self, placement: Sharded) -> tuple[Any, ...]:
        layout = placement.layout
        sizes = [self.size(segment.size) for segment in layout.segments]
        granules = [self.size(segment.granule) for segment in layout.segments]
        return placement.dim, self.size(layout.outer), sizes, granules

    def _windows(self, placement: Sharded, name: str = "windows") -> dict[str, list[int | fx.Node]]:
        """The argument for rows that are gone; none if there are none."""
        gone = [rows for segment in placement.layout.segments for rows in (segment.before, segment.after)]
        return {name: [self.size(rows) for rows in gone]} if any(rows != 0 for rows in gone) else {}

    def _on_dim(self, op: torch._ops.OpOverload, local: fx.Node, placement: Sharded, *extra: Any) -> fx.Node:
        layout = self._dim(placement)
        return self.emit(op, local, self.rank, *layout, *extra, self.group, **self._windows(placement))

    def _refill_padding(self, local: fx.Node, placement: Sharded) -> fx.Node:
        return self._on_dim(torch.ops.sp.refill_padding.default, local, placement)

    def _positions(self, placement: Sharded) -> fx.Node:
        _, *layout = self._dim(placement)
        return self.emit(torch.ops.sp.positions.default, self.rank, *layout, self.group, **self._windows(placement))

    # Sizes

    def _known(self, size: Size) -> bool:
        """Whether a size can be computed from the symbols that are inputs of the graph."""
        return isinstance(size, int) or all(symbol in self.sizes for symbol in size.free_symbols)

    def size(self, size: Size) -> int | fx.Node:
        """A size as an argument: itself, or the node that computes it from the graph's symbols."""
        if isinstance(size, int):
            return size
        if size not in self.sizes:
            tracer = fx.proxy.GraphAppendingTracer(self.graph)
            symbols = {symbol: fx.Proxy(self.sizes[symbol], tracer) for symbol in size.free_symbols}
            self.sizes[size] = sympy_interp(PythonReferenceAnalysis, symbols, size).node
        return self.sizes[size]

    # Writing

    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self._add(self.current, target, args, kwargs)

    def _add(
        self, origin: fx.Node | None, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node:
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

    def _named(self, node: fx.Node, name: str, value: fx.Node | None = None) -> fx.Node:
        origin = self.origins.pop(node.name, "")
        node._rename(name)
        self.origins[node.name] = value.name if value is not None else origin
        return node


class _LocalGraph:
    """The `LocalGraph` of what is written for the current node."""

    def __init__(self, writer: _Writer) -> None:
        self._writer = writer
        self.parts = writer.plan.parts

    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self._writer.emit(target, *args, **kwargs)

    def gather(self, value: fx.Node, placement: Sharded, role: str) -> fx.Node:
        writer = self._writer
        layout, windows = writer._dim(placement), writer._windows(placement)
        whole = self.emit(torch.ops.sp.all_gather_replicate.default, value, *layout, writer.group, **windows)
        return writer._named(whole, f"{role}_{writer.current}")

    def rank(self) -> fx.Node:
        assert self._writer.rank is not None
        return self._writer.rank


class _GraphOp(_LocalGraph):
    """The `LocalOp` of a rule's body: writes nodes into the new graph."""

    def __init__(self, writer: _Writer, node: fx.Node) -> None:
        super().__init__(writer)
        plan = writer.plan.nodes[node]
        assert plan.sharding is not None
        rule = writer.rules.rule(node)
        assert rule is not None
        self.call = writer.rules.call(node)
        self.operands = tuple(plan.operand(index) for index in range(len(self.call.operands)))
        self.results = plan.sharding.results
        self.rng: str = writer.rng
        self.shape_argument = rule.shape_argument
        values = [plan.sources.get(at, operand) for at, operand in enumerate(writer.rules.operands(node))]
        # A term that is added to the sum over ranks is added once: its gradient is the full one as it is.
        added = rule.additive if not any(isinstance(result, Sharded) for result in self.results) else frozenset()
        self._operands = []
        for at, (value, placement) in enumerate(zip(values, self.operands, strict=True)):
            if not isinstance(placement, Replicated) or at in added:
                self._operands.append(writer.convert(value, placement))
            elif at in rule.metadata:
                self._operands.append(writer.written[value])
            else:
                self._operands.append(writer.replicate(value))
        self._operands = writer.laid_out(node, self._operands)
        self.args, self.kwargs = writer._arguments(node, self._operands)

    def operand(self, index: int) -> fx.Node:
        return self._operands[index]

    def size(self, size: Size) -> int | fx.Node:
        return self._writer.size(size)

    def computed_again(self, value: fx.Node) -> fx.Node:
        value.meta |= COMPUTED_AGAIN
        return value

    def mask_padding(self, value: fx.Node, placement: Placement, fill: float | int) -> fx.Node:
        if not isinstance(placement, Sharded):
            return value
        return self._writer._on_dim(torch.ops.sp.mask_padding.default, value, placement, fill)

    def refill_padding(self, value: fx.Node, placement: Sharded) -> fx.Node:
        return self._writer._refill_padding(value, placement)

    def all_reduce(self, value: fx.Node, kind: str = "sum") -> fx.Node:
        reduced = self.emit(torch.ops.sp.all_reduce.default, value, kind, self._writer.group)
        return self._writer._named(reduced, f"all_reduce_{self._writer.current}")

    def replicate(self, value: fx.Node) -> fx.Node:
        return self.emit(torch.ops.sp.replicate.default, value, self._writer.group)

    def shard(self, value: fx.Node, placement: Sharded) -> fx.Node:
        return self._writer._on_dim(torch.ops.sp.shard.default, value, placement)

    def positions(self, placement: Sharded) -> fx.Node:
        return self._writer._positions(placement)

    def select_rows(self, value: fx.Node, placement: Sharded, index: fx.Node) -> fx.Node:
        rows = self._writer._on_dim(torch.ops.sp.select_rows.default, value, placement, index)
        return self._writer._named(rows, f"select_rows_{self._writer.current}")

    def module(self, name: str, module: fx.GraphModule) -> fx.Node:
        name = f"{name}_{self._writer.current}"
        self._writer.modules[name] = module
        return self._writer.graph.get_attr(name)


def _call_locally(local: _GraphOp) -> fx.Node:
    """The op as it is, on local operands; a shape among its arguments becomes the local one."""
    args, kwargs = list(local.args), dict(local.kwargs)
    if local.shape_argument is not None:
        spec = local.call.results[0]
        assert spec is not None
        shape = [local.size(size) for size in local_shape(spec.shape, local.results[0], local.parts)]
        position = list(argument_defaults(local.call.target)).index(local.shape_argument)
        if position < len(args):
            args[position] = shape
        else:
            kwargs[local.shape_argument] = shape
    return local.emit(local.call.target, *args, **kwargs)


def _in_memory_of_its_own(writer: _Writer, whole: fx.Node) -> fx.Node:
    """A copy of a whole output that others are views of.

    AOTAutograd makes those anew from this one, by the views that it has seen since the memory of both was made. So this
    one has to be the first in its memory, and no view itself.
    """
    return writer.emit(aten.clone.default, whole)


def _has_own_memory(value: fx.Node) -> bool:
    """Whether a value is made by an op and fills its memory in some order; not an input, nor what is expanded."""
    tensor = value.meta["val"]
    return value.op == "call_function" and tensor.dim() > 1 and is_non_overlapping_and_dense_or_false(tensor)


def _viewed(value: fx.Node) -> fx.Node | None:
    """The value that this one is a view of, if its op makes a view of one operand."""
    source, _ = source_of(value)
    if not isinstance(source.target, torch._ops.OpOverload) or source.target._schema.is_mutable:
        return None
    aliases = [argument.alias_info is not None for argument in source.target._schema.arguments]
    base = source.args[0] if aliases and aliases[0] and source.args else None
    return base if isinstance(base, fx.Node) else None


def _shared_memory(outputs: Sequence[fx.Node]) -> frozenset[fx.Node]:
    """The outputs that share their memory with another one, or with an input."""
    roots: dict[fx.Node, fx.Node] = {}
    for output in outputs:
        root: fx.Node = output
        while (base := _viewed(root)) is not None:
            root = base
        roots[output] = root
    counts = Counter(roots.values())
    return frozenset(
        output
        for output, root in roots.items()
        if counts[root] > 1 or (root.op == "placeholder" and root is not output)
    )


def _has_value(node: fx.Node) -> bool:
    """A node without a value changes state: the gradient mode, or autocast."""
    return node.meta.get("val") is not None or node.target is getitem


def _roles(sites: Sequence[SitePlan]) -> dict[tuple[fx.Node, str], str]:
    """What the collectives of a site are called, by the value that is moved and the op that moves it."""
    roles: dict[tuple[fx.Node, str], str] = {}
    for planned in sites:
        for name, value in zip("qkv", planned.moved, strict=True):
            if planned.strategy == "ulysses":
                roles.setdefault((value, "all_to_all"), f"gather_seq_scatter_heads_{name}")
            elif planned.strategy == "all_gather_kv":
                roles.setdefault((value, "all_gather"), f"gather_seq_{name}")
        output = planned.site.output
        first = [user for user in output.users if user.target is getitem and source_of(user)[1] == 0]
        for value in [output] if is_tensor(output) else first:
            roles[value, "all_to_all"] = "gather_heads_scatter_seq"
    return roles
