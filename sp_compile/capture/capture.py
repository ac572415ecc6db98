"""Dynamo graph → one functional, canonical, pre-dispatch ATen graph.

    def forward(self, x, w):                       def forward(self, x, w):
        y = torch._C._nn.linear(x, w)                  clone = aten.clone.default(x)
        y[:, 0] = 0                          →         linear = aten.linear.default(clone, w)
        z = y.view(6, 4)                               select = aten.select.int(linear, 1, 0)
        x.add_(1)                                      …  fill, select_scatter, reshape
        return (z,)                                    add = aten.add.Tensor(clone, 1)
                                                       copy_ = aten.copy_.default(x, add)
                                                       return (reshape,)

The graph means what the Dynamo graph means, also when it is run eagerly: values, gradients, random
draws, updated inputs. What cannot be shown to keep that meaning raises `CaptureError`; or is a refusal of the captured
graph, where the graph can at least be read: nobody needs to hear of one in which there is nothing to shard.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch._decomp import decomposition_table
from torch._functorch import predispatch
from torch._guards import TracingContext, detect_fake_mode
from torch._higher_order_ops.effects import _get_effect
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch._ops import HigherOrderOperator, OpOverload
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.distributed._local_tensor import LocalTensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import PythonKeyTracer, get_proxy_mode, make_fx, track_tensor_tree
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.traceback import get_current_meta, preserve_node_meta
from torch.nn.attention import _cur_sdpa_kernel_backends, sdpa_kernel
from torch.overrides import _pop_mode, _push_mode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import CheckpointPolicy, _CachingTorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from sp_compile.capture.canonicalize import canonical
from sp_compile.capture.opaque import CONTEXT_FN, RETRACED, collapse
from sp_compile.capture.region import in_replicated_region
from sp_compile.distributed.sharded_input import ShardedInput
from sp_compile.errors import CaptureError, place_of, user_line
from sp_compile.ir.effects import (
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
    GRAD_MODE,
    SDPA_BACKEND,
    SDPA_BACKENDS,
    STATE,
    memory_order,
)

aten = torch.ops.aten

Keep = Callable[[OpOverload | HigherOrderOperator, tuple[Any, ...], dict[str, Any]], bool]

_NO_EFFECT = (torch._C._log_api_usage_once, predispatch.lazy_load_decompositions, SDPA_BACKEND, torch.broadcast_shapes)
DATA = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]
_MASKS = {op: decomposition_table[op] for op in (aten.tril.default, aten.triu.default)}
"""Written out, they compare the places of rows and columns, so that a rank makes its rows of such a mask."""
_DROPOUTS = (
    aten.dropout.default,
    aten.alpha_dropout.default,
    aten.feature_dropout.default,
    aten.feature_alpha_dropout.default,
)


@dataclass(frozen=True)
class CapturedGraph:
    """`graph_module` has Dynamo's placeholders and output; `inputs` are fakes for the former, and
    `mutated_inputs` the positions of those that it writes to, at its end. `replicated` are the nodes
    that the user put in a `replicated_region()`, `output_names` the variables that outputs were last
    assigned to. `refusal` is why the graph must not be run in place of Dynamo's; empty if it may."""

    graph_module: GraphModule
    inputs: tuple[Any, ...]
    mutated_inputs: tuple[int, ...]
    replicated: frozenset[Node]
    output_names: tuple[str, ...]
    refusal: str = ""


def capture(gm: GraphModule, example_inputs: Sequence[Any], keep: Keep) -> CapturedGraph:
    """Trace a Dynamo graph to ATen, whole where `keep` says so and decomposed elsewhere.

    `keep(op, args, kwargs)` tells of a call of a composite operator whether it stays whole; all
    others are decomposed until none is left. Likewise of a higher-order operator, by itself: one that
    does not stay as it is becomes an opaque part (see `opaque`). Raises `CaptureError` where meaning would be lost.
    """
    gm = collapse(gm, lambda op: keep(op, (), {}))
    _reject_unsafe_nodes(gm)
    fake_mode, inputs = _fakify(example_inputs)
    traced, written, returned, refusal = _trace(gm, fake_mode, inputs, keep)
    mutated = tuple(written)
    graph_module = canonical(traced, gm, inputs, mutated, returned)
    _reject_shared_storage(gm, example_inputs, written)
    replicated = frozenset(filter(in_replicated_region, graph_module.graph.nodes))
    names = tuple(str(output) for output in gm.graph.output_node().args[0])  # type: ignore[union-attr]
    subclass = next((x for x in example_inputs if _is_foreign_subclass(x)), None)
    if subclass is not None:
        refusal = f"an input is a tensor subclass ({type(subclass).__name__})"
    return CapturedGraph(graph_module, tuple(inputs), mutated, replicated, names, refusal)


def _bodies(gm: GraphModule) -> Iterator[GraphModule]:
    """`gm` and the bodies below it that are traced through."""
    yield gm
    for target in RETRACED:
        for node in gm.graph.find_nodes(op="call_function", target=target):
            yield from _bodies(getattr(gm, node.args[0].target))


def _reject_unsafe_nodes(gm: GraphModule) -> None:
    for body in _bodies(gm):
        for node in body.graph.nodes:
            sets_mode = not node.all_input_nodes and "example_value" not in node.meta
            if node.op == "call_function" and sets_mode and node.target not in (*STATE, *_NO_EFFECT):
                name = getattr(node.target, "__name__", str(node.target))
                raise CaptureError(f"{name} sets a mode that an ATen graph has no node for ({user_line(node)})")


def _reject_shared_storage(gm: GraphModule, example_inputs: Sequence[Any], written: Mapping[int, str]) -> None:
    storages = {i: x.untyped_storage()._cdata for i, x in enumerate(example_inputs) if isinstance(x, torch.Tensor)}
    placeholders = gm.graph.find_nodes(op="placeholder")
    for i, j in itertools.product(written, storages):
        if i != j and storages[i] == storages[j]:
            raise CaptureError(
                f"input {placeholders[i].target} is written to and shares its memory with input "
                f"{placeholders[j].target} ({written[i]})"
            )


def _fakify(example_inputs: Sequence[Any]) -> tuple[FakeTensorMode, list[Any]]:
    """Fake inputs with the symbols that Dynamo chose (as AOTAutograd's `process_inputs` does).

    Raises `CaptureError` for one that has no shape of numbers.
    """
    fake_mode = detect_fake_mode(example_inputs) or FakeTensorMode(shape_env=ShapeEnv())
    context = TracingContext.try_get()
    contexts = context.tensor_to_context if context is not None else {}

    def fakify(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if isinstance(x, LocalTensor):
            return _fakify_by_shape(fake_mode, x, contexts.get(x), next(iter(x._local_tensors.values())))
        if x.is_nested:
            raise CaptureError(f"an input is a nested tensor ({type(x).__name__}), whose rows differ in length")
        if isinstance(x, ShardedInput) or _is_foreign_subclass(x):
            return _fakify_by_shape(fake_mode, x, contexts.get(x), x)
        symbolic = contexts.get(x)
        return fake_mode.from_tensor(
            x,
            static_shapes=None if context is not None else True,
            symbolic_context=symbolic,
            source=symbolic.tensor_source if symbolic is not None else None,
            trace=symbolic is None,
        )

    return fake_mode, [fakify(x) for x in example_inputs]


def _is_foreign_subclass(value: Any) -> bool:
    """Whether a value is of a wrapper subclass that is not ours: of the ops of a DTensor, say, we know shapes alone."""
    own = isinstance(value, (LocalTensor, ShardedInput))
    return isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value) and not own


def _fakify_by_shape(fake_mode: FakeTensorMode, x: torch.Tensor, symbolic: Any, like: torch.Tensor) -> torch.Tensor:
    """A value of simulated ranks as one rank has it, or a sharded input as the program sees it.

    It lies in memory without gaps, in the order of `like` if that does.
    """
    with fake_mode:
        sizes = x.shape
        if symbolic is not None:
            sizes = fake_mode.from_tensor(x, symbolic_context=symbolic, source=symbolic.tensor_source).shape
        strides, step = [0] * len(sizes), 1
        order = memory_order(like) if is_non_overlapping_and_dense_or_false(like) else list(range(like.dim()))
        for dim in reversed(order):
            strides[dim], step = step, step * sizes[dim]
        made = torch.empty_strided(sizes, strides, dtype=like.dtype, device=like.device)
        return made.requires_grad_(x.requires_grad)


class _Hidden(Exception):
    """What no node of the graph would stand for: a gradient mode that is set below a custom autograd.Function or in
    the C++ code of the composite operator `op`, or an error that the latter raises."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.op: OpOverload | None = None


class _Functionalize(FunctionalTensorMode):
    """Functionalises, decomposes composite operators, and watches over what autograd would lose."""

    def __init__(self, whole: Keep, needs_grad: bool) -> None:
        super().__init__(pre_dispatch=True, export=False)
        self.grad_mode = torch.is_grad_enabled()
        self.autocasts: list[torch.amp.autocast] = []
        self.policies: dict[int, _CachingTorchDispatchMode] = {}
        """What a selective checkpoint saves, by the number of its region."""
        self.constants: dict[int, FunctionalTensor] = {}
        """The tensors that are no inputs of the graph but attributes of its module, by identity."""
        self.refusal = ""
        """See `CapturedGraph`."""
        self._whole = whole
        self._needs_grad = needs_grad
        # By address; kept alive, since an address is used again.
        self._storages_with_grad: dict[int, torch.UntypedStorage] = {}
        self._aliases: dict[int, tuple[torch.UntypedStorage, WeakTensorKeyDictionary]] = {}
        self._shared: dict[int, torch.UntypedStorage] = {}
        self._writes: dict[int, str] = {}

    def _can_decompose(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if not func._can_decompose():
            return False
        if _takes_memory(func):
            return True  # no functionalisation kernel
        return not self._whole(func, args, kwargs) and not _has_autocast_policy(func, args)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._needs_grad:
            if torch.is_grad_enabled() != self.grad_mode:
                raise _Hidden("a custom backward")
            self._refuse_untracked_write(func, args)
        if isinstance(func, OpOverload) and _get_effect(func) is not None:
            raise _Hidden(f"the effect of {func}")
        if self._shared and func._schema.is_mutable:
            self._reject_write_to_shared(func, args)
        if func._schema.is_mutable:
            place = place_of(get_current_meta().get("stack_trace") or "")
            self._writes.update((storage._cdata, place) for storage in _written(func, args))
        if func in _DROPOUTS and not (args[1] and args[2]):
            return args[0]  # as in eager mode: a later write to the one is seen in the other
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if self._needs_grad:
                self._update_aliases(func, args, result)
            return result
        except _Hidden as error:
            if error.op is None and not _takes_memory(func) and self._can_decompose(func, args, kwargs or {}):
                error.op = func
            raise

    def constant(self, value: torch.Tensor) -> FunctionalTensor:
        """An attribute of the graph's module; the same one wherever it is read, for somebody may write to it."""
        if id(value) not in self.constants:
            self.constants[id(value)] = FunctionalTensor.to_functional(value)
        return self.constants[id(value)]

    def written_at(self, value: FunctionalTensor) -> str:
        """The user's line that has last written to the memory of a value."""
        return self._writes.get(value.untyped_storage()._cdata, "")

    def note_aliases(self, values: Sequence[Any]) -> None:
        """Of values around an opaque part, those that share their memory: it is not known how."""
        owners: dict[int, list[FunctionalTensor]] = {}
        for value in values:
            if isinstance(value, FunctionalTensor):
                owners.setdefault(_unwrap(value).untyped_storage()._cdata, []).append(value)
        for sharing in owners.values():
            storages = {value.untyped_storage()._cdata: value.untyped_storage() for value in sharing}
            if len(storages) > 1:
                self._shared |= storages

    def _reject_write_to_shared(self, func: OpOverload, args: tuple[Any, ...]) -> None:
        if any(storage._cdata in self._shared for storage in _written(func, args)):
            raise CaptureError(f"{func} writes to memory that an opaque part of the graph shares")

    def _update_aliases(self, func: OpOverload, args: tuple[Any, ...], result: Any) -> None:
        """Make what a write has changed anew at once, and a view of it as soon as it is taken.

        Left to themselves they are made anew when they are next used or returned, which may be under another
        gradient mode.
        """
        made = [value for value in pytree.tree_leaves((args, result)) if isinstance(value, FunctionalTensor)]
        for value in made:
            storage = value.untyped_storage()
            self._aliases.setdefault(storage._cdata, (storage, WeakTensorKeyDictionary()))[1][value] = None
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(value, FunctionalTensor):
                made += self._aliases[value.untyped_storage()._cdata][1]
        for value in made:
            torch._sync(value)  # type: ignore[attr-defined,no-untyped-call]

    def _refuse_untracked_write(self, func: OpOverload, args: tuple[Any, ...]) -> None:
        """A write that autograd does not see leaves a gradient in place which would vanish here:
        `with no_grad(): w.clamp_(0)`, `x.detach().add_(1)` or `w.data.clamp_(0)`, and then `w` or `x` is used."""
        tensors = [a for a in args if isinstance(a, FunctionalTensor)]
        tracked = {id(t): torch._from_functional_tensor(t.elem).requires_grad for t in tensors}
        storages = [t.untyped_storage() for t in tensors if tracked[id(t)]]
        self._storages_with_grad.update((s._cdata, s) for s in storages)
        if not func._schema.is_mutable:
            return
        if func is aten.rrelu_with_noise.default:
            raise CaptureError(f"the backward of {func} reads what its forward writes")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if (
                argument.is_write
                and isinstance(value, FunctionalTensor)
                and value.untyped_storage()._cdata in self._storages_with_grad
                and not (torch.is_grad_enabled() and tracked[id(value)])
            ):
                place = place_of(get_current_meta().get("stack_trace") or "")
                self.refusal = f"{func} writes, unseen by autograd, to what has a gradient ({place})"


def _written(func: OpOverload, args: tuple[Any, ...]) -> list[torch.UntypedStorage]:
    """The memory that a call writes to."""
    given = zip(func._schema.arguments, args, strict=False)
    values = pytree.tree_leaves([value for argument, value in given if argument.is_write])
    return [value.untyped_storage() for value in values if isinstance(value, FunctionalTensor)]


def _has_autocast_policy(func: OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether autocast casts for `func`, which it would not do for the parts of `func`."""
    devices = {a.device.type for a in args if isinstance(a, torch.Tensor)}
    return any(
        torch.is_autocast_enabled(device)
        and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), f"Autocast{device.upper()}")
        for device in devices
    )


def _takes_memory(func: OpOverload) -> bool:
    """Whether an operator writes to what it is given, or returns a view of it."""
    return any(argument.alias_info is not None for argument in func._schema.arguments)


class _DynamoInterpreter(Interpreter):
    """Runs a Dynamo graph under `mode`, with bodies inlined and checkpointed ones tagged."""

    def __init__(self, gm: GraphModule, mode: _Functionalize, graph: Graph | None = None) -> None:
        super().__init__(gm, graph=graph)
        self.extra_traceback = False
        self._mode = mode

    def run_node(self, n: Node) -> Any:
        try:
            return super().run_node(n)
        except _Hidden as error:
            if error.op is not None:
                raise
            raise CaptureError(f"{error.what} would be lost ({user_line(n)})") from error
        except CaptureError as error:
            raise CaptureError(f"{error} ({user_line(n)})") from error.__cause__
        except Exception as error:
            raise CaptureError(f"re-tracing failed: {error} ({user_line(n)})") from error

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._mode.constant(value) if isinstance(value, torch.Tensor) else value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is tag_activation_checkpoint:
            return self._inline_checkpoint(*args)
        if target is invoke_subgraph:
            body, _, *operands = args
            return self._inline(body, operands, get_current_meta())
        if isinstance(target, HigherOrderOperator):
            return self._record("call_function", target, target, args, kwargs)
        if target is DATA:  # of a functional tensor it would keep the gradient
            return args[0].detach()
        result = super().call_function(target, args, kwargs)
        # make_fx records autocast without entering it: dtypes would be those before casting.
        if target is GRAD_MODE:
            self._mode.grad_mode = args[0]
        elif target in (ENTER_AUTOCAST, EXIT_AUTOCAST):
            _switch_autocast(target, args, self._mode.autocasts)
        elif target is SDPA_BACKENDS:
            # Nor does it record this; written as Dynamo does, by names, which a graph can be printed with.
            tracer = _tracer()
            names = [tracer.create_proxy("call_function", SDPA_BACKEND, (backend.name,), {}) for backend in args[0]]
            tracer.create_proxy("call_function", SDPA_BACKENDS, (names, *args[1:]), {})
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        body = self.fetch_attr(target)
        root = _tracer().root
        # A body that is traced through numbers its own parts: two may have one name.
        target = f"{target.rpartition('_')[0]}_{len(list(root.children()))}"
        root.add_module(target, body)
        return self._record("call_module", target, body, args, kwargs)

    def _record(
        self, kind: str, target: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a call as one node. Only its values are asked of it, outside of all tracing."""
        tracer, operands = _tracer(), pytree.tree_map(_unwrap, (args, kwargs))
        tracer.graph.owning_module = cast(GraphModule, tracer.root)  # where dead code is looked for, by `_is_impure`
        proxies = pytree.tree_map(tracer.unwrap_proxy, operands)
        names = {graph: name for name, graph in self.module.named_children()}
        for leaf in pytree.tree_leaves(operands):
            if isinstance(leaf, GraphModule) and leaf not in tracer.root.children():
                name = names[leaf]
                tracer.root.add_module(tracer.get_fresh_qualname(name) if hasattr(tracer.root, name) else name, leaf)
        tensors = [leaf for leaf in pytree.tree_leaves(operands) if isinstance(leaf, torch.Tensor)]
        versions = [x._version for x in tensors]
        with _outside_tracing():
            results = call(*operands[0], **operands[1])
        if versions != [x._version for x in tensors]:
            raise CaptureError(f"{target} writes to what it is given")
        proxy = tracer.create_proxy(kind, target, *proxies)
        track_tensor_tree(results, proxy, constant=None, tracer=tracer)
        wrapped = pytree.tree_map_only(torch.Tensor, FunctionalTensor.to_functional, results)
        self._mode.note_aliases(pytree.tree_leaves((args, wrapped)))
        return wrapped

    def _inline_checkpoint(self, body: GraphModule, *args: Any) -> Any:
        """The partitioner recomputes nodes that carry these two fields, wherever they stand."""
        region = next(_CHECKPOINT_IDS)
        if CONTEXT_FN in body.meta:
            self._mode.policies[region] = body.meta[CONTEXT_FN]()[0]
        tags = {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": region}
        return self._inline(body, args, get_current_meta() | tags)

    def _inline(self, body: GraphModule, args: Sequence[Any], around: Mapping[str, Any]) -> Any:
        """Run a body where its call stands, whose region and checkpoint (in the meta `around`) it is in."""
        graph = Graph()
        graph.output(graph.graph_copy(body.graph, {}))
        for node in graph.nodes:
            node.meta["custom"] = {**around.get("custom", {}), **node.meta.get("custom", {})}
            node.meta |= {key: around[key] for key in ("recompute", "ac_graph_id") if key in around}
        return _DynamoInterpreter(body, self._mode, graph).run(*args)


_CHECKPOINT_IDS = itertools.count()


def _tracer() -> PythonKeyTracer:
    mode = get_proxy_mode()
    assert mode is not None
    return cast(PythonKeyTracer, mode.tracer)


def _switch_autocast(target: Callable[..., Any], args: Sequence[Any], entered: list[torch.amp.autocast]) -> None:
    """Enter or leave autocast as a node does; `entered` are the regions that are entered, the innermost last."""
    with torch._C.DisableTorchFunction():
        if target is ENTER_AUTOCAST:
            device, dtype, enabled, _ = args
            entered.append(torch.amp.autocast(device, dtype, enabled, cache_enabled=False))
            entered[-1].__enter__()
        else:
            entered.pop().__exit__(None, None, None)


@contextmanager
def _states_restored(autocasts: list[torch.amp.autocast]) -> Iterator[None]:
    """A trace that ends early leaves no autocast behind, and no choice of attention kernels."""
    with sdpa_kernel(_cur_sdpa_kernel_backends(with_priority=True), set_priority=True):
        try:
            yield
        finally:
            while autocasts:
                autocasts.pop().__exit__(None, None, None)


@contextmanager
def _outside_tracing() -> Iterator[None]:
    """Run what is inside on fake tensors with autograd, unseen by the trace."""
    keys = torch._C._TorchDispatchModeKey
    modes = [torch._ops.unset_mode_pre_dispatch(key) for key in (keys.FUNCTIONAL, keys.PROXY)]
    # Taken off rather than disabled: a higher-order operator may bring modes of its own.
    functions = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    try:
        yield
    finally:
        for function in reversed(functions):
            _push_mode(function)
        for mode in reversed(modes):
            torch._ops._set_mode_pre_dispatch(mode)


def _trace(
    gm: GraphModule,
    fake_mode: FakeTensorMode,
    inputs: Sequence[Any],
    keep: Keep,
) -> tuple[GraphModule, dict[int, str], dict[int, int], str]:
    """Returns the graph, whose outputs are Dynamo's and then the inputs that are written to; which inputs those
    are, and where they are written to; which outputs (position → input) are such an input itself; and the refusal of
    the graph, if there is one."""
    needs_grad = torch.is_grad_enabled() or any(
        node.args[0] for body in _bodies(gm) for node in body.graph.find_nodes(op="call_function", target=GRAD_MODE)
    )
    whole: set[OpOverload] = set()  # found out not to survive decomposition
    written: dict[int, str] = {}
    returned: dict[int, int] = {}
    policies: dict[int, _CachingTorchDispatchMode] = {}
    refusal = ""

    def functional(*args: Any) -> list[Any]:
        nonlocal written, returned, policies, refusal
        mode = _Functionalize(lambda op, *call: op in whole or keep(op, *call), needs_grad)
        below = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
        with torch._C._ExcludeDispatchKeyGuard(below), _states_restored(mode.autocasts), mode:
            wrapped = [FunctionalTensor.to_functional(a) if isinstance(a, torch.Tensor) else a for a in args]
            interpreter = _DynamoInterpreter(gm, mode)
            outputs = interpreter.run(*wrapped)
            written = {i: mode.written_at(x) for i, x in enumerate(wrapped) if _is_mutated(x, mode)}
            for constant in mode.constants.values():
                if _is_mutated(constant, mode):
                    mode.refusal = f"the graph writes to a tensor that is no input of it ({mode.written_at(constant)})"
            returned = _returned_inputs(outputs, wrapped, written)
            policies, refusal = mode.policies, mode.refusal
            return [_unwrap(x) for x in (*outputs, *(wrapped[i] for i in written))]

    # Tensors that are attributes of Dynamo's graph are no fakes, as the parameters of a compiled optimizer.
    constants_allowed = patch.object(fake_mode, "allow_non_fake_inputs", True)
    table = {aten.copy.default: _copy, **_MASKS}
    trace = make_fx(functional, table, pre_dispatch=True, _allow_non_fake_inputs=True)
    while True:
        try:
            grad_mode = torch.set_grad_enabled(torch.is_grad_enabled())
            with fake_mode, constants_allowed, preserve_node_meta(), grad_mode, _dropped(fake_mode):
                traced = trace(*inputs)
                for region, policy in policies.items():
                    _apply_policy(traced, region, policy)
                return traced, written, returned, refusal
        except _Hidden as error:
            assert error.op is not None and error.op not in whole
            whole.add(error.op)


def _dropped(mode: FakeTensorMode) -> AbstractContextManager[None]:
    """Symbols of what is read from a tensor; the inner backend traces again, and makes its own."""
    return mode.shape_env.ignore_fresh_unbacked_symbols() if mode.shape_env is not None else nullcontext()


def _apply_policy(traced: GraphModule, region: int, policy: _CachingTorchDispatchMode) -> None:
    """Ask a selective checkpoint of the parts of each op of its region; an op is saved if one of its parts is.

    Each op runs under the autocast that it stands in: outside of it, it may refuse what autocast brings to one dtype.
    """
    ask, answers = policy.policy_fn, list[CheckpointPolicy | bool]()

    def asked(*args: Any, **kwargs: Any) -> CheckpointPolicy | bool:
        answers.append(ask(*args, **kwargs))
        return answers[-1]

    policy.policy_fn = asked
    autocasts: list[torch.amp.autocast] = []
    with _states_restored(autocasts):
        for node in traced.graph.nodes:
            if node.target in (ENTER_AUTOCAST, EXIT_AUTOCAST):
                _switch_autocast(node.target, node.args, autocasts)
            if node.meta.get("ac_graph_id") == region and isinstance(node.target, OpOverload):
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                answers.clear()
                with policy:
                    node.target(*args, **kwargs)
                saving = [a for a in answers if a in (True, CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)]
                if saving:
                    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE if saving[0] is True else saving[0]


def _copy(destination: torch.Tensor, source: torch.Tensor, _: bool = False) -> Any:
    """`aten.copy` has no derivative; these have."""
    if source.dtype != destination.dtype or source.device != destination.device:
        source = aten._to_copy.default(source, dtype=destination.dtype, device=destination.device)
    return aten.expand.default(source, destination.shape)


def _is_mutated(value: Any, mode: _Functionalize) -> bool:
    if not isinstance(value, FunctionalTensor):
        return False
    if torch._functionalize_has_metadata_mutation(value.elem):
        raise CaptureError(f"the shape, strides or storage of an input are changed ({mode.written_at(value)})")
    return bool(torch._functionalize_has_data_mutation(value.elem))  # type: ignore[attr-defined]


def _returned_inputs(outputs: Sequence[Any], inputs: Sequence[Any], written: Mapping[int, str]) -> dict[int, int]:
    returned = {}
    for position, output in enumerate(outputs):
        for i, place in written.items():
            if output is inputs[i]:
                returned[position] = i
            elif (
                isinstance(output, FunctionalTensor)
                and output.untyped_storage()._cdata == inputs[i].untyped_storage()._cdata
            ):
                raise CaptureError(f"output {position} is a view of an input that is written to ({place})")
    return returned


def _unwrap(value: Any) -> Any:
    if not isinstance(value, FunctionalTensor):
        return value
    torch._sync(value)  # type: ignore[attr-defined, no-untyped-call]
    return torch._from_functional_tensor(value.elem)
