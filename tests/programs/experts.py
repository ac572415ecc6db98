"""Mixtures of experts whose rows are sorted by expert: as a whole by rows, or only nearly so."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  # registers the op below
from torch import Tensor

from .table import Parts, X, program

EXPERTS, USES = 4, 2


def routed(m: Parts, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[T, C]`, and for the experts of each `[T k]`: their weights and their ids."""
    tokens = m.block(x).flatten(0, 1)
    weights, ids = m.head(tokens)[:, :EXPERTS].softmax(-1).topk(USES, -1)
    return tokens, weights.reshape(-1), ids.reshape(-1)


def ends_of(ids: Tensor) -> Tensor:
    return torch.histc(ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1).cumsum(0, dtype=torch.int32)


def grouped(m: Parts, rows: Tensor, ends: Tensor) -> Tensor:
    """`[T k, C]`, each row times the matrix of its expert."""
    matrices = torch.stack([m.mat * (1 + expert) + m.q.weight for expert in range(EXPERTS)])
    out: Tensor = torch.ops.transformers.grouped_mm_fallback(F.silu(rows), matrices, ends)
    return out


def undone(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return inverse


def mixed(tokens: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """What its experts made of each token, summed and added to it: `[T, C]` and `[T k, C]` to `[B, S, C]`."""
    return tokens.view(2, -1, 12) + rows.view(*x.shape[:2], USES, 12).sum(2)


MOVES = {"all_to_all": 4, "gather_output": 1}


@program(X, moves=MOVES)
def experts_sorted_and_back(m: Parts, x: Tensor) -> Any:
    tokens, weights, ids = routed(m, x)
    sorted_ids, order = ids.sort()
    rows = grouped(m, tokens[order // USES], ends_of(sorted_ids)) + m.table.weight[:EXPERTS][sorted_ids]
    rows = (rows.view(-1, 3, 4).flip(1).reshape(-1, 12) * weights[order].unsqueeze(-1))[undone(order)]
    return mixed(tokens, rows, x)


@program(X, moves=MOVES, dynamic=True)
def experts_of_any_length(m: Parts, x: Tensor) -> Any:
    tokens, weights, ids = routed(m, x)
    order = ids.argsort()
    rows = grouped(m, tokens[order // USES], ends_of(ids)) * weights[order].view(-1, 1).expand(-1, 12)
    return mixed(tokens, rows[order.argsort()], x)


@program(X, moves=MOVES)
def experts_written_back(m: Parts, x: Tensor) -> Any:
    tokens, weights, ids = routed(m, x)
    order = ids.argsort(stable=True)
    rows = grouped(m, tokens.repeat_interleave(USES, 0)[order], ends_of(ids)) * weights[order, None]
    out = torch.empty_like(rows)
    out[order] = rows
    return mixed(tokens, out, x)


@program(X, moves=MOVES)
def experts_added_to_tokens(m: Parts, x: Tensor) -> Any:
    tokens, weights, ids = routed(m, x)
    order = ids.argsort()
    rows = grouped(m, tokens[order // USES], ends_of(ids)) * weights[order, None]
    return tokens.index_add(0, order // USES, rows).view(2, -1, 12)


@program(X, whole=True)
def experts_counted_for_a_loss(m: Parts, x: Tensor) -> Any:
    """The counts are used outside, too: there they are those of all rows."""
    tokens, weights, ids = routed(m, x)
    order, counts = ids.argsort(), torch.histc(ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    rows = grouped(m, tokens[order // USES], counts.cumsum(0, dtype=torch.int32)) * weights[order, None]
    out = mixed(tokens, rows[undone(order)], x)
    return out, (counts * m.bias[:1]).sum() * weights.mean()


@program(X, whole=True)
def experts_whose_rows_are_read_twice(m: Parts, x: Tensor) -> Any:
    """Their size is that of all rows, so that they are computed whole, and once."""
    tokens, weights, ids = routed(m, x)
    order = ids.argsort(stable=True)
    rows = grouped(m, tokens[order // USES], ends_of(ids)) * weights[order, None]
    return (rows / rows.abs().amax())[undone(order)].view(*x.shape[:2], USES, 12).sum(2), rows.square().mean()


# What is not by rows: right, on gathered values


@program(X, whole=True)
def experts_with_places_for_some(m: Parts, x: Tensor) -> Any:
    """An expert takes no more than ten rows, the first ones of all ranks."""
    tokens, weights, ids = routed(m, x)
    sorted_ids, order = ids.sort(stable=True)
    ends = ends_of(ids)
    place = torch.arange(order.shape[0]) - F.pad(ends, (1, 0))[sorted_ids]
    rows = grouped(m, tokens[order // USES], ends) * (weights[order] * (place < 10))[:, None]
    return mixed(tokens, rows[undone(order)], x)


@program(X, whole=True)
def experts_that_look_at_neighbours(m: Parts, x: Tensor) -> Any:
    tokens, weights, ids = routed(m, x)
    order = ids.argsort(stable=True)
    rows = grouped(m, tokens[order // USES], ends_of(ids)) * weights[order, None]
    rows = rows + rows.roll(1, 0) + rows.cumsum(0) / 50
    return mixed(tokens, rows[undone(order)], x)


@program(X, whole=True)
def experts_that_look_at_all_tokens(m: Parts, x: Tensor) -> Any:
    tokens, weights, ids = routed(m, x)
    order = ids.argsort(stable=True)
    rows = tokens[order // USES]
    rows = grouped(m, (rows @ tokens.T).softmax(-1) @ tokens, ends_of(ids)) * weights[order, None]
    return mixed(tokens, rows[undone(order)], x)


@program(X, whole=True)
def experts_by_the_counts_of_others(m: Parts, x: Tensor) -> Any:
    """Rows are sorted by one choice and counted by another, so that what a row meets depends on all."""
    tokens, weights, ids = routed(m, x)
    order = ids.argsort(stable=True)
    others = m.head(tokens)[:, 4 : 4 + EXPERTS].topk(USES, -1).indices.reshape(-1)
    rows = grouped(m, tokens[order // USES], ends_of(others)) * weights[order, None]
    return mixed(tokens, rows[undone(order)], x)


@program(X, whole=True)
def experts_that_begin_below_zero(m: Parts, x: Tensor) -> Any:
    """Rows of expert -1 are sorted first and counted nowhere."""
    tokens, weights, ids = routed(m, x)
    order = (ids - 1).argsort(stable=True)
    rows = grouped(m, tokens[order // USES], ends_of(ids - 1)) * weights[order, None]
    return mixed(tokens, rows[undone(order)], x)


@program(X, whole=True)
def experts_from_the_last(m: Parts, x: Tensor) -> Any:
    """Sorted downwards, and counted upwards."""
    tokens, weights, ids = routed(m, x)
    order = ids.argsort(descending=True, stable=True)
    rows = grouped(m, tokens[order // USES], ends_of(ids)) * weights[order, None]
    return mixed(tokens, rows[undone(order)], x)


@program(X, whole=True)
def experts_sorted_by_a_copy_of_the_ids(m: Parts, x: Tensor) -> Any:
    """Sorted as int32, counted as they were chosen."""
    tokens, weights, ids = routed(m, x)
    order = ids.int().argsort(stable=True)
    rows = grouped(m, tokens[order // USES], ends_of(ids)) * weights[order, None]
    return mixed(tokens, rows[undone(order)], x)


@program(X, whole=True)
def experts_half_undone(m: Parts, x: Tensor) -> Any:
    """Rows go back by the order itself, which undoes nothing."""
    tokens, weights, ids = routed(m, x)
    order = ids.argsort(stable=True)
    rows = grouped(m, tokens[order // USES], ends_of(ids)) * weights[order, None]
    return mixed(tokens, rows[order], x)


def gated(m: Parts, x: Tensor) -> Any:
    """A row of the gate stands for all the tokens of its sample, of which a rank has some."""
    y = m.block(x)
    tokens, gate = y.flatten(0, 1), m.mod(y.mean(1))[:, :12]
    scores = m.head(tokens)[:, :EXPERTS].softmax(-1)
    weights, ids = scores.amax(-1), scores.argmax(-1)
    order = ids.argsort(stable=True)
    rows = grouped(m, tokens[order], ends_of(ids)) * weights[order, None] * gate[order // x.shape[1]]
    return y + rows[undone(order)].view(x.shape)


@program(X, whole=True)
def experts_with_a_gate_of_each_sample(m: Parts, x: Tensor) -> Any:
    return gated(m, x)


@program((2, 12, 12), parts=3, whole=True)
def experts_with_a_gate_of_even_samples(m: Parts, x: Tensor) -> Any:
    return gated(m, x)


@program(X, whole=True)
def experts_with_a_bias_of_each_choice(m: Parts, x: Tensor) -> Any:
    """Choices before tokens: one bias for all first choices, one for all second ones."""
    tokens = m.block(x).flatten(0, 1)
    weights, ids = m.head(tokens)[:, :EXPERTS].softmax(-1).topk(USES, -1)
    ids, weights = ids.T.reshape(-1), weights.T.reshape(-1)
    order = ids.argsort(stable=True)
    rows = grouped(m, tokens.repeat(USES, 1)[order], ends_of(ids)) + m.table.weight[:USES][order // tokens.shape[0]]
    return tokens + (rows * weights[order, None])[undone(order)].view(USES, -1, 12).sum(0)
