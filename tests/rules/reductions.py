"""Reductions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .brute_force import Case, aten, bools, case, constant, f, far, ids, positive


def cases() -> Iterator[Case]:
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
            yield case(target, far(3, 5, 7), [1], correction=0, keepdim=keepdim)
            yield case(target, f(3, 5, 7))
        yield case(aten.logsumexp.default, f(3, 5, 7) + 50, [1, 2], keepdim)
        # `exp` of it is 0: a padding of 0 would be the greatest row.
        yield constant(case(aten.logsumexp.default, f(3, 5, 7) - 1000, [1, 2], keepdim), 0)
        # The sum is beyond the largest half, the mean is not.
        yield case(aten.mean.dim, (30000 * positive(5, 7)).half(), [0], keepdim)
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

    holes = f(5, 7).masked_fill(bools(5, 7), torch.nan)
    zeros = f(5, 7) * torch.tensor([0, 1, 1, 1, 1.0])[:, None]
    for keepdim in (False, True):
        yield case(aten.nansum.default, holes, [0], keepdim)
        for target in (aten.var_mean.correction, aten.std_mean.correction):
            yield case(target, far(3, 5, 7), [1], correction=0, keepdim=keepdim)
            yield case(target, torch.complex(f(5, 7), f(5, 7)), [1], keepdim=keepdim)
        for target in (aten.var.correction, aten.std.correction):
            yield case(target, torch.complex(f(5, 7), f(5, 7)), [1], keepdim=keepdim)
        yield case(aten.logsumexp.default, ids(9, 5, 7), [0], keepdim)
        yield case(aten.amin.default, bools(5, 7), [0], keepdim)
        for order in (1, 2, 3, float("inf")):
            yield case(aten.linalg_vector_norm.default, zeros, order, [1], keepdim)
            yield case(aten.norm.ScalarOpt_dim, zeros, order, [0], keepdim)
        for target in (aten.median.dim, aten.nanmedian.dim, aten.mode.default):
            yield case(target, f(3, 5, 7), 1, keepdim)
        yield case(aten.kthvalue.default, f(3, 5, 7), 2, 1, keepdim)
        yield case(aten.aminmax.default, f(3, 5, 7), dim=1, keepdim=keepdim)
        for truth in (torch.zeros(5, 7).bool(), torch.ones(5, 7).bool(), bools(5, 7)):
            for target in (aten.all.dim, aten.any.dim):
                yield case(target, truth, 0, keepdim)
    yield case(aten.linalg_vector_norm.default, f(5, 7).bfloat16(), 2, [0], dtype=torch.float32)
    yield case(aten.linalg_vector_norm.default, f(5, 7))
    yield case(aten.norm.ScalarOpt_dim, f(5, 7), None, [0])
    yield case(aten.var_mean.correction, f(3, 5, 7))
    for target in (aten.max.default, aten.min.default):
        yield case(target, bools(5, 7))
    yield case(aten.all.default, torch.ones(5, 7))
    yield case(aten.any.default, torch.zeros(5, 7))
    yield case(aten.count_nonzero.default, ids(2, 5, 7), 0)
    yield case(aten.count_nonzero.dim_IntList, f(3, 5, 7).relu(), [0, 2])
    yield case(aten.cosine_similarity.default, f(2, 5, 7), f(5, 1), -1)
    yield case(aten.cosine_similarity.default, f(2, 5, 7), f(2, 5, 7), 1)
