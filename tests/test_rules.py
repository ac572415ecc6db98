"""Every rule by brute force, on every sample of `tests/rules`; and what that check is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import Any

import pytest
import torch
from torch._ops import OpOverload

from sp_compile.placement.placements import REPLICATED, Layout, Segment, Sharded, held_rows, moved_rows, whole_layout
from sp_compile.rules import halo
from sp_compile.rules.aten.convolutions import _with_halo
from sp_compile.rules.halo import neighbouring_rows
from sp_compile.rules.registry import _RULES, _WHOLE, has_rule
from sp_compile.rules.rule import OpSharding, OpShardingRule
from sp_compile.tools.simulation import simulate

from .rules import CASES
from .rules.brute_force import (
    SDPA,
    Case,
    EagerLocalOp,
    Ranks,
    aten,
    bools,
    case,
    compare,
    cut,
    f,
    ids,
    layouts,
    positive,
    run_local,
    shardings,
)

# Nothing to compare: the result is not initialised.
UNCHECKED = {aten.empty_like.default, aten.new_empty.default}


@pytest.mark.parametrize("target", CASES, ids=str)
def test_rule_is_right_on_every_factor(target: OpOverload) -> None:
    for sample in CASES[target]:
        rule = sample.rule
        assert rule is not None, sample
        for sharding in shardings(rule):
            for parts in (2, 3):
                try:
                    compare(sample, rule, sharding, parts)
                except Exception as error:
                    raise AssertionError(f"{sample} on {parts} ranks, {sharding}") from error


def test_every_rule_has_a_sample() -> None:
    assert {op for op in _RULES if op.namespace == "aten"} <= set(CASES) | UNCHECKED
    assert all(has_rule(target) for target in CASES)


def test_what_is_whole_says_why() -> None:
    """A rule with a `!` factor has a reason, and a reason has such a rule."""
    whole = {
        target
        for target, samples in CASES.items()
        if any(sample.rule and sample.rule.need_replication & set(sample.rule.sizes) for sample in samples)
    }
    assert whole == {target for target in _WHOLE if target.namespace == "aten"} - UNCHECKED


@pytest.mark.parametrize(
    "exact",
    [
        case(aten._native_batch_norm_legit.no_stats, f(3, 4, 60) + 3000, f(4), None, True, 0.1, 0.0),
        case(aten.group_norm.default, f(3, 4, 60) + 3000, 2, f(4)),
        case(aten.var.correction, f(3, 4, 60) + 3000, [2], keepdim=True),
    ],
    ids=str,
)
def test_variance_far_from_zero_does_not_cancel(exact: Case) -> None:
    """`E[x^2] - E[x]^2` would be wrong by more than the variance itself."""
    single = replace(exact, args=tuple(a.float() if isinstance(a, torch.Tensor) else a for a in exact.args))
    rule = single.rule
    assert rule is not None
    sharding = rule.shard_factor("d2")
    assert sharding is not None
    blocks = [Ranks(cut(t, p, 2)) for t, p in zip(single.tensors, sharding.operands, strict=True)]
    made = run_local(single, rule, sharding, 2, blocks)[0]
    whole = torch.cat(list(made), 2) if isinstance(sharding.results[0], Sharded) else made[0]
    torch.testing.assert_close(whole.double(), exact.run(exact.tensors)[0], rtol=0, atol=2e-3)


# What the check itself is worth


def fails(sample: Case, rule: OpShardingRule, factor: str) -> bool:
    """Whether the check refuses a factor, in one of its layouts, on 2 or 3 ranks."""
    for layout in layouts(int(rule.sizes[factor])):
        sharding = rule.run_on({factor: layout})
        for parts in (2, 3):
            try:
                if sharding is not None:
                    compare(sample, rule, sharding, parts)
            except (AssertionError, RuntimeError, IndexError, ValueError):
                return True
    return False


def over_cautious(sample: Case, rule: OpShardingRule) -> set[str]:
    """The factors marked `!` that would have passed as they are."""
    free = replace(rule, need_replication=frozenset())
    return {
        factor
        for factor in rule.need_replication & set(rule.sizes)
        if free.run_on({factor: Layout((Segment(rule.sizes[factor]),))}) and not fails(sample, free, factor)
    }


def test_no_factor_is_whole_without_need() -> None:
    for sample in (sample for samples in CASES.values() for sample in samples):
        rule = sample.rule
        assert rule is not None and not over_cautious(sample, rule), sample


def test_over_cautious_factor_is_found() -> None:
    sample = CASES[aten.layer_norm.default][0]
    rule = sample.rule
    assert rule is not None and over_cautious(sample, replace(rule, need_replication=frozenset({"d1", "d2"}))) == {"d1"}


def swapped(rule: OpShardingRule) -> OpShardingRule:
    """The last two dimensions of the result exchanged."""
    (*lead, last, other) = rule.results[0]
    return replace(rule, results=((*lead, other, last),))


def free(rule: OpShardingRule) -> OpShardingRule:
    return replace(rule, need_replication=frozenset())


def bodiless(rule: OpShardingRule) -> OpShardingRule:
    return replace(rule, bodies={})


def with_body(factor: str, body: Callable[[Any], Any]) -> Callable[[OpShardingRule], OpShardingRule]:
    return lambda rule: replace(rule, bodies={factor: body})


def halo_off(**changes: int) -> Callable[[OpShardingRule], OpShardingRule]:
    """With another halo than that of the op, in the body too."""

    def plant(rule: OpShardingRule) -> OpShardingRule:
        ((made, halo),) = rule.halos.items()
        wrong = replace(halo, **changes)
        return replace(
            rule, halos={made: wrong}, bodies=dict.fromkeys((made, halo.source), partial(_with_halo, wrong, 0))
        )

    return plant


CONVOLVED = f(2, 3, 11), f(5, 3, 3), f(5), [1], [1]

PLANTED: list[tuple[str, Case, Callable[[OpShardingRule], OpShardingRule], str]] = [
    ("factors swapped", case(aten.transpose.int, f(2, 5, 7), 1, 2), swapped, "d1"),
    ("squares swapped", case(aten.matmul.default, f(5, 5), f(5, 5)), swapped, "m"),
    ("`!` dropped", case(aten.softmax.int, f(5, 7), 1), free, "d1"),
    ("`!` dropped", case(aten.cumsum.default, f(5, 7), 1), free, "d1"),
    ("query body dropped", case(SDPA, *[f(3, 5, 8)] * 3, None, 0.0, True), bodiless, "q"),
    ("squeeze of local size", case(aten.squeeze.default, f(1, 2, 3)), bodiless, "d1"),
    ("groups not local", case(aten.conv1d.default, f(2, 6, 5), f(6, 1, 2), None, groups=6), bodiless, "g"),
    ("no rows of the neighbours", case(aten.conv1d.default, *CONVOLVED), bodiless, "l0"),
    ("a halo one row off", case(aten.conv1d.default, *CONVOLVED), halo_off(padding=0), "l0"),
    ("a halo too short", case(aten.conv1d.default, *CONVOLVED), halo_off(reach=2), "l0"),
    (
        "bias counted by every rank",
        case(aten.linear.default, f(5, 7), f(3, 7), f(3)),
        with_body("i", lambda op: op.all_reduce(op.emit(aten.linear.default, *op.blocks))),
        "i",
    ),
    (
        "padding counted",
        case(aten.sum.dim_IntList, f(5, 7), [0]),
        with_body("d0", lambda op: op.all_reduce(op.emit(aten.sum.dim_IntList, op.operand(0), [0]))),
        "d0",
    ),
    (
        "padding is the maximum of zeros",
        case(aten.amin.default, positive(5, 7), [0]),
        with_body(
            "d0",
            lambda op: op.all_reduce(
                op.emit(aten.amin.default, op.mask_padding(op.operand(0), op.operands[0], 0), [0]), "min"
            ),
        ),
        "d0",
    ),
    (
        "not reduced",
        case(aten.sum.dim_IntList, f(5, 7), [0]),
        with_body(
            "d0", lambda op: op.emit(aten.sum.dim_IntList, op.mask_padding(op.operand(0), op.operands[0], 0), [0])
        ),
        "d0",
    ),
    (
        "mean of means",
        case(aten.mean.dim, f(5, 7), [0]),
        with_body(
            "d0",
            lambda op: op.emit(aten.div.Scalar, op.all_reduce(op.emit(aten.mean.dim, op.operand(0), [0])), op.parts),
        ),
        "d0",
    ),
    (
        "a replicated sum in sharded work",
        case(aten.softmax.int, f(5, 7), 0),
        lambda rule: replace(free(rule), bodies={"d0": _softmax_without_replicate}),
        "d0",
    ),
]


def _softmax_without_replicate(op: Any) -> Any:
    powers = op.mask_padding(op.emit(aten.exp.default, op.operand(0)), op.operands[0], 0)
    return op.emit(aten.div.Tensor, powers, op.all_reduce(op.emit(aten.sum.dim_IntList, powers, [0], True)))


@pytest.mark.parametrize(("what", "sample", "plant", "factor"), PLANTED, ids=[f"{p[1].target}-{p[0]}" for p in PLANTED])
def test_planted_wrong_is_refused(
    what: str, sample: Case, plant: Callable[[OpShardingRule], OpShardingRule], factor: str
) -> None:
    rule = sample.rule
    assert rule is not None
    assert not any(factor == known and fails(sample, rule, factor) for known in rule.sizes)
    assert fails(sample, plant(rule), factor)


# Rows of the neighbours

LAYOUTS = [
    whole_layout(13),
    whole_layout(13, 13),
    Layout((Segment(13, 1, 1, 0),)),
    Layout((Segment(13, 1, 0, 2),)),
    Layout((Segment(13, 1, 3, 4),)),
    Layout((Segment(1), Segment(12, 1, 0, 1))),
    Layout((Segment(12, 1, 1, 0), Segment(1))),
    Layout((Segment(2), Segment(9, 1, 1, 1), Segment(2))),
    Layout((Segment(6), Segment(7))),
]


def recut(graph: Any) -> Any:
    (source,), (target,) = graph.operands, graph.results
    wanted = held_rows(target.layout, graph.parts)
    assert wanted is not None
    rows = neighbouring_rows(graph, graph.operand(0), source, wanted, torch.device("cpu"))
    return graph.refill_padding(rows, target)


def recut_error(source: Layout, target: Layout, parts: int) -> AssertionError | None:
    sample = case(aten.clone.default, f(2, 13, 3))
    assert sample.rule is not None
    sharding = OpSharding("d1", (Sharded(1, source),), (Sharded(1, target),))
    try:
        compare(sample, replace(sample.rule, bodies={"d1": recut}), sharding, parts)
    except AssertionError as error:
        return error
    return None


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_another_layout_of_the_rows_of_neighbours(parts: int) -> None:
    pairs = [pair for pair in permutations(LAYOUTS, 2) if moved_rows(*pair, parts) is not None]
    assert len(pairs) > 12
    for source, target in pairs:
        error = recut_error(source, target, parts)
        assert error is None, f"{source} to {target}: {error}"


def test_rows_that_no_neighbour_has_are_not_looked_for_there(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = whole_layout(13, 13), whole_layout(13)
    assert moved_rows(*apart, 4) is None
    monkeypatch.setattr(halo, "rows_beside", lambda layout, wanted, parts: [(4, 0)])
    assert recut_error(*apart, 4) is not None


def test_what_another_layout_moves_is_what_changes_its_owner() -> None:
    rows, token = whole_layout(4096), Layout((Segment(1), Segment(4095, 1, 0, 1)))
    assert moved_rows(rows, rows, 4) == 0
    assert moved_rows(token, rows, 4) == moved_rows(rows, token, 4) == 3
    assert moved_rows(rows, Layout((Segment(4096, 1, 0, 4),)), 4) == 3 * 3
    assert moved_rows(Layout((Segment(2048), Segment(2048))), rows, 4) is None


# Calls that have no rule, or no sharding of a factor


@pytest.mark.parametrize(
    "sample",
    [
        case(aten.einsum.default, "ii->i", [f(5, 5)]),
        case(aten.einsum.default, "ii,ij->j", [f(5, 5), f(5, 7)]),
        case(SDPA, *[f(2, 3, 5, 8)] * 3, None, 0.5),
        case(aten.embedding.default, f(11, 7), ids(11, 5), -1, True),
        case(aten.index.Tensor, f(5, 7), [bools(5)]),
        case(aten.repeat_interleave.self_int, f(5, 7), 2),
        case(aten.mse_loss.default, f(5, 7), f(7)),
        case(aten.add.Tensor, f(0, 7), f(0, 7)),
        case(aten.rand_like.default, f(5, 7)),
        case(aten.rrelu.default, f(5, 7)),
        case(aten.add_.Tensor, f(5, 7), f(5, 7)),
    ],
    ids=str,
)
def test_call_without_rule(sample: Case) -> None:
    assert sample.rule is None


def test_parallel_dropout_differs_between_ranks_and_repeats() -> None:
    sample = case(aten.dropout.default, torch.ones(8, 4001), 0.25, True)
    rule = sample.rule
    assert rule is not None
    sharding = rule.shard_factor("d0")
    assert sharding is not None
    blocks = [Ranks(cut(sample.tensors[0], sharding.operands[0], 2))]
    placements = tuple(p or REPLICATED for p in sharding.operands)

    def draw() -> Any:
        torch.manual_seed(0)
        op = EagerLocalOp(sample.call, blocks, placements, sharding.results, 2, rng="parallel")
        return rule.bodies["d0"](op)  # type: ignore[arg-type]

    first, second = draw()
    assert not torch.equal(first, second)
    assert all(torch.equal(x, y) for x, y in zip(draw(), (first, second), strict=True))
    for mask in (first, second):
        assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        assert abs(mask.mean() - 1) < 0.02


def test_simulated_ranks_draw_apart() -> None:
    with simulate(2) as mode:
        rank = mode.rank_map(lambda r: torch.tensor([r]))
        made = torch.ops.sp.bernoulli(torch.empty(1000), torch.tensor([7]), rank, 0.5)
    one, two = (made._local_tensors[r] for r in range(2))
    plain = torch.ops.sp.bernoulli(torch.empty(1000), torch.tensor([7]), torch.tensor([1]), 0.5)
    assert not torch.equal(one, two) and torch.equal(two, plain)


def test_bernoulli_is_a_proper_op() -> None:
    sample = torch.empty(5, 7), torch.tensor([3]), torch.tensor([1]), 0.3
    torch.library.opcheck(torch.ops.sp.bernoulli.default, sample)


def test_slice_at_a_segment_boundary_is_a_cut_and_elsewhere_carries() -> None:
    sample = case(aten.slice.Tensor, f(2, 31, 7), 1, 11)
    rule = sample.rule
    assert rule is not None
    aligned = Sharded(1, Layout((Segment(11), Segment(20))))
    sharding = rule.follow(0, [aligned])
    assert sharding is not None and sharding.results == (Sharded(1, Layout((Segment(20),))),)
    for parts in (2, 3):
        compare(sample, rule, sharding, parts)
    across = Sharded(1, Layout((Segment(31),)))
    assert rule.carry(0, [across]) == sharding.results


@pytest.mark.parametrize("segments", [(31,), (3, 28), (14, 17), (5, 9, 17)], ids=str)
@pytest.mark.parametrize(("start", "end"), [(1, 31), (0, -1), (4, 24), (11, 31), (20, 31)])
def test_a_slice_stays_where_its_rows_are(start: int, end: int, segments: tuple[int, ...]) -> None:
    sample = case(aten.slice.Tensor, f(2, 31, 7), 1, start, end)
    rule = sample.rule
    assert rule is not None
    sharding = rule.follow(0, [Sharded(1, Layout(tuple(Segment(size) for size in segments)))])
    assert sharding is not None
    for parts in (2, 3, 4):
        compare(sample, rule, sharding, parts)


def test_streams_keep_their_own_layout() -> None:
    sample = case(aten.cat.default, [f(6, 7), f(5, 7), f(1, 7)])
    rule = sample.rule
    assert rule is not None
    granules = Sharded(0, Layout((Segment(6, 2),)))
    sharding = rule.follow(0, [granules, REPLICATED, REPLICATED])
    assert sharding is not None
    assert sharding.results == (Sharded(0, Layout((Segment(6, 2), Segment(5), Segment(1)))),)
    for parts in (2, 3, 4):
        compare(sample, rule, sharding, parts)


def test_split_of_packed_heads_reads_an_outer_factor() -> None:
    sample = case(aten.split.Tensor, f(5, 36), 12, 1)
    rule = sample.rule
    assert rule is not None
    sharding = rule.follow(0, [Sharded(1, Layout((Segment(12, 4),), outer=3))])
    assert sharding is not None and sharding.results == (Sharded(1, Layout((Segment(12, 4),))),) * 3
    for parts in (2, 3):
        compare(sample, rule, sharding, parts)
