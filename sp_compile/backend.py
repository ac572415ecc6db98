"""`sp_backend`: the road of a graph from Dynamo to the inner backend, on one page.

    Dynamo graph -> capture -> find_attention -> propagate -> insert_collectives -> inner backend

A graph with nothing to shard, a world of one rank, and no process group at all go to the inner backend as they are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from .capture import CapturedGraph, capture
from .config import SequenceParallelConfig
from .debug import log_summary, record, record_unsharded
from .errors import CaptureError, ConfigurationError, FallbackError, user_line
from .graph import GraphRules
from .group import current_epoch, cuts_graphs_for_ddp, rank_tensor, resolve_group
from .guard import guard_graph
from .ops import LOWERING_VERSION
from .passes import ShardedGraph, find_attention, find_mixers, insert_collectives, propagate
from .plan import AttentionSite, Fallback, ShardingPlan
from .rules import stays_whole
from .sharding import Placement, Sharded

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
        FallbackError: with `strict`, something that cannot be sharded.
    """
    config = SequenceParallelConfig.from_options(options)
    group = resolve_group(config.group)
    if group is None or group.size() == 1:
        compiled = _compile_inner(config, gm, example_inputs)
    else:
        _reject_cut_graphs()
        compiled = _compile(gm, example_inputs, config, group)
    epoch = current_epoch()

    def run(*args: Any) -> Any:
        if config.group is None and current_epoch() != epoch:
            # The user destroyed the world without a word to us: compile this call anew, and then all others.
            torch._dynamo.reset()
            return sp_backend(gm, args, options=options)(*args)
        return compiled(*args)

    return run


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
    try:
        planned = plan_graph(gm, example_inputs, config, group.group_name, group.size())
    except CaptureError as error:
        if config.strict:
            raise FallbackError(f"{error}; without strict=True this graph runs unsharded") from error
        log.warning("a graph runs unsharded: %s", error)
        record_unsharded(gm, None, str(error))
        return _compile_inner(config, gm, example_inputs)
    _report(planned.plan.fallbacks, config.strict)
    sharded, captured = planned.sharded, planned.captured.graph_module
    if sharded is None:
        unsharded = record_unsharded(captured, planned.plan, "nothing to shard")
        log_summary(unsharded.name, planned.rules, planned.plan, None, planned.seconds)
        return _compile_inner(config, gm, example_inputs)
    rewritten = record(gm, captured, planned.rules, planned.sites, planned.plan, sharded, config.dump)
    log_summary(rewritten.name, planned.rules, planned.plan, sharded, planned.seconds)
    rank = rank_tensor(group, _device(example_inputs))
    with torch.compiler.config.patch(cache_key_tag=_cache_key_tag(group)):  # type: ignore[attr-defined]
        inner = guard_graph(
            group,
            config,
            rewritten,
            gm.graph.find_nodes(op="placeholder"),
            example_inputs,
            lambda: _compile_inner(config, sharded.graph_module, [*example_inputs, rank]),
        )
    return lambda *args: _without_padding(inner(*args, rank), sharded.outputs)


@dataclass(frozen=True)
class PlannedGraph:
    """A graph on its way to the inner backend."""

    captured: CapturedGraph
    rules: GraphRules
    sites: tuple[AttentionSite, ...]
    plan: ShardingPlan
    sharded: ShardedGraph | None
    """None: there is nothing to shard."""
    seconds: Mapping[str, float]
    """What each pass took."""


def plan_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: SequenceParallelConfig, group_name: str, parts: int
) -> PlannedGraph:
    """The passes, in their order, for P = `parts`. Raises `CaptureError`."""
    clock = _Clock()
    captured = clock.time("capture", capture, gm, example_inputs, stays_whole)
    rules = GraphRules(captured.graph_module.graph, captured.replicated)
    sites = clock.time("find_attention", find_attention, rules)
    mixers = () if sites else clock.time("find_mixers", find_mixers, rules)
    plan = clock.time("propagate", propagate, rules, sites, mixers, parts, config.attention, config.links)
    sharded = None
    if plan.shards:
        module = captured.graph_module
        sharded = clock.time("insert_collectives", insert_collectives, module, rules, plan, group_name, config)
        clock.time("local_values", _set_local_values, sharded.graph_module, captured)
    return PlannedGraph(captured, rules, sites, plan, sharded, clock.seconds)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, call: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        started = time.perf_counter()
        result = call(*args, **kwargs)
        self.seconds[name] = time.perf_counter() - started
        return result


def _without_padding(outputs: Sequence[Any], placements: Sequence[Placement]) -> list[Any]:
    """The outputs of the graph; the last ones are the real rows of each that left as a shard."""
    kept = list(outputs[: len(placements)])
    at = [index for index, placement in enumerate(placements) if isinstance(placement, Sharded)]
    for index, real in zip(at, outputs[len(placements) :], strict=True):
        placement = placements[index]
        assert isinstance(placement, Sharded)
        kept[index] = kept[index].index_select(placement.dim, real.nonzero().flatten())
    return kept


def _compile_inner(config: SequenceParallelConfig, gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    backend = config.inner_backend
    compile_fx = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
    compiled: Compiled = compile_fx(gm, list(inputs))
    return compiled


def _cache_key_tag(group: dist.ProcessGroup) -> str:
    """The on-disk caches see `sp::` ops, not what they lower to, nor the size of the group that they name."""
    tag = torch.compiler.config.cache_key_tag
    return f"{tag}sp_compile lowering {LOWERING_VERSION}, group {group.group_name} of {group.size()}"


def _set_local_values(module: fx.GraphModule, captured: CapturedGraph) -> None:
    """Write the local value of every node to `meta["val"]`, for whoever prints the graph."""
    mode = next((x.fake_mode for x in captured.inputs if hasattr(x, "fake_mode")), None) or FakeTensorMode()

    class Propagate(fx.Interpreter):
        def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
            value = super().get_attr(target, args, kwargs)
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            if node.op != "output":
                node.meta["val"] = result
            return result

    grad_mode = torch.is_grad_enabled()
    guards = mode.shape_env.suppress_guards() if mode.shape_env is not None else nullcontext()
    with mode, guards, enable_python_dispatcher(), torch.no_grad():
        Propagate(module).run(*captured.inputs, torch.zeros(1, dtype=torch.int64))
    torch.set_grad_enabled(grad_mode)


def _device(example_inputs: Sequence[Any]) -> torch.device:
    return next((x.device for x in example_inputs if isinstance(x, Tensor)), torch.device("cpu"))


def _report(fallbacks: Sequence[Fallback], strict: bool) -> None:
    for fallback in fallbacks:
        text = f"{fallback.node.target} runs on gathered values: {fallback.reason} ({user_line(fallback.node)})"
        if strict:
            rule = "" if fallback.node.op == "call_module" else "give it a rule with register_sharding_rule, "
            raise FallbackError(f"{text}; {rule}opt it out with replicated_region(), or compile without strict=True")
        log.warning("%s", text)
