"""Attention in rarer dresses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import WIDE, Parts, X, program

# The call


@program(X)
def by_keyword(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    return m.o(m.join(F.scaled_dot_product_attention(value=v, key=k, query=q, is_causal=True, scale=0.3)))


@program(X)
def keys_are_values(m: Parts, x: Tensor) -> Any:
    k = m.split(m.k(x))
    return m.o(m.join(F.scaled_dot_product_attention(m.split(m.q(x)), k, k, is_causal=True)))


@program(X)
def keys_are_values_once_scaled(m: Parts, x: Tensor) -> Any:
    k = m.split(m.k(x))
    return (m.o(m.join(F.scaled_dot_product_attention(m.split(m.q(x)), k * m.bias.view(3, 1, 1), k))), k.mean(2))


@program(X)
def values_used_outside(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return (m.o(m.join(o + v * m.bias.view(3, 1, 1))), v.amax(2))


@program(X)
def wider_values(m: Parts, x: Tensor) -> Any:
    q, k = m.split(m.q(x)), m.split(m.k(x))
    v = m.mod(x).view(2, 13, 3, 12).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ m.mod.weight


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def expanded_mask(m: Parts, x: Tensor) -> Any:
    mask = torch.arange(13)[:, None] >= torch.arange(13)
    return m.attend(x, attn_mask=mask[None, None].expand(2, 3, 13, 13))


@program(WIDE, heads=6, kv=2, parts=3)
def grouped_with_mask_and_scale(m: Parts, x: Tensor) -> Any:
    mask = (torch.arange(13)[:, None] - torch.arange(13)).abs() < 4
    return m.attend(m.norm(x), attn_mask=mask, enable_gqa=True, scale=1.0)


@program(X, parts=4)
def few_queries_causal(m: Parts, x: Tensor) -> Any:
    """Fewer queries than keys: the causal mask is aligned at the upper left."""
    return m.attend(m.block(x)[:, :10], x, is_causal=True)


@program((2, 1, 12), (2, 3, 6, 4), (2, 3, 6, 4), parts=3, shards=False)
def one_token_on_a_cache(m: Parts, x: Tensor, pk: Tensor, pv: Tensor) -> Any:
    k, v = (torch.cat([pk, m.split(m.k(x))], 2), torch.cat([pv, m.split(m.v(x))], 2))
    return (m.o(m.join(F.scaled_dot_product_attention(m.split(m.q(x)), k, v))), k, v)


@program(X, parts=4)
def two_latents_on_four_ranks(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    latents = m.table.weight[:2].expand(2, -1, -1)
    latents = m.block(latents + m.attend(latents, y))
    return y + m.attend(y, latents)


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def memory_of_parameters(m: Parts, x: Tensor) -> Any:
    return m.attend(x, m.table.weight[:7].expand(2, -1, -1))


@program((1, 20, 12), parts=4)
def windows_alone(m: Parts, x: Tensor) -> Any:
    return m.block(m.block(x.view(4, 5, 12)), is_causal=True).view(1, 20, 12)


@program(X)
def queries_in_chunks(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    return m.o(m.join(torch.cat([F.scaled_dot_product_attention(each, k, v) for each in q.split(4, 2)], 2)))


# Written out


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def matmul_scaled_before(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    p = torch.softmax(torch.matmul(q * 0.5, k.transpose(-2, -1)), dim=-1)
    return m.o(m.join(torch.matmul(F.dropout(p, 0.4, training=False), v)))


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def keys_split_transposed(m: Parts, x: Tensor) -> Any:
    q, v = m.split(m.q(x)), m.split(m.v(x))
    k = m.k(x).view(2, 13, 3, 4).permute(0, 2, 3, 1)
    return m.o(m.join((q @ k / 2).softmax(-1) @ v))


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def softmax_by_hand(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    s = q @ k.mT / 2
    e = (s - s.amax(-1, keepdim=True).detach()).exp()
    return m.o(m.join(e / e.sum(-1, keepdim=True) @ v))


@program(X, moves={"all_to_all": 5, "gather_output": 1})
def normalised_after_the_values(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    e = (q @ k.mT / 2).sigmoid().exp()
    return m.o(m.join(e @ v / e.sum(-1, keepdim=True)))


@program(X)
def log_softmax_exp(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    lp = (q @ k.mT).log_softmax(-1)
    return (m.o(m.join(lp.exp() @ v)), -(lp.exp() * lp).sum(-1).mean((1, 2)))


@program(X, moves={"all_reduce": 2})
def without_softmax(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    s = q @ k.mT / 13
    return (m.o(m.join(s.sigmoid() @ v)), m.o(m.join(s.relu().square() @ v)))


@program(X, whole=True)
def differential(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    a = (q[..., :2] @ k[..., :2].mT).softmax(-1)
    b = (q[..., 2:] @ k[..., 2:].mT).softmax(-1)
    return m.o(m.join((a - m.bias.view(3, 1, 1) * b) @ v))


@program(X)
def weights_on_two_values(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    p = (q @ k.mT).softmax(-1)
    return m.o(m.join(p @ v)) + m.o(m.join(p @ k))


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def talking_heads(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    s = torch.einsum("bhqk,hg->bgqk", q @ k.mT, m.mat[:3, :3])
    return m.o(m.join(torch.einsum("bhqk,hg->bgqk", s.softmax(-1), m.mat[3:6, :3]) @ v))


@program((1, 13, 12), moves={"all_to_all": 5, "gather_output": 1})
def relative_shift(m: Parts, x: Tensor) -> Any:
    """Transformer-XL: scores against distances, shifted row by row through a view."""
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    far = m.split(m.o(m.table.weight[:25][None]))
    s = F.pad(q @ far.mT, (0, 1)).flatten(2)
    s = F.pad(s, (0, 12)).view(1, 3, 14, 25)[:, :, :13, 12:]
    return m.o(m.join((q @ k.mT + s).softmax(-1) @ v))


@program((2, 12, 12), moves={"gather_output": 1})
def online_softmax(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    top, total, out = q.new_full((2, 3, 12, 1), -torch.inf), q.new_zeros(2, 3, 12, 1), torch.zeros_like(q)
    for keys, values in zip(k.split(4, 2), v.split(4, 2), strict=True):
        s = q @ keys.mT
        new = torch.maximum(top, s.detach().amax(-1, keepdim=True))
        e = (s - new).exp()
        total = total * (top - new).exp() + e.sum(-1, keepdim=True)
        out = out * (top - new).exp() + e @ values
        top = new
    return m.o(m.join(out / total))


@program((2, 3, 7, 12), parts=4, moves={"all_to_all": 4, "gather_output": 1})
def axial(m: Parts, x: Tensor) -> Any:
    """Rows, then columns, with the heads in a dimension of their own and no flattening."""
    q, k, v = (f(x).unflatten(-1, (3, 4)) for f in (m.q, m.k, m.v))
    rows = torch.einsum("bijhd,bikhd->bihjk", q, k).softmax(-1)
    y = torch.einsum("bihjk,bikhd->bijhd", rows, v)
    columns = torch.einsum("bjihd,bkihd->bihjk", y, k).softmax(-1)
    return m.o(torch.einsum("bihjk,bkihd->bjihd", columns, v).flatten(3))


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def retention(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    apart = (torch.arange(13)[:, None] - torch.arange(13)).to(x.dtype)
    decay = torch.where(apart >= 0, m.bias.sigmoid().view(3, 1, 1) ** apart.clamp(min=0), 0.0)
    o = (q @ k.mT * decay) @ v
    return m.o(m.join(F.group_norm(o.transpose(1, 2).reshape(26, 12), 3).view(2, 13, 3, 4).transpose(1, 2)))


@program(WIDE, heads=6, kv=2, parts=2, attention="ulysses", moves={"all_to_all": 4, "gather_output": 1})
def a_group_on_each_of_two_ranks(m: Parts, x: Tensor) -> Any:
    return m.attend(x, enable_gqa=True, is_causal=True)


@program(WIDE, heads=6, kv=3, parts=3, moves={"all_to_all": 4, "gather_output": 1})
def a_group_on_each_of_three_ranks(m: Parts, x: Tensor) -> Any:
    q, k, v = m.split(m.q(x)), m.repeated(m.split(m.k(x), 3)), m.split(m.v(x), 3).repeat_interleave(2, 1)
    return m.o(m.join((q @ k.mT + m.bias.view(6, 1, 1)).softmax(-1) @ v))
