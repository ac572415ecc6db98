"""Small programs, each on one device and on P simulated ranks: outputs, all gradients and buffers, on every rank.

Lengths, heads and widths that P does not divide; sizes that are equal where nothing says so (batch == length). Every
program has to shard. Doing nothing is right everywhere, so each also says what it moves: nothing is gathered whole,
except outputs and what `whole` excuses, and `moves` counts the collectives of one forward.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sp_compile import rewritten_graphs, sp_backend

from .equivalence import assert_equivalent, differences, step
from .programs import PROGRAMS, Parts, Program, moved
from .simulation import simulate


@pytest.mark.parametrize("case", PROGRAMS, ids=lambda case: case.name)
def test_program_is_right_on_every_rank(case: Program) -> None:
    module = case.module()
    inputs = [
        torch.randn(a, dtype=torch.float64, requires_grad=True) if isinstance(a, tuple) else a() for a in case.arguments
    ]
    graphs = assert_equivalent(module, inputs, parts=case.parts, dynamic=case.dynamic, must_shard=case.shards)
    total = sum(map(moved, graphs), Counter[str]())
    if not case.whole:
        assert not [str(fallback.node) for graph in graphs for fallback in graph.plan.fallbacks]
        assert not total["all_gather"]
    if case.moves:
        assert total == case.moves


@pytest.mark.parametrize("parts", [2, 4])
def test_one_graph_serves_all_lengths(parts: int) -> None:
    def body(m: Parts, x: Tensor) -> Any:
        return m.block(m.block(x, is_causal=True)).sum(1) / x.shape[1]

    alone, module = Parts(body), Parts(body)
    module.load_state_dict(alone.state_dict())
    before = {id(graph) for graph in rewritten_graphs()}
    with simulate(parts):
        compiled = torch.compile(module, backend=partial(sp_backend, options={"inner_backend": "eager"}), dynamic=True)
        for length in (13, 7, 16, 5, 3, 29, 40, 12, 6, 2):
            x = torch.randn(3, length, 12, dtype=torch.float64, requires_grad=True)
            errors = differences(step(alone, alone, [x], {}), step(compiled, module, [x], {}), parts)
            assert max(errors.values()) < 1e-9, length
    assert len([graph for graph in rewritten_graphs() if id(graph) not in before]) == 1
