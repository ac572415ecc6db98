"""Random programs on one device and on P simulated ranks: outputs and gradients, on every rank.

A program is a list of steps. Each takes streams `[B, S, 12]`, of any length, and makes one: attention in several
dresses, shifts by few rows, convolutions, scans, windows, views, writes, regions without gradients. What a stream is
cut into by one step is what the next one meets. Nothing is asserted of what moves: see `test_programs` for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from .equivalence import assert_equivalent
from .mutants import MUTANTS
from .programs import Parts
from .programs.table import rope

MakeStream = Callable[[Parts, Tensor, Tensor, int], Tensor]
"""`(parts, stream, another stream, a number below 6) -> stream`"""

STEPS: dict[str, MakeStream] = {}
LONGEST = 30


def step(make: MakeStream) -> MakeStream:
    STEPS[make.__name__] = make
    return make


# Attention


@step
def block(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return m.block(t, is_causal=bool(n % 2), enable_gqa=True)


@step
def cross(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return t + m.attend(t, u, enable_gqa=True)


@step
def cross_from_few(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    latents = m.table.weight[: n + 1].expand(t.shape[0], -1, -1)
    return t + m.attend(t, latents + m.attend(latents, u, enable_gqa=True), enable_gqa=True)


@step
def eager(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    q, k, v = m.split(m.q(t)) * 0.5, m.repeated(m.split(m.k(t), m.kv)), m.repeated(m.split(m.v(t), m.kv))
    scores = q @ k.mT + m.bias.view(-1, 1, 1) * torch.arange(t.shape[1])
    if n % 2:
        scores = scores.masked_fill(torch.ones(t.shape[1], t.shape[1], dtype=torch.bool).triu(1), -torch.inf)
    return t + m.o(m.join(torch.matmul(scores.softmax(-1), v)))


@step
def einsum_attention(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    b, s, _ = t.shape
    q, k, v = (f.view(b, s, m.kv, -1) for f in (m.q(t)[..., : m.kv * m.dim], m.k(t), m.v(t)))
    position = torch.arange(s, dtype=t.dtype)[:, None]
    p = torch.einsum("bqhd,bkhd->bhqk", rope(q, position, bool(n % 2)), k).softmax(-1)
    return m.mod(F.pad(torch.einsum("bhqk,bkhd->bqhd", p, v).flatten(2), (0, 12 - m.kv * m.dim))).chunk(3, -1)[0] + t


@step
def padded_keys(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    kept = torch.arange(t.shape[1]) < max(1, t.shape[1] - n)
    return m.block(t, attn_mask=kept[None, None, None], enable_gqa=True)


@step
def pair_bias(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    bias = (t[:, :, None] * m.w * t[:, None]).sum(-1)
    return m.block(t, attn_mask=bias[:, None], enable_gqa=True)


@step
def joint(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    q = torch.cat([m.split(m.q(t)), m.split(m.o(u))], 2)
    k, v = (m.repeated(torch.cat([m.split(f(t), m.kv), m.split(f(u), m.kv)], 2)) for f in (m.k, m.v))
    a, b = m.join(F.scaled_dot_product_attention(q, k, v)).split([t.shape[1], u.shape[1]], 1)
    return t + m.o(a) + b.mean(1, keepdim=True)


@step
def windows(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    """As many windows of `n + 1` tokens as fit, shifted where n is odd."""
    size, (b, s, c) = min(n + 1, t.shape[1]), t.shape
    y = t[:, : s - s % size]
    y = y.roll(-1, 1) if n % 2 else y
    y = m.block(y.reshape(-1, size, c), enable_gqa=True).reshape(b, -1, c)
    return y.roll(1, 1) if n % 2 else y


@step
def linear_attention(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    q, k, v = F.elu(m.q(t)) + 1, F.elu(m.mod(t)[..., :12]) + 1, m.mod(t)[..., 12:24]
    made = q @ (k.mT @ v) / (q @ k.sum(1, keepdim=True).mT)
    return t + m.o(made)


@step
def sequence_first(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    s, b, c = t.shape[1], t.shape[0], t.shape[2]
    y = m.o(t.transpose(0, 1).reshape(s * b, c)).view(s, b, c).transpose(0, 1)
    return m.block(y, enable_gqa=True)


# Shifts by few rows


@step
def without_last(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return t[:, :-1] if t.shape[1] > 1 else t


@step
def without_first(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return t[:, min(n, t.shape[1] - 1) :]


@step
def pad_shift(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return F.pad(t, (0, 0, 1, 0))[:, :-1] * m.w + t


@step
def cat_shift(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    first = m.cls.expand(t.shape[0], -1, -1) if n % 2 else t[:, -1:]
    return torch.cat([first, t[:, :-1]], 1) * m.w + t


@step
def rolled(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return t + t.roll(n - 2, 1).tanh()


@step
def differences(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return t[:, 1:] - t[:, :-1].sigmoid() if t.shape[1] > 1 else t * m.w


@step
def class_tokens(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return torch.cat([m.table.weight[: n + 1].expand(t.shape[0], -1, -1), t], 1)[:, :LONGEST]


@step
def registers_behind(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return torch.cat([t, m.cls.expand(t.shape[0], n + 1, -1)], 1)[:, :LONGEST]


# Other ops that mix the sequence


@step
def causal_convolution(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    taps = n % 3 + 2
    y = F.conv1d(t.mT, m.mat[:, :taps].unsqueeze(1), padding=taps - 1, groups=12)
    return y[..., : t.shape[1]].mT


@step
def convolution(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    weight = m.mod.weight.view(12, 12, 3)
    return t + F.conv1d(t.mT, weight, m.w, padding=1, stride=1).mT


@step
def strided_convolution(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return F.conv1d(t.mT, m.mod.weight.view(12, 12, 3), m.w, stride=2, padding=1).mT


@step
def prefix_sum(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return t + t.cumsum(1) / t.shape[1]


@step
def decay_scan(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    state, states = torch.zeros_like(t[:, 0]), []
    for at in range(t.shape[1]):
        state = torch.tanh(state * m.w + t[:, at])
        states.append(state)
    return torch.stack(states, 1)


@step
def token_mixing(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    s = t.shape[1]
    return t + (t.mT @ m.table.weight[:s, :9] @ m.table.weight[:s, :9].T).mT / s


@step
def softmax_over_tokens(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return t * (t @ m.w).softmax(1)[..., None] + (t.softmax(1) * t).sum(1, keepdim=True)


@step
def norm_over_tokens(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return (t - t.mean(1, keepdim=True)) / (t.var(1, keepdim=True, correction=0) + 0.1).sqrt()


@step
def pooled(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return t * m.o(t.mean(1)).unsqueeze(1) + t.logsumexp(1, keepdim=True).tanh()


@step
def flipped(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return t.flip(1) if n % 2 else t[:, ::2]


@step
def upsampled(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    y = t.repeat_interleave(2, 1) if n % 2 else F.interpolate(t.mT, scale_factor=2).mT
    return y[:, :LONGEST]


@step
def fourier(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return torch.fft.fft(t, dim=1).real * 0.3


@step
def gathered(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    index = torch.arange(t.shape[1] + 1) * (n + 1) % t.shape[1]
    return t[:, index] if n % 2 else t.gather(1, index[None, :, None].expand(t.shape[0], -1, 12))


# Streams and views


@step
def joined(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return torch.cat([t, u], 1)[:, :LONGEST]


@step
def swapped_halves(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    cut = min(n, t.shape[1] - 1)
    return torch.cat([t[:, cut:], t[:, :cut]], 1)


@step
def head_of(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return t[:, : u.shape[1]] * m.w


@step
def flat_rows(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return F.gelu(m.o(t.reshape(-1, 12))).view_as(t) + t


@step
def folded(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    """`[B, (s n), C]` with s and n exchanged."""
    b, s, c = t.shape
    n = min(n % 3 + 1, s)
    return m.norm(t[:, : s - s % n].reshape(b, -1, n, c).transpose(1, 2).reshape(b, -1, c))


@step
def through_channels(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    y = t.mT.unflatten(1, (3, 4))
    return (y * m.bias.sum()).softmax(2 if n % 2 else 1).flatten(1, 2).mT


@step
def of_two(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    if t.shape[1] != u.shape[1]:
        return t + u.mean(1, keepdim=True)
    return [t + u, t * u.sigmoid(), u - t, torch.stack([t, u], n % 4).amin(n % 4), torch.lerp(t, u, m.w), u * m.w][n]


@step
def outer_product(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return torch.einsum("bsc,btc,btd->bsd" if n % 2 else "bsc,bte,btd->bsd", t, u.tanh(), u.tanh()) / 40


# Local work, writes and modes


@step
def modulated(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    scale, shift, gate = m.mod(F.silu(u.mean(1))).unsqueeze(1).chunk(3, -1)
    return t + gate * m.down(F.gelu(m.up(m.norm2(t) * (1 + scale) + shift)))


@step
def positioned(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    s = t.shape[1]
    where = (torch.arange(s) < s - n)[:, None]
    return torch.where(where, t + m.table(torch.arange(s)), t * torch.arange(s)[:, None] / s)


@step
def written(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    y = t.clone()
    y[:, n:] *= m.w
    y[:, : n // 2] = 0.3
    y.transpose(1, 2)[:, n].add_(m.bias[0])
    return y


@step
def copied_into(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    y = t.new_zeros(t.shape[0], t.shape[1] + 2, 12)
    y[:, 1:-1] = t
    return y[:, :LONGEST] + m.w


@step
def without_gradient(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    with torch.no_grad():
        scale = (t * m.w).std(1, keepdim=True, correction=0) + m.o(t) if n % 2 else t.cumsum(1).sigmoid() * m.w
    return t / (scale.abs() + 1) + t.detach() * m.w


@step
def reciprocal(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    """Infinite in a padded row that is anything but a repetition."""
    s = t.shape[1]
    distance = (s - torch.arange(s)).to(t.dtype)[:, None]
    return t / distance + distance.log() * m.w + distance.sqrt()


# Outputs


def token_loss(m: Parts, t: Tensor, n: int) -> Tensor:
    logits = m.head(t)
    target = torch.arange(t.shape[0] * t.shape[1]).view(t.shape[:2]) % 17
    target = target.masked_fill(torch.arange(t.shape[1]) < n, -100)
    if n % 3 == 0 and t.shape[1] > 1:
        return F.cross_entropy(logits[:, :-1].reshape(-1, 17), target[:, 1:].reshape(-1), reduction="sum")
    if n % 3 == 1:
        weight = m.head.weight[:, 0].detach().abs()
        return F.cross_entropy(logits.mT, target, weight, label_smoothing=0.1, reduction="sum")
    return F.mse_loss(t, t.roll(1, 1)) + F.kl_div(logits.log_softmax(-1), logits.detach().softmax(-1))


class Draw(NamedTuple):
    step: str
    stream: int
    other: int
    number: int


class RandomProgram(NamedTuple):
    steps: Sequence[Draw]
    shape: tuple[int, int, int]
    heads: tuple[int, int, int]
    parts: int
    dynamic: bool
    loss: int

    def body(self, m: Parts, x: Tensor) -> Any:
        streams = [x]
        for name, stream, other, number in self.steps:
            t, u = (streams[-1 - min(at, len(streams) - 1)] for at in (stream, other))
            streams.append(STEPS[name](m, t, u, number))
        last = streams[-1]
        if self.loss < 6:
            return token_loss(m, last, self.loss), last.mean(1)
        return [last, streams[-2], last[:, -1], last.sum(1) / last.shape[1]][: self.loss - 5]

    def check(self) -> None:
        heads, dim, kv = self.heads
        torch.manual_seed(0)
        module = Parts(self.body, heads, dim, kv)
        x = torch.randn(self.shape, dtype=torch.float64, requires_grad=True)
        dynamic = True if self.dynamic else None
        assert_equivalent(module, (x,), parts=self.parts, dynamic=dynamic, tolerance=1e-8, must_shard=False)


@st.composite
def programs(draw: st.DrawFn) -> RandomProgram:
    some = st.builds(
        Draw,
        st.sampled_from(list(STEPS)),
        st.sampled_from((0, 0, 0, 1)),
        st.integers(0, 3),
        st.integers(0, 5),
    )
    return RandomProgram(
        tuple(draw(st.lists(some, min_size=2, max_size=8))),
        (draw(st.integers(1, 3)), draw(st.integers(2, 14)), 12),
        draw(st.sampled_from(((3, 4, 3), (6, 2, 2), (2, 6, 1)))),
        draw(st.integers(2, 4)),
        draw(st.sampled_from((False, False, True))),
        draw(st.integers(0, 9)),
    )


@settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(programs())
def test_a_random_program_is_right_on_every_rank(program: RandomProgram) -> None:
    program.check()


@pytest.mark.parametrize(
    ("mutant", "step", "loss"),
    [
        ("softmax of local rows", "softmax_over_tokens", 6),
        ("halo: every rank reads the rows that rank 0 would", "causal_convolution", 6),
        ("cross_entropy: padded rows have class 0", "rolled", 1),
    ],
)
def test_a_planted_wrong_is_noticed(mutant: str, step: str, loss: int) -> None:
    program = RandomProgram([Draw("block", 0, 0, 0), Draw(step, 0, 1, 1)], (1, 7, 12), (3, 4, 3), 2, False, loss)
    program.check()
    with MUTANTS[mutant](), pytest.raises(AssertionError, match=r"P=2: .*grad o\.weight"):
        program.check()
