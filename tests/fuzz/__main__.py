"""Run many random programs and print what became of them: see `tests.fuzz`.

Exits with an error if a program is wrong, or raises where one device does not, unless plain `torch.compile` does the
same on one device.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter

# Read when torch is first imported, here and in the workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tabulate import tabulate
from tqdm import tqdm

from ..gloo_pool import GlooPool
from .outcomes import (
    BATCH,
    INVALID,
    LOST,
    RAISES,
    RIGHT,
    UNDECIDED,
    WRONG,
    Outcome,
    batch,
    generated,
    planted,
    prepare,
    real,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--programs", type=int, default=5000, metavar="N", help="how many (5000)")
    parser.add_argument("--real", type=int, default=0, metavar="N", help="as many more on two real ranks (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the first ten; others follow it (0)")
    parser.add_argument("--planted", type=int, default=0, metavar="N", help="rather: mutants, on N programs at most")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    options = parser.parse_args()
    prepare()
    if options.planted:
        rows = planted(options.seed, options.planted)
        print(tabulate(rows, ["mutant", "noticed by program"], missingval="none"))
        return
    started = time.monotonic()
    outcomes: list[Outcome] = []
    tasks = [(BATCH, options.seed + at) for at in range(-(-options.programs // BATCH))]
    with multiprocessing.get_context("spawn").Pool(options.workers, prepare, maxtasksperchild=20) as workers:
        for made in tqdm(workers.imap_unordered(batch, tasks), total=len(tasks), desc="simulated"):
            outcomes += made
            report(made)
    if options.real:
        pool = GlooPool(2)
        for program in tqdm(list(generated(options.real, options.seed)), desc="real ranks"):
            outcomes.append(real(pool, program))
            report(outcomes[-1:])
        pool.close()
    counts = Counter(outcome.kind for outcome in outcomes)
    print(tabulate(sorted(counts.items()), ["outcome", "programs"]))
    print(f"{len(outcomes)} programs in {(time.monotonic() - started) / 60:.0f} minutes")
    sys.exit(any(counts[kind] for kind in (WRONG, RAISES, LOST)))


def report(outcomes: list[Outcome]) -> None:
    """Print the programs that are not right, as they can be run again."""
    for outcome in outcomes:
        if outcome.kind not in (RIGHT, INVALID, UNDECIDED):
            tqdm.write(f"{outcome.kind}: {outcome.program!r}\n  {outcome.said[:400]}", file=sys.stdout)


if __name__ == "__main__":
    main()
