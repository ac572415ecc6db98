"""Norms and softmax."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .brute_force import Case, aten, case, constant, f, positive


def cases() -> Iterator[Case]:
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

    yield case(aten.group_norm.default, f(2, 6, 5, 7) + 3, 3, f(6), f(6))
    yield case(aten.group_norm.default, f(2, 6), 3)
    yield case(aten.group_norm.default, f(2, 6, 5).bfloat16(), 6, f(6).bfloat16(), None)
    yield case(aten.group_norm.default, f(1, 6, 5), 1, f(6), None)
    for shape in ((5, 7), (5, 7, 3), (2, 3, 5, 7), (1, 3, 5), (5, 1, 2)):
        x, c = f(*shape) + 3, shape[1]
        train = aten._native_batch_norm_legit_functional.default
        yield constant(case(train, x, f(c), f(c), f(c), positive(c), True, 0.1, 1e-5), 3, 4)
        yield constant(case(train, x, None, None, f(c), positive(c), True, 1.0, 1e-2), 1, 2)
        yield case(aten._native_batch_norm_legit.no_stats, x, f(c), None, True, 0.1, 1e-5)
        evaluated = aten._native_batch_norm_legit_no_training.default
        yield constant(case(evaluated, x, f(c), f(c), f(c), positive(c), 0.1, 1e-5), 3, 4)
        yield constant(case(train, x, f(c), f(c), f(c), positive(c), False, 0.1, 1e-5), 3, 4)
    half = f(5, 7, 3).bfloat16(), f(7).float(), f(7).float(), f(7).float(), positive(7).float()
    yield constant(case(aten._native_batch_norm_legit_functional.default, *half, True, 0.1, 1e-5), 3, 4)
    for dim in (0, 2):
        yield case(
            aten._weight_norm_interface.default,
            f(5, 3, 7),
            f(*(n if at == dim else 1 for at, n in enumerate((5, 3, 7)))),
            dim,
        )
