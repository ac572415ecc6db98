"""Sample calls of every registered overload, a file per family."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch._ops import OpOverload

from . import attention, contractions, images, linalg, losses, normalisation, pointwise, reductions, rows, views
from .brute_force import Case

FAMILIES = (
    pointwise,
    views,
    rows,
    contractions,
    images,
    attention,
    normalisation,
    reductions,
    losses,
    linalg,
)

CASES: dict[OpOverload, list[Case]] = defaultdict(list)
for _family in FAMILIES:
    torch.manual_seed(0)
    for _case in _family.cases():
        CASES[_case.target].append(_case)
