"""Activation checkpointing, and what is saved for backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sp_compile import init_sequence_parallel, sp_backend
from sp_compile.tools.simulation import fake_world

from .equivalence import assert_equivalent, collectives, tokens
from .test_passes import Block


class Checkpointed(nn.Module):
    def __init__(self, how: Mapping[str, Any] | None, p: float) -> None:
        super().__init__()
        self.first, self.second, self.how, self.p = Block(3), Block(3), how, p

    def body(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(self.first(x).softmax(1).sin(), self.p)).mean(1)

    def forward(self, x: Tensor) -> Any:
        return self.body(x) if self.how is None else checkpoint(self.body, x * 1, **self.how)


def lowered(
    model: nn.Module,
    partition: Callable[..., Any] = min_cut_rematerialization_partition,
    parts: int = 2,
    **options: Any,
) -> tuple[list[Counter[str]], list[Tensor]]:
    """The collectives of the forward and the backward graph of 70 rows, and what waits between, but for vectors."""
    counts: list[Counter[str]] = []
    saved: list[list[Tensor]] = []

    def compiler(gm: fx.GraphModule, inputs: Any) -> Any:
        functional = [n.target for n in gm.graph.nodes if getattr(n.target, "namespace", "") == "_c10d_functional"]
        counts.append(Counter(target._opname for target in functional))
        outputs: Any = gm.graph.output_node().args[0]
        values = [each.meta["val"] for each in outputs if each is not None and each.op != "placeholder"]
        saved.append([v for v in values[1:] if isinstance(v, Tensor) and v.dim() > 1])
        return gm.forward

    inner = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition)
    with fake_world(parts):
        torch._dynamo.reset()
        init_sequence_parallel()
        compiled = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": inner, **options}))
        compiled(torch.randn(1, 70, 12)).sum().backward()
    torch._dynamo.reset()
    return counts, saved[0]


def bytes_of(values: Iterable[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in values)


@pytest.mark.parametrize("partition", [min_cut_rematerialization_partition, default_partition])
def test_a_checkpointed_region_is_computed_again_and_not_sent_for_again(partition: Callable[..., Any]) -> None:
    (forward, _), plain = lowered(Checkpointed(None, 0.0))
    # q, k and v of two sites and their way home, one softmax over tokens that borrows channels and returns, one mean
    assert forward == {"all_to_all_single": 6, "all_reduce": 1, "wait_tensor": 7}
    for how in ({"use_reentrant": False}, {"use_reentrant": True, "preserve_rng_state": False}):
        (again, backward), saved = lowered(Checkpointed(how, 0.1), partition)
        assert again == forward
        assert backward["all_to_all_single"] == 6
        assert bytes_of(saved) < bytes_of(plain)


class TwoBlocks(nn.Module):
    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(4), Block(4))
        if frozen:
            for part in (self.blocks[0].k, self.blocks[0].v):
                part.requires_grad_(False)  # type: ignore[operator, union-attr]

    def forward(self, x: Tensor) -> Any:
        return self.blocks(x)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("attention", ["ulysses", "all_gather_kv"])
def test_what_is_saved_for_backward_is_a_ranks_part(attention: str, frozen: bool) -> None:
    """Where K and V are gathered, they are gathered again in backward, and the causal mask is built again."""
    _, alone = lowered(TwoBlocks(frozen), parts=1)
    for parts in (2, 4):
        (_, backward), saved = lowered(TwoBlocks(frozen), parts=parts, attention=attention)
        rows = -(-70 // parts)
        saved = [value for value in saved if not {70, rows}.isdisjoint(value.shape)]  # no weights
        assert bytes_of(saved) <= bytes_of(alone) * rows / 70 + rows  # and which are padding
        if attention == "all_gather_kv":
            assert all(70 not in value.shape for value in saved)
            assert backward["all_gather_into_tensor"] == 2


def of_24_features(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = op is torch.ops.aten.addmm.default and args[1].shape[-1] == 24
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def saves_nothing() -> Any:
    return create_selective_checkpoint_contexts([])


def saves_linears() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default])


def saves_some() -> Any:
    return create_selective_checkpoint_contexts(of_24_features)


class Selective(nn.Module):
    def __init__(self, contexts: Callable[[], Any]) -> None:
        super().__init__()
        self.block, self.up, self.down = Block(3), nn.Linear(12, 24), nn.Linear(24, 12)
        self.contexts = contexts

    def body(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.block(x)).cos()).cos()

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.body, x * 1, use_reentrant=False, context_fn=self.contexts)


@pytest.mark.parametrize(("contexts", "again"), [(saves_nothing, 3), (saves_some, 2), (saves_linears, 0)])
def test_a_selective_checkpoint_saves_what_it_says_and_shards(contexts: Callable[[], Any], again: int) -> None:
    (graph,) = assert_equivalent(Selective(contexts).double(), (tokens(1, 7, 12),), parts=3)
    assert (
        collectives(graph) == ["gather_seq_scatter_heads_qkv", "gather_heads_scatter_seq", "gather_output_0"]
        and not graph.plan.fallbacks
    )
    counts: list[int] = []

    def compiler(gm: fx.GraphModule, inputs: Any) -> Any:
        counts.append(len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default)))
        return gm.forward

    inner = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)
    with fake_world(2):
        torch._dynamo.reset()
        init_sequence_parallel()
        model = torch.compile(Selective(contexts), backend=partial(sp_backend, options={"inner_backend": inner}))
        model(torch.randn(1, 7, 12)).sum().backward()
    torch._dynamo.reset()
    assert counts == [6, again]
