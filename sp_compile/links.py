"""How fast the ranks of a group reach one another: bandwidth and latency, measured."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .errors import ConfigurationError
from .group import resolve_group

_SMALL, _LARGE = 1, 1 << 22
"""Elements that each rank sends to every other: of one launch hardly any data, of the other mostly data."""


@dataclass(frozen=True)
class Links:
    """What a collective takes: `latency + bytes received / bandwidth` (Hockney 1994)."""

    bandwidth: float
    """Bytes per second that a rank receives while all ranks exchange."""
    latency: float
    """Seconds of a launch that moves nothing."""

    def seconds(self, launches: int, received: int) -> float:
        """The time of some launches, one after the other."""
        return launches * self.latency + received / self.bandwidth


def measure_links(group: ProcessGroup | DeviceMesh | None = None, repeats: int = 9) -> Links:
    """Time all-to-alls on the SP group, or on the group given. Every rank of it calls this, and gets the same answer.

    Medians of `repeats` launches of a few bytes, and of some megabytes a rank. The numbers are those of the first rank.

    Raises:
        ConfigurationError: there is no SP group, or it is of one rank.
    """
    ranks = resolve_group(group)
    if ranks is None or ranks.size() == 1:
        raise ConfigurationError("there are no links to measure: call init_sequence_parallel() on more than one rank")
    device = torch.device(dist.distributed_c10d._get_pg_default_device(ranks))
    latency = _median_seconds(ranks, device, _SMALL, repeats)
    share = _LARGE // ranks.size()
    moving = max(_median_seconds(ranks, device, share, repeats) - latency, 1e-9)
    measured = torch.tensor([4 * share * (ranks.size() - 1) / moving, latency], dtype=torch.float64)
    measured = measured.to(device)
    dist.broadcast(measured, group=ranks, group_src=0)
    bandwidth, latency = measured.tolist()
    return Links(bandwidth, latency)


def _median_seconds(group: ProcessGroup, device: torch.device, elements: int, repeats: int) -> float:
    """Of an all-to-all in which each rank sends so many float32s to every rank."""
    sent = torch.zeros(elements * group.size(), device=device)
    received = torch.empty_like(sent)
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier(group=group)
        started = time.perf_counter()
        dist.all_to_all_single(received, sent, group=group)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
