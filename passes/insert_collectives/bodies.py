"""What the body of a rule writes: the op on one rank's rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from sp_compile.ir.plan import COMPUTED_AGAIN
from sp_compile.passes.insert_collectives.conversions import RankGraph
from sp_compile.placement.placements import Placement, Replicated, Sharded, Size, local_shape
from sp_compile.rules.op_call import argument_defaults

if TYPE_CHECKING:
    from sp_compile.passes.insert_collectives.rewriter import Rewriter


class RankOp(RankGraph):
    """The `LocalOp` of a rule's body: writes nodes into the new graph."""

    def __init__(self, rewriter: Rewriter, node: fx.Node) -> None:
        conversions, rules = rewriter.conversions, rewriter.rules
        super().__init__(conversions)
        plan, rule = rewriter.plan.nodes[node], rules.rule(node)
        assert plan.sharding is not None and rule is not None
        self.call = rules.call(node)
        self.operands = tuple(plan.operand(index) for index in range(len(self.call.operands)))
        self.results = plan.sharding.results
        self.rng: str = rewriter.rng
        self.shape_argument = rule.shape_argument
        values = [plan.sources.get(at, operand) for at, operand in enumerate(rules.operands(node))]
        # A term that is added to the sum over ranks is added once: its gradient is the full one as it is.
        added = rule.additive if not any(isinstance(result, Sharded) for result in self.results) else frozenset()
        self._operands = []
        for at, (value, placement) in enumerate(zip(values, self.operands, strict=True)):
            if not isinstance(placement, Replicated) or at in added:
                self._operands.append(conversions.convert(value, placement))
            elif at in rule.metadata:
                self._operands.append(conversions.written[value])
            else:
                self._operands.append(conversions.replicate(value))
        self._operands = rewriter.laid_out(node, self._operands)
        self.args, self.kwargs = rewriter.arguments(node, self._operands)

    def operand(self, index: int) -> fx.Node:
        return self._operands[index]

    def size(self, size: Size) -> int | fx.Node:
        return self._writer.size(size)

    def computed_again(self, value: fx.Node) -> fx.Node:
        value.meta |= COMPUTED_AGAIN
        return value

    def mask_padding(self, value: fx.Node, placement: Placement, fill: float | int) -> fx.Node:
        if not isinstance(placement, Sharded):
            return value
        return self._writer.on_dim(torch.ops.sp.mask_padding.default, value, placement, fill)

    def refill_padding(self, value: fx.Node, placement: Sharded) -> fx.Node:
        return self._writer.refill_padding(value, placement)

    def all_reduce(self, value: fx.Node, kind: str = "sum") -> fx.Node:
        reduced = self.emit(torch.ops.sp.all_reduce.default, value, kind, self._writer.group)
        return self._writer.named(reduced, f"all_reduce_{self._writer.current}")

    def replicate(self, value: fx.Node) -> fx.Node:
        return self.emit(torch.ops.sp.replicate.default, value, self._writer.group)

    def shard(self, value: fx.Node, placement: Sharded) -> fx.Node:
        return self._writer.on_dim(torch.ops.sp.shard.default, value, placement)

    def positions(self, placement: Sharded) -> fx.Node:
        return self._writer.positions(placement)

    def select_rows(self, value: fx.Node, placement: Sharded, index: fx.Node) -> fx.Node:
        rows = self._writer.on_dim(torch.ops.sp.select_rows.default, value, placement, index)
        return self._writer.named(rows, f"select_rows_{self._writer.current}")

    def module(self, name: str, module: fx.GraphModule) -> fx.Node:
        name = f"{name}_{self._writer.current}"
        self._writer.modules[name] = module
        return self._writer.graph.get_attr(name)


def call_locally(local: RankOp) -> fx.Node:
    """The op as it is, on local operands; a shape among its arguments becomes the local one."""
    args, kwargs = list(local.args), dict(local.kwargs)
    if local.shape_argument is not None:
        spec = local.call.results[0]
        assert spec is not None
        shape = [local.size(size) for size in local_shape(spec.shape, local.results[0], local.parts)]
        position = list(argument_defaults(local.call.target)).index(local.shape_argument)
        if position < len(args):
            args[position] = shape
        else:
            kwargs[local.shape_argument] = shape
    return local.emit(local.call.target, *args, **kwargs)
