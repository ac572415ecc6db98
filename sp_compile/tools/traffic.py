"""What the collectives of a rewritten graph launch, forward and backward, counted on fake tensors.

    gather_seq_scatter_heads_q = sp.all_to_all(q, …)     1 launch forward, 1 backward
    slice_x = sp.shard(x, …)                             0 forward, 1 backward if x takes a gradient
    replicate_w = sp.replicate(w)                        0 forward, 1 backward if w does

    k = sp.all_gather_replicate(k_local, …)              1 forward, 2 backward: it is gathered again

The graph runs under autograd on values without data, and every launch is noted with the node that it is of. So the
pairing of an op and its backward is that of `sp_compile.ops.sp_ops`, and not written down a second time. Backward is
that of AOTAutograd: of all outputs that take a gradient, to all inputs that do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from ..ir.graph import leaving_no_symbols
from ..ops.transport import as_transported
from ..planning.cost import packed_bytes, received, sent_by, shared_bytes

_LABEL = "sp_compile.traffic"
_KINDS = ("all_reduce", "all_gather_into_tensor", "all_to_all_single")


@dataclass
class Traffic:
    """What one node launches; bytes are received per rank, the rank's own block excluded."""

    op: str
    """`all_to_all`, of `sp::`."""
    launches: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    """Forward (False) and backward (True)."""
    bytes: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    """Without padding."""
    padded: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    """With it."""


def traffic(module: fx.GraphModule, inputs: Sequence[Any], parts: int) -> Mapping[str, Traffic]:
    """What the nodes of a graph that `insert_collectives` wrote launch on each of `parts` ranks, by name.

    `inputs` are fake values for its placeholders but the last, the rank. Runs under the gradient mode of the caller.
    Higher-order operators and opaque modules pass gradients from all their results to all their operands.
    """
    mode = next((x.fake_mode for x in inputs if hasattr(x, "fake_mode")), None) or FakeTensorMode()
    counter = _Counter(module.graph, parts)
    with _grad_mode_restored(), mode, leaving_no_symbols(mode), enable_python_dispatcher(), counter:
        values = [_fresh(x) for x in inputs]
        results = _Run(module, counter, mode).run(*values, torch.zeros(1, dtype=torch.int64))
        made = [x for x in results if isinstance(x, Tensor) and x.requires_grad]
        wanted = [x for x in values if isinstance(x, Tensor) and x.requires_grad]
        if made and wanted:
            counter.backward = True
            torch.autograd.grad(made, wanted, [torch.empty_like(x) for x in made], allow_unused=True)
    for name, noted in counter.found.items():
        if noted.launches[True] and counter.nodes[name].meta.get("recompute") is CheckpointPolicy.MUST_RECOMPUTE:
            for counts in (noted.launches, noted.bytes, noted.padded):
                counts[True] += counts[False]
    return counter.found


def _fresh(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


@contextmanager
def _grad_mode_restored() -> Iterator[None]:
    before = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(before)


class _Counter(TorchDispatchMode):
    """Notes each launch with the node that runs, or in backward the one whose gradient is taken."""

    def __init__(self, graph: fx.Graph, parts: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes = {node.name: node for node in graph.nodes}
        self.parts = parts
        self.running = ""
        self.backward = False
        self.found: dict[str, Traffic] = {}
        self.trained: set[str] = set()
        """The values that a gradient goes to, of those that are sent."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "_c10d_functional" and func._opname in _KINDS:
            self._note(func._opname, result)
        return result

    def _note(self, kind: str, result: Tensor) -> None:
        name = self.running
        if self.backward:
            running: Any = torch._C._current_autograd_node()
            name = running.metadata[_LABEL]
        node = self.nodes[name]
        assert isinstance(node.target, OpOverload)
        noted = self.found.setdefault(name, Traffic(node.target._opname))
        noted.launches[self.backward] += 1
        padded = received(result, kind == "all_reduce", self.parts)
        noted.padded[self.backward] += padded
        # Nothing that is reduced over ranks has padding.
        noted.bytes[self.backward] += padded if kind == "all_reduce" else self._without_padding(node, result)

    def _without_padding(self, node: fx.Node, result: Tensor) -> int:
        """Of several values that are sent together each dtype is one launch, and backward sends some of them."""
        if node.target is not torch.ops.sp.all_to_all_packed.default:
            return shared_bytes(node, self.parts)
        sizes = zip(sent_by(node), packed_bytes(node, self.parts), strict=True)
        alike = [(value, size) for value, size in sizes if as_transported(value.meta["val"]).dtype == result.dtype]
        return sum(size for value, size in alike if not self.backward or value.name in self.trained)


class _Run(fx.Interpreter):
    """Runs a graph, and labels what autograd records of each `sp::` op with the name of its node."""

    def __init__(self, module: fx.GraphModule, counter: _Counter, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self.counter = counter
        self.mode = mode

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.mode.from_tensor(value) if isinstance(value, Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        opaque = n.op == "call_module" or isinstance(n.target, HigherOrderOperator)
        if opaque:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return _stand_in(n.meta["val"], pytree.tree_leaves((args, kwargs)))
        if getattr(n.target, "namespace", "") != "sp":
            return super().run_node(n)
        self.counter.running = n.name
        operands = [(each, self.env[each]) for each in n.all_input_nodes if isinstance(self.env[each], Tensor)]
        self.counter.trained |= {each.name for each, value in operands if value.requires_grad}
        before = {value.grad_fn for _, value in operands}
        result = super().run_node(n)
        left = [each.grad_fn for each in pytree.tree_leaves(result)]
        while left:
            recorded = left.pop()
            if recorded is not None and recorded not in before and _LABEL not in recorded.metadata:
                recorded.metadata[_LABEL] = n.name
                left += [above for above, _ in recorded.next_functions]
        return result


class _OpaqueGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Sequence[Any], *operands: Any) -> Any:
        ctx.save_for_backward(*operands)
        results = [torch.empty_like(value) for value in values]
        ctx.mark_non_differentiable(*(each for each in results if not each.is_floating_point()))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *(torch.zeros_like(x) if x.is_floating_point() else None for x in ctx.saved_tensors)


def _stand_in(value: Any, operands: Sequence[Any]) -> Any:
    """Values as a part that is not run would give, with a gradient to all its operands."""
    leaves, spec = pytree.tree_flatten(value)
    at = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [x for x in operands if isinstance(x, Tensor)]
    made = _OpaqueGradient.apply([leaves[index] for index in at], *tensors)  # type: ignore[no-untyped-call]
    for index, each in zip(at, made, strict=True):
        leaves[index] = each
    return pytree.tree_unflatten(leaves, spec)
