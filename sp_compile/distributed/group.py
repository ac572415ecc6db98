"""The sequence-parallel (SP) group: which ranks share one sequence, and what place each has.

Of a world of 8 ranks with `init_sequence_parallel(4)`:

    SP groups              [0 1 2 3]  [4 5 6 7]        contiguous: the fastest links
    data-parallel groups   [0 4] [1 5] [2 6] [3 7]     the strided complement
    data groups            [0 1 2 3]  [4 5 6 7]        the SP ranks again, for `sp_compile.data`

All are new process groups of the library's own: no collective of ours is ever launched on WORLD
or on a group of the user's mesh, where it could interleave with the user's. Inputs move on a group
apart, so that a broadcast in flight never interleaves with the collectives of a compiled graph.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._local_tensor import enabled_local_tensor_mode
from torch.distributed._local_tensor._c10d import _prepare_collective_groups
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from sp_compile.distributed.words import delete_addresses, timeout_of
from sp_compile.errors import ConfigurationError

T = TypeVar("T")
log = logging.getLogger(__name__)

MESH_DIM_NAME = "sp"


@dataclass(frozen=True)
class SequenceParallelState:
    """The groups of this rank; each is `None` when there is no SP group."""

    epoch: int
    """Rises whenever the groups change, so that what was compiled for others can tell."""
    group: ProcessGroup | None = None
    data_parallel_group: ProcessGroup | None = None
    data_group: ProcessGroup | None = None
    world: ProcessGroup | None = None
    """The default group that the others were made in; they die with it."""
    optimize_ddp: bool | str | None = None
    """Dynamo's setting of that name, where it was switched off; it comes back with the end of the groups."""


_state = SequenceParallelState(epoch=0)


def init_sequence_parallel(
    sequence_parallel_size: int | None = None,
    *,
    device_mesh: DeviceMesh | None = None,
    timeout: timedelta | float | None = None,
) -> None:
    """Make the SP group, the data group and the data-parallel group of this rank. Every rank of the world calls it.

    Under `torchrun` without a process group it initialises one: nccl where there are GPUs (the
    current device becomes `LOCAL_RANK`), else gloo. A second call replaces the groups of the first.

    Args:
        sequence_parallel_size: P, in ranks; rank r joins SP group r // P. Default: the whole world.
        device_mesh: take the SP groups from this mesh's dimension "sp" instead; its other
            dimensions, flattened, are data parallel. It covers every rank of the world.
        timeout: how long a collective of these groups, and a call of `sp_compile.data`, waits for the other
            ranks: seconds or a timedelta. Default: the timeout of the default process group.

    Raises:
        ConfigurationError: P does not divide the world, the mesh has no dimension "sp" or covers
            a part of the world only, the timeout is no time, or there is neither a process group nor
            a launcher.
    """
    global _state
    patience = _timedelta_of(timeout)
    if not dist.is_initialized():
        _init_process_group_from_launcher(patience)
    sp_groups = (
        _contiguous_groups(sequence_parallel_size)
        if device_mesh is None
        else _groups_of_mesh(device_mesh, sequence_parallel_size)
    )
    destroy_sequence_parallel()
    world = dist.group.WORLD
    assert world is not None
    group, data_parallel_group, data_group = _new_groups(sp_groups, patience or timeout_of(world))
    optimize_ddp = _switch_off_ddp_optimizer() if group.size() > 1 else None
    _state = SequenceParallelState(_state.epoch + 1, group, data_parallel_group, data_group, world, optimize_ddp)
    torch._dynamo.reset()  # Dynamo does not guard on the group: what was compiled before compiles anew
    for begin, _ in _companions:
        begin(group)


def _new_groups(sp_groups: list[list[int]], timeout: timedelta | None) -> list[ProcessGroup]:
    """The SP group, the data-parallel group and the data group of this rank; none if one of them fails."""
    columns = [list(ranks) for ranks in zip(*sp_groups, strict=True)]
    made: list[ProcessGroup] = []
    try:
        for ranks, backend, description in (
            (sp_groups, None, "sequence_parallel"),
            (columns, None, "data_parallel"),
            (sp_groups, _data_backend(), "data"),
        ):
            # Without a timeout torch takes its own, not that of the world.
            group, _ = dist.new_subgroups_by_enumeration(ranks, timeout, backend, group_desc=description)
            made.append(group)
            delete_addresses(group)
    except BaseException:
        for group in made:
            dist.destroy_process_group(group)
        raise
    return made


def _timedelta_of(timeout: object) -> timedelta | None:
    if timeout is None:
        return None
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0.001 <= seconds < 1e9:
        raise ConfigurationError(
            f"timeout={timeout!r}. It takes seconds or a datetime.timedelta, at least a millisecond, or None for that "
            "of the default process group."
        )
    return timedelta(seconds=seconds)


def cuts_graphs_for_ddp() -> bool:
    """Whether Dynamo's DDP optimizer would cut the graphs of a model that is wrapped in DDP."""
    return torch._dynamo.utils.get_optimize_ddp_mode() == "ddp_optimizer"


def _switch_off_ddp_optimizer() -> bool | str | None:
    """Under `torch.compile(DDP(model))` it cuts graphs in mid-block, where the two ends of an attention part."""
    if not cuts_graphs_for_ddp():
        return None
    setting = torch._dynamo.config.optimize_ddp
    torch._dynamo.config.optimize_ddp = False
    log.debug("torch._dynamo.config.optimize_ddp is off: the DDP optimizer would cut graphs in mid-block")
    return setting


def destroy_sequence_parallel() -> None:
    """Destroy the groups that `init_sequence_parallel` made; nothing happens when there are none.

    The default process group stays, also where `init_sequence_parallel` initialised it: other
    groups may live in it. End it with `torch.distributed.destroy_process_group()`.
    """
    global _state
    state = _live_state()
    if state.group is None:
        return
    _state = SequenceParallelState(state.epoch + 1)
    if state.optimize_ddp is not None:
        torch._dynamo.config.optimize_ddp = state.optimize_ddp  # type: ignore[assignment]
    torch._dynamo.reset()
    for cached in _caches:
        cached.cache_clear()
    _forget_meshes()  # they keep their groups
    for _, end in _companions:
        end(state.group)
    for group in (state.group, state.data_parallel_group, state.data_group):
        assert group is not None
        dist.destroy_process_group(group)


_companions: list[tuple[Callable[[ProcessGroup], None], Callable[[ProcessGroup], None]]] = []


def accompany_groups(begin: Callable[[ProcessGroup], None], end: Callable[[ProcessGroup], None]) -> None:
    """Have `begin` called with every SP group that is made from now on, and `end` with it before it is destroyed."""
    _companions.append((begin, end))


_caches: WeakSet[functools._lru_cache_wrapper[object]] = WeakSet()


def cached_while_groups_last(function: Callable[[str], T]) -> Callable[[str], T]:
    """`functools.cache` of what refers to the groups; it is emptied when `destroy_sequence_parallel` ends them.

    A compiled callable may outlive its groups: torch's flight recorder remembers the stack of a process's last
    collectives, the code in it keeps what Dynamo compiled.
    """
    cached = functools.cache(function)
    _caches.add(cached)
    return cached


def is_sequence_parallel_initialized() -> bool:
    """Whether there is an SP group (which may be of one rank)."""
    return _live_state().group is not None


def current_epoch() -> int:
    """A number that rises when the groups change: what was compiled under another is stale."""
    return _live_state().epoch


def get_sequence_parallel_group() -> ProcessGroup | None:
    """The SP group of this rank, or `None` before `init_sequence_parallel`."""
    return _live_state().group


def get_data_group() -> ProcessGroup | None:
    """The ranks of the SP group in a process group apart, on which inputs move; `None` without one."""
    return _live_state().data_group


def get_sequence_parallel_rank() -> int:
    """This rank's place in its SP group, from 0; 0 without one."""
    group = _live_state().group
    return 0 if group is None else dist.get_rank(group)


def get_sequence_parallel_world_size() -> int:
    """P, the number of ranks that share a sequence; 1 without an SP group."""
    group = _live_state().group
    return 1 if group is None else group.size()


def get_data_parallel_group() -> ProcessGroup | None:
    """The ranks that have this rank's place in other SP groups.

    Without an SP group every rank has a sequence of its own, so that this is the default process
    group, or `None` where that is not initialised either.
    """
    state = _live_state()
    return dist.group.WORLD if state.group is None else state.data_parallel_group


def get_data_parallel_rank() -> int:
    """This rank's place in its data-parallel group, from 0; ranks of one SP group have the same."""
    group = get_data_parallel_group()
    return 0 if group is None else dist.get_rank(group)


def get_data_parallel_world_size() -> int:
    """The number of SP groups, that is of different sequences at a time."""
    group = get_data_parallel_group()
    return 1 if group is None else group.size()


def resolve_group(group: ProcessGroup | DeviceMesh | None) -> ProcessGroup | None:
    """The process group that the option `group` means.

    Args:
        group: a process group, as it is; of a mesh the dimension "sp", or the only one it has;
            `None` for the group that `init_sequence_parallel` made, if it was called.

    Raises:
        ConfigurationError: the mesh has several dimensions and none is named "sp".
    """
    if group is None:
        return get_sequence_parallel_group()
    if isinstance(group, ProcessGroup):
        return group
    if MESH_DIM_NAME in (group.mesh_dim_names or ()):
        return group.get_group(MESH_DIM_NAME)
    if group.ndim == 1:
        return group.get_group()
    raise ConfigurationError(_no_sp_dimension(group))


def mesh_of(group: ProcessGroup, given: ProcessGroup | DeviceMesh | None, device_type: str) -> DeviceMesh:
    """The one-dimensional mesh of an SP group: of the mesh that was `given` as the option `group`, or a new one."""
    _forget_meshes()  # it would answer with meshes that are equal, and whose groups may have been destroyed
    if isinstance(given, DeviceMesh):
        return given if given.ndim == 1 else given[MESH_DIM_NAME]
    return DeviceMesh.from_group(group, device_type, mesh_dim_names=(MESH_DIM_NAME,))


def _forget_meshes() -> None:
    """Clear what DTensor caches; `torch.distributed.tensor.debug`, which does so too, cannot do without numpy."""
    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
    torch._C._clear_DTensor_sharding_propagator_cache()


def rank_tensor(group: ProcessGroup, device: torch.device | str) -> Tensor:
    """This rank's place in `group` as data: int64 of shape `[1]` on `device`.

    Under `torch.distributed._local_tensor.LocalTensorMode`, where one process plays every rank and
    `dist.get_rank` knows of one only, it is a `LocalTensor` with the place of each.
    """
    simulator = enabled_local_tensor_mode()
    if simulator is None:
        return torch.tensor([dist.get_rank(group)], dtype=torch.int64, device=device)
    # The simulator's own view of a group and its siblings: member = offset of a sibling + rank.
    ranks, sibling_offsets, _ = _prepare_collective_groups(group)
    place = {start + rank: i for start in sibling_offsets for i, rank in enumerate(ranks)}
    return simulator.rank_map(lambda rank: torch.tensor([place[rank]], dtype=torch.int64, device=device))


def _live_state() -> SequenceParallelState:
    """The state, emptied if the user destroyed the world that its groups were made in."""
    global _state
    if _state.group is not None and _state.world is not dist.group.WORLD:
        _state = SequenceParallelState(_state.epoch + 1)
    return _state


def _init_process_group_from_launcher(timeout: timedelta | None) -> None:
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ConfigurationError(
            "there is no process group, and the environment has no RANK and WORLD_SIZE to make "
            "one from. Launch with `torchrun --nproc-per-node=N script.py`, or call "
            "torch.distributed.init_process_group first."
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl", timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def _data_backend() -> str | None:
    """The backend of the world; where that is for GPUs only, with gloo beside it for what is on the CPU."""
    backend: str = dist.get_backend_config()
    return None if "cpu:" in backend else f"cpu:gloo,{backend}"


def _contiguous_groups(size: int | None) -> list[list[int]]:
    world_size = dist.get_world_size()
    size = world_size if size is None else size
    if size < 1 or world_size % size:
        valid = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ConfigurationError(
            f"sequence_parallel_size={size} does not divide the {world_size} ranks of the world. It may be {valid}."
        )
    return [list(range(first, first + size)) for first in range(0, world_size, size)]


def _groups_of_mesh(mesh: DeviceMesh, size: int | None) -> list[list[int]]:
    names = mesh.mesh_dim_names or ()
    if MESH_DIM_NAME not in names:
        raise ConfigurationError(_no_sp_dimension(mesh))
    ranks = mesh.mesh.movedim(names.index(MESH_DIM_NAME), -1)
    mesh_size, world_size = ranks.shape[-1], dist.get_world_size()
    if ranks.numel() != world_size:
        raise ConfigurationError(
            f"the device mesh {names} covers {ranks.numel()} of the {world_size} ranks of the "
            "world. Pass the whole mesh, not a slice such as mesh['sp']: the data-parallel group "
            "is found in its other dimensions."
        )
    if size is not None and size != mesh_size:
        raise ConfigurationError(
            f"sequence_parallel_size={size}, but the dimension {MESH_DIM_NAME!r} of the device "
            f"mesh has {mesh_size} ranks. Leave one of the two out."
        )
    groups: list[list[int]] = ranks.reshape(-1, mesh_size).tolist()
    return groups


def _no_sp_dimension(mesh: DeviceMesh) -> str:
    names = mesh.mesh_dim_names
    has = f"its dimensions are {', '.join(map(repr, names))}" if names else "it has no names"
    return (
        f"the device mesh of shape {tuple(mesh.shape)} has no dimension named "
        f"{MESH_DIM_NAME!r}: {has}. Name the dimension of the sequence {MESH_DIM_NAME!r}."
    )
