"""One step of a model as named tensors, and how far those of P ranks are from those of one device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._local_tensor import LocalIntNode, LocalTensor, enabled_local_tensor_mode

from .checksums import checksums_of


@dataclass(frozen=True)
class Step:
    """What one call gave, by name: outputs, gradients, and the buffers and inputs afterwards. None: no gradient."""

    values: Mapping[str, Any]
    written: frozenset[str] = frozenset()
    """The buffers and inputs that the call wrote to."""


Program = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A model, and the positional and keyword arguments of one call of it."""


def copied(program: Program, written: Collection[str] = (), parts: int = 1) -> Program:
    """Deep copies that share among themselves what the originals share; tensors with a history become leaves.

    Of the states in `written` every one of `parts` simulated ranks has a copy of its own: what the ranks write to a
    tensor that they share, the last one writes.
    """
    memo: dict[int, Any] = {}
    for name, value in states(program):
        if name in written:
            own = LocalTensor({rank: value.detach().clone() for rank in range(parts)})
            memo[id(value)] = own.requires_grad_(value.requires_grad)
        elif not value.is_leaf or value.is_inference():
            memo[id(value)] = value.clone().detach().requires_grad_(value.requires_grad)
    return copy.deepcopy(program, memo)


def nudged(value: Tensor, pattern: int) -> Tensor:
    """The value with its last bits changed, up or down by a pattern; whole numbers, such as a mask's, are kept."""
    if value.dtype not in (torch.float32, torch.float64):
        return value
    signs = (torch.arange(value.numel(), dtype=torch.float64, device=value.device) + 1.7 * pattern).cos().sign()
    moved = value * (1 + 2 * torch.finfo(value.dtype).eps * signs.view(value.shape).to(value.dtype))
    return torch.where((value != value.round()) & moved.isfinite(), moved, value)


def is_rounding(errors: Sequence[float], nudges: Sequence[float]) -> bool:
    """Whether errors are no more than changes in the last bits of the inputs make, as in a sum that cancels out."""
    return bool(nudges) and max(errors) <= 10 * max(nudges)


def module_of(model: Any) -> nn.Module | None:
    """The module that is called: itself, or that of a bound method or a partial call."""
    while isinstance(model, partial):
        model = model.func
    model = getattr(model, "__self__", model)
    return model if isinstance(model, nn.Module) else None


def states(program: Program) -> list[tuple[str, Tensor]]:
    """The tensors that a call may write to, by name: inputs and buffers."""
    model, args, kwargs = program
    found = [*named_leaves(args, "input"), *named_leaves(kwargs, "input")]
    module = module_of(model)
    found += [(f"buffer {name}", buffer) for name, buffer in (module.named_buffers() if module else ())]
    return [(name, value) for name, value in found if isinstance(value, Tensor)]


def named_leaves(value: Any, name: str, seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """(name, leaf) of a nest of containers, dataclasses and objects: tensors, numbers, texts and None."""
    if value is None or isinstance(value, (Tensor, bool, int, float, complex, str, torch.SymInt)):
        yield name, value
        return
    if id(value) in seen:
        return
    if isinstance(value, Mapping):
        inside = list(value.items())
    elif isinstance(value, (list, tuple)):
        inside = list(enumerate(value))
    elif is_dataclass(value):
        inside = [(each.name, getattr(value, each.name)) for each in fields(value)]
    else:
        inside = list(getattr(value, "__dict__", {}).items())
    for key, each in inside:
        yield from named_leaves(each, f"{name} {key}".strip(), seen | {id(value)})


def step(call: Callable[..., Any], model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step:
    """Run forward, and backward of the loss if there is one, else of a fixed projection of all outputs.

    The loss is the output of that name.
    """
    before = states((model, tuple(args), dict(kwargs)))
    marks = _marks(before)
    inputs = [(name, value) for name, value in before if name.startswith("input ")]
    result = call(*args, **kwargs)
    module = module_of(model)
    parameters = module.named_parameters() if module else ()  # a model may freeze some as it runs
    trained = [(name, value) for name, value in (*inputs, *parameters) if value.requires_grad]
    alone = result is None or isinstance(result, (Tensor, int, float, str))
    outputs = dict(named_leaves(result, "output 0" if alone else "output"))
    loss = outputs.get("output loss")
    if not isinstance(loss, Tensor):
        loss = sum(_projection(x) for x in outputs.values() if isinstance(x, Tensor) and x.requires_grad)
    values = dict(outputs)
    if isinstance(loss, Tensor) and loss.requires_grad and trained:
        gradients = torch.autograd.grad(loss, [value for _, value in trained], allow_unused=True)
        values |= {f"grad {name}": gradient for (name, _), gradient in zip(trained, gradients, strict=True)}
    written = frozenset(name for name, mark in _marks(before).items() if mark != marks[name])
    values |= {f"{name} afterwards": value for name, value in inputs if name in written}
    values |= dict(states((model, (), {})))
    detached = {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}
    return Step(detached, written)


def _marks(found: Sequence[tuple[str, Tensor]]) -> dict[str, tuple[int, int | None]]:
    """What changes when a state is written to: its version, or, as BatchNorm's statistics keep theirs, its checksum.

    Not that of simulated ranks, of whom each has its own.
    """
    values = [value for _, value in found]
    sums = [None] * len(values) if enabled_local_tensor_mode() else checksums_of(values)
    return {name: (value._version, number) for (name, value), number in zip(found, sums, strict=True)}


def _projection(x: Tensor) -> Tensor:
    x = torch.view_as_real(x) if x.is_complex() else x
    return (x * (torch.arange(x.numel(), dtype=x.dtype, device=x.device) * 0.7).cos().view(x.shape)).sum()


def on_rank(value: Any, rank: int) -> Any:
    """The value on one of the simulated ranks."""
    if isinstance(value, torch.SymInt) and isinstance(value.node, LocalIntNode):
        return value.node._local_ints[rank]
    return value._local_tensors[rank] if isinstance(value, LocalTensor) else value


def compare(expected: Step, got: Step, parts: int, tolerance: float) -> dict[str, tuple[float, ...]]:
    """The error of each value on each rank, as in `relative_error`; infinite for one that only one of the two has.

    The scale of a gradient is its largest value, and never below a thousandth of that of the largest gradient, or 20
    times the tolerance of it: what should be 0 is nothing but rounding.
    """
    floor = min(max(1e-3, 20 * tolerance), 1.0)
    gradients = [v for n, v in expected.values.items() if n.startswith("grad ") and isinstance(v, Tensor)]
    largest = max((scale_of(each) for each in gradients), default=0.0)
    errors: dict[str, tuple[float, ...]] = {}
    for name in dict.fromkeys((*expected.values, *got.values)):
        if name not in expected.values or name not in got.values:
            errors[name] = (float("inf"),) * parts
            continue
        value, least = expected.values[name], floor * largest if name.startswith("grad ") else 0.0
        errors[name] = tuple(relative_error(value, on_rank(got.values[name], rank), least) for rank in range(parts))
    return errors


def scale_of(value: Tensor) -> float:
    """The largest finite magnitude."""
    if value.numel() == 0 or value.dtype == torch.bool:
        return 0.0
    return float(value.detach().to_dense().abs().nan_to_num(0, 0, 0).max())


def relative_error(expected: Any, got: Any, floor: float = 0.0) -> float:
    """The largest difference, relative to the largest value that is expected, or to `floor`.

    Infinite where shape, dtype, layout, NaNs or infinities differ, where integers do, and where only one of the two is
    None.
    """
    if type(expected) is float and type(got) is float:  # as of `item()`
        expected, got = (torch.tensor(each, dtype=torch.float64) for each in (expected, got))
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
        same = not isinstance(expected, Tensor) and not isinstance(got, Tensor) and _same(expected, got)
        return 0.0 if same else float("inf")
    if (expected.shape, expected.dtype, expected.layout) != (got.shape, got.dtype, got.layout):
        return float("inf")
    expected, got = expected.to_dense(), got.to_dense()
    if expected.is_complex():
        expected, got = (torch.view_as_real(each.resolve_conj()) for each in (expected, got))
        return relative_error(expected, got, floor)
    if not expected.is_floating_point() or expected.numel() == 0:
        return 0.0 if torch.equal(expected, got) else float("inf")
    finite = expected.isfinite()
    if not torch.equal(finite, got.isfinite()) or not _same_infinities(expected[~finite], got[~finite]):
        return float("inf")
    scale = max(scale_of(expected), floor, 1e-30)
    return scale_of(expected.nan_to_num(0, 0, 0) - got.nan_to_num(0, 0, 0)) / scale


def _same(expected: Any, got: Any) -> bool:
    return bool(expected == got) or (expected != expected and got != got)


def _same_infinities(expected: Tensor, got: Tensor) -> bool:
    """Whether infinities have the same signs, and are no NaN."""
    return torch.equal(expected.isnan(), got.isnan()) and torch.equal(expected.nan_to_num(), got.nan_to_num())
