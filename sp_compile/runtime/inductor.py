"""What Inductor is told about collectives: gradients travel in buckets, and work stands where something is on its way.

In the backward of a layer only the gradients of parameters (`dW`) are not waited for by the next exchange (`..`):

    program    dX dW dX dW dX dW ..wait attention ..wait dX dW dX dW dX dW ..wait attention
    here       dX dX dX ..dW dW wait attention ..dW wait dX dX dX ..dW dW wait attention
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch._inductor.utils import contains_collective, contains_wait
from torch.utils._ordered_set import OrderedSet

_Node: TypeAlias = Any
"""A `BaseSchedulerNode`; its module takes seconds to import, and not everybody compiles with Inductor."""

PUT_OFF = 2
"""How many collectives later than it stood work may stand: what is put off keeps its operands alive."""


def inductor_settings(gradient_bucket_mb: float, overlap: bool) -> dict[str, Any]:
    """The settings of Inductor for the options of these names."""
    settings: dict[str, Any] = {}
    if gradient_bucket_mb:
        settings["bucket_all_reduces_fx"] = "all"
        settings["bucket_all_reduces_fx_bucket_size_determinator"] = BucketSize(gradient_bucket_mb)
    if overlap:
        settings["reorder_for_compute_comm_overlap"] = True
        settings["reorder_for_compute_comm_overlap_passes"] = [put_work_under_collectives]
    return settings


@dataclass(frozen=True)
class BucketSize:
    """The size of every bucket, in megabytes; a class, for the compile caches pickle it."""

    megabytes: float

    def __call__(self, bucket: int) -> float:
        return self.megabytes


def put_work_under_collectives(nodes: list[_Node]) -> list[_Node]:
    """The scheduler's nodes in the order in which they run: work that need not wait stands under a collective.

    Collectives keep their order, and waits come as late as what needs them. Nothing moves across the moment at which
    memory would peak above the peak of the order that is given.
    """
    place = {node: at for at, node in enumerate(nodes)}
    limit = max(_memory(nodes), default=0)
    fixed: set[_Node] = set()
    while True:
        order = _under_collectives(nodes, fixed)
        memory = _memory(order)
        peak = max(range(len(order)), key=memory.__getitem__, default=0)
        if not order or memory[peak] <= limit:
            return order
        middle = order[peak]
        crossed = {node for node in order[:peak] if place[node] > place[middle]}
        crossed |= {node for node in order[peak:] if place[node] <= place[middle]}
        fixed = fixed | crossed if not crossed <= fixed else set(nodes)


def _memory(nodes: list[_Node]) -> list[int]:
    """Bytes in use while each node runs. A kernel of Inductor's own writes its results over what is read there last."""
    from torch._inductor import memory
    from torch._inductor.virtualized import V

    freed = memory.get_freeable_input_buf(nodes, OrderedSet(V.graph.graph_inputs))
    lives, _, _ = memory.compute_memory_timeline(nodes, freed, OrderedSet(V.graph.get_output_names()))
    _, during = memory.peak_memory_from_buf_info_list(lives, len(nodes))
    before = memory.live_memory_before_steps_from_buf_info_list(lives, len(nodes))
    return [during[at] if node.is_extern() else max(before[at], before[at + 1]) for at, node in enumerate(nodes)]


def _under_collectives(nodes: Sequence[_Node], fixed: Set[_Node]) -> list[_Node]:
    """Under each collective runs half of the work that may stand there, what is needed first; the next has the rest.

    Work moves at most one collective ahead and `PUT_OFF` back; what is `fixed` stays between the two where it stands.
    """
    collectives: list[_Node] = []
    standing: list[list[_Node]] = [[]]
    """What stands before the first collective, after it, after the second, ..."""
    for node in nodes:
        if contains_collective(node):
            collectives.append(node)
            standing.append([])
        else:
            standing[-1].append(node)
    stands = {node: at for at, group in enumerate(standing) for node in group}
    since, needed = _spans(nodes, collectives, {node: at for node, at in stands.items() if node in fixed})
    until = {node: min(needed[node] - 1, at - 1 + PUT_OFF) for node, at in stands.items()}
    order: list[_Node] = []
    pool = standing[0] + standing[1] if collectives else standing[0]
    for number, collective in enumerate(collectives):
        order += [node for node in pool if needed[node] == number]
        order.append(collective)
        ahead = standing[number + 2] if number + 2 < len(standing) else []
        pool = [node for node in pool if needed[node] != number] + ahead
        # Sorting is stable, and what a node reads is needed no later than the node.
        free = sorted((node for node in pool if since[node] <= number), key=until.__getitem__)
        due = sum(until[node] <= number for node in free)
        work = dict.fromkeys(free[: max(due, (len(free) + 1) // 2)])
        order += work
        pool = [node for node in pool if node not in work]
    return order + pool


def _spans(
    nodes: Sequence[_Node], collectives: Sequence[_Node], fixed: Mapping[_Node, int]
) -> tuple[dict[_Node, int], dict[_Node, int]]:
    """For each node the number of the first collective that it may run under, and of the first that needs it.

    A wait may run where it is needed, or else after all; and so what reads it, after that. What is fixed stands before
    the collective of its number, as if that needed it.
    """
    made_by = {name: node for node in nodes for name in node.get_buffer_names()}
    reads = {node: {made_by[each.name] for each in node.unmet_dependencies if each.name in made_by} for node in nodes}
    numbers = {node: number for number, node in enumerate(collectives)}
    needed = {**dict.fromkeys(nodes, len(collectives)), **fixed}
    for node in reversed(nodes):
        for read in reads[node]:
            needed[read] = min(needed[read], numbers.get(node, needed[node]))
    since: dict[_Node, int] = {}
    for node in nodes:
        own = needed[node] if node in fixed or contains_wait(node) else 0
        since[node] = max([own, *(since[read] for read in reads[node])])
    return since, needed
