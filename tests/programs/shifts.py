"""Shifts by few rows: what moves is the rows that change their owner."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import Parts, X, labels, program


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def all_but_the_last(m: Parts, x: Tensor) -> Any:
    return m.block(x)[:, :-1] * m.w


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def all_but_the_first(m: Parts, x: Tensor) -> Any:
    return m.norm(m.block(x)[:, 1:])


@program((1, 5, 12), parts=4, moves={"all_to_all": 5, "gather_output": 3})
def all_but_the_last_of_five_on_four(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y[:, :-1] * m.w, y[:, 1:] * m.w, y[:, 1:-1] * m.w)


@program((1, 9, 12), parts=4, moves={"all_to_all": 15, "gather_output": 1})
def the_last_rank_is_empty(m: Parts, x: Tensor) -> Any:
    """Nine rows are 3 + 3 + 3 + 0; eight are 2 + 2 + 2 + 2."""
    y = m.block(x)
    return m.block(y[:, :-1]) + m.block(y[:, 1:])


@program(X, moves={"all_to_all": 8, "gather_output": 1})
def one_less_and_back(m: Parts, x: Tensor) -> Any:
    y = m.block(x)[:, :-1]
    y = m.block(y)
    return torch.cat([m.cls.expand(2, -1, -1), y], 1) * m.w


@program(X, moves={"all_to_all": 8, "select_rows": 1, "gather_output": 1, "halo": 1})
def previous_token(m: Parts, x: Tensor) -> Any:
    """RWKV's token shift."""
    y = m.block(x)
    before = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
    mixed = y * m.w + before * (1 - m.w)
    return m.block(mixed)


@program(X, (2, 1, 12), moves={"all_to_all": 4, "select_rows": 1, "gather_output": 1, "halo": 1})
def previous_token_with_a_state(m: Parts, x: Tensor, state: Tensor) -> Any:
    y = m.block(x)
    return (m.o(torch.cat([state, y[:, :-1]], 1)) + y, y[:, -1:])


@program(X, moves={"all_to_all": 7, "gather_output": 1})
def pad_shift_both_ways(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return F.pad(y, (0, 0, 1, -1)) * m.w + F.pad(y, (0, 0, -1, 1)) + F.pad(y, (0, 0, 2, 0))[:, :-2]


@program(X, moves={"all_to_all": 4, "halo": 1, "gather_output": 1})
def half_of_the_channels_shifted(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return m.o(torch.cat([F.pad(y[..., :6], (0, 0, 1, -1)), y[..., 6:]], -1))


@program(X, moves={"all_to_all": 9, "gather_output": 4})
def rolls_by_few(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y.roll(1, 1) * m.w, y.roll(-2, 1) * m.w, y.roll(13, 1), y.roll(-14, 1))


@program((2, 5, 12), parts=4, moves={"all_to_all": 7, "select_rows": 2, "gather_output": 2})
def rolls_by_more_than_a_block(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y.roll(3, 1), y.roll(-4, 1), F.pad(y, (0, 0, 3, -3)), y[:, 3:])


@program((13, 2, 12), moves={"all_to_all": 6, "gather_output": 1, "halo": 1})
def roll_sequence_first(m: Parts, x: Tensor) -> Any:
    y = m.block(x.transpose(0, 1)).transpose(0, 1)
    return y.roll(1, 0) + F.pad(y, (0, 0, 0, 0, 1, -1))


@program((2, 13, 12), moves={"all_to_all": 5, "gather_output": 1})
def shifted_in_heads(m: Parts, x: Tensor) -> Any:
    """Keys shifted by one token, in the layout of the heads."""
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    k = torch.cat([k[:, :, :1], k[:, :, :-1]], 2)
    return m.o(m.join(F.scaled_dot_product_attention(q, k, F.pad(v, (0, 0, 1, -1)), is_causal=True)))


@program(X, moves={"all_to_all": 6, "gather_output": 1})
def convolution_by_shifts(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    padded = F.pad(y, (0, 0, 2, 0))
    return padded[:, :-2] * m.mat[0] + padded[:, 1:-1] * m.mat[1] + padded[:, 2:] * m.mat[2]


@program((2, 13, 12), (2, 7, 12), moves={"all_to_all": 8, "gather_output": 1})
def shift_over_streams(m: Parts, x: Tensor, t: Tensor) -> Any:
    y = m.block(torch.cat([t, x], 1))
    return m.block(torch.cat([y[:, -1:], y[:, :-1]], 1))


@program(X, moves={"all_to_all": 8, "gather_output": 1})
def class_token_replaced(m: Parts, x: Tensor) -> Any:
    y = m.block(torch.cat([m.cls.expand(2, -1, -1), x], 1))
    return m.block(torch.cat([m.cls.expand(2, -1, -1), y[:, 1:]], 1))


@program(X, moves={"all_to_all": 10, "gather_output": 1})
def first_row_written(m: Parts, x: Tensor) -> Any:
    y = m.block(x).clone()
    y[:, 0] = m.cls[0]
    y[:, -1:] += m.w
    return m.block(y)


@program(X, labels(ignored=(12,)), moves={"all_to_all": 4, "all_reduce": 2, "halo": 1})
def loss_of_shifted_rows(m: Parts, x: Tensor, t: Tensor) -> Any:
    y = m.block(x)
    return F.cross_entropy(m.head(y[:, :-1]).mT, t[:, 1:]) + F.mse_loss(y[:, 1:], y[:, :-1])


@program(X, labels(), moves={"all_to_all": 4, "all_reduce": 2})
def loss_of_two_heads(m: Parts, x: Tensor, t: Tensor) -> Any:
    """The next token, and the one after it."""
    lg = m.head(m.block(x))
    one = F.cross_entropy(lg[:, :-1].flatten(0, 1), t[:, 1:].flatten())
    return one + 0.3 * F.cross_entropy(lg[:, :-2].flatten(0, 1), t[:, 2:].flatten())


@program(X, moves={"all_to_all": 4, "all_reduce": 1, "gather_output": 1, "halo": 3})
def differences_of_neighbours(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (torch.diff(y, dim=1), (y[:, 2:] - 2 * y[:, 1:-1] + y[:, :-2]).square().mean())


@program(X, dynamic=True, moves={"all_to_all": 7, "all_reduce": 1, "gather_output": 3})
def d_shifts(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y[:, :-1] * m.w, y[:, 1:].mean(1), F.pad(y, (0, 0, 1, 0))[:, :-1] + y, y.roll(-1, 1))


@program((1, 4, 12), parts=4, dynamic=True, moves={"all_to_all": 10, "gather_output": 1})
def d_shift_of_four_on_four(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    y = torch.cat([m.cls, y[:, :-1]], 1) * m.w + y
    return m.block(y)[:, 1:]


# Without attention


@program(X, moves={"halo": 2, "gather_output": 1})
def previous_token_alone(m: Parts, x: Tensor) -> Any:
    for _ in range(2):
        before = F.pad(m.norm(x), (0, 0, 1, -1))
        x = x + m.down(F.gelu(m.up(before * m.w + x)))
    return x


@program(X, moves={"all_to_all": 2, "gather_output": 1})
def rolls_alone(m: Parts, x: Tensor) -> Any:
    return m.o(m.norm(x).roll(1, 1)) + m.q(x.roll(-1, 1)) + x


@program((2, 13, 12), parts=4)
def rows_that_are_cut_off_are_zero(m: Parts, x: Tensor) -> Any:
    """Padding that held them would divide by 0: nan in the gradient of every parameter."""
    z = (m.block(x) * (torch.arange(13) >= 3)[:, None])[:, 3:]
    return m.o(z / (z * z).sum(-1, keepdim=True))
