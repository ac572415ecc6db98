"""`explain()`: what the backend would do to a model on P ranks, without a second rank.

    print(explain(model, ids, labels=ids, sp_size=8))

Nothing is computed and no data is held: a copy of the model is traced on fake tensors, and every graph that Dynamo
gives goes through the passes as under `torch.compile`. What moves is then counted launch by launch (`traffic`).
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group
from torch._dynamo import pgo
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.distributed.distributed_c10d import GroupName
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils._dtype_abbrs import dtype_abbrs

from .backend import PlannedGraph, plan_graph
from .config import SequenceParallelConfig
from .cost import SiteSizes, attention_bytes, flops, peak_activation_bytes, planned_flops, received
from .errors import CaptureError, ConfigurationError, user_line
from .links import Links
from .plan import Fallback, ShardingPlan, SitePlan
from .sharding import Sharded
from .traffic import Traffic, traffic

__all__ = ["Report", "explain"]


@dataclass(frozen=True)
class Op:
    """One node of a graph as a rank runs it."""

    name: str
    op: str
    module: str
    """The path of the module that it is in: `model.layers.0.mlp`."""
    line: str
    placement: str
    """`sharded`, `replicated`, `collective`, `input` or `output`."""
    layout: str
    """`S(1: 32)`, or nothing."""
    shape: list[int]
    local_shape: list[int]
    dtype: str
    flops: int
    """Of the whole value, forward."""
    operands: list[str]


@dataclass(frozen=True)
class Strategy:
    """A way to make a site whole, and what each rank receives for it in one forward."""

    strategy: str
    bytes: int


@dataclass(frozen=True)
class Site:
    """One attention site."""

    module: str
    line: str
    heads: int
    kv_heads: int
    length: int
    """Of the keys."""
    strategy: str
    bytes: int
    """What each rank receives for it, forward."""
    reason: str
    others: list[Strategy]
    """The strategies not taken."""


@dataclass(frozen=True)
class Launches:
    """One node that launches collectives. Bytes are received per rank, own block and padding excluded."""

    name: str
    op: str
    role: str
    """The name without its number: `gather_seq_scatter_heads_q`."""
    module: str
    line: str
    bytes_forward: int
    bytes_backward: int
    launches_forward: int
    launches_backward: int
    padded_forward: int
    """The bytes with padding: what the transport counts."""
    padded_backward: int


@dataclass(frozen=True)
class FallbackCost:
    """What a fallback costs each rank, forward."""

    bytes: int
    """Received to gather its operands."""
    flops: int
    """Computed whole on every rank."""


@dataclass(frozen=True)
class WholeOp:
    """A fallback: an op that runs on gathered values."""

    op: str
    line: str
    why: str
    cost: FallbackCost
    remedy: str


@dataclass(frozen=True)
class Output:
    """One tensor that a graph returns, and what each rank receives for it to be whole."""

    name: str
    shape: list[int]
    bytes: int
    expensive: bool
    remedy: str


@dataclass(frozen=True)
class Graph:
    """One graph of the model."""

    name: str
    unsharded: str
    """Why nothing of it is sharded; empty if something is."""
    ends: str
    """Why Dynamo ended it before the model did: the reason of a graph break."""
    ops: list[Op]
    sites: list[Site]
    collectives: list[Launches]
    fallbacks: list[WholeOp]
    outputs: list[Output]


@dataclass(frozen=True)
class Totals:
    """A step of the model, per rank. Bytes and launches as in `Launches`; FLOPs are those of one forward."""

    bytes_forward: int
    bytes_backward: int
    launches_forward: int
    launches_backward: int
    lower_bound_forward: int
    """The cheapest strategy of every site, and the sums over ranks of reductions such as the loss."""
    lower_bound_backward: int
    """The sites again if they take gradients, and one all-reduce of each trained parameter's, in its own dtype."""
    flops_sharded: int
    flops_replicated: int
    activation_bytes: int
    """The most that values made in a forward take at once on a rank, each freed after its last use."""
    activation_bytes_one_device: int
    seconds: dict[str, float] | None
    """Communication alone, forward and backward, by the links; nothing overlapped."""


@dataclass(frozen=True)
class Scale:
    """What each strategy receives per rank, forward, for the largest site, on so many ranks."""

    sp_size: int
    strategies: dict[str, int]


@dataclass(frozen=True)
class Report:
    """What `explain` found. `str` gives tables; `to_dict` plain data for JSON; `to_html` a page."""

    model: str
    sp_size: int
    links: Links | None
    incomplete: str
    """Why the tracing stopped before the end of the model; empty if it did not."""
    graphs: list[Graph]
    totals: Totals
    scaling: list[Scale]

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers."""
        return asdict(self)


def explain(
    model: Callable[..., Any],
    *args: Any,
    sp_size: int = 8,
    options: Mapping[str, object] | None = None,
    links: Links | None = None,
    **kwargs: Any,
) -> Report:
    """What `torch.compile(model, backend=sp_backend)` would do on `sp_size` ranks, in one forward and backward.

    Needs no process group and one process, and computes nothing: a model and inputs on the meta device do. The model,
    its gradients and buffers, random numbers and what Dynamo has compiled stay as they are.

    Args:
        model: a module, or a function.
        args: what it is called with; shapes are static.
        sp_size: P, in ranks; any number above 1.
        options: as of `torch.compile(..., options=options)`.
        links: for an estimate of the time; see `measure_links`.
        kwargs: what it is called with by name.

    Raises:
        ConfigurationError: `sp_size` below 2, or an option that is wrong.
    """
    if sp_size < 2:
        raise ConfigurationError(f"sp_size is {sp_size}: a sequence is shared by 2 ranks or more")
    config = SequenceParallelConfig.from_options(options)
    explained: list[_Explained] = []
    incomplete = ""
    with _group_of(sp_size) as group, _dynamo_undisturbed():

        def plan(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            explained.append(_explain_graph(gm, example_inputs, config, group, sp_size, f"graph_{len(explained)}"))
            return gm.forward

        mode = FakeTensorMode(allow_non_fake_inputs=True)
        call, inputs, keywords = _faked(mode, _unwrapped(model), args, kwargs)
        compiled = torch._dynamo.optimize(plan, dynamic=False, isolate_recompiles=True)(call)
        try:
            with mode:
                compiled(*inputs, **keywords)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            incomplete = f"the model reads a value outside of its graphs ({error}), which explain does not compute"
    name = getattr(model, "__name__", type(_unwrapped(model)).__name__)
    totals = _totals(explained, links)
    graphs = [each.graph for each in explained]
    return Report(name, sp_size, links, incomplete, graphs, totals, _scaling(explained, sp_size))


# Tracing without a trace


def _unwrapped(model: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(model, (DistributedDataParallel, torch._dynamo.OptimizedModule)):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    return model


def _faked(
    mode: FakeTensorMode, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Copies of a call's parts whose tensors have no data. What lies on the meta device is said to be on the CPU."""
    known: dict[int, Any] = {}
    kept: list[Tensor] = []  # an address is used again

    def fake(x: Tensor) -> Tensor:
        if id(x) not in known:
            kept.append(x)
            known[id(x)] = _fake(mode, x)
        result: Tensor = known[id(x)]
        return result

    module = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    if isinstance(module, nn.Module):
        for part in module.modules():
            pytree.tree_map_only(Tensor, fake, [vars(part), part._parameters, part._buffers])
        model = copy.deepcopy(model, known)
    return (model, *pytree.tree_map_only(Tensor, fake, (args, kwargs)))


def _fake(mode: FakeTensorMode, x: Tensor) -> Tensor:
    with mode, torch.no_grad():
        device = torch.device("cpu") if x.is_meta else x.device
        empty = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)
        if isinstance(x, nn.Parameter):
            return nn.Parameter(empty, x.requires_grad)
        return empty.requires_grad_(x.requires_grad)


@contextmanager
def _group_of(parts: int) -> Iterator[GroupName]:
    """The name of a group that can be asked for its size, and for nothing else."""
    name = GroupName(f"sp_compile.explain on {parts} ranks")
    group = dist.ProcessGroup(0, parts)  # type: ignore[call-arg]  # the registry alone would not keep it
    _register_process_group(name, group)
    try:
        yield name
    finally:
        _unregister_process_group(name)


@contextmanager
def _dynamo_undisturbed() -> Iterator[None]:
    """The lengths seen here are not remembered: another one would be compiled with a symbol in its place."""
    with patch.object(pgo, "_CODE_STATE", defaultdict(pgo.CodeState)), patch.object(pgo, "_INIT_CODE_STATE", None):
        yield


# One graph


@dataclass(frozen=True)
class _Explained:
    """A graph, and what only the totals need of it."""

    graph: Graph
    flops: tuple[int, int] = (0, 0)
    """Sharded and whole."""
    peaks: tuple[int, int] = (0, 0)
    """Of a rank and of one device."""
    bounds: tuple[int, int] = (0, 0)
    """Forward and backward."""
    sizes: tuple[SiteSizes, ...] = ()
    """Of each site."""


def _explain_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: SequenceParallelConfig,
    group: str,
    parts: int,
    name: str,
) -> _Explained:
    reason = getattr(gm, "compile_subgraph_reason", None)
    ends = reason.reason if reason is not None and reason.graph_break else ""
    try:
        planned = plan_graph(gm, example_inputs, config, group, parts)
    except CaptureError as error:
        return _Explained(Graph(name, f"it cannot be captured: {error}", ends, [], [], [], [], []))
    nodes, plan = planned.rules.graph.nodes, planned.plan
    counted, alone = planned_flops(planned.rules, plan), peak_activation_bytes(planned.rules.graph)
    work = (counted.sharded, counted.whole)
    fallbacks = [_fallback(each, plan) for each in plan.fallbacks]
    if planned.sharded is None:
        ops = [_op(node, node, None, plan) for node in nodes]
        return _Explained(Graph(name, "nothing to shard", ends, ops, [], [], fallbacks, []), work, (alone, alone))
    rewritten = planned.sharded.graph_module.graph
    moved = traffic(planned.sharded.graph_module, planned.captured.inputs, parts)
    captured = {node.name: node for node in nodes}
    origins = {name: captured.get(origin) for name, origin in planned.sharded.origins.items()}
    ops = [_op(node, origins.get(node.name), moved.get(node.name), plan) for node in rewritten.nodes]
    launches = [_launches(node, moved[node.name]) for node in rewritten.nodes if node.name in moved]
    sites = _sites(planned, launches, parts)
    graph = Graph(
        name, "", ends, ops, [each.site for each in sites], launches, fallbacks, _outputs(rewritten, launches)
    )
    bounds = _lower_bounds(sites, launches, origins, parts)
    sizes = tuple(each.sizes for each in sites)
    return _Explained(graph, work, (peak_activation_bytes(rewritten), alone), bounds, sizes)


def _op(node: fx.Node, captured: fx.Node | None, moved: Traffic | None, plan: ShardingPlan) -> Op:
    """`captured` is the node that this one stands for, or was made for."""
    value, whole = node.meta.get("val"), captured.meta.get("val") if captured is not None else None
    local, own = _shape(value), plan.nodes.get(captured) if captured is not None else None
    cut = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "sp"
    if node.op in ("placeholder", "output"):
        placement = "input" if node.op == "placeholder" else "output"
    elif moved is not None:
        placement = "collective"
    else:
        placement = "sharded" if cut or (own is not None and own.sharding is not None) else "replicated"
    same = isinstance(value, Tensor) and isinstance(whole, Tensor) and value.dim() == whole.dim()
    made = next(iter(own.results()), None) if own is not None and local != _shape(whole) else None
    stands_for = captured is not None and captured.name == node.name
    return Op(
        name=node.name,
        op=_op_name(node),
        module=module_path(node),
        line=user_line(node) if node.meta.get("stack_trace") else "",
        placement=placement,
        layout=str(made) if isinstance(made, Sharded) and same else "",
        shape=_shape(whole) if same else local,
        local_shape=local,
        dtype=dtype_abbrs[value.dtype] if isinstance(value, Tensor) else "",
        flops=flops(captured) if captured is not None and stands_for else 0,
        operands=[each.name for each in node.all_input_nodes],
    )


def _shape(value: Any) -> list[int]:
    return [_hint(size) for size in value.shape] if isinstance(value, Tensor) else []


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _op_name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}.{node.target._opname}"
    return getattr(node.target, "__name__", str(node.target)) if node.op.startswith("call") else node.op


def module_path(node: fx.Node) -> str:
    """`model.layers.0.self_attn`: the innermost module that a node is in, from the root; empty if it is unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack or node.op in ("placeholder", "output"):
        return ""
    path, _ = list(stack.values())[-1]
    path = re.sub(r"(?:\._modules)?\[['\"]?(\w+)['\"]?\]", r".\1", path)  # L['self']._modules['model'] -> L.self.model
    return ".".join(path.split(".")[2:])


def _launches(node: fx.Node, moved: Traffic) -> Launches:
    stem, _, number = node.name.rpartition("_")
    return Launches(
        name=node.name,
        op=f"sp.{moved.op}",
        role=stem if number.isdigit() and not node.name.startswith("gather_output_") else node.name,
        module=module_path(node),
        line=user_line(node),
        bytes_forward=moved.bytes[False],
        bytes_backward=moved.bytes[True],
        launches_forward=moved.launches[False],
        launches_backward=moved.launches[True],
        padded_forward=moved.padded[False],
        padded_backward=moved.padded[True],
    )


@dataclass(frozen=True)
class _Site:
    site: Site
    sizes: SiteSizes
    trained: bool
    """Whether gradients go through it."""


def _sites(planned: PlannedGraph, launches: Sequence[Launches], parts: int) -> list[_Site]:
    assert planned.sharded is not None
    rules, origins = planned.rules, planned.sharded.origins
    left = {each.name: each for each in launches if not each.name.startswith("gather_output_")}
    found = []
    for each in planned.plan.sites:
        output = each.site.output
        at_site = {value.name for value in (*each.moved, output, *output.users)}
        own = [left.pop(name) for name in list(left) if origins.get(name) in at_site and left[name].op in _EXCHANGES]
        heads, kv_heads = _heads(planned, each, [one.name for one in own])
        query, key = (rules.operands(end.node)[end.index] for end in (each.site.query, each.site.key))
        made = output if isinstance(output.meta["val"], Tensor) else next(iter(output.users))
        moved_key, moved_value = map(rules.bytes, each.moved[1:])
        sizes = SiteSizes(rules.bytes(query), moved_key, moved_value, rules.bytes(made), heads, kv_heads)
        others = attention_bytes(sizes, parts)
        site = Site(
            module=module_path(output),
            line=user_line(output),
            heads=heads,
            kv_heads=kv_heads,
            length=rules.hint(rules.shape(key)[each.site.key.dim]),
            strategy=each.strategy,
            bytes=sum(one.bytes_forward for one in own),
            reason=each.reason,
            others=[Strategy(name, size) for name, size in others.items() if name != each.strategy],
        )
        found.append(_Site(site, sizes, any(one.launches_backward for one in own)))
    return found


_EXCHANGES = ("sp.all_to_all", "sp.all_to_all_kv", "sp.all_gather")


def _heads(planned: PlannedGraph, site: SitePlan, launched: Sequence[str]) -> tuple[int, int]:
    """The heads of the query, and of key and value: those that are exchanged, or could be; 0 if there are none."""
    assert planned.sharded is not None
    found: dict[str, int] = {}
    for node in planned.sharded.graph_module.graph.nodes:
        if node.name in launched and node.name.startswith(_SCATTERS_HEADS):
            args: Any = node.args
            local = node.target is torch.ops.sp.all_to_all_kv.default
            heads = args[0].meta["val"].shape[args[6]] if local else sum(args[7]) // args[8][0]
            found[node.name.removeprefix(_SCATTERS_HEADS)[0]] = _hint(heads)
    if found:
        query = found.get("q", 0)
        return query, found.get("k", query)
    rules, first = planned.rules, site.site.nodes[0]
    rule, operands = rules.rule(first), rules.operands(first)
    for end in (site.site.query, site.site.key):
        passing = rule.borrowable(end.index) if rule is not None and end.node is first else ()
        shapes = [rules.shape(operands[each.index]) for each in (site.site.query, site.site.key) if each.node is first]
        dims = [dim for _, dim in passing if dim != end.dim % len(shapes[0]) and rules.hint(shapes[0][dim]) != 1]
        if dims:
            query, *key = [rules.hint(shape[dims[-1]]) for shape in shapes]
            return query, (key or [query])[0]
    return 0, 0


_SCATTERS_HEADS = "gather_seq_scatter_heads_"


def _lower_bounds(
    sites: Sequence[_Site], launches: Sequence[Launches], origins: Mapping[str, fx.Node | None], parts: int
) -> tuple[int, int]:
    """See `Totals`."""
    least = [min(each.site.bytes, *(x.bytes for x in each.site.others if x.strategy != "replicate")) for each in sites]
    forward = sum(least) + sum(each.bytes_forward for each in launches if each.op == "sp.all_reduce")
    backward = sum(size for size, each in zip(least, sites, strict=True) if each.trained)
    for each in launches:
        source = origins.get(each.name)
        if each.op == "sp.replicate" and source is not None and source.op == "placeholder":
            backward += received(source.meta["val"], True, parts)
    return forward, backward


def _outputs(graph: fx.Graph, launches: Sequence[Launches]) -> list[Output]:
    gathered = {each.name: each.bytes_forward for each in launches if each.op == "sp.all_gather"}
    moved = sum(each.bytes_forward for each in launches)
    (returned,) = graph.output_node().args
    found = []
    for output in returned if isinstance(returned, (tuple, list)) else ():
        if isinstance(output, fx.Node) and isinstance(output.meta.get("val"), Tensor):
            source = output
            while source.name not in gathered and getattr(source.target, "namespace", "") == "aten":
                if len(source.all_input_nodes) != 1:
                    break
                (source,) = source.all_input_nodes  # a view of what was gathered
            size = gathered.get(source.name, 0)
            expensive = size > moved / 4
            found.append(Output(output.name, _shape(output.meta["val"]), size, expensive, _KEEP if expensive else ""))
    return found


_KEEP = (
    "return less, the loss alone say, or compile with options={'outputs': 'shard'}, so that each rank keeps its rows"
)


def _fallback(fallback: Fallback, plan: ShardingPlan) -> WholeOp:
    node = fallback.node
    own = plan.nodes.get(node)
    whole = own is None or own.sharding is None
    if node.op == "call_module":
        remedy = "move it out of the compiled model, or say that it is meant to run whole: replicated_region()"
    elif "no sharding rule" in fallback.reason:
        remedy = f"give it a rule, register_sharding_rule({node.target}, ...), or opt it out with replicated_region()"
    else:
        remedy = "apply it along another dimension than the sequence, or opt it out with replicated_region()"
    cost = FallbackCost(fallback.bytes, flops(node) if whole else 0)
    return WholeOp(_op_name(node), user_line(node), fallback.reason, cost, remedy)


# The whole model


def _totals(explained: Sequence[_Explained], links: Links | None) -> Totals:
    launches = [each for one in explained for each in one.graph.collectives]
    forward = sum(each.bytes_forward for each in launches), sum(each.launches_forward for each in launches)
    backward = sum(each.bytes_backward for each in launches), sum(each.launches_backward for each in launches)
    seconds = None
    if links is not None:
        seconds = {
            "forward": links.seconds(forward[1], forward[0]),
            "backward": links.seconds(backward[1], backward[0]),
        }
    return Totals(
        bytes_forward=forward[0],
        bytes_backward=backward[0],
        launches_forward=forward[1],
        launches_backward=backward[1],
        lower_bound_forward=sum(each.bounds[0] for each in explained),
        lower_bound_backward=sum(each.bounds[1] for each in explained),
        flops_sharded=sum(each.flops[0] for each in explained),
        flops_replicated=sum(each.flops[1] for each in explained),
        activation_bytes=max((each.peaks[0] for each in explained), default=0),
        activation_bytes_one_device=max((each.peaks[1] for each in explained), default=0),
        seconds=seconds,
    )


def _scaling(explained: Sequence[_Explained], sp_size: int) -> list[Scale]:
    sizes = [each for one in explained for each in one.sizes]
    if not sizes:
        return []
    largest = max(sizes, key=lambda each: each.query + each.key)
    counts = {1 << power for power in range(1, max(64, sp_size).bit_length())} | {sp_size}
    return [Scale(parts, {**attention_bytes(largest, parts), "local": 0}) for parts in sorted(counts)]
