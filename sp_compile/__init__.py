"""Sequence parallelism as a `torch.compile` backend.

import torch
from sp_compile import init_sequence_parallel, sp_backend

init_sequence_parallel()
model = torch.compile(model, backend=sp_backend)
"""

from . import _torch_version as _torch_version  # before all that may fail with another version
from .backend import sp_backend
from .capture.region import replicated_region
from .config import SequenceParallelConfig
from .distributed.group import (
    destroy_sequence_parallel,
    get_data_parallel_group,
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_sequence_parallel_group,
    get_sequence_parallel_rank,
    get_sequence_parallel_world_size,
    init_sequence_parallel,
)
from .distributed.measure_links import measure_links
from .distributed.sharded_input import ShardedInput, sharded_input, sharded_inputs
from .errors import (
    CaptureError,
    ConfigurationError,
    DataError,
    FallbackError,
    RankLostError,
    RankMismatchError,
    RankRaisedError,
    RuleError,
    SequenceParallelError,
    VerificationError,
)
from .links import Links
from .rules import register_sharding_rule
from .runtime.records import RewrittenGraph, UnshardedGraph, rewritten_graphs, unsharded_graphs
from .tools.divergence import Divergence
from .tools.explain import explain
from .tools.report import Report
from .tools.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "ConfigurationError",
    "DataError",
    "Divergence",
    "FallbackError",
    "Links",
    "RankLostError",
    "RankMismatchError",
    "RankRaisedError",
    "Report",
    "RewrittenGraph",
    "RuleError",
    "SequenceParallelConfig",
    "SequenceParallelError",
    "ShardedInput",
    "UnshardedGraph",
    "Verification",
    "VerificationError",
    "__version__",
    "destroy_sequence_parallel",
    "explain",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_sequence_parallel_group",
    "get_sequence_parallel_rank",
    "get_sequence_parallel_world_size",
    "init_sequence_parallel",
    "measure_links",
    "register_sharding_rule",
    "replicated_region",
    "rewritten_graphs",
    "sharded_input",
    "sharded_inputs",
    "sp_backend",
    "unsharded_graphs",
    "verify",
]
