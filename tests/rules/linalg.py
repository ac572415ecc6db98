"""Decompositions of matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .brute_force import Case, aten, case, constant, f


def cases() -> Iterator[Case]:

    square, other = f(2, 3, 5, 5) + 5 * torch.eye(5), f(2, 3, 5, 5)
    symmetric = other @ other.mT + torch.eye(5)
    yield case(aten._linalg_det.default, square)
    yield case(aten._linalg_slogdet.default, square)
    yield case(aten._linalg_svd.default, f(2, 5, 3))
    yield case(aten._linalg_eigh.default, symmetric)
    yield case(aten._linalg_solve_ex.default, square, f(2, 3, 5, 7))
    yield case(aten.linalg_cholesky_ex.default, symmetric)
    yield case(aten.linalg_inv_ex.default, square)
    yield case(aten.linalg_lu_factor_ex.default, square)
    yield case(aten.linalg_matrix_exp.default, f(2, 5, 5))
    yield case(aten.linalg_pinv.atol_rtol_tensor, f(2, 5, 3))
    yield constant(case(aten.linalg_pinv.atol_rtol_tensor, f(2, 5, 3), rtol=f().abs() * 1e-9), 1)
    yield case(aten.linalg_qr.default, f(2, 5, 3))
    yield case(aten.linalg_solve_triangular.default, square.triu(), f(1, 3, 5, 7), upper=True)
    yield case(aten.linalg_solve_triangular.default, square[0, 0].triu(), f(5, 7), upper=True)
    yield case(aten.linalg_cross.default, f(5, 3, 7), f(5, 3, 1), dim=1)
