"""What a graph moves, computes and holds: bytes received per rank, floating-point operations, peak bytes; its price.

Received, own block and padding excluded, for a value of `n` bytes in all on P ranks (see also "What a layer moves" in
docs/design.md):

    all_to_all                  n (P - 1) / P^2      from one dimension to another
    all_to_all_kv               m n / G (P - 1) / P  m of G KV heads, as many as the neediest rank reads
    all_to_all_packed           the sum of those that it packs
    all_gather                  n (P - 1) / P
    all_reduce, select_rows     2 n (P - 1) / P      the ring of Rabenseifner (2004): reduce-scatter and all-gather

Computed, in floating-point operations:

    contractions, convolutions, attention   as `torch.utils.flop_counter` counts them; masks take nothing off
    softmax, normalisation, cross-entropy   5 an element of the operand
    scans and other reductions              1 an element of the operand
    other pointwise ops                     1 an element of the result
    views, copies, casts, look-ups          0

Priced, in seconds of a step: `launches * latency + bytes / bandwidth + operations / flops` of the slowest rank.

Symbolic sizes count as they were at compile time.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import optimization_hint
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..ir.graph import GraphRules, operand_nodes
from ..ir.plan import ShardingPlan
from ..links import Links
from ..ops.exchange import AnyExchange, GatherExchange, KVExchange, read_exchange
from ..placement.placements import GroupedHeads, Placement, Replicated, Sharded, moved_rows
from ..rules.grouped import PRODUCTS
from ..rules.op_call import TensorSpec, called_module, named_arguments

log = logging.getLogger(__name__)

aten = torch.ops.aten

# The position of the first argument of the layout along which the value is whole before or after.
_SHARDED = {"all_to_all": 1, "all_to_all_kv": 2, "all_gather": 2, "all_gather_replicate": 1, "shard": 2}
_MOVING = ("all_to_all", "all_to_all_kv", "all_to_all_packed", "all_gather", "all_gather_replicate")
_SUMMED = ("all_reduce", "select_rows")


@dataclass(frozen=True)
class Collective:
    """One collective of a rewritten graph, forward."""

    name: str
    """The node, called by its role: `gather_seq_scatter_heads_q`."""
    op: str
    sources: tuple[str, ...]
    """The nodes that it moves."""
    bytes: int
    """What each rank receives, own block and padding excluded."""


def collectives(graph: fx.Graph, parts: int) -> tuple[Collective, ...]:
    """The collectives of a graph that `insert_collectives` wrote for P = `parts`, in order."""
    found = []
    for node in graph.nodes:
        op = node.target._opname if getattr(node.target, "namespace", "") == "sp" else ""
        if op in _MOVING or op in _SUMMED:
            summed = op in _SUMMED
            moved = received(_transported(node), True, parts) if summed else shared_bytes(node, parts)
            found.append(Collective(node.name, op, tuple(map(str, sent_by(node))), moved))
    return tuple(found)


def sent_by(node: fx.Node) -> Sequence[fx.Node]:
    """The values that a collective sends."""
    sent: Any = node.args[0]
    return [sent] if isinstance(sent, fx.Node) else sent


def received(result: torch.Tensor, reduced: bool, parts: int) -> int:
    """What a rank receives for a tensor that all ranks' parts make: reduced over them, or laid end to end."""
    return round((1 + reduced) * _bytes(result) * (parts - 1) / parts)


def _transported(node: fx.Node) -> torch.Tensor:
    """The value of a node as a sum of it travels: half types in float32, truth values as bytes."""
    value: torch.Tensor = node.meta["val"]
    summed = isinstance(node.target, torch._ops.OpOverload) and node.target._opname == "all_reduce"
    wide = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
    return value.to(wide.get(value.dtype, value.dtype)) if summed and node.args[1] == "sum" else value


def shared_bytes(node: fx.Node, parts: int) -> int:
    """What a rank receives when a value that is sharded is gathered or exchanged, forward or backward; no padding."""
    assert isinstance(node.target, torch._ops.OpOverload)
    op, others = node.target._opname, (parts - 1) / parts
    args: Any = node.args
    if op == "all_to_all_packed":
        return sum(packed_bytes(node, parts))
    dim, outer, sizes = args[_SHARDED[op] :][:3]
    local = args[0].meta["val"] if op != "shard" else node.meta["val"]
    whole = _bytes(local) * _int(outer) * sum(map(_int, sizes)) // max(_int(local.shape[dim]), 1)
    if op in ("all_gather", "all_gather_replicate", "shard"):
        return round(whole * others)
    if op == "all_to_all":
        return round(whole * others / parts)
    head_dim, query_heads = args[6:8]
    heads = _int(local.shape[head_dim])
    return round(whole * _heads_read(query_heads, heads, parts) / heads * others)


def packed_exchanges(node: fx.Node, parts: int) -> list[tuple[fx.Node, AnyExchange]]:
    """The values that an `all_to_all_packed` sends, and how."""
    numbers: Any = node.args[2]
    left = map(_int, numbers)
    return [(sent, read_exchange(left, sent.meta["val"], parts)) for sent in sent_by(node)]


def packed_bytes(node: fx.Node, parts: int) -> list[int]:
    """`shared_bytes` of each value that an `all_to_all_packed` sends."""
    found = []
    for sent, exchange in packed_exchanges(node, parts):
        local = sent.meta["val"]
        rows = exchange.gather.outer * exchange.gather.rows
        whole = _bytes(local) * rows // max(_int(local.shape[exchange.gather.dim]), 1)
        share = 1.0 if isinstance(exchange, GatherExchange) else 1 / parts
        if isinstance(exchange, KVExchange):
            share = exchange.heads.width / exchange.heads.kv_heads
        found.append(round(whole * share * (parts - 1) / parts))
    return found


@dataclass(frozen=True)
class SiteSizes:
    """What an attention site is made of: bytes of whole values, K and V before they are repeated, and heads."""

    query: int
    key: int
    value: int
    output: int
    heads: int
    kv_heads: int
    repeated: int = 1
    """How often K and V are repeated before the site: gathering takes them as they arrive there."""


def attention_bytes(site: SiteSizes, parts: int) -> dict[str, int]:
    """What each rank receives for a site by each strategy, forward (see the module)."""
    others = (parts - 1) / parts
    share = 1 / parts
    if site.kv_heads not in (0, site.heads) and site.kv_heads % parts:
        share = _heads_read(site.heads, site.kv_heads, parts) / site.kv_heads
    gathered = sum(round(n * site.repeated * others) for n in (site.key, site.value))
    return {
        "ulysses": sum(round(n * others / parts) for n in (site.query, site.output))
        + sum(round(n * others * share) for n in (site.key, site.value)),
        "all_gather_kv": gathered,
        "replicate": round(site.query * others) + gathered,
    }


def _heads_read(query_heads: int, kv_heads: int, parts: int) -> int:
    """The most KV heads that the query heads of one rank read."""
    block, shared = -(-query_heads // parts), query_heads // kv_heads
    read = [{min(h, query_heads - 1) // shared for h in range(r * block, (r + 1) * block)} for r in range(parts)]
    return max(map(len, read))


# What a strategy costs


@dataclass(frozen=True)
class Price:
    """What the slowest rank spends in a step: forward, and backward where gradients flow."""

    launches: int = 0
    bytes: float = 0.0
    """Received, the padding of heads included and that of rows not."""
    flops: float = 0.0

    def __add__(self, other: Price) -> Price:
        return Price(self.launches + other.launches, self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, links: Links) -> float:
        """Nothing overlapped."""
        return links.seconds(self.launches, self.bytes) + self.flops / links.flops


@dataclass(frozen=True)
class Conversion:
    """A value on its way from one placement to another."""

    value: torch.Tensor
    """The whole value, fake."""
    source: Placement
    target: Placement
    trained: bool
    """Whether its gradient comes back."""
    padding: float = 1.0
    """How many times as much an exchange moves for the heads to fall into equal blocks."""

    @property
    def exchanges(self) -> bool:
        """Whether it may go in one launch with others: an all-to-all, or a gather into sharded work."""
        source, target = self.source, self.target
        return isinstance(source, Sharded) and (isinstance(target, Replicated) or source.dim != target.dim)


def conversion_price(each: Conversion, parts: int) -> Price:
    """What a conversion moves, and its gradient on the way back, as `sp_compile.ops.sp_ops` pairs them."""
    others, whole = (parts - 1) / parts, _bytes(each.value)
    source, target = each.source, each.target
    again = int(each.trained)
    if isinstance(source, Replicated) and isinstance(target, Replicated):
        return sum_price(each.value, parts) if again else Price()
    if isinstance(source, Replicated):
        times = 1.0
        if isinstance(target, GroupedHeads):
            times = target.query_heads / _int(each.value.shape[target.dim])
        return Price(again, again * whole * times * others)
    if source == target or not whole:
        return Price()
    if isinstance(target, Replicated):
        # On the way back it is gathered again, and its gradient reduce-scattered.
        return Price(1 + 2 * again, (1 + 2 * again) * whole * others)
    if isinstance(target, GroupedHeads):
        heads = _int(each.value.shape[target.dim])
        moved = whole * _heads_read(target.query_heads, heads, parts) / heads * others
    elif isinstance(source, Sharded) and source.dim == target.dim:
        rows = moved_rows(source.layout, target.layout, parts)
        moved = whole * (others if rows is None else rows / _int(source.layout.size))
    else:
        moved = whole * others / parts * each.padding
    return Price(1 + again, (1 + again) * moved)


def sum_price(value: torch.Tensor, parts: int) -> Price:
    """What it takes to sum a value over the ranks; half types travel in float32."""
    return Price(1, 2 * _numel(value) * max(value.element_size(), 4) * (parts - 1) / parts)


def attention_price(node: fx.Node, share: float, masked: bool, trained: bool) -> Price:
    """What one op of a site computes on the slowest rank, which has `share` of it.

    A causal kernel leaves out what no query sees. `masked`: the op runs on a mask instead, which takes nothing off:
    so rows cost up to twice what heads do, whichever rows they are. Backward is 5 products of matrices, of which one
    makes the scores again, for 2 of forward (Dao 2023).
    """
    computed = contraction_flops(node) * share * (1.0 if masked else _seen(node))
    return Price(flops=computed * (1 + 2.5 * trained))


def _seen(node: fx.Node) -> float:
    """The share of pairs of a query and a key that a causal attention computes; 1 for other ops."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return 1.0
    if not named_arguments(node.target, node.args, node.kwargs)["is_causal"]:
        return 1.0
    query, key = (_int(operand.meta["val"].shape[-2]) for operand in operand_nodes(node)[:2])
    seen = min(query, key)
    return (seen * (seen + 1) / 2 + (query - seen) * key) / (query * key) if query and key else 1.0


# Floating-point operations

_NORMALISED = {
    aten.softmax,
    aten._softmax,
    aten.log_softmax,
    aten._log_softmax,
    aten.layer_norm,
    aten.native_layer_norm,
    aten.rms_norm,
    aten.group_norm,
    aten.native_group_norm,
    aten.instance_norm,
    aten.batch_norm,
    aten._native_batch_norm_legit_functional,
    aten.cross_entropy_loss,
}
_SCANS = {aten.cumsum, aten.cumprod, aten.logcumsumexp, aten.cummax, aten.cummin}
_COPIES = {aten.clone, aten.copy, aten.fill}


def _grouped_mm(left: Sequence[int], right: Sequence[int]) -> int:
    """Rows of one operand, in groups, times the matrix of each group; or groups of the contracted dimension."""
    batch = left[0] if len(left) == len(right) == 3 else 1
    return 2 * batch * left[-2] * left[-1] * right[-1]


@dataclass(frozen=True)
class PlannedFlops:
    """The floating-point operations of one forward of a captured graph, by how the plan runs them.

    Only work on activations counts: what is made of parameters alone, and integer, mask and position arithmetic, is
    the same few operations on every rank by design.
    """

    sharded: int
    """Each rank does its part."""
    whole: int
    """Every rank does all of it."""

    @property
    def coverage(self) -> float:
        """The share that is sharded; 1 where there is nothing to do."""
        return self.sharded / (self.sharded + self.whole) if self.sharded + self.whole else 1.0


def planned_flops(rules: GraphRules, plan: ShardingPlan) -> PlannedFlops:
    """The work of a captured graph, split by the plan."""
    counts = {True: 0, False: 0}
    for node in rules.graph.nodes:
        if rules.is_activation(node) and rules.varies(node):
            own = plan.nodes.get(node)
            counts[own is not None and own.sharding is not None] += flops(node)
    return PlannedFlops(sharded=counts[True], whole=counts[False])


def flops(node: fx.Node) -> int:
    """The floating-point operations of one node, on the shapes of its `meta["val"]`; of an opaque part 0."""
    target = node.target
    if node.op == "call_module":
        return sum(map(flops, called_module(node).graph.nodes))
    values = [each for each in pytree.tree_leaves(node.meta.get("val")) if isinstance(each, torch.Tensor)]
    operands = operand_nodes(node) if isinstance(target, torch._ops.OpOverload) else ()
    if not operands or not any(each.is_floating_point() for each in values):
        return 0
    assert isinstance(target, torch._ops.OpOverload)
    if target.overloadpacket in _NORMALISED:
        return 5 * _numel(operands[0].meta["val"])
    if target.overloadpacket in _SCANS or torch.Tag.reduction in target.tags:
        return _numel(operands[0].meta["val"])
    if torch.Tag.pointwise in target.tags:
        return 0 if target.overloadpacket in _COPIES else _numel(values[0])
    return contraction_flops(node)


def contraction_flops(node: fx.Node) -> int:
    """Returns what attention, a product of matrices or a convolution takes; 0 for any other node.

    Also 0 where that cannot be counted; see `is_uncounted`.
    """
    return _counted_contraction(node) or 0


def is_uncounted(node: fx.Node) -> bool:
    """Whether nothing is known of what a node computes, so that it counts as nothing."""
    return _counted_contraction(node) is None


def _counted_contraction(node: fx.Node) -> int | None:
    """Returns the count of `contraction_flops`, or None for an op that does not run on the meta device."""
    target = node.target
    if node.op == "call_module":
        counts = [_counted_contraction(each) for each in called_module(node).graph.nodes]
        return None if None in counts else sum(count or 0 for count in counts)
    if not isinstance(target, torch._ops.OpOverload) or target.namespace == "sp" or not operand_nodes(node):
        return 0
    if target.name() in PRODUCTS:
        left, right = ([_int(size) for size in operand.meta["val"].shape] for operand in operand_nodes(node)[:2])
        return _grouped_mm(left, right)
    if target is aten.scaled_dot_product_attention.default:
        return _sdpa(*([_int(size) for size in operand.meta["val"].shape] for operand in operand_nodes(node)[:3]))
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    if not composite and target.overloadpacket not in flop_registry:
        return 0
    arguments = fx.node.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    leaves, structure = pytree.tree_flatten(arguments)
    return _counted(target, structure, tuple(map(_on_meta, leaves)))


def _sdpa(query: list[int], key: list[int], value: list[int]) -> int:
    """Both products of attention, `[.., L, E] x [.., S, E] x [.., S, V]`, however long: what it decomposes to would be
    a tensor of L x S."""
    batch = math.prod(map(max, query[:-2], key[:-2], value[:-2]))  # heads of the query, which share those of the key
    return 2 * batch * query[-2] * key[-2] * (query[-1] + value[-1])


def _on_meta(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        # Of one dtype, for shapes alone count. An op may refuse what autocast alone brings to one dtype.
        dtype = torch.float32 if leaf.is_floating_point() else leaf.dtype
        return TensorSpec(tuple(map(_int, leaf.shape)), dtype, torch.device("meta"))
    if isinstance(leaf, (torch.SymFloat, torch.SymBool)):
        return 1.0 if isinstance(leaf, torch.SymFloat) else True  # it changes no count; to look it up would be a guard
    return _int(leaf) if isinstance(leaf, torch.SymInt) else leaf


@functools.lru_cache(maxsize=1024)
def _counted(target: torch._ops.OpOverload, structure: pytree.TreeSpec, leaves: tuple[Any, ...]) -> int | None:
    """Returns the operations of a call, counted on the meta device in what the op decomposes to; None if it raises.

    The layers of a model make the same calls.
    """
    made = [torch.empty(x.shape, dtype=x.dtype, device=x.device) if isinstance(x, TensorSpec) else x for x in leaves]
    args, kwargs = pytree.tree_unflatten(made, structure)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            target(*args, **{name: "meta" if name == "device" else value for name, value in kwargs.items()})
    except Exception as error:  # of any kind: the kernel may be the user's
        log.debug("%s is not counted: %s", target, error)
        return None
    return int(counter.get_total_flops())


# Memory


def peak_activation_bytes(graph: fx.Graph) -> int:
    """The most bytes that the values of a graph take at once, each freed after its last use; inputs do not count.

    Views take none: values are told apart by their storage.
    """
    sizes: dict[int, int] = {}
    last: dict[int, fx.Node] = {}
    inputs: set[int] = set()
    for node in graph.nodes:
        for each in (node, *node.all_input_nodes):
            for storage in _storages(each):
                last[storage._cdata] = node
                if each.op in ("placeholder", "get_attr"):
                    inputs.add(storage._cdata)
                sizes[storage._cdata] = _int(storage.nbytes())
    held = peak = 0
    seen = set(inputs)
    for node in graph.nodes:
        made = {storage._cdata for storage in _storages(node)} - seen
        seen |= made
        held += sum(sizes[each] for each in made)
        peak = max(peak, held)
        used = {storage._cdata for each in (node, *node.all_input_nodes) for storage in _storages(each)}
        held -= sum(sizes[each] for each in used - inputs if last[each] is node)
    return peak


def _storages(node: fx.Node) -> list[torch.UntypedStorage]:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _numel(value: torch.Tensor) -> int:
    return math.prod(map(_int, value.shape))


def _bytes(value: torch.Tensor) -> int:
    return value.element_size() * _numel(value)


def _int(size: Any) -> int:
    """A size as it was at compile time, or a guess if data tells it; a node stands for the symbol that it computes."""
    if isinstance(size, fx.Node):
        size = size.meta["val"]
    return optimization_hint(size) if isinstance(size, torch.SymInt) else int(size)
