"""Tensors of every kind that torch has, each made of a few whole numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def quantised(integers: Tensor, scale: float = 0.5, kind: str = "tensor") -> Tensor:
    scales, zeros = torch.tensor([1.0, scale]), torch.zeros(2)
    if kind == "tensor":
        return torch._make_per_tensor_quantized_tensor(integers.to(torch.uint8), scale, 3)
    if kind == "channel":
        return torch._make_per_channel_quantized_tensor(integers.to(torch.int8), scales, zeros.long(), 0)
    return torch.quantize_per_channel(integers * scales[:, None], scales, zeros, 0, torch.quint4x2)


class Named(Tensor):
    """A subclass in name alone."""


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "quantised": quantised,
    "quantised by channel": partial(quantised, kind="channel"),
    "quantised and packed": partial(quantised, kind="packed"),
    "conjugate": lambda x: torch.complex(x.double(), -x.double()).conj(),
    "negative": lambda x: torch.complex(x.double(), -x.double()).conj().imag,
    "half complex": lambda x: torch.complex(x.half(), -x.half()),
    "subclass": lambda x: x.as_subclass(Named),
    "parameter": lambda x: nn.Parameter(x.double()),
    "expanded": lambda x: x[None].expand(3, 2, 4),
    "a number": lambda x: x[1, 0],
    **{
        str(dtype): lambda x, dtype=dtype: x.to(torch.uint8).repeat(1, dtype.itemsize).view(dtype)[:, ::2]  # type: ignore[misc]
        for name, dtype in vars(torch).items()
        if isinstance(dtype, torch.dtype) and str(dtype) == f"torch.{name}" and not name.startswith("q")
    },
}  # fmt: skip
