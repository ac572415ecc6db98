"""Random programs on one device and on P simulated ranks, a few of them; `make fuzz` runs many."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings

from .fuzz.programs import Draw, Ends, RandomProgram, TooSensitive, programs
from .mutants import MUTANTS


@settings(
    max_examples=24,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(programs())
def test_a_random_program_is_right_on_every_rank(program: RandomProgram) -> None:
    assume(program.is_valid())
    with suppress(TooSensitive):
        program.check()


@pytest.mark.parametrize(
    ("mutant", "step", "ends"),
    [
        ("softmax of local rows", "softmax_over_tokens", Ends(6)),
        ("halo: every rank reads the rows that rank 0 would", "causal_convolution", Ends(6)),
        ("cross_entropy: padded rows have class 0", "rolled", Ends(1)),
    ],
)
def test_a_planted_wrong_is_noticed(mutant: str, step: str, ends: Ends) -> None:
    program = RandomProgram([Draw("block", 0, 0, 0), Draw(step, 0, 1, 1)], (1, 7, 12), (3, 4, 3), 2, False, ends)
    program.check()
    with MUTANTS[mutant](), pytest.raises(AssertionError, match=r"(?s)P=2: .*grad o\.weight"):
        program.check()
