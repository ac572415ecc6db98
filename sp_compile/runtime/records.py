"""What happened to a graph, kept: `rewritten_graphs()`, `TORCH_LOGS="+sp_compile"`, the `dump` folder, tlparse."""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter, deque
from dataclasses import dataclass
from difflib import unified_diff
from functools import cached_property, partial
from pathlib import Path

from torch import fx
from torch._logging._internal import trace_log, trace_structured

from ..ir.graph import GraphRules
from ..ir.plan import ShardedGraph, ShardingPlan
from ..ir.printing import format_graph
from ..pipeline import PlannedGraph
from ..planning.cost import Collective, collectives, planned_flops

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewrittenGraph:
    """One graph that was sharded."""

    name: str
    planned: PlannedGraph
    """What each pass made of it."""
    rewritten: fx.GraphModule
    """With collectives and local shapes; the last input is `sp_rank`."""
    collectives: tuple[Collective, ...]
    """What it moves in one forward, in order."""
    text: str
    """What `rewritten` was before the inner backend had it."""

    @property
    def captured(self) -> fx.GraphModule:
        """As Dynamo gave it, in ATen ops with global shapes."""
        return self.planned.captured.graph_module

    @property
    def rules(self) -> GraphRules:
        """The rules of the captured graph."""
        return self.planned.rules

    @property
    def plan(self) -> ShardingPlan:
        return self.planned.plan

    @property
    def sharded(self) -> ShardedGraph:
        """What the last pass gave: which captured value each rewritten node holds."""
        assert self.planned.sharded is not None
        return self.planned.sharded

    @cached_property
    def stages(self) -> tuple[tuple[str, str], ...]:
        """(pass, the graph after it as text), in order."""
        *before, (last, _) = self.planned.stages()
        return (*before, (last, self.text))

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class UnshardedGraph:
    """One graph that runs as Dynamo gave it."""

    name: str
    graph_module: fx.GraphModule
    """In ATen ops if it was captured, else Dynamo's."""
    plan: ShardingPlan | None
    """A plan that shards nothing; None: the graph was not captured."""
    reason: str


_rewritten: deque[RewrittenGraph] = deque(maxlen=256)
_unsharded: deque[UnshardedGraph] = deque(maxlen=256)
_numbers = itertools.count()


def rewritten_graphs() -> list[RewrittenGraph]:
    """The graphs that `sp_backend` rewrote in this process, in order; the last 256 of them."""
    return list(_rewritten)


def unsharded_graphs() -> list[UnshardedGraph]:
    """The graphs that `sp_backend` left as they are, on more than one rank; the last 256 of them."""
    return list(_unsharded)


def record_unsharded(graph_module: fx.GraphModule, plan: ShardingPlan | None, reason: str) -> UnshardedGraph:
    """Keep a graph that is not rewritten."""
    graph = UnshardedGraph(f"graph_{next(_numbers)}", graph_module, plan, reason)
    _unsharded.append(graph)
    return graph


def record(given: fx.GraphModule, planned: PlannedGraph, folder: str | os.PathLike[str] | None) -> RewrittenGraph:
    """Keep what the passes did to the graph `given` by Dynamo; log it where somebody asks, and dump it to a folder."""
    name, sharded = f"graph_{next(_numbers)}", planned.sharded
    assert sharded is not None
    moved = collectives(sharded.graph_module.graph, planned.parts)
    graph = RewrittenGraph(name, planned, sharded.graph_module, moved, planned.text())
    if log.isEnabledFor(logging.DEBUG) or trace_log.handlers:
        for number, (stage, text) in enumerate(graph.stages):
            title = f"{name}.{number}_{stage}"
            log.debug("%s\n%s", title, text)
            trace_structured(
                "artifact",
                metadata_fn=partial(dict, name=f"sp_compile_{title}", encoding="string"),
                payload_fn=partial(str, text),
            )
    if folder is not None:
        _dump(given, graph, Path(folder))
    _rewritten.append(graph)
    return graph


def _dump(given: fx.GraphModule, graph: RewrittenGraph, folder: Path) -> None:
    """Write the text of every stage to a folder, and what it changed as a diff.

    An analysis leaves the graph as it is: its diff is what it noted of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    noted = graph.planned.notes()
    graphs = [("dynamo", format_graph(given))]
    graphs += [(stage, noted.get(stage, text)) for stage, text in graph.stages]
    for number, (stage, text) in enumerate(graph.stages):
        (before, old), (after, new) = graphs[number : number + 2]
        difference = unified_diff(old.splitlines(), new.splitlines(), before, after, lineterm="")
        (folder / f"{graph.name}.{number}_{stage}.txt").write_text(text + "\n")
        (folder / f"{graph.name}.{number}_{stage}.diff").write_text("\n".join(difference) + "\n")


def log_summary(name: str, planned: PlannedGraph) -> None:
    """The line that a compiled graph is at INFO; all else that is no warning is at DEBUG."""
    if not log.isEnabledFor(logging.INFO):
        return
    plan, sharded = planned.plan, planned.sharded
    strategies = Counter(site.strategy for site in plan.sites)
    moved = collectives(sharded.graph_module.graph, plan.parts) if sharded else ()
    log.info(
        "%s on %d ranks: %s; %d collectives, %s bytes received per rank, forward; %.1f%% of FLOPs sharded; "
        "%d fallbacks; planned in %.2f s",
        name,
        plan.parts,
        "attention sites: " + (", ".join(f"{n} {name}" for name, n in strategies.items()) or "none"),
        len(moved),
        f"{sum(each.bytes for each in moved):,}",
        100 * planned_flops(planned.rules, plan).coverage if sharded else 0.0,
        len(plan.fallbacks),
        sum(planned.seconds.values()),
    )
