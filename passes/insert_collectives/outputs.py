"""How outputs leave: gathered, as rows, or as views of one another, for what is written to one shows in the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._prims_common import is_non_overlapping_and_dense_or_false

from sp_compile.ir.effects import GRAD_MODE, memory_order
from sp_compile.ir.graph import is_tensor, source_of
from sp_compile.ir.plan import LeavingOutput, Output
from sp_compile.passes.insert_collectives.writer import GraphWriter
from sp_compile.placement.placements import REPLICATED, Placement, Replicated, Sharded

if TYPE_CHECKING:
    from sp_compile.passes.insert_collectives.rewriter import Rewriter

aten = torch.ops.aten


class Outputs:
    """The outputs of a graph whose nodes are written. `kinds` is how each is to leave."""

    def __init__(self, rewriter: Rewriter, kinds: Sequence[Output]) -> None:
        self.rewriter, self.kinds = rewriter, kinds
        self.writer, self.conversions, self.plan = rewriter.writer, rewriter.conversions, rewriter.plan

    def write(self, node: fx.Node) -> tuple[LeavingOutput, ...]:
        """Write the output node; how each output leaves."""
        leaving: list[LeavingOutput] = []
        outputs: list[Any] = []
        gathered_before: dict[fx.Node, fx.Node] = {}
        returned = node.args[0]
        assert isinstance(returned, tuple)
        shared = _shared_memory([each for each in returned if isinstance(each, fx.Node) and is_tensor(each)])
        for index, (output, kind) in enumerate(zip(returned, self.kinds, strict=True)):
            placement, gathered = self._leaves(output, kind, shared)
            if not isinstance(output, fx.Node):
                outputs.append(output)
            elif not is_tensor(output):
                outputs.append(self.rewriter.local_argument(output))
            elif output in shared:
                outputs.append(self._view_again(output))
            elif isinstance(placement, Replicated):
                if output not in gathered_before:  # what is returned twice is one tensor
                    whole = self._gather_output(output, f"gather_output_{index}")
                    twice = returned.count(output) > 1 and _viewed(whole) is not None
                    gathered_before[output] = _in_memory_of_its_own(self.writer, whole) if twice else whole
                self.conversions.once(output, f"output {index}", partial(gathered_before.__getitem__, output))
                outputs.append(gathered_before[output])
            else:
                outputs.append(self.conversions.convert(output, placement))
            padded = isinstance(placement, Sharded) and not placement.layout.is_even(self.plan.parts)
            size = placement.layout.size if isinstance(placement, Sharded) and kind == "dtensor" else None
            leaving.append(LeavingOutput(placement, padded, size, gathered))
        for each in leaving:
            if each.is_padded:
                assert isinstance(each.placement, Sharded)
                outputs.append(self._real_rows(each.placement))
            if each.size is not None and not isinstance(each.size, int):
                outputs.append(self.writer.size(each.size))
        self.writer.graph.output(tuple(outputs)).meta = dict(node.meta)
        return tuple(leaving)

    def _leaves(self, output: Any, kind: Output, shared: Collection[fx.Node]) -> tuple[Placement, str]:
        """The placement that an output leaves in, and why it is whole though it was to stay sharded."""
        placement = self.plan.placement(output) if isinstance(output, fx.Node) else REPLICATED
        if kind == "gather" or not isinstance(placement, Sharded):
            return REPLICATED, ""
        home = self.plan.home(output)
        if isinstance(home, Sharded) and home.dim != placement.dim:
            placement = home
        elif not isinstance(home, Sharded) and kind == "shard":
            return REPLICATED, "which of its dimensions is the sequence is not known: 'dtensor' says which is sharded"
        if output in shared:
            return REPLICATED, "it shares its memory with another output or an input: return a clone"
        if kind == "dtensor" and not placement.layout.is_chunked(self.plan.parts):
            return REPLICATED, f"no DTensor has rows that lie on the ranks as {placement}: take 'shard' for it"
        return placement, ""

    def _gather_output(self, value: fx.Node, role: str) -> fx.Node:
        """A whole output, laid out in memory as the captured one: code behind a graph break may look at it there."""
        placement, order = self.plan.placement(value), memory_order(value.meta["val"])
        if not isinstance(placement, Sharded):
            whole = self.conversions.convert(value, REPLICATED, role)
            return self.rewriter.in_order_of(whole, order) if _has_own_memory(value) else whole
        if order == sorted(order):
            return self.conversions.convert(value, REPLICATED, role)
        local = self.writer.emit(aten.permute.default, self.conversions.convert(value, placement), order)
        moved = Sharded(order.index(placement.dim), placement.layout)
        whole = self.writer.named(self.writer.on_dim(torch.ops.sp.all_gather.default, local, moved), role)
        return self.writer.emit(aten.permute.default, whole, [order.index(dim) for dim in range(len(order))])

    def _view_again(self, value: fx.Node) -> fx.Node:
        """A whole value that is a view of another, as a view: what is written to the one shows in the other."""
        return self.conversions.once(value, "view", lambda: self._as_view(value))

    def _as_view(self, value: fx.Node) -> fx.Node:
        base = _viewed(value)
        if base is None:
            whole = self._gather_output(value, f"gather_output_{value}")
            return whole if value.op == "placeholder" else _in_memory_of_its_own(self.writer, whole)
        source, result = source_of(value)
        assert isinstance(source.target, torch._ops.OpOverload)
        args, kwargs = self.rewriter.arguments(source, [self._view_again(base)])
        with self._in_grad_mode_of(source):
            view = self.writer.add(value, source.target, args, kwargs)
        return view if source is value else self.writer.add(value, getitem, (view, result), {})

    @contextmanager
    def _in_grad_mode_of(self, node: fx.Node) -> Iterator[None]:
        """What is written inside has a gradient if what a captured node made had one."""
        there, here = self.rewriter.grad_modes[node], self.rewriter.grad_mode
        differs = there is not None is not here and there != here
        if differs:
            self.writer.add(None, GRAD_MODE, (there,), {})
        yield
        if differs:
            self.writer.add(None, GRAD_MODE, (here,), {})

    def _real_rows(self, placement: Sharded) -> fx.Node:
        positions = self.writer.positions(placement)
        marked = self.writer.on_dim(torch.ops.sp.mask_padding.default, positions, Sharded(0, placement.layout), -1)
        return self.writer.emit(aten.ge.Scalar, marked, 0)


def _in_memory_of_its_own(writer: GraphWriter, whole: fx.Node) -> fx.Node:
    """A copy of a whole output that others are views of.

    AOTAutograd makes those anew from this one, by the views that it has seen since the memory of both was made. So this
    one has to be the first in its memory, and no view itself.
    """
    return writer.emit(aten.clone.default, whole)


def _has_own_memory(value: fx.Node) -> bool:
    """Whether a value is made by an op and fills its memory in some order; not an input, nor what is expanded."""
    tensor = value.meta["val"]
    return value.op == "call_function" and tensor.dim() > 1 and is_non_overlapping_and_dense_or_false(tensor)


def _viewed(value: fx.Node) -> fx.Node | None:
    """The value that this one is a view of, if its op makes a view of one operand."""
    source, _ = source_of(value)
    if not isinstance(source.target, torch._ops.OpOverload) or source.target._schema.is_mutable:
        return None
    aliases = [argument.alias_info is not None for argument in source.target._schema.arguments]
    base = source.args[0] if aliases and aliases[0] and source.args else None
    return base if isinstance(base, fx.Node) else None


def _shared_memory(outputs: Sequence[fx.Node]) -> frozenset[fx.Node]:
    """The outputs that share their memory with another one, or with an input."""
    roots: dict[fx.Node, fx.Node] = {}
    for output in outputs:
        root: fx.Node = output
        while (base := _viewed(root)) is not None:
            root = base
        roots[output] = root
    counts = Counter(roots.values())
    return frozenset(
        output
        for output, root in roots.items()
        if counts[root] > 1 or (root.op == "placeholder" and root is not output)
    )
