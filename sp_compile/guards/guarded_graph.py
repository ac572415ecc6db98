"""A compiled graph whose calls are events of the guard: what of it, and of its inputs, ranks have to agree on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.nn import Parameter
from torch.utils._dtype_abbrs import dtype_abbrs

from ..config import SequenceParallelConfig
from ..distributed.checksums import (
    checksums_of,
    generator_checksum,
    generator_checksums,
    integer_checksum,
    is_compared_whole,
    samples_of,
)
from ..distributed.samples import SAMPLES, LateSamples, Samples
from ..errors import SequenceParallelError
from ..ir.printing import format_graph
from .accounts import Account, Value
from .event import DTYPES, digest_of, hash_of, unseen
from .guard import Guard

Compiled = Callable[..., Any]
_CALL, _BACKWARD = 1, 2
_PLACE = re.compile(r"^# (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class GraphToAgreeOn:
    """What ranks have to agree on of a rewritten graph."""

    name: str
    text: str
    module: fx.GraphModule
    """What the text is of."""
    inputs: Sequence[fx.Node]
    """The placeholders of the Dynamo graph, and what it was traced with."""
    example_inputs: Sequence[Any]


class GuardedGraph:
    """A rewritten graph whose calls are events."""

    def __init__(self, guard: Guard, config: SequenceParallelConfig, graph: GraphToAgreeOn) -> None:
        self._guard, self._config = guard, config
        module, example_inputs = graph.module, graph.example_inputs
        bodies = [each for each in module.modules() if isinstance(each, fx.GraphModule) and each is not module]
        self._plan = "\n".join([graph.text, *map(format_graph, bodies)])
        self._options = _comparable(config)
        place = _PLACE.search(self._plan)
        self._graph = f"{graph.name} ({place[1]})" if place else graph.name
        self._names = [_name(node) for node in graph.inputs]
        self._kinds = [_kind(*each) for each in zip(graph.inputs, example_inputs, strict=True)]
        self._specs = [_spec(value) for value in example_inputs]
        self._watched = [index for index, kind in enumerate(self._kinds) if kind != "parameter"]
        self._draws = any(_draws(node) for body in [module, *bodies] for node in body.graph.nodes)
        self._key = digest_of(self._plan, self._options)
        self._integers: list[int] = []
        self._numbers: list[int] = []
        """Inputs that are sampled at each call: whole numbers, and others."""
        self._generators: list[str] = []
        devices = (x.device for x in example_inputs if isinstance(x, Tensor))
        self._device = next((device for device in devices if device.type not in ("cpu", "meta")), None)
        """The accelerator, if there is one. The host runs ahead of it: it may wait where a call begins, and not for
        values."""
        self._backward_watched = False

    def compile(self, compile_inner: Callable[[], Compiled]) -> Compiled:
        """What `compile_inner()` gives, once all ranks are about to compile this graph. Its calls are events."""
        digest = digest_of("compile", self._key, self._specs)
        inner: Compiled = self._take(digest, self._values, compile_inner, does="compiles", ahead=True)
        return self._watch(inner)

    def _watch(self, inner: Compiled) -> Compiled:
        first = True

        def run(*args: Any) -> Any:
            nonlocal first
            with unseen():
                if first:
                    self._choose_samples(args)
                call = self._with_values if first or self._config.guards == "debug" else self._with_samples
                taken = call(args)
            first = False
            outputs = taken(inner, *args)
            if not self._backward_watched:
                self._watch_backward(outputs)
            return outputs

        return run

    def _with_samples(self, args: Sequence[Any]) -> Callable[..., Any]:
        """What runs a call that agrees in shapes, integers and samples of the rest."""
        seen = [(x.dtype, x.shape) if isinstance(x, Tensor) else x for x in map(args.__getitem__, self._watched)]
        sizes = [(DTYPES[x[0]], *x[1]) if isinstance(x, tuple) else x for x in seen if isinstance(x, tuple | int)]
        random = {kind: generator_checksum(kind) for kind in self._generators}
        whole, numbers = ([args[index] for index in at] for at in (self._integers, self._numbers))

        def values(checksums: Sequence[int], samples: Samples) -> list[Value]:
            specs = {**dict(enumerate(self._specs)), **dict(zip(self._watched, map(_spec, seen), strict=True))}
            known = dict(zip(self._integers, checksums, strict=False))  # none yet of what is late
            found = self._values(list(specs.values()), [known.get(index) for index in specs])
            taken = zip(self._numbers, samples.by_tensor(samples.values.tolist()), samples.parts, strict=False)
            for index, sampled, (_, tolerance) in taken:
                found[index] = found[index]._replace(samples=sampled, tolerance=tolerance)
            return found

        digest = hash_of(self._key, _CALL, *sizes, *random.values())
        take = partial(self._take, does="calls", random=random)
        if self._device is None:
            samples, sums = Samples(), [int(integer_checksum(x)) for x in whole]
            samples.parts = _sampled(numbers, samples.values)
            return partial(take, hash_of(digest, *sums), partial(values, sums, samples), samples=samples)
        there = [[x.to(self._device, non_blocking=True) for x in each] for each in (whole, numbers)]
        taken = torch.zeros(SAMPLES, dtype=torch.float64, device=self._device)
        late = LateSamples([integer_checksum(x) for x in there[0]], taken, _sampled(there[1], taken), values)
        return partial(take, digest, partial(values, [], Samples()), late=late, ahead=True)

    def _with_values(self, args: Sequence[Any]) -> Callable[..., Any]:
        """What runs a call that agrees in all values, bit for bit."""
        args = args[: len(self._names)]
        checks = self._config.guards != "shapes"
        checksums: list[int | None] = checksums_of(args) if checks else [None] * len(args)
        random = generator_checksums(args) if checks and self._draws else {}
        specs = [_spec(value) for value in args]
        digest = digest_of("call", self._key, specs, checksums, random)
        values = partial(self._values, specs, checksums)
        return partial(self._take, digest, values, does="calls", random=random, is_first=True, ahead=True)

    def _choose_samples(self, args: Sequence[Any]) -> None:
        """What is sampled: dense inputs that are no parameters or buffers, and of which no rank has rows of its own."""
        if self._config.guards == "shapes":
            return
        for index, (kind, value) in enumerate(zip(self._kinds, args, strict=False)):
            dense = type(value) is Tensor and value.layout == torch.strided and not value.is_meta
            if kind == "input" and dense and not value.is_quantized and value.dtype in DTYPES:
                (self._integers if is_compared_whole(value.dtype) else self._numbers).append(index)
        if self._draws:
            devices = {value.device.type for value in args if isinstance(value, Tensor)}
            self._generators = sorted({"cpu"} | devices - {"meta"})

    def _values(self, specs: Sequence[str] | None = None, checksums: Sequence[int | None] | None = None) -> list[Value]:
        specs = specs or self._specs
        rows = zip(self._names, self._kinds, specs, checksums or [None] * len(specs), strict=True)
        return [Value(*row) for row in rows]

    def _take(
        self,
        digest: int,
        values: Callable[[], list[Value]],
        call: Callable[..., Any],
        *args: Any,
        does: str,
        random: Mapping[str, int] | None = None,
        is_first: bool = False,
        samples: Samples | None = None,
        late: LateSamples | None = None,
        ahead: bool = False,
    ) -> Any:
        """`call(*args)` as an event."""

        def account() -> Account:
            own = {"does": does, "what": f"{does} {self._graph}", "options": self._options, "plan": self._plan}
            return {**own, "values": values(), "random": random or {}, "is_first": is_first}

        timeout = self._config.guard_timeout
        return self._guard.take(digest, account, timeout, call, *args, samples=samples, late=late, ahead=ahead)

    def _watch_backward(self, outputs: Sequence[Any]) -> None:
        """AOTAutograd makes one autograd Function for a graph; its backward becomes an event as well."""
        made = (getattr(getattr(output, "grad_fn", None), "_forward_cls", None) for output in outputs)
        function = next((each for each in made if hasattr(each, "_aot_id")), None)
        if function is None:
            return
        backward, digest = function.backward, hash_of(self._key, _BACKWARD)

        def watched(ctx: Any, *grads: Any) -> Any:
            ahead = self._device is not None
            return self._take(digest, list, backward, ctx, *grads, does="runs the backward of", ahead=ahead)

        function.backward = staticmethod(watched)
        self._backward_watched = True


@contextmanager
def telling_of_failure(guard: Guard | None, config: SequenceParallelConfig, what: str) -> Iterator[None]:
    """Tell the other ranks of an exception that leaves the block; they may wait for this one meanwhile."""
    try:
        yield
    except BaseException as error:
        if guard is not None:
            with suppress(SequenceParallelError):  # the group has failed meanwhile; this is the rank's own error
                guard.raised(error, {"does": what, "what": what, "options": _comparable(config)})
        raise


def guard_graph(
    guard: Guard | None,
    config: SequenceParallelConfig,
    graph: GraphToAgreeOn,
    compile_inner: Callable[[], Compiled],
) -> Compiled:
    """What `compile_inner()` gives, once all ranks of the SP group agree on the graph; its calls are guarded.

    Where they do not agree nothing is compiled, and the call raises: what a backend raises by itself would reach the
    user in a `BackendCompilerFailed`. Without a guard nothing is compared.
    """
    if guard is None:
        return compile_inner()
    try:
        return GuardedGraph(guard, config, graph).compile(compile_inner)
    except SequenceParallelError as error:
        return _raises(error)


def _raises(error: SequenceParallelError) -> Compiled:
    kind, text = type(error), str(error)

    def run(*args: Any) -> Any:
        raise kind(text)

    return run


def _comparable(config: SequenceParallelConfig) -> dict[str, str]:
    """The options on which ranks have to agree, as text."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    backend = values["inner_backend"]
    if not isinstance(backend, str):
        values["inner_backend"] = getattr(backend, "__qualname__", type(backend).__qualname__)
    return {name: repr(value) for name, value in values.items() if name not in ("group", "dump", "guard_timeout")}


_MEMBER = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")
_WRAPPED = re.compile(r"^L\['args'\]\[0\](?=\._)")
_ROOT = re.compile(r"\b[LG]\['([^']+)'\]")


def _source(node: fx.Node) -> str | None:
    source = getattr(node, "_dynamo_source", None)
    return None if source is None else source.name


def _name(node: fx.Node) -> str:
    """`L['self']._modules['q']._parameters['weight']` as one writes it: `self.q.weight`."""
    source = _source(node)
    return str(node.target) if source is None else _ROOT.sub(r"\1", _MEMBER.sub(r".\1", _WRAPPED.sub("self", source)))


def _kind(node: fx.Node, value: Any) -> str:
    if isinstance(value, Parameter):
        return "parameter"
    return "buffer" if "._buffers['" in (_source(node) or "") else "input"


def _spec(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.dtype, value.shape
    if isinstance(value, tuple):
        return f"{dtype_abbrs[value[0]]}[{', '.join(map(str, value[1]))}]"
    return str(value) if isinstance(value, int) else type(value).__name__


def _sampled(tensors: Sequence[Tensor], found: Tensor) -> list[tuple[int, float]]:
    """Write samples of tensors to `found`. Returns how many each has, and how far two ranks may be apart in them.

    That is half of the digits: what nondeterministic kernels and other orders of sums change is far below.
    """
    counts = samples_of(tensors, found)
    return [(count, math.sqrt(torch.finfo(x.dtype).eps)) for count, x in zip(counts, tensors, strict=True)]


def _draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers: a dropout that is off does not."""
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    arguments = node.target._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= dict(zip((a.name for a in arguments), node.args, strict=False)) | dict(node.kwargs)
    return given.get("dropout_p", 1) != 0 and given.get("p", 1) != 0 and given.get("train", True) is not False
