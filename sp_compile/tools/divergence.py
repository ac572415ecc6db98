"""The first node of the rewritten graphs whose value, or whose gradient, is not that of one device.

Every call of a rewritten graph was recorded. The captured graph runs on one device, the rewritten one on P simulated
ranks, node by node on the same inputs. Each node of the rewritten graph that holds a captured value holds it in a
planned placement, so that every rank's rows can be compared with those of the whole. Gradients are compared likewise,
from the last node to the first: of the whole value, and then of each use of it, to tell which op sent back what is
wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import user_line
from ..ir.graph import source_of
from ..ops.exchange import GatherExchange
from ..placement.placements import (
    GroupedHeads,
    Layout,
    Placement,
    Replicated,
    Segment,
    Sharded,
    Size,
    local_shape,
    whole_layout,
)
from ..planning.cost import packed_exchanges, sent_by
from ..runtime.records import RewrittenGraph
from .comparison import is_rounding, magnitude_of, nudged, relative_error, rounding_bound, scale_of
from .simulation import bare, on_rank

aten = torch.ops.aten
_UNDEFINED = (aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided)
_NUDGES = 2
_MOVES = (
    torch.ops.sp.shard.default,
    torch.ops.sp.all_gather.default,
    torch.ops.sp.all_to_all.default,
    torch.ops.sp.all_to_all_kv.default,
    torch.ops.sp.all_gather_replicate.default,
    aten.permute.default,
    aten.repeat_interleave.self_int,
)
"""What brings a value from one placement to another, in one step or several."""


@dataclass(frozen=True)
class Divergence:
    """A node at which P ranks part from one device."""

    graph: str
    direction: str
    """`forward`: the value of the node is wrong. `backward`: the gradient that it sends to `value` is."""
    node: str
    """Of the rewritten graph."""
    op: str
    """As captured, or what moved the value."""
    value: str
    """The captured value that the node holds, or whose gradient is wrong."""
    errors: tuple[float, ...]
    """Of each rank, relative to the largest value."""
    placement: str
    line: str
    """Of the user's file."""
    rule: str

    def __str__(self) -> str:
        value, gradient = f"the value of {self.node}", f"the gradient that {self.node} sends to {self.value}"
        rows = {
            "op": self.op,
            "line": self.line,
            "placement": self.placement,
            "rule": self.rule,
            "errors": ", ".join(f"{error:.1e}" for error in self.errors) + " (by rank)",
        }
        what = value if self.direction == "forward" else gradient
        lines = [f"  {name:<11}{text}" for name, text in rows.items()]
        return "\n".join([f"The first node that differs, {self.direction}: {what}, in {self.graph}", *lines])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Call:
    """One call of a graph on simulated ranks: what it was given, and the gradients of its outputs."""

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    grad_mode: bool
    cotangents: dict[int, Tensor] = field(default_factory=dict)


class Recorder:
    """An inner backend that runs the bare graph, and keeps every call of it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        ranks = bare(module, inputs)

        def run(*args: Any) -> Any:
            call = Call(module, tuple(_kept(each) for each in args), torch.is_grad_enabled())
            self.calls.append(call)
            outputs = ranks(*args)
            for at, output in enumerate(outputs):
                if isinstance(output, Tensor) and output.requires_grad and not output.is_leaf:
                    output.register_hook(partial(_keep_sum, call.cotangents, at))
            return outputs

        return run


def _kept(value: Any, pattern: int | None = None) -> Any:
    """A copy, its last bits changed if a pattern is given."""
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().clone() if pattern is None else nudged(value.detach(), pattern)
    return copy.requires_grad_(value.requires_grad)


def _keep_sum(table: dict[Any, Tensor], key: Any, gradient: Tensor | None) -> None:
    if gradient is not None:
        table[key] = table[key] + gradient if key in table else gradient


def first_divergence(calls: Sequence[Call], graphs: Sequence[RewrittenGraph], tolerance: float) -> Divergence | None:
    """The first node that differs by more than `tolerance`: forward in the order of the calls, then backward from the
    last. None if all agree. To be called inside the `simulate` that the calls were made in."""
    known = {graph.rewritten: graph for graph in graphs}
    pairs = [_Pair(call, known[call.module], tolerance) for call in calls if call.module in known]
    with _disable_current_modes():
        for pair in pairs:
            if (found := pair.first_value()) is not None:
                return found
        return next((found for pair in reversed(pairs) if (found := pair.first_gradient()) is not None), None)


class _Replay(fx.Interpreter):
    """Runs a graph and keeps every value, and the gradient of every use of one."""

    def __init__(self, module: fx.GraphModule, ranks: int) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.ranks = range(ranks)
        self.kept: dict[tuple[str, str], Tensor] = {}
        self.nodes = {node.name: node for node in module.graph.nodes}

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        def use(node: fx.Node) -> Any:
            value = self.env[node]
            if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
                value = value.view_as(value)
                value.register_hook(partial(_keep_sum, self.kept, (node.name, n.name)))
            return value

        return fx.node.map_arg((n.args, n.kwargs), use)

    def run_node(self, n: fx.Node) -> Any:
        if n.target is aten.copy_.default:  # what the graph writes to its inputs, at its end
            return self.fetch_args_kwargs_from_env(n)[0][1]
        return super().run_node(n)

    def step(self, call: Call, inputs: Sequence[Any], cotangents: Mapping[int, Tensor]) -> None:
        """Forward, and backward from these gradients of the outputs."""
        torch.manual_seed(0)
        with torch.set_grad_enabled(call.grad_mode):
            outputs = self.run(*inputs, enable_io_processing=False)
        leaves = [each for each in inputs if isinstance(each, Tensor) and each.requires_grad]
        ends = [(outputs[at], gradient) for at, gradient in cotangents.items() if outputs[at].requires_grad]
        if leaves and ends:
            roots, gradients = zip(*ends, strict=True)
            torch.autograd.grad(roots, leaves, gradients, allow_unused=True)

    def value(self, name: str) -> tuple[Any, ...]:
        """The value of a node on each rank."""
        value = self.env[self.nodes[name]]
        return tuple(on_rank(value, rank) for rank in self.ranks)

    def gradient(self, name: str, users: Collection[str] | None = None) -> tuple[Tensor, ...] | None:
        """The gradient of a node's value on each rank: the whole one, or what these users send back."""
        sent = [g for (value, user), g in self.kept.items() if value == name and (users is None or user in users)]
        return tuple(_total([on_rank(each, rank) for each in sent]) for rank in self.ranks) if sent else None


def _total(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack([each.detach() for each in terms]).sum(0)


def _whole_gradient(replay: _Replay, value: str, like: Tensor, users: Collection[str] | None = None) -> Tensor:
    gradient = replay.gradient(value, users)
    return gradient[0] if gradient is not None else torch.zeros_like(like)


class _Pair:
    """One call on one device and on P ranks."""

    def __init__(self, call: Call, graph: RewrittenGraph, tolerance: float) -> None:
        self.graph, self.tolerance = graph, tolerance
        self.parts = graph.plan.parts
        self.alone, self.ranks = _Replay(graph.captured, 1), _Replay(graph.rewritten, self.parts)
        inputs = [on_rank(each, 0) for each in call.inputs[:-1]]  # the last one is the rank
        with _disable_current_modes():
            inputs = [_kept(each) for each in inputs]
            cotangents = {at: on_rank(each, 0) for at, each in call.cotangents.items()}
            self.alone.step(call, inputs, cotangents)
            self.nudged = [_Replay(graph.captured, 1) for _ in range(_NUDGES)]
            for pattern, replay in enumerate(self.nudged):
                replay.step(call, [_kept(each, pattern) for each in inputs], cotangents)
        self.magnitude = magnitude_of([*inputs, *cotangents.values()])
        self.ranks.step(call, call.inputs, call.cotangents)
        symbols = dict(_symbols(graph.captured.graph.find_nodes(op="placeholder"), inputs))
        self.values = [(node, value, _with_sizes(at, symbols)) for node, value, at in graph.sharded.values]

    def first_value(self) -> Divergence | None:
        for node, value, placement in self.values:
            (expected,) = self.alone.value(value)
            packet = getattr(self.alone.nodes[value].target, "overloadpacket", None)
            if not isinstance(expected, Tensor) or packet in _UNDEFINED:
                continue
            got = self.ranks.value(node)
            errors = tuple(self._error(expected.detach(), got[rank], placement, rank) for rank in range(self.parts))
            nudges = [relative_error(expected, *replay.value(value)) for replay in self.nudged]
            if self._wrong(errors) and not is_rounding(errors, nudges, self._bound(expected)):
                return self._found("forward", node, value, value, errors, placement)
        return None

    def _bound(self, expected: Tensor) -> float:
        return rounding_bound(expected, self.tolerance, self.magnitude)

    def _error(self, whole: Tensor, local: Any, placement: Placement, rank: int) -> float:
        """Of the rows of one rank that are no padding."""
        if not isinstance(local, Tensor) or local.shape != self._local_shape(whole, placement):
            return float("inf")
        if not isinstance(placement, Replicated):
            here, there = self._rows(placement, whole, rank)
            local, scale = local.index_select(placement.dim, here), scale_of(whole)
            return relative_error(whole.index_select(placement.dim, there), local, scale)
        return relative_error(whole, local)

    def first_gradient(self) -> Divergence | None:
        whole: dict[str, tuple[str, Placement]] = {}
        for node, value, placement in self.values:
            # Where the op made it; a node that holds several values has the gradient of the first.
            if value not in whole and all(node != other for other, _ in whole.values()):
                whole[value] = node, placement
        for value, (node, placement) in reversed(whole.items()):
            (like,) = self.alone.value(value)
            if not isinstance(like, Tensor):
                continue
            expected = _whole_gradient(self.alone, value, like)
            errors = self._gradient_errors([expected] * self.parts, self.ranks.gradient(node), placement)
            nudges = [relative_error(expected, _whole_gradient(replay, value, like)) for replay in self.nudged]
            if self._wrong(errors) and not is_rounding(errors, nudges, self._bound(expected)):
                return self._sender(node, value, placement, like, errors)
        return None

    def _gradient_errors(
        self, expected: Sequence[Tensor], got: Sequence[Tensor] | None, placement: Placement
    ) -> tuple[float, ...]:
        """Of the rows of each rank, and of its padding, whose gradient is 0."""
        wanted = [self._cut(each, placement, rank) for rank, each in enumerate(expected)]
        return tuple(
            relative_error(each, got[rank] if got is not None else torch.zeros_like(each), scale_of(expected[rank]))
            for rank, each in enumerate(wanted)
        )

    def _sender(
        self, node: str, value: str, placement: Placement, like: Tensor, errors: tuple[float, ...]
    ) -> Divergence:
        """Which op sent a gradient that is wrong: what brought the value elsewhere, or one that used it."""
        holders = {name: at for name, held, at in self.values if held == value}
        for name, at in holders.items():
            origin = self._origin(name, holders)
            if origin is None:
                continue
            parent, first = origin
            received = self._assembled(name, at, like, None)
            found = self._gradient_errors(received, self.ranks.gradient(parent, [first]), holders[parent])
            if self._wrong(found):
                return self._found("backward", name, value, value, found, holders[parent])
        for user in self.alone.nodes[value].users:
            nodes = [name for name, made_for in self.graph.sharded.origins.items() if made_for == user.name]
            expected = _whole_gradient(self.alone, value, like, [user.name])
            terms = [self._assembled(name, at, like, nodes) for name, at in holders.items()]
            totals = [_total(of_rank) for of_rank in zip(*terms, strict=True)]
            found = tuple(relative_error(expected, each) for each in totals)
            if self._wrong(found):
                culprit = user.name if user.name in self.ranks.nodes else next(reversed(nodes), node)
                return self._found("backward", culprit, user.name, value, found, placement)
        return self._found("backward", node, value, value, errors, placement)

    def _origin(self, name: str, holders: Mapping[str, Placement]) -> tuple[str, str] | None:
        """Where a value was brought from: the node that held it before, and the first one on the way."""
        node = self.ranks.nodes[name]
        while node.op == "call_function":
            source, at = source_of(node)
            if source.target is torch.ops.sp.all_to_all_packed.default and source is not node:
                return sent_by(source)[at].name, source.name
            before = next((each.name for each in node.all_input_nodes if each.name in holders), None)
            if before is not None:
                return before, node.name
            if node.target not in _MOVES or not isinstance(node.args[0], fx.Node):
                return None
            node = node.args[0]
        return None

    def _assembled(
        self, name: str, placement: Placement, like: Tensor, users: Collection[str] | None
    ) -> Sequence[Tensor]:
        """The gradient of the whole value that a node holds, as each rank has it, from what all ranks hold."""
        own = self.ranks.gradient(name, users)
        if own is None:
            return [torch.zeros_like(like)] * self.parts
        if isinstance(placement, Replicated):
            return [_total(own)] * self.parts if self._is_summed(self.ranks.nodes[name]) else own
        whole = torch.zeros_like(like)
        for rank, each in enumerate(own):
            here, there = self._rows(placement, like, rank)
            whole.index_add_(placement.dim, there, each.index_select(placement.dim, here))
        return [whole] * self.parts

    def _is_summed(self, node: fx.Node) -> bool:
        """Whether each rank has a term of the gradient of a whole value, in front of a sum over ranks."""
        source, at = source_of(node)
        if source.target is torch.ops.sp.all_to_all_packed.default:
            return isinstance(packed_exchanges(source, self.parts)[at][1], GatherExchange)
        return node.target in (torch.ops.sp.replicate.default, torch.ops.sp.all_gather_replicate.default)

    def _wrong(self, errors: Sequence[float]) -> bool:
        return any(not error <= self.tolerance for error in errors)

    def _rows(self, placement: Sharded | GroupedHeads, whole: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """(local, global) index of the rows of a rank that are no padding."""
        if isinstance(placement, Sharded):
            rows = placement.layout.real_rows(rank, self.parts)
        else:
            queries = whole_layout(placement.query_heads).real_rows(rank, self.parts)
            shared = placement.query_heads // whole.shape[placement.dim]
            rows = [(here, query // shared) for here, query in queries]
        index = torch.tensor(rows, dtype=torch.int64, device=whole.device).reshape(-1, 2)
        return index[:, 0], index[:, 1]

    def _cut(self, whole: Tensor, placement: Placement, rank: int) -> Tensor:
        """A rank's block of a whole gradient, with zeros for padding."""
        if not isinstance(placement, Sharded):
            return whole
        here, there = self._rows(placement, whole, rank)
        block = whole.new_zeros(self._local_shape(whole, placement))
        return block.index_copy(placement.dim, here, whole.index_select(placement.dim, there))

    def _local_shape(self, whole: Tensor, placement: Placement) -> tuple[int, ...]:
        return tuple(int(size) for size in local_shape(whole.shape, placement, self.parts))

    def _found(
        self, direction: str, node: str, placed: str, value: str, errors: tuple[float, ...], placement: Placement
    ) -> Divergence:
        """A divergence at a rewritten node that was written for the captured node `placed`."""
        captured = self.alone.nodes[placed]
        made_at = next((name for name, held, _ in self.values if held == placed), node)
        is_moved = placed == value and node != made_at
        op = _op(self.ranks.nodes[node] if is_moved else captured)
        return Divergence(
            self.graph.name,
            direction,
            node,
            op,
            value,
            errors,
            str(placement),
            user_line(captured),
            self._rule(captured),
        )

    def _rule(self, node: fx.Node) -> str:
        planned = self.graph.plan.nodes.get(source_of(node)[0])
        rule = self.graph.rules.rule(source_of(node)[0]) if planned is not None else None
        if planned is None or rule is None:
            return "none"
        along = f"along {planned.sharding.factor}" if planned.sharding is not None else "on whole values"
        return f"{rule}, {along}"


def _with_sizes(placement: Placement, symbols: Mapping[sympy.Symbol, int]) -> Placement:
    """A placement with the sizes of one call."""
    if not isinstance(placement, Sharded):
        return placement

    def known(size: Size) -> int:
        return size if isinstance(size, int) else int(size.xreplace(symbols))

    segments = (
        Segment(known(s.size), known(s.granule), known(s.before), known(s.after)) for s in placement.layout.segments
    )
    return Sharded(placement.dim, Layout(tuple(segments), known(placement.layout.outer)))


def _op(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}"
    return node.op if node.op == "placeholder" else getattr(target, "__name__", str(target))


def _symbols(placeholders: Sequence[fx.Node], inputs: Sequence[Any]) -> Iterator[tuple[sympy.Symbol, int]]:
    """The symbols of a captured graph, and what they stand for in a call."""
    for node, given in zip(placeholders, inputs, strict=True):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else [value]
        known = given.shape if isinstance(value, Tensor) else [given]
        for symbolic, size in zip(sizes, known, strict=True):
            if isinstance(symbolic, torch.SymInt) and symbolic.node.expr.is_Symbol:
                yield symbolic.node.expr, int(size)
