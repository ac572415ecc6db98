"""What ranks do when one of them fails: `python -m tests.faults [part of a name ...]`, a table, on three real ranks.

A fault strikes rank 1 in its second step, once all ranks have made one; or in the first, if it is one of compilation.
Then every rank goes on as a careless loop does: it catches what it can, and takes the next batch. Each loss and each
gradient that a rank is given is compared with that of one device on the batch that the rank has passed.

    ok           the rank took all its steps
    some Error   the first that it was told of, and the seconds after which it was
    ended        its process was killed or stopped by the fault, or left by an exception

What must not be: a step that hangs, a process that aborts, a wrong value.
"""

from __future__ import annotations

import argparse
import atexit
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate

from sp_compile import init_sequence_parallel
from sp_compile.guards import watch

from ..gloo_pool import collect_rarely
from .ranks import TIMEOUT, Rank
from .scripts import FAULTS

RANKS = 3

HUNG = 90.0
"""Seconds after which ranks that have not ended are said to hang; three times as many where Inductor compiles."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "torch._inductor.compile_fx", "tests.faults"])


@dataclass(frozen=True)
class Outcome:
    """What became of one rank."""

    what: str
    seconds: float = 0.0
    text: str = ""

    def __str__(self) -> str:
        return f"{self.what}, {self.seconds:.1f} s" if self.seconds else self.what


def outcomes_of(name: str, options: dict[str, Any] | None = None, show: bool = False) -> list[Outcome]:
    """Run a fault, with more options of the backend. Returns what became of each rank."""
    with tempfile.TemporaryDirectory(prefix="sp_faults_") as folder:
        # As the agent of torchrun: the store lives on when a rank does not.
        store = dist.TCPStore("127.0.0.1", 0, RANKS, True, wait_for_workers=False)
        ranks = [
            _CONTEXT.Process(target=_serve, args=(name, rank, folder, store.port, options or {}))
            for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + (3 * HUNG if FAULTS[name].inner == "inductor" else HUNG)
        for rank, process in enumerate(ranks):
            if not (rank == 1 and name.startswith("stopped")):
                process.join(max(0.0, deadline - time.monotonic()))
        hung = [process.is_alive() and not name.startswith("stopped") for process in ranks]
        for process in ranks:
            process.kill()
            process.join()
        found = []
        for rank, process in enumerate(ranks):
            path = Path(folder, f"rank {rank}")
            story = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            for what, text, seconds in story if show else ():
                print(f"    rank {rank}, {seconds:.1f} s: {what} {text}", file=sys.stderr)
            found.append(_outcome(story, process.exitcode or 0, hung[rank]))
    return found


def _outcome(story: Sequence[tuple[str, str, float]], status: int, hung: bool) -> Outcome:
    """What became of a rank: the worst of all, else the first that it was told."""
    wrong = [each for each in story if each[0] in ("wrong value", "hangs", "aborts")]
    told = [each for each in story if each[0] not in ("end", "went on")]
    if wrong:
        return Outcome(wrong[0][0], text=wrong[0][1])
    if status in (-signal.SIGABRT, -signal.SIGSEGV):
        return Outcome("aborts")
    if hung:
        return Outcome("hangs")
    if told:
        what, text, seconds = told[0]
        return Outcome(what, seconds, text)
    return Outcome("ok" if status == 0 else "ended")


def complaints(name: str, found: Sequence[Outcome]) -> list[str]:
    """What is not as it should be."""
    fault, wrong = FAULTS[name], []
    for rank, outcome in enumerate(found):
        expected = fault.struck if rank == 1 else fault.others
        if outcome.what not in expected.split("|"):
            wrong.append(f"rank {rank}: {outcome}, not {expected}. {outcome.text}")
        if outcome.seconds > fault.within:
            wrong.append(f"rank {rank}: told after {outcome.seconds:.1f} s, not {fault.within:g}")
    return wrong


def _serve(name: str, rank: int, folder: str, port: int, options: dict[str, Any]) -> None:
    """The process of a rank."""
    collect_rarely()
    torch.set_num_threads(1)
    os.chdir(folder)
    store = dist.TCPStore("127.0.0.1", port, RANKS, False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(minutes=5))
    init_sequence_parallel()
    fault = FAULTS[name]
    run = Rank(rank, Path(folder), options, fault.inner)
    if name.startswith("stopped"):
        watch.SILENT = TIMEOUT
    status = 0
    try:
        fault.script(run)
        run.tell("end")
    except SystemExit:  # of a forked child
        pass
    except Exception as error:
        run.tell("ended", f"{type(error).__name__}: {error}")
        sys.last_value, status = error, 1  # as the interpreter has it
    # An interpreter comes to its end so, which a process of `multiprocessing` does not.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def main() -> None:
    """Print the table. The status is 1 if something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names of faults; without any: all")
    parser.add_argument("--show", action="store_true", help="also what each rank was told, whole")
    given = parser.parse_args()
    names = [name for name in FAULTS if not given.names or any(part in name for part in given.names)]
    rows, wrong = [], []
    for name in names:
        started = time.monotonic()
        found = outcomes_of(name, show=given.show)
        bad = complaints(name, found)
        wrong += [f"{name}: {each}" for each in bad]
        rows.append([name, *map(str, found), "wrong" if bad else ""])
        print(f"{name}: {'; '.join(map(str, found))} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)
    print(tabulate(rows, ["fault, on rank 1", *(f"rank {rank}" for rank in range(RANKS)), ""]))
    print(f"\n{len(rows)} faults, {len(wrong)} outcomes that are not as they should be")
    print("\n".join(wrong))
    sys.exit(bool(wrong))
