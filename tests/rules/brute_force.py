"""An op on P ranks by brute force: cut the operands, run the op on each rank, and compare with the whole op.

Ranks are simulated in the plainest way: a value is a list of P tensors, and a collective an autograd Function over that
list. What is compared are values and gradients, in float64, under the law of gradients of docs/design.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from sp_compile.placement.placements import REPLICATED, Layout, Placement, Segment, Sharded, local_shape
from sp_compile.rules import rule_for
from sp_compile.rules.op_call import OpCall
from sp_compile.rules.rule import Joined, OpSharding, OpShardingRule

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


# What a placement means, as chunk and cat


def rows_of(layout: Layout, parts: int) -> list[tuple[Tensor, Tensor]]:
    """For each rank: the global row of every local row, and whether it is real."""
    ranks: list[list[Tensor]] = [[] for _ in range(parts)]
    real: list[list[Tensor]] = [[] for _ in range(parts)]
    for outer in torch.arange(int(layout.size)).chunk(int(layout.outer)):
        for segment, rows in zip(layout.segments, outer.split([int(s.size) for s in layout.segments]), strict=True):
            granule = int(segment.granule)
            granules = list(rows.split(granule))
            flags = [torch.ones(len(g), dtype=torch.bool) for g in granules]
            before, count = int(segment.before) // granule, -(-int(segment.span) // granule // parts) * parts
            after = count - before - len(granules)
            flags = [torch.zeros_like(flags[0])] * before + flags + [torch.zeros_like(flags[-1])] * after
            granules = [granules[0]] * before + granules + [granules[-1]] * after
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


class Replicate(torch.autograd.Function):
    """`y_r = x_r`; backward: `sum_s g_s`."""

    @staticmethod
    def forward(ctx: Any, *blocks: Tensor) -> tuple[Tensor, ...]:
        return tuple(block.clone() for block in blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        total = torch.stack(grads).sum(0)
        return tuple(total.clone() for _ in grads)


@dataclass
class EagerLocalOp:
    """`sp_compile.rules.rule.LocalOp`, run at once on `Ranks`."""

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

    def computed_again(self, value: Ranks) -> Ranks:
        return value

    def mask_padding(self, value: Ranks, placement: Placement, fill_value: float) -> Ranks:
        assert isinstance(placement, Sharded)
        rows = rows_of(placement.layout, self.parts)
        return Ranks(fill(x, placement, real, fill_value) for x, (_, real) in zip(value, rows, strict=True))

    def refill_padding(self, value: Ranks, placement: Sharded) -> Ranks:
        whole = glue(value, placement, self.parts)
        return Ranks(cut(whole, placement, self.parts))

    def all_reduce(self, value: Ranks, kind: str = "sum") -> Ranks:
        return Ranks(AllReduce.apply(kind, *value))  # type: ignore[no-untyped-call]

    def replicate(self, value: Ranks) -> Ranks:
        return Ranks(Replicate.apply(*value))  # type: ignore[no-untyped-call]

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

    def gather(self, value: Ranks, placement: Sharded, role: str) -> Ranks:
        return Ranks([glue(value, placement, self.parts)] * self.parts)

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
    body = rule.body(sharding)
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
        yield Layout((Segment(size, 1, 2, 1),))
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


def far(*shape: int) -> Tensor:
    """Values far from 0 whose mean is exact for counts that divide 210, and whose squares are not."""
    return 210 * (ids(9, *shape) + 10**8).double()


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.1


def ids(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


def distinct(*shape: int, of: int, dim: int) -> Tensor:
    """Indices below `of` that differ along `dim`."""
    full = [of if at == dim else size for at, size in enumerate(shape)]
    return torch.rand(full).argsort(dim).narrow(dim, 0, shape[dim])


def bools(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.7


def labels(high: int, *shape: int) -> Tensor:
    return ids(high, *shape).masked_fill(torch.rand(shape) < 0.2, -100)


def case(target: OpOverload, *args: Any, **kwargs: Any) -> Case:
    return Case(target, args, kwargs)


def constant(sample: Case, *operands: int) -> Case:
    return replace(sample, frozen=frozenset(operands))
