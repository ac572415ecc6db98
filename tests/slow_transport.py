"""A transport of artificial latency and bandwidth over gloo, which tells how much of it was hidden.

Every collective starts at once; `wait` returns no sooner than `latency + bytes received / bandwidth` after the start
(Hockney 1994). What `wait` does not have to sleep was hidden under what the rank computed meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group

from sp_compile import get_sequence_parallel_group


class _Work(dist._Work):
    def __init__(self, work: Any, arrives: float, transport: SlowTransport) -> None:
        super().__init__()
        self.work, self.arrives, self.transport = work, arrives, transport

    def wait(self, timeout: Any = None) -> bool:
        asked = time.perf_counter()
        self.work.wait()
        left = self.arrives - time.perf_counter()
        if left > 0:
            time.sleep(left)
        self.transport.exposed += min(time.perf_counter() - asked, max(self.arrives - asked, 0.0))
        return True

    def get_future(self) -> Any:
        return self.work.get_future()


class SlowTransport(dist.ProcessGroup):
    """Passes collectives on to a group. `latency` in seconds, `bandwidth` in bytes per second."""

    def __init__(self, group: dist.ProcessGroup, latency: float, bandwidth: float) -> None:
        super().__init__(group.rank(), group.size())  # type: ignore[call-arg]
        self.group, self.latency, self.bandwidth = group, latency, bandwidth
        self.reset()

    def reset(self) -> None:
        self.seconds = self.exposed = 0.0
        """What communication takes, and what of it a rank slept."""

    @property
    def hidden(self) -> float:
        """The share of communication under which the rank computed."""
        return 1 - self.exposed / self.seconds if self.seconds else 1.0

    def _begun(self, work: Any, made: Tensor, times: int = 1) -> _Work:
        received = times * made.nbytes * (self.group.size() - 1) / self.group.size()
        takes = self.latency + received / self.bandwidth
        self.seconds += takes
        return _Work(work, time.perf_counter() + takes, self)

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        return self._begun(self.group.allreduce(tensors, opts), tensors[0], 2)

    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return self._begun(self.group.allgather_into_tensor_coalesced(outputs, inputs, opts), outputs[0])

    def alltoall_base(self, output: Any, given: Any, output_sizes: Any, sizes: Any, opts: Any = None) -> Any:
        return self._begun(self.group.alltoall_base(output, given, output_sizes, sizes, opts), output)


@contextmanager
def slow_transport(latency: float, bandwidth: float) -> Iterator[SlowTransport]:
    """The SP group on a slow transport, in the place that functional collectives look it up."""
    group = get_sequence_parallel_group()
    assert group is not None
    slow = SlowTransport(group, latency, bandwidth)
    _unregister_process_group(group.group_name)
    _register_process_group(group.group_name, slow)
    try:
        yield slow
    finally:
        _unregister_process_group(group.group_name)
        _register_process_group(group.group_name, group)


def exchanged(seconds_of_work: float) -> tuple[float, float]:
    """The hidden share of an all-to-all of 0.1 s with work before it is waited for, and what it took."""
    with slow_transport(0.1, 1e12) as transport:
        started, name = time.perf_counter(), transport.group.group_name
        pieces = torch.ops._c10d_functional.all_to_all_single(torch.ones(2, 4), [1, 1], [1, 1], name)
        time.sleep(seconds_of_work)
        torch.ops._c10d_functional.wait_tensor(pieces)
        return transport.hidden, time.perf_counter() - started
