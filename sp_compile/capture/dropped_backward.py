"""Custom `autograd.Function`s whose backward Dynamo has dropped, so that no backend could be right (torch 2.13, 2.14).

    torch.vmap(lambda row: Rounded.apply(row))(x)     # which Dynamo traces as torch.vmap(lambda row: row.round())(x)

To call a Function's backward Dynamo keeps the call where an argument requires a gradient. Inside of `torch.vmap` and
of the other transforms of `torch.func`, an argument is a wrapper that says it requires none. So Dynamo traces the
forward alone, as ordinary ops: gradients are those of its ops, and so are the values of `torch.func.grad`. That is
found by what Dynamo has traced: a forward more often than its backward.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext

from ..errors import user_line

LOST = "Dynamo drops the backward of a custom autograd.Function there, whatever the backend"
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (.+)')
_KEPT = "autograd_function_apply"
"""The operator with which Dynamo keeps a Function whole."""


def dropped_backward(gm: fx.GraphModule, inputs: Sequence[Any]) -> str | None:
    """The Function whose backward is not in a Dynamo graph, though a gradient may be taken through it.

    Called while the graph is compiled. Returns its name with the line that calls it, or None.
    """
    inside = list(_nodes_in_transforms(gm, 0))
    if not inside:
        return None
    differentiates = any("grad_increment" in _name(node) or "jvp_increment" in _name(node) for node in inside)
    if not differentiates and not any(isinstance(each, Tensor) and each.requires_grad for each in inputs):
        return None
    traced = Counter(TracingContext.get_traced_code() or [])
    for function in _subclasses(torch.autograd.Function):
        forward, backward = _code_of(function.forward), _code_of(function.backward)
        if forward is None or traced[forward] <= (0 if backward is None else traced[backward]):
            continue
        calls = [node for node in inside if _is_of(node, forward)]
        if calls:
            return f"{function.__qualname__} ({user_line(calls[0])})"
        if not any(_is_of(node, forward) for node in _all_nodes(gm)):  # it returns its argument as it is
            return function.__qualname__
    return None


def _nodes_in_transforms(gm: fx.GraphModule, depth: int) -> Iterator[fx.Node]:
    """Those between the beginning and the end of a transform, here and in the bodies of operators; and its beginning.

    Not those of a Function that is kept: its backward is there.
    """
    for node in gm.graph.nodes:
        depth += _name(node).endswith("increment_nesting")
        if depth:
            yield node
        depth -= _name(node).endswith("decrement_nesting")
        if node.op == "call_function" and _name(node) != _KEPT:
            for body in _bodies(gm, node):
                yield from _nodes_in_transforms(body, depth)


def _bodies(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    held = [getattr(gm, str(each.target), None) for each in node.all_input_nodes if each.op == "get_attr"]
    return [each for each in held if isinstance(each, fx.GraphModule)]


def _all_nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for each in cls.__subclasses__():
        yield each
        yield from _subclasses(each)


def _code_of(function: Any) -> CodeType | None:
    """That of the user, under decorators such as `torch.amp.custom_fwd`."""
    return getattr(inspect.unwrap(function), "__code__", None)


def _is_of(node: fx.Node, code: CodeType) -> bool:
    """Whether a call of `code` has made the node."""
    lines = {line for _, _, line in code.co_lines()}
    return any(
        (file, function.strip()) == (code.co_filename, code.co_name) and int(line) in lines
        for file, line, function in _FRAME.findall(node.meta.get("stack_trace") or "")
    )
