"""capture: the bare ATen graph, run eagerly, does what the model does: values, gradients, buffers,
updated inputs and the state of the random generator."""

import copy
import math
import re
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._higher_order_ops.scan import scan
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from sp_compile.capture.capture import CapturedGraph, capture, user_line
from sp_compile.errors import CaptureError

aten = torch.ops.aten
WHOLE = {
    aten.linear.default,
    aten.layer_norm.default,
    aten.scaled_dot_product_attention.default,
    aten.matmul.default,
    aten.cross_entropy_loss.default,
    aten.dropout.default,
    aten.softmax.int,
    aten.embedding.default,
    aten.gelu.default,
    aten.conv2d.default,
}
Step = tuple[list[Any], list[Any], list[Any], list[Any]]


def stays_whole(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return op in WHOLE


class Program(nn.Module):
    """`f(modules, *inputs)` as a module."""

    def __init__(self, f: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self.f, self.parts = f, nn.ModuleList(modules)

    def forward(self, *inputs: Any) -> Any:
        return self.f(self.parts, *inputs)


def one_step(model: nn.Module, call: Callable[..., Any], inputs: Any, labels: Any) -> Step:
    """Outputs, gradients, buffers and updated inputs after one forward and backward."""
    torch.manual_seed(0)
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    used = [x * 1 if x.is_floating_point() else x.clone() for x in leaves]
    outputs = call(*used, **labels)
    flat = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
    weighted = [(x.float() * torch.linspace(0.5, 1, x.numel()).view(x.shape)).sum() for x in flat if x.requires_grad]
    if weighted:
        torch.stack(weighted).sum().backward()
    gradients = [x.grad for x in (*model.parameters(), *leaves)]
    return flat, gradients, [*model.buffers(), torch.get_rng_state()], used


def run(
    model: nn.Module,
    *inputs: Tensor,
    dynamic: bool | None = None,
    tolerance: float = 1e-5,
    change: Callable[[GraphModule], None] = lambda gm: None,
    **labels: Any,
) -> list[CapturedGraph]:
    """Compare the model with its captured graphs (through `change`), and return those."""
    captured: list[CapturedGraph] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> GraphModule:
        captured.append(capture(gm, example_inputs, stays_whole))
        change(captured[-1].graph_module)
        captured[-1].graph_module.recompile()
        return captured[-1].graph_module

    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    expected = one_step(model, model, inputs, labels)
    actual = one_step(twin, torch.compile(twin, backend=backend, dynamic=dynamic), inputs, labels)
    for of_model, of_graph in zip(expected, actual, strict=True):
        for a, b in zip(of_model, of_graph, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
    assert captured
    for graph in captured:
        assert_canonical(graph)
    return captured


def assert_canonical(captured: CapturedGraph) -> None:
    graph = captured.graph_module.graph
    placeholders = graph.find_nodes(op="placeholder")
    written = []
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        written.append(placeholders.index(node.args[0]))
    assert tuple(written) == captured.mutated_inputs
    for node, value in zip(placeholders, captured.inputs, strict=True):
        assert node.meta["val"] is value
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert "val" in node.meta and "view" not in node.target.name().split("::")[1].split("_")
            assert not node.target._schema.is_mutable or node.target is aten.copy_.default


def targets(captured: CapturedGraph) -> list[Any]:
    return [node.target for node in captured.graph_module.graph.nodes]


def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(6, 6)


def matrix(*shape: int) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(shape or (6, 6), requires_grad=True)


def writes_to_views(m: Any, x: Tensor) -> Any:
    y = m[0](x)
    y[:, 1:3] = y[:, :2] * 2
    y.masked_fill_(y > 1, 0.5)
    y.index_put_((torch.tensor([0, 1]),), y[2:4] * 3)
    y[0].copy_(x[1])
    y.diagonal().zero_()
    return y.view(-1), y.t().relu_()


def writes_to_its_input(m: Any, x: Tensor) -> Any:
    before = x + 3
    x.mul_(2)
    return x, before, m[0](x)


def without_gradient(m: Any, x: Tensor) -> Tensor:
    y = m[0](x)
    with torch.no_grad():
        z = m[1](y)
    return y * z


def view_without_gradient(m: Any, x: Tensor) -> Any:
    y = m[0](x)
    y[:, 1:3] = 0.3
    with torch.no_grad():
        z = y.t()
    return y.sin(), z


def view_used_without_gradient(m: Any, x: Tensor) -> Any:
    y = m[0](x)
    z = y.t()
    y[:, 1:3] = 0.3
    with torch.no_grad():
        u = z.cos()
    return z.sin() * u


def same_view_without_gradient(m: Any, x: Tensor) -> Any:
    y = m[0](x)
    with torch.no_grad():
        z = y[0:6], y.view(6, 6), y.expand_as(y)
    return y.sin(), *z


def in_autocast(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        y = m[0](x)
        with torch.autocast("cpu", enabled=False):
            z = m[1](y.float())
        rows = torch.zeros(6, 6, dtype=y.dtype)
        rows[torch.tensor([0, 1])] = y[:2]
        return y, z, rows, F.cosine_similarity(y, y + 1), F.mse_loss(y, z)


def checkpointed(m: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda t: m[1](F.dropout(m[0](t), 0.2).sin()), x, use_reentrant=False)


def in_place_after_dropout(m: Any, x: Tensor) -> Any:
    y = m[0](x)
    return F.dropout(y, 0.5, training=False).add_(1), F.dropout(y, 0.5).mul_(2), y


def draws(m: Any, x: Tensor) -> Tensor:
    torch.rand(3)  # dead, and still drawn
    noise = torch.empty(6, 6).uniform_() + torch.zeros(6, 6).bernoulli_(0.3)
    return F.dropout1d(m[0](x)[None], 0.3) + F.gumbel_softmax(m[0](x)) * noise


def buffer_update(m: Any, x: Tensor) -> Tensor:
    m[0].weight_sum.add_(x.detach().sum(0))
    return m[0](x) * m[0].weight_sum


def with_buffer() -> nn.Module:
    module = linear()
    module.register_buffer("weight_sum", torch.ones(6))
    return module


def attention(m: Any, x: Tensor) -> Any:
    return m[0](x, x, x)


class TripledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * 3


class Flipped(torch.autograd.Function):
    """A view of its input, with the gradient reversed; and a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x.view_as(x), (x @ w).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        return -0.5 * gradients[0] * x, x.t() @ x * gradients[1]


def custom_backwards(m: Any, x: Tensor) -> Any:
    y, z = Flipped.apply(m[0](x), m[0].weight)
    with torch.no_grad():
        u = TripledGradient.apply(y)
    return TripledGradient.apply(TripledGradient.apply(y)) * u, z, m[0].weight * z


def transforms(m: Any, x: Tensor) -> Any:
    y = torch.vmap(lambda row: torch.vmap(torch.sin)(row) * m[0].bias)(m[0](x))
    return y, torch.func.grad(lambda t: (t.sin() * m[0].weight).sum())(y.cos())


def branches(m: Any, x: Tensor) -> Any:
    y = m[0](x)
    return torch.cond(y.sum() > 0, lambda t: t.sin() * m[0].bias, torch.cos, (y,)), *scan(
        lambda c, t: (c * 0.5 + t, c + t * m[0].bias), y[0] * 2, y
    )


def opaque_in_checkpoint(m: Any, x: Tensor) -> Any:
    return checkpoint(lambda t: F.dropout(TripledGradient.apply(m[0](t)), 0.5), x, use_reentrant=False)


@torch.compiler.nested_compile_region
def repeated(m: Any, x: Tensor) -> Tensor:
    return F.dropout(TripledGradient.apply(m[0](x)), 0.3)


def regions(m: Any, x: Tensor) -> Any:
    return repeated(m, repeated(m, x)), checkpoint(lambda t: repeated(m, t).sin(), x, use_reentrant=False)


def alike_by_name(m: Any, x: Tensor) -> Any:
    y = torch.vmap(torch.sin)(m[0](x))
    z = checkpoint(lambda t: torch.vmap(torch.cos)(m[0](t)), x, use_reentrant=False)
    return y, z, checkpoint(lambda t: torch.vmap(torch.exp)(m[0](t)), x, use_reentrant=False)


def opaque_draw(m: Any, x: Tensor) -> Any:
    torch.vmap(torch.rand_like, randomness="different")(x)  # dead, and still drawn
    return F.dropout(m[0](x))


LABELS = torch.tensor([0, 1, 2, -100, 3, 4])
PROGRAMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(linear(), nn.GELU(), nn.LayerNorm(6), linear()), (6, 6)),
    "batch_norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        (2, 3, 5, 5),
    ),
    "tied": (lambda: Program(lambda m, x: F.linear(m[0](x).sin(), m[0].weight), linear()), (6, 6)),
    "views": (lambda: Program(writes_to_views, linear()), (6, 6)),
    "input": (lambda: Program(writes_to_its_input, linear()), (6, 6)),
    "buffer": (lambda: Program(buffer_update, with_buffer()), (6, 6)),
    "no_grad": (lambda: Program(without_gradient, linear(), linear()), (6, 6)),
    "no_grad view": (lambda: Program(view_without_gradient, linear()), (6, 6)),
    "view in no_grad": (lambda: Program(view_used_without_gradient, linear()), (6, 6)),
    "same view in no_grad": (lambda: Program(same_view_without_gradient, linear()), (6, 6)),
    "autocast": (lambda: Program(in_autocast, linear(), linear()), (6, 6)),
    "checkpoint": (lambda: Program(checkpointed, linear(), linear()), (6, 6)),
    "cross_entropy": (
        lambda: Program(lambda m, x: F.cross_entropy(m[0](x), LABELS), linear()),
        (6, 6),
    ),
    "custom backward": (lambda: Program(custom_backwards, linear()), (6, 6)),
    "transforms": (lambda: Program(transforms, linear()), (6, 6)),
    "branches": (lambda: Program(branches, linear()), (6, 6)),
    "opaque in checkpoint": (lambda: Program(opaque_in_checkpoint, linear()), (6, 6)),
    "opaque parts alike by name": (lambda: Program(alike_by_name, linear()), (6, 6)),
    "opaque draw": (lambda: Program(opaque_draw, linear()), (6, 6)),
    "dropout": (lambda: Program(in_place_after_dropout, linear()), (6, 6)),
    "draws": (lambda: Program(draws, linear()), (6, 6)),
    "attention": (lambda: Program(attention, nn.MultiheadAttention(6, 2, 0.1)), (5, 2, 6)),
    "encoder": (lambda: nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), (2, 5, 6)),
}


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_graph_does_what_the_model_does(name: str, dynamic: bool | None) -> None:
    make, shape = PROGRAMS[name]
    run(make(), matrix(*shape), dynamic=dynamic, tolerance=2e-2 if name == "autocast" else 1e-5)


def hugging_face(name: str, attention: str) -> tuple[nn.Module, Tensor, Tensor]:
    transformers = pytest.importorskip("transformers")
    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"intermediate_size": 64}
    torch.manual_seed(0)
    tokens = torch.randint(0, 64, (2, 9))
    if name == "llama":
        config = transformers.LlamaConfig(**size, num_key_value_heads=2, vocab_size=64)
    elif name == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=1)
    elif name == "bert":
        config = transformers.BertConfig(**size, vocab_size=64)
    else:
        config = transformers.ViTConfig(**size, image_size=8, patch_size=2)
    config._attn_implementation = attention
    if name == "vit":
        model = transformers.ViTForImageClassification(config)
        return model.train(), torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    head = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    return head.from_config(config).train(), tokens, tokens


@pytest.mark.parametrize(("attention", "dynamic"), [("sdpa", None), ("sdpa", True), ("eager", None)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_hugging_face(name: str, attention: str, dynamic: bool | None) -> None:
    model, inputs, labels = hugging_face(name, attention)
    captured = run(model, inputs, labels=labels, dynamic=dynamic, tolerance=2e-5)
    assert aten.linear.default in targets(captured[0]) or aten.addmm.default in targets(captured[0])
    found = targets(captured[0]).count(aten.scaled_dot_product_attention.default)
    assert found == (2 if attention == "sdpa" else 0)
    for node in captured[0].graph_module.graph.find_nodes(op="call_function", target=aten.softmax.int):
        assert node.stack_trace and node.meta["nn_module_stack"]


def drop_epilogue(gm: GraphModule) -> None:
    for node in gm.graph.find_nodes(op="call_function", target=aten.copy_.default):
        gm.graph.erase_node(node)


def enable_gradients(gm: GraphModule) -> None:
    for node in gm.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
        gm.graph.erase_node(node)


def drop_dead_draw(gm: GraphModule) -> None:
    gm.graph.erase_node(gm.graph.find_nodes(op="call_function", target=aten.rand.default)[0])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("batch_norm", drop_epilogue),
        ("input", drop_epilogue),
        ("no_grad", enable_gradients),
        ("draws", drop_dead_draw),
    ],
)
def test_the_comparison_sees_a_planted_wrong(name: str, wrong: Callable[[GraphModule], None]) -> None:
    make, shape = PROGRAMS[name]
    with pytest.raises(AssertionError, match=r"not (close|equal)"):
        run(make(), matrix(*shape), change=wrong)


def test_autocast_and_no_grad_keep_their_nodes() -> None:
    (graph,) = run(Program(without_gradient, linear(), linear()), matrix())
    grad_mode = torch._C._set_grad_enabled
    assert targets(graph)[5:10] == [
        aten.linear.default, grad_mode, aten.linear.default, grad_mode, aten.mul.Tensor
    ]  # fmt: skip
    (graph,) = run(Program(in_autocast, linear(), linear()), matrix(), tolerance=2e-2)
    first = graph.graph_module.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
    assert first.meta["val"].dtype == torch.bfloat16
    assert targets(graph).count(torch.amp.autocast_mode._enter_autocast) == 2


def test_composite_operators_are_decomposed_unless_kept() -> None:
    (graph,) = run(Program(lambda m, x: F.rms_norm(m[0](x), (6,)), linear()), matrix())
    assert aten.linear.default in targets(graph)
    assert aten.rms_norm.default not in targets(graph)
    assert not any(
        isinstance(t, torch._ops.OpOverload) and t._can_decompose() and t not in WHOLE
        for t in targets(graph)
        if t is not aten.reshape.default
    )


def test_an_operator_that_may_raise_an_error_stays_whole() -> None:
    (graph,) = run(Program(lambda m, x: torch.linalg.cholesky(x.diag().exp().diag()), linear()), matrix())
    assert aten.linalg_cholesky.default in targets(graph)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
        graph.graph_module(torch.full((6, 6), -math.inf))


def test_nested_compile_regions_are_inlined() -> None:
    (graph,) = run(Program(regions, linear()), matrix())
    assert targets(graph).count(aten.linear.default) == 3
    parts = [str(node.target) for node in graph.graph_module.graph.nodes if node.op == "call_module"]
    assert len(parts) == 3 and all(part.startswith("autograd_function_apply") for part in parts)


def saved_for_backward(tagged: bool) -> int:
    saved: list[int] = []

    def forward_compiler(gm: GraphModule, _: Any) -> GraphModule:
        saved.append(len(gm.graph.output_node().args[0]))
        return gm

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        graph = capture(gm, example_inputs, stays_whole).graph_module
        policies = [node.meta.get("recompute") for node in graph.graph.nodes]
        assert CheckpointPolicy.PREFER_RECOMPUTE in policies
        for node in graph.graph.nodes:
            if not tagged:
                node.meta.pop("recompute", None)
        return torch._dynamo.backends.common.aot_autograd(
            fw_compiler=forward_compiler, partition_fn=min_cut_rematerialization_partition
        )(graph, example_inputs)

    def block(m: Any, x: Tensor) -> Tensor:
        def body(t: Tensor) -> Tensor:
            for _ in range(4):
                t = m[0](t).softmax(-1)
            return t

        return cast(Tensor, checkpoint(body, x, use_reentrant=False))

    torch._dynamo.reset()
    torch.compile(Program(block, linear(), linear()), backend=backend)(matrix()).sum().backward()
    return saved[0]


def test_checkpoint_still_saves_memory() -> None:
    assert saved_for_backward(tagged=True) < saved_for_backward(tagged=False)


def test_empty_cache_is_no_operand_of_cat() -> None:
    (graph,) = run(Program(lambda m, x: torch.cat([torch.empty(0), m[0](x)], -2), linear()), matrix())
    assert aten.cat.default not in targets(graph)


def test_negative_padding_is_a_slice() -> None:
    (graph,) = run(Program(lambda m, x: F.pad(m[0](x), (-1, 2, 1, -3), value=2.0), linear()), matrix())
    (pad,) = graph.graph_module.graph.find_nodes(op="call_function", target=aten.constant_pad_nd.default)
    assert pad.args[1] == [0, 2, 1, 0] and targets(graph).count(aten.slice.Tensor) == 2


@pytest.mark.parametrize("grad", [True, False])
def test_a_patch_embedding_is_a_linear_map_of_patches(grad: bool) -> None:
    """Not where a view in another grad mode than the convolution would let a gradient through."""

    def embed(parts: Any, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(grad):
            y = parts[0](x)
        return y.flatten(2).transpose(1, 2) * x.sum()

    (captured,) = run(Program(embed, nn.Conv2d(3, 8, 2, 2)), torch.randn(2, 3, 4, 6, requires_grad=True))
    targets = [node.target for node in captured.graph_module.graph.nodes]
    assert (aten.linear.default in targets) == grad and (aten.conv2d.default in targets) != grad


def test_user_line_and_short_names() -> None:
    names: list[str] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> GraphModule:
        graph = capture(gm, example_inputs, stays_whole).graph_module
        node = graph.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
        assert re.match(r"test_capture\.py:\d+ in without_gradient: y = m\[0\]", user_line(node))
        names.extend(n.name for n in graph.graph.find_nodes(op="placeholder"))
        return graph

    torch._dynamo.reset()
    torch.compile(Program(without_gradient, linear(), linear()), backend=backend)(matrix())
    assert names == ["parts_0_weight", "parts_0_bias", "inputs_0", "parts_1_weight", "parts_1_bias"]


@torch._dynamo.allow_in_graph
def opaque_to_dynamo(x: Tensor) -> Tensor:
    return TripledGradient.apply(x)


def clamped_weight(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m[0].weight.clamp_(0)
    return m[0](x)


def inference(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        x = x * 2
    return x + 1


def write_to_what_an_opaque_part_shares(m: Any, x: Tensor) -> Tensor:
    y = m[0](x)
    z = torch.vmap(lambda row: row[1:])(y)
    y.add_(1)
    return z


def write_in_an_opaque_part(m: Any, x: Tensor) -> Tensor:
    y = m[0](x)
    torch.vmap(lambda row: row.add_(1))(y)
    return y


def hooked(m: Any, x: Tensor) -> Tensor:
    y = m[0](x)
    y.register_hook(lambda gradient: gradient * 2)
    return y.sin()


def checked(m: Any, x: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(m[0](x) @ m[0](x).mT + torch.eye(6))
    aten._linalg_check_errors(info, "checked", is_matrix=True)
    return factor


def view_of_written_input(m: Any, x: Tensor) -> Any:
    x.mul_(2)
    return x.view(-1)


def clamped_data(m: Any, x: Tensor) -> Tensor:
    m[0].weight.data.clamp_(0)
    return m[0](x)


UNSAFE: dict[str, tuple[Callable[..., Any], str]] = {
    "opaque custom backward": (lambda m, x: opaque_to_dynamo(m[0](x)), "custom backward"),
    "weight written under no_grad": (clamped_weight, "unseen by autograd.*weight.clamp_"),
    "weight written as data": (clamped_data, "unseen by autograd.*weight.data.clamp_"),
    "detached write": (lambda m, x: (y := m[0](x), y.detach().add_(1), y)[2], "unseen by autograd"),
    "inference mode": (inference, "_enter_inference_mode"),
    "write to what vmap shares": (write_to_what_an_opaque_part_shares, "memory that an opaque part"),
    "error below a given result": (
        lambda m, x: torch.linalg.inv(torch.eye(6), out=torch.empty(6, 6)) + m[0](x),
        "the effect of aten._linalg_check_errors.default would be lost",
    ),
    "error of its own": (checked, "the effect of aten._linalg_check_errors.default would be lost"),
    "hook": (hooked, "register_hook has effects"),
    "write in vmap": (write_in_an_opaque_part, "vmap_0 writes to what it is given"),
    "view of a written input": (view_of_written_input, "view of an input"),
    "memory around a view": (lambda m, x: m[0](x)[1:].as_strided((2, 2), (4, 1), 0), "as_strided.default reads memory"),
    "saved noise": (lambda m, x: F.rrelu(m[0](x), training=True), "rrelu"),
}


def refusal(gm: GraphModule, example_inputs: list[Any]) -> str:
    """Why a graph is not captured, or must not be run as it was captured."""
    try:
        return capture(gm, example_inputs, stays_whole).refusal
    except CaptureError as error:
        return str(error)


@pytest.mark.parametrize("name", UNSAFE)
def test_what_would_lose_meaning_is_refused(name: str) -> None:
    program, reason = UNSAFE[name]

    def backend(gm: GraphModule, example_inputs: list[Any]) -> GraphModule:
        assert re.search(reason, refusal(gm, example_inputs))
        return gm

    torch._dynamo.reset()
    compiled = torch.compile(Program(program, linear()), backend=backend)
    compiled(matrix() * 1)


def test_a_refusal_leaves_no_state_behind() -> None:
    def refused(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            return write_in_an_opaque_part(m, x)

    def backend(gm: GraphModule, example_inputs: list[Any]) -> GraphModule:
        with pytest.raises(CaptureError, match="writes to what it is given"):
            capture(gm, example_inputs, stays_whole)
        assert not torch.is_autocast_enabled("cpu") and torch.backends.cuda.flash_sdp_enabled()
        return gm

    torch._dynamo.reset()
    torch.compile(Program(refused, linear()), backend=backend)(matrix())


def test_a_choice_of_attention_kernels_stays_where_it_is() -> None:
    def chosen(m: Any, x: Tensor) -> Tensor:
        y = m[0](x)[None, None]
        with sdpa_kernel(SDPBackend.MATH):
            y = F.scaled_dot_product_attention(y, y, y)
        return F.scaled_dot_product_attention(y, y, y)

    (graph,) = run(Program(chosen, linear()), matrix())
    sdpa = aten.scaled_dot_product_attention.default
    order = [t for t in targets(graph) if t in (torch.nn.attention._sdpa_kernel, sdpa)]
    assert order == [torch.nn.attention._sdpa_kernel, sdpa, torch.nn.attention._sdpa_kernel, sdpa]
    traced: list[OpOverload] = []

    def compiler(gm: GraphModule, _: Any) -> GraphModule:
        traced.extend(node.target for node in gm.graph.nodes if isinstance(node.target, OpOverload))
        return gm

    with torch.no_grad():
        aot_autograd(fw_compiler=compiler)(graph.graph_module, list(graph.inputs))
    assert traced.count(aten._scaled_dot_product_flash_attention_for_cpu.default) == 1


def written_and_shared(x: Tensor, y: Tensor) -> Tensor:
    x.add_(1)
    return y * 2


def written_and_viewed(x: Tensor, y: Tensor) -> Tensor:
    torch._foreach_mul_([x], 2)
    return x[1:]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (written_and_shared, r"L_x_ .*shares its memory with input L_y_ \(.* written_and_shared: x\.add_\(1\)\)"),
        (written_and_viewed, r"output 0 is a view of an input .* \(.* written_and_viewed: torch\._foreach_mul_.*\)"),
    ],
)
def test_writes_that_cannot_be_captured_are_told_with_their_line(body: Callable[..., Tensor], said: str) -> None:
    def backend(gm: GraphModule, example_inputs: list[Any]) -> GraphModule:
        with pytest.raises(CaptureError, match=said):
            capture(gm, example_inputs, stays_whole)
        return gm

    torch._dynamo.reset()
    base = torch.zeros(4)
    torch.compile(body, backend=backend)(base[:3], base[1:])
