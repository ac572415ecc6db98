"""What becomes of random programs, on simulated ranks and on real ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from tqdm import tqdm

from sp_compile import sp_backend
from sp_compile.tools.comparison import Step, compare, step
from sp_compile.tools.verify import run_alone

from ..commands.mutants import MUTANTS
from ..gloo_pool import GlooPool, RankDied, RankTimeout, collect_rarely
from .programs import Differs, RandomProgram, Undecided, programs

RIGHT, INVALID, TORCH = "right", "not valid on one device", "wrong or refused by plain torch.compile too"
UNDECIDED = "too sensitive to rounding, or not for simulated ranks"
WRONG, RAISES, LOST = "WRONG", "RAISES", "RANKS LOST"
BATCH = 10
"""Programs that a worker runs between two reports."""


class Outcome(NamedTuple):
    kind: str
    program: RandomProgram
    said: str = ""


def generated(number: int, start: int) -> Iterator[RandomProgram]:
    """That many programs, which a seed tells apart from others."""
    made: list[RandomProgram] = []

    @seed(start)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def collect(program: RandomProgram) -> None:
        made.append(program)

    collect()
    yield from made[:number]


def simulated(program: RandomProgram) -> Outcome:
    """What becomes of a program on simulated ranks."""
    if not program.is_valid():
        return Outcome(INVALID, program)
    try:
        program.check()
    except Undecided as error:
        return Outcome(UNDECIDED, program, str(error))
    except Differs as error:
        plain = plain_differs(program, "eager")
        return Outcome(TORCH if plain is None or error.names <= plain else WRONG, program, str(error))
    except Exception as error:
        kind = TORCH if plain_differs(program, "eager") is None else RAISES
        return Outcome(kind, program, f"{type(error).__name__}: {error}")
    return Outcome(RIGHT, program)


def plain_differs(program: RandomProgram, backend: str) -> frozenset[str] | None:
    """What `torch.compile` without us gives otherwise than one device does uncompiled; None: it raises."""
    tolerance = 5e-2 if program.single else 1e-8
    try:
        with program.autocast():
            expected = run_alone((program.module(), program.inputs(), {}))
            errors = compare(expected, compiled_alone(program, backend), 1, tolerance)
    except Exception:  # of any kind: it is torch's
        return None
    return frozenset(name for name, (error,) in errors.items() if not error <= tolerance)


def compiled_alone(program: RandomProgram, backend: str) -> Step:
    torch._dynamo.reset()
    model = program.module()
    call: Callable[..., Any] = torch.compile(model, backend=backend, dynamic=True if program.dynamic else None)
    return step(call, model, program.inputs(), {})


def real(pool: GlooPool, program: RandomProgram) -> Outcome:
    """What becomes of a program on two real ranks, compiled by AOTAutograd."""
    if not program.is_valid():
        return Outcome(INVALID, program)
    try:
        errors = max(pool.run(errors_on_this_rank, program, timeout=120.0))
    except (RankDied, RankTimeout) as error:
        return Outcome(LOST, program, str(error))
    except Exception as error:
        kind = TORCH if plain_differs(program, "aot_eager") is None else RAISES
        return Outcome(kind, program, f"{type(error).__name__}: {error}")
    if program.single and 5e-2 < errors < float("inf"):
        return Outcome(UNDECIDED, program, f"an error of {errors:.1e}")
    if errors > (5e-2 if program.single else 1e-8):
        kind = TORCH if plain_differs(program, "aot_eager") != frozenset() else WRONG
        return Outcome(kind, program, f"an error of {errors:.1e}")
    return Outcome(RIGHT, program)


def batch(task: tuple[int, int]) -> list[Outcome]:
    """The programs of one seed, simulated."""
    number, start = task
    return [simulated(program) for program in generated(number, start)]


def prepare() -> None:
    """Of a worker: warnings of what runs on gathered values are not what is looked for."""
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    collect_rarely()


def planted(start: int, most: int) -> list[list[object]]:
    """For each mutant how many random programs it takes to notice it; None: `most` do not."""
    rows: list[list[object]] = []
    for name, broken in tqdm(MUTANTS.items(), desc="mutants"):
        count: int | None = None
        with broken():
            for number, program in enumerate(generated(most, start), 1):
                if simulated(program).kind in (WRONG, RAISES):
                    count = number
                    break
        rows.append([name, count])
    return rows


def errors_on_this_rank(program: RandomProgram, inner: str = "aot_eager") -> float:
    """The largest error of what this rank gets, beside one device without compilation."""
    logging.disable(logging.ERROR)
    model, inputs = program.module(), program.inputs()
    options: dict[str, Any] = {"inner_backend": inner}
    dynamic = True if program.dynamic else None
    with program.autocast():
        expected = run_alone((program.module(), inputs, {}))
        call = torch.compile(model, backend=partial(sp_backend, options=options), dynamic=dynamic)
        errors = compare(expected, step(call, model, inputs, {}), 1, 5e-2 if program.single else 1e-8)
    return max(error for of_value in errors.values() for error in of_value)
