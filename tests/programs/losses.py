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


@program(ids(2, 13), moves={"all_to_all": 4, "all_reduce": 1})
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


@program(X, labels(ignored=(0, 12)), moves={"all_to_all": 4, "all_reduce": 4})
def ce_summed(m: Parts, x: Tensor, t: Tensor) -> Any:
    weight = torch.linspace(0.1, 1, 17, dtype=x.dtype)
    lg = m.head(m.block(x))
    return (
        F.cross_entropy(lg.flatten(0, 1), t.flatten(), reduction="sum"),
        F.cross_entropy(lg.mT, t, weight=weight, reduction="sum"),
        F.cross_entropy(lg.mT, t, weight=weight, label_smoothing=0.2, reduction="sum"),
        F.cross_entropy(lg.flatten(0, 1), t.flatten(), label_smoothing=0.2, reduction="sum"),
    )


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


@program(X, labels(ignored=(3,)), moves={"all_to_all": 4, "all_reduce": 1})
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


@program(X)
def std_of_equal_rows(m: Parts, x: Tensor) -> Any:
    """The gradient at 0 is 0."""
    y = m.block(x) * (torch.arange(12) > 5)
    return y.std(1), torch.std_mean(y, (0, 1))[0]


@program(X)
def variances_of_other_degrees_of_freedom(m: Parts, x: Tensor) -> Any:
    """A fraction; none left, where values are infinite; fewer than none."""
    y = m.block(x)
    return (
        y.var(1, correction=1.5),
        y.std((0, 1), correction=2),
        y.var(1, correction=13).isinf(),
        y.var(1, correction=20),
    )


@program(X, moves={"all_to_all": 4, "all_reduce": 10, "gather_output": 2})
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


@program(X, moves={"all_to_all": 6, "all_reduce": 6})
def where_inf(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    z = torch.where(y > 0, y, -torch.inf)
    return (z.amax(1), z.logsumexp(1), z.softmax(1).nan_to_num().sum(1), torch.where(y > 5, y, torch.nan).nansum(1))


# More losses


@program(X, X)
def kl_divergences(m: Parts, x: Tensor, t: Tensor) -> Any:
    lp, target = m.head(m.block(x)).log_softmax(-1), m.head(t).softmax(-1)
    return (
        F.kl_div(lp, target, reduction="batchmean"),
        F.kl_div(lp, target.log(), reduction="sum", log_target=True),
        F.kl_div(lp, target),
    )


@program(X, labels(ignored=(3,)))
def z_loss(m: Parts, x: Tensor, t: Tensor) -> Any:
    lg = m.head(m.block(x))
    valid = t != -100
    z = lg.logsumexp(-1).square()
    return F.cross_entropy(lg.mT, t) + 1e-2 * (z * valid).sum() / valid.sum() + 1e-3 * z.mean()


@program(X, labels(), moves={"all_to_all": 4, "all_reduce": 1})
def ce_shift_by_roll(m: Parts, x: Tensor, t: Tensor) -> Any:
    target = t.roll(-1, 1)
    target[:, -1] = -100
    return F.cross_entropy(m.head(m.block(x)).flatten(0, 1), target.flatten())


@program(X, labels(ignored=range(1, 13)), parts=4, moves={"all_to_all": 4, "all_reduce": 1})
def ce_one_valid_row(m: Parts, x: Tensor, t: Tensor) -> Any:
    return F.cross_entropy(m.head(m.block(x)).flatten(0, 1), t.flatten(), label_smoothing=0.3)


@program(X, labels(ignored=range(12)), parts=4)
def ce_valid_on_the_last_rank(m: Parts, x: Tensor, t: Tensor) -> Any:
    weight = torch.linspace(0.1, 1, 17, dtype=x.dtype)
    return F.cross_entropy(m.head(m.block(x)).mT, t, weight=weight)


@program(X, labels(ignored=range(13)), parts=3)
def ce_mean_of_nothing(m: Parts, x: Tensor, t: Tensor) -> Any:
    return F.cross_entropy(m.head(m.block(x)).flatten(0, 1), t.flatten())


@program(X, labels(ignored=(0, 1, 2, 12)), parts=4)
def ce_other_ignored_index(m: Parts, x: Tensor, t: Tensor) -> Any:
    target = torch.where(t == -100, 5, t)
    return (
        F.cross_entropy(m.head(m.block(x)).mT, target, ignore_index=5, label_smoothing=0.1),
        F.cross_entropy(m.head(x).mT, target, ignore_index=5, reduction="none"),
    )


@program(X, X, parts=4)
def ce_soft_targets(m: Parts, x: Tensor, t: Tensor) -> Any:
    target = m.head(t).detach().softmax(-1)
    return F.cross_entropy(m.head(m.block(x)).mT, target.mT, label_smoothing=0.1)


@program(X, labels(ignored=(2, 5)), parts=4)
def nll_weighted(m: Parts, x: Tensor, t: Tensor) -> Any:
    weight = torch.linspace(0.1, 1, 17, dtype=x.dtype)
    lp = m.head(m.block(x)).mT.log_softmax(1)
    return (F.nll_loss(lp, t, weight=weight), F.nll_loss(lp, t, weight=weight, reduction="sum"))


@program(X, labels(ignored=(2,)), parts=4)
def ce_of_two_dimensions(m: Parts, x: Tensor, t: Tensor) -> Any:
    """Scores `[B, C, S, 2]`."""
    lg = m.head(m.block(x))
    return F.cross_entropy(torch.stack([lg, -lg], 2).permute(0, 3, 1, 2), torch.stack([t, t], 2))


@program(X, whole=True)
def contrastive(m: Parts, x: Tensor) -> Any:
    y = F.normalize(m.block(x), dim=-1)
    return F.cross_entropy((y @ y.mT / 0.1).flatten(0, 1), torch.arange(26) % 13)


@program(X, labels(ignored=(0, 1)))
def focal_and_accuracy(m: Parts, x: Tensor, t: Tensor) -> Any:
    lg = m.head(m.block(x))
    ce = F.cross_entropy(lg.mT, t, reduction="none")
    right = (lg.argmax(-1) == t) & (t != -100)
    return (((1 - (-ce).exp()).square() * ce).sum() / (t != -100).sum(), right.sum() / (t != -100).sum())


@program(X, labels(ignored=(0, 1)))
def perplexity(m: Parts, x: Tensor, t: Tensor) -> Any:
    loss = F.cross_entropy(m.head(m.block(x)).mT, t)
    return (loss.exp(), loss * m.w.sum())


@program(X, X)
def elementwise_losses(m: Parts, x: Tensor, t: Tensor) -> Any:
    y = m.block(x)
    return (
        F.mse_loss(y, t, reduction="none").mean(-1),
        F.huber_loss(y, t, delta=0.3),
        F.binary_cross_entropy(y.sigmoid(), t.detach().sigmoid(), weight=m.w.detach() ** 2),
        F.smooth_l1_loss(y, y.detach() + t, beta=0.2),
        (y - t).square().mean((1, 2)).sqrt(),
    )


@program(X, given(12, 8))
def masked_max_and_end_token(m: Parts, x: Tensor, ends: Tensor) -> Any:
    y = m.block(x)
    kept = (torch.arange(13) <= ends[:, None])[..., None]
    top = y.masked_fill(~kept, -torch.inf).amax(1)
    end = (torch.arange(13) == ends[:, None]).int().argmax(-1)
    return torch.cat([top, (y * kept).mean(1), y[torch.arange(2), end]], -1) @ m.mod.weight


# More that the padding must not reach


@program((1, 13, 12), parts=4)
def reciprocal_of_positions(m: Parts, x: Tensor) -> Any:
    """Finite in every real row; infinite one row behind the last."""
    left = (13 - torch.arange(13)).to(x.dtype)[:, None]
    y = m.block(x)
    return ((y / left).sum(1), (y * left.log()).sum(1), (left.sqrt() * y).amax(1), (y / left).softmax(1))


@program((1, 13, 12), parts=4)
def extrema_of_negative_rows(m: Parts, x: Tensor) -> Any:
    y = -m.block(x).exp()
    return (y.amax(1), y.max(), y.amax((0, 1)), (-y).amin(1), y.logsumexp(1), (y * 0 - 3).amax(1))


@program((1, 13, 12), parts=4, moves={"all_to_all": 5, "all_reduce": 3, "gather_output": 2})
def products_and_norms(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y.prod(1), y.norm(dim=1), y.norm(p=1, dim=1), y.norm(p=float("inf"), dim=1), y.abs().sum((1, 2)).sqrt())


@program((1, 5, 12), parts=4, moves={"all_to_all": 5, "all_reduce": 5, "gather_output": 1})
def counts_and_indices(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y.argmax(1), (y != 0).sum(1), (y == y).all(), (y * 0 + 1).sum(), (y * 0 + 1).mean(), y.isnan().any())


@program((1, 5, 12), parts=4, moves={"all_to_all": 4, "all_reduce": 7})
def weights_of_padded_rows(m: Parts, x: Tensor) -> Any:
    """Sums over tokens inside a contraction, an einsum, a convolution and a norm."""
    y = m.block(x)
    return (
        y.mT @ y,
        torch.einsum("bsc,bsd->cd", y, y.exp()),
        F.conv1d(y, torch.ones(1, 5, 1, dtype=x.dtype)),
        torch.baddbmm(m.mat, y.mT, y, beta=2, alpha=0.5),
        torch.addmm(m.w, y[0].T, y[0]),
        torch.dot(y[0, :, 0], y[0, :, 1]),
        torch.mv(y[0].T, y[0, :, 2]),
    )


@program((1, 13, 12), parts=4)
def last_row_is_zero(m: Parts, x: Tensor) -> Any:
    """The last row, of which the padding is a copy, has no reciprocal, and no loss takes it."""
    y = m.block(x)
    kept = (torch.arange(13) < 12)[:, None]
    z = y * kept
    safe = torch.where(kept, 1 / torch.where(kept, z, 1.0), 0.0)
    return (safe.sum(1), torch.where(kept, z.abs() + 1, 1.0).log().mean(1), (z.square().sum(-1) + 1e-12).sqrt().sum())


# Weights and modes


@program((1, 7, 12), parts=4)
def weight_first_used_without_gradient(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    with torch.no_grad():
        z = y * m.w
    return (y * m.w + z).sum((0, 1)).tanh() * m.w
