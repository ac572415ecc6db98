"""Programs of the table on real ranks, lowered: values and gradients on each, and that a planted wrong shows there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from sp_compile import sp_backend

from .commands.mutants import MUTANTS
from .equivalence import differences, known_graphs, rewritten_since, step
from .gloo_pool import GlooPool
from .programs import PROGRAMS, Program
from .programs.table import X
from .test_states import Kept, averaged_rows

pytestmark = pytest.mark.slow

WRITTEN = Program("averaged_rows", partial(Kept, averaged_rows), (X,), 3)
"""Not the table's `buffer`: AOTAutograd of torch 2.13 loses what is written to a float64 scalar, on one device, too."""

ON_TWO = ["eager_softcap", "mask_b1ss_additive", "topk_tokens", "swin", "ce_valid_on_the_last_rank", "averaged_rows"]
ON_THREE = ["gqa_6_heads_2_groups", "rope_complex", "fourier", "joint_short", "two_heads_on_four"]
ON_THREE += ["reciprocal_of_positions"]


def beside_one_device(names: Sequence[str], inner: str, mutant: str = "") -> dict[str, tuple[float, int]]:
    """The largest error of each program on this rank, and in how many graphs it was sharded."""
    found = {}
    for case in (case for name in names for case in (*PROGRAMS, WRITTEN) if case.name == name):
        torch._dynamo.reset()
        torch.manual_seed(0)
        alone, inputs = case.module(), case.inputs()
        model, own, known = copy.deepcopy(alone), copy.deepcopy(inputs), known_graphs()
        options = {"inner_backend": inner, "attention": case.attention}
        expected = step(alone, alone, inputs, {})
        with MUTANTS[mutant]() if mutant else nullcontext():
            call = torch.compile(model, backend=partial(sp_backend, options=options), dynamic=case.dynamic)
            got = step(call, model, own, {})
        found[case.name] = max(differences(expected, got, 1).values()), len(rewritten_since(known))
    return found


def assert_right(pool: GlooPool, names: Sequence[str], inner: str) -> None:
    for found in pool.run(beside_one_device, names, inner):
        assert [*found] == [*names] and all(graphs for _, graphs in found.values())
        assert not {name: error for name, (error, _) in found.items() if not error < 1e-9}


def test_programs_on_two_ranks(gloo2: GlooPool) -> None:
    assert_right(gloo2, ON_TWO, "aot_eager")


def test_programs_on_three_ranks(gloo3: GlooPool) -> None:
    assert_right(gloo3, ON_THREE, "aot_eager")


def test_programs_with_inductor(gloo2: GlooPool) -> None:
    assert_right(gloo2, ["gqa_6_heads_2_groups", "reciprocal_of_positions"], "inductor")


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        ("padded rows not zeroed in the backward of an all-to-all", "joint_short"),
        ("cross_entropy: padded rows have class 0", "ce_valid_on_the_last_rank"),
        ("no replicate backward", "mask_b1ss_additive"),
    ],
)
def test_a_planted_wrong_is_noticed(mutant: str, name: str, gloo3: GlooPool) -> None:
    for found in gloo3.run(beside_one_device, [name], "eager", mutant):
        assert found[name][0] > 1e-3 and found[name][1]
