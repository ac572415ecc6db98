"""What a node does beside what it returns, and where in memory what it returns lies."""

from __future__ import annotations

import torch
import torch.nn.attention
from torch._ops import OpOverload
from torch.fx import Node

aten = torch.ops.aten

GRAD_MODE = torch._C._set_grad_enabled
ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast
SDPA_BACKEND = torch.nn.attention._backend_from_string
SDPA_BACKENDS = torch.nn.attention._sdpa_kernel
STATE = (GRAD_MODE, ENTER_AUTOCAST, EXIT_AUTOCAST, SDPA_BACKENDS)
"""Calls that change the state that the nodes behind them run in."""
_ASSERTS = (
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)


def memory_order(value: torch.Tensor) -> list[int]:
    """The dimensions from the outermost in memory to the innermost.

    Strides that are symbols are compared as they were when the graph was made: no length changes their order.
    """
    strides = [
        int(each.node.shape_env.optimization_hint(each.node.expr)) if isinstance(each, torch.SymInt) else each
        for each in value.stride()
    ]
    return sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim))


def has_effect(node: Node) -> bool:
    """Nodes that stay without a user. Dead random operators stay too: they draw numbers; opaque parts may."""
    if node.op != "call_function":
        return node.op != "get_attr"
    if node.target in STATE or node.target in _ASSERTS:
        return True
    return isinstance(node.target, OpOverload) and (
        node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags
    )
