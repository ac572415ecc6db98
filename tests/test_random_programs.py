"""Random programs on one device and on P simulated ranks, a few of them; `make fuzz` runs many."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings

from .commands.mutants import MUTANTS
from .fuzz.outcomes import INVALID, RAISES, WRONG, simulated
from .fuzz.programs import Differs, Draw, Ends, RandomProgram, programs


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
    outcome = simulated(program)
    assume(outcome.kind != INVALID)
    assert outcome.kind not in (WRONG, RAISES), outcome.said


SMALL = RandomProgram([], (2, 6, 12), (3, 4, 3), 2, False, Ends(6))

FOUND = {
    "a view that is made without gradients": SMALL._replace(
        steps=[Draw("flipped", 0, 0, 4, "no_grad")], shape=(2, 12, 12), dynamic=True
    ),
    "one row on each rank, and code behind the graph that asks how it lies in memory": SMALL._replace(
        steps=[Draw("class_tokens", 0, 0, 0), Draw("linear_attention", 1, 3, 2), Draw("cross_from_few", 1, 0, 2)],
        shape=(3, 2, 12),
        parts=3,
        ends=Ends(8, ("alias", "last", "flat"), (1,)),
        trained=False,
    ),
    "an input of simulated ranks that is not contiguous": SMALL._replace(
        steps=[Draw("fourier", 0, 1, 2), Draw("block", 0, 1, 5)],
        shape=(3, 6, 12),
        ends=Ends(6, ("transposed", "flat", "heads"), (4,)),
        trained=False,
    ),
    "no row before a cut that is a symbol": SMALL._replace(
        steps=[Draw("swapped_halves", 0, 2, 0), Draw("block", 0, 1, 3, "break")], dynamic=True, trained=False
    ),
    "no row before it, and its gradient": SMALL._replace(
        steps=[Draw("class_tokens", 0, 3, 1, "break"), Draw("swapped_halves", 1, 1, 0)], parts=4, dynamic=True
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_random_programs_have_found(name: str) -> None:
    FOUND[name].check()


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
    with MUTANTS[mutant](), pytest.raises(Differs, match=r"(?s)P=2: .*grad o\.weight"):
        program.check()
