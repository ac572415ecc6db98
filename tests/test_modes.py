"""The state of the program that a graph is planned and run in: hooks, modes, autocast, `.data`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sp_compile import explain, rewritten_graphs, sp_backend
from sp_compile.tools.comparison import on_rank, relative_error
from sp_compile.tools.simulation import bare, simulate

from .equivalence import assert_equivalent, tokens
from .programs import PROGRAMS, Parts, Program
from .test_passes import Block

aten = torch.ops.aten


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    made: Callable[..., Tensor] = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": bare}))
    return made


def test_a_checkpoint_around_a_compiled_model_compiles_in_its_first_call() -> None:
    alone = Block().double()
    x = tokens(1, 7, 12)
    alone(x).sum().backward()
    expected = [p.grad for p in alone.parameters()]
    alone.zero_grad()
    with simulate(2):
        checkpoint(compiled(alone), x, use_reentrant=False).sum().backward()
        for wanted, p in zip(expected, alone.parameters(), strict=True):
            assert max(relative_error(wanted, on_rank(p.grad, rank), 1e-2) for rank in range(2)) < 1e-9


def test_what_planning_saves_is_not_handed_to_the_hooks_of_the_user() -> None:
    saved: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        saved.append(value)
        return value

    counts = []
    with simulate(2):
        call = compiled(Block().double())
        for _ in range(2):
            saved.clear()
            with saved_tensors_hooks(pack, lambda value: value):
                call(tokens(1, 7, 12))
            counts.append(len(saved))
    assert counts[0] == counts[1] > 0


class _Calls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Ops(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def _default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "save_on_cpu": save_on_cpu,
    "anomaly": partial(torch.autograd.detect_anomaly, check_nan=True),
    "deterministic": _deterministic,
    "default device": partial(torch.device, "meta"),
    "default dtype": _default_dtype,
    "function mode": _Calls,
    "no_grad": torch.no_grad,
    "profiler": torch.autograd.profiler.profile,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", MODES)
def test_a_model_compiles_under_the_modes_of_the_user(name: str) -> None:
    alone, x = Block().double(), tokens(1, 7, 12)
    with MODES[name]():
        expected = alone(x)
    if expected.requires_grad:
        expected.sum().backward()
    wanted = [p.grad for p in alone.parameters()]
    alone.zero_grad()
    known = {graph.name for graph in rewritten_graphs()}
    with simulate(2):
        with MODES[name]():
            out = compiled(alone)(x)
        if out.requires_grad:
            out.sum().backward()
        for rank in range(2):
            assert relative_error(expected.detach(), on_rank(out, rank).detach()) < 1e-9
            pairs = zip(wanted, alone.parameters(), strict=True)
            assert max(relative_error(a, on_rank(p.grad, rank), 1e-2) for a, p in pairs) < 1e-9
    assert {graph.name for graph in rewritten_graphs()} - known


def test_under_a_dispatch_mode_of_the_user_nothing_is_compiled_and_all_is_right() -> None:
    """Dynamo stands aside, so that each op can be seen."""
    alone, x = Block().double(), tokens(1, 7, 12)
    with simulate(2), _Ops():
        assert relative_error(alone(x).detach(), on_rank(compiled(alone)(x), 1).detach()) < 1e-9


class Rotated(nn.Module):
    """Queries and keys in float32 beside values in bfloat16, as behind the rotary embedding of most decoders."""

    def __init__(self, inside: bool = True, written_out: bool = False, selective: bool = False) -> None:
        super().__init__()
        self.block, self.inside, self.written_out, self.selective = Block(3), inside, written_out, selective

    def forward(self, x: Tensor) -> Tensor:
        if self.selective:
            contexts = partial(create_selective_checkpoint_contexts, _saves_products)
            out: Tensor = checkpoint(self.attend, x, use_reentrant=False, context_fn=contexts)
            return out
        return self.attend(x)

    def attend(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        with torch.autocast("cpu", torch.bfloat16, enabled=self.inside or torch.is_autocast_enabled("cpu")):
            q, k, v = (
                f(x).view(batch, length, 3, -1).transpose(1, 2) for f in (self.block.q, self.block.k, self.block.v)
            )
            q, k = q.float() * 1.5, k.float() * 0.5
            if self.written_out:
                out = (q @ k.mT).softmax(-1) @ v
            else:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            made: Tensor = self.block.o(out.transpose(1, 2).flatten(2))
            return made


def _saves_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    products = (aten.mm.default, aten._scaled_dot_product_flash_attention_for_cpu.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("strategy", ["ulysses", "all_gather_kv"])
@pytest.mark.parametrize("model", [Rotated(), Rotated(inside=False), Rotated(selective=True)])
def test_operands_of_several_dtypes_under_autocast(model: nn.Module, strategy: str) -> None:
    x, options = torch.randn(1, 7, 12, requires_grad=True), {"attention": strategy}
    with torch.autocast("cpu", torch.bfloat16):
        (graph,) = assert_equivalent(model, (x,), parts=3, options=options, tolerance=5e-2)
        assert [site.strategy for site in graph.plan.sites] == [strategy]
        report = explain(model, x, sp_size=3, options=options)
        assert report.totals.flops_sharded > 0 and not report.totals.flops_unknown


def test_operands_of_several_dtypes_of_written_attention_under_autocast() -> None:
    assert_equivalent(Rotated(written_out=True), (torch.randn(1, 7, 12, requires_grad=True),), parts=2, tolerance=5e-2)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, str], Tensor]] = {
    "cross_entropy": lambda x, y, t, reduction: F.cross_entropy(x, t, reduction=reduction),
    "nll": lambda x, y, t, reduction: F.nll_loss(x.log_softmax(-1), t, reduction=reduction),
    "mse": lambda x, y, t, reduction: F.mse_loss(x, y, reduction=reduction),
    "kl_div": lambda x, y, t, reduction: F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction=reduction),
    "bce": lambda x, y, t, reduction: F.binary_cross_entropy_with_logits(x, y.sigmoid(), reduction=reduction),
}


@pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_under_autocast_has_the_dtype_of_one_device(name: str, around: bool) -> None:
    """Autocast computes it in float32, though its operands and a sum over ranks of its terms may be bfloat16."""

    def body(m: Parts, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=not around or torch.is_autocast_enabled("cpu")):
            logits = m.head(m.block(x)).flatten(0, 1)
            target = torch.arange(logits.shape[0]) % 17
            other = logits.detach().roll(1, -1)
            return [LOSSES[name](logits, other, target, reduction) for reduction in ("sum", "mean", "none")]

    model, x = Parts(body, double=False), torch.randn(1, 13, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        assert_equivalent(model, (x,), parts=2, tolerance=5e-2)


DTYPES_MADE_ANEW = ["one_query", "without_softmax", "last_gather", "weights_of_padded_rows", "constant_in_the_model"]


def _plans_under_autocast(case: Program) -> None:
    model, args = case.module().float(), [x.float() if x.dtype == torch.float64 else x for x in case.inputs()]
    with torch.autocast("cpu", torch.bfloat16):
        try:
            model(*args)
        except (RuntimeError, TypeError, ValueError):
            return  # it mixes dtypes in a way that torch refuses
        report = explain(model, *args, sp_size=case.parts, options={"attention": case.attention})
    assert not [graph.unsharded for graph in report.graphs if "sharding rule has to make" in graph.unsharded]


@pytest.mark.parametrize(
    "case", [each for each in PROGRAMS if each.name in DTYPES_MADE_ANEW], ids=lambda each: each.name
)
def test_what_a_rule_makes_under_autocast_has_the_dtype_of_the_op(case: Program) -> None:
    """A bias of float32, added to the sum over ranks of a product in bfloat16, may not widen the sum."""
    _plans_under_autocast(case)


@pytest.mark.full
@pytest.mark.parametrize("case", PROGRAMS, ids=lambda each: each.name)
def test_every_program_keeps_its_dtypes_under_autocast(case: Program) -> None:
    _plans_under_autocast(case)


def test_a_rule_that_makes_another_dtype_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sp_compile.rules.aten.losses._narrowed", lambda local, value: value)
    half = Parts(lambda m, x: F.mse_loss(m.block(x), x.detach()), double=False).bfloat16()
    (graph,) = explain(half, torch.randn(1, 13, 12, dtype=torch.bfloat16), sp_size=2).graphs
    said = r"makes torch.float32\[\] of mse_loss .* its sharding rule has to make torch.bfloat16\[\]"
    assert re.search(said, graph.unsharded)


def view_without_gradient(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    with torch.no_grad():
        z = y[:, ::2]
    return y, z, z * m.w


def view_of_an_input_without_gradient(m: Parts, x: Tensor) -> Any:
    with torch.no_grad():
        z = x[:, ::2]
    return z, m.block(x)


@pytest.mark.parametrize("body", [view_without_gradient, view_of_an_input_without_gradient])
def test_a_view_that_is_returned_has_the_gradient_that_it_has_on_one_device(body: Callable[..., Any]) -> None:
    assert_equivalent(Parts(body), (tokens(2, 6, 12),), parts=2)


def reads_data(m: Parts, x: Tensor) -> Any:
    return m.block(x) * m.w.data + m.w


def writes_data_of_a_weight(m: Parts, x: Tensor) -> Any:
    m.w.data.clamp_(-0.5, 0.5)
    y = m.block(x) * m.w
    m.mat.data.div_(m.mat.data.norm(dim=1, keepdim=True))
    return y @ m.mat


def writes_data_behind_a_use(m: Parts, x: Tensor) -> Any:
    """The gradient is that of what the weight became."""
    y = m.block(x) * m.w
    m.w.data.clamp_(-0.5, 0.5)
    return y + m.w


def writes_data_of_an_activation(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    y.data.mul_(2)
    return y * m.w


def writes_data_of_a_buffer(m: Parts, x: Tensor) -> Any:
    m.count.data.add_(1)
    return m.block(x) * m.count


@pytest.mark.parametrize(
    ("body", "shards"),
    [
        (reads_data, True),
        (writes_data_of_a_buffer, True),
        (writes_data_of_a_weight, False),
        (writes_data_behind_a_use, False),
        (writes_data_of_an_activation, False),
    ],
)
def test_data(body: Callable[..., Any], shards: bool) -> None:
    """`x.data` is x without its gradient, and what is written there autograd does not see."""
    graphs = assert_equivalent(Parts(body), (tokens(1, 7, 12),), parts=2, must_shard=shards)
    assert bool(graphs) == shards


def test_a_read_of_data_that_keeps_the_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sp_compile.capture.capture.DATA", None)
    with pytest.raises(AssertionError, match="grad w"):
        assert_equivalent(Parts(reads_data), (tokens(1, 7, 12),), parts=2)
