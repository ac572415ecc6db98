"""Sequence parallelism as a `torch.compile` backend.

import torch
from sp_compile import init_sequence_parallel, sp_backend

init_sequence_parallel()
model = torch.compile(model, backend=sp_backend)
"""

from .backend import sp_backend
from .config import SequenceParallelConfig
from .debug import RewrittenGraph, rewritten_graphs
from .errors import (
    CaptureError,
    ConfigurationError,
    DataError,
    FallbackError,
    RankLostError,
    RankMismatchError,
    RuleError,
    SequenceParallelError,
)
from .group import (
    destroy_sequence_parallel,
    get_data_parallel_group,
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_sequence_parallel_group,
    get_sequence_parallel_rank,
    get_sequence_parallel_world_size,
    init_sequence_parallel,
)
from .region import replicated_region
from .rules import register_sharding_rule

__all__ = [
    "CaptureError",
    "ConfigurationError",
    "DataError",
    "FallbackError",
    "RankLostError",
    "RankMismatchError",
    "RewrittenGraph",
    "RuleError",
    "SequenceParallelConfig",
    "SequenceParallelError",
    "destroy_sequence_parallel",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_sequence_parallel_group",
    "get_sequence_parallel_rank",
    "get_sequence_parallel_world_size",
    "init_sequence_parallel",
    "register_sharding_rule",
    "replicated_region",
    "rewritten_graphs",
    "sp_backend",
]
