"""Pointwise ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .brute_force import Case, aten, bools, case, f, ids, positive


def cases() -> Iterator[Case]:
    yield case(aten.add.Tensor, f(2, 5, 7), f(5, 1), alpha=2)
    yield case(aten.add.Tensor, f(5, 1, 3), f(7, 1))
    yield case(aten.mul.Tensor, f(5, 7), f())
    yield case(aten.gelu.default, f(5, 7), approximate="tanh")
    yield case(aten.where.self, bools(5, 1), f(5, 7), f(7))
    yield case(aten.where.Scalar, bools(5, 7), 1.0, 2.0)
    yield case(aten.where.ScalarSelf, bools(5, 1), 2.0, f(5, 7))
    yield case(aten.where.ScalarOther, bools(5, 1), f(5, 7), 0)
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
    for target in (aten.zeros.default, aten.ones.default):
        yield case(target, [5, 7])
    yield case(aten.full.default, [5, 7], 2.0, dtype=torch.float64)
    yield case(aten.new_zeros.default, f(5, 7), [3, 5])
    yield case(aten.new_ones.default, f(5, 7), [5, 7])
    yield case(aten.new_full.default, f(5, 7), [5, 7], 2.0)
    yield case(aten.isin.Tensor_Tensor, ids(9, 5, 7), ids(9, 3))
    yield case(aten.dropout.default, f(5, 7), 0.4, True)
    yield case(aten.dropout.default, f(5, 7), 0.4, False)
    yield case(aten.dropout.default, f(5, 7), 1.0, True)
    yield case(aten.zero.default, f(2, 5, 7))
    yield case(aten.fill.Scalar, f(2, 5, 7), 3)
    yield case(aten.fill.Tensor, f(2, 5, 7), f())

    yield case(aten._conj.default, torch.complex(f(5, 7), f(5, 7)))
    yield case(aten.log_sigmoid.default, f(5, 7))
