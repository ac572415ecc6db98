"""Whether a long run stays as it is: `python -m tests.commands.soak [--steps N]`, two ranks, 30 lengths, Inductor.

A row for every hundred steps and rank: resident memory, file descriptors, threads, keys in the store, live tensors, and
graphs compiled. After the lengths have been seen for the first time all of them should be flat.
"""

from __future__ import annotations

import argparse
import gc
import os
import threading
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn

from sp_compile import sp_backend

from ..equivalence import known_graphs, rewritten_since
from ..gloo_pool import GlooPool
from ..test_passes import Block

LENGTHS = 30
EVERY = 100


@dataclass(frozen=True)
class Figures:
    """What a rank holds after a number of steps."""

    step: int
    resident_mb: float
    descriptors: int
    tasks: int
    """Threads of the process, those of libraries too."""
    threads: int
    """Of Python."""
    keys: int
    tensors: int
    graphs: int


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(64, 12), Block(), nn.Linear(12, 64)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.block(self.embed(ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def long_run(steps: int, inner: str = "inductor") -> list[Figures]:
    """Train for `steps` steps on batches of 30 lengths, and evaluate between them. Returns figures of this rank."""
    model, known = Model(), known_graphs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    call = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": inner}))
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(steps + 1):
        if step % EVERY == 0:
            found.append(_figures(step, len(rewritten_since(known))))
        length = 17 + int(torch.randint(LENGTHS, (), generator=generator))
        optimizer.zero_grad()
        call(torch.randint(64, (2, length), generator=generator)).backward()
        optimizer.step()
        if step % 10 == 0:
            with torch.no_grad():
                call(torch.randint(64, (2, length), generator=generator))
    return found


def _figures(step: int, graphs: int) -> Figures:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    world = dist.group.WORLD
    assert world is not None
    return Figures(
        step,
        round(resident, 1),
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        threading.active_count(),
        world.get_group_store().num_keys(),
        sum(isinstance(each, Tensor) for each in gc.get_objects()),
        graphs,
    )


def growth(found: list[Figures], settled: int) -> dict[str, float]:
    """By how much each figure has grown since step `settled`."""
    before = next(each for each in found if each.step >= settled)
    names = [each.name for each in fields(Figures) if each.name != "step"]
    return {name: getattr(found[-1], name) - getattr(before, name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    pool = GlooPool(2)
    ranks = pool.run(long_run, steps, timeout=3600.0)
    pool.close()
    rows = [(rank, *astuple(each)) for each_step in zip(*ranks, strict=True) for rank, each in enumerate(each_step)]
    print(tabulate(rows, ["rank", *(each.name for each in fields(Figures))]))
    for rank, found in enumerate(ranks):
        print(f"rank {rank}, grown since step {steps // 5}: {growth(found, steps // 5)}")


if __name__ == "__main__":
    main()
