"""Ops that borrow the same dimension, and what lies between them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import Parts, X, program


@program(X, moves={"all_to_all": 2, "gather_output": 1})
def scans_with_a_gate_between(m: Parts, x: Tensor) -> Any:
    y = m.norm(x)
    return m.o((F.silu(y.cumsum(1)) * m.w + y).cumsum(1))


@program((4, 13, 12), parts=2, moves={"all_to_all": 2, "gather_output": 1})
def scans_of_a_batch_for_each_rank(m: Parts, x: Tensor) -> Any:
    """The batch passes all of it, and is not what is sharded."""
    y = x.cumsum(1)
    return (y.sigmoid() * x).cumsum(1)


@program(X, parts=4, moves={"all_to_all": 5, "gather_output": 1})
def delta_rule_of_three_heads(m: Parts, x: Tensor) -> Any:
    """Linear attention in chunks with decay, as gated delta rules have it."""
    y = m.norm(x)
    q, k, v = (m.split(f(y)) for f in (m.q, m.k, m.v))
    decay = F.logsigmoid(m.up(y)[..., :3]).mT.cumsum(-1)
    scores = (q @ k.mT) * (decay[..., None] - decay[..., None, :]).tril().exp().tril()
    return m.o(m.join(F.normalize(scores @ v, dim=-1)))


@program(X, parts=4, moves={"all_to_all": 4, "all_reduce": 1})
def states_step_by_step(m: Parts, x: Tensor) -> Any:
    """Gated linear attention by its recurrence (Yang et al. 2024, section 3): a step borrows what the next one does."""
    y = m.norm(x)
    q, k, v = (m.split(f(y)) for f in (m.q, m.k, m.v))
    forget, state, made = m.split(m.o(y)).sigmoid(), x.new_zeros(2, 3, 4, 4), []
    for t in range(13):
        state = state * forget[:, :, t, :, None] + k[:, :, t, :, None] * v[:, :, t, None]
        made.append((q[:, :, t, :, None] * state).sum(-2))
    return m.o(m.join(torch.stack(made, 2)))


@program((2, 12, 12), parts=3, moves={"all_to_all": 6, "gather_output": 1})
def convolved_then_split_in_streams(m: Parts, x: Tensor) -> Any:
    """Channels of q, k and v in one depthwise convolution, then by heads."""
    y = F.conv1d(m.mod(m.norm(x)).mT, m.mod.weight[:, None, :4], padding=3, groups=36)[..., :12].mT
    q, k, v = (m.split(each) for each in y.split(12, -1))
    return m.o(m.join((q.cumsum(2) * k).cumsum(2) / v.abs().add(1).cumsum(2)))


@program(X, moves={"all_to_all": 4, "gather_output": 2})
def scans_with_a_norm_between(m: Parts, x: Tensor) -> Any:
    """The norm needs all channels: the way home and back is the one that there is."""
    y = m.norm(m.norm2(x).cumsum(1))
    return (y, y.cumsum(1))


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def scans_steered_by_few_channels(m: Parts, x: Tensor) -> Any:
    """What is projected to three channels is all that comes home between."""
    y = m.norm(x).cumsum(1)
    steps = F.softplus(F.linear(y, m.mat[:3]))
    return m.o((y * F.linear(steps, m.mat[:, :3])).cumsum(1) + y.reciprocal().cumsum(1))


@program((1, 13, 5), moves={"all_to_all": 2, "gather_output": 1})
def scans_of_fewer_channels_than_pays(m: Parts, x: Tensor) -> Any:
    y = (x.cumsum(1) * x).cumsum(1)
    return F.linear(y, m.mat[:, :5])


@program(X, moves={"all_to_all": 3, "all_gather": 1, "all_reduce": 3, "select_rows": 1, "gather_output": 1})
def scans_with_a_statistic_between(m: Parts, x: Tensor) -> Any:
    y = m.norm(x).cumsum(1)
    scaled = y / y.pow(2).mean(-1, keepdim=True).add(1e-3).sqrt()
    m.count += scaled.detach().amax()
    return (scaled.cumsum(1), torch.where(y > 0, y, scaled).cumsum(1)[:, -1])
