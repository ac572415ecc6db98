"""Attention inside windows, over space and time in turn, and over windows and everything in turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .table import Parts, program

IMAGE = (2, 12, 9, 12)
LOCAL = {"gather_output": 1}


def partition(x: Tensor, *window: int) -> Tensor:
    """`[B, (n w), …, C] -> [(B n …), (w …), C]`"""
    sizes = x.shape[1:-1]
    pairs = [each for size, w in zip(sizes, window, strict=True) for each in (size // w, w)]
    n = len(window)
    order = [0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1]
    return x.view(x.shape[0], *pairs, x.shape[-1]).permute(order).reshape(-1, torch.Size(window).numel(), x.shape[-1])


def merge(w: Tensor, shape: torch.Size, *window: int) -> Tensor:
    """The inverse of `partition`, to a `shape`."""
    n = len(window)
    counts = [size // each for size, each in zip(shape[1:-1], window, strict=True)]
    order = [0, *(at for d in range(n) for at in (1 + d, 1 + n + d)), 2 * n + 1]
    return w.view(shape[0], *counts, *window, shape[-1]).permute(order).reshape(shape)


def in_windows(m: Parts, x: Tensor, *window: int) -> Tensor:
    return merge(m.block(partition(x, *window)), x.shape, *window)


@program((1, 20, 12), parts=4, moves=LOCAL)
def windows_by_view(m: Parts, x: Tensor) -> Any:
    y = m.block(x.view(4, 5, 12)).view(1, 20, 12)
    return y + m.block(y.view(4, 5, 12)).view(1, 20, 12)


@program((2, 7, 5, 12), parts=3, dynamic=True, moves=LOCAL)
def any_number_of_windows(m: Parts, x: Tensor) -> Any:
    return m.block(m.norm(x).flatten(0, 1)).view(x.shape)


@program((2, 21, 12), parts=2, moves=LOCAL)
def seven_windows_on_two_ranks(m: Parts, x: Tensor) -> Any:
    y = m.norm(x).reshape(14, 3, 12)
    return x + m.block(y).view(2, 21, 12)


@program((2, 10, 12), parts=3, moves={"all_to_all": 4, "gather_output": 1})
def fewer_windows_than_ranks(m: Parts, x: Tensor) -> Any:
    return m.block(m.norm(x).reshape(4, 5, 12)).view(2, 10, 12)


@program(IMAGE, parts=2, moves=LOCAL)
def windows_of_images_2(m: Parts, x: Tensor) -> Any:
    return in_windows(m, in_windows(m, m.norm(x), 3, 3), 3, 3)


@program((1, 12, 9, 12), parts=3, moves=LOCAL)
def windows_of_one_image_3(m: Parts, x: Tensor) -> Any:
    return in_windows(m, m.norm(x), 3, 3)


@program(IMAGE, parts=4, moves=LOCAL)
def windows_of_images_4(m: Parts, x: Tensor) -> Any:
    return in_windows(m, in_windows(m, m.norm(x), 3, 3), 3, 3)


@program((1, 8, 6, 12), parts=2, moves={"all_to_all": 4, "gather_output": 1})
def shifted_windows_of_an_image(m: Parts, x: Tensor) -> Any:
    y = in_windows(m, m.norm(x), 2, 3)
    return in_windows(m, y.roll((-1, -1), (1, 2)), 2, 3).roll((1, 1), (1, 2)) + y


@program((1, 8, 6, 12), parts=2, moves=LOCAL)
def windows_shifted_by_cat(m: Parts, x: Tensor) -> Any:
    """The other side of the windows is the home: it is not shifted."""
    y = in_windows(m, m.norm(x), 2, 3)
    y = in_windows(m, torch.cat([y[:, 1:], y[:, :1]], 1), 2, 3)
    return torch.cat([y[:, -1:], y[:, :-1]], 1)


@program((2, 2, 8, 6, 12), parts=4, moves=LOCAL)
def windows_of_a_video(m: Parts, x: Tensor) -> Any:
    return in_windows(m, in_windows(m, m.norm(x), 2, 2, 3), 2, 2, 3)


@program((1, 10, 6, 12), parts=2, moves={"all_to_all": 8, "gather_output": 1})
def windows_and_everything(m: Parts, x: Tensor) -> Any:
    y = in_windows(m, m.norm(x), 2, 3)
    y = m.block(y.flatten(1, 2)).view(x.shape)
    return m.block(in_windows(m, y, 2, 3).flatten(1, 2))


@program((1, 6, 6, 12), parts=3, moves=LOCAL)
def windows_of_merged_heads(m: Parts, x: Tensor) -> Any:
    """As SAM: the windows and the heads are one batch."""
    for _ in range(2):
        w = partition(m.norm(x), 2, 3)
        q, k, v = (m.split(f(w)).reshape(-1, 6, 4) for f in (m.q, m.k, m.v))
        o = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)
        o = o.view(-1, 3, 2, 3, 4).permute(0, 2, 3, 1, 4).reshape(-1, 6, 12)
        x = x + merge(m.o(o), x.shape, 2, 3)
    return x


@program((1, 10, 8, 12), parts=3)
def windows_of_a_padded_image(m: Parts, x: Tensor) -> Any:
    y = m.norm(x)
    for _ in range(2):
        w = in_windows(m, torch.nn.functional.pad(y, (0, 0, 0, 1, 0, 2)), 3, 3)
        y = y + m.mat[0] * w[:, :10, :8].contiguous()
    return y


@program((2, 4, 9, 12), parts=3, moves={"all_to_all": 8, "gather_output": 1})
def space_and_time_in_turn(m: Parts, x: Tensor) -> Any:
    y = m.norm(x)
    for _ in range(2):
        y = m.block(y.flatten(0, 1)).view(x.shape)
        y = m.block(y.transpose(1, 2).flatten(0, 1)).view(2, 9, 4, 12).transpose(1, 2)
    return y


@program((1, 9, 4, 12), parts=2, moves={"all_to_all": 4, "gather_output": 1})
def much_time_and_little_space(m: Parts, x: Tensor) -> Any:
    y = m.block(m.norm(x)[0]).view(x.shape)
    return m.block(y.transpose(1, 2)[0]).view(1, 4, 9, 12).transpose(1, 2)


@program((2, 4, 3, 3, 12), parts=3, moves={"all_to_all": 4, "gather_output": 1})
def space_of_two_dimensions_and_time(m: Parts, x: Tensor) -> Any:
    y = m.block(m.norm(x).view(8, 9, 12)).view(x.shape)
    y = m.block(y.permute(0, 2, 3, 1, 4).reshape(18, 4, 12))
    return y.view(2, 3, 3, 4, 12).permute(0, 3, 1, 2, 4)


@program((13, 4, 12), parts=2, moves={"all_to_all": 4, "gather_output": 1})
def a_batch_behind_the_sequence(m: Parts, x: Tensor) -> Any:
    """`[S, B, C]`: the batch is no windows."""
    return m.block(m.norm(x).transpose(0, 1)).transpose(0, 1)


@program((4, 3, 13, 4), (4, 3, 13, 4), (4, 3, 13, 4), parts=2, moves={"all_to_all": 4, "gather_output": 1})
def heads_that_no_weight_made(m: Parts, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return m.o(m.join(torch.nn.functional.scaled_dot_product_attention(2 * q, 2 * k, 2 * v)))
