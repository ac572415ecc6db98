"""What runs on gathered values, for want of a rule or by `replicated_region()`: right, told, refused by `strict`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sp_compile import FallbackError, init_sequence_parallel, register_sharding_rule, replicated_region, sp_backend
from sp_compile.runtime.records import unsharded_graphs
from sp_compile.tools.simulation import fake_world

from .equivalence import assert_equivalent, collectives, known_graphs, rewritten_since, run_simulated, tokens
from .programs import Parts
from .test_passes import Block


class Scattered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return y.put(torch.zeros(1, dtype=torch.int64), y.new_ones(1)) + y


def test_what_has_no_rule_runs_on_gathered_values_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sp_compile"):
        graphs = assert_equivalent(Scattered().double(), (tokens(1, 7, 12),), parts=3)
    assert graphs[0].plan.fallbacks
    assert "runs on gathered values" in caplog.text
    assert "test_fallbacks.py" in caplog.text


def test_strict_refuses_with_the_line() -> None:
    with pytest.raises(Exception, match=r"runs on gathered values.*test_fallbacks\.py") as caught:
        run_simulated(Scattered().double(), (tokens(1, 7, 12),), parts=3, options={"strict": True})
    assert isinstance(caught.value.__cause__ or caught.value, FallbackError) or "FallbackError" in str(caught.value)


def frozen_weight_written(m: Parts, x: Tensor) -> Any:
    with torch.no_grad():
        m.w.clamp_(0)
    return m.block(x) * m.w


def as_many_as_are_positive(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return y[y > 0].sum()


def looked_up_by_frequency(m: Parts, x: Tensor) -> Any:
    ids = m.block(x).argmax(-1)
    return F.embedding(ids, m.table.weight, scale_grad_by_freq=True)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            frozen_weight_written,
            r"writes, unseen by autograd,.*: m\.w\.clamp_\(0\)\); without strict=True this graph runs",
        ),
        (
            as_many_as_are_positive,
            r"a size is read from a tensor \(.*: return y\[y > 0\]\.sum\(\)\); opt it out with replicated_region",
        ),
        (
            looked_up_by_frequency,
            r"its rule is not for such arguments or sizes \(.*: return F\.embedding.*\); opt it out with replicated",
        ),
    ],
)
def test_strict_refuses_with_the_reason_the_line_and_the_remedy(body: Callable[..., Any], said: str) -> None:
    read = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
    with read, pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as raised:
        run_simulated(Parts(body), (tokens(1, 13, 12),), options={"strict": True})
    assert isinstance(raised.value.inner_exception, FallbackError)
    message = str(raised.value.inner_exception)
    assert re.search(rf"test_fallbacks\.py:\d+ in {body.__name__}", message) and re.search(said, message), message
    assert "without strict=True" in message and "register_sharding_rule" not in message


@pytest.mark.parametrize("body", [as_many_as_are_positive, looked_up_by_frequency])
def test_what_strict_refuses_may_be_opted_out(body: Callable[..., Any]) -> None:
    def opted_out(m: Parts, x: Tensor) -> Any:
        y = m.block(x)
        with replicated_region():
            z = body(m, y)
        return z, m.block(y)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (graph,) = assert_equivalent(Parts(opted_out), (tokens(1, 13, 12),), parts=3, options={"strict": True})
    assert [site.strategy for site in graph.plan.sites][-1] == "ulysses" and not graph.plan.fallbacks


def test_a_registered_rule_is_used() -> None:
    @torch.library.custom_op("sp_test::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    double.register_fake(lambda x: torch.empty_like(x))
    register_sharding_rule(torch.ops.sp_test.double, "... -> ...")

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return double(self.block(x).detach())

    _, (graph,) = run_simulated(Custom().double(), (tokens(1, 7, 12),), parts=2)
    assert not graph.plan.fallbacks


# Opted out


class Tripled(torch.autograd.Function):
    """Not pointwise: it would shard."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin() + x.mean(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * 3


class OptedOut(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body, self.block, self.inner = body, Block(3), Block(3)
        self.scale = nn.Parameter(torch.randn(12))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        return self.block(self.body(self, self.block(x))) * self.scale


def region_plain(m: Any, y: Tensor) -> Tensor:
    with replicated_region():
        return y.sort(1).values * m.scale


@replicated_region()
def region_decorator(m: Any, y: Tensor) -> Tensor:
    with torch.no_grad():
        deviation = y.std(1, keepdim=True)
    return y.cumsum(1) / deviation


def region_around_attention(m: Any, y: Tensor) -> Tensor:
    with replicated_region():
        y = m.inner(y)
        m.mean.add_(y.detach().mean())
    return y + m.mean


def region_nested(m: Any, y: Tensor) -> Tensor:
    with replicated_region():
        with replicated_region():
            y = y.sort(1).values
        return Tripled.apply(y)


def region_in_checkpoint(m: Any, y: Tensor) -> Any:
    return checkpoint(lambda t: region_plain(m, t) * m.scale, y, use_reentrant=False)


def region_around_checkpoint(m: Any, y: Tensor) -> Any:
    with replicated_region():
        return checkpoint(lambda t: t.sort(1).values * m.scale, y, use_reentrant=False)


def region_writes_to_a_view(m: Any, y: Tensor) -> Tensor:
    y = y.clone()
    with replicated_region():
        v = y.view(1, 7, 3, 4)
        v[:, 2:5, 1] *= 2
    v.transpose(1, 2)[:, 0].add_(m.scale[:4])
    return y


REGIONS = [
    region_plain,
    region_decorator,
    region_around_attention,
    region_nested,
    region_in_checkpoint,
    region_around_checkpoint,
    region_writes_to_a_view,
]


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("body", REGIONS)
def test_a_replicated_region_runs_whole_and_the_rest_shards(body: Callable[..., Any], dynamic: bool | None) -> None:
    options = {"strict": body is not region_writes_to_a_view}
    module = OptedOut(body).double()
    (graph,) = assert_equivalent(module, (tokens(1, 7, 12),), parts=3, options=options, dynamic=dynamic)
    assert [site.strategy for site in graph.plan.sites] == ["ulysses", "ulysses"]
    assert any(name.startswith("all_gather") for name in collectives(graph))


def test_only_the_region_is_opted_out() -> None:
    def beside(m: Any, y: Tensor) -> Tensor:
        index = torch.zeros(1, dtype=torch.int64)
        with replicated_region():
            z = y.put(index, y.new_ones(1))
        return y.put(index, y.new_zeros(1)) + z

    with pytest.raises(Exception, match=r"in beside: return y\.put.*replicated_region\(\)"):
        run_simulated(OptedOut(beside).double(), (tokens(1, 7, 12),), parts=3, options={"strict": True})


def test_an_opaque_part_is_refused_or_runs_whole() -> None:
    module = OptedOut(lambda m, y: Tripled.apply(y)).double()
    (graph,) = assert_equivalent(module, (tokens(1, 7, 12),), parts=3)
    assert [str(fallback.node) for fallback in graph.plan.fallbacks] == ["autograd_function_apply_0"]
    assert [site.strategy for site in graph.plan.sites] == ["ulysses", "ulysses"]
    with pytest.raises(Exception, match=r"autograd_function_apply_0 runs on gathered.*; opt it out with"):
        run_simulated(module, (tokens(1, 7, 12),), parts=3, options={"strict": True})


@pytest.mark.parametrize(
    ("shape", "asked", "said"),
    [
        (
            (1, 3, 1, 4),
            "ulysses",
            "attention runs by 'replicate', not by 'ulysses' as asked for: 1 rows of queries are",
        ),
        ((13, 4), "ulysses", ""),
        ((1, 3, 13, 4), "ulysses", ""),
        ((1, 3, 13, 4), "auto", ""),
    ],
)
def test_a_strategy_that_cannot_be_had_is_told(
    shape: tuple[int, ...], asked: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "sp_compile"):
        assert_equivalent(
            Heads(), [tokens(*shape) for _ in "qkv"], parts=2, options={"attention": asked}, must_shard=not said
        )
    assert (said in caplog.text) if said else not caplog.text


class Heads(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What we have said, and not torch."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("sp_compile")]


@contextmanager
def two_ranks() -> Iterator[Callable[[Any], Any]]:
    """What compiles for one rank of two, which moves nothing."""
    with fake_world(2):
        torch._dynamo.reset()
        init_sequence_parallel()
        yield partial(torch.compile, backend=partial(sp_backend, options={"inner_backend": "eager"}))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Muon])
def test_nothing_is_told_of_an_optimizer(kind: type[torch.optim.Optimizer], caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(12, 12, bias=False)
    model(torch.randn(3, 12)).sum().backward()
    optimizer = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    before, known = model.weight.detach().clone(), known_graphs()
    with caplog.at_level(logging.WARNING, "sp_compile"), two_ranks() as compiled:
        compiled(optimizer.step)()
    assert not told(caplog) and not rewritten_since(known) and not torch.equal(before, model.weight)


def test_a_backward_that_is_compiled_by_itself_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """Its values are the rows of a rank: cut once more they would be others'."""
    known = known_graphs()
    caplog.set_level(logging.WARNING, "sp_compile")
    with two_ranks() as compiled, torch._dynamo.compiled_autograd._enable(compiled):
        compiled(Block())(torch.randn(1, 7, 12)).cumsum(1).sum().backward()
    assert len(rewritten_since(known)) == 1 and not told(caplog)
    assert {graph.reason[:18] for graph in unsharded_graphs() if graph.name not in known} == {"it is the backward"}


def test_ranks_without_a_group_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Once; and strictly not at all."""
    with fake_world(2), caplog.at_level(logging.WARNING, "sp_compile"):
        for _ in range(2):
            torch._dynamo.reset()
            torch.compile(Block(), backend=partial(sp_backend, options={"inner_backend": "eager"}))(
                torch.randn(1, 7, 12)
            )
        assert caplog.text.count("there are 2 ranks and no SP group, so that each of them does all the work") == 1
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"2 ranks and no SP group.*init_sequence_parallel"):
            torch.compile(Block(), backend=partial(sp_backend, options={"strict": True}))(torch.randn(1, 7, 12))
    torch._dynamo.reset()
