"""The options of the backend, and what is said of one that cannot be right."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch._dynamo
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from sp_compile.errors import ConfigurationError
from sp_compile.ir.plan import Output, RandomNumbers
from sp_compile.links import Links

Outputs = Output | Mapping[str | int, Output] | tuple[tuple[str | int, Output], ...]
ParameterGradients = Literal["all_reduce", "local"]
Attention = Literal["auto", "ulysses", "all_gather_kv", "replicate"]
Guards = Literal["off", "shapes", "on", "debug"]
Optional = Literal["outline_experts", "find_attention", "find_mixers", "pack_exchanges"]
"""The passes without which a graph is still right."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "outputs": get_args(Output),
    "param_grads": get_args(ParameterGradients),
    "attention": get_args(Attention),
    "rng": get_args(RandomNumbers),
    "guards": get_args(Guards),
}


@dataclass(frozen=True)
class SequenceParallelConfig:
    """How a model is compiled; the same names as in `torch.compile(..., options={...})`.

    Raises `ConfigurationError` for a value that an option does not take.
    """

    group: ProcessGroup | DeviceMesh | None = None
    """The SP group; `None` is the one that `init_sequence_parallel` made when the model first runs.
    Of a mesh its dimension "sp" is taken, or the only one that it has."""

    inner_backend: str | Callable[..., Any] = "inductor"
    """What compiles the rewritten graph: a name known to `torch.compile`, or a callable
    `(graph_module, example_inputs) -> callable`."""

    outputs: Outputs = "gather"
    """"gather": every rank returns outputs of full shape. "shard": a rank returns its own rows,
    without padding, and gradients are those of the sum over ranks of their local losses. "dtensor": its own rows as a
    `DTensor` of placement `Shard`, whose gradient is that of the whole value, as with "gather". What is whole on every
    rank anyway, such as a loss, is a plain tensor with any of them.

    One for all outputs; or a mapping, `{"logits": "dtensor"}`, from the variable of the model that an output was
    assigned to, or its position among the tensors that the graph returns (-1: the last), those not named being
    gathered. It is kept as a sorted tuple of pairs."""

    param_grads: ParameterGradients = "all_reduce"
    """"all_reduce": a parameter's gradient is the full one on every rank. "local": it is this
    rank's sum times P, for a DDP or FSDP that averages over data *and* SP ranks."""

    gradient_bucket_mb: float = 25.0
    """Megabytes (2**20 bytes) of parameter gradients that one all-reduce sums, started as soon as backward has made
    them; with the inner backend "inductor". 0: one for each parameter."""

    overlap: bool = True
    """What need not wait for a collective is computed while it is on its way; with the inner backend "inductor". The
    peak of memory is not raised for it."""

    attention: Attention = "auto"
    """How attention is made whole. "auto": what is cheapest at each site by `links`, in seconds of a step: Ulysses,
    all-gather-KV, or nothing moved where keys and values are where their queries are, or whole on every rank."""

    links: Links | None = None
    """What "auto" reckons with, the same on every rank: `measure_links()`. `None` is a node of H100s on NVLink."""

    rng: RandomNumbers = "parallel"
    """"parallel": dropout on a sharded value draws per rank, equal in distribution to one device.
    "exact": draws the whole value on every rank and cuts it, equal bit for bit."""

    strict: bool = False
    """What would run on gathered values for want of a rule raises `FallbackError` instead."""

    dump: str | os.PathLike[str] | None = None
    """A folder to write the graph to, before and after every pass."""

    skip: tuple[Optional, ...] = ()
    """Passes that are not run, to find the one that a fault comes from: `outline_experts`, `find_attention`,
    `find_mixers`, `pack_exchanges`. Without one of them a graph is right and moves more, or is not sharded."""

    guards: Guards = "on"
    """What ranks compare, and raise `RankMismatchError` of before anything is computed together.

    "on": at every call which graph runs, options, shapes and dtypes, and values of inputs that are no parameters or
    buffers: of integers and booleans a checksum, of floating-point inputs 32 elements at fixed places, shared among
    them, which may differ by half of their digits; where the graph draws random numbers, the state of the generators.
    So two batches that differ at other places only are not told apart, nor integers of a tensor of more than 131,072,
    of which it reads every n-th. On an accelerator values are read, and compared, where the next call or backward
    begins. At the first call of a graph it compares inputs, parameters and buffers whole, bit for bit.

    "debug": as at the first call, at every one. "shapes": values at none; for inputs that may differ in their last
    bits. "off": nothing. Ranks that part may hang then, be ended by gloo, or mix what does not belong together."""

    guard_timeout: float = 600.0
    """Seconds that a rank may come later than another to the same call, and for which a process may be stopped. More
    than one rank alone ever spends between two calls, on writing a checkpoint say; tracing and compiling do not
    count."""

    def __post_init__(self) -> None:
        if not isinstance(self.outputs, str):
            object.__setattr__(self, "outputs", _named_outputs(self.outputs))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices and (name != "outputs" or isinstance(value, str)):
                raise ConfigurationError(_wrong_value(name, value, choices))
        if isinstance(self.skip, str) or not isinstance(self.skip, Sequence):
            raise ConfigurationError(_wrong_type("skip", self.skip, "a list of names of passes"))
        object.__setattr__(self, "skip", tuple(self.skip))
        for name in self.skip:
            if name not in get_args(Optional):
                raise ConfigurationError(_wrong_value("skip", name, get_args(Optional)))
        for name in ("strict", "overlap"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(_wrong_type(name, getattr(self, name), "True or False"))
        if self.dump is not None and not isinstance(self.dump, str | os.PathLike):
            raise ConfigurationError(_wrong_type("dump", self.dump, "the path of a folder or None"))
        for name, unit in (("guard_timeout", "seconds"), ("gradient_bucket_mb", "megabytes")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigurationError(_wrong_type(name, value, f"a number of {unit}"))
        if not self.gradient_bucket_mb >= 0:
            raise ConfigurationError(
                f"option 'gradient_bucket_mb' is {self.gradient_bucket_mb}. It takes megabytes, or 0 for no buckets."
            )
        if self.links is not None and not isinstance(self.links, Links):
            raise ConfigurationError(_wrong_type("links", self.links, "a Links or None"))
        if not 0 < self.guard_timeout < 1e6:
            raise ConfigurationError(f"option 'guard_timeout' is {self.guard_timeout}. It takes seconds, more than 0.")
        if self.group is not None and not isinstance(self.group, ProcessGroup | DeviceMesh):
            raise ConfigurationError(_wrong_type("group", self.group, "a ProcessGroup, a DeviceMesh or None"))
        if isinstance(self.inner_backend, str):
            _check_backend_name(self.inner_backend)
        elif not callable(self.inner_backend):
            raise ConfigurationError(_wrong_type("inner_backend", self.inner_backend, "a name or a callable"))

    def output_kinds(self, names: Sequence[str]) -> tuple[Output, ...]:
        """How each output of a graph leaves it; `names` are those of the variables that they were assigned to.

        Raises `ConfigurationError` for a name or a position that this graph does not have.
        """
        if isinstance(self.outputs, str):
            return (self.outputs,) * len(names)
        kinds: dict[int, Output] = {}
        for key, kind in dict(self.outputs).items():
            at = [i for i, name in enumerate(names) if key in (name, i, i - len(names))]
            if not at:
                listed = ", ".join(f"{i}: {name!r}" for i, name in enumerate(names))
                raise ConfigurationError(
                    f"option 'outputs' has {key!r}{_suggestion(key, names)} This graph returns {listed or 'nothing'}. "
                    "After a graph break, or without labels, a model returns others: compile it with options of its own"
                )
            if any(kinds.setdefault(i, kind) != kind for i in at):
                raise ConfigurationError(f"option 'outputs' names output {at[0]} ({names[at[0]]!r}) twice: say it once")
        return tuple(kinds.get(i, "gather") for i in range(len(names)))

    @classmethod
    def from_options(cls, options: Mapping[str, object] | None) -> SequenceParallelConfig:
        """The configuration that `torch.compile(..., options=options)` asks for.

        Raises `ConfigurationError` for an unknown option or value, with the right ones listed.
        """
        given: dict[str, Any] = dict(options or {})
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                raise ConfigurationError(
                    f"unknown option {name!r}{_suggestion(name, names)} The options are {', '.join(names)}."
                )
        return cls(**given)


def _named_outputs(outputs: object) -> tuple[tuple[str | int, Output], ...]:
    pairs = isinstance(outputs, tuple) and all(isinstance(each, tuple) and len(each) == 2 for each in outputs)
    if not isinstance(outputs, Mapping) and not pairs:
        takes = f"one of {', '.join(map(repr, get_args(Output)))}, or a mapping of names or positions to these"
        raise ConfigurationError(_wrong_type("outputs", outputs, takes))
    named: dict[Any, Any] = dict(outputs)  # type: ignore[call-overload]
    for key, kind in named.items():
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise ConfigurationError(_wrong_type("outputs", key, "the names or positions of outputs as keys"))
        if kind not in get_args(Output):
            raise ConfigurationError(_wrong_value(f"outputs[{key!r}]", kind, get_args(Output)))
    return tuple(sorted(named.items(), key=lambda pair: (isinstance(pair[0], str), pair[0])))


def _check_backend_name(name: str) -> None:
    # `None` as the excluded tags: "eager" and "aot_eager" count as debugging tools, yet they serve.
    known = [other for other in torch._dynamo.list_backends(None) if other != "sp_compile"]
    if name == "sp_compile":
        raise ConfigurationError(
            "option 'inner_backend' is 'sp_compile', which would call itself. "
            f"It takes a callable or one of {', '.join(map(repr, known))}."
        )
    if name not in known:
        raise ConfigurationError(_wrong_value("inner_backend", name, known, "a callable or "))


def _wrong_value(name: str, value: object, choices: Collection[str], also: str = "") -> str:
    listed = ", ".join(map(repr, choices))
    return f"option {name!r} is {value!r}{_suggestion(value, choices)} It takes {also}one of {listed}."


def _wrong_type(name: str, value: object, takes: str) -> str:
    return f"option {name!r} is {value!r}, of type {type(value).__name__}. It takes {takes}."


def _suggestion(word: object, choices: Collection[str]) -> str:
    close = difflib.get_close_matches(str(word), choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
