"""Each sp:: op on simulated ranks against its specification, a re-placement of a whole program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from sp_compile.distributed.group import get_sequence_parallel_group
from sp_compile.errors import SequenceParallelError
from sp_compile.ops import sp_ops as ops
from sp_compile.placement.sharded_dim import ShardedDim
from sp_compile.tools.simulation import fake_world, simulate
from tests.test_blocks import Blocks

sp = torch.ops.sp
NAN = float("nan")


def identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Case:
    """An op is a function of the whole program between two placements; None is Replicated."""

    op: Callable[[Tensor, Tensor, str], Tensor]
    shape: tuple[int, ...]
    source: Blocks | None
    target: Blocks | None
    function: Callable[[Tensor], Tensor] = identity
    fill: float | None = None

    def run(
        self, x: Tensor, parts: int, cotangent: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Inputs, cotangents, expected outputs and expected gradients of every rank.

        Padding that nothing may read is NaN.
        """
        poison = NAN if x.is_floating_point() else None
        out = self.function(x)
        outputs = self.target.cut(out, parts, self.fill) if self.target else [out] * parts
        inputs = self.source.cut(x, parts, poison) if self.source else [x] * parts
        if cotangent is None:
            return inputs, [], outputs, []
        _, vjp = torch.func.vjp(self.function, x)
        (whole,) = vjp(cotangent)
        cotangents = self.target.cut(cotangent, parts, poison) if self.target else [cotangent] * parts
        grads = self.source.cut(whole, parts, padding=0) if self.source else [whole] * parts
        return inputs, cotangents, outputs, grads


def shard(shape: tuple[int, ...], blocks: Blocks) -> Case:
    return Case(lambda x, rank, g: sp.shard(x, rank, *blocks.args, g), shape, None, blocks)


def gather(shape: tuple[int, ...], blocks: Blocks) -> Case:
    return Case(lambda x, rank, g: sp.all_gather(x, rank, *blocks.args, g), shape, blocks, None)


def exchange(shape: tuple[int, ...], source: Blocks, target: Blocks) -> Case:
    def op(x: Tensor, rank: Tensor, group: str) -> Tensor:
        return sp.all_to_all(x, *source.args, *target.args, group)

    return Case(op, shape, source, target)


def mask(shape: tuple[int, ...], blocks: Blocks, fill: float) -> Case:
    def op(x: Tensor, rank: Tensor, group: str) -> Tensor:
        return sp.mask_padding(x, rank, *blocks.args, fill, group)

    return Case(op, shape, blocks, blocks, fill=fill)


def select(shape: tuple[int, ...], blocks: Blocks, rows: list[int]) -> Case:
    def op(x: Tensor, rank: Tensor, group: str) -> Tensor:
        return sp.select_rows(x, rank, *blocks.args, torch.tensor(rows).long(), group)

    def function(x: Tensor) -> Tensor:
        wrapped = [row % x.shape[blocks.dim] for row in rows]
        return x.index_select(blocks.dim, torch.tensor(wrapped).long())

    return Case(op, shape, blocks, None, function)


def grouped(shape: tuple[int, ...], blocks: Blocks, dim: int, heads: int) -> Case:
    def op(x: Tensor, rank: Tensor, group: str) -> Tensor:
        return sp.all_to_all_kv(x, rank, *blocks.args, dim, heads, group)

    def function(x: Tensor) -> Tensor:
        return x.repeat_interleave(heads // shape[dim], dim)

    return Case(op, shape, blocks, Blocks(dim, (heads,)), function)


def gather_replicate(shape: tuple[int, ...], blocks: Blocks) -> Case:
    """Each rank's share of the gradient is a P-th of the whole."""

    def op(x: Tensor, rank: Tensor, group: str) -> Tensor:
        whole = sp.all_gather_replicate(x, *blocks.args, group)
        return sp.scale_gradient(whole, 1 / torch.distributed.get_world_size())

    return Case(op, shape, blocks, None)


def packed(shape: tuple[int, ...], source: Blocks, target: Blocks) -> Case:
    """One value twice, the second time doubled."""

    def op(x: Tensor, rank: Tensor, group: str) -> Tensor:
        numbers = [0, *source.layout.written(), *target.layout.written()]
        once, twice = sp.all_to_all_packed([x, 2 * x], rank, 2 * numbers, group)
        return once + twice

    return Case(op, shape, source, target, lambda x: 3 * x)


CASES = {
    "shard": shard((2, 7, 3), Blocks(1, (7,))),
    "shard even": shard((2, 12, 3), Blocks(1, (12,))),
    "shard last, negative": shard((2, 1, 5), Blocks(-1, (5,))),
    "shard, fewer rows than ranks": shard((1, 2, 3), Blocks(1, (2,))),
    "shard outer, segments, granules": shard((30, 2), Blocks(0, (4, 6), (2, 3), 3)),
    "shard of nothing": shard((0, 5), Blocks(1, (5,))),
    "gather": gather((2, 7, 3), Blocks(1, (7,))),
    "gather even": gather((2, 12, 3), Blocks(-2, (12,))),
    "gather even outer": gather((2, 24), Blocks(1, (12,), (), 2)),
    "gather, fewer rows than ranks": gather((1, 2, 3), Blocks(1, (2,))),
    "gather outer, segments, granules": gather((30, 2), Blocks(0, (4, 6), (2, 3), 3)),
    "gather of nothing": gather((0, 5), Blocks(1, (5,))),
    "exchange": exchange((1, 3, 7, 2), Blocks(2, (7,)), Blocks(1, (3,))),
    "exchange even": exchange((2, 12, 24, 2), Blocks(2, (24,)), Blocks(1, (12,))),
    "exchange back": exchange((1, 3, 7, 2), Blocks(1, (3,)), Blocks(2, (7,))),
    "exchange, even rows only": exchange((2, 12, 5), Blocks(1, (12,)), Blocks(-1, (5,))),
    "exchange, fewer rows than ranks": exchange((1, 1, 3), Blocks(2, (3,)), Blocks(1, (1,))),
    "exchange packed heads": exchange((1, 11, 18), Blocks(1, (4, 7)), Blocks(-1, (6,), (2,), outer=3)),
    "exchange outer on both sides": exchange((10, 36), Blocks(0, (5,), (), 2), Blocks(1, (12,), (), 3)),
    "exchange even outer on both sides": exchange((24, 36), Blocks(0, (12,), (), 2), Blocks(1, (12,), (), 3)),
    "exchange of nothing": exchange((0, 3, 5), Blocks(2, (5,)), Blocks(1, (3,))),
    "gather replicate": gather_replicate((2, 7, 3), Blocks(1, (7,))),
    "gather replicate even": gather_replicate((2, 12, 3), Blocks(1, (12,))),
    "gather replicate outer, segments, granules": gather_replicate((30, 2), Blocks(0, (4, 6), (2, 3), 3)),
    "packed": packed((1, 3, 7, 2), Blocks(2, (7,)), Blocks(1, (3,))),
    "packed outer, segments": packed((1, 11, 18), Blocks(1, (4, 7)), Blocks(2, (6,), (2,), outer=3)),
    "mask with zero": mask((2, 7, 3), Blocks(1, (7,)), 0),
    "mask with -inf": mask((2, 22), Blocks(-1, (4, 7), (2, 1), 2), float("-inf")),
    "select": select((2, 7, 3), Blocks(1, (7,)), [-1, 0, 3, 3]),
    "select outer, segments": select((22, 3), Blocks(0, (4, 7), (2, 1), 2), [21, 4, -12]),
    "select none": select((2, 7, 3), Blocks(-2, (7,)), []),
    "KV 6:2": grouped((1, 2, 7, 3), Blocks(2, (7,)), 1, 6),
    "KV 12:4": grouped((2, 4, 12, 3), Blocks(2, (12,)), 1, 12),
    "KV 5:1": grouped((1, 5, 1, 3), Blocks(1, (5,)), -2, 5),
    "KV 3:3": grouped((2, 7, 3), Blocks(1, (3, 4)), -1, 3),
    "KV 10:5, packed rows": grouped((10, 5, 2), Blocks(0, (5,), (), 2), 1, 10),
}
MOVES = [name for name in CASES if not name.startswith(("mask", "packed", "KV 3", "KV 1"))]
DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.bool,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.int64,
]


def group_name() -> str:
    group = get_sequence_parallel_group()
    assert group is not None
    return group.group_name


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Bit for bit: what only moves data does not round."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    found, expected = (x.contiguous().view(-1).view(torch.uint8) for x in (found, expected))
    assert torch.equal(found, expected)


def check(name: str, parts: int) -> None:
    """Values, and gradients for a random cotangent, on simulated ranks."""
    case = CASES[name]
    x = torch.randn(case.shape).transpose(0, -1).contiguous().transpose(0, -1)
    inputs, cotangents, outputs, grads = case.run(x, parts, torch.randn_like(case.function(x)))
    with simulate(parts) as mode:
        rank = mode.rank_map(lambda r: torch.tensor([r]))
        local = mode.rank_map(lambda r: inputs[r].clone()).requires_grad_()
        found = case.op(local, rank, group_name())
        found.backward(mode.rank_map(lambda r: cotangents[r].clone()))
        for r in range(parts):
            assert_same(found._local_tensors[r].detach(), outputs[r])
            torch.testing.assert_close(local.grad._local_tensors[r], grads[r])


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, parts: int) -> None:
    check(name, parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_moves(dtype: torch.dtype) -> None:
    for name in MOVES:
        x = torch.randint(0, 2, CASES[name].shape).to(dtype)
        inputs, _, outputs, _ = CASES[name].run(x, 3)
        with simulate(3) as mode:
            rank = mode.rank_map(lambda r: torch.tensor([r]))
            local = mode.rank_map(lambda r, inputs=inputs: inputs[r].clone())
            found = CASES[name].op(local, rank, group_name())
            for r in range(3):
                assert_same(found._local_tensors[r], outputs[r])


@pytest.mark.parametrize("name", ["exchange", "gather", "KV 6:2"])
def test_control_a_gradient_padded_by_repetition_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops._Shard.forward
    monkeypatch.setattr(ops._Shard, "forward", staticmethod(lambda ctx, *args: right(ctx, *args[:4], False)))
    cut = ShardedDim.cut_for_all
    monkeypatch.setattr(ShardedDim, "cut_for_all", lambda layout, x, parts, zero: cut(layout, x, parts, False))
    with pytest.raises(AssertionError):
        check(name, 3)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_what_is_packed_is_what_it_was_alone(parts: int) -> None:
    """Two dtypes, all kinds of exchange; of the last two one takes no gradient, and of one the result is not used."""
    rows, heads = Blocks(2, (7,)), Blocks(1, (6,))
    kinds = [(6, torch.float32), (2, torch.float32), (1, torch.float64), (6, torch.float32), (6, torch.float64)]
    numbers = [0, *rows.layout.written(), *heads.layout.written()]
    exchanges = [*numbers, 1, *rows.layout.written(), 1, 6, 2, *rows.layout.written(), *numbers, *numbers]
    results, grads = [], []
    for together in (True, False):
        torch.manual_seed(0)
        with simulate(parts) as mode:
            rank, group = mode.rank_map(lambda r: torch.tensor([r])), group_name()
            local = [mode.rank_map(lambda r, n=n, t=t: torch.randn(1, n, -(-7 // parts), 3, dtype=t)) for n, t in kinds]
            tensors = [x.requires_grad_(at != 3) for at, x in enumerate(local)]
            q, k, v, frozen, unused = tensors
            if together:
                made = sp.all_to_all_packed(tensors, rank, exchanges, group)
            else:
                moves = [sp.all_to_all(x, *rows.args, *heads.args, group) for x in (q, frozen, unused)]
                made = [moves[0], sp.all_to_all_kv(k, rank, *rows.args, 1, 6, group)]
                made += [sp.all_gather_replicate(v, *rows.args, group), *moves[1:]]
            assert [x.requires_grad for x in made] == [True, True, True, False, True]
            torch.stack([x.double().cos().sum() for x in made[:4]]).sum().backward()
            assert unused.grad is None and frozen.grad is None
            results.append([x._local_tensors[r].detach() for x in made for r in range(parts)])
            grads.append([x.grad._local_tensors[r] for x in (q, k, v) for r in range(parts)])
    for one, other in zip(results[0] + grads[0], results[1] + grads[1], strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_positions(parts: int) -> None:
    blocks = Blocks(0, (4, 7), (2, 1), 2)
    with simulate(parts) as mode:
        rank = mode.rank_map(lambda r: torch.tensor([r]))
        found = sp.positions(rank, *blocks.args[1:], group_name())
        for r in range(parts):
            assert found._local_tensors[r].tolist() == [row for row, _ in blocks.rows(parts)[r]]


@pytest.mark.parametrize(
    ("dtype", "fill", "expected"),
    [
        (torch.bool, True, True),
        (torch.int64, -100, -100),
        (torch.float16, float("inf"), float("inf")),
        (torch.int16, 7, 7),
    ],
    ids=str,
)
def test_mask_padding_keeps_the_dtype(dtype: torch.dtype, fill: float, expected: float) -> None:
    with simulate(2) as mode:
        rank = mode.rank_map(lambda r: torch.tensor([r]))
        x = torch.zeros(3).to(dtype)
        found = sp.mask_padding(x, rank, 0, 1, [5], [1], fill, group_name())._local_tensors[1]
        assert found.dtype == dtype and found.tolist() == [0, 0, expected]


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_all_reduce_sum_and_replicate_are_conjugate(parts: int) -> None:
    terms, grad = torch.randn(parts, 2, 3).transpose(1, 2), torch.randn(3, 2)
    with simulate(parts) as mode:
        group = group_name()
        x = mode.rank_map(lambda r: terms[r]).requires_grad_()
        total = sp.all_reduce(x, "sum", group)
        total.backward(mode.rank_map(lambda r: grad.clone()))
        whole = grad.clone().requires_grad_()
        copy = sp.replicate(whole, group)
        assert copy.data_ptr() == whole.data_ptr()
        copy.backward(mode.rank_map(lambda r: terms[r]))
        for r in range(parts):
            torch.testing.assert_close(total._local_tensors[r].detach(), terms.sum(0))
            torch.testing.assert_close(x.grad._local_tensors[r], grad)
            torch.testing.assert_close(whole.grad._local_tensors[r], terms.sum(0))


@pytest.mark.parametrize("kind", ["max", "min"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extrema_give_their_gradient_to_the_winners(kind: str, dtype: torch.dtype) -> None:
    # Columns: one winner, two, three; a tie is shared equally, so that the total is right.
    terms = torch.tensor([[3, 1, 2], [1, 1, 2], [2, 0, 2]], dtype=dtype)
    terms = terms if kind == "max" else -terms
    shares = torch.tensor([[6, 3, 2], [0, 3, 2], [0, 0, 2]], dtype=dtype)
    with simulate(3) as mode:
        x = mode.rank_map(lambda r: terms[r]).requires_grad_()
        out = sp.all_reduce(x, kind, group_name())
        out.backward(torch.full((3,), 6, dtype=dtype))
        for r in range(3):
            assert_same(out._local_tensors[r].detach(), getattr(terms, f"a{kind}")(0))
            assert_same(x.grad._local_tensors[r], shares[r])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    # In float16 60000 + 60000 is inf; in bfloat16 256 + 1 + 1 is 256.
    terms = [60000.0, 60000.0, -60000.0] if dtype == torch.float16 else [256.0, 1.0, 1.0]
    with simulate(3) as mode:
        x = mode.rank_map(lambda r: torch.tensor([terms[r]], dtype=dtype))
        total = sp.all_reduce(x, "sum", group_name())._local_tensors[2]
        assert total.dtype == dtype and total.item() == sum(terms)


def test_other_dtypes_are_reduced_exactly_or_refused() -> None:
    with simulate(2) as mode:
        group = group_name()
        odd = mode.rank_map(lambda r: torch.tensor([bool(r), False]))
        assert sp.all_reduce(odd, "max", group)._local_tensors[0].tolist() == [True, False]
        turn = mode.rank_map(lambda r: torch.tensor([1 + 2j * r]).conj())
        assert sp.all_reduce(turn, "sum", group)._local_tensors[0].tolist() == [2 - 2j]
        for dtype, kind in [(torch.int16, "sum"), (torch.float8_e5m2, "max"), (torch.bool, "sum")]:
            with pytest.raises(SequenceParallelError, match=f"cannot reduce {dtype} over ranks"):
                sp.all_reduce(torch.ones(2).to(dtype), kind, group)


ERRORS = {
    "has no dimension 3": lambda x, g: sp.shard(x, x, 3, 1, [6], [1], g),
    r"\[4, 6\] has 6 rows; one of 1 parts of 2 x segments \[4\] with granules \[1\] has 8": (
        lambda x, g: sp.shard(x, x, -1, 2, [4], [1], g)
    ),
    r"has 6 rows; one of 2 parts .* has 4": lambda x, g: sp.all_gather(x, x, 1, 1, [7], [1], g),
    "2 segment sizes, 1 granules": lambda x, g: sp.shard(x, x, 0, 1, [2, 2], [1], g),
    "dimension 1 of .* is both gathered and scattered": (
        lambda x, g: sp.all_to_all(x, 1, 1, [12], [1], -1, 1, [6], [1], g)
    ),
    "unknown kind of reduction 'mean'; use sum, max or min": (lambda x, g: sp.all_reduce(x, "mean", g)),
    "10 query heads cannot share the 4 KV heads in dimension 0": (
        lambda x, g: sp.all_to_all_kv(x, x, 1, 1, [12], [1], 0, 10, g)
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_was_met(message: str) -> None:
    with fake_world(2), pytest.raises(SequenceParallelError, match=message):
        ERRORS[message](torch.randn(4, 6), torch.distributed.group.WORLD.group_name)


def test_select_rows_refuses_a_row_that_is_not_there() -> None:
    with fake_world(2), pytest.raises(IndexError):
        CASES["select"].op(torch.randn(2, 4, 3), torch.tensor([0]), "0")
        args = 1, 1, [7], [1], torch.tensor([7]), torch.distributed.group.WORLD.group_name
        sp.select_rows(torch.randn(2, 4, 3), torch.tensor([0]), *args)


def test_backward_can_be_differentiated_again() -> None:
    """The gradient of a squared gradient, through three ops and back, is that of one device."""
    x, blocks, heads = torch.randn(1, 5, 7), Blocks(2, (7,)), Blocks(1, (5,))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return grad.pow(2).sum()

    plain = x.clone().requires_grad_()
    loss(plain, plain.sin()).backward()
    with simulate(3) as mode:
        rank = mode.rank_map(lambda r: torch.tensor([r]))
        whole, group = x.clone().requires_grad_(), group_name()
        local = sp.shard(whole, rank, *blocks.args, group).sin()
        local = sp.all_to_all(local, *blocks.args, *heads.args, group)
        loss(whole, sp.all_gather(local, rank, *heads.args, group)).backward()
        for r in range(3):
            torch.testing.assert_close(whole.grad._local_tensors[r], plain.grad)


# Collectives of the forward and of the backward graph.
COLLECTIVES = {
    "shard": ([], ["all_gather_into_tensor"]),
    "gather": (["all_gather_into_tensor"], []),
    "exchange": (["all_to_all_single"], ["all_to_all_single"]),
    "mask with -inf": ([], []),
    "select": (["all_reduce"], []),
    "KV 6:2": (["all_to_all_single"], ["all_to_all_single"]),
    "gather replicate": (["all_gather_into_tensor"], ["all_to_all_single"]),
    "packed": (["all_to_all_single"], ["all_to_all_single"]),
    "sum": (["all_reduce"], []),
    "max": (["all_reduce"], ["all_reduce"]),
    "replicate": ([], ["all_reduce"]),
}
TRACED = {
    **CASES,
    "sum": Case(lambda x, rank, g: sp.all_reduce(x, "sum", g), (2, 3), None, None),
    "max": Case(lambda x, rank, g: sp.all_reduce(x, "max", g), (2, 3), None, None),
    "replicate": Case(lambda x, rank, g: sp.replicate(x, g), (2, 3), None, None),
}


def collectives(graph: GraphModule) -> list[str]:
    """The kinds of collectives; each has one user, its wait. No sp:: op is left."""
    found = []
    for node in graph.graph.nodes:
        namespace, _, name = str(node.target).partition(".")
        assert namespace != "sp"
        if namespace == "_c10d_functional" and not name.startswith("wait_tensor"):
            (user,) = node.users
            assert user.target is torch.ops._c10d_functional.wait_tensor.default
            found.append(name.split(".")[0])
    return found


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_lowered_graphs_have_one_collective(name: str, mode: str) -> None:
    graphs: dict[str, GraphModule] = {}

    def keep(key: str) -> Callable[..., Any]:
        return lambda graph, inputs: make_boxed_func(graphs.setdefault(key, graph).forward)

    backend = aot_autograd(fw_compiler=keep("fw"), bw_compiler=keep("bw"), inference_compiler=keep("fw"))
    with fake_world(3), torch.inference_mode(mode == "inference"):
        torch._dynamo.reset()
        case, group = TRACED[name], torch.distributed.group.WORLD.group_name
        x = torch.randn(case.shape)
        x = case.source.cut(x, 3)[0] if case.source else x
        x.requires_grad_(mode == "train")
        function = torch.compile(lambda x, rank: case.op(x * 2, rank, group) * 2, backend=backend)
        with torch.set_grad_enabled(mode == "train"):
            out = function(x, torch.tensor([0]))
        assert collectives(graphs["fw"]) == COLLECTIVES[name][0]
        if mode == "train":
            out.sum().backward()
            assert collectives(graphs["bw"]) == COLLECTIVES[name][1]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(45, 11), (64, 11)])
def test_inductor_finds_every_stored_row(sizes: tuple[int, ...]) -> None:
    """Its CPU loops over `arange(45) // 23` left rows 23 to 44 unwritten: torch 2.13, `try_loop_split`."""
    for parts in (2, 3):
        layout, device = Blocks(0, sizes).layout, torch.device("cpu")
        torch._dynamo.reset()
        found = torch.compile(lambda: layout.stored_rows(parts, device))()  # noqa: B023
        assert torch.equal(found, layout.stored_rows(parts, device))


def test_pre_dispatch_graphs_keep_the_op_whole() -> None:
    with fake_world(3):
        case, group = CASES["exchange"], torch.distributed.group.WORLD.group_name
        x = torch.randn(1, 3, 3, 2, requires_grad=True)
        graph = make_fx(lambda x: case.op(x, x, group).sin(), pre_dispatch=True)(x).graph
        called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert called == ["sp.all_to_all.default", "aten.sin.default"]


def test_one_graph_serves_all_lengths() -> None:
    """Neither P dividing the length nor its remainder is a guard; nor is that of the heads."""

    def program(x: Tensor, rank: Tensor, group: str) -> Tensor:
        size, heads = x.shape[1], x.shape[2]
        x = sp.shard(x, rank, 1, 1, [size], [1], group).sin()
        x = sp.all_to_all(x, 1, 1, [size], [1], 2, 1, [heads], [1], group).sin()
        x = sp.all_to_all(x, 2, 1, [heads], [1], 1, 1, [size], [1], group).sin()
        return sp.all_gather(x, rank, 1, 1, [size], [1], group)

    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(program, backend=counter, dynamic=True)
    with fake_world(4):
        torch._dynamo.reset()
        for size, heads in [(33, 6), (32, 8), (34, 5), (35, 12), (1024, 7), (5, 9)]:
            x = torch.randn(2, size, heads, 4, requires_grad=True)
            out = function(x, torch.tensor([0]), torch.distributed.group.WORLD.group_name)
            out.sum().backward()
            assert out.shape == x.shape
    assert counter.frame_count == 1


# torch's own wait_tensor fails these two: it returns its operand, and its schema denies it.
WITHOUT_WAIT = ("test_schema", "test_faketensor")


class Checked:
    """`torch.ops.sp` whose ops are checked by opcheck as they are called."""

    def __init__(self, *test_utils: str) -> None:
        self.test_utils = test_utils

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            op = getattr(torch.ops.sp, name).default
            silent = name in ("shard", "mask_padding", "positions")
            opcheck(op, args, test_utils=(*self.test_utils, *(WITHOUT_WAIT if silent else ())))
            result: Tensor = op(*args)
            return result

        return call


@pytest.mark.parametrize("name", TRACED)
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "sp", Checked("test_autograd_registration"))
    with fake_world(3):
        case = TRACED[name]
        x = torch.randn(case.shape)
        x = case.source.cut(x, 3)[0] if case.source else x
        x.requires_grad_()
        case.op(x, torch.tensor([0]), torch.distributed.group.WORLD.group_name)


@pytest.mark.parametrize("name", TRACED)
def test_fake_tensors_look_like_real_ones(name: str) -> None:
    with fake_world(3):
        case, group = TRACED[name], torch.distributed.group.WORLD.group_name
        x = torch.randn(case.shape).transpose(0, -1).contiguous().transpose(0, -1)
        x = case.source.cut(x, 3)[0] if case.source else x
        found = case.op(x, torch.tensor([0]), group)
        with FakeTensorMode() as fake_mode:
            fake = case.op(fake_mode.from_tensor(x), torch.tensor([0]), group)
        assert (fake.shape, fake.dtype) == (found.shape, found.dtype)
        for size, stride, expected in zip(found.shape, fake.stride(), found.stride(), strict=True):
            assert stride == expected or size == 1
