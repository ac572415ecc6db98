"""Rows looked up and rows written."""

from __future__ import annotations

from collections.abc import Iterator

from .brute_force import Case, aten, bools, case, constant, distinct, f, ids


def cases() -> Iterator[Case]:
    yield case(aten.embedding.default, f(11, 7), ids(11, 2, 5))
    yield case(aten.embedding.default, f(11, 7), ids(11, 5), 3)
    yield case(aten.index.Tensor, f(11, 5, 7), [ids(11, 3)])
    yield case(aten._unsafe_index.Tensor, f(11, 5, 7), [ids(11, 3)])
    yield case(aten.index.Tensor, f(5, 11, 7), [None, ids(11, 2, 3)])
    yield case(aten.index.Tensor, f(5, 11, 7, 2), [None, ids(11, 3, 1), ids(7, 13)])
    yield case(aten.index.Tensor, f(5, 11, 7), [ids(5, 3), None, ids(7, 1)])
    # Indices apart, and not from the first dimension on: theirs comes first.
    yield case(aten.index.Tensor, f(2, 5, 3, 7), [None, ids(5, 11), None, ids(7, 11)])
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

    yield case(aten.bucketize.Tensor, f(5, 7), f(3).sort()[0])
    yield case(aten.searchsorted.Tensor, f(3).sort()[0], f(5, 7))
    yield case(aten.searchsorted.Tensor, f(5, 3).sort(-1)[0], f(5, 7), right=True)
    table = f(5, 3)
    yield case(aten.searchsorted.Tensor, table, f(5, 7), sorter=table.argsort(-1))
    yield case(aten.take.default, f(5, 7), ids(35, 2, 3))
    yield case(aten.renorm.default, f(3, 5, 7), 2, -2, 0.7)
    # written
    for target in (aten.scatter.src, aten.scatter_add.default):
        yield case(target, f(5, 11, 3), 1, distinct(5, 7, 3, of=11, dim=1), f(5, 7, 3))
        # A source larger than its index has no derivative.
        yield constant(case(target, f(5, 11, 3), -2, distinct(5, 7, 2, of=11, dim=1), f(5, 7, 3)), 2)
        yield constant(case(target, f(5, 11, 3), 1, distinct(5, 7, 3, of=11, dim=1), f(5, 8, 3)), 2)
    yield case(aten.scatter_add.default, f(5, 11), 1, ids(11, 5, 17), f(5, 17))
    yield case(aten.scatter_add.default, f(3), 0, ids(3, 8), f(8))
    yield case(aten.scatter.value, f(5, 11), -1, ids(11, 5, 3), 2.0)
    yield constant(case(aten.scatter.reduce, f(5, 11), 1, ids(11, 5, 7), f(5, 7), reduce="multiply"), 0, 2)
    yield constant(case(aten.scatter.value_reduce, f(5, 11), 1, ids(11, 5, 7), 0.5, reduce="multiply"), 0)
    for kind in ("sum", "prod", "mean", "amax"):
        yield case(aten.scatter_reduce.two, f(5, 11), 1, ids(11, 5, 7), f(5, 7), kind)
        yield case(aten.scatter_reduce.two, f(5, 11), 0, ids(5, 3, 11), f(3, 11), kind, include_self=False)
    yield case(aten.index_add.default, f(2, 11, 3), 1, ids(11, 17), f(2, 17, 3))
    yield case(aten.index_add.default, f(11, 3), -2, ids(11, 5), f(5, 3), alpha=2)
    yield case(aten.index_add.default, f(11), 0, ids(11, 5), f(5))
    yield case(aten.index_copy.default, f(2, 11, 3), 1, distinct(7, of=11, dim=0), f(2, 7, 3))
    yield case(aten.index_reduce.default, f(2, 11, 3), 1, ids(11, 7), f(2, 7, 3), "mean")
    yield case(aten.index_fill.int_Scalar, f(2, 11, 3), -2, ids(11, 5), 2.0)
    yield case(aten.index_fill.int_Tensor, f(2, 11, 3), 1, ids(11, 5), f())
    for target in (aten.index_put.default, aten._unsafe_index_put.default):
        yield case(target, f(2, 11, 3), [None, distinct(5, of=11, dim=0)], f(2, 5, 3))
        yield case(target, f(2, 11, 3), [None, distinct(5, of=11, dim=0)], f(3))
        yield case(target, f(5, 11, 3, 2), [None, ids(11, 7, 1), ids(3, 13)], f(7, 1, 2), True)
        yield case(target, f(5, 11, 3), [ids(5, 7), None, ids(3, 1)], f(7, 11), True)
        yield case(target, f(2, 5, 3, 7), [None, ids(5, 11), None, ids(7, 11)], f(11, 2, 3), True)
    yield case(aten.index_put.default, f(2, 5, 3), [bools(2, 5)], f(3))
    yield case(aten.index_put.default, f(2, 5, 3), [None, bools(5)], f(2, 1, 3), True)
    yield case(aten.index_put.default, f(2, 5, 3), [bools(2, 5, 3)], f())
    mask = bools(2, 5)
    yield case(aten.index_put.default, f(2, 5, 3), [mask], f(int(mask.sum()), 3))
    yield case(aten.masked_scatter.default, f(2, 5), bools(5), f(3, 4))
