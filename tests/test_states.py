"""What a program reads and leaves behind: autocast, branches, buffers and inputs that are written to, frozen weights.

Each on one device and on P simulated ranks; what a state is made of is sharded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sp_compile import RewrittenGraph, rewritten_graphs, sp_backend
from sp_compile.runtime.records import unsharded_graphs
from sp_compile.tools.simulation import simulate

from .commands.mutants import MUTANTS
from .equivalence import assert_equivalent, compared, differences, known_graphs, rewritten_since, step, tokens
from .programs import Parts

Body = Callable[..., Any]
aten = torch.ops.aten


def compiled(module: nn.Module, backend: Any = None, **options: Any) -> Callable[..., Any]:
    backend = backend or partial(sp_backend, options={"inner_backend": "eager"})
    call: Callable[..., Any] = torch.compile(module, backend=backend, **options)
    return call


def assert_sharded(graph: RewrittenGraph) -> None:
    assert graph.plan.sites and not graph.plan.fallbacks
    assert all(site.strategy == "ulysses" for site in graph.plan.sites)


# Autocast


def half_and_whole(m: Parts, x: Tensor) -> Any:
    y = m.block(x, is_causal=True)
    with torch.autocast("cpu", enabled=False):
        z = m.o(y.float()).logsumexp(1)
    return y, z, m.k(y), m.head(y).float().mean(1)


TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_autocast_around_the_model(dtype: torch.dtype, parts: int) -> None:
    x, model = tokens(2, 13, 12).float().detach().requires_grad_(), Parts(half_and_whole).float()
    with torch.autocast("cpu", dtype):
        (graph,) = assert_equivalent(model, (x,), parts=parts, tolerance=TOLERANCES[dtype])
    assert_sharded(graph)
    heavy = (aten.linear.default, aten.scaled_dot_product_attention.default)
    made = [node.meta["val"].dtype for node in graph.rewritten.graph.nodes if node.target in heavy]
    assert made == [dtype] * 7 + [torch.float32] + [dtype] * 2  # a block; without autocast; k and head


# Branches on numbers that are read from tensors


def either_way(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    if y.mean().item() > 0:
        return m.block(y) * m.w
    return m.attend(y.flip(1)).cumsum(1) + y


def test_both_branches_of_one_compiled_model() -> None:
    alone, known = Parts(either_way), known_graphs()
    module = copy.deepcopy(alone)
    with simulate(3):
        call = compiled(module)
        for shift in (5, -5, 4):
            x = (tokens(2, 13, 12) + shift).detach().requires_grad_()
            assert (alone.block(x).mean() > 0) == (shift > 0)
            errors = differences(step(alone, alone, [x], {}), step(call, module, [x], {}), 3)
            assert max(errors.values()) < 1e-9, (shift, errors)
    graphs = rewritten_since(known)
    assert len(graphs) >= 3 and all(len(graph.plan.sites) == 1 for graph in graphs)


# Buffers that are written with sharded rows


class Kept(nn.Module):
    """A cache with room for 20 rows, and a buffer of as many as there are."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.parts, self.body = Parts(Parts.block), body
        self.register_buffer("k", torch.zeros(2, 3, 20, 4))
        self.register_buffer("v", torch.zeros(2, 3, 20, 4))
        self.register_buffer("rows", torch.ones(2, 13, 12))
        self.double()

    def forward(self, *args: Tensor) -> Any:
        return self.body(self, self.parts, *args)


def attend_to_the_cache(c: Any, m: Parts, x: Tensor, at: Tensor, write: Callable[[Tensor, Tensor], Any]) -> Tensor:
    q, k, v = (m.split(to(m.norm(x))) for to in (m.q, m.k, m.v))
    write(c.k, k.detach())
    write(c.v, v.detach())
    y = F.scaled_dot_product_attention(q, c.k, c.v, attn_mask=torch.arange(20) <= at[:, None])
    return m.block(x + m.o(m.join(y)))


def cache_by_slice(c: Any, m: Parts, x: Tensor) -> Any:
    def write(cache: Tensor, rows: Tensor) -> None:
        cache[:, :, :13] = rows

    return attend_to_the_cache(c, m, x, torch.arange(13), write)


def cache_by_index(c: Any, m: Parts, x: Tensor) -> Any:
    at = torch.arange(13) + 4

    def write(cache: Tensor, rows: Tensor) -> None:
        cache[:, :, at] = rows

    return attend_to_the_cache(c, m, x, at, write)


def cache_by_position(c: Any, m: Parts, x: Tensor, at: Tensor) -> Any:
    return attend_to_the_cache(c, m, x, at, lambda cache, rows: cache.index_copy_(2, at, rows))


def copied_rows(c: Any, m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    c.rows.copy_(y.detach())
    return m.block(y) + c.rows


def averaged_rows(c: Any, m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    c.rows.mul_(0.5).add_(y.detach())
    c.rows[:, 1:].add_(y.detach()[:, :-1])
    return m.block(y) * c.rows


def last_rows(c: Any, m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    c.rows[:, -5:] = y.detach()[:, :5]
    c.k[:, :, :7] = m.split(y.detach())[:, :, 3:10]
    return y


@pytest.mark.parametrize(
    ("body", "parts"), [(cache_by_slice, 2), (cache_by_index, 3), (copied_rows, 4), (averaged_rows, 3), (last_rows, 4)]
)
def test_a_buffer_is_written_with_sharded_rows(body: Body, parts: int) -> None:
    (graph,) = assert_equivalent(Kept(body), (tokens(2, 13, 12),), parts=parts)
    assert_sharded(graph)


@pytest.mark.parametrize(("parts", "dynamic"), [(3, None), (2, True)])
def test_a_static_cache_through_prefill_and_decoding(parts: int, dynamic: bool | None) -> None:
    alone = Kept(cache_by_position)
    with simulate(parts):
        module = copy.deepcopy(alone)
        call = compiled(module, dynamic=dynamic)
        for first, last in ((0, 13), (13, 14), (14, 18))[: 3 if dynamic else 2]:
            inputs = tokens(2, last - first, 12), torch.arange(first, last)
            errors = differences(step(alone, alone, inputs, {}), step(call, module, inputs, {}), parts)
            assert max(errors.values()) < 1e-9, (first, errors)
            assert {"buffer k", "buffer v"} <= errors.keys()


# Inputs that are written with sharded rows


def copied_out(m: Parts, x: Tensor, out: Tensor) -> Any:
    y = m.block(x)
    out.copy_(y.detach())
    return m.block(y)


def copied_and_changed(m: Parts, x: Tensor, out: Tensor) -> Any:
    y = m.block(x)
    out.copy_(y.detach())
    out.mul_(2).add_(m.w.detach())
    out[:, 2:5] = 1.5
    return m.block(y) + out


def added_to(m: Parts, x: Tensor, out: Tensor) -> Any:
    out += m.block(x).detach()
    return m.block(out) + x


def one_column(m: Parts, x: Tensor, out: Tensor) -> Any:
    y = m.block(x)
    out[:, :, 3] = y.detach()[..., 0]
    return y * out


def read_and_then_written(m: Parts, x: Tensor, out: Tensor) -> Any:
    y = m.block(x + out)
    out.copy_(y.detach().flip(1))
    return y


WRITES = [(copied_out, 4), (copied_and_changed, 2), (added_to, 3), (one_column, 4), (read_and_then_written, 3)]


@pytest.mark.parametrize(("body", "parts"), WRITES)
def test_an_input_is_written_with_sharded_rows(body: Body, parts: int) -> None:
    out = torch.ones(2, 13, 12, dtype=torch.float64)
    dynamic = parts == 3 or None
    (graph,) = assert_equivalent(Parts(body), (tokens(2, 13, 12), out), parts=parts, dynamic=dynamic)
    assert_sharded(graph)
    assert out.eq(1).all()


# Weights that are frozen


def two_blocks(m: Parts, x: Tensor) -> Any:
    return m.block(m.block(x, is_causal=True)), m.head(x).mean(1)


FROZEN = {
    "what is attended to": ("k.weight", "k.bias", "v.weight", "v.bias"),
    "some": ("q.weight", "o.bias", "norm.weight", "up.weight", "head.weight"),
    "all but one": tuple(name for name, _ in Parts(two_blocks).named_parameters() if name != "q.bias"),
    "all": tuple(name for name, _ in Parts(two_blocks).named_parameters()),
}


@pytest.mark.parametrize(("frozen", "parts"), [*zip(FROZEN, (2, 3, 4, 3), strict=True)])
def test_weights_that_were_frozen_before(frozen: str, parts: int) -> None:
    model = Parts(two_blocks)
    for name in FROZEN[frozen]:
        model.get_parameter(name).requires_grad_(False)
    for x in (tokens(2, 13, 12), tokens(2, 13, 12).detach()):
        (graph,) = assert_equivalent(model, (x,), parts=parts)
        assert len(graph.plan.sites) == 2 and not graph.plan.fallbacks


# What is returned


def the_same_again(m: Parts, x: Tensor, at: Tensor) -> Any:
    y = m.block(x)
    return y, (y, y * 2), x, m.w, at, m.count, y.view(-1)


def written_and_returned(m: Parts, x: Tensor, at: Tensor) -> Any:
    y = x.mul_(2)
    return m.block(x), x, y, at


@pytest.mark.parametrize("body", [the_same_again, written_and_returned])
def test_the_same_tensor_is_the_same_object(body: Body) -> None:
    model, x, at = Parts(body).requires_grad_(False), tokens(2, 13, 12).detach(), torch.arange(3)
    given = [x, at, model.w, model.count]

    def same(outputs: Any) -> list[list[bool]]:
        outputs, _ = torch.utils._pytree.tree_flatten(outputs)
        return [[one is other for other in (*outputs, *given)] for one in outputs]

    expected = same(model(x, at))
    assert same(compiled(model, "eager")(x, at)) == expected
    with simulate(2):
        assert same(compiled(model)(x, at)) == expected
    assert len(rewritten_graphs()[-1].plan.sites) == 1


# No samples


def summed_loss(m: Parts, x: Tensor, target: Tensor) -> Any:
    q, k, v = (m.split(to(m.norm(x))) for to in (m.q, m.k, m.v))
    y = x + m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    logits = m.head(y)
    return F.cross_entropy(logits.mT, target, reduction="sum") + y.square().sum(), y.sum(1)


def test_an_empty_batch_among_others() -> None:
    """A batch of 0 gets a graph of its own, with nothing to shard; of the others, one serves all."""
    alone, known = Parts(summed_loss), known_graphs()
    module = copy.deepcopy(alone)
    with simulate(3):
        call = compiled(module, dynamic=True)
        for batch in (3, 0, 2, 0):
            inputs = tokens(batch, 13, 12), torch.randint(0, 17, (batch, 13))
            errors = differences(step(alone, alone, inputs, {}), step(call, module, inputs, {}), 3)
            assert max(errors.values()) < 1e-9 and "grad head.weight" in errors, (batch, errors)
    assert len(rewritten_since(known)) == 1 and unsharded_graphs()[-1].reason == "nothing to shard"


# Planted wrongs


def autocast_inside(m: Parts, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return half_and_whole(m, x)


@pytest.mark.parametrize(
    ("mutant", "body"),
    [
        ("padded rows not zeroed in the backward of an all-to-all", autocast_inside),
        ("a rank's block off by one granule", last_rows),
        ("a rank's block off by one granule", copied_out),
        ("no replicate backward", two_blocks),
    ],
)
def test_a_planted_wrong_is_noticed(mutant: str, body: Body) -> None:
    model: nn.Module = Kept(body) if body is last_rows else Parts(body)
    x = tokens(2, 13, 12)
    inputs = (x, torch.ones(2, 13, 12, dtype=torch.float64)) if body is copied_out else (x,)
    if body is autocast_inside:
        model, inputs = model.float(), (x.float().detach().requires_grad_(),)
    with MUTANTS[mutant]():
        errors, _ = compared(model, inputs, parts=3)
    state = {last_rows: "buffer rows", copied_out: "input 1 afterwards"}.get(body)
    assert errors.get(state or "", 1.0) > 2e-2 and max(errors.values()) > 2e-2
