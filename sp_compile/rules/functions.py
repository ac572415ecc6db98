"""Opaque parts that are pointwise: a custom `autograd.Function`, such as an activation of one's own, or a `vmap`.

    forward   y = x * tanh(x)        every op has the shape of the operands, or none
    backward  dx = g * (...)         0 where g is 0: a gradient of padding is 0, whatever the padding holds

Dynamo has both as graphs. They are run once, on the meta device, and every op that they call is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch import predispatch
from torch._functorch.autograd_function import autograd_function_apply
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .dims import fit, plain
from .op_call import OpCall
from .rule import OpShardingRule, factors_of

aten = torch.ops.aten

_COPIES = {aten.alias, aten.clone, aten.detach, aten._to_copy}
_FILLED = {aten.zeros_like, aten.ones_like, aten.full_like}
# 0 if its first operand is, if any is, if all are.
_FIRST = {aten.neg, aten.div, *_COPIES}
_ANY = {aten.mul}
_ALL = {aten.add, aten.sub, aten.where}


def function_rule(call: OpCall) -> OpShardingRule | None:
    """`..., ... -> ...` for operands of one shape, under a `vmap` `d! ..., d! ... -> d! ...`: it knows the size of the
    dimension that it maps over. None for any other opaque part."""
    assert isinstance(call.target, fx.GraphModule)
    bodies, mapped = _bodies(call.target), _mapped(call.target)
    if (bodies is None and mapped is None) or len(call.operands) < len(call.arguments):
        return None
    if {spec and spec.shape for spec in (*call.operands, *call.results)} != {call.operands[0].shape}:
        return None
    # No op looks at a size, so any will do for a symbolic one.
    shape = [size if isinstance(size, int) else 7 for size in call.operands[0].shape]
    operands = [torch.empty(shape, dtype=spec.dtype, device="meta") for spec in call.operands]
    try:
        passes = _passes_rows(*bodies, operands) if bodies else _is_pointwise(call.target, operands)
    except (NotImplementedError, RuntimeError):
        return None  # it does what the meta device does not
    dims = plain(call.operands[0].shape)
    whole = frozenset(factor for dim in mapped or () for factor in factors_of(dims[dim]))
    made = [dims] * len(call.results)
    return fit(call, [dims] * len(operands), made, need_replication=whole) if passes else None


def _mapped(part: fx.GraphModule) -> set[int] | None:
    """The dimensions that a part which is one `vmap` maps over, of operands and results; None for any other."""
    steps = [node for node in part.graph.nodes if node.op == "call_function"]
    if not steps or steps[0].target is not predispatch._vmap_increment_nesting:
        return None
    nested = sum(node.target is predispatch._vmap_increment_nesting for node in steps) > 1
    if nested or any(isinstance(node.target, HigherOrderOperator) for node in steps):
        return None  # whose gradient may be one of its own
    given = {node.args[1] for node in steps if node.target is predispatch._add_batch_dim}
    made = {node.args[3] for node in steps if node.target is predispatch._remove_batch_dim}
    return given | made


def _is_pointwise(part: fx.GraphModule, operands: Sequence[Tensor]) -> bool:
    with torch.no_grad(), _Pointwise(operands[0].shape) as seen:
        part(*operands)
    return bool(seen.pointwise)


def _bodies(part: fx.GraphModule) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """Forward and backward of a part that is one custom Function, of all its operands in order."""
    calls = [node for node in part.graph.nodes if node.op == "call_function" and node.target is not getitem]
    if len(calls) != 1 or calls[0].target is not autograd_function_apply:
        return None
    (call,) = calls
    forward, backward, *operands = call.args
    if operands != part.graph.find_nodes(op="placeholder") or call.kwargs.get("non_differentiable_idx"):
        return None
    return part.get_submodule(forward.target), part.get_submodule(backward.target)


def _passes_rows(forward: Callable[..., Any], backward: Callable[..., Any], operands: Sequence[Tensor]) -> bool:
    with torch.no_grad(), _Pointwise(operands[0].shape) as seen:
        results, saved = forward(*operands)
        made = pytree.tree_leaves(results)
        gradients = [torch.empty_like(result) for result in made]
        seen.zeros = list(gradients)
        wanted = [leaf for leaf in pytree.tree_leaves(backward(*gradients, *saved)) if isinstance(leaf, Tensor)]
    return seen.pointwise and all(map(seen.is_zero, wanted)) and all(x.shape == operands[0].shape for x in wanted)


class _Pointwise(TorchDispatchMode):
    """Whether all ops are pointwise, on values of one shape; and which results are 0 because `zeros` are."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.pointwise, self.zeros = shape, True, list[Tensor]()

    def is_zero(self, value: Any) -> bool:
        return any(value is each for each in self.zeros) if isinstance(value, Tensor) else value == 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, packet = func(*args, **(kwargs or {})), func.overloadpacket
        pointwise = torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags
        known = pointwise or packet in _COPIES or packet in _FILLED or packet is aten.empty_like
        shaped = isinstance(made, Tensor) and made.shape in (self.shape, ())
        self.pointwise &= known and shaped and not func._schema.is_mutable
        if self._makes_zero(packet, args):
            self.zeros.append(made)
        return made

    def _makes_zero(self, packet: Any, args: Sequence[Any]) -> bool:
        operands = args[1:] if packet is aten.where else args[:2]
        if packet in _ANY:
            return any(isinstance(x, Tensor) and self.is_zero(x) for x in operands)
        if packet in _ALL:
            return all(map(self.is_zero, operands))
        if packet is aten.masked_fill:
            return self.is_zero(args[0]) and self.is_zero(args[2])
        return packet is aten.zeros_like or (
            (packet in _FIRST or packet.__name__.endswith("_backward")) and self.is_zero(args[0])
        )
