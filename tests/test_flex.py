"""`flex_attention`: exchanged by heads, its mods told the global heads; values and all gradients on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from sp_compile import FallbackError, rewritten_graphs, sp_backend
from sp_compile.tools.simulation import simulate

from .equivalence import assert_equivalent, collectives, differences, known_graphs, rewritten_since, run_simulated, step
from .gloo_pool import GlooPool
from .programs import Parts, moved

ULYSSES = {"all_to_all": 4, "gather_output": 1}
LAYER = ["gather_seq_scatter_heads_qkv", "gather_heads_scatter_seq"]
Mod = Callable[..., Any]


@pytest.fixture(autouse=True)
def gradients_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses gradients on CPU for want of a kernel in Inductor; the eager one has them."""
    monkeypatch.setattr(flex, "_validate_device", lambda *args: None)


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def attend(m: Parts, x: Tensor, memory: Tensor | None = None, **options: Any) -> Any:
    memory = x if memory is None else memory
    q, k, v = m.split(m.q(x)), m.split(m.k(memory), m.kv), m.split(m.v(memory), m.kv)
    out = flex_attention(q, k, v, enable_gqa=m.kv != m.heads, **options)
    if isinstance(out, tuple):
        return m.o(m.join(out[0])), out[1]
    return m.o(m.join(out))


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def mask_of(
    mod: Mod, queries: int = 13, keys: int = 13, heads: int | None = None, batch: int | None = None
) -> BlockMask:
    """Blocks of four rows, so that there are full, partial and empty ones."""
    return create_block_mask(mod, batch, heads, queries, keys, device="cpu", BLOCK_SIZE=4)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_without_mods(parts: int) -> None:
    (graph,) = assert_equivalent(Parts(attend), (tokens(1, 13, 12),), parts=parts)
    assert not graph.plan.fallbacks and moved(graph) == ULYSSES and collectives(graph)[:2] == LAYER
    assert [site.strategy for site in graph.plan.sites] == ["ulysses"]


MASKS: dict[str, Mod] = {
    "causal": causal,
    "window": lambda b, h, i, j: (i >= j) & (i - j < 4),
    "a window per head": lambda b, h, i, j: (i - j).abs() <= 2 * h,
    "nothing for the last head": lambda b, h, i, j: (i >= j) & (h < 2),
}


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_from_outside(name: str, parts: int) -> None:
    """A block mask with heads is cut along them."""
    heads = 3 if "head" in name else None

    def body(m: Parts, x: Tensor, mask: BlockMask) -> Any:
        return attend(m, x, block_mask=mask)

    (graph,) = assert_equivalent(Parts(body), (tokens(1, 13, 12), mask_of(MASKS[name], heads=heads)), parts=parts)
    assert not graph.plan.fallbacks and moved(graph) == ULYSSES
    cut = [node for node in graph.rewritten.graph.nodes if node.target is torch.ops.sp.shard.default]
    assert len(cut) == (9 if heads else 1)  # x, and what the mask is made of


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_documents(parts: int) -> None:
    documents = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2])

    def body(m: Parts, x: Tensor, mask: BlockMask) -> Any:
        return attend(m, x, block_mask=mask)

    mask = mask_of(lambda b, h, i, j: (documents[i] == documents[j]) & (i >= j))
    (graph,) = assert_equivalent(Parts(body), (tokens(1, 13, 12), mask), parts=parts)
    assert not graph.plan.fallbacks and moved(graph) == ULYSSES


@pytest.mark.parametrize("parts", [2, 3])
def test_a_mask_made_in_the_model(parts: int) -> None:
    def body(m: Parts, x: Tensor, documents: Tensor) -> Any:
        mask = mask_of(lambda b, h, i, j: (documents[i] == documents[j]) & (i >= j))
        return attend(m, x, block_mask=mask)

    inputs = tokens(1, 13, 12), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2])
    (graph,) = assert_equivalent(Parts(body), inputs, parts=parts)
    assert moved(graph) == ULYSSES and not graph.plan.fallbacks


SCORES: dict[str, Callable[[Parts, Tensor], Mod]] = {
    "softcap": lambda m, x: lambda score, b, h, i, j: 5 * torch.tanh(score / 5),
    "alibi of the head": lambda m, x: lambda score, b, h, i, j: score - (i - j).abs() * 2.0 ** -(h + 1),
    "alibi parameter": lambda m, x: lambda score, b, h, i, j: score + m.bias[h] * (i - j).abs(),
    "alibi buffer": lambda m, x: _alibi(m.bias.detach()),
    "one head unlike the rest": lambda m, x: lambda score, b, h, i, j: torch.where(h == 2, score * 2, score - j),
    "a table of all positions": lambda m, x: lambda score, b, h, i, j: score + m.rel.weight[i, h] * m.rel.weight[j, h],
    "scaled by a parameter": lambda m, x: lambda score, b, h, i, j: score * m.bias[0],
    "the batch too": lambda m, x: lambda score, b, h, i, j: score * (b + 1) + h,
    "of the tokens themselves": lambda m, x: _by_tokens(x),
}


def _alibi(slopes: Tensor) -> Mod:
    return lambda score, b, h, i, j: score + slopes[h] * (i - j).abs()


def _by_tokens(x: Tensor) -> Mod:
    weights = x.sum(-1).tanh()
    return lambda score, b, h, i, j: score + weights[b, j]


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("name", SCORES)
def test_score_mods(name: str, parts: int) -> None:
    """Three heads on two ranks: the second holds head 2, and once more as padding."""

    def body(m: Parts, x: Tensor) -> Any:
        return attend(m, x, score_mod=SCORES[name](m, x))

    (graph,) = assert_equivalent(Parts(body), (tokens(1, 13, 12),), parts=parts)
    assert [site.strategy for site in graph.plan.sites] == ["ulysses"] and not graph.plan.fallbacks


def test_without_the_global_head_the_answer_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sp_compile.rules.aten.flex._of_rank", lambda rank, index, **_: index + 0)

    def body(m: Parts, x: Tensor) -> Any:
        return attend(m, x, score_mod=SCORES["alibi parameter"](m, x))

    with pytest.raises(AssertionError, match=r"output 0.*grad bias"):
        assert_equivalent(Parts(body), (tokens(1, 13, 12),), parts=2)


@pytest.mark.parametrize("parts", [2, 4])
def test_the_global_batch_entry_where_the_batch_is_exchanged(parts: int) -> None:
    """Four entries and three heads: the batch falls into equal blocks."""

    def body(m: Parts, x: Tensor, mask: BlockMask) -> Any:
        return attend(m, x, score_mod=SCORES["the batch too"](m, x), block_mask=mask)

    mask = mask_of(lambda b, h, i, j: (i - j).abs() <= b + h, heads=3, batch=4)
    (graph,) = assert_equivalent(Parts(body), (tokens(4, 13, 12), mask), parts=parts)
    assert moved(graph) == ULYSSES


def test_the_batch_of_frames_that_are_sharded() -> None:
    """Attention over frames, then within each, `(b t) h s d` with one head: the batch is cut in two runs of frames."""

    def body(m: Parts, x: Tensor) -> Any:
        b, t, s, _ = x.shape
        y = m.block(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (b, s)).transpose(1, 2).flatten(0, 1)
        out = attend(m, y, score_mod=lambda score, frame, h, i, j: score * (frame % t + 1) + h)
        return out.unflatten(0, (b, t))

    (graph,) = assert_equivalent(Parts(body, heads=1, dim=4), (tokens(2, 11, 3, 4),), parts=2)
    assert moved(graph) == ULYSSES and "sp.positions" in str(graph)


@pytest.mark.parametrize(("kv", "parts"), [(2, 2), (2, 3), (2, 4), (3, 2), (1, 2), (1, 4)])
def test_grouped_heads(kv: int, parts: int) -> None:
    def body(m: Parts, x: Tensor, mask: BlockMask) -> Any:
        return attend(m, x, score_mod=SCORES["alibi parameter"](m, x), block_mask=mask)

    inputs = tokens(1, 13, 24), mask_of(MASKS["a window per head"], heads=6)
    (graph,) = assert_equivalent(Parts(body, heads=6, kv=kv), inputs, parts=parts)
    assert [site.strategy for site in graph.plan.sites] == ["ulysses"]
    if kv > 1:
        assert moved(graph) == ULYSSES and not graph.plan.fallbacks


@pytest.mark.parametrize("parts", [2, 3])
def test_statistics_of_the_softmax_go_home(parts: int) -> None:
    def body(m: Parts, x: Tensor) -> Any:
        out, aux = attend(m, x, score_mod=SCORES["alibi parameter"](m, x), return_aux=AuxRequest(lse=True))
        return out, aux.lse.sum((1, 2)), aux.lse

    x = torch.randn(
        1, 13, 12, requires_grad=True
    )  # the statistics of doubles are doubles, though torch's fakes are not
    (graph,) = assert_equivalent(Parts(body).float(), (x,), parts=parts, tolerance=1e-5)
    assert moved(graph) == {"all_to_all": 5, "all_reduce": 1, "gather_output": 2}


@pytest.mark.parametrize("parts", [2, 3])
def test_cross_attention(parts: int) -> None:
    def body(m: Parts, x: Tensor, memory: Tensor, mask: BlockMask) -> Any:
        return attend(m, m.block(x), memory, block_mask=mask)

    mask = mask_of(lambda b, h, i, j: (i + j) % 3 != h, keys=7, heads=3)
    assert_equivalent(Parts(body), (tokens(1, 13, 12), tokens(1, 7, 12), mask), parts=parts)


def test_one_head_runs_on_gathered_values_and_says_so() -> None:
    """The head dimension of the values is not cut: the statistics lack it, and would be counted P times."""

    def body(m: Parts, x: Tensor) -> Any:
        q, k, v = (f(x)[:, None] for f in (m.q, m.k, m.v))
        out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
        return m.o(out[:, 0]), aux.lse

    (graph,) = assert_equivalent(Parts(body), (tokens(1, 13, 12),))
    assert [site.strategy for site in graph.plan.sites] == ["replicate"]
    assert [fallback.reason for fallback in graph.plan.fallbacks] == [
        "it needs a sharded dimension whole or cut in another way"
    ]
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as raised:
        run_simulated(Parts(body), (tokens(1, 13, 12),), options={"strict": True})
    assert isinstance(raised.value.inner_exception, FallbackError)


@pytest.mark.parametrize("attention", ["all_gather_kv", "replicate"])
def test_other_strategies(attention: str) -> None:
    """The queries have to be whole, so that keys and values alone are not gathered."""
    (graph,) = assert_equivalent(Parts(attend), (tokens(1, 13, 12),), options={"attention": attention})
    assert [site.strategy for site in graph.plan.sites] == [{"all_gather_kv": "ulysses"}.get(attention, attention)]


def test_two_sites_share_a_mask() -> None:
    def body(m: Parts, x: Tensor, mask: BlockMask) -> Any:
        alibi = SCORES["alibi parameter"](m, x)
        x = m.block(x) + attend(m, x, score_mod=alibi, block_mask=mask)
        return attend(m, x, score_mod=SCORES["alibi of the head"](m, x), block_mask=mask)

    inputs = tokens(1, 13, 12), mask_of(MASKS["a window per head"], heads=3)
    (graph,) = assert_equivalent(Parts(body), inputs, parts=2)
    assert moved(graph) == {"all_to_all": 12, "gather_output": 1}


def test_checkpointed() -> None:
    """Against the same without a checkpoint: eagerly torch gives a captured parameter another gradient inside one."""

    def body(m: Parts, x: Tensor, recompute: bool) -> Any:
        inner = partial(attend, m, score_mod=SCORES["alibi parameter"](m, x))
        x = m.block(x)
        return checkpoint(inner, x, use_reentrant=False) if recompute else inner(x)

    module, x = Parts(body), tokens(1, 13, 12)
    got, (graph,) = run_simulated(module, (x, True), parts=2)
    assert max(differences(step(module, module, (x, False), {}), got, 2).values()) < 1e-9
    assert moved(graph) == {"all_to_all": 8, "gather_output": 1}


def test_under_autocast_and_no_grad() -> None:
    def body(m: Parts, x: Tensor) -> Any:
        with torch.no_grad():
            y = attend(m, x, score_mod=SCORES["alibi parameter"](m, x))
        with torch.autocast("cpu", torch.bfloat16):
            z = attend(m, x, score_mod=SCORES["alibi parameter"](m, x))
        return y * m.w, z

    assert_equivalent(Parts(body).float(), (torch.randn(1, 13, 12),), parts=2, tolerance=2e-2)


def test_one_graph_serves_all_lengths() -> None:
    def body(m: Parts, x: Tensor) -> Any:
        return attend(m, x, score_mod=_alibi(m.bias / x.shape[1]))

    alone, module = Parts(body), Parts(body)
    module.load_state_dict(alone.state_dict())
    known = known_graphs()
    inputs = [tokens(1, length, 12) for length in (13, 7, 16, 5)]
    expected = [step(alone, alone, [x], {}) for x in inputs]
    with simulate(2):
        compiled = torch.compile(module, backend=partial(sp_backend, options={"inner_backend": "eager"}), dynamic=True)
        for x, alike in zip(inputs, expected, strict=True):
            assert max(differences(alike, step(compiled, module, [x], {}), 2).values()) < 1e-9, x.shape
    assert len(rewritten_since(known)) == 1


def on_gloo(inner: str, name: str, grad: bool) -> dict[str, float]:
    flex._validate_device = lambda *args: None

    def body(m: Parts, x: Tensor, mask: BlockMask) -> Any:
        return attend(m, x, score_mod=SCORES[name](m, x), block_mask=mask)

    alone, mask = Parts(body, heads=3, dim=16), mask_of(MASKS["a window per head"], heads=3)
    alone = (alone if grad else alone.float()).requires_grad_(grad)
    module = copy.deepcopy(alone)
    x = torch.randn(1, 13, 48, dtype=torch.float64 if grad else torch.float32, requires_grad=grad)
    compiled = torch.compile(module, backend=partial(sp_backend, options={"inner_backend": inner}))
    errors = differences(step(alone, alone, [x, mask], {}), step(compiled, module, [x, mask], {}), 1)
    assert moved(rewritten_graphs()[-1]) == ULYSSES
    return errors


@pytest.mark.slow
@pytest.mark.parametrize(("inner", "name"), [("eager", "alibi parameter"), ("aot_eager", "alibi of the head")])
def test_gradients_on_real_ranks(gloo2: GlooPool, inner: str, name: str) -> None:
    """Through AOTAutograd torch has no gradient of a captured value that is no input, on CPU."""
    for errors in gloo2.run(on_gloo, inner, name, True):
        assert max(errors.values()) < 1e-9, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alibi parameter", "alibi of the head"])
def test_inductor_on_real_ranks(gloo2: GlooPool, name: str) -> None:
    """Forward alone: Inductor has no backward of it on CPU."""
    for errors in gloo2.run(on_gloo, "inductor", name, False):
        assert max(errors.values()) < 1e-5, errors
