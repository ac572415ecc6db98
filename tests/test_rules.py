"""Every rule by brute force: cut the operands, run the op on each rank, and compare with the whole op.

Ranks are simulated in the plainest way: a value is a list of P tensors, and a collective an autograd Function over that
list. What is compared are values and gradients, in float64, under the gradient convention of DESIGN.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from sp_compile.rule import Joined, OpCall, OpSharding, OpShardingRule
from sp_compile.rules import rule_for
from sp_compile.rules.registry import _RULES, has_rule
from sp_compile.sharding import REPLICATED, Layout, Placement, Segment, Sharded, local_shape
from tests.simulation import simulate

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


# What a placement means, as chunk and cat


def rows_of(layout: Layout, parts: int) -> list[tuple[Tensor, Tensor]]:
    """For each rank: the global row of every local row, and whether it is real."""
    ranks: list[list[Tensor]] = [[] for _ in range(parts)]
    real: list[list[Tensor]] = [[] for _ in range(parts)]
    for outer in torch.arange(int(layout.size)).chunk(int(layout.outer)):
        for segment, rows in zip(layout.segments, outer.split([int(s.size) for s in layout.segments]), strict=True):
            granules = list(rows.split(int(segment.granule)))
            count = -(-len(granules) // parts) * parts
            flags = [torch.ones(len(g), dtype=torch.bool) for g in granules]
            flags += [torch.zeros_like(flags[-1])] * (count - len(granules))
            granules += [granules[-1]] * (count - len(granules))
            for rank in range(parts):
                mine = slice(rank * count // parts, (rank + 1) * count // parts)
                ranks[rank] += granules[mine]
                real[rank] += flags[mine]
    return [(torch.cat(r), torch.cat(f)) for r, f in zip(ranks, real, strict=True)]


def cut(x: Tensor, placement: Placement | None, parts: int) -> list[Tensor]:
    """The value that each rank holds."""
    if not isinstance(placement, Sharded):
        return [x] * parts
    return [x.index_select(placement.dim, rows) for rows, _ in rows_of(placement.layout, parts)]


def fill(x: Tensor, placement: Sharded, real: Tensor, value: float) -> Tensor:
    """`x` with `value` in the rows that are not real."""
    shape = [-1 if dim == placement.dim else 1 for dim in range(x.dim())]
    return torch.where(real.view(shape), x, torch.tensor(value).to(x.dtype))


def glue(blocks: Sequence[Tensor], placement: Sharded, parts: int) -> Tensor:
    """The inverse of `cut`."""
    shape = list(blocks[0].shape)
    shape[placement.dim] = int(placement.layout.size)
    whole = blocks[0].new_zeros(shape)
    for block, (rows, real) in zip(blocks, rows_of(placement.layout, parts), strict=True):
        whole.index_copy_(placement.dim, rows[real], block.index_select(placement.dim, real.nonzero().flatten()))
    return whole


# An op on P ranks


class Ranks(list[Any]):
    """A value per rank."""


class AllReduce(torch.autograd.Function):
    """`y_r = sum_s x_s` (or max, min); backward: `g_r`."""

    @staticmethod
    def forward(ctx: Any, kind: str, *blocks: Tensor) -> tuple[Tensor, ...]:
        stacked = torch.stack(blocks)
        total = {"sum": lambda: stacked.sum(0), "max": lambda: stacked.amax(0), "min": lambda: stacked.amin(0)}[kind]()
        return tuple(total.to(blocks[0].dtype).clone() for _ in blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None, *grads)


@dataclass
class EagerLocalOp:
    """`sp_compile.rule.LocalOp`, run at once on `Ranks`."""

    call: OpCall
    blocks: list[Ranks]
    operands: tuple[Placement, ...]
    results: tuple[Placement, ...]
    parts: int
    rng: str = "exact"
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Ranks))
        if not any(isinstance(leaf, Ranks) for leaf in leaves):
            return target(*args, **kwargs)
        made = Ranks()
        for rank in range(self.parts):
            mine = [leaf[rank] if isinstance(leaf, Ranks) else leaf for leaf in leaves]
            own_args, own_kwargs = pytree.tree_unflatten(mine, spec)
            made.append(target(*own_args, **own_kwargs))
        return made

    def operand(self, index: int) -> Any:
        return self.blocks[index]

    def size(self, size: Any) -> int:
        return int(size)

    def mask_padding(self, value: Ranks, placement: Placement, fill_value: float) -> Ranks:
        assert isinstance(placement, Sharded)
        rows = rows_of(placement.layout, self.parts)
        return Ranks(fill(x, placement, real, fill_value) for x, (_, real) in zip(value, rows, strict=True))

    def all_reduce(self, value: Ranks, kind: str = "sum") -> Ranks:
        return Ranks(AllReduce.apply(kind, *value))  # type: ignore[no-untyped-call]

    def shard(self, value: Tensor, placement: Sharded) -> Ranks:
        return Ranks(cut(value, placement, self.parts))

    def positions(self, placement: Sharded) -> Ranks:
        return Ranks(rows for rows, _ in rows_of(placement.layout, self.parts))

    def select_rows(self, value: Ranks, placement: Sharded, index: Any) -> Ranks:
        found = []
        for block, (rows, real) in zip(value, rows_of(placement.layout, self.parts), strict=True):
            wanted = index[0] if isinstance(index, Ranks) else index
            hits = (rows[None] == wanted[:, None]) & real[None]
            local = block.index_select(placement.dim, hits.int().argmax(1))
            found.append(fill(local, placement, hits.any(1), 0))
        return self.all_reduce(Ranks(found))

    def rank(self) -> Ranks:
        return Ranks(torch.tensor([rank]) for rank in range(self.parts))


@dataclass(frozen=True)
class Case:
    """A sample call."""

    target: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    frozen: frozenset[int] = frozenset()
    """Operands without a derivative."""

    def run(self, tensors: Sequence[Tensor], kwargs: dict[str, Any] | None = None) -> list[Any]:
        left = list(tensors)
        args, own = pytree.tree_map_only(Tensor, lambda _: left.pop(0), (self.args, self.kwargs))
        torch.manual_seed(0)
        out = self.target(*args, **{**own, **(kwargs or {})})
        return list(out) if isinstance(out, (tuple, list)) else [out]

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def call(self) -> OpCall:
        return OpCall.of(self.target, self.args, self.kwargs, self.target(*self.args, **self.kwargs))

    @property
    def rule(self) -> OpShardingRule | None:
        return rule_for(self.call)

    def __str__(self) -> str:
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return f"{self.target}({', '.join(str(list(x.shape)) if isinstance(x, Tensor) else str(x) for x in leaves)})"


def leaf(x: Tensor, frozen: bool) -> Tensor:
    return x.detach().clone().requires_grad_((x.dtype.is_floating_point or x.dtype.is_complex) and not frozen)


def grads(outputs: Sequence[Any], cotangents: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of each input, None where it has none."""
    pairs = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if y.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    ys, gs = zip(*pairs, strict=True)
    found = dict(zip(map(id, wanted), torch.autograd.grad(ys, wanted, gs, allow_unused=True), strict=True))
    return [found.get(id(x)) for x in inputs]


def run_local(case: Case, rule: OpShardingRule, sharding: OpSharding, parts: int, blocks: list[Ranks]) -> list[Ranks]:
    call = case.call
    body = rule.bodies.get(sharding.factor)
    if body is not None:
        placements = tuple[Placement, ...](p or REPLICATED for p in sharding.operands)
        torch.manual_seed(0)
        made: Any = body(EagerLocalOp(call, blocks, placements, sharding.results, parts))  # type: ignore[arg-type]
        return [Ranks(r) for r in made] if isinstance(made, tuple) else [made]
    local = {}
    if rule.shape_argument:
        assert call.results[0] is not None
        local[rule.shape_argument] = list(map(int, local_shape(call.results[0].shape, sharding.results[0], parts)))
    outputs = []
    for rank in range(parts):
        mine = [block[rank] for block in blocks]
        if local:
            names = [argument.name for argument in case.target._schema.arguments]
            at = names.index(rule.shape_argument or "")
            shaped = replace(case, args=(*case.args[:at], local[names[at]], *case.args[at + 1 :]))
            outputs.append(shaped.run(mine))
        else:
            outputs.append(case.run(mine))
    return [Ranks(values) for values in zip(*outputs, strict=True)]


def compare(case: Case, rule: OpShardingRule, sharding: OpSharding, parts: int) -> None:
    """Assert that the op on shards gives the values and gradients of the whole op."""
    whole = [leaf(x, index in case.frozen) for index, x in enumerate(case.tensors)]
    expected = case.run(whole)
    blocks = [
        Ranks(leaf(block, not x.requires_grad) for block in cut(x, p, parts))
        for x, p in zip(whole, sharding.operands, strict=True)
    ]
    made = run_local(case, rule, sharding, parts, blocks)
    cotangents = [torch.randn_like(y) if y.dtype.is_floating_point or y.dtype.is_complex else y for y in expected]
    error = max(torch.finfo(x.dtype).eps for x in (*whole, *expected, f()) if x.dtype.is_floating_point)
    close: dict[str, Any] = {"rtol": 16 * error, "atol": 64 * error}
    local_cotangents = []
    for y, values, placement, g in zip(expected, made, sharding.results, cotangents, strict=True):
        if isinstance(placement, Sharded):
            shape = local_shape(tuple(y.shape), placement, parts)
            assert all(tuple(value.shape) == shape for value in values), f"{values[0].shape} is not {shape}"
            torch.testing.assert_close(glue(values, placement, parts), y.detach(), equal_nan=True, **close)
            rows = rows_of(placement.layout, parts)
            local_cotangents.append(
                [fill(x, placement, real, 0) for x, (_, real) in zip(cut(g, placement, parts), rows, strict=True)]
            )
        else:
            for value in values:
                torch.testing.assert_close(value.detach(), y.detach(), equal_nan=True, **close)
            local_cotangents.append([g] * parts)
    wanted = grads(expected, cotangents, whole)
    flat = grads(
        [value for values in made for value in values],
        [g for each in local_cotangents for g in each],
        [x for block in blocks for x in block],
    )
    passes = any(isinstance(placement, Sharded) for placement in sharding.results)
    for index, (x, full, held) in enumerate(zip(whole, wanted, sharding.operands, strict=True)):
        own = [torch.zeros_like(b) if g is None else g for g, b in zip(flat[index * parts :], blocks[index])]  # noqa: B905
        if index in rule.metadata or not x.requires_grad:
            continue
        full = torch.zeros_like(x) if full is None else full
        if isinstance(held, Sharded):
            torch.testing.assert_close(glue(own, held, parts), full, equal_nan=True, **close)
            for g, (_, real) in zip(own, rows_of(held.layout, parts), strict=True):
                assert not g.index_select(held.dim, (~real).nonzero().flatten()).any(), "a padded row has gradient"
        elif index in rule.additive and not passes:
            for g in own:
                torch.testing.assert_close(g, full, **close)
        else:
            torch.testing.assert_close(torch.stack(own).sum(0), full, **close)


def layouts(size: int) -> Iterator[Layout]:
    """Ways for `size` rows to lie on the ranks."""
    yield Layout((Segment(size),))
    if size > 1:
        yield Layout((Segment(1), Segment(size - 1)))
        yield Layout((Segment(size, size),))
        yield Layout((Segment(1),), outer=size)
    if size % 2 == 0:
        yield Layout((Segment(size, 2),))
        yield Layout((Segment(size // 2),), outer=2)


def shardings(rule: OpShardingRule) -> Iterator[OpSharding]:
    """Every factor in every layout; streams together, cut plainly."""
    streams = {s for dims in (*rule.operands, *rule.results) for d in dims if isinstance(d, Joined) for s in d.streams}
    for factor, size in rule.sizes.items():
        found = [rule.shard_factor(factor)]
        if factor not in streams:
            found = [rule.run_on({factor: layout}) for layout in layouts(int(size))]
        yield from (sharding for sharding in found if sharding is not None)


# Sample calls: pairwise distinct primes where sizes are free, so that no dimension can be taken for another


def f(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.1


def ids(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


def bools(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.7


def labels(high: int, *shape: int) -> Tensor:
    return ids(high, *shape).masked_fill(torch.rand(shape) < 0.2, -100)


def case(target: OpOverload, *args: Any, **kwargs: Any) -> Case:
    return Case(target, args, kwargs)


def constant(sample: Case, *operands: int) -> Case:
    return replace(sample, frozen=frozenset(operands))


def _cases() -> Iterator[Case]:
    torch.manual_seed(0)
    # pointwise
    yield case(aten.add.Tensor, f(2, 5, 7), f(5, 1), alpha=2)
    yield case(aten.add.Tensor, f(5, 1, 3), f(7, 1))
    yield case(aten.mul.Tensor, f(5, 7), f())
    yield case(aten.gelu.default, f(5, 7), approximate="tanh")
    yield case(aten.where.self, bools(5, 1), f(5, 7), f(7))
    yield case(aten.masked_fill.Scalar, f(3, 5, 7), bools(5, 7), -1.0)
    yield case(aten.masked_fill.Tensor, f(3, 5, 7), bools(5, 7), f())
    yield case(aten._to_copy.default, f(5, 7), dtype=torch.float32)
    yield case(aten.to.dtype, f(5, 7), torch.float32)
    yield case(aten.floor_divide.default, ids(90, 5, 7), ids(9, 7) + 1)
    for target in (aten.detach.default, aten.hardswish.default, aten.clone.default, aten.contiguous.default):
        yield case(target, f(5, 7))
    yield case(aten.alias.default, f(5, 7))
    yield case(aten.threshold.default, f(5, 7), 0.1, 2.0)
    yield case(aten._prelu_kernel.default, f(5, 7), f(1, 7))
    yield case(aten.complex.default, f(5, 7), f(7))
    yield case(aten.polar.default, positive(5, 7), f(5, 7))
    yield case(aten.full_like.default, f(5, 7), 3.0)
    for target in (aten.zeros_like.default, aten.ones_like.default):
        yield case(target, f(5, 7))
    yield case(aten.new_zeros.default, f(5, 7), [3, 5])
    yield case(aten.new_ones.default, f(5, 7), [5, 7])
    yield case(aten.new_full.default, f(5, 7), [5, 7], 2.0)
    yield case(aten.isin.Tensor_Tensor, ids(9, 5, 7), ids(9, 3))
    yield case(aten.dropout.default, f(5, 7), 0.4, True)
    yield case(aten.dropout.default, f(5, 7), 0.4, False)
    yield case(aten.dropout.default, f(5, 7), 1.0, True)
    # views
    for source, target_shape in [
        ((2, 5, 21), [2, 5, 3, 7]),
        ((2, 5, 3, 7), [2, 5, 21]),
        ((2, 5, 7), [10, 7]),
        ((10, 7), [2, 5, -1]),
        ((1, 5, 7), [5, 1, 7]),
        ((6, 4), [2, 12]),
        ((6, 4, 5), [4, 6, 5]),
        ((4, 6, 5), [6, 20]),
        ((7,), [1, 7, 1]),
    ]:
        for target in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
            yield case(target, f(*source), target_shape)
    yield case(aten.unsqueeze.default, f(5, 7), -1)
    yield case(aten.unsqueeze.default, f(5, 7), 1)
    yield case(aten.squeeze.default, f(1, 3, 1, 2))
    yield case(aten.squeeze.dim, f(3, 1, 2), 1)
    yield case(aten.squeeze.dim, f(3, 1, 2), -1)
    yield case(aten.squeeze.dims, f(3, 1, 2), [0, 1])
    yield case(aten.squeeze.dims, f(3, 1, 2), [])
    yield case(aten.permute.default, f(2, 5, 7), [2, 0, -2])
    yield case(aten.transpose.int, f(2, 5, 7), -1, 0)
    yield case(aten.t.default, f(5, 7))
    yield case(aten.t.default, f(7))
    yield case(aten.view_as_complex.default, f(5, 7, 2))
    yield case(aten.view_as_real.default, torch.complex(f(5, 7), f(5, 7)))
    yield case(aten.tril.default, f(3, 5, 7))
    yield case(aten.triu.default, f(3, 5, 7), 1)
    yield case(aten.expand.default, f(5, 1, 7), [3, 5, 2, 7])
    yield case(aten.expand.default, f(5, 1, 7), [-1, 3, -1])
    yield case(aten.repeat.default, f(5, 1, 7), [3, 2, 3, 1])
    yield case(aten.repeat_interleave.self_int, f(5, 3, 7), 2, 1)
    yield case(aten.repeat_interleave.self_int, f(5, 3, 7), 2, -2, output_size=6)
    yield case(aten.repeat_interleave.self_int, f(5), 3)
    yield case(aten.cat.default, [f(2, 5, 7), f(2, 3, 7), f(2, 1, 7)], 1)
    yield case(aten.cat.default, [f(5, 7), f(5, 7)], -1)
    yield case(aten.cat.default, [f(5, 7)])
    yield case(aten.stack.default, [f(5, 7), f(5, 7), f(5, 7)], -1)
    yield case(aten.split.Tensor, f(2, 7, 3), 5, 1)
    yield case(aten.split.Tensor, f(2, 7, 3), 7, 1)
    yield case(aten.unsafe_split.Tensor, f(2, 6, 3), 2, -2)
    yield case(aten.split_with_sizes.default, f(2, 9, 3), [1, 5, 3], 1)
    yield case(aten.unbind.int, f(3, 5, 7), 0)
    yield case(aten.constant_pad_nd.default, f(2, 5, 7), [0, 0, 2, 3], 1.5)
    yield case(aten.constant_pad_nd.default, f(2, 5, 7), [1, 0])
    yield case(aten.constant_pad_nd.default, f(2, 5, 7), [0, 0, -1, 2])
    for target in (aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default):
        yield case(target, f(5, 7), -2)
    yield case(aten.sort.default, f(5, 7), 0)
    yield case(aten.sort.stable, f(5, 7), stable=True, dim=0)
    yield case(aten.topk.default, f(5, 7), 3, 1)
    yield case(aten.glu.default, f(5, 14), -1)
    yield case(aten.flip.default, f(3, 5, 7), [0, -1])
    yield case(aten.roll.default, f(3, 5, 7), [2], [1])
    yield case(aten.roll.default, f(5, 7), [2])
    yield case(aten.unfold.default, f(3, 7, 5), 1, 3, 2)
    yield case(aten.slice_scatter.default, f(3, 7, 5), f(3, 2, 5), 1, 2, 4)
    yield case(aten.select_scatter.default, f(3, 7, 5), f(3, 5), 1, 2)
    # rows
    yield case(aten.embedding.default, f(11, 7), ids(11, 2, 5))
    yield case(aten.embedding.default, f(11, 7), ids(11, 5), 3)
    yield case(aten.index.Tensor, f(11, 5, 7), [ids(11, 3)])
    yield case(aten._unsafe_index.Tensor, f(11, 5, 7), [ids(11, 3)])
    yield case(aten._fft_r2c.default, f(3, 5, 7), [1], 0, True)
    yield case(aten._fft_c2c.default, torch.complex(f(3, 5, 7), f(3, 5, 7)), [2], 0, True)
    yield case(aten._fft_c2r.default, torch.complex(f(3, 5, 4), f(3, 5, 4)), [2], 0, 7)
    yield case(aten.zero.default, f(2, 5, 7))
    yield case(aten.fill.Scalar, f(2, 5, 7), 3)
    yield case(aten.fill.Tensor, f(2, 5, 7), f())
    yield case(aten.index.Tensor, f(5, 11, 7), [None, ids(11, 2, 3)])
    yield case(aten.index.Tensor, f(5, 11, 7, 2), [None, ids(11, 3, 1), ids(7, 13)])
    yield case(aten.index.Tensor, f(5, 11, 7), [ids(5, 3), None, ids(7, 1)])
    yield case(aten.index_select.default, f(5, 11, 7), -2, ids(11, 3))
    yield case(aten.gather.default, f(5, 11), 1, ids(11, 5, 3))
    yield case(aten.gather.default, f(5, 11, 7), -2, ids(11, 3, 2, 7))
    for index in (0, -1, 3):
        yield case(aten.select.int, f(2, 5, 7), 1, index)
    yield case(aten.slice.Tensor, f(2, 5, 7), 1, 0, 2**63 - 1)
    yield case(aten.slice.Tensor, f(2, 5, 7), -2, -2)
    yield case(aten.slice.Tensor, f(2, 5, 7), 1, 0, -1)
    yield case(aten.slice.Tensor, f(2, 17, 7), 1, 2, -3)
    yield case(aten.slice.Tensor, f(2, 17, 7), 1, None, 13)
    yield case(aten.slice.Tensor, f(2, 17, 7), 1, 1, None, 2)
    # contractions
    yield case(aten.linear.default, f(2, 5, 7), f(3, 7), f(3))
    yield case(aten.linear.default, f(5, 7), f(3, 7))
    yield case(aten.linear.default, f(7), f(3, 7), f(3))
    yield case(aten.matmul.default, f(7), f(7))
    yield case(aten.matmul.default, f(7), f(2, 7, 3))
    yield case(aten.matmul.default, f(2, 5, 7), f(7))
    yield case(aten.matmul.default, f(2, 5, 7), f(7, 3))
    yield case(aten.matmul.default, f(2, 1, 5, 7), f(11, 7, 3))
    yield case(aten.mm.default, f(5, 7), f(7, 3))
    yield case(aten.bmm.default, f(2, 5, 7), f(2, 7, 3))
    yield case(aten.mv.default, f(5, 7), f(7))
    yield case(aten.dot.default, f(7), f(7))
    for bias in (f(3), f(5, 3), f(5, 1), f(1, 3), f()):
        yield case(aten.addmm.default, bias, f(5, 7), f(7, 3), beta=0.5, alpha=2.0)
    yield case(aten.addmm.default, f(5, 3), f(5, 7), f(7, 3), beta=0)
    yield case(aten.baddbmm.default, f(2, 5, 3), f(2, 5, 7), f(2, 7, 3), alpha=0.5)
    yield case(aten.baddbmm.default, f(1, 3), f(2, 5, 7), f(2, 7, 3), beta=3)
    yield case(aten.einsum.default, "bqhd,bkhd->bhqk", [f(2, 5, 3, 11), f(2, 7, 3, 11)])
    yield case(aten.einsum.default, "...ij,jk", [f(2, 3, 5), f(5, 7)])
    yield case(aten.einsum.default, "b i, b i, b -> b", [f(5, 7), f(5, 7), f(1)])
    yield case(aten.einsum.default, "ij,jk,k->i", [f(5, 7), f(7, 3), f(3)])
    yield case(aten.conv1d.default, f(2, 3, 11), f(5, 3, 4), f(5))
    yield case(aten.conv1d.default, f(2, 6, 11), f(10, 3, 4), f(10), [1], [3], [1], 2)
    yield case(aten.conv1d.default, f(2, 5, 11), f(5, 1, 4), None, [1], [3], [1], 5)
    yield case(aten.conv1d.default, f(5, 11), f(10, 1, 4), f(10), groups=5)
    yield case(aten.conv1d.padding, f(2, 3, 11), f(5, 3, 3), f(5), [1], "same")
    yield case(aten.conv2d.default, f(2, 3, 8, 6), f(5, 3, 2, 2), f(5), [2, 2])
    yield case(aten.conv2d.padding, f(2, 3, 8, 6), f(5, 3, 2, 2))
    yield case(aten.conv3d.default, f(2, 3, 4, 6, 4), f(5, 3, 2, 2, 2))
    yield case(aten.conv3d.padding, f(2, 3, 4, 6, 4), f(5, 3, 2, 2, 2), f(5), [1], "valid")
    yield case(aten.convolution.default, f(2, 3, 11), f(5, 3, 4), f(5), [1], [0], [1], False, [0], 1)
    yield case(aten.avg_pool2d.default, f(2, 3, 6, 8), [2, 2])
    yield case(aten._adaptive_avg_pool2d.default, f(2, 3, 6, 8), [2, 4])
    yield case(aten.max_pool2d_with_indices.default, f(2, 3, 6, 8), [2, 2])
    yield case(aten.upsample_nearest2d.default, f(2, 3, 5, 7), [10, 14])
    yield case(aten.upsample_bilinear2d.default, f(2, 3, 5, 7), [10, 14], False)
    yield case(aten.upsample_bicubic2d.default, f(2, 3, 5, 7), [10, 14], False)
    # attention
    q, k, v = f(2, 3, 5, 8), f(2, 3, 7, 8), f(2, 3, 7, 11)
    yield case(SDPA, q, k, v)
    yield case(SDPA, q, k, v, None, 0.0, True)
    yield case(SDPA, q, k, v, f(2, 1, 5, 7), scale=0.3)
    yield case(SDPA, q, k, v, bools(5, 7) | (torch.arange(7) == 0))
    yield case(SDPA, q, k, v, f(3, 1, 7))
    yield case(SDPA, f(5, 8), f(7, 8), f(7, 8), None, 0.0, True)
    yield case(SDPA, f(3, 5, 8), f(3, 7, 8), f(3, 7, 8))
    grouped = f(2, 6, 5, 8), f(2, 3, 5, 8), f(2, 3, 5, 8)
    yield case(SDPA, *grouped, None, 0.0, True, enable_gqa=True)
    yield case(SDPA, *grouped, f(2, 6, 5, 5), enable_gqa=True)
    yield case(SDPA, *grouped, f(2, 1, 1, 5), enable_gqa=True)
    yield case(SDPA, f(2, 6, 5, 8), f(2, 1, 7, 8), f(2, 1, 7, 8), enable_gqa=True)
    # normalisation
    yield case(aten.layer_norm.default, f(2, 5, 7), [7], f(7), f(7))
    yield case(aten.layer_norm.default, f(2, 5, 7), [5, 7])
    yield case(aten.native_layer_norm.default, f(2, 5, 7), [7], f(7), None, 1e-5)
    yield case(aten.rms_norm.default, f(2, 5, 7), [7], f(7))
    yield case(aten._fused_rms_norm.default, f(2, 5, 7), [7], f(7), 1e-6)
    yield case(aten.group_norm.default, f(5, 6, 7), 3, f(6), f(6))
    yield case(aten.native_group_norm.default, f(5, 6, 7), f(6), f(6), 5, 6, 7, 3, 1e-5)
    for target in (aten.softmax.int, aten.log_softmax.int, aten._safe_softmax.default):
        yield case(target, f(2, 5, 7), -1)
        yield case(target, f(2, 5, 7), 1, torch.float64)
    for target in (aten._softmax.default, aten._log_softmax.default):
        yield case(target, f(2, 5, 7), -1, False)
    # reductions
    half = f(3, 5, 7).bfloat16()
    ties = f(3, 5, 7).relu()
    for keepdim in (False, True):
        for target in (aten.sum.dim_IntList, aten.mean.dim):
            yield case(target, f(3, 5, 7), [1, -1], keepdim)
            yield case(target, half, [1], keepdim)
            yield case(target, f(3, 5, 7), None, keepdim, dtype=torch.float32)
        for target in (aten.amax.default, aten.amin.default):
            yield case(target, f(3, 5, 7), [1], keepdim)
            yield case(target, ties, [0, 2], keepdim)
            yield case(target, ids(9, 5, 7), [0], keepdim)
            special = torch.tensor([[1.0, -torch.inf, 1], [torch.inf, -torch.inf, 2], [torch.nan, -torch.inf, 3]])
            yield constant(case(target, special, [0], keepdim), 0)
        for target in (aten.var.correction, aten.std.correction):
            yield case(target, f(3, 5, 7) + 100, [1], correction=0, keepdim=keepdim)
            yield case(target, f(3, 5, 7))
        yield case(aten.logsumexp.default, f(3, 5, 7) + 50, [1, 2], keepdim)
        for target in (
            aten.all.dim,
            aten.any.dim,
            aten.max.dim,
            aten.min.dim,
            aten.argmax.default,
            aten.argmin.default,
        ):
            yield case(target, f(3, 5, 7), -2, keepdim)
        yield case(aten.prod.dim_int, f(3, 5, 7), -2, keepdim)
        yield case(aten.all.dims, bools(3, 5, 7), [0, 1], keepdim)
        yield case(aten.any.dims, bools(3, 5, 7), [0, 1], keepdim)
        yield case(aten.linalg_vector_norm.default, f(3, 5, 7), 2, [-1], keepdim)
    yield case(aten.sum.default, f(5, 7))
    yield case(aten.sum.default, ids(9, 5, 7))
    yield case(aten.sum.default, bools(5, 7))
    yield case(aten.mean.default, f(5, 7))
    yield case(aten.amax.default, bools(5, 7), [0])
    for target in (aten.max.default, aten.min.default, aten.prod.default, aten.all.default, aten.any.default):
        yield case(target, f(5, 7))
    # losses
    ce = aten.cross_entropy_loss.default
    for reduction in (0, 1, 2):
        yield case(ce, f(5, 7), labels(7, 5), None, reduction)
        yield constant(case(ce, f(5, 7), labels(7, 5), positive(7), reduction, -100, 0.1), 2)
        yield constant(case(ce, f(2, 7, 3, 5), labels(7, 2, 3, 5), positive(7), reduction), 2)
        yield case(ce, f(5, 7), ids(7, 5), None, reduction, 2)
        yield case(ce, f(7), ids(7), None, reduction)
        yield case(ce, f(5, 7), f(5, 7).softmax(1), positive(7), reduction, -100, 0.1)
        yield case(ce, f(2, 7, 3), f(2, 7, 3).softmax(1), None, reduction)
        for target in (aten.nll_loss.default, aten.nll_loss_nd.default):
            yield constant(case(target, f(5, 7), labels(7, 5), positive(7), reduction), 2)
            yield case(target, f(5, 7), labels(7, 5), None, reduction)
        for target in (aten.mse_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default):
            yield case(target, f(5, 7), f(5, 7), reduction)
        likely = positive(5, 7) / 2
        yield constant(case(aten.binary_cross_entropy.default, likely, likely.flip(0), positive(7), reduction), 2)
        bce = aten.binary_cross_entropy_with_logits.default
        yield constant(case(bce, f(5, 7), positive(5, 7), None, positive(7), reduction), 2)
        yield constant(case(bce, f(5, 7), positive(5, 7), positive(5, 1), None, reduction), 2)
    yield case(ce, f(5, 7).bfloat16(), labels(7, 5))
    yield case(ce, f(5, 7), torch.full((5,), -100))


CASES: dict[OpOverload, list[Case]] = defaultdict(list)
for _case in _cases():
    CASES[_case.target].append(_case)

# Nothing to compare: the result is not initialised.
UNCHECKED = {aten.empty_like.default, aten.new_empty.default}


@pytest.mark.parametrize("target", CASES, ids=str)
def test_rule_is_right_on_every_factor(target: OpOverload) -> None:
    for sample in CASES[target]:
        rule = sample.rule
        assert rule is not None, sample
        for sharding in shardings(rule):
            for parts in (2, 3):
                try:
                    compare(sample, rule, sharding, parts)
                except Exception as error:
                    raise AssertionError(f"{sample} on {parts} ranks, {sharding}") from error


def test_every_rule_has_a_sample() -> None:
    assert {op for op in _RULES if op.namespace == "aten"} <= set(CASES) | UNCHECKED
    assert all(has_rule(target) for target in CASES)


# What the check itself is worth


def fails(sample: Case, rule: OpShardingRule, factor: str) -> bool:
    """Whether the check refuses a factor, in one of its layouts, on 2 or 3 ranks."""
    for layout in layouts(int(rule.sizes[factor])):
        sharding = rule.run_on({factor: layout})
        for parts in (2, 3):
            try:
                if sharding is not None:
                    compare(sample, rule, sharding, parts)
            except (AssertionError, RuntimeError, IndexError, ValueError):
                return True
    return False


def over_cautious(sample: Case, rule: OpShardingRule) -> set[str]:
    """The factors marked `!` that would have passed as they are."""
    free = replace(rule, need_replication=frozenset())
    return {
        factor
        for factor in rule.need_replication & set(rule.sizes)
        if free.run_on({factor: Layout((Segment(rule.sizes[factor]),))}) and not fails(sample, free, factor)
    }


def test_no_factor_is_whole_without_need() -> None:
    for sample in (sample for samples in CASES.values() for sample in samples):
        rule = sample.rule
        assert rule is not None and not over_cautious(sample, rule), sample


def test_over_cautious_factor_is_found() -> None:
    sample = CASES[aten.layer_norm.default][0]
    rule = sample.rule
    assert rule is not None and over_cautious(sample, replace(rule, need_replication=frozenset({"d1", "d2"}))) == {"d1"}


def swapped(rule: OpShardingRule) -> OpShardingRule:
    """The last two dimensions of the result exchanged."""
    (*lead, last, other) = rule.results[0]
    return replace(rule, results=((*lead, other, last),))


def free(rule: OpShardingRule) -> OpShardingRule:
    return replace(rule, need_replication=frozenset())


def bodiless(rule: OpShardingRule) -> OpShardingRule:
    return replace(rule, bodies={})


def with_body(factor: str, body: Callable[[Any], Any]) -> Callable[[OpShardingRule], OpShardingRule]:
    return lambda rule: replace(rule, bodies={factor: body})


PLANTED: list[tuple[str, Case, Callable[[OpShardingRule], OpShardingRule], str]] = [
    ("factors swapped", case(aten.transpose.int, f(2, 5, 7), 1, 2), swapped, "d1"),
    ("squares swapped", case(aten.matmul.default, f(5, 5), f(5, 5)), swapped, "m"),
    ("`!` dropped", case(aten.softmax.int, f(5, 7), 1), free, "d1"),
    ("`!` dropped", case(aten.cumsum.default, f(5, 7), 1), free, "d1"),
    ("query body dropped", case(SDPA, *[f(3, 5, 8)] * 3, None, 0.0, True), bodiless, "q"),
    ("squeeze of local size", case(aten.squeeze.default, f(1, 2, 3)), bodiless, "d1"),
    ("groups not local", case(aten.conv1d.default, f(2, 6, 5), f(6, 1, 2), None, groups=6), bodiless, "g"),
    (
        "bias counted by every rank",
        case(aten.linear.default, f(5, 7), f(3, 7), f(3)),
        with_body("i", lambda op: op.all_reduce(op.emit(aten.linear.default, *op.blocks))),
        "i",
    ),
    (
        "padding counted",
        case(aten.sum.dim_IntList, f(5, 7), [0]),
        with_body("d0", lambda op: op.all_reduce(op.emit(aten.sum.dim_IntList, op.operand(0), [0]))),
        "d0",
    ),
    (
        "padding is the maximum of zeros",
        case(aten.amin.default, positive(5, 7), [0]),
        with_body(
            "d0",
            lambda op: op.all_reduce(
                op.emit(aten.amin.default, op.mask_padding(op.operand(0), op.operands[0], 0), [0]), "min"
            ),
        ),
        "d0",
    ),
    (
        "not reduced",
        case(aten.sum.dim_IntList, f(5, 7), [0]),
        with_body(
            "d0", lambda op: op.emit(aten.sum.dim_IntList, op.mask_padding(op.operand(0), op.operands[0], 0), [0])
        ),
        "d0",
    ),
    (
        "mean of means",
        case(aten.mean.dim, f(5, 7), [0]),
        with_body(
            "d0",
            lambda op: op.emit(aten.div.Scalar, op.all_reduce(op.emit(aten.mean.dim, op.operand(0), [0])), op.parts),
        ),
        "d0",
    ),
    (
        "a replicated sum in sharded work",
        case(aten.softmax.int, f(5, 7), 0),
        lambda rule: replace(free(rule), bodies={"d0": _softmax_without_replicate}),
        "d0",
    ),
]


def _softmax_without_replicate(op: Any) -> Any:
    powers = op.mask_padding(op.emit(aten.exp.default, op.operand(0)), op.operands[0], 0)
    return op.emit(aten.div.Tensor, powers, op.all_reduce(op.emit(aten.sum.dim_IntList, powers, [0], True)))


@pytest.mark.parametrize(("what", "sample", "plant", "factor"), PLANTED, ids=[f"{p[1].target}-{p[0]}" for p in PLANTED])
def test_planted_wrong_is_refused(
    what: str, sample: Case, plant: Callable[[OpShardingRule], OpShardingRule], factor: str
) -> None:
    rule = sample.rule
    assert rule is not None
    assert not any(factor == known and fails(sample, rule, factor) for known in rule.sizes)
    assert fails(sample, plant(rule), factor)


# Calls that have no rule, or no sharding of a factor


@pytest.mark.parametrize(
    "sample",
    [
        case(aten.einsum.default, "ii->i", [f(5, 5)]),
        case(aten.einsum.default, "ii,ij->j", [f(5, 5), f(5, 7)]),
        case(SDPA, *[f(2, 3, 5, 8)] * 3, None, 0.5),
        case(aten.embedding.default, f(11, 7), ids(11, 5), -1, True),
        case(aten.index.Tensor, f(5, 7), [bools(5)]),
        case(aten.convolution.default, f(2, 3, 11), f(3, 5, 4), None, [1], [0], [1], True, [0], 1),
        case(aten.repeat_interleave.self_int, f(5, 7), 2),
        case(aten.mse_loss.default, f(5, 7), f(7)),
        case(aten.add.Tensor, f(0, 7), f(0, 7)),
        case(aten.rand_like.default, f(5, 7)),
        case(aten.rrelu.default, f(5, 7)),
        case(aten.add_.Tensor, f(5, 7), f(5, 7)),
    ],
    ids=str,
)
def test_call_without_rule(sample: Case) -> None:
    assert sample.rule is None


def test_parallel_dropout_differs_between_ranks_and_repeats() -> None:
    sample = case(aten.dropout.default, torch.ones(8, 4001), 0.25, True)
    rule = sample.rule
    assert rule is not None
    sharding = rule.shard_factor("d0")
    assert sharding is not None
    blocks = [Ranks(cut(sample.tensors[0], sharding.operands[0], 2))]
    placements = tuple(p or REPLICATED for p in sharding.operands)

    def draw() -> Any:
        torch.manual_seed(0)
        op = EagerLocalOp(sample.call, blocks, placements, sharding.results, 2, rng="parallel")
        return rule.bodies["d0"](op)  # type: ignore[arg-type]

    first, second = draw()
    assert not torch.equal(first, second)
    assert all(torch.equal(x, y) for x, y in zip(draw(), (first, second), strict=True))
    for mask in (first, second):
        assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        assert abs(mask.mean() - 1) < 0.02


def test_simulated_ranks_draw_apart() -> None:
    with simulate(2) as mode:
        rank = mode.rank_map(lambda r: torch.tensor([r]))
        made = torch.ops.sp.bernoulli(torch.empty(1000), torch.tensor([7]), rank, 0.5)
    one, two = (made._local_tensors[r] for r in range(2))
    plain = torch.ops.sp.bernoulli(torch.empty(1000), torch.tensor([7]), torch.tensor([1]), 0.5)
    assert not torch.equal(one, two) and torch.equal(two, plain)


def test_bernoulli_is_a_proper_op() -> None:
    sample = torch.empty(5, 7), torch.tensor([3]), torch.tensor([1]), 0.3
    torch.library.opcheck(torch.ops.sp.bernoulli.default, sample)


def test_slice_at_a_segment_boundary_is_local_and_elsewhere_carries() -> None:
    sample = case(aten.slice.Tensor, f(2, 31, 7), 1, 11)
    rule = sample.rule
    assert rule is not None
    aligned = Sharded(1, Layout((Segment(11), Segment(20))))
    sharding = rule.follow(0, [aligned])
    assert sharding is not None and sharding.results == (Sharded(1, Layout((Segment(20),))),)
    for parts in (2, 3):
        compare(sample, rule, sharding, parts)
    across = Sharded(1, Layout((Segment(31),)))
    assert rule.follow(0, [across]) is None
    assert rule.carry(0, [across]) == sharding.results


def test_streams_keep_their_own_layout() -> None:
    sample = case(aten.cat.default, [f(6, 7), f(5, 7), f(1, 7)])
    rule = sample.rule
    assert rule is not None
    granules = Sharded(0, Layout((Segment(6, 2),)))
    sharding = rule.follow(0, [granules, REPLICATED, REPLICATED])
    assert sharding is not None
    assert sharding.results == (Sharded(0, Layout((Segment(6, 2), Segment(5), Segment(1)))),)
    for parts in (2, 3, 4):
        compare(sample, rule, sharding, parts)


def test_split_of_packed_heads_reads_an_outer_factor() -> None:
    sample = case(aten.split.Tensor, f(5, 36), 12, 1)
    rule = sample.rule
    assert rule is not None
    sharding = rule.follow(0, [Sharded(1, Layout((Segment(12, 4),), outer=3))])
    assert sharding is not None and sharding.results == (Sharded(1, Layout((Segment(12, 4),))),) * 3
    for parts in (2, 3):
        compare(sample, rule, sharding, parts)
