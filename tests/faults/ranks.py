"""One rank of a run in which something fails: its model, its steps, and what became of each."""

from __future__ import annotations

import copy
import json
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sp_compile import register_sharding_rule, sp_backend

from ..test_passes import Block

TIMEOUT = 2.0
"""Seconds, of the guard."""


class Places:
    """Where a rank comes by; what happens there is set by the script of the fault."""

    def __init__(self) -> None:
        self._place, self._happens, self._left = "", self._nothing, 0
        self._counting = threading.Lock()

    def _nothing(self) -> None:
        pass

    def set(self, place: str, happens: Callable[[], None], times: int) -> None:
        """From now on something happens at a place, `times` times."""
        self._place, self._happens, self._left = place, happens, times

    def come_to(self, place: str) -> None:
        with self._counting:
            strikes = place == self._place and self._left > 0
            self._left -= strikes
        if strikes:
            self._happens()


places = Places()


@torch.library.custom_op("sp_faults::point", mutates_args=())
def point(x: Tensor) -> Tensor:
    """The identity, in the middle of a model."""
    places.come_to("in forward")
    return x.clone()


@torch.library.custom_op("sp_faults::point_backward", mutates_args=())
def point_backward(grad: Tensor) -> Tensor:
    places.come_to("in backward")
    return grad.clone()


point.register_fake(torch.empty_like)
point_backward.register_fake(torch.empty_like)
point.register_autograd(lambda ctx, grad: point_backward(grad))
register_sharding_rule(point._opoverload, "b s c -> b s c")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 12)
        self.first, self.second = Block(), Block()

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.second(point(self.first(self.embed(ids)))).square().mean()
        return out


def let_files_grow(may_grow: bool) -> bool:
    """Whether files of this process may grow; returns whether they might before."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if may_grow else 0, most))
    return before != 0


def ids_of(batch: int, length: int = 17) -> Tensor:
    return torch.randint(64, (1, length), generator=torch.Generator().manual_seed(batch))


@dataclass
class Rank:
    """A rank that trains, and writes what became of each step to a file: its process may not live to return it."""

    rank: int
    folder: Path
    options: dict[str, Any]
    inner: str
    struck: float = 0.0
    """When the fault struck, on the clock of this rank."""
    alone: Model = field(init=False)
    """The model of one device."""

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.alone = Model()
        self.model = copy.deepcopy(self.alone)
        self.compiled = self.compile()

    def compile(self, **options: Any) -> Callable[[Tensor], Tensor]:
        """The model, compiled with more options."""
        given = {"inner_backend": self._compile_inner, "guard_timeout": TIMEOUT, **self.options, **options}
        compiled: Callable[[Tensor], Tensor] = torch.compile(
            self.model, backend=partial(sp_backend, options=given), dynamic=False
        )
        return compiled

    def _compile_inner(self, gm: Any, inputs: Any, **kwargs: Any) -> Any:
        places.come_to("while compiling")
        return torch._dynamo.lookup_backend(self.inner)(gm, inputs, **kwargs)

    def step(self, batch: int, length: int = 17, backward: bool = True) -> None:
        """A step of training. Its loss and gradients are compared with those of one device, on the same batch."""
        ids = ids_of(batch, length)
        places.come_to("before forward")
        self.model.zero_grad()
        loss = self.compiled(ids)
        self._check("loss", loss, self.alone(ids))
        if not backward:
            return
        places.come_to("after forward")
        loss.backward()
        self.alone.zero_grad()
        self.alone(ids).backward()
        for (name, found), right in zip(self.model.named_parameters(), self.alone.parameters(), strict=True):
            self._check(name, found.grad, right.grad)
        places.come_to("after backward")

    def _check(self, name: str, found: Tensor | None, right: Tensor | None) -> None:
        if found is None or right is None or not torch.allclose(found, right, rtol=1e-3, atol=1e-5):
            self.tell("wrong value", name)

    def go_on(self, *steps: Callable[[], None]) -> None:
        """Take steps as a loop that catches everything and takes the next batch."""
        for step in steps:
            try:
                step()
            except (KeyboardInterrupt, Exception) as error:
                self.tell(type(error).__name__, str(error))

    def tell(self, what: str, text: str = "") -> None:
        """Write what has become of a step, and the seconds since the fault."""
        seconds = time.monotonic() - self.struck if self.struck else 0.0
        may_grow = let_files_grow(True)
        with open(self.folder / f"rank {self.rank}", "a") as file:
            file.write(json.dumps([what, text, seconds]) + "\n")
        let_files_grow(may_grow)

    def at(self, place: str, happens: Callable[[], None], who: int = 1, times: int = 1) -> None:
        """From now on something happens on rank `who` when it comes to a place; the others note the time there."""

        def strike() -> None:
            self.struck = self.struck or time.monotonic()
            if self.rank == who:
                happens()

        places.set(place, strike, times)

    def from_now(self) -> None:
        """The fault strikes here, by what the ranks do from now on."""
        self.struck = time.monotonic()
