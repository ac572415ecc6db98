"""The notation of sharding rules, and how a rule follows placements."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from sp_compile.errors import RuleError
from sp_compile.placement.placements import Layout, Segment, Sharded, Size, whole_layout
from sp_compile.rules import register_sharding_rule, rule_for
from sp_compile.rules.notation import parse_rule
from sp_compile.rules.op_call import OpCall, TensorSpec
from sp_compile.rules.rule import Joined, OpShardingRule, divide

aten = torch.ops.aten
S, B = sympy.Symbol("s", integer=True, positive=True), sympy.Symbol("b", integer=True, positive=True)


def spec(*shape: Size) -> TensorSpec:
    return TensorSpec(shape, torch.float32)


def call(target: torch._ops.OpOverload, result: tuple[Size, ...], **arguments: Any) -> OpCall:
    """A call with symbolic sizes, as of a dynamic graph."""
    for argument in target._schema.arguments:
        arguments.setdefault(argument.name, argument.default_value if argument.has_default_value() else None)
    named = [(name, value) for name, value in arguments.items() if isinstance(value, TensorSpec)]
    operands, names = tuple(value for _, value in named), tuple(name for name, _ in named)
    return OpCall(target, arguments, operands, names, (spec(*result),))


def linear(*shapes: tuple[Size, ...], result: tuple[Size, ...] = (2, 5, 3)) -> OpCall:
    names = ("input", "weight", "bias")
    return call(aten.linear.default, result, **{n: spec(*s) for n, s in zip(names, shapes, strict=False)})


def test_factors_and_flags() -> None:
    rule = parse_rule("... i!, o i, +o -> ... o", linear((2, 5, 7), (3, 7), (3,)))
    assert rule.operands == (((".2",), (".1",), ("i",)), (("o",), ("i",)), (("o",),))
    assert rule.results == (((".2",), (".1",), ("o",)),)
    assert rule.sizes == {".2": 2, ".1": 5, "i": 7, "o": 3}
    assert rule.need_replication == {"i"} and rule.additive == {2}


def test_absent_operand_is_passed_over() -> None:
    assert len(parse_rule("... i, o i, +o -> ... o", linear((2, 5, 7), (3, 7))).operands) == 2


def test_size_one_has_no_factor() -> None:
    matmul = call(aten.matmul.default, (11, 2, 5, 3), self=spec(2, 5, 7), other=spec(11, 1, 7, 3))
    rule = parse_rule("... m k, ... k n -> ... m n", matmul)
    assert rule.operands[1] == ((".2",), (), ("k",), ("n",))


def test_a_result_without_the_factor_is_not_made_on_its_shards() -> None:
    """The statistics of a row would be made by every rank, and their gradient counted by each."""
    x, row = (("s",), ("c",)), (("s",),)
    rule = OpShardingRule((x,), (x, row), {"s": 5, "c": 7})
    assert rule.shard_factor("c") is None and rule.shard_factor("s") is not None


def test_one_kv_head_for_all() -> None:
    gather = call(aten.gather.default, (6, 5), self=spec(6, 5), dim=0, index=spec(1, 5))
    rule = parse_rule("(g r) q, g q -> (g r) q", gather)
    assert rule.operands == ((("r",), ("q",)), ((), ("q",)))


def test_grouped_dimension() -> None:
    repeat = call(aten.repeat_interleave.self_int, (5, 12), self=spec(5, 4), repeats=3, dim=1)
    rule = parse_rule("b g -> b (g r!)", repeat)
    assert rule.sizes["r"] == 3 and rule.need_replication == {"r"}
    assert rule.results[0][1] == ("g", "r")
    sharding = rule.shard_factor("g")
    assert sharding is not None and sharding.results == (Sharded(1, whole_layout(12, 3)),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("... i, o i", "has no '->'"),
        ("... i, o i, +o -> ... O", "cannot read 'O' in '... O'; a dimension is a letter"),
        (
            "... i, o i -> ... o, o",
            "2 operands and 2 results; aten.linear.default was called with 2 tensors and gave 1",
        ),
        ("i, o i -> ... o", "does not fit aten.linear.default: a shape of 3 dimensions"),
        ("... o, o i -> ... o", "is 7 in one place and 3 in another"),
        ("... i, o i -> ... (x i)", "7 does not divide 3"),
        ("... i, o i -> ... (x y)", r"nothing tells the size of \['x', 'y'\]"),
    ],
)
def test_error_names_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(RuleError, match=message) as error:
        parse_rule(text, linear((2, 5, 7), (3, 7)))
    assert repr(text) in str(error.value)


def test_user_rule_is_found_once() -> None:
    with torch.library._scoped_library("sp_test_notation", "DEF") as library:
        library.define("scan(Tensor x, Tensor weight) -> Tensor")
        op = torch.ops.sp_test_notation.scan
        register_sharding_rule(op, "b s! c, c -> b s! c")
        rule = rule_for(call(op.default, (2, 5, 7), x=spec(2, 5, 7), weight=spec(7)))
        assert rule is not None and rule.need_replication == {"s"} and rule.borrowable(0) == (("b", 0), ("c", 2))
        with pytest.raises(RuleError, match="has a sharding rule already"):
            register_sharding_rule(op, "b s c, c -> b s c")


def test_symbolic_reshape() -> None:
    split = rule_for(call(aten.reshape.default, (B, S, 4, 16), self=spec(B, S, 64), shape=[B, S, 4, 16]))
    assert split is not None
    assert split.operands == ((("f0",), ("f1",), ("f2", "f3")),)
    joined = rule_for(call(aten.reshape.default, (B * S, 64), self=spec(B, S, 64), shape=[-1, 64]))
    assert joined is not None and joined.results == ((("f0", "f1"), ("f2",)),)
    sharding = joined.follow(0, [Sharded(1, whole_layout(S))])
    assert sharding is not None and sharding.results == (Sharded(0, Layout((Segment(S),), B)),)
    assert joined.follow_result(0, sharding.results[0], ()) == sharding


def test_symbolic_windows_that_may_not_divide_have_no_rule() -> None:
    windows = rule_for(call(aten.reshape.default, (S // 7, 7, 4), self=spec(S, 4), shape=[-1, 7, 4]))
    assert windows is None


def test_symbolic_shift_keeps_streams() -> None:
    shift = rule_for(call(aten.slice.Tensor, (2, S - 1), self=spec(2, S), dim=1, start=0, end=-1))
    assert shift is not None and shift.operands == ((("d0",), Joined(("kept", "hi"))),)
    assert shift.sizes == {"d0": 2, "kept": S - 1, "hi": 1}
    tail = rule_for(call(aten.slice.Tensor, (2, 1), self=spec(2, S), dim=1, start=-1))
    assert tail is not None and tail.results == ((("d0",), ()),) and set(tail.bodies) == {"d1"}


layouts = st.builds(
    lambda counts, granule, outer: Layout(tuple(Segment(count * granule, granule) for count in counts), outer),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(1, 4),
)


@given(layouts, st.integers(1, 5), st.integers(1, 5))
def test_within_inverts_scaled(layout: Layout, left: int, right: int) -> None:
    scaled = layout.scaled(left, right)
    assert scaled.size == left * int(layout.size) * right
    assert scaled.local_size(3) == left * int(layout.local_size(3)) * right
    assert scaled.within(left, layout.size, right) == layout


@given(layouts, st.integers(1, 5), st.integers(1, 40), st.integers(1, 5))
def test_scaled_inverts_within(layout: Layout, left: int, size: int, right: int) -> None:
    inner = layout.within(left, size, right)
    assert inner is None or (inner.size == size and inner.scaled(left, right) == layout)


@given(st.lists(layouts, min_size=1, max_size=4))
def test_divide_deals_out_what_was_laid_end_to_end(streams: list[Layout]) -> None:
    flat = [Layout(each.segments * int(each.outer)) for each in streams]
    whole = Layout(tuple(segment for each in flat for segment in each.segments))
    assert divide(whole, [each.size for each in flat]) == flat
    assert divide(whole, [whole.size, 1]) is None
