"""`sp_backend`: the road of a graph from Dynamo to the inner backend, on one page.

    Dynamo graph -> passes (`pipeline`) -> record -> guard -> inner backend -> outputs

A graph with nothing to shard, a world of one rank, and no process group at all go to the inner backend as they are.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._dynamo import compiled_autograd
from torch._dynamo.exc import SkipFrame
from torch.nn.parallel import DistributedDataParallel

from .capture.dropped_backward import LOST, dropped_backward
from .config import SequenceParallelConfig
from .distributed.group import current_epoch, cuts_graphs_for_ddp, rank_tensor, resolve_group
from .distributed.sharded_input import ShardedInput
from .errors import CaptureError, ConfigurationError, FallbackError
from .guards.groups import guard_of
from .guards.guarded_graph import GraphToAgreeOn, guard_graph, telling_of_failure
from .guards.watch import compiling
from .pipeline import PlannedGraph, plan_graph
from .runtime.inner_backend import Compiled, cache_key_tag, compile_inner, compile_local
from .runtime.outputs import leaving
from .runtime.records import RewrittenGraph, log_summary, record, record_unsharded
from .runtime.reporting import report

log = logging.getLogger(__name__)


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
        compiled = compile_inner(config, gm, example_inputs)
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
        return compile_inner(config, gm, example_inputs)
    guard = None if config.guards == "off" else guard_of(group)
    name = group.group_name if guard is None else guard.gate.registered_name
    with telling_of_failure(guard, config, "plans a graph"):
        planned = _planned(gm, example_inputs, config, name, group.size())
        rewritten = None if planned is None else _recorded(gm, planned, config)
    if planned is None or planned.sharded is None or rewritten is None:
        return compile_inner(config, gm, example_inputs)
    sharded, rank = planned.sharded, rank_tensor(group, _device(example_inputs))
    placeholders = gm.graph.find_nodes(op="placeholder")
    graph = GraphToAgreeOn(rewritten.name, str(rewritten), rewritten.rewritten, placeholders, example_inputs)
    with torch.compiler.config.patch(cache_key_tag=cache_key_tag(name, group.size())):  # type: ignore[attr-defined]
        inner = guard_graph(
            guard, config, graph, lambda: compile_local(config, sharded.graph_module, [*example_inputs, rank])
        )
    leave = leaving(sharded.outputs, group, config.group)
    return lambda *args: leave(inner(*args, rank))


def _planned(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: SequenceParallelConfig, group_name: str, parts: int
) -> PlannedGraph | None:
    """The graph as the passes leave it, with what follows for the user reported. None: it cannot be captured."""
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
    report(planned, config)
    return planned


def _recorded(gm: fx.GraphModule, planned: PlannedGraph, config: SequenceParallelConfig) -> RewrittenGraph | None:
    """The record of a graph. None: there is nothing to shard in it."""
    if planned.sharded is None:
        unsharded = record_unsharded(planned.captured.graph_module, planned.plan, "nothing to shard")
        log_summary(unsharded.name, planned)
        return None
    rewritten = record(gm, planned, config.dump)
    log_summary(rewritten.name, planned)
    return rewritten


def _device(example_inputs: Sequence[Any]) -> torch.device:
    return next((x.device for x in example_inputs if isinstance(x, Tensor)), torch.device("cpu"))
