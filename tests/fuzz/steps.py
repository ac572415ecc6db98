"""The steps of random programs. Each takes streams `[B, S, 12]`, of any length, and makes one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..programs import Parts
from ..programs.table import rope

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


# Sizes that are numbers: of pieces, places, repetitions


@step
def pieces(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    """One piece, pieces without rows, pieces of all rows, two pieces in the other order."""
    s = t.shape[1]
    cut = min(n, s)
    made = [
        t.split([s], 1),
        t.split(s, 1),
        t.split([0, s, 0], 1),
        t.split([s - cut, cut], 1)[::-1],
        t.chunk(min(n, s), 1)[::-1] if n else t.chunk(1, 1),
        torch.tensor_split(t, n, 1),
    ][n]
    return torch.cat([each.tanh() for each in made], 1)


@step
def narrowed(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    s = t.shape[1]
    first = min(n, s - 1)
    return (
        t.narrow(1, 0, s) * m.w
        + t.narrow(1, first, 1)
        + t.narrow(1, s, 0).sum()
        + t[:, -s:]
        + t.select(1, s - 1)[:, None]
    )


@step
def unflattened(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    s = t.shape[1]
    return [
        t.unflatten(1, (1, s))[:, 0],
        t.unflatten(1, (s, 1)).squeeze(2),
        t.unflatten(1, (-1, 1)).flatten(1, 2),
        t.reshape(t.numel()).reshape(t.shape),
        t.transpose(0, 1).reshape(s, -1, 12).transpose(0, 1),
        t.unfold(1, 1, 1).squeeze(-1),
    ][n] * m.w


@step
def expanded(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    b, s, c = t.shape
    return t.expand(b, s, c) + t[:, :1].expand(-1, s, -1) * m.w + t.mean(1, keepdim=True).expand_as(t)


@step
def repeated(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    s = t.shape[1]
    made = [
        t.repeat(1, 1, 1),
        t.repeat(1, 2, 1),
        t[:, :1].repeat(1, s, 1),
        t.tile(1, 1, 1),
        t.repeat_interleave(1, 1),
        torch.cat([t, t.repeat(1, 0, 1)], 1),
    ][n]
    return made[:, :LONGEST] * m.w


@step
def rolled_by_its_length(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    s = t.shape[1]
    return t.roll([s, 0, 1 - s, s + n, -n, n][n], 1) * m.w


@step
def looked_up_by_numbers(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    s = t.shape[1]
    at = [
        torch.arange(s),
        torch.arange(s - 1, -1, -1),
        torch.arange(0, s, 2),
        torch.arange(s).clamp(max=s - 2) if s > 1 else torch.arange(s),
        torch.arange(-s, 0),
        torch.arange(s)[: max(1, s - n)],
    ][n]
    return (t[:, at] if n % 2 else t.index_select(1, at % s)) * m.w


@step
def made_of_numbers(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    b, s, c = t.shape
    filled = [
        t.new_zeros(b, s, c),
        t.new_ones(s, 1),
        t.new_full((b, s, 1), 1 / s),
        torch.linspace(0, 1, s, dtype=t.dtype)[:, None],
        torch.eye(s, dtype=t.dtype)[:, :1],
        torch.zeros_like(t),
    ][n]
    return torch.cat([t * m.w + filled, t.new_zeros(b, 0, c)], 1)


@step
def strided(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    y = t.sigmoid().contiguous()
    b, s, c = y.shape
    return y.as_strided((b, s, c), (s * c, c, 1)) * m.w


@step
def scattered(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    s, last = t.shape[1], max(t.shape[1] - n, 1)
    return [
        torch.slice_scatter(t, t * m.w, 1, 0, s),
        torch.slice_scatter(t, t[:, :last] * m.w, 1, 0, last),
        torch.zeros_like(t).index_copy(1, torch.arange(s), t * m.w),
        torch.zeros_like(t).index_add(1, torch.arange(s) % last, t * m.w),
        torch.select_scatter(t, t[:, 0] * m.w, 1, s - 1),
        torch.zeros_like(t).scatter(1, torch.arange(s)[None, :, None].expand_as(t), t * m.w),
    ][n]


@step
def padded_by_numbers(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    s = t.shape[1]
    crop = min(n, s - 1)
    return [
        F.pad(t, (0, 0, 0, 0)),
        F.pad(t, (0, 0, s, 0))[:, :LONGEST],
        F.pad(t, (0, 0, -crop, crop)),
        F.pad(t, (0, 0, 0, -crop)),
        F.pad(t.mT, (crop, 0), mode="replicate").mT[:, :LONGEST],
        F.pad(t, (1, -1, 0, 0), value=0.5),
    ][n] * m.w


@step
def whole_numbers(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    """Integers and truth values that are made of a stream, and work by row again."""
    ids = (t.detach().abs().sum(-1) * 7).long() % 40
    kept = ids % 3 != n % 3
    return m.table(ids) * kept[..., None] + t + ids.cumsum(1)[..., None].to(t.dtype) / 400


@step
def complex_numbers(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    z = torch.view_as_complex(t.reshape(*t.shape[:2], 6, 2).contiguous())
    z = [z.conj(), z * z, z.roll(1, 1), z * torch.polar(torch.ones(6), m.w[:6].float()).to(z), z.cumsum(1), z.flip(1)][
        n
    ]
    return torch.view_as_real(z.resolve_conj()).flatten(2)


# Views and writes


@step
def written_through_a_view(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    """What is written to a view, or to a view of that, shows in the whole."""
    y = t * 1
    view = y.transpose(1, 2)[:, n:] if n % 2 else y.unflatten(2, (3, 4))[..., n % 4]
    view.mul_(m.bias[0])
    view.view(-1)[: n + 1].add_(1) if view.is_contiguous() else view[0].add_(1)
    return y


@step
def written_behind_a_break(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    y = t * m.w
    view = [y[:, :, :4], y[:, n : n + 2], y.mT, y.view(-1), y[0], y.unsqueeze(0)][n]
    torch._dynamo.graph_break()
    view.mul_(3)
    return y


@step
def written_outside(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    """The view leaves a graph, code that is not compiled writes to it, and the whole enters the next graph."""
    y = t * m.w
    write(y[:, n:], n)
    return y


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def write(value: Tensor, n: int) -> None:
    """Write to what has left a graph."""
    if n % 3 == 0:
        value.mul_(3)
    elif n % 3 == 1:
        value[..., :1].zero_()
    else:
        value.copy_(value.detach().sin() + value * 2)


@step
def read_as_data(m: Parts, t: Tensor, u: Tensor, n: int) -> Tensor:
    return t * m.w.data + t.data * m.w
