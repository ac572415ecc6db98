"""Send together what is exchanged at one place: q, k and v of a site in one launch, forward and backward.

    q_h = sp.all_to_all(q, gather S(2: 32), scatter S(1: 4))
    k_h = sp.all_to_all_kv(k, gather S(2: 32), 1, 4)            qkv = sp.all_to_all_packed([q, k, v], …)
    v_h = sp.all_to_all_kv(v, gather S(2: 32), 1, 4)       →    q_h, k_h, v_h = qkv
    out = attention(q_h, k_h, v_h)                              out = attention(q_h, k_h, v_h)

    k_w = sp.all_gather(k, S(2: 32))                       →    k_s = sp.all_gather_replicate(k, S(2: 32))
    k_s = sp.replicate(k_w)                                     backward is one reduce-scatter, and gathers again

An exchange joins the one before it where its operand is there when that one starts, or is moved there by no more than
pointwise work and views, and no other collective, gradient mode or autocast comes between. So nothing waits for a
product of matrices that it did not wait for, and the order of collectives is that of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module

from sp_compile.ir.effects import STATE
from sp_compile.ir.plan import COMPUTED_AGAIN, ShardedGraph
from sp_compile.ops.exchange import packed_exchange
from sp_compile.ops.sp_ops import MOVING_OPS
from sp_compile.planning.cost import contraction_flops
from sp_compile.rules.op_call import argument_defaults

sp = torch.ops.sp
_EXCHANGES = (sp.all_to_all.default, sp.all_to_all_kv.default)
_GATHER, _REPLICATE = sp.all_gather.default, sp.replicate.default


def pack_exchanges(sharded: ShardedGraph) -> ShardedGraph:
    """The graph with its exchanges packed; the given one stays as it is. Local values have to be in `meta["val"]`."""
    old = sharded.graph_module.graph
    packs = {pack[0]: pack for pack in find_packs(old)}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    origins = dict(sharded.origins)
    rank = old.find_nodes(op="placeholder")[-1]
    packed = {member for pack in packs.values() for member in pack}
    for node in _early_enough(old, packs):
        if node in packs:
            sent = _send(graph, packs[node], copies, copies[rank])
            origins[sent.name] = origins[node.name]
        elif node.target is _REPLICATE and node.all_input_nodes[0] in packed:
            copies[node] = copies[node.all_input_nodes[0]]
        elif node not in packed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.lint()
    order = {node.name: at for at, node in enumerate(graph.nodes)}
    held = [each for each in sharded.values if each[0] in order]
    values = tuple(sorted(held, key=lambda each: order[each[0]]))
    module = _make_graph_module(sharded.graph_module, graph)
    return replace(sharded, graph_module=module, origins=origins, values=values)


def find_packs(graph: fx.Graph) -> list[tuple[fx.Node, ...]]:
    """The exchanges that may be one launch, and each gather into sharded work, in the order of the graph."""
    position = {node: at for at, node in enumerate(graph.nodes)}
    packs: list[list[fx.Node]] = []
    may_join = False
    for node in graph.nodes:
        if node.target in _EXCHANGES or _is_replicated(node):
            if may_join and all(map(_is_cheap, _between(packs[-1][0], node, position))):
                packs[-1].append(node)
            else:
                packs.append([node])
            may_join = True
        elif node.target in MOVING_OPS or node.target in STATE:
            may_join = False
    return [tuple(pack) for pack in packs if len(pack) > 1 or pack[0].target is _GATHER]


def _between(first: fx.Node, last: fx.Node, position: Mapping[fx.Node, int]) -> dict[fx.Node, None]:
    """What the last node is made of that is not there when the first one starts."""
    found: dict[fx.Node, None] = {}  # in an order that is the same in every run
    stack = [last]
    while stack:
        sources = stack.pop().all_input_nodes
        above = [each for each in sources if each not in found and position[each] >= position[first]]
        found |= dict.fromkeys(above)
        stack += above
    return found


def _is_cheap(node: fx.Node) -> bool:
    """Whether a node may run earlier than it did, and delay what it then runs before by little."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is getitem
    fixed = target in MOVING_OPS or target in STATE or torch.Tag.nondeterministic_seeded in target.tags
    return not fixed and not target._schema.is_mutable and contraction_flops(node) == 0


def _early_enough(graph: fx.Graph, packs: Mapping[fx.Node, Sequence[fx.Node]]) -> list[fx.Node]:
    """The nodes in an order in which all that a pack sends is there when it starts."""
    position = {node: at for at, node in enumerate(graph.nodes)}
    order: dict[fx.Node, None] = {}
    for node in graph.nodes:
        sent = set().union(*(_between(node, member, position) for member in packs.get(node, ())))
        order |= dict.fromkeys([*sorted(sent, key=position.__getitem__), node])
    return list(order)


def _is_replicated(node: fx.Node) -> bool:
    """Whether a value is gathered for sharded work alone."""
    return node.target is _GATHER and [user.target for user in node.users] == [_REPLICATE]


def _send(graph: fx.Graph, pack: Sequence[fx.Node], copies: dict[fx.Node, fx.Node], rank: fx.Node) -> fx.Node:
    """Write one launch for a pack, and a node of its old name for each of its members."""
    # What is whole on every rank is not kept for backward: its rows are, and are sent for once more.
    gathers = all(member.target is _GATHER for member in pack)
    again = COMPUTED_AGAIN if gathers else {}
    if len(pack) == 1:
        (gather,) = pack
        x, _, *layout = fx.node.map_arg(gather.args, copies.__getitem__)
        windows = fx.node.map_arg(gather.kwargs, copies.__getitem__)
        target = sp.all_gather_replicate.default
        alone = graph.create_node("call_function", target, (x, *layout), windows, name=gather.name)
        alone.meta, copies[gather] = {**gather.meta, **again}, alone
        return alone
    numbers: list[Any] = []
    for member in pack:
        assert isinstance(member.target, torch._ops.OpOverload)
        given = dict(zip(argument_defaults(member.target), member.args, strict=False)) | dict(member.kwargs)
        numbers += fx.node.map_arg(packed_exchange(member.target, given), copies.__getitem__)
    tensors = [copies[member.all_input_nodes[0]] for member in pack]
    arguments = (tensors, rank, numbers, given["group"])
    sent = graph.create_node("call_function", sp.all_to_all_packed.default, arguments, name=_name(pack))
    sent.meta = {**pack[0].meta, **again, "val": tuple(member.meta["val"] for member in pack)}
    for at, member in enumerate(pack):
        received = graph.create_node("call_function", getitem, (sent, at), name=member.name)
        received.meta = {**member.meta, **again}
        copies[member] = received
    return sent


def _name(pack: Sequence[fx.Node]) -> str:
    """`gather_seq_scatter_heads_qkv` for those of q, k and v."""
    names = [member.name.rstrip("0123456789").rstrip("_").rpartition("_") for member in pack]
    stems, roles = {stem for stem, _, _ in names}, [role for _, _, role in names]
    return f"{stems.pop()}_{''.join(roles)}" if len(stems) == 1 and max(map(len, roles)) == 1 else "all_to_all_packed"
