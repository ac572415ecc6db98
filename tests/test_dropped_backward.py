"""A custom `autograd.Function` under `torch.vmap` and `torch.func`, whose backward Dynamo drops: it runs in Python."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sp_compile import explain, sp_backend

from .programs.states import SumsItsGradient


class Scaled(torch.autograd.Function):
    """Its argument, with a gradient of its own: Dynamo makes no node of its forward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Any:
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * 5


def mapped(row: Tensor) -> Tensor:
    out: Tensor = SumsItsGradient.apply(row) * 2
    return out


def total(x: Tensor) -> Tensor:
    return (mapped(x) * x).sum()


DROPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "vmap": torch.vmap(mapped),
    "vmap of columns": torch.vmap(mapped, in_dims=1, out_dims=1),
    "vmap of vmap": torch.vmap(torch.vmap(lambda row: mapped(row[None])[0])),
    "vmap in chunks": torch.vmap(mapped, chunk_size=1),
    "grad": lambda x: torch.func.grad(total)(x) * x,
    "grad of vmap": lambda x: torch.func.grad(lambda y: torch.vmap(mapped)(y).sum())(x) * x,
    "vmap of grad": lambda x: torch.vmap(torch.func.grad(total))(x) * x,
    "vjp": lambda x: torch.func.vjp(mapped, x)[1](x)[0],
    "jacrev": lambda x: torch.func.jacrev(total)(x) * x,
    "in a checkpoint": lambda x: checkpoint(torch.vmap(mapped), x, use_reentrant=False),
    "of itself": torch.vmap(lambda row: Scaled.apply(row) * 2),
    "inside and beside": lambda x: SumsItsGradient.apply(torch.vmap(mapped)(x)),
    "of itself, beside": lambda x: Scaled.apply(x) + torch.vmap(Scaled.apply)(x),
}

KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "alone": mapped,
    "beside vmap": lambda x: mapped(x) * torch.vmap(lambda row: row > 0)(x),
    "of no gradient, beside vmap": lambda x: x * mapped(torch.ones(3)) * torch.vmap(lambda row: row * 2)(x),
    "itself, beside vmap": lambda x: Scaled.apply(x) * torch.vmap(lambda row: row * 2)(x),
    "in a checkpoint": lambda x: checkpoint(mapped, x, use_reentrant=False) + torch.vmap(torch.sin)(x),
    "grad of something else": lambda x: torch.func.grad(lambda t: (mapped(x) * t).sum())(x),
}


def step(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 2, 6).view(2, 3).requires_grad_()
    out = call(x)
    out.square().sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def compiled_step(call: Callable[[Tensor], Tensor], inner: Any = "eager", **options: Any) -> tuple[Tensor, Tensor]:
    torch._dynamo.reset()
    options = {"inner_backend": inner, **options}
    return step(torch.compile(call, backend=partial(sp_backend, options=options)))


@pytest.mark.parametrize("name", DROPPED)
def test_a_function_whose_backward_is_dropped_runs_in_python(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sp_compile"):
        torch.testing.assert_close(compiled_step(DROPPED[name]), step(DROPPED[name]))
    if caplog.records:  # else Dynamo has not taken the call at all
        text = caplog.records[0].getMessage()
        assert "under torch.vmap or torch.func is not compiled: Dynamo drops the backward" in text


@pytest.mark.parametrize("name", KEPT)
def test_one_that_keeps_its_backward_is_compiled(name: str) -> None:
    graphs: list[Any] = []
    found = compiled_step(KEPT[name], lambda gm, inputs: graphs.append(gm) or gm)  # type: ignore[func-returns-value]
    torch.testing.assert_close(found, step(KEPT[name]))
    assert len(graphs) == 1


def test_what_would_be_wrong_without_it() -> None:
    """torch 2.13 and 2.14, on one device, with a backend that runs the graph as it is."""
    torch._dynamo.reset()
    (_, gradient), (_, wrong) = step(DROPPED["vmap"]), step(torch.compile(torch.vmap(mapped), backend="eager"))
    assert float((gradient - wrong).abs().max()) > 0.1


def test_with_strict_it_is_an_error() -> None:
    with pytest.raises(Exception, match=r"SumsItsGradient \(states.py:\d+ in forward: .* without strict=True it runs"):
        compiled_step(lambda x: torch.vmap(mapped)(x), strict=True)


def test_without_a_gradient_it_is_compiled(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    call = torch.compile(
        lambda x: torch.vmap(mapped)(x), backend=partial(sp_backend, options={"inner_backend": "eager"})
    )
    with caplog.at_level(logging.WARNING, logger="sp_compile"):
        call(torch.ones(2, 3))
    assert not caplog.records


def test_explain_says_so() -> None:
    report = explain(lambda x: torch.vmap(mapped)(x), torch.ones(2, 3, requires_grad=True), sp_size=2)
    assert "it runs in Python, for it calls SumsItsGradient (states.py" in str(report)
