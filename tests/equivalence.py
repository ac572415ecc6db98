"""One device against P simulated ranks, as `verify` compares them, with the random numbers and options of the test."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sp_compile import RewrittenGraph, rewritten_graphs
from sp_compile.placement.placements import REPLICATED, Sharded
from sp_compile.runtime.records import unsharded_graphs
from sp_compile.tools.comparison import Step, compare, step
from sp_compile.tools.verify import first_divergence_of, run_alone
from sp_compile.tools.verify import run_simulated as simulated

__all__ = [
    "Step",
    "assert_equivalent",
    "collectives",
    "compared",
    "differences",
    "gradient_errors",
    "known_graphs",
    "rewritten_since",
    "run_simulated",
    "step",
    "tokens",
    "unsummed",
]


def tokens(*shape: int) -> Tensor:
    """`[B, S, C]`, or any other shape, at random; it takes a gradient."""
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def differences(expected: Step, got: Step, parts: int, tolerance: float = 1e-9) -> dict[str, float]:
    """The largest error of each value over all ranks."""
    return {name: max(errors) for name, errors in compare(expected, got, parts, tolerance).items()}


def run_simulated(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    parts: int = 2,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> tuple[Step, list[RewrittenGraph]]:
    """One step of a copy of the module on P simulated ranks; and the graphs that were rewritten."""
    program = (module, tuple(args), dict(kwargs or {}))
    with simulated(program, parts, options or {}, dynamic) as ran:
        return ran.step, list(ran.graphs)


def compared(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    parts: int = 2,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    tolerance: float = 1e-9,
) -> tuple[dict[str, float], list[RewrittenGraph]]:
    """The largest error of each value over all ranks, and the rewritten graphs."""
    program = (module, tuple(args), dict(kwargs or {}))
    expected = run_alone(program)
    with simulated(program, parts, options or {}, dynamic, expected.written) as ran:
        return differences(expected, ran.step, parts, tolerance), list(ran.graphs)


def assert_equivalent(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    parts: int = 2,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    tolerance: float = 1e-9,
    must_shard: bool = True,
) -> list[RewrittenGraph]:
    """Every rank gets what one device gives. Returns the rewritten graphs, for what they moved."""
    errors, graphs = compared(module, args, kwargs, parts, options, dynamic, tolerance)
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        program = (module, tuple(args), dict(kwargs or {}))
        settings, written = options or {}, run_alone(program).written
        found, _ = first_divergence_of(program, parts, settings, dynamic, written, tolerance)
        raise AssertionError(f"P={parts}: {wrong}\n{found}")
    assert graphs or not must_shard, "nothing was sharded"
    assert not [edge for graph in graphs for edge in unsummed(graph)]
    return graphs


SUMMED = (torch.ops.sp.replicate.default, torch.ops.sp.scale_gradient.default)
"""What has the gradient of a replicated value summed over the ranks, by us or by the DDP of the user."""


def unsummed(graph: RewrittenGraph) -> list[str]:
    """The edges that break the law of gradients.

    A replicated value that takes a gradient, on its way into work sharded on a factor which it lacks, has to pass one
    of `SUMMED`: each rank has a term of its gradient. What is added to a sum over ranks is added once, with all of it.
    """
    rules, plan, sharded, found = graph.rules, graph.plan, graph.planned.unpacked, []
    assert sharded is not None
    whole = {name: value for name, value, placement in sharded.values if placement == REPLICATED}
    captured = {node.name: node for node in rules.graph.nodes}
    for node in sharded.graph_module.graph.nodes:
        source = captured.get(sharded.origins.get(node.name, ""))
        own, rule = (plan.nodes.get(source), rules.rule(source)) if source is not None else (None, None)
        if own is None or own.sharding is None or rule is None or getattr(node.target, "namespace", "") == "sp":
            continue
        once = rule.additive if not any(isinstance(each, Sharded) for each in own.results()) else frozenset()
        operands = enumerate(own.sources.get(at, value) for at, value in enumerate(rules.operands(source)))
        lacking = [v for at, v in operands if own.operand(at) == REPLICATED and at not in once | rule.metadata]
        found += [
            f"{given} -> {node}"
            for given in node.all_input_nodes
            if captured.get(whole.get(given.name, "")) in rules.trained.intersection(lacking)
            and given.target not in SUMMED
        ]
    return found


def gradient_errors(expected: nn.Module, got: nn.Module) -> dict[str, float]:
    """The largest difference of each gradient, relative to the largest gradient norm; inf: one is None."""
    norm = max(float(p.grad.norm()) for p in expected.parameters() if p.grad is not None)
    errors = {}
    for (name, one), other in zip(expected.named_parameters(), got.parameters(), strict=True):
        if one.grad is None or other.grad is None:
            errors[name] = 0.0 if one.grad is other.grad else float("inf")
        else:
            errors[name] = float((one.grad - other.grad).abs().max()) / norm
    return errors


def known_graphs() -> set[str]:
    """The names of the graphs so far, rewritten and unsharded: the last of them, as they are kept."""
    return {graph.name for graph in (*rewritten_graphs(), *unsharded_graphs())}


def rewritten_since(known: Collection[str]) -> list[RewrittenGraph]:
    """The graphs that were rewritten since `known_graphs()`."""
    return [graph for graph in rewritten_graphs() if graph.name not in known]


def collectives(graph: RewrittenGraph) -> list[str]:
    """The names of the nodes that move data, in order."""
    return [each.name for each in graph.collectives]
