"""A batch without its tensors, as JSON: what it is made of goes from rank to rank, and nothing in it can be executed.

    {"video": tensor, "sample": Sample(caption="a cat", size=(2, 3))}

    ["dict", ["video", ["tensor", 0]],
             ["sample", ["dataclass", "loader.Sample(caption, size)", ["caption", "a cat"], ["size", ["tuple", 2, 3]]]]]

A rank never imports, and never makes, what another one names: a class of the user's is looked up among those of the
rank's own batch.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_FACTORIES = {cls.__name__: cls for cls in (list, dict, set, tuple, str, bool, int, float)}
"""Of a `defaultdict`."""

_DTYPES = {str(each).removeprefix("torch."): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
_ARRAY_KINDS = "biufcSUMm"
"""Of numpy's dtypes those that are plain memory: numbers, text and times; not objects."""

_ADVICE = (
    "; what goes from rank to rank is tensors, arrays, numbers, texts, and containers and dataclasses of those. Make "
    "it one of them, leave it out of the batch, or send it with sync_data, which pickles"
)


class Structure:
    """What a batch is made of: `json`, beside its tensors, its bytes and its classes."""

    def __init__(self, batch: Any) -> None:
        """Raises TypeError for what a batch cannot have, with its place in the batch."""
        self.tensors: list[Tensor] = []
        """Each of them once, however often it occurs."""
        self.buffers: list[bytearray] = []
        """The contents of arrays and of `bytes`."""
        self.classes: dict[str, type] = {}
        """Those of the user's, by a description."""
        self._numbers: dict[int, int] = {}
        self.json = self._say(batch, "batch")

    def _say(self, value: Any, at: str) -> Any:
        cls = type(value)
        if value is None or cls in (bool, int, float, str):
            return value
        if isinstance(value, Tensor):
            return ["tensor", self._number(value)]
        if cls in (list, tuple, set, frozenset):
            return [cls.__name__, *self._items(value, at)]
        if cls is dict:
            return ["dict", *self._pairs(value, at)]
        if cls is complex:
            return ["complex", value.real, value.imag]
        if cls is bytes:
            return ["bytes", self._buffer(value)]
        if cls in (torch.dtype, torch.device):
            return [cls.__name__, str(value).removeprefix("torch.")]
        numpy = sys.modules.get("numpy")
        if numpy is not None and (cls is numpy.ndarray or isinstance(value, numpy.generic)):
            if value.dtype.kind not in _ARRAY_KINDS:
                raise TypeError(f"{at} is a numpy array of {value.dtype}{_ADVICE}")
            form = "array" if cls is numpy.ndarray else "number"
            return [form, value.dtype.str, list(value.shape), self._buffer(value.tobytes())]
        return self._say_object(value, at)

    def _say_object(self, value: Any, at: str) -> Any:
        cls, attributes = type(value), getattr(value, "__dict__", {})
        if isinstance(value, tuple) and hasattr(cls, "_fields"):
            items = [self._say(each, f"{at}.{name}") for name, each in zip(cls._fields, value, strict=True)]
            return ["namedtuple", self._class(cls, cls._fields), *items]
        if dataclasses.is_dataclass(cls):
            names = [each.name for each in dataclasses.fields(cls)]
            own = {name: getattr(value, name) for name in names if hasattr(value, name)}
            if not isinstance(value, Mapping):
                own |= attributes
            return ["dataclass", self._class(cls, names), *self._attributes(own, at)]
        if cls is defaultdict:
            if value.default_factory not in (None, *_FACTORIES.values()):
                raise TypeError(f"{at} is a defaultdict of {value.default_factory}{_ADVICE}")
            return ["defaultdict", getattr(value.default_factory, "__name__", None), *self._pairs(value, at)]
        if isinstance(value, Mapping):
            own = {} if attributes is value else {name: each for name, each in attributes.items() if name != "data"}
            return ["object", self._class(cls), ["dict", *self._pairs(value, at)], *self._private(own, at)]
        if isinstance(value, list | tuple | set | frozenset):
            return ["object", self._class(cls), ["list", *self._items(value, at)], *self._private(attributes, at)]
        raise TypeError(f"{at} is a {cls.__module__}.{cls.__qualname__}{_ADVICE}")

    def _items(self, values: Iterable[Any], at: str) -> list[Any]:
        return [self._say(value, f"{at}[{index}]") for index, value in enumerate(values)]

    def _pairs(self, values: Mapping[Any, Any], at: str) -> list[Any]:
        return [[self._say(key, f"a key of {at}"), self._say(values[key], f"{at}[{key!r}]")] for key in values]

    def _attributes(self, values: Mapping[str, Any], at: str) -> list[Any]:
        return [[name, self._say(value, f"{at}.{name}")] for name, value in values.items()]

    def _private(self, values: Mapping[str, Any], at: str) -> list[Any]:
        """The attributes of a container beside its items; not those with an underscore that cannot be said.

        Those are its own business, such as what a tokenizer's output remembers of the tokenizer.
        """
        said = []
        for name, value in values.items():
            before = len(self.tensors), len(self.buffers), dict(self.classes), dict(self._numbers)
            try:
                said += self._attributes({name: value}, at)
            except TypeError:
                if not name.startswith("_"):
                    raise
                del self.tensors[before[0] :], self.buffers[before[1] :]
                _, _, self.classes, self._numbers = before
        return said

    def _class(self, cls: type, fields: Iterable[str] = ()) -> str:
        description = f"{cls.__module__}.{cls.__qualname__}({', '.join(fields)})"
        if description not in SHARED_CLASSES:
            self.classes[description] = cls
        return description

    def _number(self, tensor: Tensor) -> int:
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return self._numbers[id(tensor)]

    def _buffer(self, content: bytes) -> int:
        self.buffers.append(bytearray(content))
        return len(self.buffers) - 1


SHARED_CLASSES: dict[str, type] = {
    f"{cls.__module__}.{cls.__qualname__}()": cls for cls in (OrderedDict, Counter, torch.Size)
}
"""Those that a rank makes though its own batch may have none."""


def dtype_of_name(name: str) -> torch.dtype:
    """`torch.float32` of "float32". Raises KeyError for what is no dtype."""
    return _DTYPES[name]


def build(json: Any, tensors: Sequence[Tensor], buffers: Sequence[bytearray], classes: Mapping[str, type]) -> Any:
    """The batch that `json` is the structure of.

    Args:
        classes: those that may be made. A container is made by its class from its items, a dataclass from its fields
            without a call of its `__init__`.

    Raises whatever comes of a structure that no `Structure` has said.
    """

    return _Builder(tensors, buffers, classes).build(json)


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Makes what a `Structure` has said. It has no function that refers to itself, which would keep the tensors."""

    tensors: Sequence[Tensor]
    buffers: Sequence[bytearray]
    classes: Mapping[str, type]

    def build(self, said: Any) -> Any:
        return _MAKERS[said[0]](self, *said[1:]) if isinstance(said, list) else said

    def pairs(self, *items: Any) -> dict[Any, Any]:
        return {self.build(key): self.build(value) for key, value in items}

    def class_of(self, description: str) -> Any:
        return SHARED_CLASSES.get(description) or self.classes[description]

    def namedtuple(self, description: str, *items: Any) -> Any:
        return tuple.__new__(self.class_of(description), map(self.build, items))

    def dataclass(self, description: str, *attributes: Any) -> Any:
        cls = self.class_of(description)
        if issubclass(cls, Mapping):  # Hugging Face's ModelOutput, whose items are its fields
            return cls(**self.pairs(*attributes))
        return _with_attributes(object.__new__(cls), self.pairs(*attributes))

    def container(self, description: str, items: Any, *attributes: Any) -> Any:
        made = self.class_of(description)(self.build(items))
        return _with_attributes(made, self.pairs(*attributes))

    def array(self, dtype: str, shape: Sequence[int], buffer: int) -> Any:
        import numpy  # which torch can do without

        if numpy.dtype(dtype).kind not in _ARRAY_KINDS:
            raise TypeError(f"no array of {dtype}")
        return numpy.frombuffer(self.buffers[buffer], dtype).reshape(shape)


_MAKERS: dict[str, Callable[..., Any]] = {
    "list": lambda builder, *items: [*map(builder.build, items)],
    "tuple": lambda builder, *items: tuple(map(builder.build, items)),
    "set": lambda builder, *items: set(map(builder.build, items)),
    "frozenset": lambda builder, *items: frozenset(map(builder.build, items)),
    "dict": _Builder.pairs,
    "defaultdict": lambda builder, name, *items: defaultdict(name and _FACTORIES[name], builder.pairs(*items)),
    "tensor": lambda builder, number: builder.tensors[number],
    "complex": lambda builder, real, imaginary: complex(real, imaginary),
    "bytes": lambda builder, buffer: bytes(builder.buffers[buffer]),
    "dtype": lambda builder, name: dtype_of_name(name),
    "device": lambda builder, name: torch.device(name),
    "array": _Builder.array,
    "number": lambda builder, *said: builder.array(*said)[()],
    "namedtuple": _Builder.namedtuple,
    "dataclass": _Builder.dataclass,
    "object": _Builder.container,
}


def _with_attributes(value: Any, attributes: Mapping[str, Any]) -> Any:
    for name, each in attributes.items():
        object.__setattr__(value, name, each)  # of a frozen dataclass too
    return value
