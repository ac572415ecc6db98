"""Two real ranks over gloo, with Inductor: what simulated ranks cannot see."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._higher_order_ops.scan import scan
from torch.utils.checkpoint import checkpoint

from sp_compile import (
    destroy_sequence_parallel,
    get_data_parallel_group,
    get_sequence_parallel_rank,
    init_sequence_parallel,
    replicated_region,
    rewritten_graphs,
    sp_backend,
)
from sp_compile.debug import unsharded_graphs

from .equivalence import known_graphs, rewritten_since
from .gloo_pool import GlooPool
from .models import MODELS, inputs_of
from .mutants import MUTANTS
from .slow_transport import exchanged
from .test_passes import Block

pytestmark = pytest.mark.slow


def seeded(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def gradient_errors(expected: nn.Module, got: nn.Module) -> dict[str, float]:
    """The largest difference of each gradient, relative to the largest gradient norm; inf: one is None."""
    norm = max(float(p.grad.norm()) for p in expected.parameters() if p.grad is not None)
    errors = {}
    for (name, one), other in zip(expected.named_parameters(), got.parameters(), strict=True):
        if one.grad is None or other.grad is None:
            errors[name] = 0.0 if one.grad is other.grad else float("inf")
        else:
            errors[name] = float((one.grad - other.grad).abs().max()) / norm
    return errors


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


def checkpointed(inner: str) -> float:
    """How far the gradient of a checkpointed dropout is from the mask that its output shows."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.scale = Block(), nn.Parameter(torch.rand(12) + 1)

        def dropped(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.block(x).detach() * self.scale, 0.5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.dropped, x, use_reentrant=False)
            return out

    torch.manual_seed(0)
    model = Checkpointed()
    compiled = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": inner}))
    out = compiled(torch.randn(1, 7, 12))
    out.sum().backward()
    assert model.scale.grad is not None
    return float((model.scale.grad - (out / model.scale).sum((0, 1))).detach().abs().max())


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_checkpointed_dropout_is_recomputed_alike(gloo2: GlooPool, inner: str) -> None:
    assert max(gloo2.run(checkpointed, inner)) < 1e-4


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, scale = ctx.saved_tensors
        return gradients[0] * scale * 3, (gradients[0] * x).sum((0, 1)) * 5


class Opaque(nn.Module):
    """Higher-order operators between blocks, which simulated ranks do not run; one in a checkpoint, one opted out."""

    def __init__(self, scans: bool) -> None:
        super().__init__()
        self.first, self.second, self.third, self.scans = Block(), Block(3), Block(), scans
        self.scale = nn.Parameter(torch.rand(12) + 1)

    def forward(self, x: Tensor) -> Any:
        y = checkpoint(lambda t: Scaled.apply(self.first(t), self.scale), x, use_reentrant=False)
        y = torch.cond(y.sum() > 0, lambda t: t.sin() * self.scale, lambda t: t.cos() - self.scale, (y,))
        last = y[:, -1]
        if self.scans:
            with replicated_region():
                last, y = scan(lambda c, t: (c / 2 + t, (c + t).tanh() * self.scale), x.new_zeros(1, 12), y, dim=1)
        y = torch.vmap(lambda row: row.cumsum(-1) * self.scale)(self.second(y))
        return checkpoint(self.third, y, use_reentrant=True), last


def with_opaque_parts(inner: str) -> tuple[float, int]:
    alone = Opaque(scans=inner == "aot_eager")  # Inductor has no backward of scan, sharded or not
    model = copy.deepcopy(alone)
    x = torch.randn(1, 7, 12)
    outputs = []
    for call in (alone, torch.compile(model, backend=partial(sp_backend, options={"inner_backend": inner}))):
        out, last = call(x.requires_grad_())
        (out.square().sum() + (last * torch.arange(12)).sum()).backward()
        outputs.append(torch.cat([out.flatten(), last.flatten(), cast(Tensor, x.grad).flatten()]).detach())
        x.grad = None
    error = float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())
    return max(error, *gradient_errors(alone, model).values()), len(rewritten_graphs()[-1].plan.sites)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_opaque_parts_run_whole_between_sharded_ones(gloo2: GlooPool, inner: str) -> None:
    for error, sites in gloo2.run(with_opaque_parts, inner):
        assert error < 1e-5 and sites == 3


def in_autocast(dtype: torch.dtype, outside: bool) -> tuple[float, bool]:
    """The largest error of outputs and gradients, relative, in half precision."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Block(3), nn.Linear(12, 5)

        def body(self, x: Tensor) -> Any:
            y = self.block(x)
            with torch.autocast("cpu", enabled=False):
                z = y.float().logsumexp(-1)
            return y, self.head(y).float().mean(1), z

        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu", dtype, enabled=not outside or torch.is_autocast_enabled("cpu")):
                return self.body(x)

    alone = Cast()
    model = copy.deepcopy(alone)
    compiled = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": "aot_eager"}))
    x = torch.randn(1, 7, 12)
    results = []
    for call in (alone, compiled):
        with torch.autocast("cpu", dtype, enabled=outside):
            y, head, z = call(x)
        (y.float().square().sum() + head.sum() + z.sum()).backward()
        results.append((y, head, z))
    same = all(a.dtype == b.dtype for a, b in zip(*results, strict=True))
    errors = [float((a - b).detach().abs().max() / a.detach().abs().max()) for a, b in zip(*results, strict=True)]
    return max(*errors, *gradient_errors(alone, model).values()), same


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(gloo2: GlooPool, dtype: torch.dtype, outside: bool) -> None:
    for error, same in gloo2.run(in_autocast, dtype, outside):
        assert error < (5e-3 if dtype == torch.float16 else 4e-2) and same


def in_inference_mode(inner: str, weaken: str = "") -> tuple[float, list[int]]:
    """The error of the output, and how many attention sites each rewritten graph has."""
    model, x = Block(3), torch.randn(1, 7, 12)
    known = known_graphs()
    compiled = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": inner}))
    with torch.inference_mode(), MUTANTS[weaken]() if weaken else nullcontext():
        out = compiled(x)
        error = float((out - model(x)).abs().max())
    assert out.is_inference()
    return error, [len(graph.plan.sites) for graph in rewritten_since(known)]


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_inference_mode(gloo2: GlooPool, inner: str) -> None:
    for error, sites in gloo2.run(in_inference_mode, inner):
        assert error < 1e-5 and sites == [1]


def test_inference_mode_on_three_ranks(gloo3: GlooPool) -> None:
    for error, sites in gloo3.run(in_inference_mode, "aot_eager"):
        assert error < 1e-5 and sites == [1]


def test_a_planted_wrong_is_noticed_on_real_ranks(gloo3: GlooPool) -> None:
    for error, sites in gloo3.run(in_inference_mode, "aot_eager", "a rank's block off by one granule"):
        assert error > 1e-2 and sites == [1]


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


def lowered_hashes() -> list[str]:
    """The hash of each graph that AOTAutograd hands on, forward and backward: no `sp::` op is left in them."""
    texts: list[str] = []

    def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        text = gm.print_readable(print_output=False)
        assert "torch.ops.sp." not in text and "_c10d_functional" in text
        texts.append(text)
        return gm.forward

    model = Block(3, repeat="flag")
    inner = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    compiled = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": inner}))
    compiled(torch.randn(1, 7, 12)).sum().backward()
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def test_all_ranks_lower_to_the_same_text(gloo3: GlooPool) -> None:
    first, *others = gloo3.run(lowered_hashes)
    assert len(first) == 2
    assert all(other == first for other in others)


def cached(folder: str) -> dict[str, Any]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    counters.clear()
    alone = Block(4, repeat="flag")
    model = copy.deepcopy(alone)
    x = torch.randn(1, 7, 12)
    alone(x).square().sum().backward()
    out = torch.compile(model, backend=sp_backend)(x)
    out.square().sum().backward()
    wrong = max(gradient_errors(alone, model).values()), float((out - alone(x)).detach().abs().max())
    hits = counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"]
    return {"wrong": max(wrong), "hits": sum(hits)}


def test_ranks_share_a_cache_folder_and_a_second_start_hits_it(tmp_path: Path) -> None:
    for start in ("cold", "warm"):
        pool = GlooPool(2)
        try:
            ranks = pool.run(cached, str(tmp_path))
        finally:
            pool.close()
        assert all(rank["wrong"] < 1e-4 for rank in ranks), (start, ranks)
    assert all(rank["hits"] > 0 for rank in ranks), ranks


def forward(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """The output, and how many graphs were rewritten for it."""
    known = {graph.name for graph in rewritten_graphs()}
    out = model(x).detach()
    return out, len({graph.name for graph in rewritten_graphs()} - known)


def with_changing_groups() -> list[tuple[float, int]]:
    """One compiled model before, with, without and again with an SP group."""
    model, x = Block(), torch.randn(1, 7, 12)
    expected = model(x).detach()
    compiled = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": "eager"}))
    destroy_sequence_parallel()
    seen = [forward(compiled, x)]
    init_sequence_parallel()
    seen += [forward(compiled, x), forward(compiled, x)]
    init_sequence_parallel(1)
    seen.append(forward(compiled, x))
    init_sequence_parallel(2)
    seen.append(forward(compiled, x))
    return [(float((out - expected).abs().max()), count) for out, count in seen]


def test_a_changed_group_recompiles(gloo2: GlooPool) -> None:
    for seen in gloo2.run(with_changing_groups):
        assert all(error < 1e-5 for error, _ in seen)
        assert [count > 0 for _, count in seen] == [False, True, False, False, True]


def with_ddp() -> float:
    """`param_grads="local"` under a DDP that averages over the SP ranks as well."""
    alone = Block()
    model = copy.deepcopy(alone)
    x = torch.randn(1, 7, 12)
    alone(x).square().mean().backward()
    options = {"inner_backend": "aot_eager", "param_grads": "local"}
    ddp = nn.parallel.DistributedDataParallel(torch.compile(model, backend=partial(sp_backend, options=options)))
    ddp(x).square().mean().backward()
    moved = str(rewritten_graphs()[-1])
    assert "sp.scale_gradient" in moved and "sp.replicate" not in moved
    return max(gradient_errors(alone, model).values())


def test_local_gradients_under_ddp(gloo2: GlooPool) -> None:
    assert max(gloo2.run(with_ddp)) < 1e-5


class TwoBuckets(nn.Module):
    """More than a megabyte of parameters in each half, which DDP makes two buckets of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down, self.second = Block(), nn.Linear(12, 22000), nn.Linear(22000, 12), Block(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.down(self.up(self.first(x)).sin()))
        return out


def compiled_after_ddp() -> tuple[float, int, bool]:
    """`torch.compile(DDP(model))`: Dynamo's DDP optimizer would cut it in two."""
    alone = TwoBuckets()
    model = copy.deepcopy(alone)
    x = torch.randn(1, 7, 12)
    alone(x).square().mean().backward()
    known = {graph.name for graph in rewritten_graphs()}
    ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
    torch.compile(ddp, backend=partial(sp_backend, options={"inner_backend": "aot_eager"}))(
        x
    ).square().mean().backward()
    graphs = {graph.name for graph in rewritten_graphs()} - known
    destroy_sequence_parallel()
    return max(gradient_errors(alone, model).values()), len(graphs), bool(torch._dynamo.config.optimize_ddp)


def test_ddp_around_the_model_does_not_cut_its_graph(gloo2: GlooPool) -> None:
    for error, graphs, restored in gloo2.run(compiled_after_ddp):
        assert error < 1e-5 and graphs == 1 and restored


def compiled_after_ddp_with_a_group() -> str:
    destroy_sequence_parallel()
    ddp = nn.parallel.DistributedDataParallel(Block())
    try:
        torch.compile(ddp, backend="sp_compile", options={"group": dist.group.WORLD})(torch.randn(1, 7, 12))
    except Exception as error:
        return str(error)
    return ""


def test_ddp_that_would_cut_the_graph_is_refused(gloo2: GlooPool) -> None:
    for error in gloo2.run(compiled_after_ddp_with_a_group):
        assert "ConfigurationError" in error and "optimize_ddp = False" in error


def with_data_parallel() -> float:
    """Four ranks, two by two: gradients averaged over the data-parallel group only."""
    init_sequence_parallel(1)
    alone = Block()
    model = copy.deepcopy(alone)
    batches = torch.randn(2, 1, 7, 12)
    for batch in batches:
        (alone(batch).square().mean() / 2).backward()
    compiled = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": "eager"}))
    compiled(batches[dist.get_rank()]).square().mean().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=get_data_parallel_group())
        parameter.grad /= 2
    return max(gradient_errors(alone, model).values())


def test_a_group_of_one_is_plain_data_parallel(gloo2: GlooPool) -> None:
    assert max(gloo2.run(with_data_parallel)) < 1e-5


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


def dropped_twice() -> tuple[bool, list[float]]:
    """Inductor draws alike where values are replicated, and leaves the generator alike on every rank."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.block(x), 0.5)

    torch.manual_seed(0)
    model = Dropped()
    out = torch.compile(model, backend=sp_backend)(torch.randn(1, 8, 12))
    out.sum().backward()
    dropped = out == 0
    return bool(torch.equal(dropped[:, :4], dropped[:, 4:])), torch.rand(3).tolist()


def test_random_numbers_with_inductor(gloo2: GlooPool) -> None:
    ranks = gloo2.run(dropped_twice)
    assert not any(same for same, _ in ranks)
    assert ranks[0][1] == ranks[1][1]


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
