"""Pools, heads and losses; gradients of what is replicated; what the padding must not reach."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import Parts, X, given, ids, labels, program

# Pools, heads and losses


@program(ids(2, 13))
def tokens_lm(m: Parts, i: Tensor) -> Any:
    h = m.table(i) + m.table(torch.arange(i.shape[1])).unsqueeze(0)
    return m.block(h, is_causal=True) @ m.table.weight.T


@program(ids(2, 13), moves={"all_to_all": 6, "all_reduce": 1})
def tied_loss(m: Parts, i: Tensor) -> Any:
    h = m.block(m.table(i), is_causal=True)
    lg = h @ m.table.weight.T
    return F.cross_entropy(lg[:, :-1].reshape(-1, 40), i[:, 1:].reshape(-1))


@program(X, given(13, 9), moves={"all_to_all": 4, "all_reduce": 1})
def masked_mean(m: Parts, x: Tensor, lengths: Tensor) -> Any:
    y = m.block(x)
    k = (torch.arange(x.shape[1])[None] < lengths[:, None]).to(x.dtype)[..., None]
    return (y * k).sum(1) / k.sum(1).clamp(min=1)


@program(X, moves={"all_to_all": 4, "all_reduce": 3})
def sum_over_count(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y.sum(1) / x.shape[1], y.mean((0, 1)), y.mean())


@program(X, moves={"all_to_all": 5, "all_reduce": 4, "gather_output": 1})
def amax_pool(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y.amax(1), y.max(1).values, y.max())


@program(X, given(12, 8), moves={"all_to_all": 5, "all_reduce": 1})
def last_gather(m: Parts, x: Tensor, lengths: Tensor) -> Any:
    y = m.block(x)
    return m.head(y[torch.arange(2), lengths])


@program(X, moves={"all_to_all": 4, "select_rows": 1})
def last_token(m: Parts, x: Tensor) -> Any:
    return m.head(m.block(x)[:, -1])


@program(X)
def second_last(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (m.head(y[:, -2]), y[:, -3:], y[:, -5:-2])


@program(X)
def other_pools(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y.logsumexp(1), y.std(1), y.norm(dim=1), y.prod(1))


@program(X, moves={"all_to_all": 6, "all_reduce": 2})
def attn_pool(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    p = (y @ m.w).softmax(1)
    return ((p[..., None] * y).sum(1), torch.einsum("bs,bsc->bc", p, y))


@program(X, labels(ignored=(0, 1, 2, 3, 4, 5)), moves={"all_to_all": 4, "all_reduce": 1})
def ce_uneven(m: Parts, x: Tensor, t: Tensor) -> Any:
    return F.cross_entropy(m.head(m.block(x)).flatten(0, 1), t.flatten())


@program(X, labels(ignored=range(13)))
def ce_none_valid(m: Parts, x: Tensor, t: Tensor) -> Any:
    return F.cross_entropy(m.head(m.block(x)).flatten(0, 1), t.flatten(), reduction="sum")


@program(X, labels(ignored=(3,)), moves={"all_to_all": 4, "all_reduce": 1})
def ce_classdim(m: Parts, x: Tensor, t: Tensor) -> Any:
    return F.cross_entropy(m.head(m.block(x)).transpose(1, 2), t, label_smoothing=0.1)


@program(X, labels(ignored=(3,)))
def ce_weights_smooth(m: Parts, x: Tensor, t: Tensor) -> Any:
    return F.cross_entropy(
        m.head(m.block(x)).transpose(1, 2), t, weight=torch.linspace(0.1, 1, 17, dtype=x.dtype), label_smoothing=0.2
    )


@program(X, labels(ignored=(3,)))
def ce_unreduced(m: Parts, x: Tensor, t: Tensor) -> Any:
    loss = F.cross_entropy(m.head(m.block(x)).flatten(0, 1), t.flatten(), reduction="none").view(2, 13)
    k = t != -100
    return (loss * k).sum() / k.sum()


@program(X, labels(ignored=(3,)), moves={"all_to_all": 4, "all_reduce": 1})
def ce_shift_pad(m: Parts, x: Tensor, t: Tensor) -> Any:
    lg = m.head(m.block(x)).float()
    t = F.pad(t, (0, 1), value=-100)[..., 1:]
    return F.cross_entropy(lg.view(-1, 17).double(), t.reshape(-1))


@program(X, labels(ignored=(3,)), moves={"all_to_all": 6, "all_reduce": 1})
def ce_shift_slice(m: Parts, x: Tensor, t: Tensor) -> Any:
    lg = m.head(m.block(x))
    return F.cross_entropy(lg[..., :-1, :].contiguous().view(-1, 17), t[..., 1:].contiguous().view(-1))


@program(X, labels(), moves={"all_to_all": 4, "all_reduce": 1})
def nll(m: Parts, x: Tensor, t: Tensor) -> Any:
    return F.nll_loss(m.head(m.block(x)).log_softmax(-1).transpose(1, 2), t)


@program(X, labels())
def ce_gather(m: Parts, x: Tensor, t: Tensor) -> Any:
    lg = m.head(m.block(x))
    lp = lg.log_softmax(-1).gather(-1, t[..., None]).squeeze(-1)
    return -lp.mean() + 0.01 * lg.logsumexp(-1).pow(2).mean()


@program(X, X, moves={"all_to_all": 12, "all_reduce": 3})
def mse(m: Parts, x: Tensor, y: Tensor) -> Any:
    return (F.mse_loss(m.block(x), y), F.smooth_l1_loss(m.block(x), y, reduction="sum"), F.l1_loss(m.block(x), y))


@program(X)
def bce(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return F.binary_cross_entropy_with_logits(y, (x > 0).to(x.dtype), pos_weight=m.w.detach() ** 2)


@program(X, whole=True)
def std_correction(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (
        y.std(1, correction=0),
        y.var((0, 1), correction=3),
        torch.std_mean(y, 1)[0],
        F.instance_norm(y.mT).mT,
        F.group_norm(y.mT, 4, m.w, m.w).mT,
    )


@program(X)
def ties_grad(m: Parts, x: Tensor) -> Any:
    y = m.block(x).relu()
    return (y.amin(1) * 3, y.amax(-1), y.min() * 2)


# Gradients of what is replicated


@program(X, (2, 12), moves={"all_to_all": 4, "gather_output": 1})
def adaln(m: Parts, x: Tensor, c: Tensor) -> Any:
    s, b, g = m.mod(F.silu(c)).unsqueeze(1).chunk(3, -1)
    x = x + g * m.attend(m.norm(x) * (1 + s) + b)
    s, b, g = m.mod(F.silu(c))[:, None].chunk(3, 2)
    return x + g * m.down(F.gelu(m.up(m.norm2(x) * (1 + s) + b)))


@program(X, moves={"all_to_all": 4, "all_reduce": 1})
def param_both(m: Parts, x: Tensor) -> Any:
    y = m.block(x * m.w)
    return (y.mean(1) * m.w + m.w.sum() * m.o.weight.sum(), m.w * 2)


@program(X)
def tied_up(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return y @ m.up.weight.T @ m.up.weight + m.up.weight.sum()


@program(X, moves={"all_to_all": 8, "all_reduce": 1, "gather_output": 1})
def mean_used_everywhere(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    c = m.o(y.mean(1))
    y = y * c[:, None] + c.unsqueeze(1)
    z = m.block(y)
    return (z, c)


@program(X)
def gathered_then_sharded(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    g = y.flip(1).cumsum(1) @ m.mat
    return m.block(y * g)


@program(X, (13, 12), (12,))
def inputs_grad_bcast(m: Parts, x: Tensor, p: Tensor, c: Tensor) -> Any:
    return m.block(x + p) * c + p.sum() * c


@program(X, moves={"all_to_all": 4, "gather_output": 3})
def scalars(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    a = m.bias[0]
    y = y * a + m.bias[1]
    y = torch.where(y > 0, y, m.bias[2])
    y = F.prelu(y.transpose(1, 2), m.w).transpose(1, 2)
    return (torch.addcmul(y, y, m.w), torch.lerp(x, y, m.bias[0]), y.clamp(min=m.bias[1]))


@program(X)
def weights_on_fly(m: Parts, x: Tensor) -> Any:
    w = F.normalize(m.mat, dim=0) @ m.mat.T
    y = m.block(x @ w)
    return F.linear(y, w.softmax(0), m.w.cumsum(0))


@program(X)
def weight_from_tokens(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    w = y.mean(1).mean(0)
    n = F.layer_norm(y, (12,), w, m.w)
    return (n, F.rms_norm(y, (12,), w), F.linear(y, m.mat * w, w))


@program(X)
def frozen(m: Parts, x: Tensor) -> Any:
    m.q.weight.requires_grad_(False)
    m.norm.weight.requires_grad_(False)
    return m.block(x)


@program(X)
def clamp_minmax(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (
        y.clamp(min=y.mean(1, keepdim=True)),
        y.clamp(max=m.w),
        torch.minimum(y, y.amax(1, keepdim=True) * 0.5),
        y.hypot(x),
        torch.lerp(y, x, y.mean(1, keepdim=True)),
    )


# What the padding must not reach


@program(X)
def row_inf(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    z = 1 / (torch.arange(13) - 12).to(x.dtype)[:, None]
    return (
        y * z.clamp(-5, 5),
        torch.where(torch.isinf(z), 0.0, z) * y,
        (y[:, :, 0] * torch.where(z[:, 0].isinf(), 0, z[:, 0])).sum(1),
    )


@program(X)
def sqrt_zero(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    y = y * (torch.arange(13) < 12).to(x.dtype)[:, None]
    return ((y.pow(2).sum(-1) + 1e-30).sqrt().sum(1), y.norm(dim=-1)[:, :12].sum())


@program(X)
def last_row_zero_norm(m: Parts, x: Tensor) -> Any:
    y = m.block(x) * (torch.arange(13) < 12).to(x.dtype)[:, None]
    return (F.normalize(y, dim=-1), y / (y.sum(-1, keepdim=True) + 0.001))


@program(X)
def matmul_inf_last(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    b = torch.zeros(13, dtype=x.dtype).masked_fill(torch.arange(13) == 12, -torch.inf)
    p = (y @ m.w + b).softmax(1)
    return (torch.einsum("bs,bsc->bc", p, y), p)


@program(X)
def contraction_inf(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    lp = (y @ m.w).masked_fill(torch.arange(13) == 12, -torch.inf).log_softmax(1)
    return ((lp.exp() * y[..., 0]).sum(1), lp.exp() @ y[0], (lp.exp() * lp.masked_fill(lp.isinf(), 0)).sum())


@program(X)
def recip(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (1 / y, y.log(), (y - 1).sqrt(), (1 / y.relu()).sum(1))


@program(X, whole=True)
def where_inf(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    z = torch.where(y > 0, y, -torch.inf)
    return (z.amax(1), z.logsumexp(1), z.softmax(1).nan_to_num().sum(1), torch.where(y > 5, y, torch.nan).nansum(1))
