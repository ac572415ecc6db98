"""Ops that mix the sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import Parts, X, ids, program


@program(X, moves={"all_to_all": 6, "gather_output": 1})
def cumsum(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return m.norm(y.cumsum(1))


@program(X, moves={"all_to_all": 6, "all_reduce": 1})
def softmax_tokens(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y.softmax(1) * y).sum(1)


@program(X, moves={"all_to_all": 4, "all_reduce": 3, "gather_output": 1})
def norm_tokens(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True) + 1e-05).sqrt()


@program(X, whole=True)
def roll_flip(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y.roll(1, 1) + y.flip(1), y.roll(3))


@program(X)
def pad_shift(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return F.pad(y, (0, 0, 1, 0))[:, :-1] * m.w + y


@program(X, moves={"all_to_all": 4, "select_rows": 1, "gather_output": 1, "halo": 1})
def pad_shift_cat(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1) * m.w + y


@program((2, 24, 12), moves={"all_to_all": 13, "gather_output": 7})
def pads(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (
        F.pad(y, (0, 0, 2, 3)) @ m.mat,
        F.pad(y, (1, 2))[..., :12] @ m.mat,
        F.pad(y, (0, 0, -2, 5), value=1.0) @ m.mat,
        F.pad(y.mT, (3, 3), mode="replicate"),
        F.pad(y.mT, (3, 3), mode="circular"),
        F.pad(y.mT, (2, 2), mode="reflect"),
        m.block(F.pad(y, (0, 0, 0, 6)))[:, :24],
    )


@program((2, 24, 12), moves={"all_to_all": 7, "gather_output": 3})
def unfold_win(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    w = y.unfold(1, 5, 1)
    return (
        w.mean(-1),
        F.unfold(y.mT.unsqueeze(-1), (3, 1)),
        y.unfold(1, 6, 6).permute(0, 1, 3, 2).flatten(0, 1).mean(1),
    )


@program(X, moves={"all_to_all": 8, "all_gather": 1, "gather_output": 1})
def topk_tokens(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    s = y @ m.w
    i = s.topk(5, 1).indices
    return m.o(y.gather(1, i[..., None].expand(-1, -1, 12)))


@program((2, 12, 12))
def avg_pool_tokens(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (F.avg_pool1d(y.transpose(1, 2), 2).transpose(1, 2), F.max_pool1d(y.transpose(1, 2), 3).sum(2))


@program(X)
def scan_loop(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    h = torch.zeros_like(y[:, 0])
    out = []
    for t in range(y.shape[1]):
        h = torch.tanh(h * m.w + y[:, t])
        out.append(h)
    return m.o(torch.stack(out, 1))


@program((1, 13, 12))
def rwkv_like(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    d = torch.exp(-torch.exp(m.w))
    k = m.k(y)
    s = 0
    out = []
    for t in range(13):
        s = s * d + k[:, t]
        out.append(s)
    return torch.stack(out, 1) * torch.sigmoid(y)


@program(X)
def mixer(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return y + (m.norm(y).transpose(1, 2) @ m.table.weight[:13, :12] @ m.table.weight[:13, :12].T).transpose(1, 2)


@program((2, 12, 12))
def mixer_linear(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    y = y + m.o(m.norm(y).transpose(1, 2)).transpose(1, 2)
    return m.block(y)


@program(X)
def gram(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    g = y.mT @ y
    return (m.block(y @ g), g)


@program(X, whole=True)
def pair_representation(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    z = y[:, :, None] * m.w + y[:, None]
    z = z + m.block(z.flatten(0, 1)).view_as(z)
    z = z + m.block(z.transpose(1, 2).flatten(0, 1)).view_as(z).transpose(1, 2)
    return (z.mean(1), z.sum(2))


@program(X, moves={"all_to_all": 9, "all_reduce": 1, "gather_output": 2})
def sym_scores(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    s = y @ y.mT
    s = s + s.mT
    return (s.softmax(-1) @ y, s.diagonal(dim1=1, dim2=2), s.tril().sum())


@program(X)
def einsum_of_three(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (
        torch.einsum("bsc,bsd,s->bcd", y, x, m.table.weight[:13, 0]),
        torch.einsum("...c,cd->...d", y, m.mat),
        torch.einsum("bsc->c", y),
    )


@program((3, 3, 12), whole=True)
def outer_eq(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    s = y.sum(-1)
    z = s[:, :, None] * s[:, None] + s
    return (z, z.sum(0) + z.sum(1).mT, z @ s, z.mT * s.unsqueeze(0))


@program(X)
def split_three_seq(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    a, b, c = y.split(5, 1)
    return (a * 2, b.sum(1), c, torch.cat([c, b, a], 1) @ m.mat)


@program(X)
def shift_slices(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y[:, 1:] * y[:, :-1]).sum()


@program(X)
def strided(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y[:, ::2], y[:, 1::3].mean(1))


@program(X)
def emb_weight_act(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (
        F.embedding(torch.arange(13).flip(0), y[0]),
        y[0][torch.arange(5)],
        y[:, torch.tensor([0, 5, 12, 5])],
        y[1, [0, 3, 3]],
    )


@program(X, ids(2, 13, high=2), (26, 12))
def masked_scatter(m: Parts, x: Tensor, i: Tensor, img: Tensor) -> Any:
    mask = (i == 1)[..., None].expand_as(x)
    return m.block(x.masked_scatter(mask, m.o(img)))


@program(X, moves={"all_to_all": 17, "all_gather": 1, "gather_output": 4})
def sorted_tokens(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    order = (y @ m.w).argsort(1)
    y = y.gather(1, order[..., None].expand(-1, -1, 12))
    back = m.block(y).gather(1, order.argsort(1)[..., None].expand(-1, -1, 12))
    return (back, y.sort(1).values, y.median(1).values, y.kthvalue(3, 1).values)


@program((2, 12, 12), moves={"all_to_all": 5, "all_reduce": 1, "gather_output": 3})
def upsampled(m: Parts, x: Tensor) -> Any:
    y = m.block(x).mT
    return (
        F.interpolate(y, scale_factor=2).mT @ m.mat,
        F.interpolate(y, size=17, mode="linear").mT @ m.mat,
        F.interpolate(y.unflatten(2, (3, 4)), scale_factor=2, mode="bilinear").flatten(2).mT,
        y.repeat_interleave(2, 2).mT,
    )


@program((2, 12, 12))
def interleaved_streams(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    both = torch.stack([y, y * m.w], 2).flatten(1, 2)
    both = m.block(both)
    return (both[:, ::2], both.unflatten(1, (12, 2)).mean(2), both.unflatten(1, (-1, 2))[:, :, 1])


@program(X, moves={"all_to_all": 12, "gather_output": 2})
def fourier(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    low = torch.fft.irfft(torch.fft.rfft(y, dim=1)[:, :4], n=13, dim=1)
    return (m.block(low), torch.fft.fft2(y).real)


@program(X, moves={"all_to_all": 11, "all_reduce": 1, "gather_output": 2})
def scattered_tokens(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    index = torch.arange(13) % 5
    sums = torch.zeros(2, 5, 12, dtype=x.dtype).index_add(1, index, y)
    spread = torch.zeros_like(y).scatter_add(1, (index * 2)[None, :, None].expand(2, -1, 12), y)
    return (sums, m.block(spread), y.index_copy(1, torch.tensor([1, 12]), m.table.weight[:2].expand(2, -1, -1)))


@program(X, moves={"all_to_all": 4, "all_reduce": 4, "gather_output": 1})
def experts(m: Parts, x: Tensor) -> Any:
    """A mixture: the weights of the best two of five experts, every expert on every token."""
    y = m.block(x)
    scores = m.head(y)[..., :5].softmax(-1)
    top, index = scores.topk(2, -1)
    weights = torch.zeros_like(scores).scatter(-1, index, top / top.sum(-1, keepdim=True))
    made = torch.stack([F.linear(y, m.mat * m.rel.weight[e, 0]) for e in range(5)], -2)
    load = F.one_hot(index, 5).sum((0, 1, 2)) / 26
    return ((made * weights[..., None]).sum(-2), (load * scores.mean((0, 1))).sum())


@program(X, whole=True)
def distances(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return ((-torch.cdist(y, y.flip(1))).softmax(-1) @ y, F.cosine_similarity(y[:, :, None], y[:, None], dim=-1))


@program(X)
def vector_quantised(m: Parts, x: Tensor) -> Any:
    """Each token by the nearest of a table, which learns from it, and how evenly these are used (van den Oord 2017)."""
    y = m.block(x)
    index = torch.cdist(y.flatten(0, 1), m.table.weight).argmin(-1).view(2, 13)
    code, used = m.table(index), F.one_hot(index, 40).to(x.dtype).mean((0, 1))
    loss = (code - y.detach()).square().mean() + 0.25 * (code.detach() - y).square().mean()
    return (m.head(y + (code - y).detach()), loss, (-(used * (used + 1e-9).log()).sum()).exp(), index)


@program(X, whole=True)
def solved_for_tokens(m: Parts, x: Tensor) -> Any:
    """Ridge regression: the factorisation that raises if it finds no solution runs whole, and the rest in shards."""
    y = m.block(x)
    gram = y.mT @ y + torch.eye(12, dtype=x.dtype)
    return (torch.cholesky_solve(y.mT, torch.linalg.cholesky(gram)), torch.linalg.solve(gram, y.mT).mT, m.head(y))


@program(ids(2, 13))
def sparse_gradients(m: Parts, tokens: Tensor) -> Any:
    return m.head(m.block(F.embedding(tokens, m.table.weight, sparse=True)))


@program(X)
def norms_over_tokens(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (F.normalize(y, dim=1), F.layer_norm(y, (13, 12)), y / y.abs().amax(1, keepdim=True), F.softmin(y, 1))


@program(X, moves={"all_to_all": 9, "gather_output": 5})
def running_extrema(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y.cummax(1).values, y.logcumsumexp(1), (y / 9).cumprod(1), y.cumsum(0), torch.cumsum(y.flip(1), 1).flip(1))


@program((2, 12, 12), whole=True)
def merged_tokens(m: Parts, x: Tensor) -> Any:
    """Pairs of tokens averaged by similarity, as in token merging; and patches merged as in Swin."""
    y = m.block(x)
    a, b = y[:, ::2], y[:, 1::2]
    partner = (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT).argmax(-1)
    merged = b.scatter_reduce(1, partner[..., None].expand(-1, -1, 12), a, "mean")
    return (m.block(merged), F.linear(torch.cat([a, b], -1), m.mod.weight[:24].T))


@program((1, 13, 12), whole=True)
def strided_and_transposed_convolutions(m: Parts, x: Tensor) -> Any:
    weight = m.mod.weight.view(12, 12, 3)
    y = F.conv1d(m.block(x).mT, weight, m.w, stride=2)
    return (m.block(y.mT), F.conv_transpose1d(y, weight, stride=2).mT)


@program(X)
def two_scans(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    forward, backward, a, b = [], [], x.new_zeros(2, 12), x.new_zeros(2, 12)
    for at in range(13):
        a, b = a * m.w.sigmoid() + y[:, at], torch.tanh(m.o(b) + y[:, 12 - at])
        forward.append(a)
        backward.append(b)
    return torch.stack(forward, 1) + torch.stack(backward[::-1], 1)


@program((1, 13, 12), parts=3)
def convolution_of_equal_length(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return F.conv1d(y.mT, m.mat[:, :3].unsqueeze(1), m.w, padding=1, groups=12).mT * m.w + y


@program((2, 30, 12), parts=2, moves={"all_to_all": 8, "halo": 1, "gather_output": 1})
def convolution_without_its_ends(m: Parts, x: Tensor) -> Any:
    """As many rows less on both sides as the other operand of the sum."""
    y = m.block(x)
    return m.block(F.conv1d(y.mT, m.mod.weight.view(12, 12, 3)).mT + y[:, 1:-1])


@program((2, 13, 12), parts=3, moves={"all_to_all": 4, "halo": 2, "gather_output": 1})
def convolution_of_a_window(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return F.conv1d(y[:, 1:].mT, m.mod.weight.view(12, 12, 3), padding=1).mT + y[:, :-1]


@program((1, 5, 12), parts=4)
def convolution_with_a_rank_without_rows(m: Parts, x: Tensor) -> Any:
    return m.block(F.conv1d(x.mT, m.mod.weight.view(12, 12, 3), m.w, padding=1).mT)
