"""`explain()`: what the backend would do to a model on P ranks, without a second rank.

    print(explain(model, ids, labels=ids, sp_size=8))

Nothing is computed and no data is held: a copy of the model is traced on fake tensors, and every graph that Dynamo
gives goes through the passes as under `torch.compile`. What moves is then counted launch by launch (`traffic`).
"""

from __future__ import annotations

import copy
import re
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
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
from torch.fx.experimental.symbolic_shapes import optimization_hint
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._dtype_abbrs import dtype_abbrs
from torch.utils.flop_counter import flop_registry

from ..capture.dropped_backward import LOST, dropped_backward
from ..config import SequenceParallelConfig
from ..errors import CaptureError, ConfigurationError, user_line
from ..ir.graph import GraphRules
from ..ir.plan import Fallback, ShardedGraph, ShardingPlan, SitePlan
from ..links import Links
from ..pipeline import PlannedGraph, plan_graph
from ..placement.placements import Replicated, Sharded
from ..planning.cost import (
    SiteSizes,
    attention_bytes,
    flops,
    is_uncounted,
    peak_activation_bytes,
    planned_flops,
    received,
)
from .report import FallbackCost, Graph, Launches, Op, Output, Report, Scale, Site, Strategy, Totals, WholeOp
from .traffic import Traffic, traffic


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
        ConfigurationError: `sp_size` below 2, an option that is wrong, a lazy module that never ran, or a value of more
            bytes than torch can count.
    """
    if not isinstance(sp_size, int) or sp_size < 2:
        raise ConfigurationError(f"sp_size is {sp_size}: a sequence is shared by 2 ranks or more")
    config = SequenceParallelConfig.from_options(options)
    found: list[_Explained] = []
    calls = Counter[int]()
    incomplete = ""
    with _group_of(sp_size) as group, _dynamo_undisturbed():

        def plan(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            number = len(found)
            found.append(_explain_graph(gm, example_inputs, config, group, sp_size, f"graph_{number}"))

            def run(*given: Any) -> Any:
                calls[number] += 1
                return gm.forward(*given)

            return run

        mode = FakeTensorMode(allow_non_fake_inputs=True)
        call, inputs, keywords = _faked(mode, _unwrapped(model), args, kwargs)
        compiled = torch._dynamo.optimize(plan, dynamic=False, isolate_recompiles=True)(call)
        try:
            with mode:
                compiled(*inputs, **keywords)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            incomplete = f"a value is read outside of graphs, and explain computes none ({_user_frame(error)})"
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            raise ConfigurationError(
                "a value has more elements or bytes than torch can count, whether here or on a device: explain shorter "
                f"inputs, or a model without that value\n{error}"
            ) from error
    name = getattr(model, "__name__", type(_unwrapped(model)).__name__)
    explained = [replace(each, graph=replace(each.graph, calls=calls[at])) for at, each in enumerate(found)]
    totals = _totals(explained, links)
    graphs = [each.graph for each in explained]
    return Report(name, sp_size, links, incomplete, graphs, totals, _scaling(explained, sp_size))


def _user_frame(error: BaseException) -> str:
    """`file.py:12 in forward: y = x.item()`: the innermost frame outside torch and this package."""
    places = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(places)]
    if not frames:
        return str(error)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name}: {frames[-1].line}"


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
        if unknown := [name for name, each in module.named_parameters() if is_lazy(each)]:
            raise ConfigurationError(f"{unknown[0]} has no shape yet: call the lazy model once, then explain it")
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
    sizes: tuple[tuple[SiteSizes, str], ...] = ()
    """Of each site, and its strategy."""
    uncounted: tuple[str, ...] = ()
    """See `Totals.flops_unknown`."""


def _explain_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: SequenceParallelConfig,
    group: str,
    parts: int,
    name: str,
) -> _Explained:
    ends, dropped = _break(gm), dropped_backward(gm, example_inputs)
    if dropped is not None:
        why = f"it runs in Python, for it calls {dropped} under torch.vmap or torch.func: {LOST}"
        return _Explained(Graph(name, why, ends, [], [], [], [], []))
    try:
        planned = plan_graph(gm, example_inputs, config, group, parts)
    except CaptureError as error:
        return _Explained(Graph(name, f"it cannot be captured: {error}", ends, [], [], [], [], []))
    nodes, plan = planned.rules.graph.nodes, planned.plan
    counted, alone = planned_flops(planned.rules, plan), peak_activation_bytes(planned.rules.graph)
    work = (counted.sharded, counted.whole)
    fallbacks = [_fallback(each, plan) for each in plan.fallbacks]
    if planned.sharded is None:
        counted_at = _counted_at(planned.rules, {node: node for node in nodes})
        ops = [_op(node, node, None, plan, counted_at.get(node, 0)) for node in nodes]
        graph = Graph(name, "nothing to shard", ends, ops, [], [], fallbacks, [])
        return _Explained(graph, work, (alone, alone), uncounted=_uncounted(nodes))
    rewritten = planned.sharded.graph_module.graph
    moved = traffic(planned.sharded.graph_module, planned.captured.inputs, parts)
    captured = {node.name: node for node in nodes}
    origins = {name: captured.get(origin) for name, origin in planned.sharded.origins.items()}
    counted_at = _counted_at(planned.rules, {node: origins.get(node.name) for node in rewritten.nodes})
    ops = [
        _op(node, origins.get(node.name), moved.get(node.name), plan, counted_at.get(node, 0))
        for node in rewritten.nodes
    ]
    launches = [_launches(node, moved[node.name]) for node in rewritten.nodes if node.name in moved]
    sites = _sites(planned, launches, parts)
    graph = Graph(
        name,
        "",
        ends,
        ops,
        [each.site for each in sites],
        launches,
        fallbacks,
        _outputs(planned.sharded, launches, _UNBREAK if ends else _KEEP),
    )
    bounds = _lower_bounds(planned.rules, sites, launches, origins, parts)
    sizes = tuple((each.sizes, each.site.strategy) for each in sites)
    return _Explained(graph, work, (peak_activation_bytes(rewritten), alone), bounds, sizes, _uncounted(nodes))


def _break(gm: fx.GraphModule) -> str:
    """Why and where Dynamo ended a graph before the model did; empty if it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    why: str = reason.reason.partition("\n\n")[0].strip()  # without what it tells its own developers
    if not reason.user_stack:
        return why
    frame = reason.user_stack[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}: {frame.line}\n  {why}"


def _counted_at(rules: GraphRules, origins: Mapping[fx.Node, fx.Node | None]) -> dict[fx.Node, int]:
    """The FLOPs of `planned_flops`, each at one node as a rank runs it: the op of that name, or the last it became."""
    at: dict[fx.Node, fx.Node] = {}
    for node, captured in origins.items():
        if captured is None or node.op == "placeholder" or getattr(node.target, "namespace", "") == "sp":
            continue
        if captured not in at or at[captured].name != captured.name:
            at[captured] = node
    return {
        node: flops(captured)
        for captured, node in at.items()
        if rules.is_activation(captured) and rules.varies(captured)
    }


def _op(node: fx.Node, captured: fx.Node | None, moved: Traffic | None, plan: ShardingPlan, work: int) -> Op:
    """`captured` is the node that this one stands for, or was made for."""
    value, whole = node.meta.get("val"), captured.meta.get("val") if captured is not None else None
    if moved is not None and isinstance(value, tuple):
        value = value[0]  # of several that are sent together; they go from one dimension to one
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
        flops=work,
        operands=[each.name for each in node.all_input_nodes],
    )


def _shape(value: Any) -> list[int]:
    return [_hint(size) for size in value.shape] if isinstance(value, Tensor) else []


def _hint(size: Any) -> int:
    return optimization_hint(size) if isinstance(size, torch.SymInt) else int(size)


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
    path = re.sub(r"^[LG]\['(?:args'\]\[0|\w+')\]", "", path)  # the root; `args[0]` is the self of a wrapped forward
    return re.sub(r"(?:\._modules)?\[['\"]?(\w+)['\"]?\]", r".\1", path).removeprefix(".")


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
        query, key, value = (
            rules.operands(end.node)[end.index] for end in (each.site.query, each.site.key, each.site.value)
        )
        made = output if isinstance(output.meta["val"], Tensor) else next(iter(output.users))
        unrepeated = [_before_repetition(planned, end) for end in (key, value)]
        repeated = rules.bytes(key) // max(1, unrepeated[0])
        heads, key_heads = _heads(planned, each)
        kv_heads = key_heads // repeated
        sizes = SiteSizes(
            query=rules.bytes(query),
            key=unrepeated[0],
            value=unrepeated[1],
            output=rules.bytes(made),
            heads=heads,
            kv_heads=kv_heads,
            repeated=repeated,
        )
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


_EXCHANGES = ("sp.all_to_all", "sp.all_to_all_kv", "sp.all_to_all_packed", "sp.all_gather", "sp.all_gather_replicate")


def _heads(planned: PlannedGraph, site: SitePlan) -> tuple[int, int]:
    """The heads of the query and of the key as the site takes it: those shared out, or that could be; 0 for none."""
    rules, first, end, key = planned.rules, site.site.nodes[0], site.site.query, site.site.key
    rule, ends = rules.rule(first), (end, key)
    shapes = [[rules.hint(size) for size in rules.shape(rules.operands(each.node)[each.index])] for each in ends]
    cuts = [planned.plan.nodes[each.node].operand(each.index) for each in ends]
    if site.strategy == "ulysses" and not any(isinstance(cut, Replicated) for cut in cuts):
        query_heads, key_heads = (
            shape[cut.dim] // (rules.hint(cut.layout.outer) if isinstance(cut, Sharded) else 1)
            for shape, cut in zip(shapes, cuts, strict=True)
            if not isinstance(cut, Replicated)
        )
        return query_heads, key_heads
    sequences = {each.dim % len(shape) for each, shape in zip(ends, shapes, strict=True)}
    passing = [pair for each in ends if rule is not None and each.node is first for pair in rule.borrowable(each.index)]
    dims = [dim for _, dim in passing if dim not in sequences and all(dim < len(shape) for shape in shapes)]
    dims = [dim for dim in dims if shapes[0][dim] != 1]
    return (shapes[0][dims[-1]], shapes[1][dims[-1]]) if dims else (0, 0)


def _before_repetition(planned: PlannedGraph, value: fx.Node) -> int:
    """The bytes of K or V before views and repetitions for every query head, where that is less."""
    rules = planned.rules
    least, at = rules.bytes(value), value
    while (rule := rules.rule(at)) is not None and rule.movement and len(rule.operands) == 1:
        (at,) = rules.operands(at)
        least = min(least, rules.bytes(at))
    return least


def _lower_bounds(
    rules: GraphRules,
    sites: Sequence[_Site],
    launches: Sequence[Launches],
    origins: Mapping[str, fx.Node | None],
    parts: int,
) -> tuple[int, int]:
    """See `Totals`."""
    least = []
    for each in sites:
        possible = attention_bytes(replace(each.sizes, repeated=1), parts)
        least.append(min(each.site.bytes, possible["ulysses"], possible["all_gather_kv"]))
    forward = sum(least) + sum(each.bytes_forward for each in launches if each.op == "sp.all_reduce")
    backward = sum(size for size, each in zip(least, sites, strict=True) if each.trained)
    for launched in launches:
        source = origins.get(launched.name)
        if launched.op == "sp.replicate" and source is not None and rules.is_weight(source):
            backward += received(source.meta["val"], True, parts)
    return forward, backward


def _outputs(sharded: ShardedGraph, launches: Sequence[Launches], remedy: str) -> list[Output]:
    gathered = {each.name: each.bytes_forward for each in launches if each.op == "sp.all_gather"}
    moved = sum(each.bytes_forward for each in launches)
    (returned,) = sharded.graph_module.graph.output_node().args
    assert isinstance(returned, tuple)
    found = []
    for output, leaves in zip(returned, sharded.outputs, strict=False):
        if isinstance(output, fx.Node) and isinstance(output.meta.get("val"), Tensor):
            source = output
            while source.name not in gathered and getattr(source.target, "namespace", "") == "aten":
                if len(source.all_input_nodes) != 1:
                    break
                (source,) = source.all_input_nodes  # a view of what was gathered
            size = gathered.get(source.name, 0)
            expensive = size > moved / 4 or bool(leaves.gathered)
            told = leaves.gathered or (remedy if expensive else "")
            found.append(Output(output.name, _shape(output.meta["val"]), size, expensive, told))
    return found


_KEEP = (
    "return less, the loss alone say, or compile with options={'outputs': 'shard'}, so that each rank keeps its rows"
)
_UNBREAK = "remove the graph break that ends this graph: what goes on to the next graph is made whole in between"


def _fallback(fallback: Fallback, plan: ShardingPlan) -> WholeOp:
    node = fallback.node
    own = plan.nodes.get(node)
    whole = own is None or own.sharding is None
    if node.op == "call_module":
        remedy = "move it out of the compiled model, or say that it is meant to run whole: replicated_region()"
    elif fallback.takes_a_rule:
        remedy = f"give it a rule, register_sharding_rule({node.target}, ...), or opt it out with replicated_region()"
    else:
        remedy = "apply it along another dimension than the sequence, or opt it out with replicated_region()"
    cost = FallbackCost(fallback.bytes, flops(node) if whole else 0)
    return WholeOp(_op_name(node), user_line(node), fallback.reason, cost, remedy)


def _uncounted(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """The opaque parts and foreign ops among some nodes of whose FLOPs nothing is known."""
    found = dict[str, None]()
    for node in nodes:
        target = node.target
        foreign = isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "sp", "prims")
        known = isinstance(target, torch._ops.OpOverload) and target.overloadpacket in flop_registry
        if (node.op == "call_module" and not flops(node)) or (foreign and not known) or is_uncounted(node):
            found[_op_name(node)] = None
    return tuple(found)


# The whole model


def _totals(explained: Sequence[_Explained], links: Links | None) -> Totals:
    launches = [(one.graph.calls, each) for one in explained for each in one.graph.collectives]
    forward = (
        sum(calls * each.bytes_forward for calls, each in launches),
        sum(calls * each.launches_forward for calls, each in launches),
    )
    backward = (
        sum(calls * each.bytes_backward for calls, each in launches),
        sum(calls * each.launches_backward for calls, each in launches),
    )
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
        lower_bound_forward=sum(each.graph.calls * each.bounds[0] for each in explained),
        lower_bound_backward=sum(each.graph.calls * each.bounds[1] for each in explained),
        flops_sharded=sum(each.graph.calls * each.flops[0] for each in explained),
        flops_replicated=sum(each.graph.calls * each.flops[1] for each in explained),
        flops_unknown=list(dict.fromkeys(name for each in explained for name in each.uncounted)),
        activation_bytes=max((each.peaks[0] for each in explained), default=0),
        activation_bytes_one_device=max((each.peaks[1] for each in explained), default=0),
        seconds=seconds,
    )


def _scaling(explained: Sequence[_Explained], sp_size: int) -> list[Scale]:
    sizes = [each for one in explained for each in one.sizes]
    if not sizes:
        return []
    largest, strategy = max(sizes, key=lambda each: each[0].query + each[0].key)
    local = {"local": 0} if strategy == "local" else {}
    counts = {1 << power for power in range(1, max(64, sp_size).bit_length())} | {sp_size}
    return [Scale(parts, {**attention_bytes(largest, parts), **local}) for parts in sorted(counts)]
