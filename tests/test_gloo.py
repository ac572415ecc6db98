"""Two real ranks over gloo, with Inductor: what simulated ranks cannot see."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sp_compile import get_sequence_parallel_rank, rewritten_graphs, sp_backend
from sp_compile.runtime.records import unsharded_graphs

from .equivalence import gradient_errors, known_graphs, rewritten_since
from .gloo_pool import GlooPool
from .models import MODELS, inputs_of, seeded
from .slow_transport import exchanged
from .test_passes import Block

pytestmark = pytest.mark.slow


def train(name: str, length: int, keywords: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """One step of a model beside the same model on one device: errors of loss, logits and gradients."""
    alone = seeded(name)
    model = copy.deepcopy(alone)
    inputs = {**inputs_of(name, length), **keywords}
    expected = alone(**inputs)
    expected.loss.backward()
    got = torch.compile(model, backend=partial(sp_backend, options=dict(options)))(**inputs)
    got.loss.backward()
    planned = "\n".join(str(graph) for graph in rewritten_graphs()[-1:])
    return {
        "loss": abs(float(expected.loss.detach() - got.loss.detach())),
        "logits": float((expected.logits - got.logits).detach().abs().max()),
        "gradients": max(gradient_errors(alone, model).values()),
        "planned": hashlib.sha256(planned.encode()).hexdigest(),
    }


@pytest.mark.parametrize("name", MODELS)
def test_models_train_with_inductor(gloo2: GlooPool, name: str) -> None:
    """With the default of a model, the KV cache among its outputs."""
    ranks = gloo2.run(train, name, 33, {}, {})
    for errors in ranks:
        assert errors["loss"] <= 2e-5 and errors["logits"] <= 2e-5 and errors["gradients"] <= 2e-4, errors
    assert ranks[0]["planned"] == ranks[1]["planned"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_models_train_without_a_cache(gloo2: GlooPool, name: str) -> None:
    for errors in gloo2.run(train, name, 32, {"use_cache": False}, {"inner_backend": "aot_eager"}):
        assert errors["loss"] <= 2e-5 and errors["logits"] <= 2e-5 and errors["gradients"] <= 2e-4, errors


class Shifted(nn.Module):
    """A loss on all tokens but the last, and rows that a slice cut off, which would divide by 0 as padding."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(3), nn.Linear(12, 5)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        y = self.block(x)
        loss = nn.functional.cross_entropy(self.head(y)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        kept = (y * (torch.arange(x.shape[1]) >= 3)[:, None])[:, 3:]
        return loss, (kept / (kept * kept).sum(-1, keepdim=True)).square().mean(1)


def with_shifts(inner: str) -> list[float]:
    """The largest error for each of several lengths through one dynamic graph."""
    alone = Shifted()
    model = copy.deepcopy(alone)
    compiled = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": inner}), dynamic=True)
    errors = []
    for length in (7, 12, 9):
        x, labels = torch.randn(2, length, 12), torch.randint(5, (2, length))
        outputs = []
        for module in (alone, compiled):
            module.zero_grad()
            loss, kept = module(x, labels)
            (loss + kept.sum()).backward()
            outputs.append(torch.cat([loss.view(1), kept.flatten()]).detach())
        error = float(((outputs[0] - outputs[1]) / outputs[0]).abs().max())
        errors.append(max(error, *gradient_errors(alone, model).values()))
    assert len(rewritten_graphs()) and not unsharded_graphs()
    return errors


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_rows_that_are_cut_off_through_one_dynamic_graph(gloo2: GlooPool, inner: str) -> None:
    for errors in gloo2.run(with_shifts, inner):
        assert max(errors) < 1e-4, errors


class Measured(nn.Module):
    """A table cut at a length that is read from a tensor, as DeBERTa's, and values scaled by one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.table = Block(3), nn.Parameter(torch.randn(20, 12))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.tensor(x.shape[1]).item()
        y = self.block(x) + self.table[20 - length : 20]
        result: Tensor = self.block(y * y.mean().item())
        return result


def with_a_length_read_from_a_tensor(inner: str) -> tuple[float, int]:
    alone, known = Measured(), known_graphs()
    model, x = copy.deepcopy(alone), torch.randn(1, 7, 12)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        got = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": inner}))(x)
    expected = alone(x)
    expected.square().sum().backward()
    got.square().sum().backward()
    error = float((got - expected).detach().abs().max())
    return max(error, *gradient_errors(alone, model).values()), len(rewritten_since(known))


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_length_read_from_a_tensor_does_not_end_the_graph(gloo2: GlooPool, inner: str) -> None:
    for error, graphs in gloo2.run(with_a_length_read_from_a_tensor, inner):
        assert error < 1e-4 and graphs == 1


def with_shards(inner: str) -> tuple[list[int], float, float]:
    """Outputs that stay sharded: the local rows, and gradients of the sum of the local losses."""
    alone = Block(3)
    model = copy.deepcopy(alone)
    x = torch.randn(1, 7, 12)
    whole = alone(x)
    whole.square().sum().backward()
    options = {"inner_backend": inner, "outputs": "shard"}
    local = torch.compile(model, backend=partial(sp_backend, options=options))(x)
    local.square().sum().backward()
    mine = whole.detach()[:, 4 * get_sequence_parallel_rank() :][:, :4]
    return list(local.shape), float((local - mine).detach().abs().max()), max(gradient_errors(alone, model).values())


def test_outputs_may_stay_sharded(gloo2: GlooPool) -> None:
    (first, *wrong0), (second, *wrong1) = gloo2.run(with_shards, "aot_eager")
    assert (first, second) == ([1, 4, 12], [1, 3, 12])
    assert max(*wrong0, *wrong1) < 1e-5


def by_name() -> float:
    model, x = Block(), torch.randn(1, 7, 12)
    out = torch.compile(model, backend="sp_compile", options={"inner_backend": "eager"})(x)
    return float((out - model(x)).detach().abs().max())


def test_the_registered_name(gloo2: GlooPool) -> None:
    assert max(gloo2.run(by_name)) < 1e-5


def test_the_slow_transport_tells_what_it_hid(gloo2: GlooPool) -> None:
    """Half of a transfer, all of it, or nothing, under work of that length."""
    for work, share in ((0.05, 0.5), (0.2, 1.0), (0.0, 0.0)):
        for hidden, seconds in gloo2.run(exchanged, work):
            assert abs(hidden - share) < 0.2 and seconds >= max(0.1, work)


class Gathered(nn.Module):
    """Two attentions whose K and V are gathered, 7 rows on 2 or 3 ranks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.kind = Block(4, 2, "flag"), Block(4, 1, "flag"), kind
        if kind == "frozen":
            for part in (self.first.k, self.first.v, self.second.v):
                part.requires_grad_(False)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "checkpointed":
            x = cast(Tensor, checkpoint(self.first, x, use_reentrant=False))
        else:
            x = self.first(x)
        out: Tensor = self.second(x)
        return out


def gathered(kind: str, inner: str, options: Mapping[str, Any]) -> tuple[float, float, dict[str, float]]:
    """The largest error of an output, of the input's gradient, and of each parameter's."""
    torch.manual_seed(0)
    alone, whole = Gathered(kind), torch.randn(1, 7, 12, requires_grad=True)
    model, x = copy.deepcopy(alone), whole.detach().clone().requires_grad_()
    got = torch.compile(model, backend=partial(sp_backend, options={**options, "inner_backend": inner}))(x)
    expected = alone(whole)
    for out in (expected, got):
        out.cos().sum().backward()
    assert whole.grad is not None and x.grad is not None
    errors = [float((a - b).detach().abs().max()) for a, b in ((expected, got), (whole.grad, x.grad))]
    return errors[0], errors[1], gradient_errors(alone, model)


def test_what_is_gathered_again_in_backward_is_right(gloo2: GlooPool, gloo3: GlooPool) -> None:
    """Lowered, so that backward really sends again; with a checkpoint of the user's own; with frozen K and V."""
    cases = [(kind, "all_gather_kv") for kind in ("plain", "checkpointed", "frozen")] + [("checkpointed", "ulysses")]
    for pool, (kind, strategy) in itertools.product((gloo2, gloo3), cases):
        for out, given, parameters in pool.run(gathered, kind, "aot_eager", {"attention": strategy}):
            assert max(out, given, *parameters.values()) < 1e-5, (kind, strategy)
    for out, given, parameters in gloo2.run(gathered, "checkpointed", "inductor", {"attention": "all_gather_kv"}):
        assert max(out, given, *parameters.values()) < 1e-5


class Neighbours(nn.Module):
    """A strided stem, and a causal convolution and a token shift in a checkpoint, 257 rows and then 129."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.taps = nn.Conv1d(3, 12, 3, 2, 1), nn.Conv1d(12, 12, 4, padding=3, groups=12)
        self.block, self.mix = Block(), nn.Parameter(torch.rand(12))

    def layer(self, x: Tensor) -> Tensor:
        x = x + self.taps(x.mT)[..., : x.shape[1]].mT.cos()
        before = nn.functional.pad(x, (0, 0, 1, -1))
        out: Tensor = self.block(x * self.mix + before * (1 - self.mix))
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.layer, self.stem(x).mT, use_reentrant=False)
        return out


def with_halos(inner: str) -> tuple[float, list[str]]:
    """The largest error of an output or gradient; and the ops of what was sent."""
    torch.manual_seed(0)
    alone, whole = Neighbours(), torch.randn(2, 3, 257, requires_grad=True)
    model, x = copy.deepcopy(alone), whole.detach().clone().requires_grad_()
    got = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": inner}))(x)
    expected = alone(whole)
    for out in (expected, got):
        out.cos().sum().backward()
    assert whole.grad is not None and x.grad is not None
    error = max(float((a - b).detach().abs().max()) for a, b in ((expected, got), (whole.grad, x.grad)))
    nodes = rewritten_graphs()[-1].rewritten.graph.nodes
    return max(error, *gradient_errors(alone, model).values()), [n.name for n in nodes if n.name.startswith("halo")]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_halos_and_shifts(gloo3: GlooPool, inner: str) -> None:
    for error, halos in gloo3.run(with_halos, inner):
        assert error < 1e-5 and len(halos) == 4, halos
