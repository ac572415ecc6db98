"""The value that each node of a rewritten graph has on one rank: its dtype and its local shape, as a fake tensor.

    slice_ids: i64[1, 16 of 32] = sp.shard(ids, S(1: 32))        `meta["val"]` is of shape [1, 16]

No rank is a special one: blocks are of one size, padded, so that a graph of local shapes is that of every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from sp_compile.errors import CaptureError, user_line
from sp_compile.ir.effects import STATE
from sp_compile.ir.graph import leaving_no_symbols
from sp_compile.ir.plan import ShardedGraph
from sp_compile.placement.placements import Sharded, block_rows, local_shape, size_of
from sp_compile.rules.op_call import TensorSpec


def set_local_values(
    sharded: ShardedGraph, captured: fx.Graph, inputs: Sequence[Any], cut: Mapping[fx.Node, Sharded], parts: int
) -> None:
    """Write the local value of every node to `meta["val"]`: for the pass that packs, and for whoever prints the graph.

    The layers of a model make the same calls, which are made once. What has a size, or is a number, that data tells is
    whole on every rank, and the value that was captured: of its symbols more is known than of new ones.

    Args:
        inputs: those of the captured graph, with global shapes, and `cut` where each rank holds its rows of one.

    Raises:
        CaptureError: the body of a sharding rule makes another dtype or shape than its placement says.
    """
    captured_values = {node.name: node.meta.get("val") for node in captured.nodes}
    told_by_data = {
        node: captured_values[value]
        for node, value, _ in sharded.values
        if any(map(free_unbacked_symbols, pytree.tree_leaves(captured_values[value])))
    }
    mode = next((x.fake_mode for x in inputs if hasattr(x, "fake_mode")), None) or FakeTensorMode()
    known: dict[Any, Any] = {}

    def storages(values: Sequence[Any]) -> set[int]:
        return {value.untyped_storage()._cdata for value in values if isinstance(value, Tensor)}

    class Propagate(fx.Interpreter):
        def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
            value = super().get_attr(target, args, kwargs)
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target in STATE:
                known.clear()  # what autocast changes
            if not isinstance(target, OpOverload):
                return super().call_function(target, args, kwargs)
            leaves, structure = pytree.tree_flatten((args, kwargs))
            call = target, structure, *map(_described, leaves)
            if call in known:
                return pytree.tree_map_only(Tensor, lambda x: x.new_empty_strided(x.shape, x.stride()), known[call])
            result = super().call_function(target, args, kwargs)
            made = pytree.tree_leaves(result)
            # Not so a view, of an operand or of a buffer that several share, nor what has a size, or is a number, that
            # data tells: each has its own.
            apart = len(storages(made)) == len(made) and storages(made).isdisjoint(storages(leaves))
            if apart and not any(map(free_unbacked_symbols, made)):
                known[call] = result
            return result

        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            with torch.enable_grad():  # an opaque part may take gradients inside
                result = super().call_module(target, args, kwargs)
            return pytree.tree_map_only(Tensor, lambda x: x.detach(), result)

        def run_node(self, node: fx.Node) -> Any:
            result = told_by_data[node.name] if node.name in told_by_data else super().run_node(node)
            if node.op != "output":
                node.meta["val"] = result
            return result

    grad_mode = torch.is_grad_enabled()
    with mode, leaving_no_symbols(mode), enable_python_dispatcher(), torch.no_grad():
        local = list(inputs)
        for index, node in enumerate(captured.find_nodes(op="placeholder")):
            if node in cut:
                dim, value = cut[node].dim, local[index]
                rows = block_rows(value.shape[dim], 1, parts)
                local[index] = value.new_empty([*value.shape[:dim], rows, *value.shape[dim + 1 :]])
        Propagate(sharded.graph_module).run(*local, torch.zeros(1, dtype=torch.int64))
    torch.set_grad_enabled(grad_mode)
    _check_local_values(sharded, captured_values, parts)


def _check_local_values(sharded: ShardedGraph, captured: Mapping[str, Any], parts: int) -> None:
    """Check that every node has the dtype of the captured value that it holds, and the shape of its placement.

    Raises `CaptureError` for what a rule's body makes otherwise: it would be another value than one device has.
    """
    nodes = {node.name: node for node in sharded.graph_module.graph.nodes}
    for name, value, placement in sharded.values:
        whole, local = captured[value], nodes[name].meta.get("val")
        if not isinstance(whole, Tensor) or not isinstance(local, Tensor):
            continue
        shape = local_shape(TensorSpec.of(whole).shape, placement, parts)
        sizes = zip(shape, local.shape, strict=False)
        known = [(size, own) for size, own in sizes if isinstance(size, int) and isinstance(own, int)]
        if whole.dtype != local.dtype or len(shape) != local.dim() or any(size != own for size, own in known):
            raise CaptureError(
                f"{nodes[name].target} makes {local.dtype}{list(local.shape)} of {value} on each of {parts} ranks, "
                f"where its sharding rule has to make {whole.dtype}{list(shape)}, {placement} "
                f"({user_line(nodes[name])})"
            )


def _described(value: Any) -> Any:
    """What an argument of a call is known by; a tensor by what it looks like."""
    if isinstance(value, Tensor):
        return TensorSpec.of(value), tuple(map(size_of, value.stride()))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr  # to look up a number that data will tell is an error
    return type(value), value
