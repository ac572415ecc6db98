"""What `explain` says is what two real ranks move: launches and bytes, forward and backward, counted at the group."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group

from sp_compile import Report, explain, get_sequence_parallel_group, measure_links, sp_backend
from sp_compile.planning.cost import received
from sp_compile.tools.comparison import relative_error

from .gloo_pool import GlooPool
from .models import MODELS, inputs_of
from .test_passes import Block

pytestmark = pytest.mark.slow


class CountingGroup(dist.ProcessGroup):
    """Passes every collective on to a group, and counts launches and the bytes that a rank receives from others."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())  # type: ignore[call-arg]
        self.group, self.launches, self.received = group, 0, 0.0

    def _count(self, made: Tensor, times: int = 1) -> None:
        self.launches += 1
        self.received += times * made.nbytes * (self.group.size() - 1) / self.group.size()

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        self._count(tensors[0], 2)
        return self.group.allreduce(tensors, opts)

    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        self._count(outputs[0])
        return self.group.allgather_into_tensor_coalesced(outputs, inputs, opts)

    def alltoall_base(self, output: Any, given: Any, output_sizes: Any, sizes: Any, opts: Any = None) -> Any:
        self._count(output)
        return self.group.alltoall_base(output, given, output_sizes, sizes, opts)


@contextmanager
def counting() -> Iterator[CountingGroup]:
    """The SP group, counting, in the place that functional collectives look it up."""
    group = get_sequence_parallel_group()
    assert group is not None
    counter = CountingGroup(group)
    _unregister_process_group(group.group_name)
    _register_process_group(group.group_name, counter)
    try:
        yield counter
    finally:
        _unregister_process_group(group.group_name)
        _register_process_group(group.group_name, group)


def llama() -> tuple[nn.Module, dict[str, Any]]:
    return MODELS["llama"](), {**inputs_of("llama", 32), "use_cache": False}


def block(length: int = 16, **keywords: Any) -> tuple[nn.Module, dict[str, Any]]:
    return Block(4, 2, "flag"), {"x": torch.randn(1, length, 12, **keywords)}


def frozen() -> tuple[nn.Module, dict[str, Any]]:
    """No gradient reaches q and its input; k and v have frozen weights and trained biases."""
    module, inputs = block()
    for part in (module.q, module.o):
        part.requires_grad_(False)  # type: ignore[union-attr]
    module.k.weight.requires_grad_(False)  # type: ignore[union-attr]
    return module, inputs


def halves() -> tuple[nn.Module, dict[str, Any]]:
    module, inputs = block()
    return module.bfloat16(), {"x": inputs["x"].bfloat16()}


class Extremes(nn.Module):
    """Reductions over the sequence: a maximum, whose backward counts the winners, and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(4, 2, "flag")

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return y.amax(1) + y.mean(1) + y[:, 3]


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(4), Block(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        out: Tensor = self.second(y)
        return out


class Repeated(nn.Module):
    """Three layers with breaks in between, which so share their graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


class Stem(nn.Module):
    """A strided convolution before attention, and a shift by a row after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv1d(12, 12, 3, 2, 1), Block(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.stem(x.mT).mT)
        return y + nn.functional.pad(y, (0, 0, 1, -1))


def grouped() -> tuple[nn.Module, dict[str, Any]]:
    """Written with `expand`."""
    return Block(8, 2, "expand"), {"x": torch.randn(1, 16, 12)}


def module_of(kind: type[nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
    return kind(), {"x": torch.randn(1, 16, 12)}


def launches_with_buckets(options: dict[str, Any]) -> tuple[int, float]:
    """Launches of a step with Inductor, and the largest error of a gradient."""
    alone, x = (each.double() for each in (Block(4, 2, "flag"), torch.randn(1, 16, 12)))
    model = copy.deepcopy(alone)
    compiled = torch.compile(model, backend=partial(sp_backend, options=options))
    with counting() as counter:
        compiled(x).square().sum().backward()
    alone(x).square().sum().backward()
    pairs = zip(alone.parameters(), model.parameters(), strict=True)
    return counter.launches, max(relative_error(a.grad, b.grad, 1e-2) for a, b in pairs)


@pytest.mark.parametrize(("megabytes", "buckets"), [(25, 1), (0.002, 3), (0, 8)])
def test_gradients_travel_in_buckets(gloo2: GlooPool, megabytes: float, buckets: int) -> None:
    """8 parameters of 4,960 bytes; with the exchanges of q, k, v and of the output, both ways, and the output."""
    for launches, error in gloo2.run(
        launches_with_buckets, {"gradient_bucket_mb": megabytes, "overlap": megabytes > 0}
    ):
        assert launches == 2 + 1 + 2 + buckets and error < 1e-5


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], dict[str, Any]]] = {
    "llama": (llama, {}),
    "outputs as shards": (block, {"outputs": "shard"}),
    "local gradients": (block, {"param_grads": "local"}),
    "bert": (lambda: (MODELS["bert"](), inputs_of("bert", 32)), {}),
    "all-gather-KV": (block, {"attention": "all_gather_kv"}),
    "replicated": (block, {"attention": "replicate"}),
    "an input with a gradient": (partial(block, requires_grad=True), {}),
    "frozen parameters": (frozen, {}),
    "8 heads on 2 KV heads": (grouped, {}),
    "halos": (partial(module_of, Stem), {}),
    "bfloat16": (halves, {}),
    "extremes": (partial(module_of, Extremes), {}),
    "a graph break": (partial(module_of, Broken), {}),
    "layers that share their graphs": (partial(module_of, Repeated), {}),
}
UNEVEN = {"17 rows": (partial(block, 17), {})}


def made(case: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    torch.manual_seed(0)
    make, options = {**CASES, **UNEVEN}[case]
    return *make(), options


def measured(case: str, inner: str, grad: bool = True) -> tuple[int, int, int, int]:
    """Launches and bytes of a real forward, then of a real backward of all its outputs."""
    module, inputs, options = made(case)
    options = {**options, "inner_backend": inner, "gradient_bucket_mb": 0}  # launches are told before buckets
    compiled = torch.compile(module, backend=partial(sp_backend, options=options), dynamic=False)
    with counting() as group, torch.set_grad_enabled(grad):
        outputs = compiled(**inputs)
        forward = group.launches, round(group.received)
        leaves = [x for x in torch.utils._pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]
        if leaves:
            torch.autograd.backward(leaves, [torch.ones_like(x) for x in leaves])
        return *forward, group.launches - forward[0], round(group.received) - forward[1]


def explained(case: str, padded: bool = False, grad: bool = True) -> tuple[int, int, int, int]:
    module, inputs, options = made(case)
    with torch.set_grad_enabled(grad):
        report: Report = explain(module, sp_size=2, options=options, **inputs)
    totals = report.totals
    forward, backward = totals.bytes_forward, totals.bytes_backward
    if padded:
        launches = [each for graph in report.graphs for each in graph.collectives]
        forward, backward = (sum(x.padded_forward for x in launches), sum(x.padded_backward for x in launches))
    return totals.launches_forward, forward, totals.launches_backward, backward


@pytest.mark.parametrize("case", CASES)
def test_explain_says_what_two_ranks_move(gloo2: GlooPool, case: str) -> None:
    for real in gloo2.run(measured, case, "aot_eager"):
        assert real == explained(case)
    assert real[0] > 0


def test_grouped_kv_heads_travel_before_they_are_repeated(gloo2: GlooPool) -> None:
    """q, 2 KV heads of k and of v in one launch, the output in one, and what the model returns."""
    rows, width = 16 // 2, 4 * 4  # of a rank; bytes of a head
    sent = rows * (8 + 2 + 2) * width // 2, rows * 8 * width // 2, rows * 12 * 4
    for launches, size, *_ in gloo2.run(measured, "8 heads on 2 KV heads", "aot_eager"):
        assert (launches, size) == (3, sum(sent))


def test_lowered_by_inductor_the_same_is_moved(gloo2: GlooPool) -> None:
    assert gloo2.run(measured, "bfloat16", "inductor") == [explained("bfloat16")] * 2


def test_without_gradients_nothing_is_sent_back(gloo2: GlooPool) -> None:
    for real in gloo2.run(measured, "bfloat16", "eager", False):
        assert real == explained("bfloat16", grad=False)
        assert real[2:] == (0, 0) < real[:2]  # another plan than in training: there is no backward to pay for


def test_what_transports_count_has_the_padding(gloo2: GlooPool) -> None:
    for real in gloo2.run(measured, "17 rows", "eager"):
        assert real == explained("17 rows", padded=True)
    launches, received, _, received_back = explained("17 rows")
    assert launches == real[0] and received < real[1] and received_back < real[3]


def test_a_planted_wrong_count_is_caught(gloo2: GlooPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half types that are said to be summed as they are, and not in float32."""

    def narrow(result: Tensor, reduced: bool, parts: int) -> int:
        return received(result.bfloat16() if reduced else result, reduced, parts)

    monkeypatch.setattr("sp_compile.tools.traffic.received", narrow)
    (real, _), planted = gloo2.run(measured, "bfloat16", "eager"), explained("bfloat16")
    assert real[:3] == planted[:3] and real[3] > planted[3]


def test_links_are_measured_and_the_same_on_all_ranks(gloo2: GlooPool) -> None:
    first, second = gloo2.run(measure_links)
    assert first == second
    assert 1e6 < first.bandwidth < 1e12 and 1e-7 < first.latency < 1
