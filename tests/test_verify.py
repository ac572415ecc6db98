"""`verify`: what it says of right models, of wrong rules, and of models that make it hard."""

from __future__ import annotations

import copy
import itertools
import json
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed._local_tensor import LocalTensor
from torch.nn.attention.flex_attention import flex_attention
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from sp_compile import Verification, VerificationError, verify
from sp_compile.__main__ import main
from sp_compile.errors import ConfigurationError, FallbackError
from sp_compile.tools.comparison import (
    Step,
    compare,
    copied,
    is_rounding,
    magnitude_of,
    named_leaves,
    relative_error,
    rounding_bound,
)
from sp_compile.tools.divergence import Divergence
from sp_compile.tools.simulation import fake_world, simulate
from sp_compile.tools.verify import first_divergence_of, run_alone

from .commands.mutants import MUTANTS, with_bodies
from .programs import PROGRAMS, Parts, Program
from .tensor_kinds import KINDS, Named

Body = Callable[..., Any]
X = (1, 7, 12)


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape or X, dtype=torch.float64, requires_grad=True)


# Right models


class Stateful(nn.Module):
    """Attention, dropout, batch norm, a counter that counts calls, and outputs of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Parts(Parts.block)
        self.norm = nn.BatchNorm1d(12)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.double()

    def forward(self, x: Tensor, *, scale: float) -> dict[str, Any]:
        self.calls += 1
        y = F.dropout(self.attention(F.dropout(x, 0.2, self.training)), 0.2, self.training) * scale
        y = self.norm(y.mT).mT
        return {"y": y, "best": y.argmax(-1), "nothing": None, "length": x.shape[1], "deep": [(y.sum(1), "text")]}


class Normed(nn.Module):
    """Nothing to shard, and statistics that eager BatchNorm writes without a new version of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(12).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm((x + torch.ones(12, dtype=x.dtype)).mT)
        return y


def test_statistics_are_of_each_rank_where_nothing_is_sharded() -> None:
    verification = verify(Normed(), tokens(), sp_size=3)
    assert not verification.wrong and "buffer norm.running_mean" in verification.errors


def test_a_model_with_states_is_verified_and_left_as_it_was() -> None:
    model, x = Stateful(), tokens()
    model(x, scale=1.0)["y"].square().sum().backward()
    before, gradients = copy.deepcopy(model.state_dict()), [copy.deepcopy(p.grad) for p in model.parameters()]
    given, random = x.detach().clone(), torch.get_rng_state()
    verification = verify(model, x, sp_size=3, scale=2.0)
    assert not verification.wrong and len(verification.graphs) == 1 and verification.collectives
    named = ["output y", "output best", "output nothing", "output length", "output deep 0 0", "output deep 0 1"]
    named += ["grad input 0", "grad norm.weight", "buffer norm.running_var", "buffer calls"]
    assert set(named) <= verification.errors.keys()
    assert all(len(errors) == 3 for errors in verification.errors.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is gradient is None) or torch.equal(parameter.grad, gradient)
    assert torch.equal(x, given) and torch.equal(torch.get_rng_state(), random) and model.training
    assert x.grad is not None


def test_a_verification_prints_and_is_plain_data() -> None:
    verification = verify(Parts(Parts.block), tokens(), sp_size=2)
    text, data = str(verification), json.loads(json.dumps(verification.to_dict()))
    assert "2 ranks against one device: all values agree (tolerance 1e-09)" in text
    assert "rank 1" in text and "deadlocks" in text and "transport" in text and "no inner backend" in text
    assert data["passed"] and data["errors"]["grad q.weight"][1] < 1e-9 and len(data["unseen"]) == 4


def test_that_nothing_was_sharded_is_said() -> None:
    verification = verify(nn.Linear(12, 12), torch.randn(X), sp_size=2)
    assert "proves nothing" in str(verification) and verification.unsharded == ("nothing to shard",)
    assert verification.tolerance == 1e-4


def test_functions_and_compiled_models() -> None:
    def attend(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q)

    q = torch.randn(1, 3, 7, 4, dtype=torch.float64, requires_grad=True)
    assert {"output 0", "grad input 0"} == set(verify(attend, q, sp_size=2).errors)
    assert verify(torch.compile(Parts(Parts.block), backend="eager"), tokens(), sp_size=2).collectives


def test_parameters_are_found_through_methods_and_partial_calls() -> None:
    model = Parts(Parts.block)
    for call in (model.forward, partial(model), partial(model.forward)):
        assert "grad q.weight" in verify(call, tokens(), sp_size=2).errors


def test_ranks_draw_what_one_device_draws() -> None:
    """Noise like an input, a time for each sample and dropout, as a diffusion loss has them."""

    def loss(m: Parts, x: Tensor) -> Tensor:
        noise, time = torch.randn_like(x), torch.rand(x.shape[0], 1, 1, dtype=x.dtype)
        return (F.dropout(m.block(x + noise * time), 0.3) - noise).square().mean()

    assert not verify(Parts(loss), tokens(), sp_size=3).wrong


def test_a_model_that_simulated_ranks_cannot_run_is_not_called_wrong() -> None:
    def body(m: Parts, x: Tensor) -> Tensor:
        y = m.block(x)
        chosen: Tensor = torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,))
        return chosen

    with pytest.raises(VerificationError, match="cannot be verified, simulated ranks do not run all"):
        verify(Parts(body), tokens(), sp_size=2)


def test_that_no_gradient_was_compared_is_said() -> None:
    model, x = Parts(Parts.block), tokens().detach()
    with torch.no_grad():
        assert "No gradient was compared" in str(verify(model, x, sp_size=2))
    with torch.inference_mode():
        made_there = verify(model, x * 1, sp_size=2)
    assert not made_there.wrong and made_there.collectives and "No gradient was compared" in str(made_there)
    assert "No gradient was compared" in str(verify(lambda t: model(t), x, sp_size=2))
    assert "No gradient was compared" not in str(verify(model, x, sp_size=2))


def test_a_view_under_no_grad_hands_no_gradient_on() -> None:
    """torch says that it requires one, and the ranks' do not: None reaches the leaves of both."""

    def body(m: Parts, x: Tensor) -> Tensor:
        y = m.block(x)
        with torch.no_grad():
            return y[:, 1:]

    verification = verify(Parts(body), tokens(), sp_size=2)
    assert not verification.wrong and set(verification.errors["grad input 0"]) == {0.0}

    def lost(m: Parts, x: Tensor) -> Tensor:
        y = m.block(x)
        with torch.set_grad_enabled(not torch.compiler.is_compiling()):
            return y[:, 1:]

    with pytest.raises(VerificationError, match="grad input 0"):
        verify(Parts(lost), tokens(), sp_size=2)


def test_flex_attention() -> None:
    def body(m: Parts, x: Tensor) -> Tensor:
        q, k, v = (m.split(each(x)) for each in (m.q, m.k, m.v))
        return m.o(m.join(flex_attention(q, k, v, lambda score, b, h, i, j: score + m.bias[h] * (i - j))))

    model = Parts(body).requires_grad_(False)  # on the CPU it has no backward
    assert not verify(model, tokens().detach(), sp_size=2).wrong


def test_an_input_with_a_history_and_one_that_is_given_twice() -> None:
    def body(m: Parts, x: Tensor, y: Tensor, more: dict[str, Tensor]) -> Tensor:
        return m.block(x) + y * more["scale"]

    x = tokens() * 2
    verification = verify(Parts(body), x, x, {"scale": tokens()}, sp_size=2)
    assert "grad input 2 scale" in verification.errors


def test_a_half_precision_model_is_compared_coarsely() -> None:
    x = torch.randn(X, dtype=torch.bfloat16)
    assert verify(Parts(Parts.block).bfloat16(), x, sp_size=2).tolerance == 5e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert verify(Parts(Parts.block).float(), x.float(), sp_size=2).tolerance == 5e-2
    with pytest.raises(VerificationError, match="tolerance 1e-08"):
        verify(Parts(Parts.block).bfloat16(), x, sp_size=2, tolerance=1e-8)


def test_a_sum_that_cancels_out_is_no_error() -> None:
    def body(m: Parts, x: Tensor) -> Any:
        y = m.block(x)
        return (y - y.mean(1, keepdim=True)).mean(1), y

    verification = verify(Parts(body), tokens(), sp_size=3)
    assert verification.rounding == ("output 0",) and max(verification.errors["output 0"]) > 1e-9
    assert "As far apart by rounding alone: output 0." in str(verification)


def test_a_graph_that_breaks_and_one_that_runs_twice() -> None:
    def body(m: Parts, x: Tensor) -> Tensor:
        x = m.block(x)
        torch._dynamo.graph_break()
        return m.block(m.block(x)[:, :5])

    twice = verify(nn.Sequential(*[Parts(Parts.block)] * 2), tokens(), sp_size=2)
    assert not twice.wrong
    assert len(verify(Parts(body), tokens(), sp_size=2).graphs) == 2


def test_a_view_of_simulated_ranks_enters_the_next_graph() -> None:
    """Of a batch of 1, whose stride Dynamo does not find again as it replays the view."""

    def body(m: Parts, x: Tensor) -> Tensor:
        x = m.norm(m.attend(x, x))
        torch._dynamo.graph_break()
        return m.attend(x, x)

    assert len(verify(Parts(body), tokens(1, 12, 12), sp_size=3).graphs) == 2


# Wrong rules


def softmax_of_tokens(m: Parts, x: Tensor) -> Tensor:
    y = m.block(x)
    return m.o(y.softmax(1) * y)


def mean_of_tokens(m: Parts, x: Tensor) -> Tensor:
    return m.head(m.block(x).mean(1))


def contraction(m: Parts, x: Tensor) -> Tensor:
    y = m.block(x)
    return y.mT @ y


def cross_entropy(m: Parts, x: Tensor) -> dict[str, Tensor]:
    return {"loss": F.cross_entropy(m.head(m.block(x)).flatten(0, 1), torch.arange(x.shape[1]) % 17)}


WRONG: dict[str, tuple[Body, str, str, str, str]] = {
    "softmax of local rows": (softmax_of_tokens, "forward", "softmax", "aten.softmax", "y.softmax(1)"),
    "mean: divided by a count that has the padding": (mean_of_tokens, "forward", "mean", "aten.mean", ".mean(1)"),
    "matmul, bmm: a contraction not summed over ranks": (contraction, "forward", "matmul", "aten.matmul", "y.mT @ y"),
    "cross_entropy: padded rows have class 0": (
        cross_entropy, "forward", "cross_entropy_loss", "aten.cross_entropy_loss", "F.cross_entropy",
    ),
    "padded rows not zeroed in the backward of an all-to-all": (
        Parts.block, "backward", "gather_heads_scatter_seq", "sp.all_to_all", "scaled_dot_product_attention",
    ),
    "a rank's block off by one granule": (Parts.block, "forward", "slice_args_0", "sp.shard", "self.norm(x)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_planted_wrong_is_caught_and_its_node_is_named(name: str) -> None:
    body, direction, node, op, line = WRONG[name]
    with MUTANTS[name](), pytest.raises(VerificationError) as raised:
        verify(Parts(body), tokens(), sp_size=2)
    found = raised.value.divergence
    assert isinstance(found, Divergence)
    assert (found.direction, found.node, found.op) == (direction, node, op)
    assert line in found.line
    assert str(found) in str(raised.value) and found.rule in str(found)


def bias_on_every_rank() -> AbstractContextManager[None]:
    """`addmm` whose sum over ranks has the bias P times."""

    def change(body: Any) -> Any:
        def run(local: Any) -> Any:
            factors = [local.mask_padding(local.operand(at), local.operands[at], 0) for at in (1, 2)]
            return local.all_reduce(local.emit(torch.ops.aten.addmm.default, local.operand(0), *factors))

        return run

    return with_bodies(torch.ops.aten.addmm.default, change)


@pytest.mark.parametrize(
    ("plant", "program", "direction", "op", "line"),
    [
        (bias_on_every_rank, "weights_of_padded_rows", "forward", "aten.addmm", "torch.addmm"),
        ("the gradient of an additive operand summed over ranks", "weights_of_padded_rows", "backward", "", "torch."),
        ("view: inner and outer factor swapped", "sequence_first_flat", "forward", "aten.reshape", "y.view(S, B, C)"),
        ("sdpa: queries see the keys of their rank alone", "plain", "forward", "aten.scaled_dot_product_attention", ""),
        ("no replicate backward", "plain", "backward", "sp.replicate", ""),
        ("padded rows not zeroed in the backward of an all-gather", "plain", "backward", "sp.all_gather", ""),
    ],
)
def test_a_planted_wrong_in_a_program_is_named(
    plant: str | Callable[[], AbstractContextManager[None]], program: str, direction: str, op: str, line: str
) -> None:
    case, inputs = program_of(program)
    with MUTANTS[plant]() if isinstance(plant, str) else plant(), pytest.raises(VerificationError) as raised:
        verify(case.module(), *inputs, sp_size=case.parts)
    found = raised.value.divergence
    assert isinstance(found, Divergence)
    assert found.direction == direction and found.op.startswith(op) and line in found.line, found


def program_of(name: str) -> tuple[Program, tuple[Tensor, ...]]:
    (case,) = (each for each in PROGRAMS if each.name == name)
    return case, tuple(tokens(*each) if isinstance(each, tuple) else each() for each in case.arguments)


def test_of_several_graphs_the_one_that_is_wrong_is_named() -> None:
    def body(m: Parts, x: Tensor) -> dict[str, Tensor]:
        y = m.block(x)
        torch._dynamo.graph_break()
        return cross_entropy(m, y)

    with MUTANTS["cross_entropy: padded rows have class 0"](), pytest.raises(VerificationError) as raised:
        verify(Parts(body), tokens(), sp_size=2)
    found, verification = raised.value.divergence, raised.value.verification
    assert isinstance(found, Divergence) and isinstance(verification, Verification)
    assert found.graph == verification.graphs[1] and found.node == "cross_entropy_loss"


def test_a_wrong_gradient_is_found_in_front_of_a_right_graph() -> None:
    def body(m: Parts, x: Tensor) -> Tensor:
        y = m.block(x)
        torch._dynamo.graph_break()
        return y + m.o(y)

    with (
        MUTANTS["padded rows not zeroed in the backward of an all-to-all"](),
        pytest.raises(VerificationError) as raised,
    ):
        verify(Parts(body), tokens(), sp_size=2)
    found, verification = raised.value.divergence, raised.value.verification
    assert isinstance(found, Divergence) and isinstance(verification, Verification)
    assert verification.unsharded == ("nothing to shard",) and (found.graph,) == verification.graphs
    assert (found.direction, found.node) == ("backward", "gather_heads_scatter_seq")


@pytest.mark.parametrize("name", ["plain", "gqa_6_heads_2_groups", "weight_first_used_without_gradient", "swin"])
def test_no_node_of_a_right_program_is_named(name: str) -> None:
    case, inputs = program_of(name)
    program, options = (case.module(), inputs, {}), {"inner_backend": "eager", "rng": "exact"}
    written = run_alone(program).written
    found, graphs = first_divergence_of(program, case.parts, options, case.dynamic, written, 1e-9)
    assert found is None and graphs


# Hard models


def test_a_model_that_is_not_deterministic_is_not_blamed_on_the_ranks() -> None:
    seeds = itertools.count()

    def unsteady(x: Tensor) -> Tensor:
        noise = torch.rand((), generator=torch.Generator().manual_seed(next(seeds)), dtype=x.dtype)
        return F.scaled_dot_product_attention(x, x, x) + noise

    with pytest.raises(VerificationError, match="does not give the same twice: output 0"):
        verify(unsteady, tokens(1, 3, 7, 4), sp_size=2)


def test_what_is_wrong_outside_of_the_graphs_is_said_to_be() -> None:
    def body(m: Parts, x: Tensor) -> Tensor:
        return m.block(x) * (2 if torch.compiler.is_compiling() else 1)

    with pytest.raises(VerificationError, match="look at capture, and outside the graphs") as raised:
        verify(Parts(body), tokens(), sp_size=2)
    assert raised.value.divergence is None


def test_a_model_that_raises() -> None:
    def always(x: Tensor) -> Tensor:
        raise ValueError("no such model")

    def of_ids(m: Parts, ids: Tensor) -> Tensor:
        return m.block(m.table(ids))

    with pytest.raises(ValueError, match="no such model"):
        verify(always, tokens())
    on_ranks = pytest.raises(VerificationError, match=r"(?s)on 2 ranks it raises SequenceParallelError.*%slice_")
    with MUTANTS["embedding: dimensions of the ids in reverse"](), on_ranks:
        verify(Parts(of_ids), torch.arange(7)[None], sp_size=2)
    with pytest.raises(FallbackError, match="runs on gathered values"):
        verify(Parts(lambda m, x: m.block(x).svd().S), tokens(), sp_size=2, options={"strict": True})


def test_an_input_that_is_written_to_is_each_ranks_own() -> None:
    def body(m: Parts, x: Tensor) -> Tensor:
        x.mul_(2)
        m.count.add_(1)
        return m.block(x)

    verification = verify(Parts(body), tokens().detach(), sp_size=3)
    assert len(verification.errors["input 0 afterwards"]) == 3 and not verification.wrong
    model, counts = Parts(body), LocalTensor({0: torch.ones(()), 1: torch.zeros(())})
    with simulate(2) as ranks:
        model.count.copy_(counts)
        got = Step({"buffer count": ranks.by_rank(model.count)})
    expected = Step({"buffer count": torch.zeros((), dtype=torch.float64)})
    first, last = compare(expected, got, 2, 1e-9)["buffer count"]
    assert first > 1 and last == 0, "the last rank does not speak for the others"


def leaf() -> Tensor:
    return torch.arange(12.0).view(3, 4)


def with_view(x: Tensor) -> tuple[Tensor, ...]:
    return x, x[:, 1:]


def views_of_views(x: Tensor) -> tuple[Tensor, ...]:
    return x[1:].T[1:], x, x.view(4, 3)[::2]


def under_no_grad(x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return x, x[1:]


SHARED: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "a view": lambda: with_view(leaf()),
    "a view of a leaf that trains": lambda: with_view(leaf().requires_grad_()),
    "a view of a value with a history": lambda: with_view(leaf().requires_grad_() * 2),
    "a view that trains": lambda: (x := leaf(), x[1:].requires_grad_()),
    "a view under no_grad": lambda: under_no_grad(leaf().requires_grad_()),
    "views of views": lambda: views_of_views(leaf()),
    "views of views of a leaf that trains": lambda: views_of_views(leaf().requires_grad_()),
    "views of views of a value with a history": lambda: views_of_views(leaf().requires_grad_() * 2),
    "views of what is not given": lambda: ((x := leaf())[:2], x[1:]),
    "an alias without history": lambda: ((x := leaf().requires_grad_() * 2), x.detach()),
    "that alias first": lambda: ((x := leaf().requires_grad_() * 2).detach(), x),
    "overlapping": lambda: (x := leaf(), x.as_strided((5, 4), (2, 1)), x.as_strided((3, 3), (1, 2), 2)),
    "expanded": lambda: (x := torch.ones(3, 1), x.expand(3, 4)),
    "two dtypes": lambda: (x := leaf(), x.view(torch.int32), x.view(torch.uint8)[:, ::2]),
    "complex": lambda: (x := torch.ones(3, 2), z := torch.view_as_complex(x), z.conj(), z.conj().imag),
    "real parts": lambda: (z := torch.ones(3, dtype=torch.complex64), torch.view_as_real(z), z.real),
    "parameters of one memory": lambda: (x := nn.Parameter(leaf()), nn.Parameter(x.detach()[1:])),
    "pieces": lambda: (x := leaf(), *x.unbind(), *x.split(2, 1)),
    "pieces with a history": lambda: (x := leaf().requires_grad_(), *x.unbind()),
    "twice": lambda: (x := leaf(), x),
    "a view of a class of its own": lambda: (x := leaf().as_subclass(Named), x[:, 1:]),
    "a view of a class with a history": lambda: (x := leaf().requires_grad_().as_subclass(Named), x[:, 1:]),
    "inference": lambda: torch.inference_mode()(lambda: with_view(leaf()))(),
}


@pytest.mark.parametrize("name", SHARED)
def test_copies_share_memory_as_the_originals_do(name: str) -> None:
    originals = SHARED[name]()
    _, copies, _ = copied((len, originals, {}))
    for original, copy_of_it in zip(originals, copies, strict=True):
        assert type(original) is type(copy_of_it) and original is not copy_of_it
        for look in (Tensor.stride, Tensor.storage_offset, Tensor.is_conj, Tensor.is_neg):
            assert look(original) == look(copy_of_it)
        assert (original.requires_grad, original.is_leaf) == (copy_of_it.requires_grad, copy_of_it.is_leaf)
    for at, (original, copy_of_it) in enumerate(zip(originals, copies, strict=True)):
        with torch.inference_mode(original.is_inference()):
            original.detach().as_strided((1,), (1,)).fill_(at + 2)
        copy_of_it.detach().as_strided((1,), (1,)).fill_(at + 2)
        assert all(torch.equal(one, other) for one, other in zip(originals, copies, strict=True)), at


def test_gradients_of_shared_memory() -> None:
    """A view that enters beside its base, both with a history, which the program then writes to."""

    def body(m: Parts, x: Tensor, y: Tensor) -> Tensor:
        y.mul_(m.o(x + 1)[:, 1:])
        return m.block(x + y.sum())

    x = tokens() * 2
    for inputs in (
        (x, x[:, 1:]),
        (x.detach(), x.detach()[:, 1:]),
        (x[:, :1].expand(X), x[:, 1:]),
    ):
        model = Parts(body)
        verification = verify(model, *inputs, sp_size=2)
        assert not verification.wrong and not verification.rounding
        assert "input 0 afterwards" in verification.errors and "grad o.weight" in verification.errors
        assert ("grad input 0" in verification.errors) == inputs[0].requires_grad


class Shared(nn.Module):
    """A buffer and a parameter that are parts of one memory, which inputs may be as well."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = Parts(Parts.block)
        whole = torch.randn(2, 7, 12, dtype=torch.float64)
        self.memory: Tensor
        self.register_buffer("memory", whole)
        self.scale = nn.Parameter(whole[1])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.memory.add_(1)
        z: Tensor = self.parts(x + self.scale)
        return z * y


def test_inputs_that_are_states_of_the_model() -> None:
    model = Shared()
    x = torch.randn(X, dtype=torch.float64)
    alone = copy.deepcopy(model.parts)(x + model.memory[1:] + 1) * (model.memory[:1, :, :] + 1)
    _, (given, first), _ = program = copied((model, (x, model.memory[:1]), {}))
    assert torch.allclose(program[0](given, first), alone)
    verification = verify(model, x, model.memory[:1], sp_size=2)
    assert not verification.wrong and not verification.rounding
    assert {"input 1 afterwards", "buffer memory", "grad scale"} <= verification.errors.keys()


def test_memory_that_is_shared_and_written_to_is_not_what_rounding_excuses() -> None:
    """The values of one device are those of the program, whose view sees what was written."""

    def body(m: Parts, x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2)
        return m.block(x + y.sum())

    x = torch.randn(X, dtype=torch.float64)
    verification = verify(Parts(body), x, x[:, 1:], sp_size=2)
    assert not verification.wrong and max(max(each) for each in verification.errors.values()) < 1e-12
    with pytest.raises(VerificationError, match=r"1 of \d+ values on 2 ranks differ"):
        verify(Parts(lambda m, x, y: body(m, x, y if torch.compiler.is_compiling() else y + 1)), x, x[:, 1:], sp_size=2)


@pytest.mark.parametrize("chaos", [lambda y: (y.detach() * 1e16).sin(), lambda y: (y * 1e15).long() % 7])
def test_what_jumps_with_the_last_bits_is_neither_right_nor_wrong(chaos: Callable[[Tensor], Tensor]) -> None:
    def body(m: Parts, x: Tensor) -> Any:
        y = m.block(x)
        return y, chaos(y.mean(1))

    with pytest.raises(VerificationError, match=r"(?s)1 of \d+ values cannot be verified.*output 1") as raised:
        verify(Parts(body), tokens().detach(), sp_size=3)
    assert isinstance(raised.value.verification, Verification)
    assert raised.value.verification.wrong == raised.value.verification.undecided == ("output 1",)
    assert "Wrong, or too sensitive to be compared: output 1." in str(raised.value.verification)
    assert not raised.value.verification.to_dict()["passed"]


def test_an_excuse_by_rounding_has_a_bound() -> None:
    small, large, magnitude = torch.tensor([1e-17]), torch.tensor([1.0]), 3.0
    assert is_rounding([0.5], [0.1], rounding_bound(small, 1e-9, magnitude))
    assert not is_rounding([0.5], [0.1], rounding_bound(large, 1e-9, magnitude))
    assert is_rounding([1e-6], [1e-6], rounding_bound(large, 1e-9, magnitude))
    assert not is_rounding([1e-6], [1e-8], rounding_bound(large, 1e-9, magnitude))
    assert not is_rounding([float("inf")], [float("inf")], rounding_bound(None, 1e-9, magnitude))
    assert not is_rounding([float("inf")], [float("inf")], rounding_bound(small, 1e-9, magnitude))
    assert magnitude_of([torch.tensor([float("-inf"), -1e9, 2.5, 3.0]), torch.tensor([7]), None]) == 2.5


def in_its_own_backward(m: Parts, x: Tensor) -> Tensor:
    y: Tensor = Reversible.apply(m.block(x), m.head)  # type: ignore[no-untyped-call]
    return y


class Reversible(torch.autograd.Function):
    """Computes again in backward, as a reentrant checkpoint does, and Reformer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Any:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.layer(x), gradients)
        return x.grad, None


REENTRANT: dict[str, Body] = {
    "a checkpoint": lambda m, x: checkpoint(m.block, x, use_reentrant=True),
    "one that is not compiled": lambda m, x: torch._dynamo.disable(checkpoint)(m.block, m.block(x), use_reentrant=True),
    "an op of its own": in_its_own_backward,
}


@pytest.mark.parametrize("name", REENTRANT)
def test_gradients_that_a_backward_inside_of_the_backward_makes(name: str) -> None:
    model = Parts(REENTRANT[name])
    verification = verify(model, tokens(), sp_size=2)
    assert not verification.wrong and "grad o.weight" in verification.errors
    used = "grad head.weight" if name == "an op of its own" else "grad o.weight"
    assert run_alone((model, (tokens(),), {})).values[used] is not None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_what_a_function_closes_over_stay_what_they_are() -> None:
    model, others = Parts(Parts.block), Parts(Parts.block)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    kept = [parameter.grad for parameter in model.parameters()]
    verify(lambda x: checkpoint(model.block, x, use_reentrant=True) + others.block(x), tokens(), sp_size=2)
    for parameter, gradient in zip(model.parameters(), kept, strict=True):
        assert parameter.grad is gradient and torch.equal(gradient, torch.ones_like(parameter))
    assert all(parameter.grad is None for parameter in others.parameters())


WHOLE = torch.tensor([[1, 2, 3, 0], [0, 3, 1, 2]])
PAIR = TwoTensor(torch.ones(4), torch.ones(4))
RAGGED = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)


@pytest.mark.filterwarnings("ignore")
def test_inputs_and_outputs_of_every_kind_of_tensor() -> None:
    """In one call all that have no numbers to shard; each is returned, and a difference in any of them is wrong."""

    def body(m: Parts, x: Tensor, kinds: dict[str, Tensor]) -> Any:
        y = m.block(x)
        odd = torch.complex(y, x)
        more = {"conjugate": odd.conj(), "negative": odd.conj().imag, "rows": y[0].to_sparse(), "float8": y.to(F8)}
        return y, kinds, {**more, "quantised": torch.quantize_per_tensor(y.float(), 1.0, 0, torch.quint8)}

    F8 = torch.float8_e4m3fn
    kinds = {name: make(WHOLE) for name, make in KINDS.items() if name not in ("conjugate", "torch.complex32")}
    kinds |= {"empty": torch.zeros(0, 3), "sparse": torch.eye(3).to_sparse(), "csr": torch.eye(3).to_sparse_csr()}
    verification = verify(Parts(body), tokens(), kinds, sp_size=2)
    assert not verification.wrong and len(verification.graphs) == 1
    assert {f"output 1 {name}" for name in kinds} | {
        "output 2 conjugate",
        "output 2 rows",
    } <= verification.errors.keys()


@pytest.mark.parametrize(
    "given",
    [RAGGED.detach().requires_grad_(), RAGGED.detach().requires_grad_() * 2, PAIR],
    ids=["ragged", "ragged, with a history", "two tensors"],
)
def test_wrapped_tensors(given: Tensor) -> None:
    def body(m: Parts, x: Tensor, given: Tensor) -> Any:
        y = m.block(x)
        torch._dynamo.graph_break()
        return given * y.mean(), y

    verification = verify(Parts(body), tokens(), given, sp_size=2)
    assert not verification.wrong and len(verification.graphs) == 1
    assert ("grad input 1" in verification.errors) == given.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_the_error_of_every_kind_of_tensor(kind: str) -> None:
    one, same, other = (KINDS[kind](x) for x in (WHOLE, WHOLE.clone(), WHOLE.flip(0)))
    assert relative_error(one, same) == 0 and relative_error(one, other) > 0
    assert relative_error(one, WHOLE.to(torch.int32)) == float("inf") or kind == "torch.int32"


def test_the_error_of_tensors_that_are_wrapped_or_in_other_layouts() -> None:
    x = torch.arange(12.0).view(4, 3)
    both = [lambda x: TwoTensor(x, x), lambda x: torch.nested.nested_tensor([x[:1], x[1:]]), Tensor.to_mkldnn]
    for make in (*both, Tensor.to_sparse_csr, Tensor.to_sparse_csc, Tensor.to_sparse, ragged):
        assert relative_error(make(x), make(x.clone())) == 0 < relative_error(make(x), make(x + 1)) < 1
    assert relative_error(ragged(x), ragged(x, 2)) == float("inf")
    assert relative_error(x.to("meta"), x.to("meta")) == 0 and relative_error(x, x.to("meta")) == float("inf")


def ragged(x: Tensor, at: int = 1) -> Tensor:
    return torch.nested.nested_tensor([x[:at], x[at:]], layout=torch.jagged)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_difference_that_overflows_is_no_agreement(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    assert relative_error(torch.tensor([limits.max], dtype=dtype), torch.tensor([limits.min], dtype=dtype)) >= 2


def test_gradients_of_many_half_precision_outputs() -> None:
    """Of more than 65504 numbers: their places are no numbers of that type."""
    x = torch.ones(70_000, dtype=torch.float16, requires_grad=True)
    gradient = run_alone((lambda x: x * 2, (x,), {})).values["grad input 0"]
    assert gradient.isfinite().all() and gradient.unique().numel() > 1000


def test_a_loss_of_several_numbers_or_of_complex_ones_is_an_output_like_others() -> None:
    for loss in (lambda m, x: m.block(x).mean((1, 2)), lambda m, x: (m.block(x) * 1j).mean()):
        alone = run_alone((Parts(lambda m, x, loss=loss: {"loss": loss(m, x)}), (tokens(2, 7, 12),), {}))
        assert alone.values["grad input 0"].count_nonzero() > 100


class Doubled(Tensor):
    """What is added to it counts twice."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = (args[0], 2 * args[1]) if func is Tensor.add else args
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_class_of_tensors_that_changes_nothing() -> None:
    """It is lost on simulated ranks: as an input that is broken off, as an output, and of what is written to."""

    def body(m: Parts, x: Tensor) -> Any:
        y = m.block(x.mul_(2))
        torch._dynamo.graph_break()
        return y.add(1), m.block(y).as_subclass(Named)

    x = torch.randn(X, dtype=torch.float64)
    assert not verify(Parts(body), x.as_subclass(Named), sp_size=2).wrong
    with pytest.raises(VerificationError, match=r"cannot be verified, .*: even with nothing sharded they differ"):
        verify(Parts(body), x.as_subclass(Doubled), sp_size=2)


def test_simulated_ranks_that_are_wrong_by_themselves_are_not_believed() -> None:
    """numpy writes to a copy of what they hold, and a tensor of compressed rows has no strides."""

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def raised(y: Tensor) -> None:
        y.detach().numpy()[...] += 1

    def written(m: Parts, x: Tensor) -> Tensor:
        y = m.block(x)
        raised(y)
        return y * 1

    def compressed(m: Parts, x: Tensor) -> Tensor:
        return m.block(x)[0].to_sparse_csr()

    for body, told in ((written, "they differ in output 0"), (compressed, "RuntimeError: Sparse CSR tensors do not")):
        with pytest.raises(VerificationError, match=f"cannot be verified, .*: even with nothing sharded,? {told}"):
            verify(Parts(body), tokens().detach(), sp_size=2)


def test_leaves_of_nests_however_deep() -> None:
    class Slots:
        __slots__ = ("inside", "itself")

    slots, deep = Slots(), [7]
    slots.inside, slots.itself = deque([1, (2, 3)]), slots
    for _ in range(5000):
        deep = [deep]
    found = dict(named_leaves({"a": slots, "b": deep, "c": {"d": None}}, ""))
    assert list(found.values()) == [1, 2, 3, 7, None] and {"a inside 1 0", "c d"} <= found.keys()


def test_what_cannot_be_verified_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="leave out the option 'outputs'"):
        verify(Parts(Parts.block), tokens(), options={"outputs": "shard"})
    with pytest.raises(ConfigurationError, match="unknown option 'attentoin'; did you mean 'attention'"):
        verify(Parts(Parts.block), tokens(), options={"attentoin": "ulysses"})
    with pytest.raises(ConfigurationError, match="on the meta device have no data"):
        verify(Parts(Parts.block).to("meta"), tokens().to("meta"))
    with pytest.raises(ConfigurationError, match="sp_size is 0"):
        verify(Parts(Parts.block), tokens(), sp_size=0)
    with fake_world(2), pytest.raises(ConfigurationError, match="a process of its own"):
        verify(Parts(Parts.block), tokens())
    with pytest.raises(ConfigurationError, match="fake or on the meta device"):
        verify(len, FakeTensorMode().from_tensor(torch.ones(2)))
    with pytest.raises(ConfigurationError, match=r"copies .* which cannot be copied: TypeError"):
        verify(len, (number for number in range(3)))


@pytest.mark.parametrize("tolerance", [float("nan"), float("inf"), -1e-6, 1.0, "1e-6"])
def test_a_tolerance_that_tells_nothing_is_refused(tolerance: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigurationError, match=f"the tolerance is {tolerance}; it takes a relative error"):
        verify(Parts(Parts.block), tokens(), tolerance=tolerance)
    if isinstance(tolerance, float):
        with pytest.raises(SystemExit) as raised:
            main(["verify", "tests.test_verify:right_model", f"--tolerance={tolerance}"])
        assert raised.value.code == 2 and "the tolerance is" in capsys.readouterr().err


# Comparison


@pytest.mark.parametrize(
    ("expected", "got", "error"),
    [
        (torch.tensor([2.0, -4.0]), torch.tensor([2.0, -3.0]), 0.25),
        (torch.tensor([float("inf"), 1.0]), torch.tensor([float("inf"), 1.0]), 0.0),
        (torch.tensor([float("inf"), 1.0]), torch.tensor([float("-inf"), 1.0]), float("inf")),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), 0.0),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("inf"), 1.0]), float("inf")),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), float("inf")),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), float("inf")),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), float("inf")),
        (torch.tensor([3 + 4j]), torch.tensor([3 + 2j]), 0.5),
        (torch.tensor([0.0, 4.0]).to_sparse(), torch.tensor([0.0, 2.0]).to_sparse(), 0.5),
        (torch.tensor([0.0, 4.0]).to_sparse(), torch.tensor([0.0, 4.0]), float("inf")),
        (None, torch.zeros(1), float("inf")),
        (None, None, 0.0),
        (7, 4, float("inf")),
        ("a", "a", 0.0),
    ],
)
def test_relative_error(expected: Any, got: Any, error: float) -> None:
    assert relative_error(expected, got) == error


def test_a_small_gradient_counts_by_itself_and_rounding_noise_does_not() -> None:
    gradients = {"grad a": torch.tensor([1.0]), "grad b": torch.tensor([0.01]), "grad c": torch.tensor([1e-17])}
    got = {"grad a": torch.tensor([1.0]), "grad b": torch.tensor([0.02]), "grad c": torch.tensor([-1e-17])}
    errors = compare(Step(gradients), Step(got), 1, 1e-9)
    assert errors["grad a"] == (0.0,) and errors["grad b"][0] > 0.9 and errors["grad c"][0] < 1e-10


def test_outputs_that_only_one_of_the_two_has() -> None:
    assert compare(Step({"output 0": None}), Step({"output 0": None, "output 1": 3}), 2, 1e-9) == {
        "output 0": (0.0, 0.0),
        "output 1": (float("inf"), float("inf")),
    }


# The command line


def right_model() -> Any:
    return Parts(Parts.block), torch.randn(X, dtype=torch.float64)  # one input, not a tuple of its rows


def wrong_model() -> Any:
    return Parts(lambda m, x: m.block(x) * (2 if torch.compiler.is_compiling() else 1)), (torch.randn(X).double(),)


def no_model() -> Any:
    return None


@pytest.mark.parametrize(
    ("target", "code", "said"),
    [
        ("tests.test_verify:right_model", 0, "2 ranks against one device: all values agree"),
        ("tests.test_verify:wrong_model", 1, "values on 2 ranks differ from one device"),
    ],
)
def test_the_command(target: str, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", target, "--sp-size", "2"]) == code
    assert said in capsys.readouterr().out


def test_a_command_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["tests.test_verify:no_model"], ["tests.test_verify:right_model", "--sp-size", "0"]):
        with pytest.raises(SystemExit) as raised:
            main(["verify", *arguments])
        assert raised.value.code == 2
    assert "sp_size is 0" in capsys.readouterr().err


def test_numbers_are_compared_as_values() -> None:
    """The sum over ranks of `item()` is another one in its last bits; whole numbers have to be the same."""
    assert 0 < relative_error(0.3, 0.1 + 0.2) < 1e-15 and relative_error(2.0, 1.0) == 0.5
    assert relative_error(float("nan"), float("nan")) == 0 and relative_error(1.0, float("nan")) == float("inf")
    assert relative_error(3, 4) == relative_error(3, 3.0 + 1e-9) == float("inf")
