"""One device against P simulated ranks: outputs, gradients and buffers, on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._local_tensor import LocalTensor
from torch.utils import _pytree as pytree

from sp_compile import RewrittenGraph, rewritten_graphs, sp_backend

from .simulation import simulate


@dataclass(frozen=True)
class Step:
    """What one call gave: floating outputs, gradients and buffers by name. None: no gradient."""

    values: Mapping[str, Tensor | None]


def step(call: Callable[..., Any], module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step:
    """Run forward, and backward of a fixed projection of all floating outputs (or of the loss alone)."""
    outputs = call(*args, **kwargs)
    loss = getattr(outputs, "loss", None)
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    values: dict[str, Tensor | None] = {f"output {i}": leaf for i, leaf in enumerate(leaves)}
    if loss is None:
        loss = sum(
            (leaf * (torch.arange(leaf.numel(), dtype=leaf.dtype) * 0.7).cos().view(leaf.shape)).sum()
            for leaf in leaves
            if leaf.requires_grad
        )
    named = [(f"input {i}", a) for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
    named += [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if isinstance(loss, Tensor) and loss.requires_grad and named:
        gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        values |= {f"grad {name}": gradient for (name, _), gradient in zip(named, gradients, strict=True)}
    values |= {f"buffer {name}": buffer for name, buffer in module.named_buffers()}
    return Step({name: None if value is None else value.detach() for name, value in values.items()})


def differences(expected: Step, got: Step, parts: int) -> dict[str, float]:
    """The largest error of each tensor over all ranks, relative to its largest value; gradients to the largest one."""
    norms = [
        float(v.abs().max())
        for name, v in expected.values.items()
        if name.startswith("grad") and v is not None and v.numel()
    ]
    largest = max([n for n in norms if n == n], default=1.0) or 1.0
    errors: dict[str, float] = {}
    assert expected.values.keys() == got.values.keys()
    for name, value in expected.values.items():
        other = got.values[name]
        if value is None or other is None:
            errors[name] = 0.0 if value is other else float("inf")
            continue
        ranks = [other._local_tensors[r] for r in range(parts)] if isinstance(other, LocalTensor) else [other]
        for rank in ranks:
            errors[name] = max(errors.get(name, 0.0), _error(value, rank, largest if name.startswith("grad") else None))
    return errors


def _error(value: Tensor, other: Tensor, scale: float | None) -> float:
    if value.shape != other.shape or value.dtype != other.dtype:
        return float("inf")
    if not value.is_floating_point() or value.numel() == 0:
        return 0.0 if torch.equal(value, other) else float("inf")
    finite = value.isfinite()
    if not torch.equal(finite, other.isfinite()) or not _same_infinities(value[~finite], other[~finite]):
        return float("inf")
    value, other = value.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0)
    return float((value - other).abs().max() / (scale or value.abs().max().clamp(min=1e-30)))


def _same_infinities(value: Tensor, other: Tensor) -> bool:
    """Whether infinities have the same signs, and are no NaN."""
    return torch.equal(value.isnan(), other.isnan()) and torch.equal(value.nan_to_num(), other.nan_to_num())


def run_simulated(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    parts: int = 2,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> tuple[Step, list[RewrittenGraph]]:
    """One step of a copy of the module on P simulated ranks; and the graphs that were rewritten."""
    module = copy.deepcopy(module)
    known = {graph.name for graph in rewritten_graphs()}
    backend = partial(sp_backend, options={"inner_backend": "eager", **(options or {})})
    with simulate(parts):
        compiled = torch.compile(module, backend=backend, dynamic=dynamic)
        result = step(compiled, module, args, kwargs or {})
    return result, [graph for graph in rewritten_graphs() if graph.name not in known]


def assert_equivalent(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    parts: int = 2,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    tolerance: float = 1e-9,
    must_shard: bool = True,
) -> list[RewrittenGraph]:
    """Every rank gets what one device gives. Returns the rewritten graphs, for what they moved."""
    alone = copy.deepcopy(module)
    expected = step(alone, alone, args, kwargs or {})
    got, graphs = run_simulated(module, args, kwargs, parts, options, dynamic)
    wrong = {name: error for name, error in differences(expected, got, parts).items() if not error <= tolerance}
    assert not wrong, f"P={parts}: {wrong}"
    assert bool(graphs) or not must_shard, "nothing was sharded"
    return graphs


def collectives(graph: RewrittenGraph) -> list[str]:
    """The names of the nodes that move data, in order."""
    return [each.name for each in graph.collectives]
