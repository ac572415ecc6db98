"""One step of a model as named tensors, and how far those of P ranks are from those of one device."""

from __future__ import annotations

import copy
import copyreg
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._local_tensor import enabled_local_tensor_mode
from torch.utils import _pytree as pytree

from ..distributed.checksums import checksums_of
from ..distributed.tensor_kinds import bits, dense_parts, has_storage, held_in, is_plain, numbers, on_storage
from ..errors import ConfigurationError
from .simulation import on_rank


@dataclass(frozen=True)
class Step:
    """What one call gave, by name: outputs, gradients, and the buffers and inputs afterwards. None: no gradient."""

    values: Mapping[str, Any]
    written: frozenset[str] = frozenset()
    """The buffers and inputs that the call wrote to."""


Program = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A model, and the positional and keyword arguments of one call of it."""


def copied(program: Program) -> Program:
    """Deep copies of a model and its inputs, whose tensors share memory as those of the originals do.

    A view is the same view of a copy of its base, and keeps its history up to that. Another tensor with a history has
    one of a single step, from a leaf that nobody else sees. No gradient is copied.

    Raises `ConfigurationError` for what cannot be copied.
    """
    model, args, kwargs = program
    try:
        copies, module = _Copies(), module_of(model)
        parts = [*module.modules()] if module else [model] if hasattr(model, "__dict__") else []
        states = [*module.parameters(), *module.buffers()] if module else []
        given = [leaf for _, leaf in named_leaves([args, kwargs], "")]
        for leaf in (*given, *states, *pytree.tree_leaves([vars(part) for part in parts])):
            if isinstance(leaf, Tensor):
                copies.add(leaf)
        return copy.deepcopy(program, copies.memo)
    except Exception as error:
        raise ConfigurationError(
            f"verify runs copies of the model and its inputs, which cannot be copied: {type(error).__name__}: {error}"
        ) from error


class _Copies:
    """Copies of tensors for `copy.deepcopy`, which finds them in `memo`, as it does the copies of their storages."""

    def __init__(self) -> None:
        self.memo: dict[int, Any] = {}
        self._kept: list[Tensor] = []  # an address is used again

    def add(self, x: Tensor) -> Tensor:
        if id(x) not in self.memo:
            by_torch = type(x).__deepcopy__ in (Tensor.__deepcopy__, nn.Parameter.__deepcopy__)
            if x.is_nested:
                made = x.detach().clone()  # of the same offsets, by which torch tells whether two are alike
            elif not is_plain(x) or not by_torch or x.is_quantized or x.is_meta:
                made = copy.deepcopy(x if x.is_leaf else x.detach(), self.memo)
            else:
                made = self._of_memory(x) if has_storage(x) else x.detach().clone()
                made = made if type(made) is type(x) else made.as_subclass(type(x))
                self.memo[id(x)] = made
                if type(x) is not nn.Parameter:  # whose attributes torch does not copy either
                    vars(made).update(copy.deepcopy(vars(x), self.memo))
            if made.is_leaf and made.requires_grad != x.requires_grad:
                made.requires_grad_(x.requires_grad)
            made.grad = None
            self.memo[id(x)] = made
            self._kept.append(x)
        result: Tensor = self.memo[id(x)]
        return result

    def _of_memory(self, x: Tensor) -> Tensor:
        base = x._base if x._is_view() else None
        if base is not None and has_storage(base) and (x.is_leaf or base.requires_grad):
            with torch.set_grad_enabled(not (x.is_leaf and base.requires_grad)):
                return x._view_func(self.add(base))  # type: ignore[no-any-return, attr-defined]
        make = partial(on_storage, x, copy.deepcopy(x.untyped_storage(), self.memo))
        if not x.is_leaf:
            origin = x.detach().clone().requires_grad_()
            return _History.apply(origin, make)  # type: ignore[no-any-return, no-untyped-call]
        return make() if type(x) is Tensor else Tensor._make_subclass(type(x), make(), x.requires_grad)


class _History(torch.autograd.Function):
    """What `make` gives, as a function of a leaf, so that a program may write to it."""

    @staticmethod
    def forward(ctx: Any, origin: Tensor, make: Callable[[], Tensor]) -> Tensor:
        return make()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
        return gradients[0], None


def nudge(program: Program, pattern: int) -> None:
    """Change the last bits of inputs, parameters and buffers, once of those that share their memory."""
    module = module_of(program[0])
    values = [value for _, value in states(program)] + [*(module.parameters() if module else ())]
    storages: dict[int, list[Tensor]] = {}
    for held in chain.from_iterable(map(held_in, values)):
        if not held.is_quantized:
            storages.setdefault(held.untyped_storage()._cdata, []).append(held)
    for sharing in storages.values():
        dtypes = {_REAL.get(each.dtype, each.dtype) for each in sharing}
        if len(dtypes) == 1 and dtypes <= set(_REAL.values()):
            storage, (dtype,) = sharing[0].untyped_storage(), dtypes
            count = storage.nbytes() // dtype.itemsize
            flat = torch.empty(0, dtype=dtype, device=storage.device).set_(storage, 0, (count,), (1,))
            flat.copy_(nudged(flat, pattern))


_REAL = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
"""The dtypes whose last bits are changed, and that of their numbers."""


def nudged(value: Tensor, pattern: int) -> Tensor:
    """The value with its last bits changed, up or down by a pattern; whole numbers, such as a mask's, are kept."""
    if value.dtype not in (torch.float32, torch.float64):
        return value
    signs = (torch.arange(value.numel(), dtype=torch.float64, device=value.device) + 1.7 * pattern).cos().sign()
    moved = value * (1 + 2 * torch.finfo(value.dtype).eps * signs.view(value.shape).to(value.dtype))
    return torch.where((value != value.round()) & moved.isfinite(), moved, value)


def is_rounding(errors: Sequence[float], nudges: Sequence[float], bound: float = float("inf")) -> bool:
    """Whether errors are no more than changes in the last bits of the inputs make, as in a sum that cancels out, and
    no more than `bound`."""
    return bool(nudges) and max(errors) <= min(10 * max(nudges), bound)


def rounding_bound(expected: Any, tolerance: float, magnitude: float, floor: float = 0.0) -> float:
    """The largest relative error of a value that may be called rounding, whatever the last bits of inputs do to it.

    Half of the digits that are asked for have to be right: the square root of the tolerance. A sum that cancels out has
    none to be right. Of it the error has to be within the tolerance of `magnitude`, the largest number that it may be
    made of. An infinite error is never rounding.
    """
    scale = max(scale_of(expected), floor, 1e-30) if isinstance(expected, Tensor) else 1.0
    return max(math.sqrt(tolerance), tolerance * magnitude / scale)


def magnitude_of(values: Iterable[Any]) -> float:
    """The largest number in some tensors that `nudged` would change: not one that is whole, as those of a mask are."""
    found = 0.0
    for value in values:
        for part in dense_parts(value) if isinstance(value, Tensor) else ():
            if part.is_floating_point() and (wide := numbers(part)) is not None:
                broken = wide[wide.isfinite() & (wide != wide.round())]
                found = max(found, float(broken.abs().max())) if broken.numel() else found
    return found


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


def named_leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(name, leaf) of a nest of containers, dataclasses and objects: tensors, numbers, texts and None."""
    above: list[int] = []  # what the value is inside of: an object may hold one that holds it
    left: list[tuple[str, Any, int]] = [(name, value, 0)]
    while left:
        name, value, depth = left.pop()
        del above[depth:]
        if value is None or isinstance(value, (Tensor, bool, int, float, complex, str, torch.SymInt)):
            yield name, value
        elif id(value) not in above:
            above.append(id(value))
            inside = [(f"{name} {key}".strip(), each, depth + 1) for key, each in _members(value)]
            left += reversed(inside)


def _members(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple, deque)):
        return list(enumerate(value))
    if is_dataclass(value):
        return [(each.name, getattr(value, each.name)) for each in fields(value)]
    slots = [name for name in copyreg._slotnames(type(value)) if hasattr(value, name)]  # type: ignore[attr-defined]
    return [*((name, getattr(value, name)) for name in slots), *getattr(value, "__dict__", {}).items()]


def step(
    call: Callable[..., Any],
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    written: Collection[str] = (),
) -> Step:
    """Run forward, and backward of the loss if there is one, else of a fixed projection of all outputs.

    The loss is the output of that name, if it is one number. `written` are inputs that are told of afterwards even if
    they seem not to have been written to. The gradients that the model and its inputs have stay what they are.
    """
    before = states((model, tuple(args), dict(kwargs)))
    marks = _marks(before)
    inputs = [(name, value) for name, value in before if name.startswith("input ")]
    # The program may write to an input that has a history, whose own gradient is then that of what was written.
    origins = [(name, next(_leaves(value), value)) for name, value in inputs if value.requires_grad]
    result = call(*args, **kwargs)
    module = module_of(model)
    parameters = module.named_parameters() if module else ()  # a model may freeze some as it runs
    trained = [(name, value) for name, value in (*origins, *parameters) if value.requires_grad]
    alone = result is None or isinstance(result, (Tensor, int, float, str))
    values = dict(named_leaves(result, "output 0" if alone else "output"))
    loss = values.get("output loss")
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
        with torch._C.DisableTorchFunctionSubclass():  # classes of outputs may add as they like, or not at all
            loss = sum(_projection(x) for x in values.values() if isinstance(x, Tensor) and x.requires_grad)
    if isinstance(loss, Tensor) and loss.requires_grad and trained:
        gradients = _gradients(loss, [value for _, value in trained])
        values |= {f"grad {name}": gradient for (name, _), gradient in zip(trained, gradients, strict=True)}
    changed = frozenset(name for name, mark in _marks(before).items() if mark != marks[name])
    values |= {f"{name} afterwards": value for name, value in inputs if name in changed.union(written)}
    values |= dict(states((model, (), {})))
    detached = {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}
    return Step(detached, changed)


def _gradients(loss: Tensor, trained: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of some leaves after a backward of `loss`.

    By `backward`, as an op may call it in its own backward: what a reentrant checkpoint uses has no other gradient. All
    leaves that the graph tells of keep the gradients that they have.
    """
    leaves = {id(each): each for each in (*trained, *_leaves(loss))}
    kept = [each.grad for each in leaves.values()]
    for leaf in leaves.values():
        leaf.grad = None
    try:
        loss.backward()
        return [leaf.grad for leaf in trained]
    finally:
        for leaf, gradient in zip(leaves.values(), kept, strict=True):
            leaf.grad = gradient


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The leaves below a value, as far as its graph shows them."""
    left, seen = [loss.grad_fn], set[Any]()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch._C._functions.AccumulateGrad):  # type: ignore[attr-defined]
            yield node.variable
        left += [each for each, _ in node.next_functions]


def _marks(found: Sequence[tuple[str, Tensor]]) -> dict[str, tuple[int, int | None]]:
    """What changes when a state is written to: its version, or, as BatchNorm's statistics keep theirs, its checksum.

    Not that of simulated ranks, of whom each has its own.
    """
    values = [value for _, value in found]
    sums = [None] * len(values) if enabled_local_tensor_mode() else checksums_of(values)
    return {name: (value._version, number) for (name, value), number in zip(found, sums, strict=True)}


def _projection(x: Tensor) -> Tensor:
    """A sum of the numbers of an output, each with a weight of its own."""
    if x.is_nested:
        x = x.values() if x.layout == torch.jagged else torch.cat([each.flatten() for each in x.unbind()])
    elif x.layout != torch.strided:
        x = x.to_dense()
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    x = x.float() if x.dtype.itemsize == 1 else x
    waves = (torch.arange(x.numel(), dtype=torch.float64, device=x.device) * 0.7).cos().view(x.shape)
    return (x * waves.to(x.dtype)).sum()


def compare(expected: Step, got: Step, parts: int, tolerance: float) -> dict[str, tuple[float, ...]]:
    """The error of each value on each rank, as in `relative_error`; infinite for one that only one of the two has.

    A gradient that a step does not have is one that is None: torch says of a view made under `no_grad` that it takes
    a gradient, and hands none on.

    The scale of a gradient is its largest value, and never below a thousandth of that of the largest gradient, or 20
    times the tolerance of it: what should be 0 is nothing but rounding.
    """
    least = least_scale_of_gradients(expected, tolerance)
    errors: dict[str, tuple[float, ...]] = {}
    for name in dict.fromkeys((*expected.values, *got.values)):
        is_gradient = name.startswith("grad ")
        if not is_gradient and (name not in expected.values or name not in got.values):
            errors[name] = (float("inf"),) * parts
            continue
        one, other, floor = expected.values.get(name), got.values.get(name), least if is_gradient else 0.0
        pairs = [(on_rank(one, rank), on_rank(other, rank)) for rank in range(parts)]
        errors[name] = tuple(relative_error(whole, of_rank, floor) for whole, of_rank in pairs)
    return errors


def least_scale_of_gradients(expected: Step, tolerance: float) -> float:
    """See `compare`."""
    gradients = [v for n, v in expected.values.items() if n.startswith("grad ") and isinstance(v, Tensor)]
    return min(max(1e-3, 20 * tolerance), 1.0) * max((scale_of(each) for each in gradients), default=0.0)


def scale_of(value: Tensor) -> float:
    """The largest finite magnitude."""
    found = [numbers(part) for part in dense_parts(value) if part.is_floating_point() and part.numel()]
    return max((float(each.abs().nan_to_num(0, 0, 0).max()) for each in found if each is not None), default=0.0)


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
    if _kind(expected) != _kind(got):
        return float("inf")
    whole, parts = dense_parts(expected), dense_parts(got)
    if [part.shape for part in whole] != [part.shape for part in parts]:
        return float("inf")
    scale = max(scale_of(expected), floor, 1e-30)
    return max((_difference(*pair) / scale for pair in zip(whole, parts, strict=True)), default=0.0)


def _kind(x: Tensor) -> tuple[Any, ...]:
    sizes = [len(x.unbind())] if x.is_nested and x.layout == torch.strided else x.shape
    known = [size for size in sizes if isinstance(size, int)]  # that of ragged rows is a name; their offsets are parts
    return x.dtype, x.layout, x.is_nested, x.is_quantized and x.qscheme(), known


def _difference(expected: Tensor, got: Tensor) -> float:
    """The largest difference of two dense parts of one shape, infinite where integers, NaNs or infinities differ."""
    if not expected.is_floating_point() or numbers(expected) is None or expected.numel() == 0:
        return 0.0 if torch.equal(bits(expected), bits(got)) else float("inf")
    expected, got = expected.to(torch.float64), got.to(torch.float64)
    finite = expected.isfinite()
    if not torch.equal(finite, got.isfinite()) or not _same_infinities(expected[~finite], got[~finite]):
        return float("inf")
    return float((expected[finite] - got[finite]).abs().max()) if finite.any() else 0.0


def _same(expected: Any, got: Any) -> bool:
    return bool(expected == got) or (expected != expected and got != got)


def _same_infinities(expected: Tensor, got: Tensor) -> bool:
    """Whether infinities have the same signs, and are no NaN."""
    return torch.equal(expected.isnan(), got.isnan()) and torch.equal(expected.nan_to_num(), got.nan_to_num())
