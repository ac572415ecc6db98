"""Losses."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .brute_force import Case, aten, case, constant, f, ids, labels, positive


def cases() -> Iterator[Case]:
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
        yield constant(case(aten.soft_margin_loss.default, f(5, 7), f(5, 7).sign(), reduction), 1)
        likely = positive(5, 7) / 2
        yield constant(case(aten.binary_cross_entropy.default, likely, likely.flip(0), positive(7), reduction), 2)
        bce = aten.binary_cross_entropy_with_logits.default
        yield constant(case(bce, f(5, 7), positive(5, 7), None, positive(7), reduction), 2)
        yield constant(case(bce, f(5, 7), positive(5, 7), positive(5, 1), None, reduction), 2)
    yield case(ce, f(5, 7).bfloat16(), labels(7, 5))
    yield case(ce, f(5, 7), torch.full((5,), -100))
