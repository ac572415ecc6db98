"""Small programs in one table, a file per family."""

from . import (
    attention,
    borrowers,
    dresses,
    experts,
    losses,
    masks,
    mixing,
    modules,
    shifts,
    sites,
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
    "borrowers",
    "dresses",
    "experts",
    "losses",
    "masks",
    "mixing",
    "modules",
    "moved",
    "shifts",
    "sites",
    "sizes",
    "states",
    "streams",
    "tokens",
    "wasted",
    "windows",
]
