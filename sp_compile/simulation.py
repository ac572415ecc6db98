"""P ranks in one process, for tests: torch's LocalTensorMode over a fake process group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._C import DispatchKey
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from sp_compile.group import destroy_sequence_parallel, init_sequence_parallel

flex_attention = torch.ops.higher_order.flex_attention


@contextmanager
def fake_world(world_size: int, rank: int = 0) -> Iterator[None]:
    """A process group of `world_size` ranks of which this process is one, and no data moves."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        destroy_sequence_parallel()
        dist.destroy_process_group()


@contextmanager
def simulate(world_size: int, sequence_parallel_size: int | None = None) -> Iterator[LocalTensorMode]:
    """Run the body as `world_size` ranks at once, in SP groups of P (default: one group).

    Tensors made inside are `LocalTensor`s, with a value per rank in `_local_tensors[rank]`; plain
    tensors from outside are the same on all. Clear `.grad` between two compiled runs of a model:
    a leftover `LocalTensor` there breaks the next trace.
    """
    torch._dynamo.reset()
    with fake_world(world_size):
        init_sequence_parallel(sequence_parallel_size)
        with _Ranks(world_size) as mode, _flex_attention_on_each_rank():
            yield mode
    torch._dynamo.reset()


def bare(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
    """An inner backend that runs the graph as it is, on simulated ranks.

    A view of what no other output or input shares is copied: behind a graph break Dynamo replays how a view of a
    subclass was made, and raises if a dimension of size 1 gets another stride, as that of a batch of 1.
    """

    def run(*args: Any) -> tuple[Any, ...]:
        outputs = gm(*args)
        shared = Counter(map(_storage, (*args, *outputs)))
        alone = [isinstance(each, LocalTensor) and each._is_view() and shared[_storage(each)] == 1 for each in outputs]
        return tuple(each.clone() if copied else each for each, copied in zip(outputs, alone, strict=True))

    return run


def _storage(value: Any) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


class _Ranks(LocalTensorMode):
    """Every rank draws its random numbers itself, those like a tensor that all ranks share, too."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not func._schema.is_mutable:
            args, kwargs = pytree.tree_map_only(Tensor, self._on_all, (args, kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _on_all(self, x: Tensor) -> Tensor:
        return x if isinstance(x, LocalTensor) else LocalTensor(dict.fromkeys(self.ranks, x.detach()))


@contextmanager
def _flex_attention_on_each_rank() -> Iterator[None]:
    """LocalTensorMode knows no higher-order operator: its autograd kernel runs on the ranks one by one."""
    alone = flex_attention.py_kernels[DispatchKey.Autograd]

    def kernel(*args: Any) -> Any:
        leaves, spec = pytree.tree_flatten(args)
        if not any(isinstance(leaf, LocalTensor) for leaf in leaves):
            return alone(*args)
        return _OnEachRank.apply(spec, *leaves)  # type: ignore[no-untyped-call]

    with patch.dict(flex_attention.py_kernels, {DispatchKey.Autograd: kernel}):
        flex_attention._dispatch_cache.clear()
        yield
    flex_attention._dispatch_cache.clear()


class _OnEachRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: pytree.TreeSpec, *leaves: Any) -> tuple[Tensor, ...]:
        ctx.runs = {}
        ctx.trained = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves]
        ranks = next(leaf for leaf in leaves if isinstance(leaf, LocalTensor))._local_tensors
        with _disable_current_modes(), torch.enable_grad():
            for rank in ranks:
                own = [_of_rank(leaf, rank) for leaf in leaves]
                own = [x.requires_grad_() if t else x for x, t in zip(own, ctx.trained, strict=True)]
                ctx.runs[rank] = own, flex_attention(*pytree.tree_unflatten(own, spec))
            made = [{rank: out[i].detach() for rank, (_, out) in ctx.runs.items()} for i in range(3)]
        out, lse, max_scores = (LocalTensor(each) for each in made)
        ctx.mark_non_differentiable(max_scores)
        return out, lse, max_scores

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        found: dict[Any, list[Tensor | None]] = {}
        with _disable_current_modes():
            for rank, (own, out) in ctx.runs.items():
                wanted = [x for x, t in zip(own, ctx.trained, strict=True) if t]
                given = [_of_rank(grad, rank) for grad in grads[:2]]
                found[rank] = list(torch.autograd.grad(out[:2], wanted, given))
            summed = iter([LocalTensor({r: found[r][i] for r in found}) for i in range(sum(ctx.trained))])
        return None, *(next(summed) if t else None for t in ctx.trained)


def _of_rank(value: Any, rank: Any) -> Any:
    value = value._local_tensors[rank] if isinstance(value, LocalTensor) else value
    return value.detach() if isinstance(value, Tensor) else value
