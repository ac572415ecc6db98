"""Attention by where its operands come from: inputs of the graph, caches, fewer queries than ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import Parts, program

Q = (1, 3, 13, 4)
CACHE = (1, 3, 29, 4)


@program(Q, Q, Q, parts=2, moves={"all_to_all": 1, "gather_output": 1})
def given_heads(m: Parts, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """All that an attention needs is given whole: as much of it as a rank has heads."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@program(Q, (1, 1, 13, 4), (1, 1, 13, 4), parts=4, moves={"gather_output": 1})
def given_grouped_heads(m: Parts, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return m.o(m.join(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))


@program(Q, (1, 3, 29, 4), (1, 1, 13, 29), parts=3, dynamic=True)
def d_given_with_a_bias(m: Parts, q: Tensor, k: Tensor, bias: Tensor) -> Any:
    return F.scaled_dot_product_attention(q, k, k, attn_mask=bias), q * 2


@program(Q, Q, Q, parts=3)
def given_and_written_out(m: Parts, q: Tensor, k: Tensor, v: Tensor) -> Any:
    y = (q @ k.mT * 0.5).softmax(-1) @ v
    return F.scaled_dot_product_attention(y, k, v)


@program(Q, (1, 13, 12), parts=4)
def given_queries(m: Parts, q: Tensor, x: Tensor) -> Any:
    return F.scaled_dot_product_attention(q, m.split(m.k(x)), m.split(m.v(x)))


@program((13, 4), (13, 4), (13, 4), parts=2, moves={"gather_output": 1})
def given_without_heads(m: Parts, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return F.scaled_dot_product_attention(q, k, v)


@program((1, 1, 12), CACHE, parts=2, shards=False)
def a_token_beside_a_growing_cache(m: Parts, x: Tensor, cache: Tensor) -> Any:
    k, v = (torch.cat([cache, m.split(f(x))], 2) for f in (m.k, m.v))
    return m.o(m.join(F.scaled_dot_product_attention(m.split(m.q(x)), k, v))), k


@program((1, 1, 12), CACHE, parts=4, shards=False)
def a_token_in_a_static_cache(m: Parts, x: Tensor, cache: Tensor) -> Any:
    at = torch.tensor([5])
    k, v = (cache.index_copy(2, at, m.split(f(x))) for f in (m.k, m.v))
    seen = (torch.arange(29) <= at)[None, None, None]
    return m.o(m.join(F.scaled_dot_product_attention(m.split(m.q(x)), k, v, attn_mask=seen)))


@program((1, 1, 12), (1, 29, 12), parts=4)
def a_token_beside_keys_that_are_made(m: Parts, x: Tensor, memory: Tensor) -> Any:
    """The layers that make keys and values are worth their rows."""
    return m.attend(x, memory)


@program((1, 5, 12), CACHE, parts=3)
def a_prompt_in_a_static_cache(m: Parts, x: Tensor, cache: Tensor) -> Any:
    k, v = (torch.slice_scatter(cache, m.split(f(x)), 2, 2, 7) for f in (m.k, m.v))
    return m.o(m.join(F.scaled_dot_product_attention(m.split(m.q(x)), k, v)))
