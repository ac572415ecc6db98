"""The passes in their order: which may be left out, and what is kept and told of each."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from sp_compile import rewritten_graphs
from sp_compile.config import Optional, SequenceParallelConfig
from sp_compile.errors import ConfigurationError
from sp_compile.pipeline import PASSES

from .equivalence import assert_equivalent, tokens
from .programs import PROGRAMS, Parts

NAMES = [each.name for each in PASSES]
CASES = {case.name: case for case in PROGRAMS if case.name in ("experts_sorted_and_back", "mixer", "one_piece")}
"""A program for each pass to do something: attention, experts, and what mixes without attention."""


def test_the_stages_of_a_graph_are_those_of_the_passes() -> None:
    assert_equivalent(Parts(Parts.block), [tokens(1, 9, 12)], parts=2)
    stages = dict(rewritten_graphs()[-1].stages)
    assert list(stages) == ["capture", "find_attention", "propagate", "insert_collectives", "pack_exchanges"]
    assert list(stages) == [name for name in NAMES if name in stages]
    assert stages["pack_exchanges"] == str(rewritten_graphs()[-1])


def test_what_may_be_left_out_is_in_the_pipeline() -> None:
    assert [name for name in NAMES if name in get_args(Optional)] == list(get_args(Optional))


@pytest.mark.parametrize("name", sorted({*NAMES} - {*get_args(Optional)} | {"packing"}))
def test_no_other_pass_can_be_left_out(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"option 'skip' is '{name}'"):
        SequenceParallelConfig(skip=[name])  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="It takes a list of names of passes"):
        SequenceParallelConfig(skip="find_attention")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", get_args(Optional))
@pytest.mark.parametrize("program", CASES)
def test_a_graph_is_right_without_a_pass(name: str, program: str) -> None:
    case = CASES[program]
    known = {graph.name for graph in rewritten_graphs()}
    assert_equivalent(
        case.module(), case.inputs(), parts=3, must_shard=False, options={"skip": [name]}, tolerance=case.tolerance
    )
    for graph in rewritten_graphs():
        if graph.name not in known:
            assert name not in dict(graph.stages)
            assert name not in graph.planned.seconds


def test_without_packing_each_value_goes_by_itself() -> None:
    def launches(**options: object) -> int:
        (graph,) = assert_equivalent(Parts(Parts.block), [tokens(1, 9, 12)], parts=2, options=options)
        nodes = graph.rewritten.graph.nodes
        return sum(isinstance(n.target, torch._ops.OpOverload) and "all_to_all" in n.target._opname for n in nodes)

    assert (launches(), launches(skip=["pack_exchanges"])) == (2, 4)


def test_nothing_of_a_call_is_kept() -> None:
    """A record lasts as long as the process: it holds no input and no group."""
    assert_equivalent(Parts(Parts.block), [tokens(1, 9, 12)], parts=2)
    planned = rewritten_graphs()[-1].planned
    kept = [*vars(planned).values(), *vars(planned.captured).values()]
    real = [x for x in kept if isinstance(x, torch.Tensor)]
    real += [x for x in planned.captured.inputs if isinstance(x, torch.Tensor) and not hasattr(x, "fake_mode")]
    assert not real and not any(isinstance(x, torch.distributed.ProcessGroup) for x in kept)
