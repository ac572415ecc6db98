"""Simulated ranks: a tensor that all of them share until one of them writes to it, and what else torch's lack."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._local_tensor import LocalTensor
from torch.nn.attention import flex_attention as flex

from sp_compile import verify
from sp_compile.errors import SimulationError
from sp_compile.tools.simulation import on_rank, simulate

from .equivalence import tokens
from .programs import Parts

RANKS = 3


def by_rank(*values: float) -> LocalTensor:
    """`[value, value, value]` on each rank."""
    return LocalTensor({rank: torch.tensor([value] * 3) for rank, value in enumerate(values)})


def numbers(value: Any) -> list[Any]:
    """The value on each rank, as lists."""
    return [on_rank(value, rank).tolist() for rank in range(RANKS)]


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "mul_": lambda h, f: h.mul_(f),
    "copy_": lambda h, f: h.copy_(h * f),
    "imul": lambda h, f: h.__imul__(f),
    "add_ of a row": lambda h, f: h.add_(f - 1),
    "out": lambda h, f: torch.mul(h.clone(), f, out=h),
    "setitem": lambda h, f: h.__setitem__(slice(None), h * f),
    "index_put_": lambda h, f: h.index_put_((torch.arange(3),), h * f),
    "index_add_": lambda h, f: h.index_add_(0, torch.arange(3), f - 1),
    "scatter_": lambda h, f: h.scatter_(0, torch.arange(3), f * 1),
    "masked_scatter_": lambda h, f: h.masked_scatter_(f > 0, f * 1),
    "masked_fill_": lambda h, f: [h.masked_fill_(f == value, value) for value in (2.0, 3.0, 5.0)],
    "addcmul_": lambda h, f: h.addcmul_(h.clone(), f - 1),
    "lerp_": lambda h, f: h.lerp_(f, 1.0),
    "a view": lambda h, f: h[:].mul_(f),
    "a view of a view": lambda h, f: h.view(1, 3)[0].unsqueeze(1).squeeze(1).mul_(f),
    "a transposed view": lambda h, f: h.view(3, 1).t()[0].mul_(f),
    "rows one by one": lambda h, f: [h[i].mul_(f[i]) for i in range(3)],
    "an alias without history": lambda h, f: h.detach().mul_(f),
    "data": lambda h, f: h.data.mul_(f),
    "foreach": lambda h, f: torch._foreach_mul_([h], [f]),
    "without gradients": lambda h, f: torch.no_grad()(h.mul_)(f),
    "several outputs": lambda h, f: torch.frexp(f * 1, out=(h, torch.zeros(3, dtype=torch.int32))) and h.mul_(
        f / h
    ),
    "through a batch norm": lambda h, f: F.batch_norm(
        f.expand(4, 3) * 1, h, torch.ones(3), training=True, momentum=1.0
    ),
    "twice": lambda h, f: h.mul_(f).mul_(2).mul_(0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_a_shared_tensor_that_ranks_write_to_is_each_ranks_own(name: str) -> None:
    h, factors = torch.ones(3), by_rank(2.0, 3.0, 5.0)
    with simulate(RANKS):
        WRITES[name](h, factors)
        assert numbers(h) == [[2.0] * 3, [3.0] * 3, [5.0] * 3]
        assert numbers(h + 1) == [[3.0] * 3, [4.0] * 3, [6.0] * 3]
        assert numbers(h[1:]) == [[2.0] * 2, [3.0] * 2, [5.0] * 2]
        h.zero_()
        assert numbers(h) == [[0.0] * 3] * 3, "what all ranks write alike, too"


def test_what_shares_memory_shares_it_on_each_rank() -> None:
    base = torch.arange(6.0)
    view, other = base[2:5], base.as_strided((3, 2), (1, 2))
    bits, alias = base.view(torch.int32), base.detach()
    numbered = LocalTensor({rank: torch.tensor([1j, 2]) * (rank + 1) for rank in range(RANKS)})
    odd = torch.zeros(2, dtype=torch.complex64)
    conjugate, imaginary = odd.conj(), odd.conj().imag
    with simulate(RANKS):
        view.copy_(by_rank(7.0, 8.0, 9.0))
        assert numbers(base) == [[0.0, 1.0, *[x] * 3, 5.0] for x in (7.0, 8.0, 9.0)] == numbers(alias)
        assert numbers(other)[2] == [[0.0, 9.0], [1.0, 9.0], [9.0, 9.0]]
        assert numbers(bits)[1] == base.new_tensor([0, 1, 8, 8, 8, 5]).view(torch.int32).tolist()
        base.zero_()
        assert numbers(view) == [[0.0] * 3] * 3
        odd.copy_(numbered)
        assert numbers(conjugate)[1] == [-2j, 4] and numbers(imaginary)[1] == [-2.0, 0.0]
        assert numbers(conjugate + 0)[2] == [-3j, 6]


def test_a_shared_tensor_takes_the_shape_that_an_op_gives_it() -> None:
    h, empty, rows = torch.empty(0), torch.empty(0), by_rank(2.0, 3.0, 5.0)
    uneven = LocalTensor({rank: torch.ones(rank) for rank in range(RANKS)})
    with simulate(RANKS):
        torch.mul(rows, 2, out=h)
        assert h.shape == (3,) and numbers(h) == [[4.0] * 3, [6.0] * 3, [10.0] * 3]
        h.resize_(2)
        h.unsqueeze_(0)
        assert h.shape == (1, 2) and numbers(h * 1) == [[[4.0] * 2], [[6.0] * 2], [[10.0] * 2]]
        h.set_(rows)
        rows.add_(1)
        assert numbers(h) == [[3.0] * 3, [4.0] * 3, [6.0] * 3]
        with pytest.raises(SimulationError, match="another shape on each"):
            torch.mul(uneven, 2, out=empty)


def test_gradients_go_through_what_ranks_write_to() -> None:
    w, frozen, rows = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True), by_rank(2.0, 3.0, 5.0)
    h = w * 1
    view = h[1:]
    with simulate(RANKS):
        h.mul_(rows)
        with torch.no_grad():
            frozen.mul_(rows)
        (view.square().sum() + (frozen * h).sum()).backward()
        assert numbers(w.grad) == [[x * x, *[2 * x * x + x * x] * 2] for x in (2.0, 3.0, 5.0)]
        assert numbers(frozen.grad) == [[2.0] * 3, [3.0] * 3, [5.0] * 3]
        assert h.is_leaf is False and frozen.is_leaf


def test_a_generator_of_the_program_gives_every_rank_the_same_and_goes_on_once() -> None:
    def drawn(h: Tensor) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        torch.manual_seed(5)
        values = [torch.rand(2, generator=generator), torch.rand(3), torch.randperm(4, generator=generator)]
        values += [h.normal_(generator=generator) + torch.rand(3), torch.rand(2, generator=torch.default_generator)]
        return [*values, h.uniform_() + torch.rand(3), torch.rand(2, generator=generator)]

    expected = drawn(torch.ones(3))
    with simulate(RANKS):
        for value, found in zip(expected, drawn(torch.ones(3)), strict=True):
            assert numbers(found) == [value.tolist()] * RANKS


def test_a_tensor_is_made_of_numbers_of_simulated_ranks() -> None:
    """As the positions that a model of images and text counts."""
    rows, apart = by_rank(2.0, 2.0, 2.0), by_rank(2.0, 3.0, 5.0)
    with simulate(RANKS):
        assert numbers(torch.tensor([rows[0], rows[1].long(), 1.5])) == [[2.0, 2.0, 1.5]] * RANKS
        for make in (torch.tensor, torch.as_tensor, torch.asarray, torch.zeros(1).new_tensor):
            assert numbers(make([[rows[0].long()], [rows[1]]])) == [[[2.0], [2.0]]] * RANKS
        assert (float(rows[0]), int(rows[0]), complex(rows[0]), bool(rows[0])) == (2.0, 2, 2 + 0j, True)
        assert [7, 8, 9][rows[0].long()] == 9
        with pytest.raises(AssertionError, match="equal for all ranks"):
            float(apart[0])


def test_views_of_simulated_ranks_enter_graphs_of_other_sizes() -> None:
    """Of two sizes read from a tensor, which Dynamo takes for symbols; their product is the length behind it."""

    def rows(x: Tensor) -> Tensor:
        _, h, w, c = x.shape
        return x.reshape(1, h * w, c) * 2

    y = LocalTensor({rank: torch.randn(1, 6, 4) for rank in range(RANKS)})
    sizes = torch.tensor([[3, 2], [2, 1], [1, 4]])
    for dynamic, transposed in itertools.product((None, True), (False, True)):
        with simulate(RANKS):
            call = torch.compile(rows, backend="eager", dynamic=dynamic)
            for h, w in sizes.tolist():
                view = y[:, : h * w].view(1, h, w, 4)
                view = view.transpose(1, 2) if transposed else view
                assert numbers(call(view)) == numbers(rows(view))


def test_views_of_simulated_ranks_that_are_written_to_are_not_captured_apart() -> None:
    """Two inputs of the second graph share the memory of each rank, which capture has to see."""

    def body(m: Parts, x: Tensor) -> Tensor:
        y = m.block(x).detach()
        z = y[:, 2:5]
        torch._dynamo.graph_break()
        y.mul_(2)
        return m.block(y + z.sum())

    verification = verify(Parts(body), tokens(1, 7, 12), sp_size=2)
    assert not verification.wrong and len(verification.graphs) == 1
    assert "shares its memory" in verification.unsharded[0]


def test_flex_attention_of_what_ranks_wrote_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses gradients on CPU for want of a kernel in Inductor; the eager one has them."""
    monkeypatch.setattr(flex, "_validate_device", lambda *args: None)
    w, k, rows = torch.randn(1, 1, 3, 4, requires_grad=True), torch.randn(1, 1, 3, 4), by_rank(2.0, 3.0, 5.0)
    with simulate(RANKS):
        q = w * 1
        q.mul_(rows[:, None])
        flex.flex_attention(q, k, k).square().sum().backward()
        found = [on_rank(w.grad, rank) for rank in range(RANKS)]
    for factor, gradient in zip((2.0, 3.0, 5.0), found, strict=True):
        alone = w.detach().clone().requires_grad_()
        flex.flex_attention(alone * factor, k, k).square().sum().backward()
        torch.testing.assert_close(gradient, alone.grad)
