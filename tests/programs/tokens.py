"""Graphs without attention: what mixes the tokens is something else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import Parts, X, ids, labels, mlp, program


@program(X, moves={"all_reduce": 4, "gather_output": 1})
def linear_attention_alone(m: Parts, x: Tensor) -> Any:
    for _ in range(2):
        y = m.norm(x)
        q, k, v = (m.split(f(y)) for f in (m.q, m.k, m.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        z = 1 / (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
        x = mlp(m, x + m.o(m.join(q @ (k.mT @ v) * z)))
    return x


@program(X, moves={"all_gather": 1, "gather_output": 1})
def linear_attention_by_einsum(m: Parts, x: Tensor) -> Any:
    q, k, v = (f(x).view(2, 13, 3, 4) for f in (m.q, m.k, m.v))
    state = torch.einsum("bshd,bshe->bhde", k.softmax(1), v)
    return m.o(torch.einsum("bshd,bhde->bshe", q.softmax(-1), state).flatten(2)) + x


@program(X, moves={"all_to_all": 1, "gather_output": 1})
def causal_linear_attention(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    state = (k[..., :, None] * v[..., None, :]).cumsum(2)
    return mlp(m, m.o(m.join((q[..., None, :] @ state).squeeze(-2))) + x)


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def kernel_attention_as_one_product(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(x)) for f in (m.q, m.k, m.v))
    s = (q @ k.mT).tril() / 13
    return m.o(m.join(s @ v)) + x


@program(X, shards=False, whole=True)
def token_mlp(m: Parts, x: Tensor) -> Any:
    for _ in range(2):
        y = F.linear(m.norm(x).mT, m.table.weight[:20, : 13 - 1].new_zeros(20, 13) + m.up.weight[:, :1])
        x = mlp(m, x + F.linear(F.gelu(y), m.table.weight.view(-1)[:260].view(13, 20)).mT)
    return x.mean(1)


@program((2, 12, 12), shards=False)
def token_mlp_of_square_tokens(m: Parts, x: Tensor) -> Any:
    x = x + m.o(m.norm(x).mT).mT
    return mlp(m, x)


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def depthwise_convolution(m: Parts, x: Tensor) -> Any:
    for _ in range(2):
        y = F.conv1d(m.norm(x).mT, m.mat[:, :4].unsqueeze(1), m.w, padding=3, groups=12)[..., :13].mT
        x = mlp(m, x + F.silu(y) * m.q(x))
    return x


@program(X, moves={"halo": 1, "all_to_all": 2, "gather_output": 1})
def dense_convolutions(m: Parts, x: Tensor) -> Any:
    weight = m.mod.weight.view(12, 12, 3)
    y = F.conv1d(x.mT, weight, m.w, padding=1)
    y = F.conv1d(F.gelu(y), weight, padding=2, dilation=2)
    return m.head(y.mT + x)


@program((2, 39, 12), parts=2, moves={"halo": 3, "gather_output": 1})
def dilated_causal_convolutions(m: Parts, x: Tensor) -> Any:
    """A WaveNet."""
    y, weight = m.norm(x), m.mod.weight.view(12, 12, 3)[..., :2]
    for dilation in (1, 2, 4):
        z = F.conv1d(F.pad(y.mT, (dilation, 0)), weight, m.w, dilation=dilation).mT
        y = y + torch.tanh(z) * torch.sigmoid(m.q(z))
    return m.head(y)


@program((2, 3, 8, 8), moves={"all_reduce": 3, "halo": 2})
def convolution_network(m: Parts, x: Tensor) -> Any:
    y = F.conv2d(x, m.mod.weight.view(12, 3, 12)[..., :9].reshape(12, 3, 3, 3), m.w, padding=1)
    y = F.group_norm(F.relu(y), 3, m.w, m.w)
    y = F.max_pool2d(y, 2)
    return m.head(y.mean((2, 3)))


@program(X, shards=False, whole=True)
def scan_alone(m: Parts, x: Tensor) -> Any:
    state, states = x.new_zeros(2, 12), []
    for at in range(x.shape[1]):
        state = torch.tanh(state * m.w + m.q(x[:, at]))
        states.append(state)
    return mlp(m, torch.stack(states, 1))


@program(X, whole=True)
def selective_scan(m: Parts, x: Tensor) -> Any:
    """As a state-space model writes it without kernels: decays as differences of a running sum."""
    y = m.norm(x)
    decay = F.softplus(m.q(y)).cumsum(1)
    apart = (decay[:, :, None] - decay[:, None]).masked_fill(
        ~torch.ones(13, 13, dtype=torch.bool).tril()[..., None], 9e9
    )
    mixed = (torch.exp(-apart) * (m.k(y)[:, None] * m.v(y)[:, :, None])).sum(2)
    return mlp(m, x + m.o(mixed * F.silu(m.w * y)))


@program(X, moves={"all_to_all": 2, "gather_output": 1})
def running_sums(m: Parts, x: Tensor) -> Any:
    y = m.norm(x)
    mean = y.cumsum(1) / (torch.arange(13) + 1)[:, None]
    top = y.logcumsumexp(1)
    return mlp(m, x + mean * m.w + top)


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def tokens_mixed_by_weights(m: Parts, x: Tensor) -> Any:
    """Tolstikhin et al. 2021, MLP-Mixer; with 12 hidden rows and 12 channels."""
    for _ in range(2):
        hidden = F.gelu(F.linear(m.norm(x).mT, m.table.weight[:13].mT, m.w))
        x = mlp(m, x + F.linear(hidden, m.table.weight[20:33]).mT)
    return x


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def tokens_gated_by_tokens(m: Parts, x: Tensor) -> Any:
    """Liu et al. 2021, gMLP: a convolution of one tap that takes the tokens for channels."""
    taps = m.table.weight.flatten()[:169].view(13, 13, 1)
    for _ in range(2):
        gate = F.conv1d(m.norm(m.k(x)), taps, m.head.weight[:13, 0])
        x = mlp(m, x + m.o(m.q(x) * gate))
    return x


@program((2, 12, 12), moves={"all_to_all": 4, "gather_output": 1})
def class_token_among_mixed_tokens(m: Parts, x: Tensor) -> Any:
    """Scaled as in ResMLP (Touvron et al. 2021)."""
    mix = m.table.weight.flatten()[:169].view(13, 13)
    y = torch.cat([m.cls.expand(2, -1, -1), m.q(x)], 1)
    for _ in range(2):
        y = mlp(m, y + F.linear((m.cls * y).mT, mix).mT * m.w)
    return y


@program(X, moves={"all_to_all": 3, "gather_output": 1})
def tokens_mixed_first_of_all(m: Parts, x: Tensor) -> Any:
    """What the user gives is whole: nothing moves before it is cut."""
    y = mlp(m, x.cumsum(1) + torch.fft.fft(x, dim=1).imag)
    return mlp(m, y.roll(1, 1) + y.flip(1))


@program(X, moves={"all_to_all": 2, "gather_output": 1})
def fourier_mixing(m: Parts, x: Tensor) -> Any:
    y = torch.fft.fft2(m.norm(x)).real
    return mlp(m, x + y)


@program((2, 15, 12), moves={"all_to_all": 2, "gather_output": 1})
def filtered_images(m: Parts, x: Tensor) -> Any:
    """Every frequency of an image of 5 by 3 tokens by a weight of its own (Rao et al. 2021)."""
    image = m.norm(x).unflatten(1, (5, 3))
    filters = torch.complex(m.table.weight[:10], m.table.weight[10:20]).unflatten(0, (5, 2))
    spectrum = torch.fft.rfft2(image, dim=(1, 2), norm="ortho") * filters
    return mlp(m, x + torch.fft.irfft2(spectrum, s=(5, 3), dim=(1, 2), norm="ortho").flatten(1, 2))


@program(X, moves={"all_to_all": 6, "gather_output": 1}, dynamic=True)
def fourier_transforms_of_all_norms(m: Parts, x: Tensor) -> Any:
    y = m.norm(x)
    there = [torch.fft.fftn(y, dim=(1, 2), norm=norm) for norm in ("forward", "backward", "ortho")]
    back = torch.fft.ifftn(sum(there), dim=(2, 1), norm="forward")
    return mlp(m, x + back.imag + torch.fft.hfft2(back, s=(13, 12), dim=(1, 2), norm="ortho"))


@program(X, moves={"all_to_all": 2, "gather_output": 1})
def long_convolution(m: Parts, x: Tensor) -> Any:
    kernel = m.table.weight[:13].exp() * (-torch.arange(13, dtype=x.dtype)[:, None]).exp()
    spectrum = torch.fft.rfft(m.norm(x), n=26, dim=1) * torch.fft.rfft(kernel, n=26, dim=0)
    return mlp(m, x + torch.fft.irfft(spectrum, n=26, dim=1)[:, :13])


@program(X, moves={"all_to_all": 2, "gather_output": 1})
def pooling_mixer(m: Parts, x: Tensor) -> Any:
    y = m.norm(x)
    return mlp(m, x + F.avg_pool1d(y.mT, 3, 1, 1, count_include_pad=False).mT - y)


@program(X, shards=False, whole=True)
def gated_by_the_mean(m: Parts, x: Tensor) -> Any:
    """Squeeze and excitation."""
    gate = m.o(F.relu(m.q(x.mean(1)))).sigmoid()
    return mlp(m, x * gate[:, None])


@program(X, shards=False, whole=True)
def normalised_over_tokens(m: Parts, x: Tensor) -> Any:
    y = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    return mlp(m, y * m.w) * x.softmax(1)


@program(ids(2, 13), labels(ignored=(3, 4)), moves={"halo": 2, "all_reduce": 1})
def language_model_without_attention(m: Parts, i: Tensor, t: Tensor) -> Any:
    x = m.table(i)
    y = F.conv1d(x.mT, m.mat[:, :3].unsqueeze(1), padding=2, groups=12)[..., :13].mT
    return F.cross_entropy(m.head(mlp(m, x + y)).flatten(0, 1), t.flatten())


@program(X, dynamic=True, moves={"all_to_all": 2, "all_gather": 1, "gather_output": 1})
def d_linear_attention_alone(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(f(m.norm(x))) for f in (m.q, m.k, m.v))
    return mlp(m, x + m.o(m.join(q.softmax(-1) @ (k.softmax(2).mT @ v)))) / x.shape[1]


@program(X, dynamic=True, moves={"all_to_all": 1, "gather_output": 1})
def d_depthwise_convolution(m: Parts, x: Tensor) -> Any:
    y = F.conv1d(x.mT, m.mat[:, :4].unsqueeze(1), m.w, padding=3, groups=12)[..., : x.shape[1]].mT
    return mlp(m, x + F.silu(y))


@program(X, shards=False)
def nothing_but_rows(m: Parts, x: Tensor) -> Any:
    return mlp(m, m.o(m.norm(x)))
