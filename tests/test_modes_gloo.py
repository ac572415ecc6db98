"""Modes and regions on real ranks: checkpoints, opaque parts, autocast, inference mode, dropout."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.utils.checkpoint import checkpoint

from sp_compile import replicated_region, rewritten_graphs, sp_backend

from .commands.mutants import MUTANTS
from .equivalence import gradient_errors, known_graphs, rewritten_since
from .gloo_pool import GlooPool
from .test_passes import Block

pytestmark = pytest.mark.slow


def checkpointed(inner: str) -> float:
    """How far the gradient of a checkpointed dropout is from the mask that its output shows."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.scale = Block(), nn.Parameter(torch.rand(12) + 1)

        def dropped(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.block(x).detach() * self.scale, 0.5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.dropped, x, use_reentrant=False)
            return out

    torch.manual_seed(0)
    model = Checkpointed()
    compiled = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": inner}))
    out = compiled(torch.randn(1, 7, 12))
    out.sum().backward()
    assert model.scale.grad is not None
    return float((model.scale.grad - (out / model.scale).sum((0, 1))).detach().abs().max())


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_checkpointed_dropout_is_recomputed_alike(gloo2: GlooPool, inner: str) -> None:
    assert max(gloo2.run(checkpointed, inner)) < 1e-4


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, scale = ctx.saved_tensors
        return gradients[0] * scale * 3, (gradients[0] * x).sum((0, 1)) * 5


class Opaque(nn.Module):
    """Higher-order operators between blocks, which simulated ranks do not run; one in a checkpoint, one opted out."""

    def __init__(self, scans: bool) -> None:
        super().__init__()
        self.first, self.second, self.third, self.scans = Block(), Block(3), Block(), scans
        self.scale = nn.Parameter(torch.rand(12) + 1)

    def forward(self, x: Tensor) -> Any:
        y = checkpoint(lambda t: Scaled.apply(self.first(t), self.scale), x, use_reentrant=False)
        y = torch.cond(y.sum() > 0, lambda t: t.sin() * self.scale, lambda t: t.cos() - self.scale, (y,))
        last = y[:, -1]
        if self.scans:
            with replicated_region():
                last, y = scan(lambda c, t: (c / 2 + t, (c + t).tanh() * self.scale), x.new_zeros(1, 12), y, dim=1)
        y = torch.vmap(lambda row: row.cumsum(-1) * self.scale)(self.second(y))
        return checkpoint(self.third, y, use_reentrant=True), last


def with_opaque_parts(inner: str) -> tuple[float, int]:
    alone = Opaque(scans=inner == "aot_eager")  # Inductor has no backward of scan, sharded or not
    model = copy.deepcopy(alone)
    x = torch.randn(1, 7, 12)
    outputs = []
    for call in (alone, torch.compile(model, backend=partial(sp_backend, options={"inner_backend": inner}))):
        out, last = call(x.requires_grad_())
        (out.square().sum() + (last * torch.arange(12)).sum()).backward()
        outputs.append(torch.cat([out.flatten(), last.flatten(), cast(Tensor, x.grad).flatten()]).detach())
        x.grad = None
    error = float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())
    return max(error, *gradient_errors(alone, model).values()), len(rewritten_graphs()[-1].plan.sites)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_opaque_parts_run_whole_between_sharded_ones(gloo2: GlooPool, inner: str) -> None:
    for error, sites in gloo2.run(with_opaque_parts, inner):
        assert error < 1e-5 and sites == 3


def in_autocast(dtype: torch.dtype, outside: bool) -> tuple[float, bool]:
    """The largest error of outputs and gradients, relative, in half precision."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Block(3), nn.Linear(12, 5)

        def body(self, x: Tensor) -> Any:
            y = self.block(x)
            with torch.autocast("cpu", enabled=False):
                z = y.float().logsumexp(-1)
            return y, self.head(y).float().mean(1), z

        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu", dtype, enabled=not outside or torch.is_autocast_enabled("cpu")):
                return self.body(x)

    alone = Cast()
    model = copy.deepcopy(alone)
    compiled = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": "aot_eager"}))
    x = torch.randn(1, 7, 12)
    results = []
    for call in (alone, compiled):
        with torch.autocast("cpu", dtype, enabled=outside):
            y, head, z = call(x)
        (y.float().square().sum() + head.sum() + z.sum()).backward()
        results.append((y, head, z))
    same = all(a.dtype == b.dtype for a, b in zip(*results, strict=True))
    errors = [float((a - b).detach().abs().max() / a.detach().abs().max()) for a, b in zip(*results, strict=True)]
    return max(*errors, *gradient_errors(alone, model).values()), same


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(gloo2: GlooPool, dtype: torch.dtype, outside: bool) -> None:
    for error, same in gloo2.run(in_autocast, dtype, outside):
        assert error < (5e-3 if dtype == torch.float16 else 4e-2) and same


def in_inference_mode(inner: str, weaken: str = "") -> tuple[float, list[int]]:
    """The error of the output, and how many attention sites each rewritten graph has."""
    model, x = Block(3), torch.randn(1, 7, 12)
    known = known_graphs()
    compiled = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": inner}))
    with torch.inference_mode(), MUTANTS[weaken]() if weaken else nullcontext():
        out = compiled(x)
        error = float((out - model(x)).abs().max())
    assert out.is_inference()
    return error, [len(graph.plan.sites) for graph in rewritten_since(known)]


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_inference_mode(gloo2: GlooPool, inner: str) -> None:
    for error, sites in gloo2.run(in_inference_mode, inner):
        assert error < 1e-5 and sites == [1]


def test_inference_mode_on_three_ranks(gloo3: GlooPool) -> None:
    for error, sites in gloo3.run(in_inference_mode, "aot_eager"):
        assert error < 1e-5 and sites == [1]


def test_a_planted_wrong_is_noticed_on_real_ranks(gloo3: GlooPool) -> None:
    for error, sites in gloo3.run(in_inference_mode, "aot_eager", "a rank's block off by one granule"):
        assert error > 1e-2 and sites == [1]


def dropped_twice() -> tuple[bool, list[float]]:
    """Inductor draws alike where values are replicated, and leaves the generator alike on every rank."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.block(x), 0.5)

    torch.manual_seed(0)
    model = Dropped()
    out = torch.compile(model, backend=sp_backend)(torch.randn(1, 8, 12))
    out.sum().backward()
    dropped = out == 0
    return bool(torch.equal(dropped[:, :4], dropped[:, 4:])), torch.rand(3).tolist()


def test_random_numbers_with_inductor(gloo2: GlooPool) -> None:
    ranks = gloo2.run(dropped_twice)
    assert not any(same for same, _ in ranks)
    assert ranks[0][1] == ranks[1][1]
