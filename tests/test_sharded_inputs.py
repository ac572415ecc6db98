"""Inputs of which each rank holds only its rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._local_tensor import LocalTensor

from sp_compile import (
    destroy_sequence_parallel,
    get_sequence_parallel_rank,
    get_sequence_parallel_world_size,
    init_sequence_parallel,
    rewritten_graphs,
    sharded_input,
    sharded_inputs,
    sp_backend,
)
from sp_compile.comparison import on_rank, relative_error
from sp_compile.errors import DataError
from sp_compile.simulation import simulate

from .gloo_pool import GlooPool
from .models import inputs_of, llama
from .test_passes import Block


class Tiny(nn.Module):
    """A language model with learned positions, and a loss on targets that are shifted already."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(31, 12), nn.Embedding(64, 12)
        self.block, self.head = Block(3), nn.Linear(12, 31)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        h = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        return F.cross_entropy(self.head(self.block(h)).flatten(0, 1), targets.flatten(), ignore_index=-100)


def compiled(model: nn.Module, inner: str = "eager", dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
    options = {"inner_backend": inner, **options}
    return torch.compile(model, backend=partial(sp_backend, options=options), dynamic=dynamic)


def sequence(length: int, count: int = 31) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids, targets = torch.randint(0, count, (2, 1, length), generator=generator)
    targets[:, 1] = -100
    return ids, targets


def rows_of(whole: Tensor, dim: int, rank: int, parts: int) -> Tensor:
    chunks = torch.chunk(whole, parts, dim)
    return chunks[rank].clone() if rank < len(chunks) else whole.narrow(dim, 0, 0).clone()


def simulated_rows(whole: Tensor, dim: int, parts: int) -> Tensor:
    rows = LocalTensor(
        {rank: rows_of(whole, dim, rank, parts).requires_grad_(whole.requires_grad) for rank in range(parts)}
    )
    return sharded_input(rows, dim, whole.shape[dim])


def mine(whole: Tensor, dim: int) -> Tensor:
    return rows_of(whole, dim, get_sequence_parallel_rank(), get_sequence_parallel_world_size())


def errors_of(alone: nn.Module, ours: nn.Module) -> list[float]:
    pairs = zip(alone.parameters(), ours.parameters(), strict=True)
    return [relative_error(one.grad, other.grad, 1e-2) for one, other in pairs]


def on_ranks(inner: str, dynamic: bool | None, lengths: tuple[int, ...]) -> tuple[list[float], list[str]]:
    """Errors of loss and gradients; what is gathered."""
    alone, errors = Tiny(), []
    ours = copy.deepcopy(alone)
    call = compiled(ours, inner, dynamic)
    for length in lengths:
        ids, targets = sequence(length)
        alone.zero_grad()
        ours.zero_grad()
        expected = alone(ids, targets)
        expected.backward()
        loss = call(**sharded_inputs({"ids": mine(ids, 1), "targets": mine(targets, 1)}, {"ids": 1, "targets": 1}))
        loss.backward()
        errors += [relative_error(expected.detach(), loss.detach()), *errors_of(alone, ours)]
    moved = [each.name for graph in rewritten_graphs() for each in graph.collectives]
    return errors, [name for name in moved if "all_gather" in name or "gather_output" in name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inner", "dynamic", "lengths"),
    [("aot_eager", None, (8, 7, 9, 12)), ("aot_eager", True, (7, 9)), ("inductor", None, (7, 8, 11))],
)
def test_each_rank_has_its_rows_only(
    gloo2: GlooPool, inner: str, dynamic: bool | None, lengths: tuple[int, ...]
) -> None:
    for errors, gathered in gloo2.run(on_ranks, inner, dynamic, lengths):
        assert max(errors) < 1e-4 and not gathered


@pytest.mark.slow
def test_the_last_rank_may_have_no_rows(gloo3: GlooPool) -> None:
    for errors, gathered in gloo3.run(on_ranks, "aot_eager", None, (4, 7)):
        assert max(errors) < 1e-4 and not gathered


def hugging_face(keywords: Mapping[str, int]) -> tuple[list[float], list[str]]:
    alone = llama(use_cache=False)
    ours = copy.deepcopy(alone)
    inputs = inputs_of("llama", 13)
    inputs["shift_labels"] = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    whole = {name: inputs[name] for name in keywords}
    expected = alone(**{**whole, "labels": inputs["labels"]}).loss
    expected.backward()
    batch = {name: mine(value, 1) for name, value in whole.items()}
    batch.setdefault("labels", batch[next(iter(keywords))])
    loss = compiled(ours, "aot_eager", outputs={"logits": "dtensor"})(
        **sharded_inputs(batch, {"labels": 1, **keywords})
    ).loss
    loss.backward()
    moved = [each.name for graph in rewritten_graphs() for each in graph.collectives]
    kept = [name for name in moved if "gather_" in name and "heads" not in name]
    return [relative_error(expected.detach(), loss.detach()), *errors_of(alone, ours)], kept


@pytest.mark.slow
def test_llama_from_sharded_ids_and_labels(gloo2: GlooPool) -> None:
    for errors, gathered in gloo2.run(hugging_face, {"input_ids": 1, "shift_labels": 1}):
        assert max(errors) < 1e-4 and not gathered
    for errors, _ in gloo2.run(hugging_face, {"input_ids": 1, "labels": 1}):
        assert max(errors) < 1e-4
