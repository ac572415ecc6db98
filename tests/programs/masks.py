"""Masks, biases and positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import Argument, Parts, X, given, ids, program, rope


@program(X, given(13, 9), moves={"all_to_all": 4, "gather_output": 1})
def key_padding_mask(m: Parts, x: Tensor, lengths: Tensor) -> Any:
    mask = (torch.arange(x.shape[1])[None] < lengths[:, None])[:, None, None]
    return m.block(x, attn_mask=mask)


@program(X, given(13, 9))
def mask_b1ss_additive(m: Parts, x: Tensor, lengths: Tensor) -> Any:
    S = x.shape[1]
    mask = (torch.arange(S)[None] < lengths[:, None])[:, None, None, :] & torch.ones(S, S, dtype=torch.bool).tril()
    add = torch.zeros(2, 1, S, S, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
    return m.block(m.block(x, attn_mask=add), attn_mask=add)


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def alibi(m: Parts, x: Tensor) -> Any:
    S = x.shape[1]
    r = torch.arange(S)
    b = -(r[:, None] - r[None]).abs().to(x.dtype) * m.bias.exp().view(-1, 1, 1)
    return m.block(x, attn_mask=b)


@program((1, 13, 12), moves={"all_to_all": 8, "gather_output": 1})
def relative_bias_t5(m: Parts, x: Tensor) -> Any:
    S = x.shape[1]
    r = torch.arange(S)
    b = m.rel((r[:, None] - r[None]).clamp(-9, 9) + 9).permute(2, 0, 1)[None]
    return m.block(m.block(x, attn_mask=b), attn_mask=b)


@program((2, 5, 4, 12), parts=3, moves={"all_to_all": 6, "gather_output": 1})
def decomposed_relative_positions(m: Parts, x: Tensor) -> Any:
    """A bias of rows and one of columns that the queries steer, as in attention over an image (ViTDet, SAM)."""
    height, width = x.shape[1:3]
    q, k, v = (m.split(to(x).flatten(1, 2)) for to in (m.q, m.k, m.v))

    def table(n: int, first: int) -> Tensor:
        distance = torch.arange(n)[:, None] - torch.arange(n)
        return m.table.weight[distance + n - 1 + first, : m.dim]

    image = q.unflatten(2, (height, width))
    rows = torch.einsum("bnhwc,hkc->bnhwk", image, table(height, 0))
    columns = torch.einsum("bnhwc,wkc->bnhwk", image, table(width, 20))
    scores = (q @ k.mT).unflatten(3, (height, width)).unflatten(2, (height, width))
    scores = (scores + rows[..., None] + columns[..., None, :]).flatten(4).flatten(2, 3)
    return x + m.o(m.join(scores.softmax(-1) @ v)).view(x.shape)


@program((13, 12), ids(13, high=3))
def block_diag_docs(m: Parts, x: Tensor, doc: Tensor) -> Any:
    mask = doc[:, None] == doc[None]
    return m.block(x[None], attn_mask=mask)


@program((1, 13, 12), moves={"all_to_all": 4, "gather_output": 1})
def pair_bias(m: Parts, x: Tensor) -> Any:
    a = m.q(x)
    b = m.k(x)
    pair = a[:, :, None] * b[:, None] @ m.mod.weight.T[:, :3].contiguous()[:12]
    return m.block(x, attn_mask=pair.permute(0, 3, 1, 2))


@program(X)
def all_masked_rows(m: Parts, x: Tensor) -> Any:
    mask = torch.ones(13, 13, dtype=torch.bool).tril(-1)
    return m.block(x, attn_mask=mask).nan_to_num()


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def learned_table(m: Parts, x: Tensor) -> Any:
    return m.block(x + m.table.weight[: x.shape[1]])


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def rope_half(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    p = torch.arange(x.shape[1])
    return m.o(m.join(F.scaled_dot_product_attention(rope(q, p), rope(k, p), v, is_causal=True)))


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def rope_of_all_channels_beside_none(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    p = torch.arange(x.shape[1])
    q = torch.cat([rope(q[..., :4], p), q[..., 4:]], -1)
    turned, left = k.split([4, 0], -1)
    return m.o(m.join(F.scaled_dot_product_attention(q, torch.cat([left, rope(turned, p)], -1), v)))


@program(X, ids(2, 13))
def rope_inter_b(m: Parts, x: Tensor, p: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    p = p[:, None]
    return m.o(m.join(F.scaled_dot_product_attention(rope(q, p, True), rope(k, p, True), v)))


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def rope_complex(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    f = torch.outer(torch.arange(13, dtype=x.dtype), torch.tensor([1.0, 0.1], dtype=x.dtype))
    c = torch.polar(torch.ones_like(f), f)

    def r(t: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(t.reshape(*t.shape[:-1], 2, 2)) * c).flatten(-2)

    return m.o(m.join(F.scaled_dot_product_attention(r(q), r(k), v)))


@program(X)
def rope_bshd(m: Parts, x: Tensor) -> Any:
    B, S, _ = x.shape
    q, k, v = (f(x).view(B, S, 3, 4) for f in (m.q, m.k, m.v))
    p = torch.arange(S)[:, None]
    q, k = (rope(q, p), rope(k, p))
    return m.o(torch.einsum("bhqk,bkhd->bqhd", torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1), v).flatten(2))


@program(X, ids(3, 2, 13), moves={"all_to_all": 4, "gather_output": 1})
def mrope(m: Parts, x: Tensor, pos: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    ang = torch.cat([pos[0, :, None, :, None], pos[2, :, None, :, None]], -1).to(x.dtype) * 0.1
    e = torch.cat([ang, ang], -1)

    def r(t: Tensor) -> Tensor:
        return t * e.cos() + torch.cat([-t[..., 2:], t[..., :2]], -1) * e.sin()

    return m.o(m.join(F.scaled_dot_product_attention(r(q), r(k), v)))


@program((2, 12))
def table_queries(m: Parts, c: Tensor) -> Any:
    return m.block(m.table.weight[:13].unsqueeze(0).expand(2, -1, -1) + c[:, None])


@program(ids(2, 13, high=5), moves={"all_to_all": 4, "gather_output": 1})
def mask_from_ids(m: Parts, i: Tensor) -> Any:
    i = torch.cat([torch.ones(2, 1, dtype=torch.int64), i[:, 1:]], 1)
    return m.block(m.table(i), attn_mask=(i != 0)[:, None, None])


@program(ids(2, 13, high=5))
def documents_and_positions_from_ids(m: Parts, i: Tensor) -> Any:
    """Packed documents end with id 0: who may see whom, and positions that start again."""
    begins = F.pad(i[:, :-1] == 0, (1, 0), value=True)
    document = begins.cumsum(1)
    at = torch.arange(13)
    position = at - torch.where(begins, at, 0).cummax(1).values
    mask = (document[:, None, :, None] == document[:, None, None]) & (at[:, None] >= at)
    q, k, v = (m.split(f(m.table(i))) for f in (m.q, m.k, m.v))
    q, k = rope(q, position[:, None]), rope(k, position[:, None])
    return m.o(m.join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


@program(X, lambda: torch.arange(13).flip(0), moves={"all_to_all": 4, "gather_output": 1})
def position_ids_of_s(m: Parts, x: Tensor, p: Tensor) -> Any:
    table = torch.outer(torch.arange(40), 0.3 * torch.arange(1, 5)).to(x.dtype)
    cos, sin = table.cos()[p], table.sin()[p]
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    q, k = (t * cos + torch.cat([-t[..., 2:], t[..., :2]], -1) * sin for t in (q, k))
    return m.o(m.join(F.scaled_dot_product_attention(q, k, v, attn_mask=p[:, None] >= p)))


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def band_and_prefix(m: Parts, x: Tensor) -> Any:
    at = torch.arange(x.shape[1])
    band = (at[:, None] >= at) & (at[:, None] - at < 4)
    return m.block(x, attn_mask=band | (at < 3))


@program((2, 12, 12))
def learned_mask(m: Parts, x: Tensor) -> Any:
    y = m.block(x, attn_mask=m.mat)
    return m.block(y, attn_mask=m.mat * m.bias.view(3, 1, 1))


@program(X)
def learned_bias_by_index(m: Parts, x: Tensor) -> Any:
    """Swin's: a table `[distances, H]` looked up by a flat index, viewed and permuted."""
    at = torch.arange(13)
    index = (at[:, None] - at + 12).flatten() % 20
    bias = m.rel.weight[index].view(13, 13, 3).permute(2, 0, 1).contiguous()
    return m.block(x, attn_mask=bias.unsqueeze(0))


@program(X, given(13, 9))
def alibi_of_padded_tokens(m: Parts, x: Tensor, lengths: Tensor) -> Any:
    """Bloom's: distances counted over the tokens that are kept."""
    kept = torch.arange(13)[None] < lengths[:, None]
    position = ((kept.long().cumsum(-1) - 1) * kept)[:, None, None].to(x.dtype)
    bias = (m.bias.exp().view(1, 3, 1, 1) * position).masked_fill(~kept[:, None, None], -1e9)
    return m.block(x, attn_mask=bias)


@program(X, (2, 3, 13, 13))
def bias_that_needs_a_gradient(m: Parts, x: Tensor, bias: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    s = q @ k.mT + bias
    return (m.o(m.join(s.softmax(-1) @ v)), s.mean((2, 3)))


@program(X)
def gated_scores(m: Parts, x: Tensor) -> Any:
    """A forget gate: the running sum of a score per token, its differences a bias."""
    gate = F.logsigmoid(x @ m.mat[:, :3]).cumsum(1).transpose(1, 2)
    return m.block(x, attn_mask=gate[..., :, None] - gate[..., None, :])


@program(X, given(4, 9))
def query_rows_without_keys(m: Parts, x: Tensor, lengths: Tensor) -> Any:
    kept = torch.arange(13)[None] < lengths[:, None]
    mask = kept[:, None, :, None] & kept[:, None, None]
    return torch.where(kept[..., None], m.attend(x, attn_mask=mask).nan_to_num(), x)


@program(X, lambda: torch.arange(14)[None], moves={"all_to_all": 4, "gather_output": 1})
def position_table_beside_a_class_token(m: Parts, x: Tensor, p: Tensor) -> Any:
    """The table is looked up as the two streams are cut."""
    return m.block(torch.cat([m.cls.expand(2, -1, -1), m.o(x)], 1) + m.table(p))


@program((1, 13, 12), parts=4)
def decays_summed_along_the_sequence(m: Parts, x: Tensor) -> Any:
    """Forgetting attention: the bias of a pair is the sum of the gates between."""
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    decay = F.logsigmoid(x @ m.mat[:, :3]).mT.cumsum(-1)
    future = torch.ones(13, 13).triu(1).bool()
    bias = (decay[..., :, None] - decay[..., None, :]).masked_fill(future, -torch.inf)
    return m.o(m.join(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


@program((1, 13, 12), parts=4)
def positions_counted_by_gates(m: Parts, x: Tensor) -> Any:
    """Contextual positions: a cumulative sum over keys, counted from the end, looks up the bias."""
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    scores = q @ k.mT / 2
    place = scores.sigmoid().tril().flip(-1).cumsum(-1).flip(-1).clamp(max=6)
    low, high = place.floor().long(), place.ceil().long()
    table = q @ m.table.weight[:7, :4].T
    bias = table.gather(-1, high) * (place - low) + table.gather(-1, low) * (1 - place + low)
    future = torch.ones(13, 13).triu(1).bool()
    return m.o(m.join((scores + bias).masked_fill(future, -torch.inf).softmax(-1) @ v))


@program((2, 13, 12), parts=2)
def queries_written_into_constants(m: Parts, x: Tensor) -> Any:
    """What a query is made of need not be an activation: zeros that rows are written to, ones that scale them."""
    y = m.block(x)
    shifted = torch.zeros(2, 13, 12, dtype=x.dtype)
    shifted[:, 1:] = y[:, :-1]
    pairs = torch.ones(2, 13, 13, dtype=x.dtype)
    mixed = torch.full((13, 13), 0.5, dtype=x.dtype).softmax(-1) @ y
    return m.block(shifted) * m.w, mixed + (pairs * y[..., :1]).sum(1)[..., None]


@program((2, 7, 12), (2, 11, 12), dynamic=True, moves={"all_to_all": 4, "gather_output": 1})
def causal_mask_behind_a_cache(m: Parts, x: Tensor, past: Tensor) -> Any:
    """The diagonal is a length that is known when the graph runs."""
    kept = torch.ones(x.shape[1], past.shape[1], dtype=torch.bool).tril(past.shape[1] - x.shape[1])
    return m.attend(x, past, attn_mask=kept)


@program((1, 13, 12), moves={"all_to_all": 4, "gather_seq": 2, "all_reduce": 1, "gather_output": 1})
def triangles_of_what_is_not_finite(m: Parts, x: Tensor) -> Any:
    """What a triangle cuts off is 0, whatever it was, and so is its gradient."""
    y = m.block(x)
    scores = (y @ y.mT).masked_fill(torch.eye(13, dtype=torch.bool).roll(1, 0), torch.inf)
    return scores.triu(1).tril(3).nan_to_num(0, 0, 0) @ y, scores.tril(-9).sum()


# Masks that are given


def pairs(*shape: int) -> Argument:
    """Who may see whom, at random; each token sees itself."""
    return lambda: (torch.rand(*shape) > 0.4) | torch.eye(13, dtype=torch.bool)


def in_both(m: Parts, x: Tensor, mask: Tensor) -> Any:
    return m.block(m.block(x, attn_mask=mask), attn_mask=mask)


@program(X, pairs(2, 1, 13, 13), moves={"all_to_all": 8, "gather_output": 1})
def given_mask_of_each_sample(m: Parts, x: Tensor, mask: Tensor) -> Any:
    return in_both(m, x, mask)


@program(X, lambda: torch.randn(13, 13, dtype=torch.float64), moves={"all_to_all": 8, "gather_output": 1})
def given_bias(m: Parts, x: Tensor, bias: Tensor) -> Any:
    return in_both(m, x, bias)


@program(X, (3, 13, 13), parts=4, moves={"all_to_all": 8, "gather_output": 1})
def given_bias_of_each_head_that_takes_a_gradient(m: Parts, x: Tensor, bias: Tensor) -> Any:
    return in_both(m, x, bias)


@program(X, (2, 3, 13, 13), parts=3, dynamic=True, moves={"all_to_all": 8, "gather_output": 1})
def given_bias_of_all_that_takes_a_gradient(m: Parts, x: Tensor, bias: Tensor) -> Any:
    return in_both(m, x, bias)


@program(
    X,
    lambda: torch.arange(13) < torch.tensor([[13], [7]]),
    dynamic=True,
    moves={"all_to_all": 4, "gather_output": 1, "all_reduce": 1},
)
def given_key_padding(m: Parts, x: Tensor, kept: Tensor) -> Any:
    y = m.block(x, attn_mask=kept[:, None, None])
    return y, (y * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)


@program(X, lambda: (torch.arange(13) < 9).view(1, 1, 1, 13), moves={"all_to_all": 8, "gather_output": 1})
def given_mask_of_keys(m: Parts, x: Tensor, kept: Tensor) -> Any:
    return in_both(m, x, kept)
