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


@program(X, whole=True)
def pad_shift_cat(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1) * m.w + y


@program((2, 24, 12), whole=True)
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


@program((2, 24, 12), whole=True)
def unfold_win(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    w = y.unfold(1, 5, 1)
    return (
        w.mean(-1),
        F.unfold(y.mT.unsqueeze(-1), (3, 1)),
        y.unfold(1, 6, 6).permute(0, 1, 3, 2).flatten(0, 1).mean(1),
    )


@program(X)
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


@program(X, whole=True)
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
