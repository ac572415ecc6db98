"""What a random program is, how one is drawn, and what it is held against."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sp_compile.errors import VerificationError
from sp_compile.tools.verify import Verification, run_alone, verify

from ..programs import Parts
from .steps import STEPS, MakeStream, write

MODES = ("", "", "", "", "", "", "checkpoint", "reentrant", "no_grad", "break")
"""How a step runs: checkpointed, in either way, without gradients, or behind a graph break."""

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda t: t,
    "alias": lambda t: t.view_as(t),
    "channels": lambda t: t[..., :4],
    "rows": lambda t: t[:, 1:],
    "flat": lambda t: t.flatten(0, 1),
    "transposed": lambda t: t.mT,
    "heads": lambda t: t.unflatten(-1, (3, 4)),
    "view of a view": lambda t: t.mT[:, ::2].unsqueeze(0),
    "detached": lambda t: t.detach(),
    "last": lambda t: t[:, -1],
}
"""What is returned beside a stream, of its memory."""


class Differs(AssertionError):
    """Ranks do not give what one device gives; `names` are of the values that differ."""

    def __init__(self, text: str, names: Collection[str]) -> None:
        super().__init__(text)
        self.names = frozenset(names)


class Undecided(Exception):
    """From nearly the same inputs one device gives other values as well; or simulated ranks cannot run a program."""


class Draw(NamedTuple):
    step: str
    stream: int
    other: int
    number: int
    mode: str = ""


class Ends(NamedTuple):
    """What a program returns, and what is written to it afterwards by code that is not compiled."""

    loss: int
    """Below 6 a loss of that kind, else some tensors."""
    views: tuple[str, ...] = ()
    writes: tuple[int, ...] = ()


class RandomProgram(NamedTuple):
    steps: Sequence[Draw]
    shape: tuple[int, int, int]
    heads: tuple[int, int, int]
    parts: int
    dynamic: bool
    ends: Ends
    single: bool = False
    """In float32, under autocast to bfloat16; else in float64."""
    trained: bool = True
    """Whether the input takes a gradient."""

    def body(self, m: Parts, x: Tensor) -> Any:
        streams = [x]
        for draw in self.steps:
            t, u = (streams[-1 - min(at, len(streams) - 1)] for at in (draw.stream, draw.other))
            streams.append(_run(STEPS[draw.step], draw.mode, m, t, u, draw.number))
        last = streams[-1]
        if self.ends.loss < 6:
            made = [token_loss(m, last, self.ends.loss), last.mean(1)]
        else:
            made = [last, streams[-2], last[:, -1], last.sum(1) / last.shape[1]][: self.ends.loss - 5]
        if self.ends.views:
            last = last * 1  # of no step that still has to read it in backward
            made += [VIEWS[name](last) for name in self.ends.views]
        for at in self.ends.writes:
            write(made[-1 - at % len(self.ends.views)], at)
        return made

    def module(self) -> Parts:
        """The program with weights; the same at every call."""
        torch.manual_seed(0)
        heads, dim, kv = self.heads
        return Parts(self.body, heads, dim, kv, double=not self.single)

    def inputs(self) -> tuple[Tensor, ...]:
        dtype = torch.float32 if self.single else torch.float64
        return (torch.randn(self.shape, dtype=dtype, requires_grad=self.trained),)

    def is_valid(self) -> bool:
        """Whether one device runs it, uncompiled: torch refuses some writes to views."""
        try:
            with self.autocast():
                run_alone((self.module(), self.inputs(), {}))
        except (RuntimeError, IndexError, ValueError):
            return False
        return True

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.single)

    def check(self) -> None:
        """Raise `Differs`, or what the backend raises, if simulated ranks do not give what one device does.

        Raises `Undecided` where nothing can be told.
        """
        try:
            with self.autocast():
                verify(self.module(), *self.inputs(), sp_size=self.parts, dynamic=True if self.dynamic else None)
        except VerificationError as error:
            found = error.verification
            if not isinstance(found, Verification) and "cannot be verified" not in str(error):
                raise error.__cause__ or error from error
            if not isinstance(found, Verification) or set(found.wrong) <= set(found.undecided):
                raise Undecided(str(error)) from error
            raise Differs(f"P={self.parts}: {error}", found.wrong) from error


def _run(step: MakeStream, mode: str, m: Parts, t: Tensor, u: Tensor, number: int) -> Tensor:
    if mode in ("checkpoint", "reentrant"):
        made: Tensor = checkpoint(partial(step, m), t, u, number, use_reentrant=mode == "reentrant")
        return made
    if mode == "break":
        torch._dynamo.graph_break()
    if mode == "no_grad":
        with torch.no_grad():
            return step(m, t, u, number)
    return step(m, t, u, number)


def token_loss(m: Parts, t: Tensor, n: int) -> Tensor:
    logits = m.head(t)
    target = torch.arange(t.shape[0] * t.shape[1]).view(t.shape[:2]) % 17
    target = target.masked_fill(torch.arange(t.shape[1]) < n, -100)
    if n % 3 == 0 and t.shape[1] > 1:
        return F.cross_entropy(logits[:, :-1].reshape(-1, 17), target[:, 1:].reshape(-1), reduction="sum")
    if n % 3 == 1:
        weight = m.head.weight[:, 0].detach().abs()
        return F.cross_entropy(logits.mT, target, weight, label_smoothing=0.1, reduction="sum")
    wanted = logits.detach().roll(1, -1).softmax(-1)  # of another distribution: 0 would be nothing but rounding
    return F.mse_loss(t, t.roll(1, 1)) + F.kl_div(logits.log_softmax(-1), wanted)


def ends() -> st.SearchStrategy[Ends]:
    """A loss, tensors, or tensors of one memory that are written to."""
    views = st.lists(st.sampled_from(list(VIEWS)), min_size=1, max_size=3).map(tuple)
    shared = st.builds(Ends, st.integers(6, 8), views, st.lists(st.integers(0, 5), max_size=2).map(tuple))
    apart = st.builds(Ends, st.integers(0, 9), st.just(()), st.just(()))
    return st.one_of(apart, apart, shared)


@st.composite
def programs(draw: st.DrawFn) -> RandomProgram:
    some = st.builds(
        Draw,
        st.sampled_from(list(STEPS)),
        st.sampled_from((0, 0, 0, 1)),
        st.integers(0, 3),
        st.integers(0, 5),
        st.sampled_from(MODES),
    )
    return RandomProgram(
        tuple(draw(st.lists(some, min_size=2, max_size=5))),
        (draw(st.integers(1, 3)), draw(st.integers(2, 14)), 12),
        draw(st.sampled_from(((3, 4, 3), (6, 2, 2), (2, 6, 1)))),
        draw(st.integers(2, 5)),
        draw(st.sampled_from((False, False, True))),
        draw(ends()),
        draw(st.sampled_from((False,) * 9 + (True,))),
        draw(st.booleans()),
    )
