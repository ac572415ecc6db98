"""What fails, where, and what every rank is to be told."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from sp_compile import backend, destroy_sequence_parallel, init_sequence_parallel

from .ranks import TIMEOUT, Rank, ids_of, let_files_grow, places

Script = Callable[[Rank], None]


@dataclass(frozen=True)
class Fault:
    script: Script
    others: str
    """What becomes of the ranks that it does not strike: "ok", or the name of the first error; with | between two."""
    struck: str
    """What becomes of rank 1, in the same way; "ended" if its process is killed or stopped."""
    inner: str = "aot_eager"
    within: float = 5 * TIMEOUT
    """Seconds within which each rank is told."""


LOST, RAISED, PARTED = "RankLostError", "RankRaisedError", "RankMismatchError"


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def interrupt() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has the jobs in its background ignore it
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)  # Python runs the handler


def be_slow() -> None:
    time.sleep(2.5 * TIMEOUT)


def fail() -> None:
    raise ValueError("no such token")


def exhaust_memory() -> None:
    torch.empty(1 << 50)


def fill_disk() -> None:
    """From now on no file may have a byte, as on a disk that is full; but for what a rank tells."""
    let_files_grow(False)


ACTIONS = {
    "killed": kill,
    "stopped": stop,
    "slow": be_slow,
    "interrupted": interrupt,
    "exception": fail,
    "out of memory": exhaust_memory,
}
COMPILATION = ("while planning", "while compiling")
BETWEEN = ("before forward", "after forward", "after backward")
PLACES = (*COMPILATION, *BETWEEN, "in forward", "in backward")


def strikes(action: Callable[[], None], place: str) -> Script:
    """The fault at a place: in the first step where that is compilation, else in the second."""

    def script(run: Rank) -> None:
        if place not in COMPILATION:
            run.go_on(partial(run.step, 0))
        plan_graph = backend.plan_graph

        def planning(*args: Any) -> Any:
            places.come_to("while planning")
            return plan_graph(*args)

        backend.plan_graph = planning
        run.at(place, action)
        run.go_on(*(partial(run.step, batch) for batch in (1, 2, 3)))

    return script


def at_places() -> dict[str, Fault]:
    """Each action at each place."""
    own = {"interrupted": "KeyboardInterrupt", "exception": "ValueError", "out of memory": "RuntimeError"}
    faults = {}
    for name, action in ACTIONS.items():
        for place in PLACES:
            # One that stops is late, unless it is known to compile or to be inside of a call: then it is silent.
            stopped = f"{PARTED}|{LOST}" if place in (*BETWEEN, "while planning") else LOST
            others = {"killed": LOST, "stopped": stopped}.get(name, RAISED)
            struck = own.get(name, "ended")
            if name == "slow":
                others = struck = PARTED if place in BETWEEN else "ok"
            elif name in own and place == "after backward":
                others = "ok"  # and it takes the same batch next
            elif name in own and place in BETWEEN:
                others = PARTED
            elif name in own and name != "interrupted" and place in COMPILATION:
                struck = "BackendCompilerFailed"
            # Who compiles is told when it has.
            within = 15 * TIMEOUT if place in COMPILATION else 5 * TIMEOUT
            faults[f"{name} {place}"] = Fault(strikes(action, place), others, struck, within=within)
    return faults


def skip_batch(run: Rank) -> None:
    """Rank 1 cannot decode a batch, and takes the next."""
    run.go_on(partial(run.step, 0))
    run.from_now()
    run.go_on(*(partial(run.step, batch + (run.rank == 1)) for batch in (1, 2, 3)))


def other_length(run: Rank) -> None:
    """Both lengths are compiled, and of other sizes in every collective."""
    run.go_on(partial(run.step, 0), partial(run.step, 0, 41))
    run.from_now()
    run.go_on(*(partial(run.step, batch, 41 if run.rank == 1 else 17) for batch in (1, 2, 3)))


def other_backward(run: Rank) -> None:
    """All have called both lengths; rank 1 takes the other backward first."""
    run.go_on(partial(run.step, 0), partial(run.step, 0, 41))
    short, long = run.compiled(ids_of(1)), run.compiled(ids_of(1, 41))
    run.from_now()
    run.go_on((long if run.rank == 1 else short).backward, partial(run.step, 2), partial(run.step, 3))


def id_out_of_range(run: Rank) -> None:
    """Among the rows of rank 1 is an id that the table does not have."""
    run.go_on(partial(run.step, 0))
    run.from_now()
    ids = ids_of(1)
    ids[0, 7] = 99

    def step() -> None:
        run.compiled(ids)
        run.tell("wrong value", "the loss of an id out of range")

    run.go_on(step, partial(run.step, 2), partial(run.step, 3))


def extra_evaluation(run: Rank) -> None:
    """Rank 1 alone evaluates between two steps; it has so before, with all others."""
    with torch.no_grad():
        run.go_on(partial(run.step, 9, backward=False))
    run.go_on(partial(run.step, 0))
    run.from_now()
    if run.rank == 1:
        with torch.no_grad():
            run.go_on(partial(run.step, 9, backward=False))
    run.go_on(*(partial(run.step, batch) for batch in (1, 2, 3)))


def skipped_backward(run: Rank) -> None:
    run.go_on(partial(run.step, 0))
    run.from_now()
    run.go_on(partial(run.step, 1, backward=run.rank != 1), partial(run.step, 2), partial(run.step, 3))


def fewer_batches(run: Rank) -> None:
    """Rank 1 comes to its end two steps before the others."""
    run.go_on(partial(run.step, 0))
    run.from_now()
    run.go_on(*(partial(run.step, batch) for batch in (1, 2, 3)[: 1 if run.rank == 1 else 3]))


def uncaught(run: Rank) -> None:
    run.go_on(partial(run.step, 0))
    run.at("after forward", fail)
    if run.rank == 1:
        run.step(1)
    run.go_on(partial(run.step, 1))


def destroyed_by_one(run: Rank) -> None:
    """Rank 1 destroys its groups, and goes on as on one device."""
    run.go_on(partial(run.step, 0))
    run.at("before forward", destroy_sequence_parallel)
    run.go_on(*(partial(run.step, batch) for batch in (1, 2, 3)))


def remade_after_exception(run: Rank) -> None:
    """After an exception on one rank all make new groups, and go on."""
    run.go_on(partial(run.step, 0))
    run.at("in forward", fail)
    run.go_on(partial(run.step, 1))
    init_sequence_parallel()
    run.go_on(partial(run.step, 2), partial(run.step, 3), partial(run.tell, "went on"))


def remade_at_will(run: Rank) -> None:
    run.from_now()
    for batch in range(3):
        run.go_on(partial(run.step, batch), init_sequence_parallel)


def on_the_world(run: Rank) -> Rank:
    """The same model, compiled for another group of the same ranks."""
    other = copy.copy(run)
    other.compiled = run.compile(group=dist.group.WORLD)
    return other


def two_groups(run: Rank) -> None:
    """Two groups of the same ranks, whose models rank 1 calls in another order."""
    other = on_the_world(run)
    run.go_on(partial(run.step, 0), partial(other.step, 0))
    run.from_now()
    run.go_on(*(partial(each.step, 1) for each in ((other, run) if run.rank == 1 else (run, other))))


def two_groups_in_turn(run: Rank) -> None:
    other = on_the_world(run)
    run.from_now()
    run.go_on(*(partial(each.step, batch) for batch in range(3) for each in (run, other)))


def two_threads(run: Rank) -> None:
    """Each calls a model of its own, of the one group."""
    other = Rank(run.rank, run.folder, run.options, run.inner)
    run.go_on(partial(run.step, 0), partial(other.step, 0))
    run.from_now()
    other.from_now()
    threads = [
        threading.Thread(target=each.go_on, args=[partial(each.step, batch) for batch in range(1, 30)])
        for each in (run, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def forked(run: Rank) -> None:
    """One child comes to its end, another calls the model and is refused; the parent goes on."""
    run.go_on(partial(run.step, 0))
    run.from_now()
    for calls in (False, True):
        child = os.fork()
        if child == 0:
            run.struck = 0.0
            with suppress(ValueError):
                if calls:
                    run.compiled(ids_of(1))
                    os._exit(3)
            raise SystemExit(0)
        deadline = time.monotonic() + 20
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.05)
        if ended == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            run.tell("hangs", "a forked child")
        elif ended[1] != 0:
            run.tell("aborts", f"a forked child, with status {ended[1]}")
    run.go_on(*(partial(run.step, batch) for batch in (1, 2, 3)))


NOWHERE = "/proc/nowhere"
"""A folder that nobody can make, root neither."""


def with_dump(folder: str, prepare: Callable[[], None] = lambda: None) -> Script:
    """Rank 1 cannot write what its option `dump` asks for."""

    def script(run: Rank) -> None:
        run.from_now()
        if run.rank == 1:
            run.compiled = run.compile(dump=folder)
            prepare()
        run.go_on(*(partial(run.step, batch) for batch in (1, 2, 3)))

    return script


def with_cache(folder: str | None, prepare: Callable[[], None] = lambda: None) -> Script:
    """Rank 1 cannot write to the folder in which its compiler keeps what it has compiled."""

    def script(run: Rank) -> None:
        own = str(run.folder / f"cache{run.rank}")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder if folder and run.rank == 1 else own
        if run.rank == 1:
            prepare()
        run.from_now()
        run.go_on(*(partial(run.step, batch) for batch in (1, 2, 3)))

    return script


def corrupted_cache(run: Rank) -> None:
    """What the compiler of rank 1 has kept is cut in half before all compile again."""
    folder = run.folder / f"cache{run.rank}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    run.go_on(partial(run.step, 0))
    torch._dynamo.reset()
    kept = [file for file in folder.rglob("*") if file.is_file() and file.suffix not in (".so", ".lock")]
    for file in kept if run.rank == 1 else ():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    run.from_now()
    run.go_on(*(partial(run.step, batch) for batch in (1, 2, 3)))


FAULTS: dict[str, Fault] = {
    **at_places(),
    "id out of range in its rows": Fault(id_out_of_range, RAISED, "IndexError"),
    "id out of range in its rows, eager": Fault(id_out_of_range, RAISED, "IndexError", "eager"),
    "skipped batch": Fault(skip_batch, PARTED, PARTED),
    "another length, both known": Fault(other_length, PARTED, PARTED),
    "another length, both known, eager": Fault(other_length, PARTED, PARTED, "eager"),
    "another backward": Fault(other_backward, PARTED, PARTED),
    "another backward, eager": Fault(other_backward, PARTED, PARTED, "eager"),
    "extra evaluation": Fault(extra_evaluation, PARTED, PARTED),
    "skipped backward": Fault(skipped_backward, PARTED, PARTED),
    "skipped backward, eager": Fault(skipped_backward, PARTED, PARTED, "eager"),
    "killed in backward, eager": Fault(strikes(kill, "in backward"), LOST, "ended", "eager"),
    "fewer batches": Fault(fewer_batches, LOST, "ok"),
    "exception that nobody catches": Fault(uncaught, LOST, "ended"),
    "groups destroyed by one": Fault(destroyed_by_one, LOST, "ok"),
    "groups made anew after an exception": Fault(remade_after_exception, RAISED, "ValueError"),
    "groups made anew at will": Fault(remade_at_will, "ok", "ok"),
    "two groups, in another order": Fault(two_groups, PARTED, PARTED),
    "two groups, in turn": Fault(two_groups_in_turn, "ok", "ok"),
    "two threads in two models": Fault(two_threads, PARTED, PARTED),
    "forked children": Fault(forked, "ok", "ok"),
    "unwritable dump folder": Fault(with_dump(NOWHERE), RAISED, "BackendCompilerFailed"),
    "full disk, dump": Fault(with_dump("dump", fill_disk), RAISED, "BackendCompilerFailed"),
    "killed in forward, Inductor": Fault(strikes(kill, "in forward"), LOST, "ended", "inductor"),
    "exception in backward, Inductor": Fault(strikes(fail, "in backward"), RAISED, "ValueError", "inductor"),
    "another length, both known, Inductor": Fault(other_length, PARTED, PARTED, "inductor"),
    "unwritable cache folder": Fault(with_cache(NOWHERE), RAISED, "BackendCompilerFailed", "inductor", 3 * 60),
    "full disk, cache": Fault(with_cache(None, fill_disk), RAISED, "InductorError", "inductor", 3 * 60),
    "corrupted cache": Fault(corrupted_cache, "ok", "ok", "inductor", 3 * 60),
}
