"""Small programs in one table, a file per family."""

from . import (
    attention,
    dresses,
    experts,
    losses,
    masks,
    mixing,
    modules,
    regions,
    shifts,
    sizes,
    states,
    streams,
    tokens,
    windows,
)
from .table import PROGRAMS, Parts, Program, moved, wasted

__all__ = [
    "PROGRAMS",
    "Parts",
    "Program",
    "attention",
    "dresses",
    "experts",
    "losses",
    "masks",
    "mixing",
    "modules",
    "moved",
    "regions",
    "shifts",
    "sizes",
    "states",
    "streams",
    "tokens",
    "wasted",
    "windows",
]
