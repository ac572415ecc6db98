"""Break the library on purpose, one thing at a time; tests have to notice: `python -m tests.commands.mutants [name]`.

A mutant is a context manager that patches the library in memory. The tests of each run in a pytest of their own, into
which this module is loaded as a plugin (`-p`) that enters the mutant named by SP_MUTANT, in every worker.
Exits with an error if a mutant survives, or if a test fails with nothing broken.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tabulate import tabulate
from torch import Tensor, fx
from torch._ops import OpOverload

import sp_compile  # noqa: F401  (registers everything that is patched here)
from sp_compile.ops import sp_ops as ops
from sp_compile.ops.exchange import Exchange, GatherReturn, KVHeads
from sp_compile.ops.transport import as_before
from sp_compile.passes.insert_collectives import bodies, conversions, rewriter
from sp_compile.placement.placements import Sharded
from sp_compile.placement.sharded_dim import ShardedDim
from sp_compile.rules import grouped, halo, registry
from sp_compile.rules.local_op import Body
from sp_compile.rules.op_call import OpCall
from sp_compile.rules.rule import OpShardingRule

aten = torch.ops.aten
grouping: Any = sys.modules["sp_compile.passes.outline_experts"]

TESTS = [
    "tests/test_rules.py",
    "tests/test_programs.py",
    "tests/test_ops.py",
    "tests/test_passes.py",
    "tests/test_backend.py::test_parallel_random_numbers_differ_between_ranks_and_keep_their_rate",
    "tests/test_backend.py::test_grouped_heads",
]
SLOWER = "not inductor and not opcheck and not lowered and not all_lengths"
# fmt: off
PROGRAMS = frozenset([
    "plain", "causal", "gqa_6_heads_2_groups", "a_group_on_each_of_two_ranks", "gqa_repeat_eager_bmm",
    "one_head_on_four", "three_heads_on_four", "five_dimensions", "unbind_qkv", "sequence_first",
    "sequence_first_flat", "batch_first_flat", "streams_flattened", "eager_weights_out", "baddbmm",
    "cross_sharded", "relative_bias_t5", "joint_short", "class_token", "last_token", "swin", "patchify",
    "cumsum", "softmax_tokens", "norm_tokens", "amax_pool", "extrema_of_negative_rows", "sum_over_count",
    "masked_mean", "mean_used_everywhere", "std_correction", "ce_classdim", "ce_uneven", "ce_shift_slice",
    "tied_loss", "weights_of_padded_rows", "no_grad_region", "weight_first_used_without_gradient",
    "convolution_of_equal_length", "depthwise_convolution", "previous_token", "all_but_the_first",
    "rows_that_are_cut_off_are_zero",
    "experts_sorted_and_back", "experts_that_look_at_neighbours", "experts_with_places_for_some",
    "experts_by_the_counts_of_others", "experts_with_a_gate_of_each_sample", "experts_from_the_last",
    "param_both", "adaln", "kl_divergences", "mixer", "reciprocal_of_positions",
])
OVERLOADS = frozenset(
    "aten." + name for name in [
        "add.Tensor", "linear.default", "matmul.default", "bmm.default", "mm.default", "baddbmm.default",
        "embedding.default", "layer_norm.default", "softmax.int", "scaled_dot_product_attention.default",
        "sum.dim_IntList", "mean.dim", "amax.default", "var.correction", "cross_entropy_loss.default", "cumsum.default",
        "reshape.default", "permute.default", "transpose.int", "cat.default", "slice.Tensor", "conv1d.default",
    ]
)
# fmt: on
"""The programs of the table, and the rules, that run for each mutant; `--all`: all of them."""

Mutant = Callable[[], AbstractContextManager[Any]]
MUTANTS: dict[str, Mutant] = {}


def mutant(name: str) -> Callable[[Mutant], Mutant]:
    def add(make: Mutant) -> Mutant:
        MUTANTS[name] = make
        return make

    return add


# Rules


@contextmanager
def altered(change: Callable[[OpShardingRule, OpCall], OpShardingRule], *targets: OpOverload) -> Iterator[None]:
    """The rules of these overloads, changed."""

    def wrapped(function: registry.RuleFunction) -> registry.RuleFunction:
        def rule(call: OpCall) -> OpShardingRule | None:
            made = function(call)
            return made and change(made, call)

        return rule

    table = registry._RULES
    with patch.dict(table, {target: wrapped(table[target]) for target in targets}):
        yield


def with_bodies(target: OpOverload, change: Callable[[Body], Body]) -> AbstractContextManager[None]:
    """The local bodies of an op, changed."""
    return altered(
        lambda rule, _: replace(rule, bodies={factor: change(body) for factor, body in rule.bodies.items()}), target
    )


class Tampered:
    """A `LocalOp` of which some methods are others."""

    def __init__(self, local: Any, **methods: Callable[..., Any]) -> None:
        self._local, self._methods = local, methods

    def __getattr__(self, name: str) -> Any:
        return self._methods.get(name) or getattr(self._local, name)


def tampering(**methods: Callable[..., Any]) -> Callable[[Body], Body]:
    """A body that sees `method(local, *args)` for each of these."""

    def change(body: Body) -> Body:
        def run(local: Any) -> Any:
            bound = {
                name: lambda *args, method=method, **more: method(local, *args, **more)
                for name, method in methods.items()
            }
            return body(Tampered(local, **bound))  # type: ignore[arg-type]

        return run

    return change


def nothing_whole(*targets: OpOverload) -> AbstractContextManager[None]:
    return altered(lambda rule, _: replace(rule, need_replication=frozenset()), *targets)


def swapped(dims: tuple[Any, ...], one: int, other: int) -> tuple[Any, ...]:
    order = list(dims)
    order[one], order[other] = order[other], order[one]
    return tuple(order)


@mutant("linear: o and i of the weight swapped")
def _() -> AbstractContextManager[None]:
    def change(rule: OpShardingRule, _: OpCall) -> OpShardingRule:
        x, weight, *bias = rule.operands
        return replace(rule, operands=(x, weight[::-1], *bias))

    return altered(change, aten.linear.default)


@mutant("linear: bias counted P times")
def _() -> AbstractContextManager[None]:
    def change(body: Body) -> Body:
        def run(local: Any) -> fx.Node:
            operands = [local.operand(at) for at in range(len(local.call.operands))]
            operands[:2] = [local.mask_padding(operands[at], local.operands[at], 0) for at in range(2)]
            return local.all_reduce(local.emit(aten.linear.default, *operands))

        return run

    return with_bodies(aten.linear.default, change)


@mutant("the gradient of an additive operand summed over ranks")
def _() -> AbstractContextManager[None]:
    def change(rule: OpShardingRule, _: OpCall) -> OpShardingRule:
        return replace(rule, additive=frozenset())

    return altered(change, aten.linear.default, aten.addmm.default, aten.baddbmm.default)


@mutant("matmul, bmm: a contraction not summed over ranks")
def _() -> AbstractContextManager[Any]:
    stack = ExitStack()
    for target in (aten.matmul.default, aten.bmm.default):
        stack.enter_context(with_bodies(target, tampering(all_reduce=lambda local, value, kind="sum": value)))
    return stack


@mutant("bmm: rows and columns of the result swapped")
def _() -> AbstractContextManager[None]:
    def change(rule: OpShardingRule, _: OpCall) -> OpShardingRule:
        return replace(rule, results=tuple(swapped(dims, -1, -2) for dims in rule.results))

    return altered(change, aten.bmm.default)


@mutant("embedding: dimensions of the ids in reverse")
def _() -> AbstractContextManager[None]:
    def change(rule: OpShardingRule, _: OpCall) -> OpShardingRule:
        weight, ids = rule.operands
        return replace(rule, operands=(weight, ids[::-1]))

    return altered(change, aten.embedding.default)


@mutant("layer_norm of local channels")
def _() -> AbstractContextManager[None]:
    return nothing_whole(aten.layer_norm.default, aten.native_layer_norm.default)


@mutant("softmax of local rows")
def _() -> AbstractContextManager[None]:
    return nothing_whole(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)


@mutant("sdpa: queries see the keys of their rank alone")
def _() -> AbstractContextManager[None]:
    def change(rule: OpShardingRule, call: OpCall) -> OpShardingRule:
        if rule.sizes.get("q") != rule.sizes.get("k") or "q" not in rule.sizes or len(rule.operands) > 3:
            return rule
        key, value = (tuple(("q",) if dim == ("k",) else dim for dim in dims) for dims in rule.operands[1:])
        return replace(rule, operands=(rule.operands[0], key, value))

    return altered(change, aten.scaled_dot_product_attention.default)


@mutant("sdpa: grouped heads read as (r g)")
def _() -> AbstractContextManager[None]:
    def turned(dims: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(("r", "g") if dim == ("g", "r") else dim for dim in dims)

    def change(rule: OpShardingRule, _: OpCall) -> OpShardingRule:
        return replace(rule, operands=tuple(map(turned, rule.operands)), results=tuple(map(turned, rule.results)))

    return altered(change, aten.scaled_dot_product_attention.default)


@mutant("sdpa: the causal mask of local positions")
def _() -> AbstractContextManager[None]:
    def local_rows(local: Any, placement: Sharded) -> Any:
        shared = local.emit(aten.zeros_like.default, local.rank())
        return local.emit(aten.sub.Tensor, local.positions(placement), first_position(local, placement, shared))

    def first_position(local: Any, placement: Sharded, shared: Any) -> Any:
        return local.emit(aten.index_select.default, local.positions(placement), 0, shared)

    return with_bodies(aten.scaled_dot_product_attention.default, tampering(positions=local_rows))


@mutant("mean: divided by a count that has the padding")
def _() -> AbstractContextManager[Any]:
    def padded(local: Any, size: Any) -> Any:
        return local.size(-(-size // local.parts) * local.parts if isinstance(size, int) else size)

    stack = ExitStack()
    for target in (aten.mean.dim, aten.mean.default):
        stack.enter_context(with_bodies(target, tampering(size=padded)))
    return stack


@mutant("sum: each rank its own")
def _() -> AbstractContextManager[Any]:
    stack = ExitStack()
    for target in (aten.sum.dim_IntList, aten.sum.default):
        stack.enter_context(with_bodies(target, tampering(all_reduce=lambda local, value, kind="sum": value)))
    return stack


@mutant("amax: padding filled with 0")
def _() -> AbstractContextManager[None]:
    def zero(local: Any, value: Any, placement: Any, fill: float) -> Any:
        return local.mask_padding(value, placement, 0)

    return with_bodies(aten.amax.default, tampering(mask_padding=zero))


@mutant("cross_entropy: padded rows have class 0")
def _() -> AbstractContextManager[None]:
    def zero(local: Any, value: Any, placement: Any, fill: float) -> Any:
        return local.mask_padding(value, placement, 0)

    return with_bodies(aten.cross_entropy_loss.default, tampering(mask_padding=zero))


@mutant("cross_entropy: the mean of the ranks' means")
def _() -> AbstractContextManager[None]:
    def change(body: Body) -> Body:
        def run(local: Any) -> Any:
            if local.call["reduction"] != 1 or len(local.call.operands) != 2:
                return body(local)
            target = local.mask_padding(local.operand(1), local.operands[1], local.call["ignore_index"])
            mean = local.emit(local.call.target, local.operand(0), target)
            return local.emit(aten.div.Tensor, local.all_reduce(mean), local.parts)

        return run

    return with_bodies(aten.cross_entropy_loss.default, change)


@mutant("cumsum of local rows")
def _() -> AbstractContextManager[None]:
    return nothing_whole(aten.cumsum.default)


@mutant("convolution of local rows")
def _() -> AbstractContextManager[None]:
    def change(rule: OpShardingRule, _: OpCall) -> OpShardingRule:
        with_halo = {*rule.halos, *(each.source for each in rule.halos.values())}
        return replace(rule, bodies={factor: body for factor, body in rule.bodies.items() if factor not in with_halo})

    return altered(change, aten.conv1d.default, aten.conv2d.default)


@mutant("halo: every rank reads the rows that rank 0 would")
def _() -> AbstractContextManager[Any]:
    count_from = halo._count_from

    def of_rank_0(graph: Any, first: int, count: int, step: int, rank: Any, device: torch.device) -> Any:
        return count_from(graph, first, count, 0, rank, device)

    return patch.object(halo, "_count_from", of_rank_0)


@mutant("permute: the inverse order")
def _() -> AbstractContextManager[None]:
    def change(rule: OpShardingRule, call: OpCall) -> OpShardingRule:
        (source,) = rule.operands
        order = [at % len(source) for at in call["dims"]]
        return replace(rule, results=(tuple(source[order.index(at)] for at in range(len(order))),))

    return altered(change, aten.permute.default)


@mutant("view: inner and outer factor swapped")
def _() -> AbstractContextManager[None]:
    def turned(dims: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(tuple(reversed(dim)) if isinstance(dim, tuple) else dim for dim in dims)

    def change(rule: OpShardingRule, _: OpCall) -> OpShardingRule:
        return replace(rule, operands=tuple(map(turned, rule.operands)))

    return altered(change, aten.reshape.default, aten.view.default)


@mutant("dropout: the same draws on every rank")
def _() -> AbstractContextManager[None]:
    def zero(local: Any) -> Any:
        return local.emit(aten.zeros_like.default, local.rank())

    return with_bodies(aten.dropout.default, tampering(rank=zero))


# Standing controls, and other laws of the ops and passes


@mutant("no replicate backward")
def _() -> AbstractContextManager[Any]:
    return patch.object(ops._Replicate, "backward", staticmethod(lambda ctx, grad: (grad, None)))


@mutant("no replicate after an all-gather")
def _() -> AbstractContextManager[Any]:
    replicate = conversions.Conversions.replicate

    def only_inputs(self: Any, value: fx.Node) -> fx.Node:
        gathered = isinstance(self.plan.placement(value), Sharded)
        result: fx.Node = self.convert(value, conversions.REPLICATED) if gathered else replicate(self, value)
        return result

    return patch.object(conversions.Conversions, "replicate", only_inputs)


@mutant("no replicate after an all-reduce")
def _() -> AbstractContextManager[Any]:
    replicate = conversions.Conversions.replicate

    def but_of_sums(self: Any, value: fx.Node) -> fx.Node:
        plan = self.plan.nodes.get(value)
        summed = plan is not None and plan.sharding is not None and not isinstance(plan.delivered[0], Sharded)
        result: fx.Node = self.convert(value, conversions.REPLICATED) if summed else replicate(self, value)
        return result

    return patch.object(conversions.Conversions, "replicate", but_of_sums)


@mutant("padded rows not zeroed in the backward of an all-to-all")
def _() -> AbstractContextManager[Any]:
    return patch.object(Exchange, "back", lambda self: Exchange(self.scatter, self.gather, False))


@mutant("padded rows not zeroed in the backward of an all-gather")
def _() -> AbstractContextManager[Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ops._Shard.run(grad, *ctx.saved_tensors, ctx.layout, ctx.group, False), *[None] * 3

    return patch.object(ops._AllGather, "backward", staticmethod(backward))


@mutant("no padding mask on sums")
def _() -> AbstractContextManager[Any]:
    return patch.object(bodies.RankOp, "mask_padding", lambda self, value, placement, fill: value)


@mutant("conversions shared across _set_grad_enabled")
def _() -> AbstractContextManager[Any]:
    return patch.object(rewriter, "has_value", lambda node: True)


@mutant("a rank's block off by one granule")
def _() -> AbstractContextManager[Any]:
    owned = ShardedDim.owned_rows

    def later(layout: ShardedDim, ranks: Tensor, parts: int) -> tuple[Tensor, Tensor]:
        rows, real = owned(layout, ranks, parts)
        return (rows + layout.granules[0]).clamp(max=layout.outer * layout.rows - 1), real

    return patch.object(ShardedDim, "owned_rows", later)


@mutant("a window begins at the first row of its stream")
def _() -> AbstractContextManager[Any]:
    return patch.object(ShardedDim, "before", property(lambda layout: [0] * len(layout.sizes)))


@mutant("padding keeps the rows that a slice cut off")
def _() -> AbstractContextManager[Any]:
    def kept(layout: Any, rank: Tensor, parts: int) -> tuple[Tensor, Tensor]:
        local = layout.local(parts)
        return torch.arange(local), torch.ones(local, dtype=torch.bool)

    return patch.object(ShardedDim, "nearest_real", kept)


@mutant("outer blocks read as one")
def _() -> AbstractContextManager[Any]:
    stored = ShardedDim.stored_rows

    def flat(layout: ShardedDim, parts: int, device: torch.device) -> Tensor:
        whole = ShardedDim(layout.dim, 1, [layout.outer * layout.rows], [layout.granules[0]])
        return stored(whole, parts, device) if layout.outer != 1 else stored(layout, parts, device)

    return patch.object(ShardedDim, "stored_rows", flat)


@mutant("padded query heads keep their gradient")
def _() -> AbstractContextManager[Any]:
    return patch.object(KVHeads, "query", lambda self, rank: (rank * self.per_rank).repeat(self.per_rank))


@mutant("an extremum gives its whole gradient to each winner")
def _() -> AbstractContextManager[Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, result = ctx.saved_tensors
        return ops._Replicate.run(grad, ctx.group).masked_fill(x != result, 0), None, None

    return patch.object(ops._Extremum, "backward", staticmethod(backward))


@mutant("few rows come from every rank")
def _() -> AbstractContextManager[Any]:
    forward = ops._SelectRows.forward

    def all_ranks(ctx: Any, x: Tensor, dim: int, row: Tensor, mine: Tensor, group: str) -> Tensor:
        return forward(ctx, x, dim, row, torch.ones_like(mine), group)

    return patch.object(ops._SelectRows, "forward", staticmethod(all_ranks))


@mutant("the gradient of gathered rows is that of one rank")
def _() -> AbstractContextManager[Any]:
    def join(self: Any, pieces: Tensor, rank: Any, parts: int, dtype: torch.dtype) -> Tensor:
        return as_before(pieces, dtype)[0]

    return patch.object(GatherReturn, "join", join)


@mutant("grouped rows: any op keeps to its rows")
def _() -> AbstractContextManager[Any]:
    return patch.object(grouping._Reading, "_keeps_rows", lambda reading, node: True)


@mutant("grouped rows: cut within what a row stands for")
def _() -> AbstractContextManager[Any]:
    fit = grouped.fit

    def any_factor(*args: Any, need_replication: frozenset[str], **rest: Any) -> OpShardingRule:
        rule: OpShardingRule = fit(*args, need_replication=need_replication - {"k"}, **rest)
        return rule

    return patch.object(grouped, "fit", any_factor)


@mutant("grouped rows: in any order")
def _() -> AbstractContextManager[Any]:
    return patch.object(grouping, "_sorts_groups", lambda rules, sort: True)


@mutant("grouped rows: whichever rows were counted")
def _() -> AbstractContextManager[Any]:
    def read(reading: Any, node: fx.Node) -> None:
        reading.sizes[node] = node.args[1]

    return patch.object(grouping._Reading, "_read_sizes", read)


# The plugin


def pytest_configure(config: pytest.Config) -> None:
    name = os.environ.get("SP_MUTANT")
    if name:
        entered = MUTANTS[name]()
        entered.__enter__()
        config.add_cleanup(lambda: entered.__exit__(None, None, None))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("SP_MUTANT_PROGRAMS") == "all":
        return
    chosen = {"test_program_is_right_on_every_rank": PROGRAMS, "test_rule_is_right_on_every_factor": OVERLOADS}

    def runs(item: pytest.Item) -> bool:
        test, _, case = item.name.partition("[")
        return test not in chosen or case[:-1] in chosen[test]

    items[:] = [item for item in items if runs(item)]


# The runner


def run(name: str, programs: str, first: bool) -> tuple[Counter[str], int, float]:
    """The failures by test file, the number of tests, and the seconds, with this mutant ("": none)."""
    plugins = ["-p", "tests.commands.mutants", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plugins, "-n", "2", "-q"]
    command += ["--tb=no", "-rfE", "--show-capture=no", "-m", "not full", "-k", SLOWER, *TESTS]
    command += ["--maxfail", "1"] if first else []
    started = time.monotonic()
    made = subprocess.run(
        command, env={**os.environ, "SP_MUTANT": name, "SP_MUTANT_PROGRAMS": programs}, capture_output=True, text=True
    )
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error)", made.stdout[-300:])}
    if not counts:
        raise SystemExit(f"{name or 'nothing broken'}: pytest ran nothing\n{made.stdout[-3000:]}{made.stderr[-3000:]}")
    failed = Counter(re.findall(r"^(?:FAILED|ERROR) tests/test_(\w+)\.py", made.stdout, re.MULTILINE))
    return failed, sum(counts.values()), time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="mutants (by a part of the name); all if none are given")
    parser.add_argument("--all", action="store_true", help="run all programs and rules, not the sensitive ones")
    parser.add_argument("--first", action="store_true", help="stop each at the first test that fails")
    options = parser.parse_args()
    chosen = [name for name in MUTANTS if not options.names or any(part in name for part in options.names)]
    files = list(dict.fromkeys(re.findall(r"test_(\w+)\.py", " ".join(TESTS))))
    rows, survivors = [], []
    for name in ["", *chosen]:
        failed, count, seconds = run(name, "all" if options.all else "some", options.first)
        rows.append([name or "(nothing broken)", failed.total(), count, *(failed[file] for file in files), seconds])
        print(f"{rows[-1][0]}: {failed.total()} of {count} failed, {seconds:.0f} s", file=sys.stderr, flush=True)
        if bool(failed) != bool(name):
            survivors.append(rows[-1][0])
    print(tabulate(rows, ["mutant", "failed", "of", *files, "seconds"], floatfmt=".0f"))
    if survivors:
        raise SystemExit("not as it should be: " + ", ".join(survivors))


if __name__ == "__main__":
    main()
