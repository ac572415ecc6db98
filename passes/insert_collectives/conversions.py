"""Captured values on one rank, brought from the placement that they have to the one that is wanted.

    h    made R, delivered R      wanted S(1: 32)    h_s = sp.shard(h, S(1: 32))
    q    delivered S(2: 32)       wanted S(1: 4)     q_h = sp.all_to_all(q, gather S(2: 32), scatter S(1: 4))
    o    made S(1: 4), delivered S(2: 32)            o_s = sp.all_to_all(o, gather S(1: 4), scatter S(2: 32))

A conversion stands before its first consumer and serves all consumers of the same region: one ends where the gradient
mode or autocast changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx

from sp_compile.ir.graph import GraphRules, is_tensor, source_of
from sp_compile.ir.plan import ShardingPlan, SitePlan
from sp_compile.passes.insert_collectives.writer import GraphWriter
from sp_compile.placement.placements import (
    REPLICATED,
    GroupedHeads,
    Placement,
    Replicated,
    Sharded,
    held_rows,
    moved_rows,
    whole_layout,
)
from sp_compile.rules.halo import neighbouring_rows

aten, sp = torch.ops.aten, torch.ops.sp


class Conversions:
    """What of each captured value is written, and in which placements it is there already."""

    def __init__(self, writer: GraphWriter, rules: GraphRules, plan: ShardingPlan, local_gradients: bool) -> None:
        self.writer, self.rules, self.plan, self.local_gradients = writer, rules, plan, local_gradients
        self.written: dict[fx.Node, fx.Node] = {}
        """Each captured value as its op makes it on a rank."""
        self.region = 0
        """Rises where the gradient mode or autocast changes: what is moved before is another value behind."""
        self._converted: dict[tuple[fx.Node, Placement | str, int], fx.Node] = {}
        self._roles = _roles(plan.sites)

    def convert(self, value: fx.Node, target: Placement, role: str | None = None) -> fx.Node:
        """A captured value on this rank, in the placement that is wanted. What moves it is named by its `role`."""
        if value not in self.written:
            raise AssertionError(f"{value} is used before it is written")
        key = (value, target, self.region)
        if key not in self._converted:
            made, delivered = self.made(value), self.plan.placement(value)
            if target == made:
                return self.written[value]  # a neighbour that borrows the same dimension: no way home and back
            home = self.once(value, delivered, lambda: self._move(self.written[value], value, made, delivered, None))
            if key not in self._converted:
                self._converted[key] = self._move(home, value, delivered, target, role)
        return self._converted[key]

    def replicate(self, value: fx.Node) -> fx.Node:
        """A replicated value on its way into sharded work."""
        return self.once(value, "replicate", lambda: self._replicated(value))

    def once(self, value: fx.Node, form: Placement | str, make: Callable[[], fx.Node]) -> fx.Node:
        """What `make` writes of a value, in a form: a placement, or whole for a purpose. Made once in a region."""
        key = (value, form, self.region)
        if key not in self._converted:
            self._converted[key] = make()
        return self._converted[key]

    def made(self, value: fx.Node) -> Placement:
        """The placement that the op of a value makes it in, before it goes home."""
        source, result = source_of(value)
        plan = self.plan.nodes.get(source)
        return plan.results()[result] if plan else REPLICATED

    def held(self) -> tuple[tuple[str, str, Placement], ...]:
        """(new node, the captured value that it holds, where), in the order of the new graph."""
        held = {(new, value): self.made(value) for value, new in self.written.items() if has_value(value)}
        for (value, form, _), new in self._converted.items():
            held.setdefault((new, value), REPLICATED if isinstance(form, str) else form)
        order = {node: at for at, node in enumerate(self.writer.graph.nodes)}
        found = [each for each in held if each[0] in order]
        found.sort(key=lambda each: (order[each[0]], self.rules.position(each[1])))
        return tuple((new.name, value.name, held[new, value]) for new, value in found)

    def _replicated(self, value: fx.Node) -> fx.Node:
        writer, trained, whole = self.writer, value in self.rules.trained, self.convert(value, REPLICATED)
        if trained and self.local_gradients and isinstance(value.meta["val"], torch.nn.Parameter):
            scaled = writer.emit(sp.scale_gradient.default, whole, float(self.plan.parts))
            return writer.named(scaled, f"scale_gradient_{value}", value)
        if trained or whole.target is sp.all_gather.default:
            # Also where no gradient comes back: what is gathered for sharded work is gathered again in backward.
            summed = writer.emit(sp.replicate.default, whole, writer.group)
            return writer.named(summed, f"replicate_{value}", value)
        return whole

    def _move(self, local: fx.Node, value: fx.Node, source: Placement, target: Placement, role: str | None) -> fx.Node:
        """Bring the local value of `value` from one placement to another."""
        writer, exchanged = self.writer, role or self._role(value, "all_to_all")
        match source, target:
            case _ if source == target:
                return local
            case Replicated(), Sharded():
                verb = "slice" if value.op == "placeholder" else "shard"
                cut = writer.on_dim(sp.shard.default, local, target)
                return writer.named(cut, role or f"{verb}_{value.name}", value)
            case Sharded(), Replicated() if 0 in self.rules.shape(value):
                # No elements to send: as many of none as the whole has.
                of_none = writer.emit(
                    aten.new_zeros.default, local, [writer.size(source.layout.size)], dtype=torch.int64
                )
                return writer.emit(aten.index_select.default, local, source.dim, of_none)
            case Sharded(), Replicated():
                whole = writer.on_dim(sp.all_gather.default, local, source)
                return writer.named(whole, role or self._role(value, "all_gather"), value)
            case Sharded(), Sharded() if source.dim != target.dim:
                layouts = (*writer.layout(source), *writer.layout(target))
                windows = writer.windows(source, "gather_windows") | writer.windows(target, "scatter_windows")
                moved = writer.emit(sp.all_to_all.default, local, *layouts, writer.group, **windows)
                return writer.named(moved, exchanged, value)
            case Sharded(), GroupedHeads() if source.dim != target.dim:
                layout, windows = writer.layout(source), writer.windows(source, "gather_windows")
                heads = (target.dim, target.query_heads)
                moved = writer.emit(
                    sp.all_to_all_kv.default, local, writer.rank, *layout, *heads, writer.group, **windows
                )
                return writer.named(moved, exchanged, value)
            case Replicated(), GroupedHeads():
                kv_heads = self.rules.shape(value)[target.dim]
                assert isinstance(kv_heads, int)
                times = target.query_heads // kv_heads
                repeated = writer.emit(aten.repeat_interleave.self_int, local, times, target.dim)
                heads_of_rank = Sharded(target.dim, whole_layout(target.query_heads))
                return self._move(repeated, value, REPLICATED, heads_of_rank, role)
            case Sharded(), Sharded() if moved_rows(source.layout, target.layout, self.plan.parts) is not None:
                wanted = held_rows(target.layout, self.plan.parts)
                assert wanted is not None
                rows = neighbouring_rows(RankGraph(self), local, source, wanted, value.meta["val"].device)
                return rows if target.layout.is_even(self.plan.parts) else writer.refill_padding(rows, target)
        whole = self._move(local, value, source, REPLICATED, None)
        return self._move(whole, value, REPLICATED, target, role)

    def _role(self, value: fx.Node, op: str) -> str:
        return self._roles.get((value, op), f"{op}_{value.name}")


class RankGraph:
    """The `LocalGraph` of what is written for the current node."""

    def __init__(self, conversions: Conversions) -> None:
        self._writer = conversions.writer
        self.parts = conversions.plan.parts

    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self._writer.emit(target, *args, **kwargs)

    def gather(self, value: fx.Node, placement: Sharded, role: str) -> fx.Node:
        writer = self._writer
        layout, windows = writer.layout(placement), writer.windows(placement)
        whole = writer.emit(sp.all_gather_replicate.default, value, *layout, writer.group, **windows)
        return writer.named(whole, f"{role}_{writer.current}")

    def rank(self) -> fx.Node:
        assert self._writer.rank is not None
        return self._writer.rank


def has_value(node: fx.Node) -> bool:
    """A node without a value changes state: the gradient mode, or autocast."""
    return node.meta.get("val") is not None or node.target is getitem


def _roles(sites: Sequence[SitePlan]) -> dict[tuple[fx.Node, str], str]:
    """What the collectives of a site are called, by the value that is moved and the op that moves it."""
    roles: dict[tuple[fx.Node, str], str] = {}
    for planned in sites:
        for name, value in zip("qkv", planned.moved, strict=True):
            if planned.strategy == "ulysses":
                roles.setdefault((value, "all_to_all"), f"gather_seq_scatter_heads_{name}")
            elif planned.strategy == "all_gather_kv":
                roles.setdefault((value, "all_gather"), f"gather_seq_{name}")
        output = planned.site.output
        first = [user for user in output.users if user.target is getitem and source_of(user)[1] == 0]
        for value in [output] if is_tensor(output) else first:
            roles[value, "all_to_all"] = "gather_heads_scatter_seq"
    return roles
