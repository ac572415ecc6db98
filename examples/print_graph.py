"""A five-line attention, before and after `sp_backend` rewrites it for two ranks.

    python examples/print_graph.py        about 5 seconds, one process

The ranks are a fake process group, over which nothing moves; the graph is the one that real ranks run.
"""

from __future__ import annotations

import inspect

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.testing._internal.distributed.fake_pg import FakeStore

from sp_compile import init_sequence_parallel, rewritten_graphs, sp_backend


def attention(x: Tensor, w_qkv: Tensor, w_out: Tensor) -> Tensor:
    qkv = linear(x, w_qkv).unflatten(-1, (3, 4, 16))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    out = out.transpose(1, 2).flatten(2)
    return linear(out, w_out)


def main() -> None:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    init_sequence_parallel()
    compiled = torch.compile(attention, backend=sp_backend, options={"inner_backend": "eager"})
    compiled(torch.randn(1, 32, 64), *(torch.randn(rows, 64, requires_grad=True) for rows in (192, 64)))
    (_, before), *_, (_, after) = rewritten_graphs()[-1].stages
    print(f"# The program\n\n{inspect.getsource(attention)}")
    print(f"# Its graph\n\n{before}\n")
    print(f"# On each of 2 ranks; `16 of 32` is the local size of the global one\n\n{after}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
