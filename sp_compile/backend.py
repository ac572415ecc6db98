"""`sp_backend`: the road of a graph from Dynamo to the inner backend, on one page.

    Dynamo graph -> capture -> find_attention -> propagate -> insert_collectives -> inner backend

A graph with nothing to shard, a world of one rank, and no process group at all go to the inner backend as they are.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import compiled_autograd
from torch._dynamo.exc import SkipFrame
from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing
from torch._guards import TracingContext
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from .canonicalize import STATE
from .capture import CapturedGraph, capture
from .config import SequenceParallelConfig
from .debug import RewrittenGraph, log_summary, record, record_unsharded
from .dropped_backward import LOST, dropped_backward
from .errors import CaptureError, ConfigurationError, FallbackError, user_line
from .graph import GraphRules, leaving_no_symbols
from .group import (
    cached_while_groups_last,
    current_epoch,
    cuts_graphs_for_ddp,
    mesh_of,
    rank_tensor,
    resolve_group,
)
from .guarded_graph import guard_graph, telling_of_failure
from .guards import guard_of
from .inductor import inductor_settings
from .ops import LOWERING_VERSION
from .passes.find_attention import find_attention
from .passes.find_mixers import find_mixers
from .passes.insert_collectives import insert_collectives
from .passes.outline_experts import outline_experts
from .passes.pack_exchanges import pack_exchanges
from .passes.propagate import propagate
from .plan import AttentionSite, Fallback, LeavingOutput, ShardedGraph, ShardingPlan, SiteOperand, SitePlan
from .rule import TensorSpec
from .rules import stays_whole
from .sharded_input import ShardedInput
from .sharding import Sharded, block_rows, local_shape, size_of, whole_layout
from .watch import compiling

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def sp_backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, object] | None = None
) -> Compiled:
    """Compile a Dynamo graph so that the ranks of the SP group share its sequence.

    `torch.compile(model, backend=sp_backend)`, or `backend="sp_compile"`. Every rank calls the compiled model with the
    same inputs and parameters, and gets what the model gives on one device: outputs, loss and gradients.

    Args:
        gm: the graph, from Dynamo.
        example_inputs: its inputs.
        options: see `SequenceParallelConfig`.

    Raises:
        ConfigurationError: an option that does not exist, or a value that it does not take.
            With `strict`, several ranks and no SP group.
        FallbackError: with `strict`, something that cannot be sharded.
        SkipFrame: to Dynamo, which then runs the frame in Python; see `dropped_backward`.
    """
    config = SequenceParallelConfig.from_options(options)
    group = resolve_group(config.group)
    _check_sharded_inputs(example_inputs, group)
    _skip_what_has_lost_a_backward(gm, example_inputs, config.strict)
    if group is None:
        _report_no_group(config.strict)
    if group is None or group.size() == 1:
        compiled = _compile_inner(config, gm, example_inputs)
    else:
        _reject_cut_graphs()
        with compiling():
            compiled = _compile(gm, example_inputs, config, group)
    epoch = current_epoch()

    def run(*args: Any) -> Any:
        if config.group is None and current_epoch() != epoch:
            # The user destroyed the world without a word to us: compile this call anew, and then all others.
            torch._dynamo.reset()
            return sp_backend(gm, args, options=options)(*args)
        return compiled(*args)

    return run


def _check_sharded_inputs(inputs: Sequence[Any], group: dist.ProcessGroup | None) -> None:
    for value in inputs:
        if isinstance(value, ShardedInput) and (group is None or value.group_name != group.group_name):
            raise ConfigurationError(
                f"a sharded input of shape {list(value.shape)} was made for another SP group than the model is "
                "compiled for: make it anew after init_sequence_parallel, or with the option 'group' of the model"
            )


def _report_no_group(strict: bool) -> None:
    """Several ranks and no SP group: each would do all the work, and nobody would notice."""
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        text = (
            f"there are {world} ranks and no SP group, so that each of them does all the work: call "
            "init_sequence_parallel() before the model first runs, or give the option 'group'"
        )
        if strict:
            raise ConfigurationError(text)
        _warn_once(text)


@functools.cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def _skip_what_has_lost_a_backward(gm: fx.GraphModule, inputs: Sequence[Any], strict: bool) -> None:
    """Have Python run the frame of a graph that would give other gradients than the model does."""
    dropped = dropped_backward(gm, inputs)
    if dropped is None:
        return
    text = f"the function that calls {dropped} under torch.vmap or torch.func is not compiled: {LOST}"
    if strict:
        raise FallbackError(f"{text}; without strict=True it runs in Python")
    log.warning("%s", text)
    raise SkipFrame(text)


def _reject_cut_graphs() -> None:
    """With the option `group` alone, Dynamo's DDP optimizer is still on."""
    if DistributedDataParallel._get_active_ddp_module() is not None and cuts_graphs_for_ddp():
        raise ConfigurationError(
            "torch.compile(DistributedDataParallel(model)): Dynamo's DDP optimizer cuts the graph in mid-block; "
            "compile the model first and wrap it after, call init_sequence_parallel(), or set "
            "torch._dynamo.config.optimize_ddp = False"
        )


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: SequenceParallelConfig, group: dist.ProcessGroup
) -> Compiled:
    if compiled_autograd.in_compiled_autograd_region:
        record_unsharded(gm, None, "it is the backward of other graphs, and holds the rows of one rank where they do")
        return _compile_inner(config, gm, example_inputs)
    guard = None if config.guards == "off" else guard_of(group)
    name = group.group_name if guard is None else guard.gate.registered_name
    with telling_of_failure(guard, config, "plans a graph"):
        planned = _planned_and_recorded(gm, example_inputs, config, name, group.size())
    if planned is None:
        return _compile_inner(config, gm, example_inputs)
    sharded, rewritten = planned
    rank = rank_tensor(group, _device(example_inputs))
    with torch.compiler.config.patch(cache_key_tag=_cache_key_tag(name, group.size())):  # type: ignore[attr-defined]
        inner = guard_graph(
            guard,
            config,
            rewritten,
            gm.graph.find_nodes(op="placeholder"),
            example_inputs,
            lambda: _compile_local(config, sharded.graph_module, [*example_inputs, rank]),
        )
    leave = _leaving(sharded.outputs, group, config.group)
    return lambda *args: leave(inner(*args, rank))


def _planned_and_recorded(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: SequenceParallelConfig, group_name: str, parts: int
) -> tuple[ShardedGraph, RewrittenGraph] | None:
    """The graph as it is compiled, and its record. None: it runs unsharded, and what follows of it is reported."""
    try:
        planned = plan_graph(gm, example_inputs, config, group_name, parts)
    except CaptureError as error:
        if any(isinstance(value, ShardedInput) for value in example_inputs):
            raise FallbackError(f"{error}; this graph would run unsharded, so give it its inputs whole") from error
        if config.strict:
            raise FallbackError(f"{error}; without strict=True this graph runs unsharded") from error
        log.warning("a graph runs unsharded: %s", error)
        record_unsharded(gm, None, str(error))
        return None
    sharded, captured = planned.sharded, planned.captured.graph_module
    _report(planned.plan.fallbacks, config.strict)
    _report_strategies(planned.plan.sites, config.attention)
    _report_outputs(planned, config.strict)
    if sharded is None:
        unsharded = record_unsharded(captured, planned.plan, "nothing to shard")
        log_summary(unsharded.name, planned.rules, planned.plan, None, planned.seconds)
        return None
    assert planned.unpacked is not None
    rewritten = record(
        gm,
        captured,
        planned.rules,
        planned.sites,
        planned.mixers,
        planned.plan,
        planned.unpacked,
        sharded,
        config.dump,
    )
    log_summary(rewritten.name, planned.rules, planned.plan, sharded, planned.seconds)
    return sharded, rewritten


@dataclass(frozen=True)
class PlannedGraph:
    """A graph on its way to the inner backend."""

    captured: CapturedGraph
    rules: GraphRules
    sites: tuple[AttentionSite, ...]
    mixers: tuple[SiteOperand, ...]
    """What else mixes a sequence, in a graph without attention."""
    plan: ShardingPlan
    unpacked: ShardedGraph | None
    """As `insert_collectives` wrote it. None: there is nothing to shard."""
    sharded: ShardedGraph | None
    """As it is compiled."""
    seconds: Mapping[str, float]
    """What each pass took."""


@contextmanager
def _apart_from_the_program() -> Iterator[None]:
    """Planning runs ops on fake tensors: the hooks that the user has on saved tensors, those of a checkpoint say, are
    not called for them, and anomaly mode does not look for NaN in them.

    Nor is garbage collected: what a pass makes stays, and to walk all the graphs of the process takes a third of the
    time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        with _disable_saved_tensors_hooks_during_tracing(), torch.autograd.set_detect_anomaly(False):
            yield
    finally:
        if was_on:
            gc.enable()


@_apart_from_the_program()
def plan_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: SequenceParallelConfig,
    group_name: str,
    parts: int,
) -> PlannedGraph:
    """The passes, in their order, for P = `parts`. Raises `CaptureError`, but for a graph with nothing to shard."""
    clock = _Clock()
    captured = clock.time("capture", capture, gm, example_inputs, stays_whole)
    rules = GraphRules(captured.graph_module.graph, captured.replicated)
    if clock.time("outline_experts", outline_experts, captured.graph_module, rules):
        rules = GraphRules(captured.graph_module.graph, captured.replicated)
    sites = clock.time("find_attention", find_attention, rules)
    mixers = () if sites else clock.time("find_mixers", find_mixers, rules)
    cut = _sharded_placeholders(captured, example_inputs)
    if captured.refusal and (cut or (captured.output_names and (sites or mixers))):
        raise CaptureError(captured.refusal)
    if captured.refusal:
        sites, mixers = (), ()  # nothing to shard, or what an optimizer does, which returns nothing
    plan = clock.time("propagate", propagate, rules, sites, mixers, parts, config.attention, cut, config.links)
    unpacked = sharded = None
    if plan.shards:
        module = captured.graph_module
        outputs = config.output_kinds(captured.output_names)
        arguments = (module, rules, plan, group_name, config, outputs)
        unpacked = clock.time("insert_collectives", insert_collectives, *arguments)
        clock.time("local_values", _set_local_values, unpacked, captured, cut, parts)
        sharded = clock.time("pack_exchanges", pack_exchanges, unpacked)
    return PlannedGraph(captured, rules, sites, mixers, plan, unpacked, sharded, clock.seconds)


def _sharded_placeholders(captured: CapturedGraph, example_inputs: Sequence[Any]) -> dict[fx.Node, Sharded]:
    """The inputs of which each rank holds its rows; raises `CaptureError` for one that the graph writes to."""
    cut: dict[fx.Node, Sharded] = {}
    placeholders = captured.graph_module.graph.find_nodes(op="placeholder")
    for index, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        if isinstance(value, ShardedInput):
            if index in captured.mutated_inputs:
                raise CaptureError(f"the graph writes to the sharded input {node.name}")
            size = size_of(captured.inputs[index].shape[value.sharded_dim])
            cut[node] = Sharded(value.sharded_dim, whole_layout(size))
    return cut


def _compile_local(config: SequenceParallelConfig, gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """The inner backend's callable for inputs of the rewritten graph; it takes the rows of those that are sharded."""
    context = TracingContext.try_get()
    for value in inputs:
        if isinstance(value, ShardedInput) and context is not None:
            # The symbols that Dynamo has given to the sizes of the rows.
            context.tensor_to_context[value.block] = context.tensor_to_context[value].inner_contexts["block"]
    inner = _compile_sharded(config, gm, list(map(_rows, inputs)))
    at = [index for index, value in enumerate(inputs) if isinstance(value, ShardedInput)]
    return (lambda *args: inner(*map(_rows, args))) if at else inner


def _rows(value: Any) -> Any:
    return value.block if isinstance(value, ShardedInput) else value


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, call: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        started = time.perf_counter()
        result = call(*args, **kwargs)
        self.seconds[name] = time.perf_counter() - started
        return result


def _leaving(
    plans: Sequence[LeavingOutput], group: dist.ProcessGroup, given: dist.ProcessGroup | DeviceMesh | None
) -> Callable[[Sequence[Any]], list[Any]]:
    """What makes the outputs of a `ShardedGraph` those of the user: without padding, and as DTensors where asked.

    The gradient of a DTensor is that of the whole value, of which `from_local` hands each rank its rows: what "shard"
    calls the gradient of the sum of the ranks' losses, that sum being the one loss.
    """

    kept = weakref.ref(group)  # a compiled callable does not keep a group that its owner has destroyed

    @cached_while_groups_last
    def mesh(device_type: str) -> DeviceMesh:
        alive = kept()
        assert alive is not None
        return mesh_of(alive, given, device_type)

    def leave(outputs: Sequence[Any]) -> list[Any]:
        left, behind = list(outputs[: len(plans)]), iter(outputs[len(plans) :])
        for index, plan in enumerate(plans):
            if isinstance(plan.placement, Sharded):
                value, dim = left[index], plan.placement.dim
                order = _memory_order(value, plan.is_padded)
                if plan.is_padded:
                    value = value.index_select(dim, next(behind).nonzero().flatten())
                if plan.size is not None:
                    size = plan.size if isinstance(plan.size, int) else next(behind)
                    value = _as_dtensor(value, dim, size, order, mesh(value.device.type))
                left[index] = value
        return left

    return leave


def _memory_order(value: Tensor, is_padded: bool) -> list[int]:
    """The dimensions from the innermost in memory to the outermost; what padding is cut off is laid out anew."""
    strides = value.stride()
    return sorted(range(value.dim()), key=lambda dim: (0 if is_padded else strides[dim], -dim))


def _as_dtensor(value: Tensor, dim: int, size: int, order: Sequence[int], mesh: DeviceMesh) -> DTensor:
    """`size` is the global one of dimension `dim`, `order` that of the dimensions in memory."""
    shape = torch.Size([*value.shape[:dim], size, *value.shape[dim + 1 :]])
    strides, step = [0] * value.dim(), 1
    for d in order:
        strides[d], step = step, step * shape[d]
    return DTensor.from_local(value, mesh, [Shard(dim)], run_check=False, shape=shape, stride=tuple(strides))


def _compile_inner(config: SequenceParallelConfig, gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    backend = config.inner_backend
    compile_fx = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
    compiled: Compiled = compile_fx(gm, list(inputs))
    return compiled


def _compile_sharded(config: SequenceParallelConfig, gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """As `_compile_inner`; Inductor buckets gradients and computes under collectives."""
    if config.inner_backend != "inductor":
        return _compile_inner(config, gm, inputs)
    inductor: Callable[..., Compiled] = torch._dynamo.lookup_backend("inductor")
    settings = inductor_settings(config.gradient_bucket_mb, config.overlap)
    return inductor(gm, list(inputs), config_patches=settings)


def _cache_key_tag(group_name: str, parts: int) -> str:
    """The on-disk caches see `sp::` ops, not what they lower to, nor the size of the group that they name."""
    tag = torch.compiler.config.cache_key_tag
    return f"{tag}sp_compile lowering {LOWERING_VERSION}, group {group_name} of {parts}"


def _set_local_values(
    sharded: ShardedGraph, captured: CapturedGraph, cut: Mapping[fx.Node, Sharded], parts: int
) -> None:
    """Write the local value of every node to `meta["val"]`, for whoever prints the graph.

    The layers of a model make the same calls, which are made once. What has a size, or is a number, that data tells is
    whole on every rank, and the value that was captured: of its symbols more is known than of new ones.
    """
    captured_values = {node.name: node.meta.get("val") for node in captured.graph_module.graph.nodes}
    told_by_data = {
        node: captured_values[value]
        for node, value, _ in sharded.values
        if any(map(free_unbacked_symbols, pytree.tree_leaves(captured_values[value])))
    }
    mode = next((x.fake_mode for x in captured.inputs if hasattr(x, "fake_mode")), None) or FakeTensorMode()
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
        inputs = list(captured.inputs)
        for index, node in enumerate(captured.graph_module.graph.find_nodes(op="placeholder")):
            if node in cut:
                dim, value = cut[node].dim, inputs[index]
                rows = block_rows(value.shape[dim], 1, parts)
                inputs[index] = value.new_empty([*value.shape[:dim], rows, *value.shape[dim + 1 :]])
        Propagate(sharded.graph_module).run(*inputs, torch.zeros(1, dtype=torch.int64))
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


def _device(example_inputs: Sequence[Any]) -> torch.device:
    return next((x.device for x in example_inputs if isinstance(x, Tensor)), torch.device("cpu"))


def _report(fallbacks: Sequence[Fallback], strict: bool) -> None:
    for fallback in fallbacks:
        text = f"{fallback.node.target} runs on gathered values: {fallback.reason} ({user_line(fallback.node)})"
        if strict:
            rule = "give it a rule with register_sharding_rule, " if fallback.takes_a_rule else ""
            raise FallbackError(f"{text}; {rule}opt it out with replicated_region(), or compile without strict=True")
        log.warning("%s", text)


def _report_strategies(sites: Sequence[SitePlan], attention: str) -> None:
    """Tell of sites that do not run by the strategy that was asked for. One that moves nothing is as good as any."""
    told = {
        f"attention runs by {site.strategy!r}, not by {attention!r} as asked for: {site.reason} "
        f"({user_line(site.site.output)})": None
        for site in sites
        if attention not in ("auto", site.strategy) and site.strategy != "local"
    }
    for text in told:  # the layers of a model say the same
        log.warning("%s", text)


def _report_outputs(planned: PlannedGraph, strict: bool) -> None:
    outputs = planned.sharded.outputs if planned.sharded is not None else ()
    for index, (name, plan) in enumerate(zip(planned.captured.output_names, outputs, strict=False)):
        if plan.gathered:
            text = f"output {index} ({name!r}) is gathered: {plan.gathered}"
            if strict:
                raise FallbackError(f"{text}, 'gather' it with the option 'outputs', or compile without strict=True")
            log.warning("%s", text)
