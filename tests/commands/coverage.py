"""What of each model of the zoo ran sharded: `python -m tests.commands.coverage [model …]`.

On 2 simulated ranks, with at least 64 tokens a rank. Coverage is the share of the forward's floating-point operations
(`sp_compile.planning.cost`) that the ranks divide among them; work in a graph that was not captured, or outside of
any graph, counts as not divided. `--why` lists what was not sharded and what was gathered, with the line of the model;
`--overloads` every ATen overload without a rule, and every fallback.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_flop
from transformers.integrations import moe  # noqa: F401  # registers the op below

from sp_compile import RewrittenGraph, rewritten_graphs
from sp_compile.errors import user_line
from sp_compile.ir.graph import GraphRules
from sp_compile.ir.plan import ShardingPlan
from sp_compile.planning.cost import Collective, contraction_flops, flops, peak_activation_bytes, planned_flops
from sp_compile.rules.registry import has_rule
from sp_compile.runtime.records import UnshardedGraph, unsharded_graphs

from ..equivalence import differences, step
from ..zoo import ZOO, Model, build, run_on_ranks

PARTS = 2


@register_flop_formula(torch.ops.transformers.grouped_mm_fallback)
def _grouped(left: Sequence[int], right: Sequence[int], *rest: Any, **named: Any) -> int:
    """`[T, i]` by `[experts, i, o]`, the rows in groups."""
    return 2 * left[0] * left[1] * right[-1]


AT_SITES = ("gather_seq_scatter_heads_", "gather_heads_scatter_seq")


@dataclass(frozen=True)
class Coverage:
    """One model with one attention implementation on `PARTS` ranks."""

    model: Model
    attention: str
    error: float
    """The largest relative error of an output, gradient or buffer on any rank."""
    rewritten: tuple[RewrittenGraph, ...]
    unsharded: tuple[UnshardedGraph, ...]
    uncaptured_flops: int
    """Contractions that one device does and no captured graph has."""

    @property
    def right(self) -> bool:
        return self.error <= self.model.tolerance

    @property
    def planned(self) -> Iterator[tuple[GraphRules, ShardingPlan]]:
        """The captured graphs with their plans."""
        for graph in self.rewritten:
            yield GraphRules(graph.captured.graph), graph.plan
        for each in self.unsharded:
            if each.plan is not None:
                yield GraphRules(each.graph_module.graph), each.plan

    @property
    def share(self) -> float:
        """The share of the work that is divided among the ranks."""
        counted = [planned_flops(rules, plan) for rules, plan in self.planned]
        sharded = sum(each.sharded for each in counted)
        return sharded / (sharded + sum(each.whole for each in counted) + self.uncaptured_flops)

    @property
    def regions_not_captured(self) -> int:
        return sum(each.plan is None for each in self.unsharded)

    @property
    def fallbacks(self) -> int:
        return sum(len(plan.fallbacks) for _, plan in self.planned)

    @property
    def peaks(self) -> tuple[int, int]:
        """Peak activation bytes on each rank, and on one device."""
        on_rank = [peak_activation_bytes(graph.rewritten.graph) for graph in self.rewritten]
        alone = [peak_activation_bytes(graph.captured.graph) for graph in self.rewritten]
        same = [peak_activation_bytes(each.graph_module.graph) for each in self.unsharded if each.plan is not None]
        return max([*on_rank, *same], default=0), max([*alone, *same], default=0)

    def elsewhere(self, *, gathers: bool) -> list[tuple[RewrittenGraph, Collective]]:
        """The collectives outside attention and outputs: those that make a value whole, or the others."""
        found = []
        for graph in self.rewritten:
            moved = {value.name for planned in graph.plan.sites for value in planned.moved}
            for each in graph.collectives:
                at_site = each.name.startswith(AT_SITES) or not moved.isdisjoint(each.sources)
                is_gather = each.op in ("all_gather", "all_gather_replicate") and not each.name.startswith("halo_")
                if is_gather == gathers and not at_site and not each.name.startswith("gather_output_"):
                    found.append((graph, each))
        return found


def measure(model: Model, attention: str) -> Coverage:
    """Run one step of a model on one device and on simulated ranks."""
    module, inputs = build(model, attention, model.long), model.inputs(model.long)
    total = contractions_of(copy.deepcopy(module), inputs)  # which writes to buffers
    alone = copy.deepcopy(module)
    torch.manual_seed(1)
    expected = step(alone, alone, (), inputs)
    known = {each.name for each in (*rewritten_graphs(), *unsharded_graphs())}
    got, rewritten = run_on_ranks(model, module, model.long, PARTS)
    unsharded = tuple(each for each in unsharded_graphs() if each.name not in known)
    captured = [graph.captured for graph in rewritten] + [e.graph_module for e in unsharded if e.plan is not None]
    counted = sum(contraction_flops(node) for each in captured for node in each.graph.nodes)
    error = max(differences(expected, got, PARTS).values())
    return Coverage(model, attention, error, tuple(rewritten), unsharded, max(0, total - counted))


def contractions_of(module: nn.Module, inputs: dict[str, Any]) -> int:
    """The contractions of one forward on one device."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={flash: _flash})
    with counter:
        module(**inputs)
    return int(counter.get_total_flops())


def _flash(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop(query, key, value))


def sites(result: Coverage) -> str:
    """The attention sites by strategy: `4 ulysses`."""
    counts = Counter(planned.strategy for _, plan in result.planned for planned in plan.sites)
    return ", ".join(f"{count} {strategy}" for strategy, count in counts.items())


COLUMNS = [
    "model",
    "family",
    "attention",
    "sites",
    "error",
    "coverage",
    "gathered",
    "other moves",
    "peak bytes",
    "of one device",
    "fallbacks",
    "not captured",
]


def row(result: Coverage) -> list[str]:
    on_rank, alone = result.peaks
    gathered = sum(each.bytes for _, each in result.elsewhere(gathers=True))
    moved = sum(each.bytes for _, each in result.elsewhere(gathers=False))
    return [
        result.model.name,
        result.model.family,
        result.attention,
        sites(result),
        f"{result.error:.0e}" if result.right else f"WRONG {result.error:.0e}",
        f"{100 * result.share:.1f}%",
        f"{gathered:,}",
        f"{moved:,}",
        f"{on_rank:,}",
        f"{on_rank / alone:.2f}" if alone else "",
        str(result.fallbacks),
        str(result.regions_not_captured),
    ]


def explain(result: Coverage, most: int = 12) -> Iterator[str]:
    """What was not sharded, and what was gathered."""
    for graph in result.unsharded:
        yield f"  {graph.name} unsharded: {graph.reason}"
    if result.uncaptured_flops:
        yield f"  {result.uncaptured_flops:,} FLOPs outside of captured graphs"
    for graph in result.rewritten:
        for planned in graph.plan.sites:
            if planned.strategy != "ulysses":
                at = planned.site.output
                yield f"  site {at}: {planned.strategy}, {planned.reason} ({user_line(at)})"
        for fallback in graph.plan.fallbacks:
            yield (
                f"  fallback {fallback.node} {_call(fallback.node)}: {fallback.reason}, {fallback.bytes:,} bytes "
                f"({user_line(fallback.node)})"
            )
    for graph, each in (*result.elsewhere(gathers=True), *result.elsewhere(gathers=False)):
        node = next(node for node in graph.rewritten.graph.nodes if node.name == each.name)
        users = ", ".join(f"{user} ({user_line(user)})" for user in list(node.users)[:2])
        sources = ", ".join(each.sources)
        yield f"  {each.op} {each.name} {_shape(node)}: {each.bytes:,} bytes, from {sources}, for {users}"
    whole = [
        (flops(node), node, plan)
        for rules, plan in result.planned
        for node in rules.graph.nodes
        if rules.is_activation(node) and rules.varies(node) and not (node in plan.nodes and plan.nodes[node].sharding)
    ]
    total = sum(count for count, *_ in whole)
    for count, node, plan in sorted(whole, key=lambda each: -each[0])[:most]:
        if count > total / 50:
            places = ", ".join(str(plan.placement(operand)) for operand in node.all_input_nodes)
            yield f"  whole {node} {_call(node)}: {count:,} FLOPs, operands {places} ({user_line(node)})"


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return str(list(value.shape)) if isinstance(value, Tensor) else ""


def _call(node: fx.Node) -> str:
    return f"{node.target}({', '.join(_shape(operand) for operand in node.all_input_nodes)})"


def overloads(results: Iterable[Coverage]) -> None:
    """Print every overload without a rule on tensors, how often and where; and every fallback."""
    missing: Counter[tuple[str, str]] = Counter()
    models: dict[tuple[str, str], set[str]] = defaultdict(set)
    fallbacks = []
    for result in results:
        for rules, plan in result.planned:
            for node in rules.graph.nodes:
                if rules.operands(node) and node.meta.get("val") is not None and rules.rule(node) is None:
                    why = "its rule refuses this call" if has_rule(node.target) else "no rule"
                    missing[str(node.target), why] += 1
                    models[str(node.target), why].add(result.model.name)
            for each in plan.fallbacks:
                fallbacks.append(
                    [
                        f"{result.model.name} {result.attention}",
                        each.node.target,
                        each.reason,
                        f"{each.bytes:,}",
                        user_line(each.node),
                    ]
                )
    rows = [[*key, count, ", ".join(sorted(models[key]))] for key, count in missing.most_common()]
    print(tabulate(rows, ["overload", "why", "count", "models"]), "\n")
    print(tabulate(fallbacks, ["model", "op", "reason", "bytes", "line"]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.commands.coverage", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="model", help="all, unless named")
    parser.add_argument("--markdown", action="store_true", help="the table as the README has it")
    parser.add_argument("--why", action="store_true", help="what was not sharded, and what was gathered")
    parser.add_argument("--overloads", action="store_true", help="overloads without a rule, and fallbacks")
    options = parser.parse_args(arguments)
    torch._logging.set_logs(all=logging.ERROR)
    logging.getLogger("sp_compile").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    results = []
    for name in options.models or ZOO:
        for attention in ZOO[name].attentions:
            results.append(measure(ZOO[name], attention))
            if options.why:
                print(" | ".join(row(results[-1])), *explain(results[-1]), sep="\n", flush=True)
    if options.overloads:
        overloads(results)
        return
    print(
        tabulate(
            map(row, results),
            COLUMNS,
            tablefmt="github" if options.markdown else "simple",
            disable_numparse=True,
            colalign=("left",) * 4 + ("right",) * (len(COLUMNS) - 4),
        )
    )


if __name__ == "__main__":
    main()
