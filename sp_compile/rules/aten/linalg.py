"""Decompositions, inverses and determinants: every matrix by itself, batches pass.

Those that raise an error for a matrix that they cannot take (`linalg_cholesky`, `linalg_solve`) have no rule: on whole
values every rank raises it, and a program that catches it goes on alike on all.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..dims import fit, plain, wrap
from ..op_call import OpCall
from ..registry import rule
from ..rule import Dim, OpShardingRule, factors_of
from .pointwise import pointwise_rule

aten = torch.ops.aten


@rule(
    aten._linalg_det.default,
    aten._linalg_slogdet.default,
    aten._linalg_svd.default,
    aten._linalg_eigh.default,
    aten._linalg_solve_ex.default,
    aten.linalg_cholesky_ex.default,
    aten.linalg_inv_ex.default,
    aten.linalg_lu_factor_ex.default,
    aten.linalg_matrix_exp.default,
    aten.linalg_pinv.atol_rtol_tensor,
    aten.linalg_qr.default,
    aten.linalg_solve_triangular.default,
    because="every row of a matrix takes part in each of the others'",
)
def matrix_rule(call: OpCall) -> OpShardingRule | None:
    """`… m! n! -> … x! y!`, for any number of operands and of results, which may lack dimensions at the right."""
    first = call.operands[0].shape
    batch = plain(first[:-2], "b")
    ndim = len(first)
    operands: list[list[Dim]] = []
    for index, spec in enumerate(call.operands):
        if len(spec.shape) != ndim and spec.shape:
            return None  # torch tells a batch of vectors from a matrix by all sizes
        lead = [dim if size != 1 else () for dim, size in zip(batch, spec.shape[:-2], strict=False)]
        if any(size not in (1, own) for size, own in zip(spec.shape[:-2], first[:-2], strict=False)):
            return None
        operands.append([*lead, *plain(spec.shape[-2:], f"o{index}.")] if spec.shape else [])
    results: list[list[Dim]] = []
    for index, made in enumerate(spec for spec in call.results if spec is not None):
        if made.shape == (0,):
            results.append([()])
            continue
        own = plain(made.shape[len(batch) :], f"r{index}.")
        results.append([*batch, *own])
    named = {factor for dims in (*operands, *results) for dim in dims for factor in factors_of(dim) if factor[0] != "b"}
    return fit(call, operands, results, need_replication=frozenset(named))


@rule(aten.linalg_cross.default, because="the three components of a vector meet")
def cross_rule(call: OpCall) -> OpShardingRule | None:
    """`... x!, ... x! -> ... x!`"""
    passed, result = pointwise_rule(call), call.results[0]
    assert result is not None
    (at,) = wrap((call["dim"],), len(result.shape))
    return passed and replace(passed, need_replication=frozenset({f"d{at}"}))
