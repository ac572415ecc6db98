"""Write a sharding plan into a graph: `sp::` ops where placements change, and local sizes.

    h = embedding(w, ids)          slice_ids = sp.shard(ids, S(1: 32))                              i64[1, 16 of 32]
    …                              replicate_w = sp.replicate(w)
    out = attention(q, k, v)       h = embedding(replicate_w, slice_ids)                            f32[1, 16 of 32, 64]
    y = linear(out, w_out)         …
                                   gather_seq_scatter_heads_q = sp.all_to_all(q, gather S(2: 32), scatter S(1: 4))
                                   out = attention(gather_seq_scatter_heads_q, …)
                                   gather_heads_scatter_seq = sp.all_to_all(out, gather S(1: 4), scatter S(2: 32))
                                   y = linear(gather_heads_scatter_seq, replicate_w_out)

A conversion stands before its first consumer and serves all consumers of the same region: one ends where the gradient
mode or autocast changes. The law of gradients: a replicated value on its way into work that is sharded on a factor
which it lacks passes `sp.replicate`, whose backward sums over ranks. The rank is an input, `sp_rank`; never a constant.
"""

from sp_compile.passes.insert_collectives.rewriter import insert_collectives

__all__ = ["insert_collectives"]
