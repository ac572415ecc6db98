"""Small programs in one table, a file per family."""

from . import attention, losses, masks, mixing, modules, states, streams
from .table import PROGRAMS, Parts, Program, moved

__all__ = [
    "PROGRAMS",
    "Parts",
    "Program",
    "attention",
    "losses",
    "masks",
    "mixing",
    "modules",
    "moved",
    "states",
    "streams",
]
