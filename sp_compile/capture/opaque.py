"""What an ATen graph has no node for, kept as Dynamo wrote it: each becomes one call of a module, on whole values.

    h = …                                              h = …
    fwd, bwd = get_attr fwd_body_0, bwd_body_0         call = self.autograd_function_apply_0(h)
    apply = autograd_function_apply(fwd, bwd, h)   →   y = getitem(call, 0)
    y = getitem(apply, 0)

Such are higher-order operators (a custom `autograd.Function`, `cond`, `scan`) and what stands between the two ends of a
mode (`vmap`, `torch.func.grad`). Whoever compiles the module traces through it as through Dynamo's graph, so that its
own backward, its branches and its random draws are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch._functorch import predispatch
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import _CachingTorchDispatchMode

from sp_compile.errors import CaptureError, user_line

CONTEXT_FN = "_checkpoint_context_fn"
"""Where Dynamo leaves the contexts of a selective checkpoint, in the `meta` of its body."""

RETRACED = (tag_activation_checkpoint, invoke_subgraph)
"""Higher-order operators whose bodies, their first arguments, are traced through."""

_PURE = (
    "autograd_function_apply",
    "associative_scan",
    "cond",
    "flex_attention",
    "map_impl",
    "scan",
    "tag_activation_checkpoint",
    "while_loop",
)
"""Higher-order operators that do nothing but make values. Others do something to what they are given, as a kernel that
writes or `register_hook` does, which on gathered values would be done to copies."""

_MODES: dict[Callable[..., Any], tuple[str, Callable[..., Any]]] = {
    predispatch._vmap_increment_nesting: ("vmap", predispatch._vmap_decrement_nesting),
    predispatch._jvp_increment_nesting: ("jvp", predispatch._jvp_decrement_nesting),
    predispatch._enter_dual_level: ("jvp", predispatch._exit_dual_level),
    torch._C._functorch._grad_increment_nesting: ("grad", torch._C._functorch._grad_decrement_nesting),
    torch._C._autograd._saved_tensors_hooks_disable: ("grad", torch._C._autograd._saved_tensors_hooks_enable),
}
"""What begins a mode: its name, and what ends it."""


Known = Callable[[HigherOrderOperator], bool]


def collapse(gm: GraphModule, known: Known) -> GraphModule:
    """`gm` with each opaque part as one `call_module`, as are those of the bodies that are traced through.

    Higher-order operators that are `known` are no opaque part and stay. `gm` itself stays as it is. Raises
    `CaptureError` where a part cannot be kept so.
    """
    nodes: list[Node] = list(gm.graph.nodes)
    modules = {name: collapse(body, known) for name, body in _retraced_bodies(gm).items()}
    graph = Graph()
    env: dict[Node, Node] = {}
    outlined: set[Node] = set()
    for at, node in enumerate(nodes):
        if node in outlined:
            continue
        name, part = _opaque_part(gm, nodes, at, known)
        outlined.update(part)
        if part:
            name = f"{name}_{len(modules)}"
            modules[name] = _outline(gm, part, graph, env, name)
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
        elif node.target not in modules:
            modules[node.target] = getattr(gm, node.target)
    collapsed = GraphModule(modules, graph)
    collapsed.meta = dict(gm.meta)
    return collapsed


def _retraced_bodies(gm: GraphModule) -> dict[str, GraphModule]:
    calls = [node for target in RETRACED for node in gm.graph.find_nodes(op="call_function", target=target)]
    return {node.args[0].target: getattr(gm, node.args[0].target) for node in calls if _is_retraced(gm, node)}


def _is_retraced(gm: GraphModule, call: Node) -> bool:
    body: Any = call.args[0]
    make_contexts = getattr(gm, body.target).meta.get(CONTEXT_FN) if call.target in RETRACED else None
    # Of contexts other than those of `create_selective_checkpoint_contexts` it is not known what they do.
    known = make_contexts is None or isinstance(make_contexts()[0], _CachingTorchDispatchMode)
    return call.target in RETRACED and known


def _opaque_part(gm: GraphModule, nodes: Sequence[Node], start: int, known: Known) -> tuple[str, list[Node]]:
    """The name and the nodes of the opaque part that begins at `start`; none if none begins there."""
    first = nodes[start]
    if first.op == "call_module":
        raise CaptureError(f"the opaque module {first.target} cannot be re-traced ({user_line(first)})")
    if isinstance(first.target, HigherOrderOperator) and not known(first.target) and not _is_retraced(gm, first):
        if first.target.name() not in _PURE:
            raise CaptureError(f"the higher-order operator {first.target.name()} has effects ({user_line(first)})")
        results = [node for node in first.users if node.target is getitem and node.args[0] is first]
        return first.target.name(), [first, *results]
    if first.target not in _MODES:
        return "", []
    name, end = _MODES[first.target]
    depth = 0
    for at in range(start, len(nodes)):
        depth += (nodes[at].target is first.target) - (nodes[at].target is end)
        if depth == 0:
            return name, list(nodes[start : at + 1])
    raise CaptureError(f"{name} does not end in this graph ({user_line(first)})")


def _outline(gm: GraphModule, part: Sequence[Node], graph: Graph, env: dict[Node, Node], name: str) -> GraphModule:
    """Write the call of a part into `graph`, and its results into `env`; returns the module."""
    body = Graph()
    inner: dict[Node, Node] = {}
    modules: dict[str, Any] = {}
    arguments: list[Node] = []

    def bring_in(node: Node) -> Node:
        if node not in inner and node.op == "get_attr" and isinstance(getattr(gm, str(node.target)), GraphModule):
            modules[str(node.target)] = getattr(gm, str(node.target))
            inner[node] = body.node_copy(node)
        elif node not in inner:
            inner[node] = body.placeholder(node.name)
            arguments.append(env[node])
        return inner[node]

    for node in part:
        inner[node] = body.node_copy(node, bring_in)
    inside = set(part)
    results = [node for node in part if any(user not in inside for user in node.users)]
    body.output(tuple(inner[node] for node in results))
    call = graph.call_module(name, tuple(arguments))
    call.meta = dict(part[0].meta)
    for index, node in enumerate(results):
        env[node] = graph.call_function(getitem, (call, index))
        env[node].meta = dict(node.meta)
    outlined = GraphModule(modules, body)
    vars(outlined)["_is_impure"] = True  # it may draw numbers
    return outlined
