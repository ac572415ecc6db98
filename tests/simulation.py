"""P ranks in one process, for tests: torch's LocalTensorMode over a fake process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed._local_tensor import LocalTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from sp_compile.group import destroy_sequence_parallel, init_sequence_parallel


@contextmanager
def fake_world(world_size: int, rank: int = 0) -> Iterator[None]:
    """A process group of `world_size` ranks of which this process is one, and no data moves."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        destroy_sequence_parallel()
        dist.destroy_process_group()


@contextmanager
def simulate(world_size: int, sequence_parallel_size: int | None = None) -> Iterator[LocalTensorMode]:
    """Run the body as `world_size` ranks at once, in SP groups of P (default: one group).

    Tensors made inside are `LocalTensor`s, with a value per rank in `_local_tensors[rank]`; plain
    tensors from outside are the same on all. Clear `.grad` between two compiled runs of a model:
    a leftover `LocalTensor` there breaks the next trace.
    """
    torch._dynamo.reset()
    with fake_world(world_size):
        init_sequence_parallel(sequence_parallel_size)
        with LocalTensorMode(world_size) as mode:
            yield mode
    torch._dynamo.reset()
