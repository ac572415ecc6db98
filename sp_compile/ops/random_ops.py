"""`sp::bernoulli`: random draws that differ between ranks, from a seed that does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode


@torch.library.custom_op("sp::bernoulli", mutates_args=())
def _bernoulli(like: Tensor, seed: Tensor, rank: Tensor, p: float) -> Tensor:
    """1 with probability `p`, else 0, in the shape and dtype of `like`; int64 `seed` and `rank` are `[1]`.

    The same seed and rank draw the same again, so a recomputed forward drops the same elements.
    """
    generator = torch.Generator(like.device).manual_seed(int(seed + rank))
    return torch.empty_like(like, memory_format=torch.contiguous_format).bernoulli_(p, generator=generator)


@_bernoulli.register_fake
def _(like: Tensor, seed: Tensor, rank: Tensor, p: float) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@_bernoulli.register_torch_dispatch(LocalTensorMode)
def _(mode: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Tensor:
    """Per simulated rank."""
    like, seed, rank, p = args

    def on(index: int, value: Tensor) -> Tensor:
        return value._local_tensors[index] if isinstance(value, LocalTensor) else value

    ranks = mode.ranks
    with mode.disable():
        return LocalTensor({r: _bernoulli(on(r, like), on(r, seed), on(r, rank), p) for r in ranks})


bernoulli = torch.ops.sp.bernoulli.default
