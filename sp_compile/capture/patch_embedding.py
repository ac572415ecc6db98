"""A patch embedding as the product that it is (Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, eq. 1).

As a convolution its windows lie in rows and columns, and a sequence could only be cut between rows. As a linear map of
patches its tokens stand one by one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

aten = torch.ops.aten

_CONVOLUTIONS = {op for packet in (aten.conv1d, aten.conv2d, aten.conv3d) for op in (packet.default, packet.padding)}


def patch_embeddings(graph: Graph, reshapes: Collection[Any]) -> dict[Node, Node]:
    """Each convolution `[B, D, *spatial]` whose windows lie side by side, and its only use, flat: `[..., D, N]`."""
    found = {}
    for conv in graph.nodes:
        if conv.target not in _CONVOLUTIONS or conv.kwargs or not _side_by_side(conv):
            continue
        flat, last = conv, (conv.meta["val"].shape[1], math.prod(conv.meta["val"].shape[2:]))
        while len(flat.users) == 1 and (flat is conv or not _ends_in(flat, last)):
            (user,) = flat.users
            if user.target not in reshapes:
                break
            flat = user
        shape = flat.meta["val"].shape[1:]
        if flat is not conv and _ends_in(flat, last) and all(isinstance(size, int) for size in shape):
            found[conv] = flat
    return found


def _ends_in(node: Node, last: tuple[int, int]) -> bool:
    """Whether the last two dimensions of a value are known to be of these sizes."""
    shape = node.meta["val"].shape[-2:]
    return len(shape) == 2 and all(statically_known_true(size == own) for size, own in zip(shape, last, strict=True))


def _side_by_side(conv: Node) -> bool:
    """Whether the windows of one group of a convolution of static lengths cover its operand without overlap."""
    operands, given = conv.all_input_nodes, conv.args[3:]
    x, weight = operands[0].meta["val"], operands[1].meta["val"]
    defaults: tuple[Any, ...] = (1, 0, 1, 1)
    stride, padding, dilation, groups = given + defaults[len(given) :]
    kernel, rows = list(weight.shape)[2:], list(x.shape)[2:]
    each = len(kernel)
    return bool(
        x.dim() == each + 2
        and all(isinstance(size, int) for size in rows)
        and _per_dimension(stride, each) == kernel
        and (padding == "valid" or _per_dimension(padding, each) == [0] * each)
        and _per_dimension(dilation, each) == [1] * each
        and groups == 1
        and all(size % k == 0 for size, k in zip(rows, kernel, strict=True))
    )


def _per_dimension(given: Any, count: int) -> list[Any]:
    values = list(given) if isinstance(given, (list, tuple)) else [given]
    return values * count if len(values) == 1 else values


def linear_of_patches(graph: Graph, conv: Node, flat: Node, env: Mapping[Node, Node]) -> Node:
    """`flat`, written where the convolution stands: `[B, C, n k] -> [B, N, C k] -> [B, N, D] -> [..., D, N]`."""

    def emit(target: OpOverload, *args: Any) -> Node:
        node = graph.call_function(target, args)
        value = target(*pytree.tree_map_only(Node, lambda each: each.meta["val"], args))
        node.meta = {**conv.meta, "val": value}
        return node

    x, weight, bias = pytree.tree_map_only(Node, env.__getitem__, (*conv.args, None)[:3])
    channels, *kernel = weight.meta["val"].shape[1:]
    counts = conv.meta["val"].shape[2:]
    split = [size for pair in zip(counts, kernel, strict=True) for size in pair]
    rows, columns = (range(at, 2 + len(split), 2) for at in (2, 3))
    taps = channels * math.prod(kernel)
    grid = emit(aten.reshape.default, x, [-1, channels, *split])
    patches = emit(aten.permute.default, grid, [0, *rows, 1, *columns])
    patches = emit(aten.reshape.default, patches, [-1, math.prod(counts), taps])
    tokens = emit(aten.linear.default, patches, emit(aten.reshape.default, weight, [-1, taps]), bias)
    made = emit(aten.transpose.int, tokens, 1, 2)
    shape = flat.meta["val"].shape
    return made if len(shape) == 3 else emit(aten.reshape.default, made, [-1, *shape[1:]])
