"""Op sharding rules: the loop factors of an op, and which dimension of each operand and result each one is.

A rule reads like einsum (after Shardy's `OpShardingRule`):

    linear                          "... i, o i, +o -> ... o"
    scaled_dot_product_attention    "b h q d!, b h k! d!, b h k! v -> b h q v"
    reshape [B, S, 12] to [B, S, 3, 4]    "b s (h d) -> b s h d"

A factor on both sides is *pass-through*: shard it, and every rank runs the op on its rows. A factor on the left only
is a *reduction*: the ranks hold terms of a sum. `!` is *need-replication*: the factor must be whole for the op to be
right. `+` marks an additive operand, which a sum over ranks counts once; `~` one of which only dtype and device matter.
A dimension may be several factors, `(g r)`, outermost first, or streams laid end to end, `[t | i]`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Protocol, TypeAlias

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils import _pytree as pytree

from ..errors import RuleError
from ..placement.placements import (
    REPLICATED,
    GroupedHeads,
    Layout,
    Placement,
    Rows,
    Segment,
    Sharded,
    Size,
    exact_quotient,
    held_rows,
    product,
    received_rows,
    size_of,
    whole_layout,
)

_CPU = torch.device("cpu")

Op: TypeAlias = OpOverload | HigherOrderOperator | fx.GraphModule
"""What a node calls: of the Dynamo graph's opaque parts the module."""


@cache
def argument_defaults(op: Op) -> Mapping[str, Any]:
    """The arguments of an op in the order of its schema, with their defaults (None for want of one).

    A higher-order operator has no schema: its arguments are those of its `__call__`.
    """
    if isinstance(op, fx.GraphModule):
        return {node.name: None for node in op.graph.find_nodes(op="placeholder")}
    if isinstance(op, OpOverload):
        schema = op._schema.arguments
        return {each.name: each.default_value if each.has_default_value() else None for each in schema}
    parameters = inspect.signature(op).parameters.items()
    return {name: None if each.default is each.empty else each.default for name, each in parameters}


def named_arguments(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults of those that are not given."""
    defaults = argument_defaults(op)
    return {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}


def in_order(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the keywords in the order of the op's; tensors in this order are its operands."""
    return tuple(args), {name: kwargs[name] for name in argument_defaults(op) if name in kwargs}


@dataclass(frozen=True)
class TensorSpec:
    """Global shape and dtype of a tensor argument or result."""

    shape: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device = _CPU

    @staticmethod
    def of(value: torch.Tensor) -> TensorSpec:
        return TensorSpec(tuple(size_of(s) for s in value.shape), value.dtype, value.device)


@dataclass(frozen=True)
class OpCall:
    """One call of an op as a rule sees it: arguments by name, tensors as `TensorSpec`s."""

    target: Op
    arguments: Mapping[str, Any]
    operands: tuple[TensorSpec, ...]
    operand_names: tuple[str, ...]
    """The schema argument that each operand belongs to; a tensor list gives its name once per tensor."""
    results: tuple[TensorSpec | None, ...]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def overload(self) -> OpOverload:
        """The target, which is no higher-order operator."""
        assert isinstance(self.target, OpOverload)
        return self.target

    @staticmethod
    def of(target: Op, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> OpCall:
        """From values: tensors, fake tensors or numbers."""
        given = named_arguments(target, args, kwargs)
        arguments = {name: pytree.tree_map_only(torch.Tensor, TensorSpec.of, value) for name, value in given.items()}
        operands, names = [], []
        for name, value in arguments.items():
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, TensorSpec):
                    operands.append(leaf)
                    names.append(name)
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        results = tuple(TensorSpec.of(out) if isinstance(out, torch.Tensor) else None for out in outputs)
        return OpCall(target, arguments, tuple(operands), tuple(names), results)

    @staticmethod
    def of_node(node: fx.Node) -> OpCall:
        """From a node of a captured graph. A graph among the arguments, as of a `score_mod`, is a `GraphModule`."""
        target = called_module(node) if node.op == "call_module" else node.target
        assert isinstance(target, (OpOverload, HigherOrderOperator, fx.GraphModule))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), _value)
        return OpCall.of(target, args, kwargs, node.meta["val"])


def _value(node: fx.Node) -> Any:
    if node.op == "get_attr" and "val" not in node.meta:
        return called_module(node)
    return node.meta["val"]


def called_module(node: fx.Node) -> fx.GraphModule:
    """The module that a node names."""
    assert node.graph.owning_module is not None and isinstance(node.target, str)
    module = node.graph.owning_module.get_submodule(node.target)
    assert isinstance(module, fx.GraphModule)
    return module


Factors = tuple[str, ...]


@dataclass(frozen=True)
class Joined:
    """A dimension made of streams laid end to end: what `cat` makes, and `split` and `slice` undo."""

    streams: Factors


Dim = Factors | Joined


class LocalGraph(Protocol):
    """What a local body, or a conversion, may use to write one rank's graph."""

    parts: int
    """P, the number of ranks."""

    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node: ...

    def gather(self, value: fx.Node, placement: Sharded, role: str) -> fx.Node:
        """A sharded value made here, whole on every rank, on its way into sharded work; `role` names the node."""
        ...

    def rank(self) -> fx.Node:
        """This rank's place in the group, int64 `[1]`."""
        ...


class LocalOp(LocalGraph, Protocol):
    """What a local body may use to write the op on one rank's rows into the graph."""

    call: OpCall
    args: tuple[Any, ...]
    """The op's positional arguments, tensors already local."""
    kwargs: dict[str, Any]
    operands: tuple[Placement, ...]
    """The placement of each operand, as in `call.operands`."""
    results: tuple[Placement, ...]
    rng: str

    def operand(self, index: int) -> fx.Node:
        """The local value of operand `index`."""
        ...

    def size(self, size: Size) -> int | fx.Node:
        """A size as an argument: itself, or a node that computes it."""
        ...

    def mask_padding(self, value: fx.Node, placement: Placement, fill: float | int) -> fx.Node:
        """`value` with `fill` in the rows that are padding."""
        ...

    def refill_padding(self, value: fx.Node, placement: Sharded) -> fx.Node:
        """`value` with a real row in the rows that are padding."""
        ...

    def all_reduce(self, value: fx.Node, kind: str = "sum") -> fx.Node: ...

    def replicate(self, value: fx.Node) -> fx.Node:
        """A replicated value made here, such as a reduced one, on its way into sharded work."""
        ...

    def shard(self, value: fx.Node, placement: Sharded) -> fx.Node:
        """This rank's block of a replicated value."""
        ...

    def positions(self, placement: Sharded) -> fx.Node:
        """The global index of each local row, int64 `[local]`."""
        ...

    def select_rows(self, value: fx.Node, placement: Sharded, index: fx.Node) -> fx.Node:
        """The rows with global `index` (int64 `[n]`) of a sharded value, replicated."""
        ...

    def computed_again(self, value: fx.Node) -> fx.Node:
        """`value`, which is not kept for backward but computed once more."""
        ...

    def module(self, name: str, module: fx.GraphModule) -> fx.Node:
        """A graph as an argument: what a higher-order operator calls."""
        ...


@dataclass(frozen=True)
class Halo:
    """Row j of a factor of the result reads `reach` rows of an operand's factor, from row `j * stride - padding` on.

    The operand is the first. Rows that are not there are 0.
    """

    source: str
    reach: int
    stride: int
    padding: int

    def read(self, made: Layout, parts: int) -> Rows:
        """The rows that each rank reads to make its rows of a layout that `layout` gave."""
        held = held_rows(made, parts)
        assert held is not None
        (rows,) = held
        first, last = (self._first(row) for row in (rows.real.start, rows.real.stop - 1))
        count = (rows.count - 1) * self.stride + self.reach
        return Rows(self._first(rows.first), rows.step * self.stride, count, range(first, last + self.reach))

    def _first(self, window: int) -> int:
        return window * self.stride - self.padding

    def layout(self, rows: Layout, size: Size, made: bool) -> Layout | None:
        """How the `size` windows of some rows lie, or for windows that are `made` their rows; None if not in blocks.

        As near to their middle rows as they fit beside the longest stream of the rows, else in blocks of their own;
        where rows lie in granules, as many windows as stride over one.
        """
        held = held_rows(rows, 1)
        if held is None or not isinstance(size, int) or (made and len(held) > 1):
            return None
        at = max(range(len(held)), key=lambda each: held[each].count)
        segment, span = rows.segments[at], int(rows.segments[at].span)
        if self.stride == 1 and size <= span:
            middle = (self.reach - 1) // 2 - self.padding
            before = (-middle if made else middle) - held[at].first
            before = min(max(before, 0), span - size)
            if segment.granule == 1 or (before, size) == (segment.before, segment.size):
                return Layout((Segment(size, segment.granule, before, span - size - before),))
        if all(each.granule == 1 for each in rows.segments):
            return whole_layout(size)
        granule = segment.granule * self.stride if made else exact_quotient(segment.granule, self.stride)
        fits = size == span * self.stride if made else size * self.stride == span
        return whole_layout(size, granule) if granule and fits and span == rows.size else None


Body = Callable[[LocalOp], "fx.Node | tuple[fx.Node, ...]"]


Cut = dict[str, Layout]
"""The layout of each factor that is sharded: one, or all streams of one dimension."""


@dataclass(frozen=True)
class OpSharding:
    """An op run on shards of one factor: what it takes and what it makes."""

    factor: str
    operands: tuple[Sharded | GroupedHeads | None, ...]
    """None: the operand lacks the factor and is needed whole."""
    results: tuple[Placement, ...]


@dataclass(frozen=True)
class OpShardingRule:
    """The factors of one op call. See the module's docstring."""

    operands: tuple[tuple[Dim, ...], ...]
    results: tuple[tuple[Dim, ...], ...]
    sizes: Mapping[str, Size]
    need_replication: frozenset[str] = frozenset()
    additive: frozenset[int] = frozenset()
    metadata: frozenset[int] = frozenset()
    movement: bool = False
    """The op only moves rows: a view, an `expand`, a `repeat_interleave`."""
    shape_argument: str | None = None
    """The argument that repeats the shape of the result, and becomes local with it."""
    bodies: Mapping[str, Body] = field(default_factory=dict)
    """How the op runs on one rank when a factor is sharded, where calling it as it is would be wrong."""
    windows: Mapping[str, tuple[str, Size, Size]] = field(default_factory=dict)
    """A factor of the result that is one of an operand without some first and some last rows, which stay in place."""
    halos: Mapping[str, Halo] = field(default_factory=dict)
    """A factor of the result whose rows read some rows of the first operand's, a few of which other ranks have."""
    rather: OpShardingRule | None = None
    """Another reading of the op, with factors of other names, that is followed where the shards allow it."""
    otherwise: OpShardingRule | None = None
    """Another reading of the op, that is followed where this one cannot be."""

    def __str__(self) -> str:
        def text(dims: tuple[Dim, ...]) -> str:
            words: list[str] = []
            for dim in dims:
                names = [f"{each}!" if each in self.need_replication else each for each in factors_of(dim)]
                if isinstance(dim, Joined):
                    words.append(f"[{' | '.join(names)}]")
                else:
                    words.append(names[0] if len(names) == 1 else f"({' '.join(names)})" if names else "1")
            return " ".join(words)

        signs = ["+" * (at in self.additive) + "~" * (at in self.metadata) for at in range(len(self.operands))]
        left = ", ".join(sign + text(dims) for sign, dims in zip(signs, self.operands, strict=True))
        return f"{left} -> {', '.join(map(text, self.results))}"

    def follow(self, operand: int, placements: Sequence[Placement]) -> OpSharding | None:
        """The op on the shards that operand `operand` comes in, or None if it cannot run so."""
        preferred = self.rather.follow(operand, placements) if self.rather else None
        sharding = preferred or self.run_on(self._cut(self.operands[operand], placements[operand], placements))
        return sharding or (self.otherwise.follow(operand, placements) if self.otherwise else None)

    def body(self, sharding: OpSharding) -> Body | None:
        """How the op runs on one rank, if it cannot be called as it is."""
        readings = [each for each in (self, self.rather, self.otherwise) if each is not None]
        return next((each.bodies[sharding.factor] for each in readings if sharding.factor in each.bodies), None)

    def follow_result(self, result: int, placement: Placement, placements: Sequence[Placement]) -> OpSharding | None:
        """The op that makes result `result` with that placement, or None."""
        return self.run_on(self._cut(self.results[result], placement, placements))

    def shard_factor(self, factor: str, granule: Size = 1) -> OpSharding | None:
        """The op on plain shards of one factor, `granule` rows staying together."""
        return self.run_on(self._with_neighbours(factor, whole_layout(self.sizes[factor], granule), ()))

    def carry(self, operand: int, placements: Sequence[Placement]) -> tuple[Placement, ...]:
        """Where the results would sit had the op kept its operand's placement, need-replication or not.

        A whole dimension that changes its size in its place, as a length does in a convolution, is still the sequence.
        """
        cut = self._mark(self.operands[operand], placements[operand], placements)
        return tuple((cut and self._place(dims, cut)) or REPLICATED for dims in self.results)

    def carry_back(self, result: int, placement: Placement) -> tuple[Sharded | None, ...]:
        """Where each operand would sit for the result to have that placement, need-replication or not."""
        cut = self._mark(self.results[result], placement, ())
        return tuple(self._place(dims, cut) if cut else None for dims in self.operands)

    def borrowable(self, operand: int) -> tuple[tuple[str, int], ...]:
        """The (factor, dimension) pairs of an operand that pass through, each the only one to pass in its dimension."""
        found = []
        for index, dim in enumerate(self.operands[operand]):
            passing = [each for each in factors_of(dim) if each not in self.need_replication and self._made(each)]
            if isinstance(dim, tuple) and len(passing) == 1:
                found.append((passing[0], index))
        return tuple(found)

    def _made(self, factor: str) -> bool:
        return any(factor in factors_of(dim) for dims in self.results for dim in dims)

    def run_on(self, cut: Cut | None) -> OpSharding | None:
        """The op on the shards that a cut makes, or None if a rank's rows are not enough to run it."""
        if not cut or not self.need_replication.isdisjoint(cut):
            return None
        factor = next(iter(cut))
        for made, (source, low, high) in self.windows.items():
            window = cut[source].cropped(low, high) if source in cut else None
            if window is None:
                return None
            cut = {**cut, made: window}
        with_halos = self._with_halos(cut)
        if with_halos is None:
            return None
        cut = with_halos
        operands = tuple(self._place(dims, cut) for dims in self.operands)
        results = tuple(self._place(dims, cut) for dims in self.results)
        # A result without the factor is a sum over ranks, or made by each: its gradient is not that of one device.
        if not all(results) and not any(each in self.bodies for each in cut):
            return None
        return OpSharding(factor, operands, tuple(result or REPLICATED for result in results))

    def _with_halos(self, cut: Cut) -> Cut | None:
        """With the windows of the rows that are cut, and the rows of windows; None if they would not lie in blocks."""
        for made, halo in self.halos.items():
            for given, wanted in ((halo.source, made), (made, halo.source)):
                if given in cut and wanted not in cut:
                    layout = halo.layout(cut[given], self.sizes[wanted], given == made)
                    if layout is None:
                        return None
                    cut = {**cut, wanted: layout}
        return cut

    def received_share(self, sharding: OpSharding, parts: int) -> float:
        """What share of its first operand each of `parts` ranks receives for the windows that it makes."""
        source, result = sharding.operands[0], sharding.results[0]
        for made, halo in self.halos.items():
            if sharding.factor in (made, halo.source) and isinstance(source, Sharded) and isinstance(result, Sharded):
                return received_rows(source.layout, [halo.read(result.layout, parts)], parts) / int(source.layout.size)
        return 0.0

    @cached_property
    def mixed(self) -> frozenset[str]:
        """The factors of which the op reads more than one row to make one."""
        return self.need_replication | self.halos.keys() | {halo.source for halo in self.halos.values()}

    def _cut(self, dims: tuple[Dim, ...], placement: Placement, placements: Sequence[Placement]) -> Cut | None:
        """The factors that a placement of a tensor with these dimensions shards, each with its own layout."""
        if not isinstance(placement, Sharded):
            return None
        dim = dims[placement.dim]
        if isinstance(dim, Joined):
            layouts = divide(placement.layout, [self.sizes[stream] for stream in dim.streams])
            return dict(zip(dim.streams, layouts, strict=True)) if layouts else None
        for at, factor in enumerate(dim):
            layout = placement.layout.within(self._product(dim[:at]), self.sizes[factor], self._product(dim[at + 1 :]))
            if layout is not None:
                return self._with_neighbours(factor, layout, placements)
        return None

    def _mark(self, dims: tuple[Dim, ...], placement: Placement, placements: Sequence[Placement]) -> Cut | None:
        """As `_cut`; streams whose boundaries are not those of the placement's segments are cut plainly."""
        cut = self._cut(dims, placement, placements)
        if cut is None and isinstance(placement, Sharded):
            dim = dims[placement.dim]
            if isinstance(dim, Joined):
                return {stream: whole_layout(self.sizes[stream]) for stream in dim.streams}
        if not cut:
            return cut
        cut = self._with_halos(cut) or cut
        resized = {self._resized[factor] for factor in cut if factor in self._resized} - cut.keys()
        return {**cut, **{factor: whole_layout(self.sizes[factor]) for factor in resized}}

    @cached_property
    def _resized(self) -> Mapping[str, str]:
        """Whole dimensions of the first operand and a result in the same place, `l! -> m!`, both ways."""
        pairs: dict[str, str] = {}
        first = self.operands[0] if self.operands else ()
        for result in self.results:
            for before, after in zip(first, result, strict=False):
                both = (*factors_of(before), *factors_of(after))
                if len(set(both)) == 2 == len(both) and self.mixed.issuperset(both):
                    pairs |= {both[0]: both[1], both[1]: both[0]}
        return pairs

    def _with_neighbours(self, factor: str, layout: Layout, placements: Sequence[Placement]) -> Cut | None:
        """Streams of one dimension are cut together: each as it comes, or plainly."""
        cut = {factor: layout}
        for dims in (*self.operands, *self.results):
            for dim in dims:
                if isinstance(dim, Joined) and factor in dim.streams:
                    cut |= {each: whole_layout(self.sizes[each]) for each in dim.streams if each != factor}
        for dims, placement in zip(self.operands, placements, strict=False):
            if len(cut) > 1 and isinstance(placement, Sharded):
                dim = dims[placement.dim]
                if isinstance(dim, tuple) and len(dim) == 1 and dim[0] in cut:
                    cut[dim[0]] = placement.layout
        if len(cut) > 1 and any(each.outer != 1 for each in cut.values()):
            return None
        return cut

    def _place(self, dims: tuple[Dim, ...], cut: Cut) -> Sharded | None:
        for index, dim in enumerate(dims):
            if isinstance(dim, Joined):
                if all(stream in cut for stream in dim.streams):
                    return Sharded(index, Layout(tuple(s for each in dim.streams for s in cut[each].segments)))
                continue
            for at, factor in enumerate(dim):
                if factor in cut:
                    scaled = cut[factor].scaled(self._product(dim[:at]), self._product(dim[at + 1 :]))
                    return Sharded(index, scaled)
        return None

    def layout_within(self, dim: Factors, layout: Layout) -> Layout:
        """The layout of a dimension whose last factor has this one."""
        return layout.scaled(self._product(dim[:-1]), 1)

    def _product(self, factors: Factors) -> Size:
        return product([self.sizes[factor] for factor in factors])


def divide(layout: Layout, sizes: Sequence[Size]) -> list[Layout] | None:
    """Deal the segments of a layout to streams of these sizes; None where a boundary falls inside a segment."""
    if not isinstance(layout.outer, int):
        return None
    streams, left = [], list(layout.segments * layout.outer)
    for size in sizes:
        taken: list[Segment] = []
        while Layout(tuple(taken)).size != size:
            if not left:
                return None
            taken.append(left.pop(0))
        streams.append(Layout(tuple(taken)))
    return None if left else streams


def factors_of(dim: Dim) -> Factors:
    """The factors of a dimension, streams included."""
    return dim.streams if isinstance(dim, Joined) else dim


def all_factors(tensors: Iterable[Iterable[Dim]]) -> set[str]:
    """The factors of some tensors."""
    return {factor for dims in tensors for dim in dims for factor in factors_of(dim)}


@dataclass(frozen=True)
class _Term:
    """One operand or result of a rule's text."""

    dims: tuple[str | tuple[str, ...], ...]
    additive: bool
    metadata: bool


_TOKEN = re.compile(r"\.\.\.|\([a-z! ]*\)|[a-z]!?|1")


def _parse_term(text: str, rule: str, flagged: set[str]) -> _Term:
    body = text.strip()
    additive, metadata = body.startswith("+"), body.startswith("~")
    body = body.lstrip("+~")
    dims: list[str | tuple[str, ...]] = []
    rest = _TOKEN.sub("", body).strip()
    if rest:
        raise RuleError(
            f"sharding rule {rule!r}: cannot read {rest!r} in {text.strip()!r}; a dimension is a letter, "
            "`letter!`, `(a b)`, `...` or 1"
        )
    for token in _TOKEN.findall(body):
        names = re.findall(r"[a-z]!?", token)
        flagged |= {name[0] for name in names if name.endswith("!")}
        if token == "...":
            dims.append(token)
        else:
            dims.append(tuple(name[0] for name in names))
    return _Term(tuple(dims), additive, metadata)


def own_dimension(text: str, operand: int, factor: str) -> int | None:
    """Which dimension of an operand a factor is by itself, by the text alone; counted from the end behind `...`."""
    terms = text.partition("->")[0].split(",")
    dims = _parse_term(terms[operand], text, set()).dims if operand < len(terms) else ()
    if (factor,) not in dims:
        return None
    at = dims.index((factor,))
    return at - len(dims) if "..." in dims[:at] else at


def parse_rule(text: str, call: OpCall, **extra: Any) -> OpShardingRule:
    """Read a rule and fit it to the shapes of one call.

    Operands in the text stand for the tensor arguments of the op's schema, in order; arguments that are None are
    passed over. Sizes come from the shapes; a dimension of size 1 where the factor is larger broadcasts: the operand
    lacks the factor. Keyword arguments go to `OpShardingRule`.

    Raises:
        RuleError: the text does not parse, or does not fit the shapes.
    """
    left, arrow, right = text.partition("->")
    if not arrow:
        raise RuleError(f"sharding rule {text!r} has no '->'")
    flagged: set[str] = set()
    terms = [_parse_term(part, text, flagged) for part in left.split(",")]
    made = [_parse_term(part, text, flagged) for part in right.split(",")]
    assert isinstance(call.target, OpOverload)
    names = [a.name for a in call.target._schema.arguments if "Tensor" in str(a.type)]
    present = [term for term, name in zip(terms, names, strict=False) if name in call.operand_names]
    results = [spec for spec in call.results if spec is not None]
    if len(present) != len(call.operands) or len(made) != len(results):
        raise RuleError(
            f"sharding rule {text!r} has {len(terms)} operands and {len(made)} results; {call.target} was called with "
            f"{len(call.operands)} tensors and gave {len(results)}"
        )
    bound = [
        _expand_ellipsis(term, spec, text, call)
        for term, spec in zip([*present, *made], [*call.operands, *results], strict=True)
    ]
    sizes = _solve_sizes(bound, text, call)
    operands: list[tuple[Dim, ...]] = []
    produced: list[tuple[Dim, ...]] = []
    for index, (dims, spec) in enumerate(bound):
        placed = tuple(
            () if spec.shape[at] == 1 else tuple(f for f in dim if sizes[f] != 1) for at, dim in enumerate(dims)
        )
        (operands if index < len(present) else produced).append(placed)
    return OpShardingRule(
        tuple(operands),
        tuple(produced),
        sizes,
        frozenset(flagged),
        frozenset(i for i, term in enumerate(present) if term.additive),
        frozenset(i for i, term in enumerate(present) if term.metadata),
        **extra,
    )


Bound = tuple[tuple[Factors, ...], TensorSpec]


def _expand_ellipsis(term: _Term, spec: TensorSpec, text: str, call: OpCall) -> Bound:
    named = [dim for dim in term.dims if dim != "..."]
    extra = len(spec.shape) - len(named)
    if extra < 0 or (extra and "..." not in term.dims):
        raise RuleError(
            f"sharding rule {text!r} does not fit {call.target}: a shape of {len(spec.shape)} dimensions, "
            f"{tuple(map(str, spec.shape))}, for {len(named)}"
        )
    dims: list[Factors] = []
    for dim in term.dims:
        if dim == "...":
            dims.extend((f".{extra - index}",) for index in range(extra))
        else:
            dims.append(tuple(dim))
    return tuple(dims), spec


def _solve_sizes(bound: Sequence[Bound], text: str, call: OpCall) -> dict[str, Size]:
    """The size of each factor, from the dimensions in which it is the only unknown."""
    sizes: dict[str, Size] = {}
    dims = [(dim, size) for factors, spec in bound for dim, size in zip(factors, spec.shape, strict=True)]
    wanted = {factor for dim, _ in dims for factor in dim}
    while True:
        for dim, size in dims:
            unknown = [factor for factor in dim if factor not in sizes]
            if len(unknown) == 1 and (size != 1 or len(dim) > 1):
                known = product([sizes[f] for f in dim if f in sizes])
                quotient = exact_quotient(size, known)
                if quotient is None:
                    raise RuleError(
                        f"sharding rule {text!r} does not fit {call.target}: {known} does not divide {size}"
                    )
                sizes[unknown[0]] = quotient
                break
        else:
            # A single row may broadcast to a size that another dimension tells; these nothing else tells.
            ones = {factor for dim, size in dims if size == 1 for factor in dim if factor not in sizes}
            if not ones:
                break
            sizes |= dict.fromkeys(ones, 1)
    if wanted - set(sizes):
        raise RuleError(f"sharding rule {text!r}: nothing tells the size of {sorted(wanted - set(sizes))}")
    for dim, size in dims:
        if size != 1 and dim and product([sizes[f] for f in dim]) != size:
            raise RuleError(
                f"sharding rule {text!r} does not fit {call.target}: {' '.join(dim)} is "
                f"{product([sizes[f] for f in dim])} in one place and {size} in another"
            )
    return sizes
