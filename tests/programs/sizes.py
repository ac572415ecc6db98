"""Sizes at which something is empty, one, or fewer than the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import Parts, X, ids, program


@program((2, 1, 12), parts=4, shards=False)
def length_1(m: Parts, x: Tensor) -> Any:
    y = m.block(x, is_causal=True)
    return (y, y.mean(1), y[:, -1], m.block(y[:, :1]))


@program((1, 1, 12), parts=3, dynamic=True, shards=False)
def d_length_1(m: Parts, x: Tensor) -> Any:
    return m.block(m.block(x)).mean(1)


@program((1, 2, 12), parts=4, shards=False)
def length_2_on_4(m: Parts, x: Tensor) -> Any:
    y = m.block(x, is_causal=True)
    return (y, y.mean(1), y.amax(1), y.var(1), y[:, -1], (1 / y).sum(1))


@program((1, 4, 12), parts=4, moves={"all_to_all": 4, "gather_output": 1})
def a_row_for_each_rank(m: Parts, x: Tensor) -> Any:
    return m.block(x)


@program((1, 5, 12), parts=4)
def two_ranks_of_padding(m: Parts, x: Tensor) -> Any:
    """Five rows are 2 + 2 + 1 + 0."""
    y = m.block(m.block(x), is_causal=True)
    return (y.logsumexp(1), y.std(1), F.softmax(y, 1) * y, F.mse_loss(y, x))


@program((0, 13, 12), parts=3, shards=False)
def no_batch(m: Parts, x: Tensor) -> Any:
    q, k, v = (f(x).view(0, 13, 3, 4).transpose(1, 2) for f in (m.q, m.k, m.v))
    y = m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)) + m.norm(x)
    return (y, y.sum(1), m.head(y[:, -1]))


@program((2, 0, 12), parts=3, shards=False)
def no_tokens(m: Parts, x: Tensor) -> Any:
    y = m.norm(x) @ m.mat
    return (y, y.sum(1), torch.cat([y, m.cls.expand(2, -1, -1)], 1))


@program(X, (2, 0, 12), parts=3, whole=True)
def an_empty_stream(m: Parts, x: Tensor, t: Tensor) -> Any:
    y = m.block(torch.cat([t, x, t], 1))
    return (y, y[:, :0], y[:, 13:].sum(1))


@program(X)
def an_empty_vector_beside_two_dtypes(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (torch.cat([torch.empty(0), y > 0, y], -1), torch.cat([y, y > 1, torch.empty(0)], 1))


@program(X, whole=True)
def an_empty_vector_that_tells_the_dtype(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y, torch.cat([torch.empty(0), y > 0, y < 1], -1))


@program(X, whole=True)
def streams_without_rows(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    none, all_rows = y.split([0, 13], 1)
    return (torch.cat([y[:, :0], all_rows, none], 1), torch.cat([none, none], 1))


@program(X)
def a_shape_from_broadcast_shapes(m: Parts, x: Tensor) -> Any:
    return m.block(x) + m.w.expand(torch.broadcast_shapes(x.shape, (1, 12)))


@program(X, dynamic=True)
def a_shape_from_broadcast_shapes_of_any_length(m: Parts, x: Tensor) -> Any:
    return m.block(x) + m.w.expand(torch.broadcast_shapes(x.shape, (1, 12)))


@program((1, 13, 4), heads=1, parts=4, moves={"gather_seq": 2, "gather_output": 1})
def one_head_on_four(m: Parts, x: Tensor) -> Any:
    return m.block(x, is_causal=True)


@program((1, 13, 8), heads=2, parts=4)
def two_heads_on_four(m: Parts, x: Tensor) -> Any:
    y = m.block(x, is_causal=True)
    return m.block(y, attn_mask=m.bias.view(2, 1, 1) * torch.arange(13))


@program((1, 13, 12), parts=4, moves={"all_to_all": 8, "gather_output": 1})
def three_heads_on_four(m: Parts, x: Tensor) -> Any:
    y = m.block(x, is_causal=True)
    return m.block(y, attn_mask=m.bias.view(3, 1, 1) * torch.arange(13))


@program((1, 13, 5), heads=5, dim=1, parts=3)
def heads_of_one_channel(m: Parts, x: Tensor) -> Any:
    return m.block(x)


@program((1, 7, 20), heads=5, kv=5, parts=3, moves={"all_to_all": 4, "gather_output": 1})
def five_heads_on_three(m: Parts, x: Tensor) -> Any:
    return m.attend(x, is_causal=True)


@program((13, 1, 12), parts=4)
def batch_of_one_sequence_first(m: Parts, x: Tensor) -> Any:
    y = m.block(x.transpose(0, 1)).transpose(0, 1)
    return (y, y.squeeze(1) @ m.mat, y.sum(0))


@program((1, 13, 12), (1, 2, 12), parts=4)
def memory_of_two_on_four(m: Parts, x: Tensor, memory: Tensor) -> Any:
    return m.attend(m.block(x), m.block(memory))


@program((1, 17, 12), parts=4)
def halves_of_seventeen(m: Parts, x: Tensor) -> Any:
    """17 is 5 + 5 + 5 + 2; 8 is 2 + 2 + 2 + 2 and 9 is 3 + 3 + 3 + 0."""
    a, b = m.block(x).split([8, 9], 1)
    return m.block(torch.cat([m.block(b), m.block(a)], 1))


@program(ids(1, 1), parts=2, shards=False)
def one_token_of_a_language_model(m: Parts, i: Tensor) -> Any:
    return m.head(m.block(m.table(i), is_causal=True))


# Sizes that are numbers among the arguments, of pieces that are all or nothing


def rows_of(m: Parts, x: Tensor) -> Tensor:
    """Attention over `[S, C]`, as over one image without a batch."""
    return m.block(x[None])[0]


@program((13, 12), parts=2)
def one_piece(m: Parts, x: Tensor) -> Any:
    (y,) = F.silu(x).split([x.shape[0]], 0)
    (z,) = F.silu(x).split(x.shape[0])
    (u,) = torch.tensor_split(y + z, 1)
    return rows_of(m, u)


@program((13, 12), parts=3, dynamic=True)
def d_one_piece(m: Parts, x: Tensor) -> Any:
    (y,) = F.silu(x).split([x.shape[0]], 0)
    (z,) = rows_of(m, y).split([x.shape[0]], 0)
    return z * 2


@program((13, 12), parts=3)
def pieces_without_rows(m: Parts, x: Tensor) -> Any:
    none, y, nothing = F.silu(x).split([0, x.shape[0], 0], 0)
    more, still = none.split([0, 0], 0)
    return rows_of(m, y) + nothing.sum(), none, more + still


@program((13, 12), parts=2)
def as_many_as_there_are(m: Parts, x: Tensor) -> Any:
    length, width = x.shape
    y = F.silu(x).narrow(0, 0, length).unflatten(0, (length, 1))[:, 0].roll(length, 0).repeat(1, 1)
    y = y[torch.arange(length)] + y.new_zeros(length, width) + x[:1].expand(length, width)
    y = torch.cat([y.new_zeros(0, width), y.flatten().view(length, -1), y.narrow(0, length, 0)])
    return rows_of(m, y.as_strided((length, width), (width, 1))[: length + 5])


@program((13, 12), parts=4, dynamic=True)
def d_as_many_as_there_are(m: Parts, x: Tensor) -> Any:
    length, width = x.shape
    y = F.silu(x).narrow(0, 0, length).unflatten(0, (length, 1))[:, 0].roll(length, 0).repeat(1, 1)
    y = y[torch.arange(length)] + y.new_zeros(length, width) + x[:1].expand(length, width)
    first, last = y.split([length - 2, 2], 0)
    return rows_of(m, torch.cat([last, first, y.narrow(0, length, 0)]))
