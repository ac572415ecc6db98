"""What the passes take grows as the graph does, and not with the ranks.

Counted in function calls, which are the same in every run; seconds depend on what else the machine does.
"""

from __future__ import annotations

import cProfile
import gc
import pstats
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from sp_compile import pipeline
from sp_compile.config import SequenceParallelConfig
from sp_compile.ir.graph import GraphRules
from sp_compile.ir.plan import AttentionSite
from sp_compile.passes import find_attention
from sp_compile.tools.simulation import fake_world

HEADS = 64
PASSES = {"capture", "find_attention", "propagate", "insert_collectives", "set_local_values", "pack_exchanges"}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(HEADS), nn.Linear(HEADS, 3 * HEADS), nn.Linear(HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(1, -1, 3, HEADS, 1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x + self.out(mixed).relu()


def calls_of_passes(layers: int, parts: int = 2) -> dict[str, int]:
    """How many functions each pass calls for a model of some layers, on `parts` ranks of 2 rows or more."""
    calls: dict[str, int] = {}

    def count(each: pipeline.Pass, *args: Any) -> None:
        profile = cProfile.Profile()
        profile.runcall(each.run, *args)
        calls[each.name] = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]

    def plan(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
        assert pipeline.plan_graph(gm, example_inputs, SequenceParallelConfig(), "0", parts).sharded is not None
        return gm

    counted = [replace(each, run=partial(count, each)) for each in pipeline.PASSES]
    torch._dynamo.reset()
    model = nn.Sequential(*(Layer() for _ in range(layers)))
    gc.collect()
    gc.disable()  # what other tests left calls functions when it goes
    with fake_world(parts), patch.object(pipeline, "PASSES", counted):
        torch.compile(model, backend=plan, fullgraph=True)(torch.randn(1, 128, HEADS))
    gc.enable()
    assert calls.keys() == {*PASSES, "outline_experts", "find_mixers"}  # which find nothing to do here
    return calls


def growth(layers: int) -> Mapping[str, float]:
    """What each of twice as many more layers takes, by what each of some takes: 1 of a linear pass, 2 of a quadratic
    one."""
    calls_of_passes(2)  # what is imported and cached once
    few, some, many = (calls_of_passes(times * layers) for times in (1, 2, 4))
    return {name: (many[name] - some[name]) / 2 / (some[name] - few[name]) for name in PASSES}


def test_the_passes_are_linear_in_the_nodes() -> None:
    grown = growth(4)
    assert max(grown.values()) < 1.1, grown


def test_a_quadratic_pass_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def quadratic(rules: GraphRules) -> tuple[AttentionSite, ...]:
        for node in rules.graph.nodes:
            assert [isinstance(other, type(node)) for other in rules.graph.nodes]
        return find_attention(rules)

    monkeypatch.setattr(pipeline, "find_attention", quadratic)
    assert growth(4)["find_attention"] > 1.2


def test_the_passes_do_not_depend_on_the_number_of_ranks() -> None:
    # Of each the second time, when torch knows the fakes of these shapes.
    few, many = ([calls_of_passes(2, parts) for _ in range(2)][1] for parts in (2, 64))
    assert max(many[name] / few[name] for name in PASSES) < 1.2, (few, many)
