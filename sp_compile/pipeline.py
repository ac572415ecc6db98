"""The passes over one graph, in their order: what each takes and gives, run and timed in one place.

Dynamo graph -> capture -> outline_experts -> find_attention -> find_mixers -> propagate
             -> insert_collectives -> set_local_values -> pack_exchanges -> inner backend
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing

from .capture.capture import CapturedGraph, capture
from .config import SequenceParallelConfig
from .distributed.sharded_input import ShardedInput
from .errors import CaptureError, user_line
from .ir.graph import GraphRules
from .ir.plan import AttentionSite, ShardedGraph, ShardingPlan, SiteOperand
from .ir.printing import format_graph
from .passes.find_attention import find_attention
from .passes.find_mixers import find_mixers
from .passes.insert_collectives import insert_collectives
from .passes.outline_experts import outline_experts
from .passes.pack_exchanges import pack_exchanges
from .passes.propagate import propagate
from .passes.set_local_values import set_local_values
from .placement.placements import Sharded, size_of, whole_layout
from .rules import stays_whole


@dataclass(frozen=True)
class Given:
    """What a graph is planned from, and nothing keeps afterwards."""

    graph_module: fx.GraphModule
    """By Dynamo."""
    example_inputs: Sequence[Any]
    config: SequenceParallelConfig
    group_name: str


@dataclass
class PlannedGraph:
    """A graph on its way to the inner backend, as far as the passes have brought it."""

    parts: int
    """P, the number of ranks."""
    captured: CapturedGraph = field(init=False)
    rules: GraphRules = field(init=False)
    """Of the captured graph."""
    cut: Mapping[fx.Node, Sharded] = field(default_factory=dict)
    """The inputs of which each rank holds its rows."""
    sites: tuple[AttentionSite, ...] = ()
    mixers: tuple[SiteOperand, ...] = ()
    """What else mixes a sequence, in a graph without attention."""
    plan: ShardingPlan = field(init=False)
    unpacked: ShardedGraph | None = None
    """As `insert_collectives` wrote it. None: there is nothing to shard."""
    sharded: ShardedGraph | None = None
    """As it is compiled."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What each pass took that was run."""

    def stages(self) -> list[tuple[str, str]]:
        """(pass, what it made or found as text) of every pass that made or found something, in order."""
        made = [(each.name, each.text(self)) for each in PASSES if each.text is not None and each.name in self.seconds]
        return [(name, text) for name, text in made if text]

    def text(self) -> str:
        """The graph as it is compiled."""
        assert self.sharded is not None
        return _sharded_text(self, self.sharded)

    def notes(self) -> dict[str, str]:
        """The captured graph with what an analysis found beside its nodes, by the name of the pass."""
        in_site = {node: f"site {number}" for number, site in enumerate(self.sites) for node in site.nodes}
        mixing = {each.node: f"mixes dim {each.dim} of {_operand_name(each, self.rules)}" for each in self.mixers}
        return {
            "find_attention": format_graph(self.captured.graph_module, lambda node: in_site.get(node, "")),
            "find_mixers": format_graph(self.captured.graph_module, lambda node: mixing.get(node, "")),
        }


@dataclass(frozen=True)
class Pass:
    """One step of the pipeline."""

    name: str
    run: Callable[[PlannedGraph, Given], None]
    """Takes from the graph what earlier passes left in it, and leaves there what it makes itself."""
    text: Callable[[PlannedGraph], str] | None = None
    """What it made, for whoever asks. None: what it makes is seen in the text of another."""


def plan_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: SequenceParallelConfig,
    group_name: str,
    parts: int,
) -> PlannedGraph:
    """Run the passes in their order, for P = `parts`, but for those that the option `skip` names.

    Raises `CaptureError`, but for a graph with nothing to shard.
    """
    planned, given = PlannedGraph(parts), Given(gm, example_inputs, config, group_name)
    with _apart_from_the_program():
        for each in PASSES:
            if each.name not in config.skip:
                started = time.perf_counter()
                each.run(planned, given)
                planned.seconds[each.name] = time.perf_counter() - started
    return planned


@contextmanager
def _apart_from_the_program() -> Iterator[None]:
    """Planning runs ops on fake tensors: the hooks that the user has on saved tensors, those of a checkpoint say, are
    not called for them, and anomaly mode does not look for NaN in them.

    Nor is garbage collected: what a pass makes stays, and to walk all the graphs of the process takes a third of the
    time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        with _disable_saved_tensors_hooks_during_tracing(), torch.autograd.set_detect_anomaly(False):
            yield
    finally:
        if was_on:
            gc.enable()


# What each pass takes and gives.


def _capture(planned: PlannedGraph, given: Given) -> None:
    planned.captured = capture(given.graph_module, given.example_inputs, stays_whole)
    planned.rules = _rules_of(planned.captured)
    planned.cut = _sharded_inputs(planned.captured, given.example_inputs)


def _outline_experts(planned: PlannedGraph, given: Given) -> None:
    if outline_experts(planned.captured.graph_module, planned.rules):
        planned.rules = _rules_of(planned.captured)


def _find_attention(planned: PlannedGraph, given: Given) -> None:
    planned.sites = find_attention(planned.rules)


def _find_mixers(planned: PlannedGraph, given: Given) -> None:
    if not planned.sites:
        planned.mixers = find_mixers(planned.rules)


def _propagate(planned: PlannedGraph, given: Given) -> None:
    refusal, config = planned.captured.refusal, given.config
    if refusal and (planned.cut or (planned.captured.output_names and (planned.sites or planned.mixers))):
        raise CaptureError(refusal)
    if refusal:
        planned.sites, planned.mixers = (), ()  # nothing to shard, or what an optimizer does, which returns nothing
    planned.plan = propagate(
        planned.rules,
        planned.sites,
        planned.mixers,
        planned.parts,
        config.attention,
        planned.cut,
        config.links,
    )


def _insert_collectives(planned: PlannedGraph, given: Given) -> None:
    if planned.plan.shards:
        planned.sharded = planned.unpacked = insert_collectives(
            planned.captured.graph_module,
            planned.rules,
            planned.plan,
            given.group_name,
            given.config.output_kinds(planned.captured.output_names),
            rng=given.config.rng,
            local_gradients=given.config.param_grads == "local",
        )


def _set_local_values(planned: PlannedGraph, given: Given) -> None:
    if planned.unpacked is not None:
        captured = planned.captured
        set_local_values(planned.unpacked, captured.graph_module.graph, captured.inputs, planned.cut, planned.parts)


def _pack_exchanges(planned: PlannedGraph, given: Given) -> None:
    if planned.unpacked is not None:
        planned.sharded = pack_exchanges(planned.unpacked)


def _sharded_inputs(captured: CapturedGraph, example_inputs: Sequence[Any]) -> dict[fx.Node, Sharded]:
    """Raises `CaptureError` for one that the graph writes to."""
    cut: dict[fx.Node, Sharded] = {}
    placeholders = captured.graph_module.graph.find_nodes(op="placeholder")
    for index, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        if isinstance(value, ShardedInput):
            if index in captured.mutated_inputs:
                raise CaptureError(f"the graph writes to the sharded input {node.name}")
            size = size_of(captured.inputs[index].shape[value.sharded_dim])
            cut[node] = Sharded(value.sharded_dim, whole_layout(size))
    return cut


def _rules_of(captured: CapturedGraph) -> GraphRules:
    return GraphRules(captured.graph_module.graph, captured.replicated)


# What each pass made, as text.


def _captured_text(planned: PlannedGraph) -> str:
    return format_graph(planned.captured.graph_module)


def _sites_text(planned: PlannedGraph) -> str:
    return "\n".join(_site_text(site, planned.rules) for site in planned.sites) or "no attention"


def _site_text(site: AttentionSite, rules: GraphRules) -> str:
    names = ", ".join(
        f"{role} {_operand_name(end, rules)} (dim {end.dim})"
        for role, end in (("query", site.query), ("key", site.key), ("value", site.value))
    )
    return f"{' '.join(node.name for node in site.nodes)}: {names}  # {user_line(site.output)}"


def _mixers_text(planned: PlannedGraph) -> str:
    return "\n".join(
        f"{mixer.node.name}: {_operand_name(mixer, planned.rules)} (dim {mixer.dim})  # {user_line(mixer.node)}"
        for mixer in planned.mixers
    )


def _operand_name(operand: SiteOperand, rules: GraphRules) -> str:
    return rules.operands(operand.node)[operand.index].name


def _plan_text(planned: PlannedGraph) -> str:
    return format_graph(planned.captured.graph_module, partial(_placement_text, planned.plan))


def _placement_text(plan: ShardingPlan, node: fx.Node) -> str:
    if node not in plan.nodes:
        return ""
    own = plan.nodes[node]
    made, seen = ", ".join(map(str, own.results())), ", ".join(map(str, own.delivered))
    return made if made == seen or not own.sharding else f"{made}, then {seen}"


def _unpacked_text(planned: PlannedGraph) -> str:
    return _sharded_text(planned, planned.unpacked)


def _packed_text(planned: PlannedGraph) -> str:
    return _sharded_text(planned, planned.sharded)


def _sharded_text(planned: PlannedGraph, sharded: ShardedGraph | None) -> str:
    if sharded is None:
        return ""
    shapes = {node.name: node.meta.get("val") for node in planned.rules.graph.nodes}
    return format_graph(sharded.graph_module, origin=sharded.origins, whole=shapes)


PASSES = (
    Pass("capture", _capture, _captured_text),
    Pass("outline_experts", _outline_experts),
    Pass("find_attention", _find_attention, _sites_text),
    Pass("find_mixers", _find_mixers, _mixers_text),
    Pass("propagate", _propagate, _plan_text),
    Pass("insert_collectives", _insert_collectives, _unpacked_text),
    Pass("set_local_values", _set_local_values),
    Pass("pack_exchanges", _pack_exchanges, _packed_text),
)
"""In the order in which a graph takes them."""
