"""What every pass asks of a captured graph: its rules, its operands, its shapes, what descends from activations."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from operator import getitem

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.utils import _pytree as pytree

from ..placement.placements import Size, product
from ..rules import has_rule, rule_for
from ..rules.op_call import Op, OpCall, TensorSpec, called_module, in_order
from ..rules.rule import OpShardingRule


@contextmanager
def leaving_no_symbols(mode: FakeTensorMode) -> Iterator[None]:
    """What runs inside adds no guard on the sizes that Dynamo knows, and leaves no new symbol to be accounted for."""
    with ExitStack() as stack:
        if mode.shape_env is not None:
            stack.enter_context(mode.shape_env.suppress_guards())
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        yield


def is_tensor(node: fx.Node) -> bool:
    """Whether a node's value is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def _has_gradients(value: torch.Tensor) -> bool:
    """Whether a tensor is of numbers that a gradient may have: no counts, no flags."""
    return value.is_floating_point() or value.is_complex()


def source_of(value: fx.Node) -> tuple[fx.Node, int]:
    """The op that made a value, and which of its results it is: `getitem` names one of several."""
    if value.target is getitem:
        source, result = value.args
        assert isinstance(source, fx.Node) and isinstance(result, int)
        return source, result
    return value, 0


def op_of(node: fx.Node) -> Op | None:
    """The op that a node calls: an overload, a higher-order operator with a rule, or an opaque part as a module."""
    if node.op == "call_module":
        return called_module(node)
    target = node.target
    if isinstance(target, OpOverload) or (isinstance(target, HigherOrderOperator) and has_rule(target)):
        return target
    return None


def operand_nodes(node: fx.Node) -> tuple[fx.Node, ...]:
    """The tensor operands of a call in the order of `OpCall.operands`: one entry per use, lists flattened."""
    op = op_of(node)
    arguments = in_order(op, node.args, node.kwargs) if op is not None else node.args
    leaves = pytree.tree_leaves(arguments) if op is not None else ()
    return tuple(leaf for leaf in leaves if isinstance(leaf, fx.Node) and is_tensor(leaf))


class GraphRules:
    """A captured graph with the rule of each of its nodes. Nothing here changes the graph.

    The nodes in `replicated` have none: the user has asked for them to run on whole values.
    """

    def __init__(self, graph: fx.Graph, replicated: Collection[fx.Node] = ()) -> None:
        self.graph = graph
        self.replicated = frozenset(replicated)
        self._rules: dict[fx.Node, OpShardingRule | None] = {}
        self._calls: dict[fx.Node, OpCall] = {}
        self._operands: dict[fx.Node, tuple[fx.Node, ...]] = {}

    def rule(self, node: fx.Node) -> OpShardingRule | None:
        """The op sharding rule of a node; None if it has to run on whole values."""
        if node not in self._rules:
            is_op = op_of(node) is not None and node not in self.replicated
            known = is_op and node.meta.get("val") is not None and not self.sized_by_data(node)
            self._rules[node] = rule_for(self.call(node)) if known else None
        return self._rules[node]

    def call(self, node: fx.Node) -> OpCall:
        """The call of a node, as its rule sees it."""
        if node not in self._calls:
            self._calls[node] = OpCall.of_node(node)
        return self._calls[node]

    def operands(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The tensor operands of a node, as in its rule."""
        if node not in self._operands:
            self._operands[node] = operand_nodes(node)
        return self._operands[node]

    def sized_by_data(self, node: fx.Node) -> bool:
        """Whether a size of an operand or result is read from a tensor: it is unknown until then, and may be 0."""
        values = pytree.tree_leaves([each.meta.get("val") for each in (node, *self.operands(node))])
        return any(free_unbacked_symbols(value) for value in values if isinstance(value, torch.Tensor))

    def shape(self, node: fx.Node) -> tuple[Size, ...]:
        """The global shape of a node's value."""
        return TensorSpec.of(node.meta["val"]).shape

    def bytes(self, node: fx.Node) -> int:
        """The size of a node's whole value in bytes; symbolic sizes count as they were when the graph was made."""
        value = node.meta["val"]
        count = self.hint(product(self.shape(node)))
        return count * int(value.element_size())

    def hint(self, size: Size) -> int:
        """A size as it was when the graph was made, or a guess if data will tell; for costs only."""
        if isinstance(size, int):
            return size
        shape_env = self._shape_env
        return int(shape_env.optimization_hint(size)) if shape_env else int(size)

    def position(self, node: fx.Node) -> int:
        """The place of a node in the order of the graph."""
        return self._positions[node]

    @cached_property
    def _positions(self) -> dict[fx.Node, int]:
        return {node: at for at, node in enumerate(self.graph.nodes)}

    def is_weight(self, node: fx.Node) -> bool:
        """Whether a value is made from one parameter by itself: a view or a cast of it."""
        while node.op == "call_function" and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        return node.op == "placeholder" and isinstance(node.meta.get("val"), torch.nn.Parameter)

    def is_activation(self, node: fx.Node) -> bool:
        """Whether a value is floating and descends from a parameter or from a floating input of the user."""
        return node in self._activations

    def varies(self, node: fx.Node) -> bool:
        """Whether a value depends on an input that is no parameter, so that it is no weight."""
        return node in self._varying

    @cached_property
    def trained(self) -> frozenset[fx.Node]:
        """The values through which a gradient may flow: all that descends from an input which requires one."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if node.op == "placeholder":
                begins = isinstance(value, torch.Tensor) and value.requires_grad
            else:
                begins = not found.isdisjoint(node.all_input_nodes)
            if begins and (not isinstance(value, torch.Tensor) or _has_gradients(value)):
                found.add(node)
        return frozenset(found)

    @cached_property
    def _varying(self) -> frozenset[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            value = node.meta.get("val")
            begins = node.op == "placeholder" and not isinstance(value, torch.nn.Parameter)
            if begins or not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return frozenset(found)

    @cached_property
    def _activations(self) -> frozenset[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if node.op == "placeholder" or node.op == "get_attr":
                begins = isinstance(value, torch.Tensor) and _has_gradients(value)
                if begins and (value.requires_grad or value.dim() >= 2):
                    found.add(node)
            elif not found.isdisjoint(node.all_input_nodes) and (
                not isinstance(value, torch.Tensor) or _has_gradients(value)
            ):
                found.add(node)
        return frozenset(found)

    @cached_property
    def _shape_env(self) -> ShapeEnv | None:
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, FakeTensor):
                return value.fake_mode.shape_env
        return None
