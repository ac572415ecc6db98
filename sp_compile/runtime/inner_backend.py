"""The inner backend, which compiles what the passes have made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext

from ..config import SequenceParallelConfig
from ..distributed.sharded_input import ShardedInput
from ..ops.sp_ops import LOWERING_VERSION
from .inductor import inductor_settings

Compiled = Callable[..., Any]


def compile_inner(config: SequenceParallelConfig, gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """The inner backend's callable for a graph that runs as it is."""
    backend = config.inner_backend
    compile_fx = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
    compiled: Compiled = compile_fx(gm, list(inputs))
    return compiled


def compile_local(config: SequenceParallelConfig, gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
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


def _compile_sharded(config: SequenceParallelConfig, gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """As `compile_inner`; Inductor buckets gradients and computes under collectives."""
    if config.inner_backend != "inductor":
        return compile_inner(config, gm, inputs)
    inductor: Callable[..., Compiled] = torch._dynamo.lookup_backend("inductor")
    settings = inductor_settings(config.gradient_bucket_mb, config.overlap)
    return inductor(gm, list(inputs), config_patches=settings)


def cache_key_tag(group_name: str, parts: int) -> str:
    """The on-disk caches see `sp::` ops, not what they lower to, nor the size of the group that they name."""
    tag = torch.compiler.config.cache_key_tag
    return f"{tag}sp_compile lowering {LOWERING_VERSION}, group {group_name} of {parts}"
