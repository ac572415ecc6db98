"""Attention in every dress, at every size and layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import WIDE, Parts, X, mlp, program

# Attention in every dress


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def plain(m: Parts, x: Tensor) -> Any:
    return m.block(x)


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def causal(m: Parts, x: Tensor) -> Any:
    return m.block(x, is_causal=True)


@program((1, 13, 24), kv=2, heads=6, parts=4, attention="ulysses", moves={"all_to_all": 4, "gather_output": 1})
def gqa_6_heads_2_groups(m: Parts, x: Tensor) -> Any:
    return m.attend(x, enable_gqa=True)


@program(WIDE, kv=2, heads=6, parts=4, moves={"gather_seq": 2, "gather_output": 1})
def gqa_5d(m: Parts, x: Tensor) -> Any:
    B, S, _ = x.shape
    q = m.q(x).view(B, S, 2, 3, 4).permute(0, 2, 3, 1, 4)
    k = m.split(m.k(x), 2).unsqueeze(2)
    v = m.split(m.v(x), 2).unsqueeze(2)
    s = (q @ k.transpose(-1, -2)).softmax(-1) @ v
    return m.o(s.permute(0, 3, 1, 2, 4).reshape(B, S, -1))


@program(WIDE, kv=2, heads=6, parts=3, moves={"gather_seq": 2, "gather_output": 1})
def gqa_5d_einsum(m: Parts, x: Tensor) -> Any:
    B, S, _ = x.shape
    q = m.q(x).view(B, S, 2, 3, 4)
    k = m.k(x).view(B, S, 2, 4)
    v = m.v(x).view(B, S, 2, 4)
    s = torch.einsum("bqgrd,bkgd->bgrqk", q, k).softmax(-1)
    return m.o(torch.einsum("bgrqk,bkgd->bqgrd", s, v).reshape(B, S, -1))


@program(WIDE, kv=2, heads=6, parts=4, moves={"all_to_all": 4, "all_reduce": 1, "gather_output": 2})
def gqa_expand_k_used(m: Parts, x: Tensor) -> Any:
    k0 = m.split(m.k(x), 2)
    v0 = m.split(m.v(x), 2)
    k, v = (m.repeated(k0), m.repeated(v0))
    o = F.scaled_dot_product_attention(m.split(m.q(x)), k, v)
    return (m.o(m.join(o)), k.sum(2), v0)


@program((1, 13, 24), kv=2, heads=6, parts=4, moves={"all_to_all": 2, "gather_output": 1})
def gqa_qkv_same(m: Parts, x: Tensor) -> Any:
    k = m.split(m.k(x), 2).repeat_interleave(3, 1)
    return m.o(m.join(F.scaled_dot_product_attention(k, k, k)))


@program((1, 13, 24), kv=2, heads=6, parts=4, moves={"all_to_all": 4, "gather_output": 1})
def gqa_tile(m: Parts, x: Tensor) -> Any:
    k = m.split(m.k(x), 2).repeat(1, 3, 1, 1)
    v = m.split(m.v(x), 2).repeat(1, 3, 1, 1)
    return m.o(m.join(F.scaled_dot_product_attention(m.split(m.q(x)), k, v)))


@program(WIDE, heads=6, kv=2, parts=4, attention="ulysses", moves={"all_to_all": 4, "gather_output": 1})
def gqa_uneven_bias(m: Parts, x: Tensor) -> Any:
    return m.attend(x, enable_gqa=True, attn_mask=m.bias.view(1, 6, 1, 1) * torch.arange(13))


@program(WIDE, heads=6, kv=3, parts=4, moves={"all_to_all": 4, "gather_output": 1})
def gqa_6_heads_3_groups(m: Parts, x: Tensor) -> Any:
    return m.attend(
        x,
        enable_gqa=True,
        attn_mask=(x @ m.rel.weight[:12].repeat(2, 1)).transpose(1, 2)[:, :, None] * m.bias.view(1, -1, 1, 1),
    )


@program(WIDE, heads=6, kv=1, parts=4, moves={"gather_seq": 2, "gather_output": 1})
def mqa_bias(m: Parts, x: Tensor) -> Any:
    return m.attend(x, enable_gqa=True, attn_mask=m.bias.view(6, 1, 1) * torch.arange(13))


@program(WIDE, heads=6, kv=1, parts=4, moves={"gather_seq": 2, "gather_output": 2})
def mqa_eager(m: Parts, x: Tensor) -> Any:
    s = (m.split(m.q(x)) @ m.split(m.k(x), 1).mT).softmax(-1)
    return (m.o(m.join(s @ m.split(m.v(x), 1))), s.mean(1))


@program(WIDE, heads=6, kv=2, parts=4, moves={"all_to_all": 4, "gather_output": 1})
def gqa_repeat_eager_bmm(m: Parts, x: Tensor) -> Any:
    k = m.split(m.k(x), 2).repeat_interleave(3, 1).reshape(12, 13, 4)
    v = m.split(m.v(x), 2).repeat_interleave(3, 1).reshape(12, 13, 4)
    q = m.split(m.q(x)).reshape(12, 13, 4)
    return m.o(m.join(torch.bmm(torch.bmm(q, k.mT).softmax(-1), v).view(2, 6, 13, 4)))


@program(WIDE, heads=6, kv=2, parts=4, moves={"all_to_all": 4, "all_reduce": 1, "gather_output": 1})
def gqa_repeat_used_twice(m: Parts, x: Tensor) -> Any:
    k = m.split(m.k(x), 2).repeat_interleave(3, 1)
    v = m.split(m.v(x), 2).repeat_interleave(3, 1)
    o = F.scaled_dot_product_attention(m.split(m.q(x)), k, v)
    o = F.scaled_dot_product_attention(o, k, v, is_causal=True)
    return (m.o(m.join(o)), k.mean(2))


@program(WIDE, heads=6, kv=2, parts=4, moves={"all_to_all": 4, "gather_output": 1})
def gqa_headbias_after_repeat(m: Parts, x: Tensor) -> Any:
    k = m.split(m.k(x), 2).repeat_interleave(3, 1) * m.bias.view(6, 1, 1)
    v = m.split(m.v(x), 2).repeat(1, 3, 1, 1)
    return m.o(m.join(F.scaled_dot_product_attention(m.split(m.q(x)), k, v)))


@program(X, moves={"all_to_all": 2, "gather_output": 2})
def qkv_same(m: Parts, x: Tensor) -> Any:
    q = m.split(m.q(x))
    return (m.o(m.join(F.scaled_dot_product_attention(q, q, q)) + m.q(x)), q)


@program(X, moves={"all_to_all": 4, "all_reduce": 1, "gather_output": 1})
def q_used_outside(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    o = F.scaled_dot_product_attention(q, k, v)
    return ((o * q.sigmoid()).sum((1, 3)), v.mean(2))


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def shared_k(m: Parts, x: Tensor) -> Any:
    k, v = (m.split(m.k(x)), m.split(m.v(x)))
    a = F.scaled_dot_product_attention(m.split(m.q(x)), k, v)
    return m.o(m.join(F.scaled_dot_product_attention(a, k, v, is_causal=True)))


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def five_dimensions(m: Parts, x: Tensor) -> Any:
    q, k, v = (f(x).view(2, 13, 3, 2, 2).permute(0, 2, 3, 1, 4) for f in (m.q, m.k, m.v))
    o = F.scaled_dot_product_attention(q, k, v)
    return m.o(o.permute(0, 3, 1, 2, 4).flatten(2))


@program(X)
def causal_on_fewer_keys(m: Parts, x: Tensor) -> Any:
    return m.o(
        m.join(
            F.scaled_dot_product_attention(
                m.split(m.q(x)), m.split(m.k(x))[:, :, :9], m.split(m.v(x))[:, :, :9], is_causal=True
            )
        )
    )


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def eager_softcap(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    s = torch.tanh(q @ k.mT / 5) * 5
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return m.o(m.join(s.masked_fill(~mask, -torch.inf).softmax(-1) @ v))


@program(X, moves={"all_to_all": 8, "gather_output": 1})
def scores_as_they_are(m: Parts, x: Tensor) -> Any:
    """No op needs the keys of a query together: sigmoid attention, then squared ReLU of masked scores."""
    for weigh in (lambda s: (s - 2.5).sigmoid(), lambda s: s.tril().relu().square() / 13):
        q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
        x = mlp(m, x + m.o(m.join(weigh(q @ k.mT / 2) @ v)))
    return x


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def eager_sinks(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    s = q @ k.mT / 2
    sink = m.bias.view(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[1], -1)
    p = torch.cat([s, sink], -1).softmax(-1)[..., :-1]
    return m.o(m.join(p @ v))


@program(X, kv=1, moves={"all_to_all": 4, "gather_output": 1})
def sinks_under_their_maximum(m: Parts, x: Tensor) -> Any:
    """An op of two results inside a site."""
    q = m.split(m.q(x))
    k, v = (m.repeated(m.split(f(x), 1)) for f in (m.k, m.v))
    s = torch.cat([q @ k.mT / 2, m.bias.view(1, -1, 1, 1).expand(2, -1, 13, -1)], -1)
    p = (s - s.max(-1, keepdim=True).values).softmax(-1)[..., :-1]
    return m.o(m.join(p @ v))


@program(X, moves={"all_to_all": 5, "gather_output": 3})
def eager_weights_out(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    p = (q @ k.mT / 2).softmax(-1)
    return (m.o(m.join(p @ v)), p, p.mean(1))


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def baddbmm(m: Parts, x: Tensor) -> Any:
    B, S, _ = x.shape
    q, k, v = (m.split(f(x)).reshape(B * 3, S, 4) for f in (m.q, m.k, m.v))
    p = torch.baddbmm(torch.zeros(B * 3, S, S, dtype=x.dtype), q, k.mT, beta=0, alpha=0.5).softmax(-1)
    return m.o(m.join(torch.bmm(p, v).view(B, 3, S, 4)))


@program((2, 13, 4), heads=1)
def three_dimensions(m: Parts, x: Tensor) -> Any:
    return F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))


@program(X)
def unbind_qkv(m: Parts, x: Tensor) -> Any:
    q, k, v = torch.cat([m.q(x), m.k(x), m.v(x)], -1).view(2, 13, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return m.o(m.join(F.scaled_dot_product_attention(q, k, v)))


@program((2, 6, 24), heads=6, kv=6, parts=4)
def attn_over_heads(m: Parts, x: Tensor) -> Any:
    q, k, v = (f(x).view(2, 6, 6, 4) for f in (m.q, m.k, m.v))
    return (
        F.scaled_dot_product_attention(q, k, v),
        F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)),
    )


@program(X, moves={"all_to_all": 4, "gather_output": 3})
def kv_cache_out(m: Parts, x: Tensor) -> Any:
    k, v = (m.split(m.k(x)), m.split(m.v(x)))
    return (m.o(m.join(F.scaled_dot_product_attention(m.split(m.q(x)), k, v, is_causal=True))), k, v)


@program(X, (2, 3, 5, 4), (2, 3, 5, 4))
def kv_cache_in(m: Parts, x: Tensor, pk: Tensor, pv: Tensor) -> Any:
    k, v = (torch.cat([pk, m.split(m.k(x))], 2), torch.cat([pv, m.split(m.v(x))], 2))
    mask = torch.ones(13, 18, dtype=torch.bool).tril(5)
    return (m.o(m.join(F.scaled_dot_product_attention(m.split(m.q(x)), k, v, attn_mask=mask))), k, v)


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def linear_attention(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    q, k = (F.elu(q) + 1, F.elu(k) + 1)
    kv = k.mT @ v
    z = 1 / (q @ k.sum(2, keepdim=True).mT)
    return m.block(m.o(m.join(q @ kv * z)))


@program(X, moves={"all_to_all": 9, "gather_output": 1})
def attention_over_channels(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)).mT for f in (m.q, m.k, m.v))
    q, k = (F.normalize(q, dim=-1), F.normalize(k, dim=-1))
    p = (q @ k.mT * m.bias.view(3, 1, 1)).softmax(-1)
    return m.block(m.o((p @ v).permute(0, 3, 1, 2).flatten(2)))


@program((2, 13, 12), parts=4, moves={"all_to_all": 4, "gather_output": 1})
def linear_attention_block_by_block(m: Parts, x: Tensor) -> Any:
    """As lightning attention goes: products of a query and a key in a block, of which no block is attention."""
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    state, made = k.new_zeros(2, 3, 4, 4), []
    for rows in (slice(0, 5), slice(5, 10), slice(10, 13)):
        within = (q[:, :, rows] @ k[:, :, rows].mT).tril() @ v[:, :, rows]
        made.append(within + q[:, :, rows] * m.bias.view(3, 1, 1) @ state)
        state = state * 0.9 + k[:, :, rows].mT @ v[:, :, rows]
    return mlp(m, x + m.o(m.join(torch.cat(made, 2))))


@program((2, 24, 12), moves={"all_to_all": 1, "gather_output": 1})
def chunked_linear_attn(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)).view(2, 3, 4, 6, 4) for f in (m.q, m.k, m.v))
    kv = (k.mT @ v).cumsum(2) - k.mT @ v
    intra = (q @ k.mT).tril() @ v
    return m.o(m.join((intra + q @ kv).view(2, 3, 24, 4)))


@program((1, 24, 12), moves={"all_to_all": 4, "gather_output": 1})
def local_window_attn(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    qb = q.view(1, 3, 6, 4, 4)
    kk = F.pad(k, (0, 0, 4, 4)).unfold(2, 12, 4)
    vv = F.pad(v, (0, 0, 4, 4)).unfold(2, 12, 4)
    p = (qb @ kk).softmax(-1)
    return m.o(m.join((p @ vv.mT).reshape(1, 3, 24, 4)))


@program((2, 1, 12), X, moves={"all_to_all": 8, "all_reduce": 2, "select_rows": 2, "gather_output": 1})
def one_query(m: Parts, q: Tensor, x: Tensor) -> Any:
    y = m.block(x)
    return (m.attend(q, y), m.attend(y[:, :1], y), m.attend(y, y[:, :1]))


@program(X, (2, 7, 12), attention="ulysses", moves={"all_to_all": 12, "gather_output": 1})
def cross_sharded(m: Parts, x: Tensor, mem: Tensor) -> Any:
    return m.attend(m.block(x), m.block(mem))


@program(X, (2, 7, 12), moves={"all_to_all": 4, "gather_output": 1})
def cross_plain(m: Parts, x: Tensor, mem: Tensor) -> Any:
    return m.attend(x, mem)


@program(X, (2, 5, 12))
def memory_param_grad(m: Parts, x: Tensor, mem: Tensor) -> Any:
    return m.attend(m.block(m.attend(x, mem)), mem) + mem.mean(1, keepdim=True)


@program((1, 13, 12), moves={"all_to_all": 16, "gather_output": 1})
def perceiver_long(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    lat = m.table.weight[:11][None]
    lat = lat + m.attend(lat, y)
    lat = m.block(lat)
    return y + m.attend(y, lat)


# Sizes and layouts


@program((3, 3, 12), moves={"all_to_all": 4, "gather_output": 1})
def batch_heads_and_length_are_3(m: Parts, x: Tensor) -> Any:
    return m.block(x)


@program((2, 4, 16), heads=4, parts=3, whole=True)
def all_are_4_by_heads(m: Parts, x: Tensor) -> Any:
    q, k, v = (f(x).view(2, 4, 4, 4) for f in (m.q, m.k, m.v))
    s = (q @ k.mT).softmax(-1)
    return (m.o((s @ v).flatten(2)), m.block(x), (q.transpose(1, 2) @ k.transpose(1, 2).mT).softmax(-1))


@program((6, 6, 24), heads=6, kv=6, parts=4)
def all_are_6(m: Parts, x: Tensor) -> Any:
    k = m.split(m.k(x), 6)
    return m.o(m.join(F.scaled_dot_product_attention(m.split(m.q(x)), k.transpose(1, 2), k, is_causal=True)))


@program((2, 2, 24), heads=6, kv=2, parts=2)
def gqa_s_eq_kv(m: Parts, x: Tensor) -> Any:
    return (m.attend(x, enable_gqa=True), m.attend(x, enable_gqa=True, is_causal=True))


@program((2, 3, 12), parts=3, moves={"all_to_all": 4, "gather_output": 1})
def length_3(m: Parts, x: Tensor) -> Any:
    return m.block(x, is_causal=True)


@program((1, 5, 12), parts=4)
def length_5_on_4(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y, y.sum(1), y[:, -1], y.amax(1), y.var(1), torch.cat([y, y[:, :2]], 1) @ m.mat)


@program((2, 13, 4), heads=1)
def one_head(m: Parts, x: Tensor) -> Any:
    return m.block(x)


@program((13, 12))
def two_dim(m: Parts, x: Tensor) -> Any:
    q, k, v = (f(x).view(-1, 3, 4).transpose(0, 1) for f in (m.q, m.k, m.v))
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(-1, 12))


@program((13, 2, 12), moves={"all_to_all": 4, "gather_output": 1})
def sequence_first(m: Parts, x: Tensor) -> Any:
    S, B, _ = x.shape
    q, k, v = (f(x).view(S, B * 3, 4).transpose(0, 1) for f in (m.q, m.k, m.v))
    p = torch.bmm(q, k.mT).softmax(-1)
    return m.o(torch.bmm(p, v).transpose(0, 1).reshape(S, B, 12))


@program((13, 3, 12), moves={"all_to_all": 4, "gather_output": 1})
def sequence_first_flat(m: Parts, x: Tensor) -> Any:
    S, B, C = x.shape
    y = m.o(x.reshape(S * B, C))
    return m.norm(m.block(y.view(S, B, C).transpose(0, 1)).transpose(0, 1).reshape(S * B, C))


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def batch_first_flat(m: Parts, x: Tensor) -> Any:
    B, S, C = x.shape
    y = F.gelu(m.o(x.reshape(-1, C)))
    y = m.block(y.view(B, S, C)).reshape(-1, C)
    return m.head(y)


@program((3, 12, 12))
def length_is_width_transposed(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y + y.mT, y @ m.mat + m.mat @ y, y * m.w[:, None])


@program((12, 12, 12))
def all_are_12(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y + y.mT + y.transpose(0, 1) + y.transpose(0, 2), y.sum(0) * m.w, y.permute(2, 0, 1) @ m.mat)


@program((13, 13, 12), whole=True)
def batch_is_length(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y.transpose(0, 1) + y, y * m.w + y.mean(1), y.mean(0) + y, y @ y.mT + y.sum(-1), y.flatten(0, 1) @ m.mat)


@program((1, 13, 12), (13, 12))
def lost_batch(m: Parts, x: Tensor, p: Tensor) -> Any:
    y = m.block(x)[0] * p
    return (m.block(y.unsqueeze(0)).squeeze(0), y.T @ p)


@program((1, 13, 12))
def squeeze_mania(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    z = y.squeeze(0)
    return (
        z @ m.mat,
        z.mean(0),
        z.unsqueeze(1).expand(-1, 3, -1).reshape(39, 12),
        z.T,
        z[:, None].squeeze(),
        y.squeeze(),
    )
