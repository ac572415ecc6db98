"""Which groups have a guard, from when to when: made with the group, given up with it, at exit and in a fork."""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import weakref

import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..distributed.group import accompany_groups
from ..errors import ConfigurationError, in_words, raised_at
from .guard import FORKED, Guard

_guards: weakref.WeakKeyDictionary[ProcessGroup, Guard] = weakref.WeakKeyDictionary()
_of_parent: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()
"""In a forked process: the groups that there were before."""


def guard_of(group: ProcessGroup) -> Guard | None:
    """The guard of an SP group. Returns None of ranks that one process simulates, and where there is no gloo.

    Raises ConfigurationError in a process that was forked from a rank.
    """
    if group in _of_parent:
        raise ConfigurationError(FORKED)
    backends = {group._get_backend(device).name() for device in group._device_types}
    if "fake" in backends or not dist.is_gloo_available() or group.size() == 1:
        return None
    if group not in _guards:
        _guards[group] = Guard(group)
    return _guards[group]


def start_guard(group: ProcessGroup) -> None:
    """Connect the ranks of a group, all of which call it, before one of them can be lost."""
    guard = guard_of(group)
    if guard is not None:
        guard.connect()


def stop_guard(group: ProcessGroup) -> None:
    """End what `start_guard` has begun."""
    guard = _guards.pop(group, None)
    if guard is not None:
        guard.close("destroyed its groups, or made others")


accompany_groups(start_guard, stop_guard)


@atexit.register
def _close_all() -> None:
    """An interpreter that ends does not wait for ranks that do not come, and says of what it ends."""
    error = getattr(sys, "last_value", None)  # that nobody caught
    for guard in list(_guards.values()):
        guard.close("" if error is None else f"ended by {in_words(error)} ({raised_at(error)})")


def _leave_to_parent() -> None:
    """In a forked process. Connections are its parent's, which would end with them.

    So would this process not: it does not have the threads that a destructor of gloo waits for. So nothing of the kind
    is ever destroyed here.
    """
    groups = list(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else []
    kept = [*groups, *(group._get_backend(device) for group in groups for device in group._device_types)]
    kept += [each for guard in _guards.values() for each in guard.connections()]
    for each in kept:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))
    _of_parent.update(groups)
    _guards.clear()


if hasattr(os, "register_at_fork"):  # where processes can fork
    os.register_at_fork(after_in_child=_leave_to_parent)
