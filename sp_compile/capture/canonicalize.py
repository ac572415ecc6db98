"""A traced graph in one vocabulary: one reshape, Fourier transforms of one dimension, no asserts of what is known,
one order in memory where a kernel misreads another.

Writes to inputs are an epilogue.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import reduce
from operator import getitem
from typing import Any

import torch
import torch.nn.attention
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from sp_compile.capture.patch_embedding import linear_of_patches, patch_embeddings
from sp_compile.errors import CaptureError, user_line
from sp_compile.ir.effects import GRAD_MODE, has_effect, memory_order

aten = torch.ops.aten

_BATCH_NORMS = (
    aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_no_training.default,
)
_BY_MEMORY = (aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default)
_FOURIER = (aten._fft_c2c.default, aten._fft_r2c.default, aten._fft_c2r.default)
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default)


def canonical(
    traced: GraphModule,
    gm: GraphModule,
    inputs: Sequence[Any],
    mutated: Sequence[int],
    returned: dict[int, int],
) -> GraphModule:
    """The traced graph in one vocabulary, with its epilogue; inputs are called as the user calls them."""
    graph = Graph()
    env: dict[Node, Any] = {}
    old_placeholders = traced.graph.find_nodes(op="placeholder")
    placeholders = []
    for old, dynamo, value in zip(old_placeholders, gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node = graph.create_node("placeholder", dynamo.target, name=_short_name(dynamo.name))
        kept = {k: v for k, v in dynamo.meta.items() if k not in ("example_value", "grapharg")}
        node.meta = {**kept, **old.meta, "val": value}
        placeholders.append(node)
        env[old] = node
    for i in mutated:
        # copy_ into what autograd has saved would break the backward of the graph run eagerly.
        clone = graph.call_function(aten.clone.default, (placeholders[i],))
        clone.meta = dict(old_placeholders[i].meta)
        env[old_placeholders[i]] = clone
    grad_mode = torch.is_grad_enabled()
    switches = bool(traced.graph.find_nodes(op="call_function", target=GRAD_MODE))
    # A view in another grad mode than its convolution cuts the gradient, or does not.
    patches = {} if switches else patch_embeddings(traced.graph, _RESHAPES)
    for old in traced.graph.nodes:
        if old.target is GRAD_MODE:
            grad_mode = old.args[0]
        if old.op in ("call_function", "call_module", "get_attr") and old not in env:
            env[old] = _rewrite(graph, traced, old, env, cuts_gradient=switches and not grad_mode)
        if old in patches:
            env[patches[old]] = linear_of_patches(graph, old, patches[old], env)
    results: list[Any] = pytree.tree_map_only(
        Node,
        env.__getitem__,
        list(traced.graph.output_node().args[0]),  # type: ignore[arg-type]
    )
    updates = results[len(results) - len(mutated) :]
    for i, update in zip(mutated, updates, strict=True):
        epilogue = graph.call_function(aten.copy_.default, (placeholders[i], update))
        epilogue.meta = {**update.meta, "val": inputs[i]}
    outputs = results[: len(results) - len(mutated)]
    for position, i in returned.items():
        outputs[position] = placeholders[i]
    graph.output(tuple(outputs)).meta = dict(gm.graph.output_node().meta)
    graph.eliminate_dead_code(has_effect)
    graph.lint()
    return GraphModule(traced, graph)


def _short_name(name: str) -> str:
    """`l_self_modules_layers_modules_0_parameters_weight_` is `layers_0_weight`; `args[0]` a wrapped forward's self."""
    name = name.removeprefix("l_").removeprefix("args_0_modules_").removeprefix("self_")
    words = [word for word in name.split("_") if word]
    kept = [word for word in words if word not in ("modules", "parameters", "buffers", "fn")]
    return "_".join(kept or words)


def _rewrite(graph: Graph, traced: GraphModule, old: Node, env: dict[Node, Any], cuts_gradient: bool) -> Any:
    target = old.target
    if target is aten._assert_tensor_metadata.default:
        return None
    operand: Any = old.args[0] if old.args else None
    if target is aten.alias.default or (target in (*_RESHAPES, aten.expand.default) and _same_shape(old, operand)):
        # A view that changes nothing still cuts the gradient where there is none.
        return _alias(graph, old, env[operand]) if cuts_gradient else env[operand]
    new = graph.node_copy(old, lambda n: env[n])
    if target in _RESHAPES:
        new.target, new.args, new.kwargs = aten.reshape.default, new.args[:2], {}
    elif target is aten.lift_fresh_copy.default:
        constant = getattr(traced, operand.target)
        if constant.numel() == 1:
            value = old.meta["val"]
            new.target, new.args = aten.full.default, (list(value.shape), constant.item())
            new.kwargs = {"dtype": value.dtype, "device": value.device}
        else:
            new.target = aten.clone.default
    elif target is aten.cat.default:
        _drop_empty_operands(new)
    elif target in _FOURIER:
        return _transform_in_turn(graph, new)
    elif target in _BATCH_NORMS and _may_be_misread(operand):
        with graph.inserting_before(new):
            new.args = (_emit(graph, old, aten.contiguous.default, new.args[0]), *new.args[1:])
    elif target is getitem and operand.target in _BATCH_NORMS and _may_be_misread(operand.args[0]) and old.args[1] == 0:
        return _emit(graph, old, aten.slice.Tensor, new, 0)  # whose gradient is contiguous
    elif target in _BY_MEMORY:
        new.args = (_in_memory_order(graph, new), *new.args[1:])
    elif target is aten.constant_pad_nd.default:
        pads: Any = new.args[1]
        cropped = _cropped(graph, new)
        new.args = (cropped, [0 if _cuts_off(pad) else pad for pad in pads], *new.args[2:])
    return new


def _emit(graph: Graph, like: Node, target: OpOverload, *args: Any, **kwargs: Any) -> Node:
    """An op more on the line of `like`."""
    node = graph.call_function(target, args, kwargs)
    with enable_python_dispatcher():
        made = target(*pytree.tree_map_only(Node, lambda each: each.meta["val"], args), **kwargs)
    node.meta = {**like.meta, "val": made}
    return node


def _may_be_misread(image: Any) -> bool:
    """Whether the backward of batch norm may take one order in memory for another: on the CPU (torch 2.13), of what has
    the strides of channels_last, or whose gradient has, but for a dimension of size 1, such as the batch. On ranks they
    may be so where on one device they are not."""
    value = image.meta["val"]
    sizes = (value.shape[0], *value.shape[2:])
    return value.device.type == "cpu" and value.dim() in (4, 5) and any(statically_known_true(n == 1) for n in sizes)


def _transform_in_turn(graph: Graph, whole: Node) -> Any:
    """A Fourier transform of several dimensions as one of each, so that what has to be whole for one need not be for
    the next. Its result lies in memory as that of the one call, for code that looks at it there.

    The last dimension is the one that may have a real side: the first to be transformed from it, the last one back.
    """
    operand: Any
    operand, dims, norm, kind = whole.args
    assert isinstance(whole.target, OpOverload) and isinstance(dims, (list, tuple))
    if len(dims) < 2:
        return whole
    forward = kind if whole.target is aten._fft_c2c.default else whole.target is aten._fft_r2c.default
    steps: list[tuple[OpOverload, Any, Any]] = [(aten._fft_c2c.default, [dim], forward) for dim in reversed(dims[:-1])]
    steps.insert(len(steps) if whole.target is aten._fft_c2r.default else 0, (whole.target, dims[-1:], kind))
    for target, dim, own in steps:
        operand = _emit(graph, whole, target, operand, dim, norm, own)
    order = memory_order(whole.meta["val"])
    if memory_order(operand.meta["val"]) != order:
        laid = _emit(graph, whole, aten.permute.default, operand, order)
        laid = _emit(graph, whole, aten.clone.default, laid, memory_format=torch.contiguous_format)
        operand = _emit(graph, whole, aten.permute.default, laid, [order.index(dim) for dim in range(len(order))])
    graph.erase_node(whole)
    return operand


def _cropped(graph: Graph, padded: Node) -> Any:
    """The operand of a `constant_pad_nd` without the rows that negative padding cuts off."""
    operand: Any = padded.args[0]
    pads: Any = padded.args[1]
    with graph.inserting_before(padded):
        for at, (low, high) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
            if _cuts_off(low) or _cuts_off(high):
                dim = operand.meta["val"].dim() - 1 - at
                start, end = -low if _cuts_off(low) else 0, high if _cuts_off(high) else sys.maxsize
                operand = _emit(graph, padded, aten.slice.Tensor, operand, dim, start, end)
    return operand


def _cuts_off(pad: Any) -> bool:
    """Whether a pad is known to be negative: one that depends on a length stays as it is."""
    return isinstance(pad, int) and pad < 0


def _in_memory_order(graph: Graph, strided: Node) -> Node:
    """The operand of an `as_strided`, as a vector in the order that it has in memory on one device: on a rank, and in
    what is gathered, it may lie otherwise."""
    operand: Any = strided.args[0]
    value = operand.meta["val"]
    offset = strided.args[3] if len(strided.args) > 3 else None
    sizes = (*value.shape, *value.stride(), value.storage_offset())
    known = strided.target is aten.as_strided.default and all(isinstance(size, int) for size in sizes)
    if not known or not is_non_overlapping_and_dense_or_false(value) or (offset is not None and value.storage_offset()):
        raise CaptureError(f"{strided.target} reads memory that its operand does not show ({user_line(strided)})")
    with graph.inserting_before(strided):
        flat = _emit(graph, strided, aten.permute.default, operand, memory_order(value))
        flat = _emit(graph, strided, aten.reshape.default, flat, [-1])
        return _emit(graph, strided, aten.clone.default, flat, memory_format=torch.contiguous_format)


def _alias(graph: Graph, old: Node, operand: Node) -> Node:
    alias = graph.call_function(aten.alias.default, (operand,))
    alias.meta = dict(old.meta)
    return alias


def _same_shape(node: Node, other: Node) -> bool:
    a, b = node.meta["val"].shape, other.meta["val"].shape
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def _drop_empty_operands(cat: Node) -> None:
    """`cat` passes over one-dimensional tensors without elements (Hugging Face's empty KV cache)."""
    operands: Any = cat.args[0]
    full = [x for x in operands if not _is_empty_vector(x.meta["val"])]
    value = cat.meta["val"]
    if len(full) == len(operands) or not full or value.dim() == 1:
        return
    if len(full) > 1 and reduce(torch.promote_types, [x.meta["val"].dtype for x in full]) == value.dtype:
        cat.args = (full, *cat.args[1:])
    elif len(full) == 1:
        cat.target, cat.args, cat.kwargs = aten.clone.default, (full[0],), {}
        if full[0].meta["val"].dtype != value.dtype:
            cat.target, cat.kwargs = aten._to_copy.default, {"dtype": value.dtype}


def _is_empty_vector(value: torch.Tensor) -> bool:
    """Whether a tensor is known to be of shape `[0]`; the length of a vector may be one that data decides."""
    return value.dim() == 1 and statically_known_true(value.shape[0] == 0)
