"""How fast the ranks of a group reach one another and compute: bandwidth, latency and FLOP/s, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..errors import ConfigurationError
from ..links import Links
from .group import resolve_group
from .words import explaining_failures

_SMALL, _LARGE = 1, 1 << 22
"""Elements that each rank sends to every other: of one launch hardly any data, of the other mostly data."""


_WIDTH = 1024
"""Of the square matrices whose product is timed."""


def measure_links(group: ProcessGroup | DeviceMesh | None = None, repeats: int = 9) -> Links:
    """Time all-to-alls on the SP group, or on the group given. Every rank of it calls this, and gets the same answer.

    Medians of `repeats` launches of a few bytes, of some megabytes a rank, and of products of matrices that all ranks
    compute at once, in float32, or bfloat16 on an accelerator. The numbers are those of the first rank.

    Raises:
        ConfigurationError: there is no SP group, or it is of one rank.
        RankLostError, DataError: a rank ended meanwhile, or does not come.
    """
    ranks = resolve_group(group)
    if ranks is None or ranks.size() == 1:
        raise ConfigurationError("there are no links to measure: call init_sequence_parallel() on more than one rank")
    with explaining_failures(ranks, "measure_links"):
        return _measured(ranks, torch.device(dist.distributed_c10d._get_object_coll_device(ranks)), repeats)


def _measured(group: ProcessGroup, device: torch.device, repeats: int) -> Links:
    latency = _median_seconds(group, device, _SMALL, repeats)
    share = _LARGE // group.size()
    moving = max(_median_seconds(group, device, share, repeats) - latency, 1e-9)
    flops = 2 * _WIDTH**3 / _median_product(group, device, repeats)
    measured = torch.tensor([4 * share * (group.size() - 1) / moving, latency, flops], dtype=torch.float64)
    measured = measured.to(device)
    dist.broadcast(measured, group=group, group_src=0)
    return Links(*measured.tolist())


def _median_seconds(group: ProcessGroup, device: torch.device, elements: int, repeats: int) -> float:
    """Of an all-to-all in which each rank sends so many float32s to every rank."""
    sent = torch.zeros(elements * group.size(), device=device)
    received = torch.empty_like(sent)
    return _median(lambda: dist.all_to_all_single(received, sent, group=group), group, device, repeats)


def _median_product(group: ProcessGroup, device: torch.device, repeats: int) -> float:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    matrix = torch.ones(_WIDTH, _WIDTH, dtype=dtype, device=device)
    return _median(lambda: torch.mm(matrix, matrix), group, device, repeats)


def _median(call: Callable[[], object], group: ProcessGroup, device: torch.device, repeats: int) -> float:
    """Seconds of a call that all ranks begin together."""
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier(group=group)
        started = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
