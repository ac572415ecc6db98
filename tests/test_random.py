"""Random draws on real ranks: alike where a value is replicated, apart where it is sharded, at the right rate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sp_compile import sp_backend

from .commands.mutants import MUTANTS
from .equivalence import differences, step
from .gloo_pool import GlooPool
from .programs import Parts
from .test_passes import Block

pytestmark = pytest.mark.slow

KEPT = 0.7
DRAWS = 1_008_000
FIVE_SIGMA = 5 * (KEPT * (1 - KEPT) / DRAWS) ** 0.5


def compiled(module: nn.Module, inner: str = "eager") -> Callable[..., Any]:
    call: Callable[..., Any] = torch.compile(module, backend=partial(sp_backend, options={"inner_backend": inner}))
    return call


def agreement(one: Tensor, other: Tensor) -> float:
    """The share of elements that two masks keep or drop alike: `p^2 + (1 - p)^2` if they are independent."""
    return float((one == other).double().mean())


def are_independent(one: Tensor, other: Tensor) -> bool:
    return abs(agreement(one, other) - KEPT**2 - (1 - KEPT) ** 2) < 6 * (0.25 / one.numel()) ** 0.5


# Sharded draws


class Shown(nn.Module):
    """A dropout of ones behind a block, whose output is its mask and whose gradient shows the mask once more."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.scale = Block(), nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        ones = self.block(x).detach() * 0 + self.scale
        return F.dropout(ones.repeat(1, 1, 10_500), 1 - KEPT)


def sharded_dropout(inner: str, mutant: str = "") -> tuple[Tensor, float, Tensor]:
    torch.manual_seed(0)
    module = Shown()
    with MUTANTS[mutant]() if mutant else nullcontext():
        out = compiled(module, inner)(torch.randn(1, 8, 12))
    out.sum().backward()
    assert module.scale.grad is not None and set(out.unique().tolist()) == {0.0, torch.tensor(1 / KEPT).item()}
    missed = (module.scale.grad - out.detach().view(8, -1, 12).sum((0, 1))).abs().max()
    return out.detach()[0] != 0, float(missed / out.sum()), torch.get_rng_state()


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_sharded_dropout_keeps_its_rate_and_ranks_draw_apart(gloo2: GlooPool, inner: str) -> None:
    (kept, missed, state), (other, _, other_state) = gloo2.run(sharded_dropout, inner)
    assert kept.numel() == DRAWS and torch.equal(kept, other)
    assert abs(kept.double().mean() - KEPT) < FIVE_SIGMA
    assert missed < 1e-6
    for row in range(4):
        assert are_independent(kept[row], kept[row + 4])
    assert torch.equal(state, other_state)


def test_equal_draws_on_every_rank_are_noticed(gloo2: GlooPool) -> None:
    for kept, _, _ in gloo2.run(sharded_dropout, "eager", "dropout: the same draws on every rank"):
        assert not any(are_independent(kept[row], kept[row + 4]) for row in range(4))


def dropped_each_step() -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    module, x = Shown(), torch.randn(1, 7, 12)
    run = compiled(module)
    return [run(x).detach()[0] != 0 for _ in range(3)], torch.rand(3)


def test_every_step_draws_anew_and_alike_on_three_ranks(gloo3: GlooPool) -> None:
    ranks = gloo3.run(dropped_each_step)
    masks, after = ranks[0]
    for other, other_after in ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(masks, other, strict=True))
        assert torch.equal(after, other_after)
    blocks = [mask[start : start + 1] for mask in masks for start in (0, 3, 6)]
    for at, one in enumerate(blocks):
        for another in blocks[:at]:
            assert are_independent(one, another)


# Dropout inside attention


class Uniform(nn.Module):
    """Attention with equal weights over values that are one-hot, so that its output is its weights."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.scale = fused, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        v = (x * self.scale).unflatten(-1, (-1, x.shape[1])).transpose(1, 2)
        q, k = v * 0, v * 0
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=1 - KEPT)
        else:
            out = F.dropout((q @ k.mT).softmax(-1), 1 - KEPT) @ v
        return out.transpose(1, 2).flatten(2)


def attention_dropout(fused: bool) -> tuple[Tensor, float, Tensor]:
    torch.manual_seed(0)
    module, size, heads = Uniform(fused), 501, 4
    x = torch.eye(size).repeat(1, heads)[None].requires_grad_()
    out = compiled(module)(x)
    out.sum().backward()
    weights = out.detach().unflatten(-1, (heads, size))[0].transpose(0, 1)
    kept = weights != 0
    assert torch.allclose(weights[kept], torch.tensor(1 / size / KEPT))
    assert x.grad is not None
    columns = x.grad[0].unflatten(-1, (heads, size)).transpose(0, 1)
    missed = (columns - weights.sum(1).unsqueeze(-1)).abs().max()
    return kept, float(missed), torch.get_rng_state()


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_in_attention(gloo2: GlooPool, fused: bool) -> None:
    (kept, missed, state), (other, _, other_state) = gloo2.run(attention_dropout, fused)
    assert torch.equal(kept, other) and torch.equal(state, other_state)
    assert abs(kept.double().mean() - KEPT) < 5 * (KEPT * (1 - KEPT) / kept.numel()) ** 0.5
    assert missed < 1e-5
    for head in range(4):
        for another in range(head):
            assert are_independent(kept[head], kept[another])


# Replicated draws


def drawn_replicated(m: Parts, x: Tensor) -> Any:
    """Stochastic depth, noise on a condition, a dropped weight: none of them has a sequence."""
    keep = torch.rand(x.shape[0], 1, 1) < 0.5
    noise = F.dropout(m.mod(x[:, 0]), 0.4).unsqueeze(1).chunk(3, -1)[0]
    return m.block(x) * keep + noise + m.norm(x) @ F.dropout(m.mat, 0.3)


def noise_like_a_shard(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return y + torch.randn_like(y) * m.w + torch.rand(y.shape, dtype=y.dtype)


def drawn_by_probability(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return y * torch.bernoulli(y.sigmoid()), torch.multinomial(m.head(y[:, -1]).softmax(-1), 3)


def dropped_channels(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return F.dropout1d(y.mT, 0.4).mT + F.alpha_dropout(y, 0.2)


def permuted_tokens(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return m.block(y[:, torch.randperm(y.shape[1])]), y[:, torch.rand(x.shape[1]).argsort()[:5]]


def gumbel(m: Parts, x: Tensor) -> Any:
    return F.gumbel_softmax(m.head(m.block(x)), tau=0.7)


def written_in_place(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    mask = torch.empty_like(y).bernoulli_(0.6)
    return y * mask + torch.zeros_like(y).uniform_(-1, 1)


REPLICATED = [
    drawn_replicated,
    noise_like_a_shard,
    drawn_by_probability,
    dropped_channels,
    permuted_tokens,
    gumbel,
    written_in_place,
]


def beside_one_device(names: list[str], mutant: str = "") -> list[tuple[str, float, bool]]:
    """Of each program: how far outputs and all gradients are from one device with the same seed, and if it leaves the
    same generator state."""
    found = []
    for body in REPLICATED:
        if body.__name__ not in names:
            continue
        torch._dynamo.reset()
        torch.manual_seed(1)
        module, x = Parts(body), torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
        steps, generators = [], []
        for call in (module, compiled(module)):
            torch.manual_seed(2)
            with MUTANTS[mutant]() if mutant else nullcontext():
                steps.append(step(call, module, [x], {}))
            generators.append(torch.get_rng_state())
        errors = differences(*steps, 1)
        assert {"grad input 0", "grad q.weight", "grad w"} <= errors.keys()
        found.append((body.__name__, max(errors.values()), torch.equal(*generators)))
    return found


def test_replicated_draws_are_those_of_one_device(gloo2: GlooPool) -> None:
    names = [body.__name__ for body in REPLICATED]
    for found in gloo2.run(beside_one_device, names):
        assert [(name, same) for name, _, same in found] == [(name, True) for name in names]
        assert not {name: far for name, far, _ in found if not far < 1e-9}


def test_a_wrong_gradient_beside_a_draw_is_noticed(gloo2: GlooPool) -> None:
    mutant = "padded rows not zeroed in the backward of an all-to-all"
    for found in gloo2.run(beside_one_device, ["noise_like_a_shard"], mutant):
        assert [far > 1e-3 for _, far, _ in found] == [True]


class Mixed(nn.Module):
    """Draws of every kind in one step, in a checkpoint and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.scale = Block(), nn.Parameter(torch.rand(12) + 1)

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(self.block(x), 0.5) * F.dropout(self.scale, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.dropped, x, use_reentrant=False)
        y = y + torch.rand_like(y) + F.dropout(y.mean(1, keepdim=True), 0.5)
        return self.dropped(y)


def mixed(inner: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    module, x = Mixed(), torch.randn(2, 7, 12)
    run = compiled(module, inner)
    for _ in range(2):
        module.zero_grad()
        out = run(x)
        out.square().sum().backward()
    assert module.scale.grad is not None
    return out.detach(), module.scale.grad, torch.get_rng_state()


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_ranks_agree_after_steps_with_draws_of_every_kind(gloo3: GlooPool, inner: str) -> None:
    first, *others = gloo3.run(mixed, inner)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
