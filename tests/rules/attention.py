"""Fused attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .brute_force import SDPA, Case, bools, case, f


def cases() -> Iterator[Case]:
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
