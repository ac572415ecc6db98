"""Real ranks for tests: processes joined by gloo that stay alive between tests."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, cast

import torch
import torch.distributed as dist

from sp_compile.distributed.group import destroy_sequence_parallel, init_sequence_parallel

# Once a rank has failed, the others may wait for it in a collective for ever.
SECONDS_AFTER_A_FAILURE = 5.0

# A fork server imports torch once and, unlike pytest itself, has run no thread that a fork loses.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "torch._inductor.compile_fx"])


class RankFailure(Exception):
    """The cause of an exception that a rank raised: its number and its traceback."""


class RankDied(Exception):
    """A rank whose process ended, by a crash of its interpreter say."""


class RankTimeout(Exception):
    """Ranks that did not answer in time; they have been ended."""


class GlooPool:
    """`world_size` processes in one gloo group; started by the first `run`.

    They meet in a file, or by `tcp`, as under torchrun: every group then has connections to the store of rank 0.
    """

    def __init__(self, world_size: int, tcp: bool = False) -> None:
        self.world_size, self._tcp = world_size, tcp
        self._ranks: list[tuple[ForkServerProcess, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
        """Call `function(*args)` on every rank; the results, by rank.

        On each rank the SP group is the whole world, Dynamo is reset and the seed is 0. The
        function lives at the top level of a module, and results can be pickled.

        Raises what the first failing rank raised, from a `RankFailure` with its traceback; and
        `RankTimeout` after `timeout` seconds. The next call then starts new processes.
        """
        if not self._ranks:
            self._start()
        task = pickle.dumps((function, args))
        for _, connection in self._ranks:
            connection.send_bytes(task)
        results: dict[int, Any] = {}
        failures: dict[int, tuple[BaseException, str]] = {}
        silent = {connection: rank for rank, (_, connection) in enumerate(self._ranks)}
        deadline = time.monotonic() + timeout
        while silent and (ready := wait(list(silent), max(0.0, deadline - time.monotonic()))):
            for answered in ready:
                connection = cast(Connection, answered)
                rank = silent.pop(connection)
                value, text = _answer(connection)
                if text is None:
                    results[rank] = value
                else:
                    failures[rank] = value, text
                    deadline = min(deadline, time.monotonic() + SECONDS_AFTER_A_FAILURE)
        if silent or any(isinstance(error, RankDied) for error, _ in failures.values()):
            for process, _ in self._ranks:
                process.kill()
            self.close()
        if failures:
            rank = min(failures)
            error, text = failures[rank]
            raise error from RankFailure(f"on rank {rank} of {self.world_size}\n{text}")
        if silent:
            ranks = sorted(silent.values())
            raise RankTimeout(f"{function.__name__}: ranks {ranks} gave nothing in {timeout} s")
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes, which may clean up after themselves for a few seconds."""
        for _, connection in self._ranks:
            connection.close()
        for process, _ in self._ranks:
            process.join(timeout=5.0)
            process.kill()
        self._ranks = []

    def _start(self) -> None:
        rendezvous = f"file://{tempfile.mkdtemp(prefix='sp_compile_gloo_')}/store"
        if self._tcp:
            with socket.create_server(("127.0.0.1", 0)) as free:
                rendezvous = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        for rank in range(self.world_size):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(rank, self.world_size, rendezvous, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))


def _answer(connection: Connection) -> tuple[Any, str | None]:
    try:
        value, text = pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        return RankDied("its process ended without an answer"), "no traceback"
    return value, text


def collect_rarely() -> None:
    """What is imported by now is no garbage: to look through it again and again takes a fifth of the time of a test."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)


def _serve(rank: int, world_size: int, rendezvous: str, connection: Connection) -> None:
    collect_rarely()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=rendezvous,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=10),
    )
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_run(task))


def _run(task: bytes) -> bytes:
    """The pickled `(result, None)`, or `(exception, traceback)`."""
    try:
        function, args = pickle.loads(task)
        torch._dynamo.reset()
        torch.manual_seed(0)
        init_sequence_parallel()
        try:
            return pickle.dumps((function(*args), None))
        finally:
            destroy_sequence_parallel()
    except Exception as error:
        text = traceback.format_exc()
        try:
            answer = pickle.dumps((error, text))
            pickle.loads(answer)
        except Exception:
            # An exception whose __init__ takes other arguments does not survive the journey.
            answer = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), text))
        return answer
