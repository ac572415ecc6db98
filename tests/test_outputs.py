"""Outputs that stay sharded: as plain rows, as DTensors, and output by output."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from sp_compile import explain, get_sequence_parallel_group, rewritten_graphs, sp_backend
from sp_compile.config import Outputs
from sp_compile.ops.sp_ops import scale_gradient
from sp_compile.runtime import outputs as outputs_module
from sp_compile.tools.comparison import relative_error
from sp_compile.tools.simulation import on_rank, simulate

from .gloo_pool import GlooPool
from .models import inputs_of, llama
from .test_passes import Block


class Head(nn.Module):
    """A loss and logits, as of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(3), nn.Linear(12, 31)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.block(x))
        loss = logits.logsumexp(-1).mean()
        return loss, logits


class Joint(nn.Module):
    """Two streams end to end: rows that lie on the ranks as no DTensor has them."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(torch.cat([x, x.sin()], 1)) * 2
        return out


class Gated(nn.Module):
    """Running sums, that run on shards of the channels."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (x.sin().cumsum(1) * x).cumsum(1)
        return out


class Recurrence(nn.Module):
    """A scan over the channels of single rows, through which nobody follows the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.decay = nn.LayerNorm(12), nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x)
        state, states = torch.zeros_like(rows[:, 0]), []
        for at in range(x.shape[1]):
            state = torch.tanh(state * self.decay + rows[:, at])
            states.append(state)
        return torch.stack(states, 1)


class Views(nn.Module):
    """An output and a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.block(x) * 2
        return h, h.view(-1, 12)


def tokens(length: int = 7) -> Tensor:
    return torch.randn(1, length, 12, dtype=torch.double, generator=torch.Generator().manual_seed(length))


def compiled(model: nn.Module, outputs: Outputs, inner: str = "eager", **keywords: Any) -> Callable[..., Any]:
    dynamic = keywords.pop("dynamic", None)
    options = {"inner_backend": inner, "outputs": outputs, **keywords}
    return torch.compile(model, backend=partial(sp_backend, options=options), dynamic=dynamic)


def whole_then_loss(out: Tensor) -> Tensor:
    return (out.full_tensor() if isinstance(out, DTensor) else out).pow(2).sum()


def mean_of_dtensor(out: Tensor) -> Tensor:
    return out.pow(2).mean()


def worst_error(
    loss_of: Callable[[Tensor], Tensor], parts: int, model: nn.Module | None = None, lengths: tuple[int, ...] = (7,)
) -> float:
    """Of the loss of a DTensor, of its `full_tensor()` and of all gradients, over the ranks."""
    alone = (model or Block(3)).double()
    errors, inputs = [], [tokens(length) for length in lengths]
    with simulate(parts):
        ours = copy.deepcopy(alone)
        call = compiled(ours, "dtensor", dynamic=True if len(lengths) > 1 else None)
        for x in inputs:
            ours.zero_grad()
            out = call(x)
            assert isinstance(out, DTensor) and out.placements == (Shard(1),) and out.shape == x.shape
            loss = loss_of(out)
            loss.backward()
            loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
            expected = alone(x)
            wanted = loss_of(expected)
            gradients = torch.autograd.grad(wanted, list(alone.parameters()))
            for rank in range(parts):
                rows = torch.chunk(expected, parts, 1)
                local = on_rank(out.to_local(), rank).detach()
                assert local.shape[1] == (rows[rank].shape[1] if rank < len(rows) else 0)
                errors.append(relative_error(expected.detach(), on_rank(out.full_tensor(), rank).detach()))
                errors.append(relative_error(wanted.detach(), on_rank(loss, rank).detach()))
                pairs = zip(gradients, ours.parameters(), strict=True)
                errors += [relative_error(g, on_rank(p.grad, rank), 1e-2) for g, p in pairs]
    return max(errors)


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("loss_of", [whole_then_loss, mean_of_dtensor])
def test_a_dtensor_has_the_values_and_gradients_of_one_device(loss_of: Callable[[Tensor], Tensor], parts: int) -> None:
    assert worst_error(loss_of, parts) < 1e-12


@pytest.mark.parametrize("model", [Gated(), Recurrence()])
def test_what_runs_on_other_shards_leaves_as_rows_or_whole(model: nn.Module) -> None:
    """A rank that takes "shard" has its rows, never some channels."""
    x = tokens(9)
    expected = model.double()(x)
    with simulate(3):
        out = compiled(model, "shard")(x)
        for rank in range(3):
            local = on_rank(out, rank)
            rows = expected.chunk(3, 1)[rank] if isinstance(model, Gated) else expected
            assert relative_error(rows.detach(), local.detach()) < 1e-9


def test_a_dtensor_of_any_length() -> None:
    assert worst_error(mean_of_dtensor, 3, lengths=(7, 8, 11)) < 1e-12


@pytest.mark.parametrize("loss_of", [whole_then_loss, mean_of_dtensor])
def test_a_gradient_of_the_sum_of_equal_losses_is_noticed(loss_of: Callable[[Tensor], Tensor]) -> None:
    right = outputs_module._as_dtensor

    def wrong(value: Tensor, *args: Any) -> DTensor:
        return right(scale_gradient(value, 2.0), *args)

    with patch.object(outputs_module, "_as_dtensor", wrong):
        assert worst_error(loss_of, 2) > 0.9


@pytest.mark.parametrize("outputs", [{"logits": "dtensor"}, {1: "dtensor"}, {-1: "dtensor", "loss": "gather"}])
def test_logits_that_never_travel(outputs: Outputs) -> None:
    model = Head().double()
    with simulate(2):
        loss, logits = compiled(model, outputs)(tokens())
        assert isinstance(logits, DTensor) and not isinstance(loss, DTensor)
    moved = [
        each.role for each in explain(model, tokens(), sp_size=2, options={"outputs": outputs}).graphs[0].collectives
    ]
    assert not any(role.startswith("gather_output") for role in moved)


def test_each_output_as_it_was_asked_for() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(3)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            h = self.block(x)
            a, b, c = h.sin(), h.cos(), h * 2
            return a, b, c

    with simulate(2):
        a, b, c = compiled(Both().double(), {"b": "shard", "c": "dtensor"})(tokens())
        assert [type(each) is DTensor for each in (a, b, c)] == [False, False, True]
        assert [int(on_rank(each.shape[1], 1)) for each in (a, b, c)] == [7, 3, 7]


def test_what_a_graph_does_not_return() -> None:
    with simulate(2), pytest.raises(BackendCompilerFailed) as caught:
        compiled(Head().double(), {"logit": "shard"})(tokens())
    assert "option 'outputs' has 'logit'; did you mean 'logits'? This graph returns 0: 'loss', 1: 'logits'." in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("model", "length", "why"),
    [(Joint, 7, "no DTensor has rows that lie on the ranks as S(1: 7+7)"), (Views, 8, "it shares its memory with")],
)
def test_what_cannot_leave_as_a_dtensor(
    model: Callable[[], nn.Module], length: int, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    module, x = model().double(), tokens(length)
    with simulate(2), caplog.at_level(logging.WARNING, "sp_compile"):
        out = compiled(module, "dtensor")(x)
        out = out[0] if isinstance(out, tuple) else out
        expected = module(x)
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert not isinstance(out, DTensor) and relative_error(expected.detach(), on_rank(out, 1).detach()) < 1e-12
    assert f"output 0 ({'out' if model is Joint else 'h'!r}) is gathered: {why}" in caplog.text
    with simulate(2), pytest.raises(BackendCompilerFailed, match="or compile without strict=True"):
        compiled(module, "dtensor", strict=True)(x)
    dear = explain(module, x, sp_size=2, options={"outputs": "dtensor"}).graphs[0].outputs[0]
    assert dear.expensive and why in dear.remedy


def test_rows_without_padding_are_returned_as_they_are() -> None:
    with simulate(2):
        compiled(Block(3).double(), "shard")(tokens(8))
        (outputs,) = rewritten_graphs()[-1].rewritten.graph.output_node().args
    assert isinstance(outputs, tuple) and [str(output) for output in outputs] == ["add"]


def on_gloo(inner: str, dynamic: bool) -> list[float]:
    """Errors of loss and gradients where DTensor arithmetic makes the loss, and of the logits of one rank."""
    alone, errors = Head(), []
    ours = copy.deepcopy(alone)
    group = get_sequence_parallel_group()
    assert group is not None
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("sp",))
    call = compiled(ours, {"logits": "dtensor"}, inner, group=mesh, dynamic=dynamic)
    for length in (8, 7, 9):
        x = tokens(length).float()
        for model, run in ((alone, alone), (ours, call)):
            model.zero_grad()
            loss, logits = run(x)
            assert isinstance(logits, DTensor) == (run is call)
            (loss + logits.pow(2).mean()).backward() if run is alone else (
                loss + logits.pow(2).mean().full_tensor()
            ).backward()
        assert isinstance(logits, DTensor) and logits.device_mesh == mesh
        errors.append(relative_error(alone(x)[1].detach(), logits.full_tensor().detach()))
        errors += [
            relative_error(a.grad, b.grad, 1e-2) for a, b in zip(alone.parameters(), ours.parameters(), strict=True)
        ]
    return errors


@pytest.mark.slow
@pytest.mark.parametrize(("inner", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)])
def test_dtensors_on_real_ranks(gloo2: GlooPool, inner: str, dynamic: bool) -> None:
    assert max(max(errors) for errors in gloo2.run(on_gloo, inner, dynamic)) < 1e-4


def sharded_logits() -> tuple[float, tuple[int, ...], float]:
    """A Hugging Face model whose logits stay where they are."""
    torch.manual_seed(0)
    alone = llama()
    ours = copy.deepcopy(alone)
    inputs = inputs_of("llama", 13)
    expected = alone(**inputs)
    expected.loss.backward()
    out = compiled(ours, {"logits": "dtensor"}, "aot_eager")(**inputs)
    out.loss.backward()
    errors = [relative_error(a.grad, b.grad, 1e-2) for a, b in zip(alone.parameters(), ours.parameters(), strict=True)]
    full = relative_error(expected.logits.detach(), out.logits.full_tensor().detach())
    return full, tuple(out.logits.to_local().shape), max(errors)


@pytest.mark.slow
def test_logits_of_a_language_model(gloo2: GlooPool) -> None:
    ranks = gloo2.run(sharded_logits)
    assert [rank[1][1] for rank in ranks] == [7, 6]
    assert max(max(full, worst) for full, _, worst in ranks) < 1e-4
