"""Streams laid end to end, windows, patches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .table import Parts, X, program


@program(X, (2, 7, 12), moves={"all_to_all": 4, "gather_output": 2})
def joint(m: Parts, x: Tensor, t: Tensor) -> Any:
    q = torch.cat([m.split(m.q(x)), m.split(m.k(t))], 2)
    k = torch.cat([m.split(m.k(x)), m.split(m.q(t))], 2)
    v = torch.cat([m.split(m.v(x)), m.split(m.v(t))], 2)
    o = m.join(F.scaled_dot_product_attention(q, k, v))
    a, b = o.split([x.shape[1], t.shape[1]], 1)
    return (x + m.o(a), t + m.o(b))


@program((2, 9, 12), (2, 2, 12), parts=4, moves={"all_to_all": 12, "all_reduce": 1, "gather_output": 2})
def joint_short(m: Parts, x: Tensor, t: Tensor) -> Any:
    y = m.block(torch.cat([x, t], 1))
    a, b = y.split([9, 2], 1)
    return (m.block(a), m.block(b), F.cross_entropy(m.head(y).flatten(0, 1), torch.arange(22) % 17))


@program(X, X, moves={"all_to_all": 4, "gather_output": 2})
def joint_norm_rope(m: Parts, x: Tensor, t: Tensor) -> Any:
    B, S, _ = x.shape

    def heads(f: nn.Module, g: nn.Module) -> Tensor:
        return torch.cat([f(m.norm(t)).view(B, S, 3, 4), g(m.norm2(x)).view(B, S, 3, 4)], 1).transpose(1, 2)

    p = torch.arange(2 * S, dtype=x.dtype)[:, None]
    c = p.cos()
    q, k, v = (heads(m.q, m.k) * c, heads(m.k, m.v) * c, heads(m.v, m.o))
    o = m.join(F.scaled_dot_product_attention(q, k, v))
    a, b = (o[:, :S], o[:, S:])
    return (t + m.o(a) * m.w, x + m.down(m.up(b)))


@program((1, 9, 12), (1, 11, 12))
def mmdit_single(m: Parts, t: Tensor, x: Tensor) -> Any:
    h = torch.cat([t, x], 1)
    for _ in range(2):
        qkv = m.mod(m.norm(h))
        q, k, v = (m.split(z) for z in qkv.chunk(3, -1))
        o = m.join(F.scaled_dot_product_attention(q, k, v))
        h = h + torch.cat([o, F.gelu(m.up(h))], -1) @ torch.cat([m.mat, m.down.weight.T], 0)
    return h[:, 9:]


@program(X, (2, 9, 12), (2, 11, 12), moves={"all_to_all": 8, "gather_output": 2})
def three_streams(m: Parts, x: Tensor, t: Tensor, u: Tensor) -> Any:
    y = m.block(torch.cat([t, x, u], 1))
    t, x, u = y.split([9, 13, 11], 1)
    z = m.block(torch.cat([u, t], 1))
    return (x, z[:, :11], z[:, 11:], y[:, 9:])


@program(X, (2, 9, 12))
def wrong_bounds(m: Parts, x: Tensor, t: Tensor) -> Any:
    y = m.block(torch.cat([t, x], 1))
    return (y[:, :10] * m.w, y[:, 10:], y[:, 2:12].mean(1))


@program(X, moves={"all_to_all": 10, "gather_output": 1})
def registers_in_the_middle(m: Parts, x: Tensor) -> Any:
    r = m.table.weight[:4].expand(2, -1, -1)
    y = torch.cat([x[:, :6], r, x[:, 6:]], 1)
    y = m.block(y)
    return m.block(torch.cat([y[:, :6], y[:, 10:]], 1))


@program(X, (2, 7, 12), moves={"all_to_all": 8, "all_reduce": 1, "select_rows": 1, "gather_output": 1})
def streams_flattened(m: Parts, x: Tensor, t: Tensor) -> Any:
    y = m.block(torch.cat([t, x], 1))
    z = m.head(y.reshape(-1, 12))
    return (
        F.cross_entropy(z, torch.arange(40) % 17),
        z.view(2, 20, 17)[:, :7].mean(1),
        m.block(z.view(2, 20, 17)[..., :12]),
    )


@program((13, 2, 12), (9, 2, 12))
def streams_flattened_sequence_first(m: Parts, x: Tensor, t: Tensor) -> Any:
    y = torch.cat([t, x], 0)
    y = m.block(y.transpose(0, 1)).transpose(0, 1)
    z = m.o(y.reshape(-1, 12)).view(22, 2, 12)
    return (z[:9], z[9:].sum(0))


@program(X)
def cat_self(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (
        m.block(torch.cat([y, y], 1)),
        torch.cat([y, y.flip(1)], 1),
        torch.cat([y, y], 0),
        torch.cat([y, x], 2) @ m.mod.weight[:24],
    )


@program(X, moves={"all_to_all": 8, "select_rows": 1})
def class_token(m: Parts, x: Tensor) -> Any:
    y = torch.cat([m.cls.expand(x.shape[0], -1, -1), x], 1)
    y = m.block(m.block(y))
    return m.head(y[:, 0])


@program(X)
def class_token_cut_off(m: Parts, x: Tensor) -> Any:
    y = torch.cat([m.cls.expand(x.shape[0], -1, -1), x], 1)
    y = m.block(y)
    return (y[:, 1:], y[:, 0])


@program((1, 15, 12))
def shifted_windows(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    y = m.block(y.roll(-2, 1).view(3, 5, 12)).view(1, 15, 12).roll(2, 1)
    return y


@program((2, 6, 9, 12))
def windows2d(m: Parts, x: Tensor) -> Any:

    def part(t: Tensor) -> Tensor:
        return t.view(2, 2, 3, 3, 3, 12).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, 12)

    def back(t: Tensor) -> Tensor:
        return t.view(2, 2, 3, 3, 3, 12).permute(0, 1, 3, 2, 4, 5).reshape(2, 6, 9, 12)

    y = back(m.block(part(x)))
    y = y.roll((-1, -1), (1, 2))
    y = back(m.block(part(y))).roll((1, 1), (1, 2))
    return (y, y.mean((1, 2)))


@program((2, 6, 6, 12))
def swin(m: Parts, x: Tensor) -> Any:
    mask = torch.zeros(4, 9, 9, dtype=x.dtype)
    mask[1, :3] = -9
    y = x
    for s in (0, 1):
        y = y.roll((-s, -s), (1, 2))
        w = y.view(2, 2, 3, 2, 3, 12).transpose(2, 3).reshape(8, 9, 12)
        q, k, v = (m.split(f(w)) for f in (m.q, m.k, m.v))
        p = q @ k.mT + m.rel.weight[:9].T[None, :, None]
        if s:
            p = (p.view(2, 4, 3, 9, 9) + mask[:, None]).view(8, 3, 9, 9)
        w = m.o(m.join(p.softmax(-1) @ v))
        y = w.view(2, 2, 2, 3, 3, 12).transpose(2, 3).reshape(2, 6, 6, 12).roll((s, s), (1, 2)) + y
    y = torch.cat([y[:, 0::2, 0::2], y[:, 1::2, 0::2]], -1)
    return (y, y.mean((1, 2)))


@program((2, 5, 7, 12), moves={"all_to_all": 8, "gather_output": 1})
def spacetime(m: Parts, x: Tensor) -> Any:
    y = m.block(x.flatten(0, 1)).view(2, 5, 7, 12)
    y = m.block(y.transpose(1, 2).flatten(0, 1)).view(2, 7, 5, 12).transpose(1, 2)
    return m.block(y.flatten(1, 2))


@program((1, 5, 7, 12))
def joint_then_time(m: Parts, x: Tensor) -> Any:
    y = m.block(x.flatten(1, 2)).view(1, 5, 7, 12)
    y = m.block(y.transpose(1, 2).reshape(7, 5, 12))
    return y.transpose(0, 1).reshape(1, 35, 12)


@program((2, 6, 12, 12), moves={"all_to_all": 5, "gather_output": 1})
def patchify(m: Parts, x: Tensor) -> Any:
    p = x.view(2, 3, 2, 6, 2, 12).permute(0, 1, 3, 2, 4, 5).reshape(2, 18, 48)
    y = m.block(p[..., :12] + p[..., 36:])
    u = torch.cat([y, y * 2], -1).view(2, 3, 6, 2, 2, 6).permute(0, 5, 1, 3, 2, 4).reshape(2, 6, 6, 12)
    return u


@program((2, 8, 12))
def butterfly(m: Parts, x: Tensor) -> Any:
    y = m.block(x).view(2, 2, 2, 2, 12)
    y = y.transpose(1, 3).reshape(2, 8, 12)
    return (m.block(y), y.view(2, 4, 2, 12).sum(2), y.reshape(2, 2, 4, 12).flip(2).flatten(1, 2))


def kernels(m: Parts, *kernel: int) -> Tensor:
    """`[12, 3, *kernel]`"""
    return m.mod.weight[:, : torch.Size(kernel).numel()].reshape(12, 3, *kernel)


@program((2, 3, 6, 10), parts=4, moves={"all_to_all": 4, "gather_output": 1})
def patch_embedding(m: Parts, x: Tensor) -> Any:
    y = F.conv2d(x, kernels(m, 2, 2), m.w, stride=2).flatten(2).transpose(1, 2)
    return m.block(torch.cat([m.cls.expand(2, -1, -1), y], 1))


@program((2, 3, 4, 6, 2), parts=3)
def patch_embedding_of_frames(m: Parts, x: Tensor) -> Any:
    y = F.conv3d(x, kernels(m, 1, 2, 2), stride=(1, 2, 2)).flatten(2).mT
    return m.block(y), x * 2


@program((2, 5, 3, 4, 6), parts=2)
def patch_embedding_of_each_frame(m: Parts, x: Tensor) -> Any:
    y = F.conv2d(x.flatten(0, 1), kernels(m, 2, 2), m.w, stride=2)
    return m.block(y.view(2, 5, *y.shape[1:]).flatten(3).transpose(2, 3).flatten(1, 2))


@program((2, 3, 6, 10), parts=2)
def frozen_patch_embedding(m: Parts, x: Tensor) -> Any:
    """The convolution without a gradient, its view with one."""
    with torch.no_grad():
        y = F.conv2d(x, kernels(m, 2, 2), m.w, stride=2)
    return m.block(y.flatten(2).transpose(1, 2)) * m.w


@program((2, 3, 6, 10), parts=3)
def patch_embedding_read_twice(m: Parts, x: Tensor) -> Any:
    y = F.conv2d(x, kernels(m, 2, 2), m.w, stride=2)
    return m.block(y.flatten(2).transpose(1, 2)), y.mean((2, 3))


@program((2, 3, 7, 10), parts=2)
def patch_embedding_with_a_row_left_over(m: Parts, x: Tensor) -> Any:
    return m.block(F.conv2d(x, kernels(m, 2, 2), m.w, stride=2).flatten(2).mT)


@program((2, 3, 27), parts=4, dynamic=True)
def patches_of_a_wave(m: Parts, x: Tensor) -> Any:
    return m.block(F.conv1d(x, kernels(m, 3), stride=3, padding="valid").flatten(2).mT)


@program((1, 13, 12), parts=4)
def chunks_that_hand_on_a_memory(m: Parts, x: Tensor) -> Any:
    memory, made = m.table.weight[None, :3], []
    for chunk in x.split(5, 1):
        y = m.block(torch.cat([memory, chunk], 1))
        memory = y[:, :3]
        made.append(y[:, 3:])
    return torch.cat(made, 1), memory


@program((2, 5, 3, 12), parts=2, moves={"all_to_all": 4, "gather_output": 1})
def class_token_before_an_image(m: Parts, x: Tensor) -> Any:
    """Rows of an image are not the rows of the sequence, which has one more."""
    return m.block(torch.cat([m.cls.expand(2, 1, 12), m.q(x).flatten(1, 2)], 1))
