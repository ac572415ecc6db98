"""Groups on real ranks: one that changes, one of a single rank, and DDP around a model."""

from __future__ import annotations

import copy
import os
import time
from contextlib import closing
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from sp_compile import (
    destroy_sequence_parallel,
    get_data_parallel_group,
    init_sequence_parallel,
    rewritten_graphs,
    sp_backend,
)
from sp_compile.data import sync_inputs

from .equivalence import gradient_errors, known_graphs, rewritten_since
from .gloo_pool import GlooPool
from .test_passes import Block

pytestmark = pytest.mark.slow


def forward(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """The output, and how many graphs were rewritten for it."""
    known = known_graphs()
    out = model(x).detach()
    return out, len(rewritten_since(known))


def with_changing_groups() -> list[tuple[float, int]]:
    """One compiled model before, with, without and again with an SP group."""
    model, x = Block(), torch.randn(1, 7, 12)
    expected = model(x).detach()
    compiled = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": "eager"}))
    destroy_sequence_parallel()
    seen = [forward(compiled, x)]
    init_sequence_parallel()
    seen += [forward(compiled, x), forward(compiled, x)]
    init_sequence_parallel(1)
    seen.append(forward(compiled, x))
    init_sequence_parallel(2)
    seen.append(forward(compiled, x))
    return [(float((out - expected).abs().max()), count) for out, count in seen]


def test_a_changed_group_recompiles(gloo2: GlooPool) -> None:
    for seen in gloo2.run(with_changing_groups):
        assert all(error < 1e-5 for error, _ in seen)
        assert [count > 0 for _, count in seen] == [False, True, False, False, True]


def held() -> list[int]:
    """Descriptors, threads, and keys in the store of the job."""
    world = dist.group.WORLD
    assert world is not None
    return [len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), world.get_group_store().num_keys()]


def rounds(outputs: str, as_mesh: bool) -> list[list[int]]:
    """What a process holds after each of ten rounds: groups, a graph that is compiled and called, no groups."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "sp")) if as_mesh else None
    model, found = Block(), list[list[int]]()
    options = {"inner_backend": "eager", "outputs": outputs}
    for _ in range(10):
        init_sequence_parallel(device_mesh=mesh)
        torch.compile(model, backend=partial(sp_backend, options=options))(torch.randn(1, 7, 12))
        list(sync_inputs(torch.ones(2)))
        destroy_sequence_parallel()
        ends = time.monotonic() + 3  # the guard's thread, and those of gloo, notice it a moment later
        while time.monotonic() < ends and (not found or held()[:2] != found[0][:2]):
            time.sleep(0.02)
        dist.barrier()  # what every rank deletes is gone
        found.append(held())
        dist.barrier()
    return found


def assert_given_back(pool: GlooPool, outputs: str, as_mesh: bool) -> None:
    for found in pool.run(rounds, outputs, as_mesh):
        print(found)
        assert found[-1] == found[0]


def test_what_a_group_takes_is_given_back(gloo2: GlooPool) -> None:
    assert_given_back(gloo2, "dtensor", as_mesh=True)


def test_what_a_group_takes_of_a_store_by_tcp_is_given_back() -> None:
    with closing(GlooPool(2, tcp=True)) as pool:
        assert_given_back(pool, "gather", as_mesh=False)


def with_ddp() -> float:
    """`param_grads="local"` under a DDP that averages over the SP ranks as well."""
    alone = Block()
    model = copy.deepcopy(alone)
    x = torch.randn(1, 7, 12)
    alone(x).square().mean().backward()
    options = {"inner_backend": "aot_eager", "param_grads": "local"}
    ddp = nn.parallel.DistributedDataParallel(torch.compile(model, backend=partial(sp_backend, options=options)))
    ddp(x).square().mean().backward()
    moved = str(rewritten_graphs()[-1])
    assert "sp.scale_gradient" in moved and "sp.replicate" not in moved
    return max(gradient_errors(alone, model).values())


def test_local_gradients_under_ddp(gloo2: GlooPool) -> None:
    assert max(gloo2.run(with_ddp)) < 1e-5


class TwoBuckets(nn.Module):
    """More than a megabyte of parameters in each half, which DDP makes two buckets of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down, self.second = Block(), nn.Linear(12, 22000), nn.Linear(22000, 12), Block(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.down(self.up(self.first(x)).sin()))
        return out


def compiled_after_ddp() -> tuple[float, int, bool]:
    """`torch.compile(DDP(model))`: Dynamo's DDP optimizer would cut it in two."""
    alone = TwoBuckets()
    model = copy.deepcopy(alone)
    x = torch.randn(1, 7, 12)
    alone(x).square().mean().backward()
    known = known_graphs()
    ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
    torch.compile(ddp, backend=partial(sp_backend, options={"inner_backend": "aot_eager"}))(
        x
    ).square().mean().backward()
    graphs = rewritten_since(known)
    destroy_sequence_parallel()
    return max(gradient_errors(alone, model).values()), len(graphs), bool(torch._dynamo.config.optimize_ddp)


def test_ddp_around_the_model_does_not_cut_its_graph(gloo2: GlooPool) -> None:
    for error, graphs, restored in gloo2.run(compiled_after_ddp):
        assert error < 1e-5 and graphs == 1 and restored


def compiled_after_ddp_with_a_group() -> str:
    destroy_sequence_parallel()
    ddp = nn.parallel.DistributedDataParallel(Block())
    try:
        torch.compile(ddp, backend="sp_compile", options={"group": dist.group.WORLD})(torch.randn(1, 7, 12))
    except Exception as error:
        return str(error)
    return ""


def test_ddp_that_would_cut_the_graph_is_refused(gloo2: GlooPool) -> None:
    for error in gloo2.run(compiled_after_ddp_with_a_group):
        assert "ConfigurationError" in error and "optimize_ddp = False" in error


def with_data_parallel() -> float:
    """Four ranks, two by two: gradients averaged over the data-parallel group only."""
    init_sequence_parallel(1)
    alone = Block()
    model = copy.deepcopy(alone)
    batches = torch.randn(2, 1, 7, 12)
    for batch in batches:
        (alone(batch).square().mean() / 2).backward()
    compiled = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": "eager"}))
    compiled(batches[dist.get_rank()]).square().mean().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=get_data_parallel_group())
        parameter.grad /= 2
    return max(gradient_errors(alone, model).values())


def test_a_group_of_one_is_plain_data_parallel(gloo2: GlooPool) -> None:
    assert max(gloo2.run(with_data_parallel)) < 1e-5
