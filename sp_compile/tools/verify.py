"""`verify`: P simulated ranks against one device, in one process; and where they part, if they do.

>>> print(verify(model, ids, labels=ids, sp_size=4))
Verified: 4 ranks give what one device gives …
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..backend import sp_backend
from ..config import SequenceParallelConfig
from ..distributed.tensor_kinds import held_in
from ..errors import ConfigurationError, FallbackError, VerificationError
from ..runtime.records import RewrittenGraph, UnshardedGraph, rewritten_graphs, unsharded_graphs
from .comparison import (
    Program,
    Step,
    compare,
    copied,
    is_rounding,
    least_scale_of_gradients,
    magnitude_of,
    module_of,
    nudge,
    rounding_bound,
    states,
    step,
)
from .divergence import Divergence, Recorder, first_divergence
from .simulation import bare, simulate

UNSEEN = (
    "deadlocks: the ranks run one after the other, and none waits",
    "transport: nothing is sent through gloo or NCCL",
    "other kernels: the rewritten graph runs as it is, where the model is; no inner backend compiles it",
    'rng="parallel": random numbers are drawn as by rng="exact"',
)
"""What a verification does not tell."""

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_REFUSED = {"outputs": "gather", "param_grads": "all_reduce"}


@dataclass(frozen=True)
class Verification:
    """How far P simulated ranks are from one device."""

    sp_size: int
    tolerance: float
    errors: Mapping[str, tuple[float, ...]]
    """Of each output, gradient, buffer and written input, on each rank; relative to its largest value, inf for what
    is not to be compared: another shape or dtype, other infinities or integers, a gradient that should be None."""
    graphs: tuple[str, ...]
    """The graphs that were rewritten; none: nothing was sharded, and nothing is proven."""
    unsharded: tuple[str, ...]
    """Why others were not, one reason a graph."""
    collectives: int
    rounding: tuple[str, ...] = ()
    """What differs by more than the tolerance, as it may by rounding: as much on one device when its inputs change in
    their last bits, in no more than the later half of the digits, or in a sum that cancels out."""
    undecided: tuple[str, ...] = ()
    """What is wrong, or so sensitive that it cannot be told: it differs by more than rounding may, and as much on one
    device when its inputs change in their last bits."""

    @property
    def wrong(self) -> tuple[str, ...]:
        """The names of what differs by more than the tolerance on some rank, and not by rounding."""
        apart = [name for name, errors in self.errors.items() if any(not e <= self.tolerance for e in errors)]
        return tuple(name for name in apart if name not in self.rounding)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as of JSON; an infinite error is None."""
        finite = {
            name: [error if error < float("inf") else None for error in errors] for name, errors in self.errors.items()
        }
        return {
            "sp_size": self.sp_size,
            "tolerance": self.tolerance,
            "passed": not self.wrong,
            "errors": finite,
            "wrong": list(self.wrong),
            "rounding": list(self.rounding),
            "undecided": list(self.undecided),
            "graphs": list(self.graphs),
            "unsharded": list(self.unsharded),
            "collectives": self.collectives,
            "unseen": list(UNSEEN),
        }

    def table(self, names: Sequence[str]) -> str:
        """The errors of some tensors, a column for each rank."""
        rows = [[name, *(f"{error:.1e}" for error in self.errors[name])] for name in names]
        header = ["", *(f"rank {rank}" for rank in range(self.sp_size))]
        return str(tabulate(rows, header, disable_numparse=True, colalign=["left", *["right"] * self.sp_size]))

    def __str__(self) -> str:
        verdict = f"{len(self.wrong)} of {len(self.errors)} values differ" if self.wrong else "all values agree"
        lines = [f"{self.sp_size} ranks against one device: {verdict} (tolerance {self.tolerance:.0e})", ""]
        lines += [self.table(list(self.errors)), ""]
        graphs = "1 graph" if len(self.graphs) == 1 else f"{len(self.graphs)} graphs"
        lines.append(f"Sharded: {graphs}, {self.collectives} collectives in a forward.")
        if not any(name.startswith("grad ") for name in self.errors):
            lines.append("No gradient was compared: of what was given, nothing takes one.")
        if self.rounding:
            lines.append(f"As far apart by rounding alone: {', '.join(self.rounding)}.")
        if self.undecided:
            lines.append(f"Wrong, or too sensitive to be compared: {', '.join(self.undecided)}.")
        if not self.graphs:
            lines.append("Nothing was sharded: that every rank agrees proves nothing.")
        lines += [f"Not sharded: {reason}." for reason in self.unsharded]
        lines += ["Not seen:", *(f"- {each}" for each in UNSEEN)]
        return "\n".join(lines)


def verify(
    model: Any,
    *args: Any,
    sp_size: int = 4,
    options: Mapping[str, object] | None = None,
    tolerance: float | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Verification:
    """Run `model(*args, **kwargs)` forward and backward on one device and on P simulated ranks, and compare.

    Outputs, the gradients of inputs and parameters, buffers, and inputs that are written to have to agree on every
    rank. Gradients are those of the output named `loss` if there is one, else of a fixed projection of all outputs.
    Everything runs on copies and from the present random state: the model, its buffers, gradients and train mode, the
    inputs and the generators stay as they are. Compiled code of this process is dropped (`torch._dynamo.reset`).

    Under inference mode it runs without gradients instead.

    `UNSEEN` lists what this cannot tell. Half-precision models are compared coarsely: `model.double()` tells most.

    Args:
        model: a module, compiled or not, its method, or a function of tensors. What a function closes over is neither
            copied nor compared: pass the module.
        args: what it is called with; so are `kwargs`. A model with a keyword argument of the name of a setting is
            given it in a lambda.
        sp_size: P, the number of simulated ranks.
        options: as of `torch.compile(model, backend="sp_compile", options=options)`. `group`, `inner_backend` and
            `rng` are replaced: P ranks, the bare graph, and the random numbers of one device.
        tolerance: the largest relative error; the default is that of the coarsest dtype that the model computes in:
            1e-9 for float64, 1e-4 for float32, 1e-2 for float16, 5e-2 for bfloat16.
        dynamic: as of `torch.compile`.

    Raises:
        VerificationError: a value differs; or P ranks raise where one device does not. It names the first node that
            differs, its line and the rule that placed it. Or nothing can be told: one device differs from itself, or
            as much from inputs with other last bits; or the simulation is at fault, with nothing sharded as well.
        ConfigurationError: an option or a tolerance that cannot be verified with; a model on the meta device, or one
            that cannot be copied; or this process has a process group already.
    """
    settings = _settings(sp_size, options)
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and 0 <= tolerance < 1):
        raise ConfigurationError(
            f"the tolerance is {tolerance}; it takes a relative error, from 0 (bit for bit) to below 1, such as 1e-6"
        )
    model = getattr(model, "_orig_mod", model)
    program: Program = (model, args, kwargs)
    module = module_of(model)
    values = [*(value for _, value in states(program)), *(module.parameters() if module else ())]
    if any(value.is_meta or isinstance(value, FakeTensor) for value in values):
        raise ConfigurationError(
            "verify computes, and tensors that are fake or on the meta device have no data: use others, or explain()"
        )
    noted = _Noted()
    try:
        with _no_inference_mode():
            with noted:
                expected = run_alone(program)
            if tolerance is None:
                tolerance = max([_TOLERANCES[each] for each in noted.dtypes if each in _TOLERANCES], default=1e-4)
            return _verified(program, sp_size, settings, tolerance, dynamic, expected)
    finally:
        noted.give_back()


@contextmanager
def _no_inference_mode() -> Iterator[None]:
    """Simulated ranks cannot run under inference mode: without gradients instead."""
    grad_mode = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad_mode):
        yield


def _verified(
    program: Program,
    sp_size: int,
    settings: Mapping[str, object],
    tolerance: float,
    dynamic: bool | None,
    expected: Step,
) -> Verification:
    try:
        with run_simulated(program, sp_size, settings, dynamic, expected.written) as ran:
            pass
    except Exception as error:
        met = getattr(error, "inner_exception", error)  # as Dynamo wraps what a backend raises
        if isinstance(met, (ConfigurationError, FallbackError)):
            raise met from error
        _check_simulation(program, sp_size, dynamic, expected, tolerance, compiles=True)
        told = f"one device runs this model; on {sp_size} ranks it raises {type(met).__name__}: {met}"
        raise VerificationError(told) from error
    verification = Verification(
        sp_size,
        tolerance,
        compare(expected, ran.step, sp_size, tolerance),
        tuple(graph.name for graph in ran.graphs),
        tuple(graph.reason for graph in ran.unsharded),
        sum(len(graph.collectives) for graph in ran.graphs),
    )
    if verification.wrong:
        _check_steady(verification, program, expected)
        verification = _with_rounding(verification, program, expected)
    if verification.wrong and set(verification.wrong) <= set(verification.undecided):
        raise _undecided(verification)
    if verification.wrong:
        _check_simulation(program, sp_size, dynamic, expected, tolerance)
        raise _failure(verification, program, expected, settings, dynamic)
    return verification


def _check_steady(verification: Verification, program: Program, expected: Step) -> None:
    """Raise if one device differs from itself."""
    again = compare(expected, run_alone(program), 1, verification.tolerance)
    unsteady = [name for name, (error,) in again.items() if not error <= verification.tolerance]
    if unsteady:
        raise VerificationError(
            f"one device does not give the same twice: {', '.join(unsteady)} differ between two runs from one random "
            "state; make the model deterministic to verify it",
            verification,
        )


def _check_simulation(
    program: Program, parts: int, dynamic: bool | None, expected: Step, tolerance: float, compiles: bool = False
) -> None:
    """Raise if the simulation is at fault: ranks do not run the model as it is, with nothing sharded.

    As it is compiled, too, if the compiler does not raise for one device.
    """
    told = "this model cannot be verified, simulated ranks do not run all that it does"
    for compiled in (False, True) if compiles else (False,):
        try:
            step = _run_unsharded(program, parts, compiled, dynamic, expected.written)
        except Exception as error:
            if compiled and _raises_on_one_device(program, dynamic):
                return
            raise VerificationError(f"{told}: even with nothing sharded, {type(error).__name__}: {error}") from error
        errors = {} if compiled else compare(expected, step, parts, tolerance)
        wrong = [name for name, of_each in errors.items() if any(not error <= tolerance for error in of_each)]
        if wrong:
            raise VerificationError(f"{told}: even with nothing sharded they differ in {', '.join(wrong)}")


def _run_unsharded(
    program: Program, parts: int, compiled: bool, dynamic: bool | None, written: Collection[str]
) -> Step:
    """One step of a copy of the program on simulated ranks that each have all of it."""
    model, args, kwargs = copied(program)
    module = module_of(model)
    with torch.random.fork_rng(), simulate(parts) as ranks:
        for value in (*(value for _, value in states((model, args, kwargs))), *(module.parameters() if module else ())):
            for memory in held_in(value):
                ranks.part(memory)
        call = torch.compile(model, backend=bare, dynamic=dynamic) if compiled else model
        made = step(call, model, args, kwargs, written)
        return replace(made, values={name: ranks.by_rank(value) for name, value in made.values.items()})


def _raises_on_one_device(program: Program, dynamic: bool | None) -> bool:
    model, args, kwargs = copied(program)
    try:
        with torch.random.fork_rng():
            step(torch.compile(model, backend="eager", dynamic=dynamic), model, args, kwargs)
    except Exception:
        return True
    return False


def _with_rounding(verification: Verification, program: Program, expected: Step) -> Verification:
    """Tell what differs by no more than one device does when its inputs change in their last bits."""
    tolerance, module = verification.tolerance, module_of(program[0])
    nudges = [compare(expected, run_alone(program, pattern), 1, tolerance) for pattern in range(2)]
    given = magnitude_of([*(value for _, value in states(program)), *(module.parameters() if module else ())])
    rounding: list[str] = []
    undecided: list[str] = []
    for name in verification.wrong:
        errors, changes = verification.errors[name], [each[name][0] for each in nudges if name in each]
        if not is_rounding(errors, changes):
            continue
        is_gradient, value = name.startswith("grad "), expected.values.get(name)
        alike = [each for other, each in expected.values.items() if other.startswith("grad ") == is_gradient]
        floor = least_scale_of_gradients(expected, tolerance) if is_gradient else 0.0
        bound = rounding_bound(value, tolerance, max(given, magnitude_of(alike)), floor)
        (rounding if is_rounding(errors, changes, bound) else undecided).append(name)
    return replace(verification, rounding=tuple(rounding), undecided=tuple(undecided))


def _undecided(verification: Verification) -> VerificationError:
    """What to say of values that differ, by no more than one device does from nearly the same inputs."""
    count = f"{len(verification.undecided)} of {len(verification.errors)} values"
    return VerificationError(
        f"{count} cannot be verified: on {verification.sp_size} ranks they differ from one device (tolerance "
        f"{verification.tolerance:.0e}) by more than rounding may, but so they do on one device when the inputs change "
        f"in their last bits\n\n{verification.table(verification.undecided)}\n\nTry float64, and inputs at which the "
        "model does not jump from one result to another",
        verification,
    )


def _failure(
    verification: Verification, program: Program, expected: Step, options: Mapping[str, object], dynamic: bool | None
) -> VerificationError:
    """What to say of values that differ: the node, of graphs that are recorded and compiled anew for it."""
    wrong, tolerance = verification.wrong, verification.tolerance
    found, graphs = first_divergence_of(program, verification.sp_size, options, dynamic, expected.written, tolerance)
    verification = replace(verification, graphs=tuple(graph.name for graph in graphs))
    nowhere = "No node of a rewritten graph differs from its captured one: look at capture, and outside the graphs."
    where = nowhere if found is None else str(found)
    count = f"{len(wrong)} of {len(verification.errors)} values on {verification.sp_size} ranks"
    text = f"{count} differ from one device (tolerance {tolerance:.0e})\n\n{verification.table(wrong)}\n\n{where}"
    return VerificationError(text, verification, found)


def _settings(sp_size: int, options: Mapping[str, object] | None) -> dict[str, object]:
    """The options that the ranks run with."""
    if not isinstance(sp_size, int) or sp_size < 1:
        raise ConfigurationError(f"sp_size is {sp_size}; it takes a number of ranks, 1 or more")
    if dist.is_initialized():
        raise ConfigurationError(
            "verify simulates its ranks in a process group of its own, and this process is in one already: call it "
            "before init_process_group, or in a process of its own (python -m sp_compile verify)"
        )
    given = dict(options or {})
    SequenceParallelConfig.from_options(given)
    for name, kept in _REFUSED.items():
        if given.get(name, kept) != kept:
            raise ConfigurationError(f"verify compares what every rank has whole: leave out the option {name!r}")
    own = {name: value for name, value in given.items() if name not in ("group", "inner_backend")}
    return {**own, "rng": "exact"}


class _Noted(TorchDispatchMode):
    """Notes the dtypes of all results, those of autocast included, and the leaves that ops take.

    An op that calls `backward` in its own, as a reentrant checkpoint does, gives gradients to leaves that no graph
    tells of, among them what a function closes over. `give_back` returns to all leaves the gradients that they had.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """So that what the model compiles by itself is compiled."""
        return True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()
        self._leaves: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for each in pytree.tree_leaves((args, kwargs)):
            if isinstance(each, Tensor) and each.is_leaf and each.requires_grad and id(each) not in self._leaves:
                self._leaves[id(each)] = each, each.grad
                each.grad = None  # or the gradients of the runs were added to it
        result = func(*args, **(kwargs or {}))
        self.dtypes.update(each.dtype for each in pytree.tree_leaves(result) if isinstance(each, Tensor))
        return result

    def give_back(self) -> None:
        for leaf, gradient in self._leaves.values():
            leaf.grad = gradient


@dataclass(frozen=True)
class Simulated:
    """One step on simulated ranks, and what became of the graphs."""

    step: Step
    graphs: tuple[RewrittenGraph, ...]
    unsharded: tuple[UnshardedGraph, ...]


def run_alone(program: Program, pattern: int | None = None) -> Step:
    """One step of a copy of the program on one device, from the present random state; with a pattern the last bits of
    inputs and parameters are other ones."""
    with torch.random.fork_rng():
        model, args, kwargs = copied(program)
        if pattern is not None:
            nudge((model, args, kwargs), pattern)
        return step(model, model, args, kwargs)


@contextmanager
def run_simulated(
    program: Program,
    parts: int,
    options: Mapping[str, object],
    dynamic: bool | None = None,
    written: Collection[str] = (),
) -> Iterator[Simulated]:
    """One step of a copy of the program on P simulated ranks, from the present random state; they live as long as the
    body. The step tells of the inputs in `written`, too. `bare` compiles, unless an option says otherwise."""
    before = {each.name for each in rewritten_graphs()} | {each.name for each in unsharded_graphs()}
    model, args, kwargs = copied(program)
    options = {"inner_backend": bare, **options}
    with torch.random.fork_rng(), simulate(parts) as ranks:
        compiled = torch.compile(model, backend=partial(sp_backend, options=options), dynamic=dynamic)
        made = step(compiled, model, args, kwargs, written)
        made = replace(made, values={name: ranks.by_rank(value) for name, value in made.values.items()})
        rewritten = tuple(graph for graph in rewritten_graphs() if graph.name not in before)
        yield Simulated(made, rewritten, tuple(graph for graph in unsharded_graphs() if graph.name not in before))


def first_divergence_of(
    program: Program,
    parts: int,
    options: Mapping[str, object],
    dynamic: bool | None,
    written: Collection[str],
    tolerance: float,
) -> tuple[Divergence | None, Sequence[RewrittenGraph]]:
    """The first node of a program that differs from one device, and the graphs that it was looked for in."""
    recorder = Recorder()
    with run_simulated(program, parts, {**options, "inner_backend": recorder}, dynamic, written) as ran:
        return first_divergence(recorder.calls, ran.graphs, tolerance), ran.graphs
