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
    get_sequence_parallel_rank,
    get_sequence_parallel_world_size,
    rewritten_graphs,
    sharded_input,
    sharded_inputs,
    sp_backend,
)
from sp_compile.errors import DataError
from sp_compile.tools.comparison import relative_error
from sp_compile.tools.simulation import on_rank, simulate

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


def mine(whole: Tensor, dim: int) -> Tensor:
    return rows_of(whole, dim, get_sequence_parallel_rank(), get_sequence_parallel_world_size())


def names_of_graphs() -> set[str]:
    return {graph.name for graph in rewritten_graphs()}


def errors_of(alone: nn.Module, ours: nn.Module) -> list[float]:
    pairs = zip(alone.parameters(), ours.parameters(), strict=True)
    return [relative_error(one.grad, other.grad, 1e-2) for one, other in pairs]


def on_ranks(inner: str, dynamic: bool | None, lengths: tuple[int, ...]) -> tuple[list[float], list[str]]:
    """Errors of loss and gradients; what is gathered."""
    alone, errors, earlier = Tiny(), [], names_of_graphs()
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
    moved = [each.name for graph in rewritten_graphs() if graph.name not in earlier for each in graph.collectives]
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
    alone, earlier = llama(use_cache=False), names_of_graphs()
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
    moved = [each.name for graph in rewritten_graphs() if graph.name not in earlier for each in graph.collectives]
    kept = [name for name in moved if "gather_" in name and "heads" not in name]
    return [relative_error(expected.detach(), loss.detach()), *errors_of(alone, ours)], kept


@pytest.mark.slow
def test_llama_from_sharded_ids_and_labels(gloo2: GlooPool) -> None:
    for errors, gathered in gloo2.run(hugging_face, {"input_ids": 1, "shift_labels": 1}):
        assert max(errors) < 1e-4 and not gathered
    for errors, _ in gloo2.run(hugging_face, {"input_ids": 1, "labels": 1}):
        assert max(errors) < 1e-4


class Stream(nn.Module):
    """Floating rows with a gradient, beside ops that want the whole sequence or another order of rows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.block = kind, Block(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "no attention":
            return x.square().sum(1)
        if self.kind == "cat":
            x = torch.cat([x[:, :1].cos(), x, x.sin()], 1)
        elif self.kind == "cumsum":
            x = x.flip(1).cumsum(1)
        out: Tensor = self.block(x)
        return out


def stream_errors(kind: str, parts: int, dim: int = 1, length: int = 7, **options: Any) -> float:
    model = Stream(kind).double()
    x = torch.randn(3, length, 12, dtype=torch.double, requires_grad=True)
    expected = model(x)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *model.parameters()], allow_unused=True)
    with simulate(parts):
        rows = LocalTensor({rank: rows_of(x.detach(), dim, rank, parts) for rank in range(parts)}).requires_grad_()
        out = compiled(model, **options)(sharded_input(rows, dim, x.shape[dim]))
        got = torch.autograd.grad(out.square().sum(), [rows, *model.parameters()], allow_unused=True)
        errors = []
        for rank in range(parts):
            errors.append(relative_error(expected.detach(), on_rank(out, rank).detach()))
            errors.append(relative_error(rows_of(wanted[0], dim, rank, parts), on_rank(got[0], rank)))
            pairs = zip(wanted[1:], got[1:], strict=True)
            errors += [relative_error(a, on_rank(b, rank) if b is not None else None, 1e-1) for a, b in pairs]
    return max(errors)


@pytest.mark.parametrize("kind", ["block", "cat", "cumsum", "no attention"])
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_gradients_arrive_at_the_rows(kind: str, parts: int) -> None:
    assert stream_errors(kind, parts) < 1e-12


@pytest.mark.parametrize("kind", ["block", "cumsum"])
@pytest.mark.parametrize("skip", [["find_attention"], ["find_attention", "find_mixers", "pack_exchanges"]])
def test_rows_are_gathered_right_where_passes_are_left_out(kind: str, skip: list[str]) -> None:
    assert stream_errors(kind, 3, skip=skip) < 1e-12


@pytest.mark.parametrize("dim", [0, 2])
def test_rows_of_another_dimension(dim: int) -> None:
    assert stream_errors("block", 2, dim) < 1e-12


def test_plain_local_rows_would_be_wrong() -> None:
    """What this is for: positions would begin at 0 on each rank."""
    model = Tiny().double()
    ids, targets = sequence(8)
    with simulate(2):
        rows = [LocalTensor({rank: rows_of(whole, 1, rank, 2) for rank in range(2)}) for whole in (ids, targets)]
        wrong = compiled(model)(*rows)
        right = compiled(model)(*(sharded_input(each, 1, 8) for each in rows))
        expected = model(ids, targets).detach()
        for rank in range(2):
            assert relative_error(expected, on_rank(right, rank).detach()) < 1e-12
        assert relative_error(expected, on_rank(wrong, 1).detach()) > 1e-3


def refused(function: Callable[[Tensor], Any], **options: Any) -> str:
    with simulate(2):
        x = sharded_input(LocalTensor({rank: torch.ones(1, 4, 12) for rank in range(2)}), 1, 8)
        with pytest.raises(Exception) as caught:
            compiled(function, **options)(x) if options else function(x)  # type: ignore[arg-type]
    return str(caught.value)


def test_code_that_is_not_compiled_is_refused() -> None:
    text = refused(lambda x: x + 1)
    assert "aten.add.Tensor would read a sharded input of shape [1, 8, 12], of which each rank holds its rows" in text


def test_an_input_that_the_model_writes_to_is_refused() -> None:
    def write(x: Tensor) -> Tensor:
        x.add_(1)
        return x.sum(1)

    assert "writes to a sharded input of shape [1, 8, 12]: write to a clone" in refused(write, guards="off")


def test_another_backend_is_refused() -> None:
    rows = sharded_rows()
    with pytest.raises(Exception, match="would read a sharded input"):
        torch.compile(lambda x: x * 2, backend="aot_eager")(rows)


def sharded_rows() -> Tensor:
    with simulate(2):
        whole = sharded_input(LocalTensor({rank: torch.ones(1, 4, 12) for rank in range(2)}), 1, 8)
    return type(whole)(torch.ones(1, 4, 12), (1, 8, 12), (96, 12, 1), 1, "gone")


def test_rows_for_another_group_are_refused() -> None:
    with pytest.raises(Exception, match="was made for another SP group than the model is compiled for"):
        compiled(Block(3))(sharded_rows())


def test_without_a_group_the_rows_are_the_whole() -> None:
    x = torch.ones(1, 4)
    assert sharded_input(x, 1) is x
    with pytest.raises(DataError, match="has no dimension 2"):
        sharded_input(x, 2)
    with pytest.raises(DataError, match="the batch has no tensor 'id'; it has 'ids'"):
        sharded_inputs({"ids": x}, {"id": 1})


def uneven() -> str:
    rank = get_sequence_parallel_rank()
    try:
        sharded_input(torch.ones(1, 3 + rank), 1)
    except DataError as error:
        return str(error)
    return ""


def unlike() -> str:
    try:
        sharded_input(torch.ones(1 + get_sequence_parallel_rank(), 3), 1)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_rows_that_are_no_chunks_are_refused_on_every_rank(gloo2: GlooPool) -> None:
    text = "rank 0 holds 3 rows of dimension 1; of 7 on 2 ranks it holds 4, as torch.chunk(whole, 2, 1)[0] does"
    assert gloo2.run(uneven) == [text] * 2
    assert "rank 1 of dimension 1 of torch.float32 beside [2]" in gloo2.run(unlike)[0]
