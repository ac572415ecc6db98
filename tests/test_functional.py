"""Each eager function on simulated ranks against a function of the whole tensors, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from sp_compile import functional as F
from sp_compile.distributed.group import get_sequence_parallel_group, init_sequence_parallel
from sp_compile.errors import SequenceParallelError
from sp_compile.ops import sp_ops as ops
from sp_compile.tools.simulation import fake_world, simulate
from tests.test_blocks import Blocks
from tests.test_ops import Case, assert_same

D = 2
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8]
DTYPES += [torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]


@dataclass(frozen=True)
class Call:
    """A call, what it is on whole tensors, and what the gradient of that is multiplied by on P ranks."""

    name: str
    call: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    source: Blocks | None
    target: Blocks | None
    whole: Callable[[Tensor], Tensor] = lambda x: x
    factor: Callable[[int], float] = lambda parts: 1.0

    def expected(self, x: Tensor, parts: int, cotangent: Tensor | None = None) -> tuple[list[Tensor], ...]:
        case = Case(lambda x, rank, group: self.call(x), self.shape, self.source, self.target, self.whole)
        inputs, cotangents, outputs, grads = case.run(x, parts, cotangent)
        return inputs, cotangents, outputs, [grad * self.factor(parts) for grad in grads]


def calls(s: int, h: int) -> list[Call]:
    """Every function on `[B, s, h, D]`: to the heads, back, packed, one stream in and out."""
    shape, seq, head = (2, s, h, D), Blocks(1, (s,)), Blocks(2, (h,))

    def there(name: str, call: Callable[[Tensor], Any], wait: bool = False) -> Call:
        """A call that leaves the padding of the sequence where it was."""
        finish: Callable[[Any], Tensor] = (lambda pending: pending.wait()) if wait else (lambda out: out)
        return Call(name, lambda x: finish(call(x)).narrow(1, 0, s), shape, seq, head)

    def packed(restore_shape: bool) -> Callable[[Tensor], Tensor]:
        return lambda x: F.gather_seq_scatter_heads_qkv(
            x, seq_dim=-2, qkv_shape=[[1, s - 2], [2, 1]], restore_shape=restore_shape, heads=h
        )

    def outputs(scale_grad: bool) -> Callable[[Tensor], Tensor]:
        return lambda x: F.gather_outputs(
            x, gather_dim=-3, padding_dim=1, unpad_shape=torch.tensor([[1, s - 2], [2, 1]]), scale_grad=scale_grad
        )

    qkv, columns = (2, s, 3 * h * D), (h * D,)
    return [
        there("single_all_to_all", lambda x: F.single_all_to_all(x, 2, 1)),
        there("single_all_to_all, async", lambda x: F.single_all_to_all(x, -2, -3, async_op=True), wait=True),
        there("seq_all_to_all", lambda x: F.seq_all_to_all(x, 2, 1)),
        there("SeqAllToAll", lambda x: F.SeqAllToAll.apply(None, x, 2, 1)),
        there("SeqAllToAll, async", lambda x: F.SeqAllToAll.apply(None, x, 2, 1, True), wait=True),
        there("gather_seq_scatter_heads", lambda x: F.gather_seq_scatter_heads(x, -3, -2)),
        Call(
            "gather_seq_scatter_heads, unpadded",
            lambda x: F.gather_seq_scatter_heads(x, 1, 2, unpad_dim_size=s),
            shape,
            seq,
            head,
        ),
        Call(
            "gather_heads_scatter_seq",
            lambda x: F.gather_heads_scatter_seq(x, -2, 1, unpad_dim_size=h),
            shape,
            head,
            seq,
        ),
        Call("gather_seq_scatter_heads_qkv", packed(True), qkv, seq, Blocks(2, columns, (D,), 3)),
        Call(
            "gather_seq_scatter_heads_qkv, apart",
            packed(False),
            qkv,
            seq,
            Blocks(3, columns, (D,)),
            lambda x: x.unflatten(-1, (3, -1)),
        ),
        Call("slice_inputs", lambda x: F.slice_inputs(x, -3), shape, None, seq),
        Call(
            "slice_inputs / P",
            lambda x: F.slice_inputs(x, 1, scale_grad=True),
            shape,
            None,
            seq,
            factor=lambda p: 1 / p,
        ),
        Call("scatter_heads", lambda x: F.scatter_heads(x, 2), shape, None, head),
        Call(
            "scatter_heads / P",
            lambda x: F.scatter_heads(x, -2, grad_scale=True),
            shape,
            None,
            head,
            factor=lambda p: 1 / p,
        ),
        Call("gather_heads", lambda x: F.gather_heads(x, -2, unpad_dim_size=h), shape, head, None),
        Call(
            "gather_heads × P", lambda x: F.gather_heads(x, 2, True, unpad_dim_size=h), shape, head, None, factor=float
        ),
        Call("gather_outputs", outputs(scale_grad=False), shape, seq, None),
        Call("gather_outputs × P", outputs(scale_grad=True), shape, seq, None, factor=float),
    ]


SIZES = {"even": (12, 12), "uneven": (7, 5), "fewer heads than ranks": (5, 1)}


def strided(x: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def check(call: Call, parts: int) -> None:
    x = torch.randn(call.shape)
    inputs, cotangents, outputs, grads = call.expected(x, parts, torch.randn_like(call.whole(x)))
    with simulate(parts) as mode:
        local = mode.rank_map(lambda r: strided(inputs[r])).requires_grad_()
        found = call.call(local)
        found.backward(mode.rank_map(lambda r: strided(cotangents[r])))
        for r in range(parts):
            assert_same(found._local_tensors[r].detach(), outputs[r])
            torch.testing.assert_close(local.grad._local_tensors[r], grads[r])


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size: str, parts: int) -> None:
    for call in calls(*SIZES[size]):
        check(call, parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    for call in calls(7, 5):
        x = torch.randint(0, 2, call.shape).to(dtype)
        inputs, _, outputs, _ = call.expected(x, 3)
        with simulate(3) as mode:
            found = call.call(mode.rank_map(lambda r, inputs=inputs: inputs[r].clone()))
            for r in range(3):
                assert_same(found._local_tensors[r], outputs[r])


def repeated_rows(x: Tensor, gather_dim: int, scatter_dim: int, place: F._Place) -> Tensor:
    """Pads by a differentiable repetition, as many a hand-written all-to-all does."""
    rows = F.block_rows(x.shape[scatter_dim], 1, place.parts) * place.parts
    x = x.index_select(scatter_dim, torch.arange(rows).clamp(max=x.shape[scatter_dim] - 1))
    return right_all_to_all(x, gather_dim, scatter_dim, place)


def local_gradient(x: Tensor, dim: int, place: F._Place, factor: float) -> Tensor:
    """Slices, and backward gathers nothing."""
    rows = torch.ops.sp.positions(F._rank(x, place), *F._lengths(x, dim), place.group)
    return x.index_select(dim, rows)


right_all_to_all = F._all_to_all
WRONG: dict[str, tuple[Callable[..., Tensor], set[str]]] = {
    "_all_to_all": (repeated_rows, {"single_all_to_all", "seq_all_to_all", "gather_heads_scatter_seq"}),
    "_shard": (local_gradient, {"slice_inputs", "slice_inputs / P", "scatter_heads", "scatter_heads / P"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_control_a_wrong_gradient_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, expected = WRONG[name]
    monkeypatch.setattr(F, name, wrong)
    failed = set()
    for call in calls(7, 5):
        try:
            check(call, 3)
        except AssertionError:
            failed.add(call.name)
    assert failed >= expected and "gather_outputs" not in failed


def test_control_a_gradient_that_is_not_scaled_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops._ScaleGradient, "backward", staticmethod(lambda ctx, grad: (grad, None)))
    for call in calls(7, 5):
        if call.factor(3) != 1:
            with pytest.raises(AssertionError, match="not close"):
                check(call, 3)
    with pytest.raises(AssertionError, match="not close"):
        test_averaged_gradients_are_those_of_one_device(3)


def whole_model(x: Tensor, text: Tensor, weights: list[Tensor], sp: bool, scale: bool = True) -> Tensor:
    """Embedding, one joint attention of `s` sharded and `t` replicated tokens, head; 5 heads."""
    s, t, h = x.shape[0], text.shape[0], 5
    first, packed, last = weights
    x, text = linear(x, first), linear(text, first)
    x = F.slice_inputs(x, 0, scale_grad=scale) if sp else x
    x, text = linear(x, packed), linear(text, packed).unflatten(-1, (3, h, -1))
    if sp:
        x = F.gather_seq_scatter_heads_qkv(x, seq_dim=0, qkv_shape=[[s]], heads=h)
        text = F.scatter_heads(text, 2, grad_scale=scale)
    x = x.unflatten(-1, (3, text.shape[2], -1))
    q, k, v = torch.cat([x, text]).permute(1, 2, 0, 3)
    out = scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1)
    x, text = out.split([s, t])
    if sp:
        x = F.gather_heads_scatter_seq(x, 1, 0, unpad_dim_size=h)
        text = F.gather_heads(text, 1, grad_scale=scale, unpad_dim_size=h)
    x, text = linear(x.flatten(1), last).tanh(), linear(text.flatten(1), last)
    x = F.gather_outputs(x, gather_dim=0, padding_dim=0, unpad_shape=[[s]], scale_grad=scale) if sp else x
    return x.pow(2).mean() + (text * x[:t]).sum()


def leaves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (7, 4), (3, 4), (6, 4), (3 * 5 * 2, 6), (4, 5 * 2)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_averaged_gradients_are_those_of_one_device(parts: int) -> None:
    alone, scaled, plain = leaves(), leaves(), leaves()
    expected = whole_model(*alone[:2], alone[2:], sp=False)
    expected.backward()
    with simulate(parts):
        found = whole_model(*scaled[:2], scaled[2:], sp=True)
        found.backward()
        whole_model(*plain[:2], plain[2:], sp=True, scale=False).backward()
        for r in range(parts):
            torch.testing.assert_close(found._local_tensors[r], expected)
        for one, mine, unscaled in zip(alone, scaled, plain, strict=True):
            torch.testing.assert_close(torch.stack([*mine.grad._local_tensors.values()]).mean(0), one.grad)
            full = unscaled.grad._local_tensors
            # Unscaled: whole before the slice, parts to sum inside; `last` is used in both ways.
            if one.shape in ((7, 4), (3, 4), (6, 4)):
                assert all(torch.allclose(full[r], one.grad) for r in range(parts))
            elif one.shape == (30, 6):
                assert not torch.allclose(torch.stack([*full.values()]).mean(0), one.grad)


def test_backward_can_be_differentiated_again() -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return grad.pow(2).sum()

    x = torch.randn(5, 7, dtype=torch.float64)
    plain = x.clone().requires_grad_()
    loss(plain, plain.sin()).backward()
    with simulate(3):
        whole = x.clone().requires_grad_()
        y = F.gather_seq_scatter_heads(F.slice_inputs(whole, 0).sin(), 0, 1, unpad_dim_size=5)
        y = F.seq_all_to_all(y, 0, 1, async_op=True).wait().narrow(1, 0, 7)
        loss(whole, F.gather_outputs(y, gather_dim=0, padding_dim=0, unpad_shape=[[5]], scale_grad=False)).backward()
        for r in range(3):
            torch.testing.assert_close(whole.grad._local_tensors[r], plain.grad)


def test_a_pending_exchange_is_finished_once() -> None:
    with simulate(2) as mode:
        x = mode.rank_map(lambda r: torch.full((2, 4), float(r))).requires_grad_()
        pending = F.single_all_to_all(x, 1, 0, async_op=True)
        output, handle, layout = pending
        assert output.shape == (2, 2, 2) and layout == (0, 1) and handle is pending
        assert pending.wait() is handle.wait()
        assert pending.wait()._local_tensors[0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
        (pending.wait() * 2 + pending.wait()).sum().backward()
        assert x.grad._local_tensors[1].tolist() == [[3] * 4] * 2


def test_slices_without_padding_are_shorter_at_the_end() -> None:
    x, weight = torch.randn(2, 5), torch.randn(2, 5)
    with simulate(4) as mode:
        whole = x.clone().requires_grad_()
        part = F.slice_inputs(whole, 1, padding=False)
        for r, piece in enumerate([x[:, :2], x[:, 2:4], x[:, 4:], x[:, :0]]):
            assert_same(part._local_tensors[r].detach(), piece.contiguous())
        part.backward(mode.rank_map(lambda r: weight[:, 2 * r : 2 * r + 2].clone()))
        for r in range(4):
            assert_same(whole.grad._local_tensors[r], weight)


@pytest.mark.parametrize("world", [None, 1])
def test_identity_without_anybody_to_share_with(world: int | None) -> None:
    def check_identity() -> None:
        for call in calls(7, 5):
            x = torch.randn(call.shape, requires_grad=True)
            out = call.call(x)
            assert_same(out.detach(), call.whole(x).detach())
            assert torch.autograd.grad(out.sum(), x)[0].eq(1).all()
        x = torch.randn(3, 4)
        assert F.remove_sequence_parallel_padding(x, 0, 3) is x and F.slice_inputs(x, 0, False) is x

    if world is None:
        return check_identity()
    with fake_world(world):
        init_sequence_parallel()
        check_identity()


def test_padding_and_its_inverse() -> None:
    x = torch.randn(2, 5, 3, requires_grad=True)
    padded = F.pad_tensor(x, -2, 3, padding_value=7)
    assert padded.shape == (2, 8, 3) and padded[:, 5:].eq(7).all()
    back = F.unpad_tensor(padded, 1, 3)
    assert_same(back.detach(), x.detach().contiguous())
    assert torch.autograd.gradcheck(lambda x: F.unpad_tensor(F.pad_tensor(x, 1, 3), 1, 3) * x, x.double())
    assert F.pad_tensor(x, 0, 0) is x
    with fake_world(2):
        init_sequence_parallel()
        assert_same(F.remove_sequence_parallel_padding(padded, -2, 5).detach(), x.detach())
    for dtype in DTYPES:
        row = torch.ones(3, dtype=dtype)
        assert_same(F.unpad_tensor(F.pad_tensor(row, 0, 2), 0, 2), row)


def test_cache() -> None:
    cache = F.Cache()
    video, text = cache.namespace("video"), cache.namespace("text")
    assert [video("n", lambda: 1), video("n", lambda: 2), text("n", lambda: 3)] == [1, 1, 3]
    assert video.get("n") == 1 and cache.get("video.n") == 1 and cache.cache == {"video.n": 1, "text.n": 3}
    assert F.Cache(prefix="text.", cache=cache.cache).get("n") == 3
    with pytest.raises(KeyError, match=r"text\.m"):
        text.get("m")
    disabled = F.Cache(disable=True).namespace("a")
    assert [disabled("n", lambda: 1), disabled("n", lambda: 2)] == [1, 2] and disabled.cache == {}


class CountReads(TorchDispatchMode):
    """How often a tensor was read by the host."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_lengths_are_read_once_per_cache_key_and_nothing_else_is() -> None:
    lengths = torch.tensor([[1, 2, 2], [1, 1, 3]])
    with fake_world(2), CountReads() as count:
        init_sequence_parallel()
        for call in calls(7, 5)[:16]:  # the others are given lengths as a tensor
            call.call(torch.randn(call.expected(torch.randn(call.shape), 2)[0][0].shape))
        assert count.reads == 0
        cache = F.Cache()
        for stream in (cache.namespace("video"), cache.namespace("text")):
            for _ in range(3):
                qkv = F.gather_seq_scatter_heads_qkv(torch.randn(4, 12), seq_dim=0, qkv_shape=lengths, cache=stream)
                out = F.gather_outputs(qkv[:4], gather_dim=0, padding_dim=0, unpad_shape=lengths, cache=stream)
                assert len(qkv) == len(out) == stream.get("unpad_dim_size") == 7
        assert count.reads == 2


ERRORS: dict[str, Callable[[Tensor], Any]] = {
    r"shape \[4, 6, 8\] has no dimension seq_dim=3: give -3 to 2": lambda x: F.gather_seq_scatter_heads(x, 3, 1),
    r"has no dimension dim=-4: give": lambda x: F.slice_inputs(x, -4),
    r"has no dimension gather_dim=7": lambda x: F.gather_outputs(x, gather_dim=7),
    r"has no dimension padding_dim=7": lambda x: F.gather_outputs(x, gather_dim=0, padding_dim=7, unpad_shape=[[1]]),
    r"has no dimension dim=0: it has none": lambda x: F.pad_tensor(x.sum(), 0, 1),
    r"head_dim=1 and seq_dim=-2 are the same dimension .* must differ": lambda x: F.gather_heads_scatter_seq(x, 1, -2),
    r"scatter_dim=0 and gather_dim=-3 are the same": lambda x: F.single_all_to_all(x, 0, -3, async_op=True),
    r"seq_dim=2 and last_dim=-1 are the same": lambda x: F.gather_seq_scatter_heads_qkv(x, seq_dim=2),
    r"the last dimension of .* \[4, 6, 8\] holds q, k and v, so its size must be divisible by 3; it is 8": (
        lambda x: F.gather_seq_scatter_heads_qkv(x, seq_dim=1)
    ),
    r"holds q, k and v of 5 heads each, so its size must be divisible by 15; it is 18": (
        lambda x: F.gather_seq_scatter_heads_qkv(x.new_zeros(2, 18), seq_dim=0, heads=5)
    ),
    r"2 ranks cannot share the 3 columns of q evenly: pass heads=": (
        lambda x: F.gather_seq_scatter_heads_qkv(x.new_zeros(2, 9), seq_dim=0)
    ),
    r"on the device 'meta', but the group of 2 ranks moves tensors on .*cpu.*: move the tensor there": (
        lambda x: F.scatter_heads(x.to("meta"), 1)
    ),
    r"padding_dim says where padding is, and unpad_shape .*: give both": (
        lambda x: F.gather_outputs(x, gather_dim=0, padding_dim=0)
    ),
    r"dimension 0 of .* \[8, 6, 8\] cannot be unpadded to 9 rows: it has 8": (
        lambda x: F.gather_outputs(x, gather_dim=0, padding_dim=0, unpad_shape=[[3, 3]])
    ),
    r"cannot be unpadded to -1 rows": lambda x: F.unpad_tensor(x, 0, 5),
    r"padding_size=-1 is negative; unpad_tensor": lambda x: F.pad_tensor(x, 0, -1),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_was_met(message: str) -> None:
    with fake_world(2), pytest.raises(SequenceParallelError, match=message):
        init_sequence_parallel()
        ERRORS[message](torch.randn(4, 6, 8))


def compiled_model(*tensors: Tensor) -> Tensor:
    x, *rest = tensors
    x = F.seq_all_to_all(x, 1, 0, async_op=True).wait()[: x.shape[0]]
    x = F.gather_heads_scatter_seq(x, 1, 0)[: x.shape[0]]
    x = x.sum(0) + F.slice_inputs(tensors[0], 0, padding=False).sum(0)
    return whole_model(tensors[0], rest[0], rest[1:], sp=True) + x.sum()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_without_a_break(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(compiled_model, backend=counter, fullgraph=True)
    with fake_world(2):
        init_sequence_parallel()
        tensors = leaves()
        compiled(*tensors).backward()
        assert counter.frame_count == 1 and all(tensor.grad is not None for tensor in tensors)


def test_two_graphs_serve_all_lengths() -> None:
    """One with something to unpad, whose result is not contiguous, and one without."""

    def program(x: Tensor) -> Tensor:
        part = F.gather_seq_scatter_heads(F.slice_inputs(x, 0), 0, 1, unpad_dim_size=x.shape[0]).sin()
        part = F.gather_heads_scatter_seq(part, 1, 0, unpad_dim_size=x.shape[1])
        return F.gather_outputs(part, gather_dim=0, padding_dim=0, unpad_shape=[[x.shape[0]]])

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(program, backend=counter, fullgraph=True, dynamic=True)
    with fake_world(4):
        init_sequence_parallel()
        for rows, heads in ((33, 6), (32, 8), (35, 12), (5, 9), (1024, 7)):
            x = torch.randn(rows, heads, 3, requires_grad=True)
            compiled(x).sum().backward()
            assert x.grad is not None and x.grad.shape == x.shape
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", ["default", "process group", "mesh"])
def test_ranks_compile_the_same_text(kind: str) -> None:
    texts = set()
    for rank in range(2):
        backend = EagerAndRecordGraphs()
        with fake_world(2, rank):
            init_sequence_parallel()
            mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("sp",))
            group = {"default": None, "process group": get_sequence_parallel_group(), "mesh": mesh}[kind]

            def program(x: Tensor, group: F.Group = group) -> Tensor:
                x = F.slice_inputs(x, 0, group=group)
                return F.gather_heads(x * 2, 0, group=group) + F.gather_heads(x, 0, group=group)

            x = torch.randn(5, 3)
            out = torch.compile(program, backend=backend, fullgraph=True)(x)
            assert out.shape == (6, 3)
            texts.add(backend.graphs[0].code)
    assert len(texts) == 1 and texts.pop().count("torch.ops.sp.") == 3
