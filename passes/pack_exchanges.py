"""Send together what is exchanged at one place: q, k and v of a site in one launch, forward and backward.

    q_h = sp.all_to_all(q, gather S(2: 32), scatter S(1: 4))
    k_h = sp.all_to_all_kv(k, gather S(2: 32), 1, 4)            qkv = sp.all_to_all_packed([q, k, v], …)
    v_h = sp.all_to_all_kv(v, gather S(2: 32), 1, 4)       →    q_h, k_h, v_h = qkv
    out = attention(q_h, k_h, v_h)                              out = attention(q_h, k_h, v_h)

An exchange joins the one before it where its operand is there when that one starts, and no other collective, gradient
mode or autocast comes between: nothing waits longer than it did, and the order of collectives is that of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import getitem
from typing import Any

import torch
from torch import fx

from sp_compile.ops import MOVING_OPS, packed_exchange
from sp_compile.plan import ShardedGraph
from sp_compile.rule import argument_defaults

sp = torch.ops.sp
_EXCHANGES = (sp.all_to_all.default, sp.all_to_all_kv.default)


def pack_exchanges(sharded: ShardedGraph) -> ShardedGraph:
    """The graph with its exchanges packed; the given one stays as it is. Local values have to be in `meta["val"]`."""
    old = sharded.graph_module.graph
    packs = {pack[0]: pack for pack in find_packs(old)}
    if not packs:
        return sharded
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    origins = dict(sharded.origins)
    rank = old.find_nodes(op="placeholder")[-1]
    packed = {member for pack in packs.values() for member in pack}
    for node in old.nodes:
        if node in packs:
            sent = _send(graph, packs[node], copies, copies[rank])
            origins[sent.name] = origins[node.name]
        elif node not in packed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.lint()
    order = {node.name: at for at, node in enumerate(graph.nodes)}
    values = tuple(sorted(sharded.values, key=lambda held: order[held[0]]))
    module = fx.GraphModule(sharded.graph_module, graph)
    return replace(sharded, graph_module=module, origins=origins, values=values)


def find_packs(graph: fx.Graph) -> list[tuple[fx.Node, ...]]:
    """The exchanges that may be one launch, two or more each, in the order of the graph."""
    position = {node: at for at, node in enumerate(graph.nodes)}
    packs: list[list[fx.Node]] = []
    may_join = False
    for node in graph.nodes:
        if node.target in _EXCHANGES:
            if may_join and all(position[each] < position[packs[-1][0]] for each in node.all_input_nodes):
                packs[-1].append(node)
            else:
                packs.append([node])
            may_join = True
        elif node.target in MOVING_OPS or (node.op == "call_function" and node.meta.get("val") is None):
            may_join = False
    return [tuple(pack) for pack in packs if len(pack) > 1]


def _send(graph: fx.Graph, pack: Sequence[fx.Node], copies: dict[fx.Node, fx.Node], rank: fx.Node) -> fx.Node:
    """Write one launch for a pack, and a node of its old name for each of its members."""
    numbers: list[Any] = []
    for member in pack:
        assert isinstance(member.target, torch._ops.OpOverload)
        given = dict(zip(argument_defaults(member.target), member.args, strict=False)) | dict(member.kwargs)
        numbers += fx.node.map_arg(packed_exchange(member.target, given), copies.__getitem__)
    tensors = [copies[member.all_input_nodes[0]] for member in pack]
    arguments = (tensors, rank, numbers, given["group"])
    sent = graph.create_node("call_function", sp.all_to_all_packed.default, arguments, name=_name(pack))
    sent.meta = {**pack[0].meta, "val": tuple(member.meta["val"] for member in pack)}
    for at, member in enumerate(pack):
        received = graph.create_node("call_function", getitem, (sent, at), name=member.name)
        received.meta = dict(member.meta)
        copies[member] = received
    return sent


def _name(pack: Sequence[fx.Node]) -> str:
    """`gather_seq_scatter_heads_qkv` for those of q, k and v."""
    names = [member.name.rstrip("0123456789").rstrip("_").rpartition("_") for member in pack]
    stems, roles = {stem for stem, _, _ in names}, [role for _, _, role in names]
    return f"{stems.pop()}_{''.join(roles)}" if len(stems) == 1 and max(map(len, roles)) == 1 else "all_to_all_packed"
