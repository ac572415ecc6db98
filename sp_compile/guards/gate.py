"""The process group that compiled graphs know: it lets a collective through once all ranks agree on what it is part of.

    graph -> _c10d_functional.all_to_all_single(.., "1, guarded") -> Gate -> admit -> the SP group

Two collectives that do not belong together must never meet. Of another size, gloo ends the process from a thread of
its own (`EnforceNotMet`), NCCL hangs; of the same size, the values of two calls are mixed in silence. Whatever runs a
graph, eagerly, through AOTAutograd or Inductor, forward or backward, looks its group up by name, so that this is the
one place that all of them pass. It costs some 5 us a collective.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group  # type: ignore[attr-defined]

COLLECTIVES = (
    "allreduce",
    "allreduce_coalesced",
    "allgather_into_tensor_coalesced",
    "alltoall_base",
    "reduce_scatter_tensor_coalesced",
    "broadcast",
)
"""What `_c10d_functional` launches; the names that torch gives them in a group that is written in Python."""

Admit = Callable[[int, tuple[Any, ...]], "Waiting | None"]
"""Called before collective number i of COLLECTIVES is launched with its arguments. An exception stops the launch."""

Waiting = Callable[[Any], None]
"""Waits for a launched collective in place of its `wait`."""


class Gate(dist.ProcessGroup):
    """Stands before a process group, registered under a name of its own."""

    def __init__(self, group: dist.ProcessGroup, admit: Admit) -> None:
        super().__init__(dist.get_rank(group), group.size())  # type: ignore[call-arg]
        self._to, self._admit = GroupName(group.group_name), admit
        self.registered_name = GroupName(f"{group.group_name}, guarded")
        _unregister_process_group(self.registered_name)  # one of a group of this name that was destroyed
        _register_process_group(self.registered_name, self)

    def close(self) -> None:
        """Nothing passes any more."""
        with suppress(RuntimeError):  # torch has forgotten all names with the world
            if _resolve_process_group(self.registered_name) is self:
                _unregister_process_group(self.registered_name)

    def _launch(self, index: int, args: tuple[Any, ...]) -> Any:
        waiting = self._admit(index, args)
        # By its name: somebody may have put another group in its place, to measure or to slow it down.
        work = getattr(_resolve_process_group(self._to), COLLECTIVES[index])(*args)
        return work if waiting is None else _Watched(work, waiting)


def _passing(index: int) -> Callable[..., Any]:
    return lambda self, *args: self._launch(index, args)


for _index, _name in enumerate(COLLECTIVES):
    setattr(Gate, _name, _passing(_index))


class _Watched(dist._Work):  # type: ignore[misc, name-defined]
    def __init__(self, work: Any, waiting: Waiting) -> None:
        super().__init__()
        self.work, self.waiting = work, waiting

    def wait(self, timeout: Any = None) -> bool:
        self.waiting(self.work)
        return True

    def get_future(self) -> Any:
        return self.work.get_future()
