"""One call of an op as a sharding rule sees it: arguments by name, tensors by shape and dtype."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils import _pytree as pytree

from ..placement.placements import (
    Size,
    size_of,
)

_CPU = torch.device("cpu")

Op: TypeAlias = OpOverload | HigherOrderOperator | fx.GraphModule
"""What a node calls: of the Dynamo graph's opaque parts the module."""


@cache
def argument_defaults(op: Op) -> Mapping[str, Any]:
    """The arguments of an op in the order of its schema, with their defaults (None for want of one).

    A higher-order operator has no schema: its arguments are those of its `__call__`.
    """
    if isinstance(op, fx.GraphModule):
        return {node.name: None for node in op.graph.find_nodes(op="placeholder")}
    if isinstance(op, OpOverload):
        schema = op._schema.arguments
        return {each.name: each.default_value if each.has_default_value() else None for each in schema}
    parameters = inspect.signature(op).parameters.items()
    return {name: None if each.default is each.empty else each.default for name, each in parameters}


def named_arguments(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults of those that are not given."""
    defaults = argument_defaults(op)
    return {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}


def in_order(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the keywords in the order of the op's; tensors in this order are its operands."""
    return tuple(args), {name: kwargs[name] for name in argument_defaults(op) if name in kwargs}


@dataclass(frozen=True)
class TensorSpec:
    """Global shape and dtype of a tensor argument or result."""

    shape: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device = _CPU

    @staticmethod
    def of(value: torch.Tensor) -> TensorSpec:
        return TensorSpec(tuple(size_of(s) for s in value.shape), value.dtype, value.device)


@dataclass(frozen=True)
class OpCall:
    """One call of an op as a rule sees it: arguments by name, tensors as `TensorSpec`s."""

    target: Op
    arguments: Mapping[str, Any]
    operands: tuple[TensorSpec, ...]
    operand_names: tuple[str, ...]
    """The schema argument that each operand belongs to; a tensor list gives its name once per tensor."""
    results: tuple[TensorSpec | None, ...]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def overload(self) -> OpOverload:
        """The target, which is no higher-order operator."""
        assert isinstance(self.target, OpOverload)
        return self.target

    @staticmethod
    def of(target: Op, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> OpCall:
        """From values: tensors, fake tensors or numbers."""
        given = named_arguments(target, args, kwargs)
        arguments = {name: pytree.tree_map_only(torch.Tensor, TensorSpec.of, value) for name, value in given.items()}
        operands, names = [], []
        for name, value in arguments.items():
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, TensorSpec):
                    operands.append(leaf)
                    names.append(name)
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        results = tuple(TensorSpec.of(out) if isinstance(out, torch.Tensor) else None for out in outputs)
        return OpCall(target, arguments, tuple(operands), tuple(names), results)

    @staticmethod
    def of_node(node: fx.Node) -> OpCall:
        """From a node of a captured graph. A graph among the arguments, as of a `score_mod`, is a `GraphModule`."""
        target = called_module(node) if node.op == "call_module" else node.target
        assert isinstance(target, (OpOverload, HigherOrderOperator, fx.GraphModule))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), _value)
        return OpCall.of(target, args, kwargs, node.meta["val"])


def _value(node: fx.Node) -> Any:
    if node.op == "get_attr" and "val" not in node.meta:
        return called_module(node)
    return node.meta["val"]


def called_module(node: fx.Node) -> fx.GraphModule:
    """The module that a node names."""
    assert node.graph.owning_module is not None and isinstance(node.target, str)
    module = node.graph.owning_module.get_submodule(node.target)
    assert isinstance(module, fx.GraphModule)
    return module
