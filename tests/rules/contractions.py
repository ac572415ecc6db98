"""Contractions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .brute_force import Case, aten, case, f


def cases() -> Iterator[Case]:
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

    yield case(aten.vdot.default, f(7), f(7))
    yield case(aten.vdot.default, torch.complex(f(7), f(7)), torch.complex(f(7), f(7)))
    for bias in (f(5), f(1), f()):
        yield case(aten.addmv.default, bias, f(5, 7), f(7), beta=0.5, alpha=2.0)
    for bias in (f(5, 3), f(3), f(5, 1)):
        yield case(aten.addr.default, bias, f(5), f(3), beta=0.5, alpha=2.0)
        yield case(aten.addbmm.default, bias, f(2, 5, 7), f(2, 7, 3), beta=0.5, alpha=2.0)
    yield case(aten.addbmm.default, f(5, 3), f(2, 5, 7), f(2, 7, 3), beta=0)
    yield case(aten.bilinear.default, f(2, 5, 7), f(2, 5, 3), f(11, 7, 3), f(11))
    yield case(aten.bilinear.default, f(5, 7), f(5, 3), f(11, 7, 3))
    for p in (1.0, 2.0):
        yield case(aten._cdist_forward.default, f(2, 5, 7), f(2, 3, 7), p, None)
    yield case(aten._cdist_forward.default, f(5, 7), f(2, 3, 7), 2.0, 1)
    yield case(aten._euclidean_dist.default, f(2, 5, 7), f(2, 3, 7))
    yield case(aten._euclidean_dist.default, f(5, 7), f(2, 3, 7))
