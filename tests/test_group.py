from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed._local_tensor import LocalTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from sp_compile.distributed import group as sp
from sp_compile.distributed.words import timeout_of
from sp_compile.errors import ConfigurationError
from sp_compile.tools.simulation import fake_world, simulate
from tests.gloo_pool import GlooPool, RankFailure, RankTimeout


def ranks_of(group: dist.ProcessGroup | None) -> list[int]:
    assert group is not None
    return dist.get_process_group_ranks(group)


@pytest.mark.parametrize(
    ("rank", "size", "sp_ranks", "dp_ranks"),
    [
        (0, None, [0, 1, 2, 3, 4, 5], [0]),
        (0, 1, [0], [0, 1, 2, 3, 4, 5]),
        (3, 2, [2, 3], [1, 3, 5]),
        (4, 3, [3, 4, 5], [1, 4]),
    ],
)
def test_contiguous_ranks_form_an_sp_group(
    rank: int, size: int | None, sp_ranks: list[int], dp_ranks: list[int]
) -> None:
    with fake_world(6, rank):
        sp.init_sequence_parallel(size)
        assert ranks_of(sp.get_sequence_parallel_group()) == sp_ranks
        assert ranks_of(sp.get_data_parallel_group()) == dp_ranks
        assert sp.get_sequence_parallel_rank() == sp_ranks.index(rank)
        assert sp.get_sequence_parallel_world_size() == len(sp_ranks)
        assert sp.get_data_parallel_rank() == dp_ranks.index(rank)
        assert sp.get_data_parallel_world_size() == len(dp_ranks)


@pytest.mark.parametrize(
    ("shape", "names", "sp_ranks", "dp_ranks"),
    [
        ((8,), ("sp",), [0, 1, 2, 3, 4, 5, 6, 7], [5]),
        ((2, 4), ("dp", "sp"), [4, 5, 6, 7], [1, 5]),
        ((4, 2), ("sp", "dp"), [1, 3, 5, 7], [4, 5]),
        ((2, 2, 2), ("pp", "sp", "dp"), [5, 7], [0, 1, 4, 5]),
    ],
)
def test_the_dimension_sp_of_a_mesh(
    shape: tuple[int, ...], names: tuple[str, ...], sp_ranks: list[int], dp_ranks: list[int]
) -> None:
    with fake_world(8, rank=5):
        sp.init_sequence_parallel(device_mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
        assert ranks_of(sp.get_sequence_parallel_group()) == sp_ranks
        assert ranks_of(sp.get_data_parallel_group()) == dp_ranks


def test_the_library_owns_its_groups() -> None:
    with fake_world(4):
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("sp",))
        assert mesh.get_group("sp") is dist.group.WORLD
        for device_mesh in (mesh, None):
            sp.init_sequence_parallel(device_mesh=device_mesh)
            assert sp.get_sequence_parallel_group() is not dist.group.WORLD
        sp.init_sequence_parallel(1)
        assert sp.get_data_parallel_group() is not dist.group.WORLD


@pytest.mark.parametrize("size", [4, 0, -2, 12])
def test_a_size_that_does_not_divide_the_world(size: int) -> None:
    with fake_world(6):
        with pytest.raises(ConfigurationError) as caught:
            sp.init_sequence_parallel(size)
        assert not sp.is_sequence_parallel_initialized()
    assert f"sequence_parallel_size={size} does not divide the 6 ranks" in str(caught.value)
    assert "It may be 1, 2, 3, 6." in str(caught.value)


def test_a_mesh_that_cannot_be_used() -> None:
    with fake_world(4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        with pytest.raises(ConfigurationError, match="'sp': its dimensions are 'dp', 'tp'"):
            sp.init_sequence_parallel(device_mesh=mesh)
        with pytest.raises(ConfigurationError, match="'sp': its dimensions are 'dp', 'tp'"):
            sp.resolve_group(mesh)
        with pytest.raises(ConfigurationError, match="'sp': it has no names"):
            sp.init_sequence_parallel(device_mesh=init_device_mesh("cpu", (2, 2)))
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
        with pytest.raises(ConfigurationError, match=r"covers 2 of the 4 ranks.*whole mesh"):
            sp.init_sequence_parallel(device_mesh=mesh["sp"])
        with pytest.raises(ConfigurationError, match=r"=4, but the dimension 'sp'.* has 2 ranks"):
            sp.init_sequence_parallel(4, device_mesh=mesh)


def test_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigurationError, match="Launch with `torchrun"):
        sp.init_sequence_parallel()
    assert sp.get_sequence_parallel_group() is None
    assert sp.get_data_parallel_group() is None
    assert (sp.get_sequence_parallel_rank(), sp.get_sequence_parallel_world_size()) == (0, 1)
    assert (sp.get_data_parallel_rank(), sp.get_data_parallel_world_size()) == (0, 1)


@pytest.mark.parametrize(("gpus", "backend"), [(False, "gloo"), (True, "nccl")])
def test_under_a_launcher(monkeypatch: pytest.MonkeyPatch, gpus: bool, backend: str) -> None:
    called: list[object] = []

    def init_fake(name: str, timeout: timedelta | None) -> None:
        called.extend([name, timeout])
        init_process_group("fake", rank=0, world_size=4, store=FakeStore())

    init_process_group = dist.init_process_group
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", called.append)
    monkeypatch.setattr(dist, "init_process_group", init_fake)
    sp.init_sequence_parallel(timeout=7)
    assert called == ([3] if gpus else []) + [backend, timedelta(seconds=7)]
    assert sp.get_sequence_parallel_world_size() == 4
    sp.destroy_sequence_parallel()
    assert dist.is_initialized()
    dist.destroy_process_group()


def timeouts() -> list[timedelta | None]:
    groups = sp.get_sequence_parallel_group(), sp.get_data_parallel_group(), sp.get_data_group()
    return [timeout_of(group) for group in groups if group is not None]


@pytest.mark.parametrize(
    ("given", "seconds"), [(None, 70), (3, 3), (2.5, 2.5), (timedelta(minutes=2), 120), (timedelta(hours=3), 10800)]
)
def test_all_groups_have_the_timeout_of_the_world_or_the_one_given(
    given: timedelta | float | None, seconds: float
) -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=70))
    try:
        sp.init_sequence_parallel(timeout=given)
        assert timeouts() == [timedelta(seconds=seconds)] * 3
        sp.init_sequence_parallel()
        assert timeouts() == [timedelta(seconds=70)] * 3
        sp.init_sequence_parallel(device_mesh=init_device_mesh("cpu", (1,), mesh_dim_names=("sp",)), timeout=given)
        assert timeouts() == [timedelta(seconds=seconds)] * 3
    finally:
        sp.destroy_sequence_parallel()
        dist.destroy_process_group()


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), True, "30", timedelta(0), timedelta.max])
def test_a_timeout_that_is_no_time(timeout: Any) -> None:
    with fake_world(2):
        sp.init_sequence_parallel()
        with pytest.raises(ConfigurationError, match=r"timeout=.* It takes seconds or a datetime.timedelta"):
            sp.init_sequence_parallel(timeout=timeout)
        assert sp.get_sequence_parallel_world_size() == 2, "the groups that there were are still there"


def test_groups_that_cannot_all_be_made_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    make, made = dist.new_subgroups_by_enumeration, []

    def fail_at_the_third(*args: Any, **kwargs: Any) -> Any:
        if len(made) == 2:
            raise RuntimeError("a rank did not come")
        made.append(make(*args, **kwargs)[0])
        return made[-1], None

    with fake_world(4):
        monkeypatch.setattr(dist, "new_subgroups_by_enumeration", fail_at_the_third)
        with pytest.raises(RuntimeError, match="a rank did not come"):
            sp.init_sequence_parallel(2)
        assert not sp.is_sequence_parallel_initialized()
        for group in made:
            with pytest.raises(ValueError, match="Invalid process group"):
                dist.destroy_process_group(group)


def test_without_an_sp_group_every_rank_is_data_parallel() -> None:
    with fake_world(4, rank=3):
        assert sp.get_sequence_parallel_world_size() == 1
        assert (sp.get_data_parallel_rank(), sp.get_data_parallel_world_size()) == (3, 4)


def test_the_epoch_rises_with_every_change() -> None:
    epochs = [sp.current_epoch()]
    with fake_world(4):
        for size in (None, 2, 4):
            sp.init_sequence_parallel(size)
            epochs.append(sp.current_epoch())
        sp.destroy_sequence_parallel()
        epochs.append(sp.current_epoch())
        sp.init_sequence_parallel()
        epochs.append(sp.current_epoch())
        dist.destroy_process_group()
        assert not sp.is_sequence_parallel_initialized()
        epochs.append(sp.current_epoch())
        dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
        assert sp.get_sequence_parallel_group() is None
    assert epochs == sorted(set(epochs))
    last = sp.current_epoch()
    sp.destroy_sequence_parallel()
    assert sp.current_epoch() == last


def test_resolve_group() -> None:
    with fake_world(4):
        assert sp.resolve_group(None) is None
        sp.init_sequence_parallel()
        assert sp.resolve_group(None) is sp.get_sequence_parallel_group()
        assert sp.resolve_group(dist.group.WORLD) is dist.group.WORLD
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sp", "dp"))
        assert ranks_of(sp.resolve_group(mesh)) == [0, 2]
        assert ranks_of(sp.resolve_group(mesh["dp"])) == [0, 1]


@pytest.mark.parametrize(("world_size", "size"), [(3, 3), (4, 2), (4, 4), (4, 1), (1, 1)])
def test_rank_tensor_differs_per_simulated_rank(world_size: int, size: int) -> None:
    with simulate(world_size, size):
        group, data_parallel = sp.get_sequence_parallel_group(), sp.get_data_parallel_group()
        assert group is not None and data_parallel is not None
        place, column = sp.rank_tensor(group, "cpu"), sp.rank_tensor(data_parallel, "cpu")
        assert isinstance(place, LocalTensor) and isinstance(column, LocalTensor)
        assert place.dtype == torch.int64
    for rank in range(world_size):
        assert place._local_tensors[rank].tolist() == [rank % size]
        assert column._local_tensors[rank].tolist() == [rank // size]


def test_rank_tensor_in_a_backend_under_the_simulator() -> None:
    places: list[torch.Tensor] = []

    def backend(graph_module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        group = sp.get_sequence_parallel_group()
        assert group is not None
        places.append(sp.rank_tensor(group, "cpu"))
        return lambda x: (x + places[0],)

    with simulate(3):
        result = torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2))
        assert isinstance(places[0], LocalTensor) and isinstance(result, LocalTensor)
        assert [t.tolist() for t in result._local_tensors.values()] == [[0, 0], [1, 1], [2, 2]]


def test_rank_tensor_outside_the_simulator() -> None:
    with fake_world(4, rank=3):
        sp.init_sequence_parallel(2)
        group = sp.get_sequence_parallel_group()
        assert group is not None
        assert type(sp.rank_tensor(group, "cpu")) is torch.Tensor
        assert sp.rank_tensor(group, "cpu").tolist() == [1]


def place_and_sum(factor: int) -> tuple[int, int, list[int]]:
    group = sp.get_sequence_parallel_group()
    assert group is not None
    rank = sp.rank_tensor(group, "cpu")
    total = factor * (rank + 1)
    dist.all_reduce(total, group=group)
    return sp.get_sequence_parallel_world_size(), int(total), rank.tolist()


def ddp_gradient() -> list[float]:
    sp.init_sequence_parallel(1)
    model = DistributedDataParallel(torch.nn.Linear(2, 1), process_group=sp.get_data_parallel_group())
    model(torch.full((1, 2), 1.0 + 2.0 * sp.get_data_parallel_rank())).sum().backward()
    gradient = model.module.weight.grad
    assert gradient is not None
    return [float(value) for value in gradient.flatten()]


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ConfigurationError("only rank 1")
    dist.barrier()


def wait_for_nobody() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


@pytest.mark.slow
def test_ddp_averages_over_the_data_parallel_group(gloo2: GlooPool) -> None:
    assert gloo2.run(ddp_gradient) == [[2.0, 2.0], [2.0, 2.0]]


@pytest.mark.slow
def test_gloo(gloo2: GlooPool) -> None:
    assert gloo2.run(place_and_sum, 10) == [(2, 30, [0]), (2, 30, [1])]
    with pytest.raises(ConfigurationError, match="only rank 1") as caught:
        gloo2.run(fail_on_rank_1)
    assert isinstance(caught.value.__cause__, RankFailure)
    assert "on rank 1 of 2" in str(caught.value.__cause__)
    assert "in fail_on_rank_1" in str(caught.value.__cause__)
    assert gloo2.run(place_and_sum, 1) == [(2, 3, [0]), (2, 3, [1])]  # by new processes, which take a while to start
    with pytest.raises(RankTimeout, match=r"wait_for_nobody: ranks \[0\] gave nothing"):
        gloo2.run(wait_for_nobody, timeout=2.0)
    assert gloo2.run(place_and_sum, 1) == [(2, 3, [0]), (2, 3, [1])]
