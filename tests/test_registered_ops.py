"""Ops of the user, with a rule and without one: packed attention, attention in other layouts, a scan.

Each is written as a user writes it, opaque to tracing and to autograd, and told of in one line.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from sp_compile import FallbackError, init_sequence_parallel, register_sharding_rule, rewritten_graphs, sp_backend
from sp_compile.errors import RuleError
from sp_compile.rules import rule_for
from sp_compile.rules.notation import own_dimension
from sp_compile.rules.op_call import OpCall
from sp_compile.tools.simulation import fake_world

from .equivalence import assert_equivalent, collectives, compared, run_simulated
from .programs import Parts, moved

ULYSSES = {"all_to_all": 4, "gather_output": 1}
LAYER = ["gather_seq_scatter_heads_qkv", "gather_heads_scatter_seq"]


Function = Callable[..., Any]


def opaque(name: str, forward: Function, backward: Function, arguments: str) -> torch._ops.OpOverload:
    """`sp_test::name`; `arguments` are tensors, of which those in capitals have a gradient."""
    trained = [at for at, argument in enumerate(arguments.split()) if argument.isupper()]
    schema = ", ".join(f"Tensor {argument.lower()}" for argument in arguments.split())
    op = torch.library.custom_op(f"sp_test::{name}", forward, mutates_args=(), schema=f"({schema}) -> Tensor")
    op.register_fake(lambda *args: torch.empty_like(args[0]))
    derivative = torch.library.custom_op(
        f"sp_test::{name}_backward", backward, mutates_args=(), schema=f"(Tensor grad, {schema}) -> Tensor[]"
    )
    derivative.register_fake(lambda grad, *args: [torch.empty_like(args[at]) for at in trained])

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = iter(derivative(grad, *ctx.saved_tensors))
        return tuple(next(found) if at in trained else None for at in range(len(arguments.split())))

    op.register_autograd(gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    overload: torch._ops.OpOverload = op._opoverload
    return overload


def probabilities(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf) if causal else scores).softmax(-1)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """`[.., H, S, D]`, KV heads grouped as the shapes say."""
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    return probabilities(q, k, causal) @ v


def attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> list[Tensor]:
    """Dao et al. 2022 (FlashAttention), appendix B.2."""
    groups = k.shape[-3]
    k, v = (x.repeat_interleave(q.shape[-3] // groups, -3) for x in (k, v))
    p = probabilities(q, k, causal)
    dp = grad @ v.mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    dk, dv = (x.unflatten(-3, (groups, -1)).sum(-3) for x in (ds.mT @ q, p.mT @ grad))
    return [ds @ k, dk, dv]


def heads_last(function: Function, **options: bool) -> Function:
    """The same on `[.., S, H, D]`."""

    def call(*args: Tensor) -> Any:
        made = function(*(x.transpose(-2, -3) for x in args), **options)
        return pytree.tree_map(lambda x: x.transpose(-2, -3).contiguous(), made)

    return call


def by_document(function: Function) -> Function:
    """The same on `[T, H, D]`, within each document; they begin where the last argument says."""

    def call(*args: Tensor) -> Any:
        bounds = itertools.pairwise(args[-1].tolist())
        made = [function(*(x[a:b] for x in args[:-1])) for a, b in bounds if a < b]
        return torch.cat(made) if isinstance(made[0], Tensor) else [torch.cat(each) for each in zip(*made, strict=True)]

    return call


def scan(x: Tensor, decay: Tensor) -> Tensor:
    """`h[s] = decay h[s - 1] + x[s]` of `[B, S, C]`."""
    states = [x[:, 0]]
    for row in x[:, 1:].unbind(1):
        states.append(decay * states[-1] + row)
    return torch.stack(states, 1)


def scan_backward(grad: Tensor, x: Tensor, decay: Tensor) -> list[Tensor]:
    dx = scan(grad.flip(1), decay).flip(1)
    return [dx, (dx[:, 1:] * scan(x, decay)[:, :-1]).sum((0, 1))]


def from_memory(function: Function, order: Sequence[int]) -> Function:
    """The same as a kernel that takes operands to lie densely, their dimensions in an order, and does not look."""

    def read(x: Tensor) -> Tensor:
        strides = torch.empty([x.shape[dim] for dim in order]).stride()
        return x.as_strided(x.shape, [strides[order.index(dim)] for dim in range(x.dim())], x.storage_offset())

    return lambda *args: function(*map(read, args))


PACKED = by_document(heads_last(attend)), by_document(heads_last(attend_backward))
CROSS = heads_last(attend, causal=False), heads_last(attend_backward, causal=False)

packed = opaque("packed_attention", *PACKED, "Q K V cu_seqlens")
packed_unknown = opaque("packed_attention_without_a_rule", *PACKED, "Q K V cu_seqlens")
packed_cut = opaque("packed_attention_cut", *PACKED, "Q K V cu_seqlens")
bshd = opaque("attention_bshd", heads_last(attend), heads_last(attend_backward), "Q K V")
bshd_cross = opaque("cross_attention_bshd", *CROSS, "Q K V")
bhsd = opaque("attention_bhsd", attend, attend_backward, "Q K V")
raw = {
    order: opaque(
        f"attention_from_memory_{''.join(map(str, order))}", from_memory(attend, order), attend_backward, "Q K V"
    )
    for order in [(0, 1, 2, 3), (0, 2, 1, 3)]
}
linear_scan = opaque("scan", scan, scan_backward, "X DECAY")

register_sharding_rule(packed, "t! (g r) d!, t! g d!, t! g v, n! -> t! (g r) v", attention="t")
register_sharding_rule(packed_cut, "t (g r) d!, t g d!, t g v, n! -> t (g r) v")
register_sharding_rule(bshd, "b t! (g r) d!, b t! g d!, b t! g v -> b t! (g r) v", attention="t")
register_sharding_rule(bshd_cross, "b q h d!, b k! h d!, b k! h v -> b q h v", attention="q k")
register_sharding_rule(bhsd, "b h t! d!, b h t! d!, b h t! v -> b h t! v", attention="t")
for each in raw.values():
    register_sharding_rule(each, "b h t! d!, b h t! d!, b h t! v -> b h t! v", attention="t")
register_sharding_rule(linear_scan, "b s! c, c -> b s! c")


def packed_block(m: Parts, x: Tensor, cu_seqlens: Tensor, op: Callable[..., Tensor] = packed) -> Tensor:
    """A transformer block on the tokens of all documents, `[T, C]`."""
    y = m.norm(x)
    q, k, v = (f(y).unflatten(-1, (-1, m.dim)) for f in (m.q, m.k, m.v))
    x = x + m.o(op(q, k, v, cu_seqlens).flatten(1))
    out: Tensor = x + m.down(F.gelu(m.up(m.norm2(x))))
    return out


def qkv(m: Parts, x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (f(x).unflatten(-1, (-1, m.dim)) for f in (m.q, m.k, m.v))
    return q, k, v


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


DOCUMENTS = {
    "even": (0, 4, 8, 12),
    "one longer than a share": (0, 2, 11, 13),
    "one": (0, 13),
    "empty ones": (0, 0, 5, 5, 5, 13, 13),
    "ends inside every block": (0, 3, 6, 10, 13),
}


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_packed_documents(documents: str, parts: int) -> None:
    """Three heads and 12 or 13 tokens: exchanged, never gathered."""
    bounds = DOCUMENTS[documents]
    inputs = tokens(bounds[-1], 12), torch.tensor(bounds)
    (graph,) = assert_equivalent(Parts(packed_block), inputs, parts=parts)
    assert not graph.plan.fallbacks and moved(graph) == ULYSSES
    assert collectives(graph)[:2] == LAYER
    assert [site.strategy for site in graph.plan.sites] == ["ulysses"]


@pytest.mark.parametrize(("kv", "parts"), [(2, 2), (2, 4), (3, 2), (6, 4)])
def test_packed_documents_with_grouped_heads(kv: int, parts: int) -> None:
    """Two groups on four ranks: each is sent the KV heads that its query heads read."""
    inputs = tokens(13, 24), torch.tensor((0, 2, 11, 13))
    (graph,) = assert_equivalent(Parts(packed_block, heads=6, kv=kv), inputs, parts=parts)
    assert not graph.plan.fallbacks and moved(graph) == ULYSSES


def test_two_packed_blocks_keep_the_tokens_sharded_in_between() -> None:
    def body(m: Parts, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return packed_block(m, packed_block(m, x, cu_seqlens), cu_seqlens)

    (graph,) = assert_equivalent(Parts(body), (tokens(13, 12), torch.tensor((0, 2, 11, 13))), parts=2)
    assert moved(graph) == {"all_to_all": 8, "gather_output": 1}


def test_one_graph_serves_all_numbers_of_tokens() -> None:
    inputs = tokens(17, 12), torch.tensor((0, 2, 11, 17))
    (graph,) = assert_equivalent(Parts(packed_block), inputs, parts=3, dynamic=True)
    assert moved(graph) == ULYSSES


def test_a_rule_that_forgets_what_must_be_whole_is_noticed() -> None:
    def body(m: Parts, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = packed_block(m, x, cu_seqlens)
        return packed_block(m, x, cu_seqlens, packed_cut)

    errors, (graph,) = compared(Parts(body), (tokens(13, 12), torch.tensor((0, 2, 11, 13))), parts=2)
    assert not graph.plan.fallbacks and errors["output 0"] > 1e-2 and errors["grad q.weight"] > 1e-2


def test_packed_documents_without_a_rule_are_gathered_and_reported() -> None:
    def body(m: Parts, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = packed_block(m, x, cu_seqlens)
        return packed_block(m, x, cu_seqlens, packed_unknown)

    inputs = tokens(13, 12), torch.tensor((0, 2, 11, 13))
    (graph,) = assert_equivalent(Parts(body), inputs, parts=2)
    assert [str(f.node.target) for f in graph.plan.fallbacks] == [str(packed_unknown)]
    assert graph.plan.fallbacks[0].reason == "it has no sharding rule"
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="register_sharding_rule") as raised:
        run_simulated(Parts(body), inputs, options={"strict": True})
    assert isinstance(raised.value.inner_exception, FallbackError)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_heads_behind_the_sequence(parts: int) -> None:
    def body(m: Parts, x: Tensor) -> Any:
        return m.o(bshd(*qkv(m, x)).flatten(2))

    (graph,) = assert_equivalent(Parts(body), (tokens(1, 13, 12),), parts=parts)
    assert not graph.plan.fallbacks and moved(graph) == ULYSSES and collectives(graph)[:2] == LAYER


@pytest.mark.parametrize(("kv", "parts"), [(2, 2), (2, 4), (1, 2)])
def test_grouped_heads_behind_the_sequence(kv: int, parts: int) -> None:
    def body(m: Parts, x: Tensor) -> Any:
        return m.o(bshd(*qkv(m, x)).flatten(2))

    assert_equivalent(Parts(body, heads=6, kv=kv), (tokens(1, 13, 24),), parts=parts)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_heads_before_the_sequence(parts: int) -> None:
    def body(m: Parts, x: Tensor) -> Any:
        q, k, v = (y.transpose(1, 2) for y in qkv(m, x))
        return m.o(m.join(bhsd(q, k, v)))

    (graph,) = assert_equivalent(Parts(body), (tokens(1, 13, 12),), parts=parts)
    assert not graph.plan.fallbacks and moved(graph) == ULYSSES and collectives(graph)[:2] == LAYER


@pytest.mark.parametrize("attention", ["auto", "replicate"])
@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("order", raw)
def test_operands_lie_in_memory_as_on_one_device(order: tuple[int, ...], parts: int, attention: str) -> None:
    def body(m: Parts, x: Tensor) -> Any:
        q, k, v = (y.transpose(1, 2) for y in qkv(m, x))
        if order == (0, 1, 2, 3):
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return m.o(m.join(raw[order](q, k, v)))

    dynamic = parts == 3 or None
    assert_equivalent(Parts(body), (tokens(2, 13, 12),), parts=parts, options={"attention": attention}, dynamic=dynamic)


@pytest.mark.parametrize("attention", ["auto", "all_gather_kv", "replicate"])
def test_the_strategies_of_sdpa(attention: str) -> None:
    """Queries pass through this op, so that keys and values may be gathered instead."""

    def body(m: Parts, x: Tensor, memory: Tensor) -> Any:
        q, _, _ = qkv(m, x)
        _, k, v = qkv(m, memory)
        return m.o(bshd_cross(q, k, v).flatten(2))

    inputs = tokens(1, 13, 12), tokens(1, 17, 12)
    (graph,) = assert_equivalent(Parts(body), inputs, options={"attention": attention})
    strategy = {"auto": "ulysses"}.get(attention, attention)
    assert [site.strategy for site in graph.plan.sites] == [strategy]


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_scan_borrows_the_channels(parts: int) -> None:
    def body(m: Parts, x: Tensor) -> Any:
        return linear_scan(m.block(x), m.w.sigmoid()) * m.w

    (graph,) = assert_equivalent(Parts(body), (tokens(1, 13, 12),), parts=parts)
    assert not graph.plan.fallbacks and moved(graph) == {"all_to_all": 6, "gather_output": 1}


@pytest.mark.parametrize(("kv", "parts"), [(6, 2), (6, 4), (3, 3), (2, 4), (1, 2)])
def test_the_packed_attention_of_torch(kv: int, parts: int) -> None:
    """On fakes, for its kernel is CUDA's."""

    def body(q: Tensor, k: Tensor, v: Tensor, cu_seq: Tensor) -> tuple[Tensor, Tensor]:
        aux = varlen.AuxRequest(lse=True)
        out, lse = varlen.varlen_attn(
            *(torch.tanh(x) for x in (q, k, v)), cu_seq, cu_seq, 13, 13, return_aux=aux, enable_gqa=kv != 6
        )
        return out * 2, lse * 2

    rewritten: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        rewritten.append(gm)
        return lambda *args: (torch.empty(13, 6, 4), torch.empty(6, 13))

    inputs = [torch.randn(13, heads, 4) for heads in (6, kv, kv)] + [torch.tensor([0, 5, 13], dtype=torch.int32)]
    torch._dynamo.reset()
    with fake_world(parts):
        init_sequence_parallel()
        torch.compile(body, backend=partial(sp_backend, options={"inner_backend": keep}))(*inputs)
    graph = rewritten_graphs()[-1]
    assert [site.strategy for site in graph.plan.sites] == ["ulysses"] and not graph.plan.fallbacks
    assert collectives(graph)[-3].startswith("all_to_all_packed")
    (node,) = rewritten[0].graph.find_nodes(op="call_function", target=torch.ops.torch_attn._varlen_attn.default)
    assert [value.shape for value in node.meta["val"][:2]] == [(13, -(-6 // parts), 4), (-(-6 // parts), 13)]


def test_roles_are_read_from_the_text() -> None:
    assert own_dimension("... h t! d!, ... h t! d! -> ... h t! d!", 0, "t") == -2
    assert own_dimension("t! ... d! -> t! ... d!", 0, "t") == 0
    assert own_dimension("(t w) d -> (t w) d", 0, "t") is None


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("q", "operand 1, the key, has no dimension 'q'"),
        ("q s", "operand 1, the key, has no dimension 's'"),
        ("q k v", "has to name the factors of the query and of the key length, 'q k'"),
        ("", "has to name the factors"),
    ],
)
def test_wrong_roles(attention: str, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        register_sharding_rule(packed_unknown, "q h d!, k! h d!, k! h v, n! -> q h v", attention=attention)
    call = OpCall.of(packed_unknown, [torch.randn(3, 2, 2)] * 3 + [torch.tensor([0, 3])], {}, torch.randn(3, 2, 2))
    assert rule_for(call) is None
