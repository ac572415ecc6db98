"""Ops whose rule shards them among tokens: right on every rank, and nothing but scalars and channels is reduced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .commands.mutants import tampering, with_bodies
from .equivalence import assert_equivalent, compared
from .programs import moved

aten = torch.ops.aten


class Mixed(nn.Module):
    """Attention over `[B, S, 12]` with three heads, and one other layer."""

    def __init__(self, layer: nn.Module, body: Callable[[Mixed, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.out, self.layer, self.body = nn.Linear(12, 36), nn.Linear(12, 12), layer, body
        self.double()

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def over_tokens(m: Mixed, x: Tensor) -> Tensor:
    return m.layer(m.attend(x).mT).mT


def between(m: Mixed, x: Tensor) -> Tensor:
    return m.attend(over_tokens(m, x))


def patches(m: Mixed, x: Tensor) -> Tensor:
    return m.attend(m.layer(x.mT).mT)


def added_up(m: Mixed, x: Tensor) -> Tensor:
    y = m.attend(x)
    return x.new_zeros(2, 5, 12).index_add(1, torch.arange(24) % 5, y)


PROGRAMS: list[tuple[nn.Module, Callable[[Mixed, Tensor], Tensor], dict[str, int]]] = [
    (nn.BatchNorm1d(12), over_tokens, {"all_to_all": 4, "all_reduce": 2, "gather_output": 1}),
    (nn.BatchNorm1d(12).eval(), over_tokens, {"all_to_all": 4, "gather_output": 1}),
    (nn.InstanceNorm1d(12, affine=True), over_tokens, {"all_to_all": 4, "all_reduce": 2, "gather_output": 1}),
    (nn.GroupNorm(4, 12), over_tokens, {"all_to_all": 4, "all_reduce": 2, "gather_output": 1}),
    (nn.Conv1d(12, 12, 1), over_tokens, {"all_to_all": 4, "gather_output": 1}),
    (nn.Conv1d(12, 12, 2, stride=2), patches, {"all_to_all": 4, "gather_output": 1}),
    (nn.Conv1d(12, 12, 2, stride=2), between, {"all_to_all": 8, "gather_output": 1}),
    (nn.ConvTranspose1d(12, 12, 2, stride=2), between, {"all_to_all": 8, "gather_output": 1}),
    (nn.MaxPool1d(2), between, {"all_to_all": 8, "gather_output": 1}),
    (nn.Identity(), added_up, {"all_to_all": 4, "all_reduce": 1}),
]


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize(("layer", "body", "moves"), PROGRAMS, ids=lambda value: getattr(value, "__name__", None))
def test_layer_stays_among_tokens(
    layer: nn.Module, body: Callable[[Mixed, Tensor], Tensor], moves: dict[str, int], parts: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 24, 12, dtype=torch.float64, requires_grad=True)
    graphs = assert_equivalent(Mixed(layer, body), [x], parts=parts)
    assert sum(map(moved, graphs), Counter[str]()) == moves


@pytest.mark.parametrize(
    ("layer", "op"),
    [
        (nn.BatchNorm1d(12), aten._native_batch_norm_legit_functional.default),
        (nn.GroupNorm(4, 12), aten.group_norm.default),
    ],
)
def test_statistics_of_each_rank_are_noticed(layer: nn.Module, op: torch._ops.OpOverload) -> None:
    x = torch.randn(2, 24, 12, dtype=torch.float64, requires_grad=True)
    with with_bodies(op, tampering(all_reduce=lambda local, value, kind="sum": value)):
        errors, graphs = compared(Mixed(layer, over_tokens), [x], parts=2)
    assert max(errors.values()) > 1e-2 and graphs
