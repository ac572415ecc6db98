"""The walk over the captured graph: each node is written as the plan has it, and the outputs last."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module
from torch.utils import _pytree as pytree

from sp_compile.ir.effects import GRAD_MODE, has_effect, memory_order
from sp_compile.ir.graph import GraphRules, is_tensor, op_of, source_of
from sp_compile.ir.plan import Output, RandomNumbers, ShardedGraph, ShardingPlan
from sp_compile.passes.insert_collectives.bodies import RankOp, call_locally
from sp_compile.passes.insert_collectives.conversions import Conversions, has_value
from sp_compile.passes.insert_collectives.outputs import Outputs
from sp_compile.passes.insert_collectives.writer import GraphWriter
from sp_compile.placement.placements import REPLICATED, size_of
from sp_compile.rules.op_call import in_order
from sp_compile.rules.registry import READS_MEMORY

aten = torch.ops.aten


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
    return Rewriter(graph_module, rules, plan, group, rng, local_gradients).write(outputs)


class Rewriter:
    """One captured graph, its plan, and what of it is written."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        rules: GraphRules,
        plan: ShardingPlan,
        group: str,
        rng: RandomNumbers,
        local_gradients: bool,
    ) -> None:
        self.graph_module, self.rules, self.plan, self.rng = graph_module, rules, plan, rng
        self.writer = GraphWriter(group)
        self.conversions = Conversions(self.writer, rules, plan, local_gradients)
        self.grad_mode: bool | None = None
        """What the graph has set last; None: nothing yet, so that it is that of the caller."""
        self.grad_modes: dict[fx.Node, bool | None] = {}
        """That of each captured node."""

    def write(self, outputs: Sequence[Output]) -> ShardedGraph:
        """The new graph; `outputs` is how each output is to leave it."""
        nodes, graph = list(self.rules.graph.nodes), self.writer.graph
        for node in (n for n in nodes if n.op == "placeholder"):
            self._copy(node)
        self.writer.take_rank()
        for node in nodes:
            self.writer.current, self.grad_modes[node] = node, self.grad_mode
            if node.op not in ("placeholder", "output"):
                self._write_node(node)
        leaving = Outputs(self, outputs).write(self.rules.graph.output_node())
        # A view that is an output is made anew of the whole value: nobody may ask for its rows any more.
        graph.eliminate_dead_code(has_effect)
        graph.lint()
        held, modules = self.conversions.held(), self.writer.modules
        root = copy.copy(self.graph_module) if modules else self.graph_module
        for name, each in modules.items():
            root.add_module(name, each)
        return ShardedGraph(_make_graph_module(root, graph), self.writer.origins, leaving, held)

    def _write_node(self, node: fx.Node) -> None:
        op, value, plan = op_of(node), node.meta.get("val"), self.plan.nodes.get(node)
        if node in self.conversions.written:
            return  # one of the results that a body made
        if node.op == "get_attr":
            self._copy(node)
        elif op is None:
            if isinstance(value, torch.SymInt) and self.writer.is_known(size_of(value)):
                return  # written where it is used, from the symbols
            if not has_value(node):
                self.conversions.region += 1
            if node.target is GRAD_MODE:
                (self.grad_mode,) = node.args  # type: ignore[assignment]
            self._copy(node)
        elif isinstance(value, torch.SymInt) and self.writer.is_known(size_of(value)):
            return
        elif plan is None or plan.sharding is None:
            operands = self.laid_out(node, self._whole_operands(node))
            self.conversions.written[node] = self.writer.named(
                self.writer.add(node, op, *self.arguments(node, operands)), node.name
            )
        else:
            local = RankOp(self, node)
            rule = self.rules.rule(node)
            assert rule is not None
            written = (rule.body(plan.sharding) or call_locally)(local)
            if isinstance(written, tuple):
                for user in node.users:
                    self.conversions.written[user] = written[source_of(user)[1]]
            else:
                self.conversions.written[node] = self.writer.named(written, node.name)

    def _copy(self, node: fx.Node) -> None:
        self.conversions.written[node] = self.writer.copy(node, self.local_argument)

    def local_argument(self, node: fx.Node) -> int | fx.Node:
        """What a node outside the plan takes: `getitem` its source as it is, all else whole values."""
        if self.writer.current is not None and self.writer.current.target is getitem:
            return self.conversions.written[node]
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and self.writer.is_known(size_of(value)):
            return self.writer.size(size_of(value))
        return self.conversions.convert(node, REPLICATED) if is_tensor(node) else self.conversions.written[node]

    def arguments(self, node: fx.Node, operands: Sequence[fx.Node]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with these operands and global sizes."""
        left = list(operands)

        def rewrite(value: Any) -> Any:
            if isinstance(value, fx.Node):
                if is_tensor(value):
                    return left.pop(0)
                inner = value.meta.get("val")
                if isinstance(inner, torch.SymInt) and self.writer.is_known(size_of(inner)):
                    return self.writer.size(size_of(inner))
                return self.conversions.written[value]
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
        return [self.in_order_of(local, order) for local, order in zip(operands, orders, strict=True)]

    def in_order_of(self, value: fx.Node, order: Sequence[int]) -> fx.Node:
        """A value whose dimensions lie in memory in an order, the outermost first; no copy of one that lies so."""
        if list(order) == sorted(order):
            return self.writer.emit(aten.contiguous.default, value)
        laid = self.writer.emit(aten.contiguous.default, self.writer.emit(aten.permute.default, value, list(order)))
        return self.writer.emit(aten.permute.default, laid, [order.index(dim) for dim in range(len(order))])

    def _whole_operands(self, node: fx.Node) -> list[fx.Node]:
        """Every operand whole, but for those of which only dtype and device matter."""
        rule = self.rules.rule(node)
        metadata = rule.metadata if rule is not None else frozenset()
        operands = enumerate(self.rules.operands(node))
        return [
            self.conversions.written[v] if at in metadata else self.conversions.convert(v, REPLICATED)
            for at, v in operands
        ]
