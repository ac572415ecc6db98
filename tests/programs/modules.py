"""Modules of `torch.nn`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .table import PROGRAMS, Argument, Program, X


class Modules(nn.Module):
    """Named modules, and what to do with them."""

    def __init__(self, body: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, module in modules.items():
            self.add_module(name, module)
        self.double()

    def forward(self, *args: Tensor) -> Any:
        return self.body(self, *args)


def modules(
    *arguments: Argument,
    parts: int,
    whole: bool = False,
    moves: dict[str, int] | None = None,
    **makers: Callable[[], nn.Module],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a program over modules of torch.nn."""

    def add(body: Callable[..., Any]) -> Callable[..., Any]:
        def make() -> nn.Module:
            return Modules(body, **{name: maker() for name, maker in makers.items()})

        PROGRAMS.append(Program(body.__name__, make, arguments, parts, None, whole, moves or {}))
        return body

    return add


attention = partial(nn.MultiheadAttention, 12, 3)
layer = partial(nn.TransformerEncoderLayer, 12, 3, 20, 0.0, batch_first=True)
decoder = partial(nn.TransformerDecoderLayer, 12, 3, 20, 0.0)


def causal_mask(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)


def keys_kept() -> Tensor:
    """Memory `[2, 7]` of which the last key is padding."""
    return torch.arange(7).expand(2, 7) > 5


@modules((13, 2, 12), parts=3, a=attention)
def mha_sequence_first_with_weights(m: Any, x: Tensor) -> Any:
    return m.a(x, x, x)


@modules(X, (2, 7, 12), parts=4, a=partial(attention, batch_first=True))
def mha_memory_with_weights_per_head(m: Any, x: Tensor, memory: Tensor) -> Any:
    return m.a(x, memory, memory, average_attn_weights=False, key_padding_mask=keys_kept())


@modules(X, parts=2, a=partial(attention, batch_first=True, add_bias_kv=True, add_zero_attn=True))
def mha_bias_kv(m: Any, x: Tensor) -> Any:
    return m.a(x, x, x, need_weights=False)[0]


@modules(X, (2, 7, 5), (2, 7, 6), parts=3, a=partial(attention, batch_first=True, kdim=5, vdim=6))
def mha_other_widths(m: Any, x: Tensor, k: Tensor, v: Tensor) -> Any:
    return m.a(x, k, v)[0]


@modules((13, 12), parts=4, a=attention)
def mha_unbatched(m: Any, x: Tensor) -> Any:
    return m.a(x, x, x)[0]


@modules(X, parts=2, a=layer, b=partial(layer, norm_first=True))
def encoder_layers(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x, causal_mask(13), is_causal=True), src_key_padding_mask=torch.arange(13).expand(2, 13) > 10)


@modules((13, 2, 12), parts=3, a=partial(nn.TransformerEncoderLayer, 12, 3, 20, 0.0, norm_first=True))
def encoder_layer_sequence_first(m: Any, x: Tensor) -> Any:
    return m.a(x, causal_mask(13))


@modules(X, parts=4, a=lambda: nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False))
def encoder_stack(m: Any, x: Tensor) -> Any:
    return m.a(x, causal_mask(13), is_causal=True)


@modules(X, (2, 7, 12), parts=4, a=partial(decoder, batch_first=True, norm_first=True))
def decoder_layer(m: Any, x: Tensor, memory: Tensor) -> Any:
    return m.a(x, memory, causal_mask(13), memory_key_padding_mask=keys_kept(), tgt_is_causal=True)


@modules((13, 2, 12), (7, 2, 12), parts=2, a=decoder)
def decoder_layer_sequence_first(m: Any, x: Tensor, memory: Tensor) -> Any:
    return m.a(x, memory)


@modules(X, (2, 7, 12), parts=3, a=lambda: nn.Transformer(12, 3, 1, 1, 20, 0.0, batch_first=True))
def encoder_decoder(m: Any, x: Tensor, y: Tensor) -> Any:
    return m.a(x, y)


@modules(X, parts=2, a=layer, c=lambda: nn.Conv1d(12, 12, 3, padding=2, groups=12), d=lambda: nn.Conv1d(12, 12, 3))
def convolutions(m: Any, x: Tensor) -> Any:
    y = m.a(x).transpose(1, 2)
    return m.d(m.c(y)[..., : x.shape[1]]).transpose(1, 2)


@modules(X, parts=4, a=layer, b=lambda: nn.BatchNorm1d(12))
def batch_norm_over_tokens(m: Any, x: Tensor) -> Any:
    return m.a(m.b(m.a(x).transpose(1, 2)).transpose(1, 2))


@modules(X, parts=2, a=layer, b=lambda: nn.GroupNorm(3, 12))
def group_norm_over_tokens(m: Any, x: Tensor) -> Any:
    return m.a(m.b(m.a(x).transpose(1, 2)).transpose(1, 2))


@modules(X, parts=3, a=layer, g=lambda: nn.GRUCell(12, 12))
def recurrence(m: Any, x: Tensor) -> Any:
    y, state, states = m.a(x), x.new_zeros(2, 12), []
    for at in range(x.shape[1]):
        state = m.g(y[:, at], state)
        states.append(state)
    return torch.stack(states, 1)


@modules((2, 3, 20, 12), parts=3, p=lambda: nn.Conv2d(3, 12, 4, 4), a=layer, h=lambda: nn.Linear(12, 5))
def vision_transformer(m: Any, x: Tensor) -> Any:
    return m.h(m.a(m.p(x).flatten(2).transpose(1, 2)).mean(1))


@modules(
    (2, 3, 25),
    parts=4,
    p=lambda: nn.Conv1d(3, 12, 3, 2, 1),
    a=layer,
    u=lambda: nn.ConvTranspose1d(12, 3, 4, 2, 1),
)
def strided_stem(m: Any, x: Tensor) -> Any:
    return m.u(m.a(m.p(x).mT).mT)


@modules(
    (1, 12, 12, 8),
    parts=3,
    moves={"all_to_all": 4, "halo": 3, "all_reduce": 2, "gather_output": 1},
    c=lambda: nn.Conv2d(12, 12, 3, padding=1),
    d=lambda: nn.Conv2d(12, 12, 3, 2, 1),
    n=lambda: nn.GroupNorm(3, 12),
    a=attention,
    u=lambda: nn.Conv2d(12, 12, 3, padding=1),
)
def attention_between_convolutions(m: Any, x: Tensor) -> Any:
    """A small U-Net: blocks of image rows from one end to the other, with halos."""
    fine = m.c(x)
    coarse = m.n(m.d(fine).relu())
    tokens = coarse.flatten(2).permute(2, 0, 1)
    coarse = coarse + m.a(tokens, tokens, tokens, need_weights=False)[0].permute(1, 2, 0).reshape(coarse.shape)
    return m.u(nn.functional.interpolate(coarse, scale_factor=2.0)) + fine


@modules(
    (1, 5, 6, 12),
    parts=2,
    moves={"all_to_all": 4, "gather_output": 1},
    p=lambda: nn.Linear(12, 12),
    a=layer,
    o=lambda: nn.Linear(12, 12),
)
def projections_of_an_image(m: Any, x: Tensor) -> Any:
    """The first rank has 3 of 5 rows: less than the projections of all of them on every rank."""
    return m.o(m.a(m.p(x).flatten(1, 2)).view(x.shape))
