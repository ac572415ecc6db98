"""`explain`: what it says, and what it leaves as it was."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sp_compile import ConfigurationError, Links, explain
from sp_compile.__main__ import main

from .equivalence import known_graphs, run_simulated
from .models import MODELS, inputs_of
from .test_passes import Block


def x(length: int = 16, requires_grad: bool = False) -> Tensor:
    return torch.randn(1, length, 12, requires_grad=requires_grad)


# What it says


def test_a_site_with_its_line_its_heads_and_what_was_not_taken() -> None:
    report = explain(Block(4, 2, "repeat_interleave"), x(), sp_size=2)
    (site,) = report.graphs[0].sites
    assert (site.heads, site.kv_heads, site.length, site.strategy) == (4, 2, 16, "ulysses")
    assert "test_passes.py" in site.line and "scaled_dot_product_attention" in site.line
    assert {each.strategy for each in site.others} == {"all_gather_kv", "replicate"}


@pytest.mark.parametrize("repeat", ["flag", "repeat_interleave"])
@pytest.mark.parametrize(("heads", "kv_heads", "parts"), [(8, 4, 4), (6, 2, 4), (3, 3, 2)])
def test_what_a_strategy_would_move_is_what_it_moves(heads: int, kv_heads: int, parts: int, repeat: str) -> None:
    block = Block(heads, kv_heads, repeat)

    def site(strategy: str) -> Any:
        return explain(block, x(), sp_size=parts, options={"attention": strategy}).graphs[0].sites[0]

    sites = {name: site(name) for name in ("ulysses", "all_gather_kv", "replicate")}
    for name, one in sites.items():
        assert (one.strategy, one.heads, one.kv_heads) == (name, heads, kv_heads)
        assert len(one.others) == 2
        assert all(each.bytes == sites[each.strategy].bytes for each in one.others)


def test_forward_is_that_of_the_rewritten_graph() -> None:
    model, inputs = MODELS["vit"](), inputs_of("vit", 0)
    _, graphs = run_simulated(model, (), inputs, parts=4)
    report = explain(model, sp_size=4, **inputs)
    assert [
        (each.name, each.bytes_forward) for graph in report.graphs for each in graph.collectives if each.bytes_forward
    ] == [(each.name, each.bytes) for graph in graphs for each in graph.collectives]


def test_frozen_parameters_send_nothing_back() -> None:
    block = Block()
    assert explain(block, x(), sp_size=2).totals.launches_backward == 8 + 2
    block.requires_grad_(False)
    assert explain(block, x(), sp_size=2).totals.launches_backward == 0
    block.o.bias.requires_grad_(True)  # type: ignore[union-attr]
    assert explain(block, x(), sp_size=2).totals.launches_backward == 1


def test_without_gradients() -> None:
    with torch.no_grad():
        totals = explain(Block(), x(), sp_size=2).totals
    assert totals.launches_forward == 3 and totals.launches_backward == 0 == totals.lower_bound_backward
    assert torch.is_grad_enabled()


def test_what_moves_is_no_less_than_the_bound() -> None:
    for parts in (2, 3, 16):
        totals = explain(Broken(), x(), sp_size=parts).totals
        assert 0 < totals.lower_bound_forward <= totals.bytes_forward
        assert 0 < totals.lower_bound_backward <= totals.bytes_backward


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = Block(), Block(), nn.BatchNorm1d(16)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.norm(self.first(x))
        torch._dynamo.graph_break()
        out: Tensor = self.second(y * scale)
        return out


def test_graphs_of_a_model_that_breaks() -> None:
    report = explain(Broken(), x(), scale=2.0, sp_size=2)
    first, second = report.graphs
    assert first.ends.startswith("test_explain.py:") and "graph_break()" in first.ends and not second.ends
    assert "remove the graph break" in first.outputs[0].remedy and "outputs" in second.outputs[0].remedy
    assert first.sites[0].module == "first" and second.sites[0].module == "second"
    assert "ends" in str(report)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        torch._dynamo.graph_break()
        return y * 2


def test_layers_that_share_a_graph_each_count() -> None:
    """Dynamo compiles layers that break once; each of them moves its own bytes."""
    report = explain(nn.Sequential(*[Layer() for _ in range(5)]), x(), sp_size=2)
    assert sum(each.calls for each in report.graphs if each.sites) == 5 > len(report.graphs)
    one, totals = explain(Layer(), x(requires_grad=True), sp_size=2).totals, report.totals
    assert (totals.launches_forward, totals.bytes_forward) == (5 * one.launches_forward, 5 * one.bytes_forward)
    assert totals.lower_bound_forward == 5 * one.lower_bound_forward
    assert totals.flops_sharded == 5 * one.flops_sharded and totals.flops_replicated == 5 * one.flops_replicated
    assert totals.bytes_backward == 5 * one.bytes_backward - 16 * 12 * 4 // 2  # x of the first takes no gradient
    assert "called 4 times" in str(report)


def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **keywords: Any) -> Any:
        return forward(*args, **keywords)

    return wrapper


class Wrapped(Broken):
    forward = wrapped(lambda self, x: self.second(self.first(x)))


def test_paths_begin_at_the_model_whatever_wraps_its_forward() -> None:
    def paths(model: Any) -> list[str]:
        return [each.module for each in explain(model, x(), sp_size=2).graphs[0].sites]

    assert paths(Wrapped()) == ["first", "second"]
    assert paths(nn.Sequential(Block(), nn.Sequential(Block()))) == ["0", "1.0"]
    assert paths(Block()) == [""] and "graph_0  " in str(explain(Block(), x(), sp_size=2))


def test_a_lazy_model_is_called_first() -> None:
    model = nn.Sequential(Block(), nn.LazyLinear(3))
    with pytest.raises(ConfigurationError, match=r"1\.weight has no shape yet: call the lazy model once"):
        explain(model, x(), sp_size=2)
    model(x())
    assert explain(model, x(), sp_size=2).graphs[0].sites


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out: Tensor = self.second(y) if y.sum().item() > 0 else y
        return out


def test_a_model_that_reads_its_values_is_explained_so_far() -> None:
    report = explain(Reads(), x(), sp_size=2)
    assert len(report.graphs) == 1 and "y.sum().item()" in report.incomplete
    assert report.incomplete in str(report)


class Put(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.linear = Block(), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        y = y.put(torch.zeros(1, dtype=torch.int64), y.new_ones(1))
        out: Tensor = self.linear(y)
        return out


def test_a_fallback_with_its_cost_and_remedy() -> None:
    report = explain(Put(), x(), sp_size=2)
    (fallback,) = report.graphs[0].fallbacks
    assert fallback.op == "aten.put" and fallback.cost.bytes == 16 * 12 * 4 // 2
    assert "test_explain.py" in fallback.line and "register_sharding_rule" in fallback.remedy
    assert report.totals.flops_replicated == 2 * 16 * 12 * 12
    assert "aten.put" in str(report) and "register_sharding_rule" in str(report)


class Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 2


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        y = Gathered.apply(self.first(x))
        y = torch.cond(y.shape[1] > 3, lambda t: t.sin(), lambda t: t.cos(), (y,))
        out: Tensor = self.second(y)
        return out


def test_opaque_parts_pass_gradients_on() -> None:
    report = explain(Opaque(), x(), sp_size=2)
    back = {each.name for each in report.graphs[0].collectives if each.launches_backward}
    assert {"replicate_first_q_weight", "replicate_second_q_weight"} <= back
    assert any("autograd_function_apply" in each for each in report.totals.flops_unknown)
    assert "not counted: autograd_function_apply" in str(report)


def test_nothing_to_shard_and_what_cannot_be_captured() -> None:
    report = explain(nn.Linear(12, 12), torch.randn(3, 12), sp_size=8)
    assert report.graphs[0].unsharded == "nothing to shard" and report.totals.bytes_forward == 0
    assert "nothing to shard" in str(report)

    def hooked(x: Tensor) -> Tensor:
        y = x * 2
        y.register_hook(lambda g: g * 2)
        return y * 1

    report = explain(hooked, torch.randn(3, requires_grad=True), sp_size=8)
    assert "hook" in report.graphs[0].unsharded and report.model == "hooked"


class Head(nn.Module):
    """The loss beside the logits, which nobody asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(12, 61)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.block(x))
        return logits.square().mean(), logits


def test_outputs_that_are_dear() -> None:
    loss, logits = explain(Head(), x(), sp_size=2).graphs[0].outputs
    assert not loss.expensive and loss.bytes == 0
    assert logits.expensive and logits.bytes == 16 * 61 * 4 // 2 and "outputs" in logits.remedy
    kept = explain(Head(), x(), sp_size=2, options={"outputs": "shard"})
    assert not any(each.expensive or each.bytes for each in kept.graphs[0].outputs)


def test_time_by_the_links() -> None:
    totals = explain(Block(), x(), sp_size=2, links=Links(bandwidth=1e6, latency=1e-3)).totals
    assert totals.seconds is not None
    assert totals.seconds["forward"] == pytest.approx(3e-3 + totals.bytes_forward / 1e6)


def test_plain_data_that_json_takes_and_a_page() -> None:
    report = explain(MODELS["llama"](), sp_size=2, **inputs_of("llama", 32))
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == data
    (graph,) = data["graphs"]
    names = {op["name"] for op in graph["ops"]}
    assert all(set(op["operands"]) <= names for op in graph["ops"])
    assert {op["placement"] for op in graph["ops"]} == {"input", "output", "collective", "sharded", "replicated"}
    by_name = {op["name"]: op for op in graph["ops"]}
    linear = by_name["linear"]
    assert (linear["module"], linear["shape"], linear["local_shape"]) == (
        "model.layers.0.self_attn.q_proj",
        [1, 32, 32],
        [1, 16, 32],
    )
    assert linear["layout"] == "S(1: 32)" and linear["flops"] == 2 * 32 * 32 * 32
    assert "<html" in report.to_html()


def test_identical_layers_are_one_line() -> None:
    text = str(explain(MODELS["llama"](), sp_size=2, **inputs_of("llama", 32)))
    (line,) = [line for line in text.splitlines() if line.startswith("model.layers.*.self_attn")]
    assert line.startswith("model.layers.*.self_attn ×2") and "ulysses" in line and "32" in line
    assert text.count("gather_seq_scatter_heads_qkv") == 1 and "gather_output_0" in text


@pytest.mark.parametrize("size", [1, 0, -3])
def test_too_few_ranks(size: int) -> None:
    with pytest.raises(ConfigurationError, match="2 ranks or more"):
        explain(Block(), x(), sp_size=size)


# Large models


def llama_8b(layers: int) -> tuple[nn.Module, Tensor]:
    with torch.device("meta"):
        config = LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=131072,
        )
        return LlamaForCausalLM(config).to(torch.bfloat16), torch.zeros(1, 131072, dtype=torch.int64)


@pytest.mark.parametrize("parts", [8, 64, 1024])
def test_a_layer_of_llama_8b(parts: int) -> None:
    model, ids = llama_8b(1)
    (site,) = explain(model, ids, labels=ids, use_cache=False, sp_size=parts).graphs[0].sites
    local = 131072 * 4096 * 2 // parts
    told = {each.strategy: each.bytes for each in site.others} | {site.strategy: site.bytes}
    assert (site.heads, site.kv_heads, site.length) == (32, 8, 131072)
    assert parts != 8 or (site.strategy, site.bytes) == ("ulysses", 280 * 2**20)
    assert parts == 1024 or told["ulysses"] == (2 + 2 * max(8, parts) / 32) * local * (parts - 1) / parts
    assert told["all_gather_kv"] == 2 * local * (parts - 1)  # after K and V are repeated, so without the factor 1/4


# What it leaves as it was


def test_the_model_its_values_gradients_buffers_and_mode() -> None:
    model = Broken().train()
    model(x()).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    given, copied = (t := x()), t.clone()
    explain(model, given, sp_size=2)
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for old, p in zip(gradients, model.parameters(), strict=True):
        assert type(p) is nn.Parameter and (p.grad is None if old is None else torch.equal(old, p.grad))
    assert torch.equal(given, copied) and type(given) is Tensor


def test_random_numbers() -> None:
    model = nn.Sequential(Block(), nn.Dropout(0.5)).train()
    given, state = x(), torch.get_rng_state()
    explain(model, given, sp_size=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_graph_is_recorded_and_no_group_left() -> None:
    known = known_graphs()
    explain(Block(), x(), sp_size=2)
    explain(nn.Linear(12, 12), x(), sp_size=2)
    assert known_graphs() == known
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match=r"sp_compile\.explain"):
        torch._C._distributed_c10d._resolve_process_group("sp_compile.explain on 2 ranks")  # type: ignore[arg-type]


def counting_backend(compiled: list[Any]) -> Callable[..., Any]:
    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append([each.shape for each in inputs if isinstance(each, Tensor)])
        return gm.forward

    return backend


def test_what_dynamo_has_compiled_before() -> None:
    torch._dynamo.reset()
    model, compiled = Broken(), list[Any]()
    call = torch.compile(model, backend=counting_backend(compiled))
    call(x())
    assert len(compiled) == 2
    explain(model, x(), sp_size=2)
    explain(call, x(32 // 2), sp_size=2)
    call(x())
    assert len(compiled) == 2


def test_what_dynamo_compiles_after() -> None:
    """Lengths that it saw here do not make another length dynamic."""
    torch._dynamo.reset()
    model, compiled = Block(), list[Any]()
    explain(model, x(64), sp_size=2)
    call = torch.compile(model, backend=counting_backend(compiled))
    counts = []
    for length in (16, 24, 28):
        call(x(length))
        counts.append(len(compiled))
    assert counts == [1, 2, 2]


def test_an_error_in_the_model_is_the_users_and_leaves_no_group() -> None:
    with pytest.raises(RuntimeError, match=r"shape|size"):
        explain(Block(), torch.randn(1, 16, 13), sp_size=2)
    assert explain(Block(), x(), sp_size=2).graphs[0].sites


def test_a_function_that_closes_over_a_model() -> None:
    model = Broken()
    before = model.norm.running_mean.clone()  # type: ignore[union-attr, operator]

    def call(t: Tensor) -> Tensor:
        out: Tensor = model(t).sum()
        return out

    report = explain(call, x(), sp_size=2)
    assert len(report.graphs) == 3 and report.graphs[0].sites[0].module.endswith("first")
    assert torch.equal(model.norm.running_mean, before)  # type: ignore[arg-type]


# The command line


def small_block() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Block(), (x(),)


def by_name() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    return Broken(), (x(),), {"scale": 2.0}


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["explain", f"{__name__}:small_block", "--sp-size", "4", "--html", str(page)]) == 0
    assert "Block on 4 ranks" in capsys.readouterr().out and "<html" in page.read_text()
    assert main(["explain", f"{__name__}:by_name"]) == 0
    assert "Broken on 8 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("json", "MODULE:CALLABLE"),
        ("json:", "MODULE:CALLABLE"),
        (":x", "MODULE:CALLABLE"),
        (":", "MODULE:CALLABLE"),
        (".json:x", "MODULE:CALLABLE"),
        ("json..decoder:x", "MODULE:CALLABLE"),
        ("json/decoder.py:x", "MODULE:CALLABLE"),
        ("no_such_module:f", "no_such_module"),
        ("json:nothing", "nothing"),
        (f"{__name__}:x", "(model, args)"),
    ],
)
def test_command_line_says_what_is_wrong(capsys: pytest.CaptureFixture[str], target: str, said: str) -> None:
    with pytest.raises(SystemExit) as error:
        main(["explain", target])
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for page, said in (
        (tmp_path / "no" / "page.html", "there is no folder"),
        (tmp_path / "file" / "page.html", "there is no folder"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(SystemExit) as error:
            main(["explain", "no_such_module:f", "--html", str(page)])
        assert error.value.code == 2 and said in capsys.readouterr().err


# Sizes at which one device would have no memory


@pytest.mark.parametrize("length", [2**31 - 1, 2**31, 2**33 + 7, 2**40])
def test_sequences_of_any_length(length: int) -> None:
    """The products of attention are counted by its shapes: an L x L tensor would have more bytes than torch counts."""
    report = explain(Block().to("meta"), torch.empty(1, length, 12, device="meta"), sp_size=8)
    linear = 2 * length * sum(p.numel() for p in Block().parameters() if p.dim() == 2)
    assert report.totals.flops_sharded + report.totals.flops_replicated >= 4 * length**2 * 12 + linear
    assert report.graphs[0].sites[0].length == length and not report.totals.flops_unknown
    assert f"{length}" in report.to_html() and f"{length:,}" in str(report)


def test_a_value_that_torch_cannot_count_is_told_of() -> None:
    def by_hand(x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x

    with pytest.raises(ConfigurationError, match=r"(?s)more elements or bytes than torch can count.*overflow"):
        explain(by_hand, torch.empty(1, 2**31, 12, device="meta"), sp_size=8)
    with pytest.raises(ConfigurationError, match=r"sp_size is 2\.5"):
        explain(by_hand, torch.empty(1, 7, 12, device="meta"), sp_size=2.5)  # type: ignore[arg-type]
