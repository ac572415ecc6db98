"""P ranks in one process, for tests: torch's LocalTensorMode over a fake process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage, fx
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.distributed._local_tensor import LocalIntNode, LocalTensor, LocalTensorMode, get_local_tensor_mode_list
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from sp_compile.distributed.group import destroy_sequence_parallel, init_sequence_parallel
from sp_compile.distributed.tensor_kinds import as_tensor, has_storage, is_plain, on_storage
from sp_compile.errors import SimulationError

flex_attention = torch.ops.higher_order.flex_attention


@contextmanager
def fake_world(world_size: int, rank: int = 0) -> Iterator[None]:
    """A process group of `world_size` ranks of which this process is one, and no data moves."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        destroy_sequence_parallel()
        dist.destroy_process_group()


@contextmanager
def simulate(world_size: int, sequence_parallel_size: int | None = None) -> Iterator[Ranks]:
    """Run the body as `world_size` ranks at once, in SP groups of P (default: one group).

    Tensors made inside are `LocalTensor`s, with a value per rank in `_local_tensors[rank]`. Plain tensors from outside
    are the same on all ranks until one of them writes to it; `on_rank` has the value of both kinds on a rank. Clear
    `.grad` between two compiled runs of a model: a leftover `LocalTensor` there breaks the next trace.
    """
    torch._dynamo.reset()
    with fake_world(world_size):
        init_sequence_parallel(sequence_parallel_size)
        with (
            Ranks(world_size) as mode,
            _views_unseen_by_dynamo(),
            _without_classes(),
            _numbers_without_dispatch(),
            _flex_attention_on_each_rank(),
        ):
            yield mode
    torch._dynamo.reset()


def bare(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
    """An inner backend that runs the graph as it is, on simulated ranks."""
    run: Callable[..., tuple[Any, ...]] = gm.forward
    return run


def on_rank(value: Any, rank: int) -> Any:
    """The value on one of the simulated ranks."""
    if _is_local_int(value):
        return value.node._local_ints[rank]
    if not isinstance(value, Tensor):
        return value
    ranks = _ranks()
    value = ranks.by_rank(value) if ranks is not None else value
    with _disable_current_modes():
        if isinstance(value, LocalTensor):
            own = value._local_tensors[rank]
            # The memory of the first rank would stand for that of all ranks.
            return own.clone() if ranks is not None and ranks.differs(own) else own
        if is_traceable_wrapper_subclass(value):
            names, context = value.__tensor_flatten__()
            inner = {name: on_rank(getattr(value, name), rank) for name in names}
            if any(inner[name] is not getattr(value, name) for name in names):
                return value.__tensor_unflatten__(inner, context, value.size(), value.stride())
    return value


def _ranks() -> Ranks | None:
    """The ranks that are simulated, within a mode of torch's own as well, that runs one op."""
    return next((each for each in reversed(get_local_tensor_mode_list()) if isinstance(each, Ranks)), None)


class Ranks(LocalTensorMode):
    """Ranks that share a plain tensor until they write to it: from then on each has memory of its own for it.

    torch runs an op on the ranks one after the other, so that all would write to the one tensor that they share. Here
    the first write with operands of its own on each rank gives every rank but the first a copy of the tensor's
    storage. An op with any tensor of that storage then runs on every rank with the memory of that rank. So the tensor
    stays what it is for the program, and what shares its memory on one device shares it on each rank. What reads it by
    no op, such as `numpy`, sees the memory of the first rank.

    A rank draws its random numbers itself, those for a tensor that all ranks share, too, and those of a generator that
    the program made.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__(world_size)
        self._first, *self._others = sorted(self.ranks)
        self._memory: dict[int, tuple[StorageWeakRef, dict[int, UntypedStorage]]] = {}
        """Of every storage that ranks wrote to, by its address: the storages of the ranks after the first."""

    def __enter__(self) -> Ranks:
        super().__enter__()
        return self

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        effects, leaves = _effects(func), pytree.tree_leaves((args, kwargs))
        tensors = [each for each in leaves if isinstance(each, Tensor)]
        plain = [each for each in tensors if type(each) is not LocalTensor and is_plain(each)]
        simulated = len(plain) < len(tensors) or any(map(_is_local_int, leaves))
        if effects.views and not simulated:
            return func(*args, **kwargs)  # a view of the first rank's storage stands for one of every rank's
        own = any(map(self._is_own, plain))
        apart = simulated or own or effects.draws
        generator = next((each for each in leaves if isinstance(each, torch.Generator)), None)
        named = any(each is not as_tensor(each) for each in plain)
        writes = apart and (effects.views or bool(effects.writes))
        if self._disable or (generator is None and not (plain and (own or effects.draws or writes or named))):
            return super().__torch_dispatch__(func, types, args, kwargs)
        written = effects.written(args, kwargs)
        originals: dict[int, Tensor] = {}

        def of_each(x: Tensor) -> Tensor:
            if isinstance(x, LocalTensor) or not is_plain(x):
                return x
            if apart and (effects.views or id(x) in written):
                self.part(x)
            of_ranks: Tensor = self.by_rank(x) if self._is_own(x) else as_tensor(x)
            if effects.draws and not isinstance(of_ranks, LocalTensor):
                of_ranks = LocalTensor(dict.fromkeys(self.ranks, of_ranks.detach()))
            originals[id(of_ranks)] = x
            return of_ranks

        args, kwargs = pytree.tree_map_only(Tensor, of_each, (args, kwargs))
        with self._drawn_from(generator):
            args, kwargs = pytree.tree_map_only(torch.Generator, lambda _: None, (args, kwargs))
            result = super().__torch_dispatch__(func, types, args, kwargs)
        if not written:
            return result
        for own in pytree.tree_leaves((args, kwargs)):
            original = originals.get(id(own))
            if original is not None and id(original) in written and isinstance(own, LocalTensor):
                self._take_shape(original, own)
        return pytree.tree_map_only(Tensor, lambda x: originals.get(id(x), x), result)

    def differs(self, value: Any) -> bool:
        """Whether each rank has a value of its own."""
        return isinstance(value, LocalTensor) or _is_local_int(value) or self._is_own(value)

    def by_rank(self, x: Any) -> Any:
        """A plain tensor with the memory of every rank; what all ranks share still is returned as it is."""
        if not self._is_own(x):
            return x
        _, others = self._memory[x.untyped_storage()._cdata]
        with torch._C.DisableTorchFunctionSubclass(), _disable_current_modes():
            own = {rank: on_storage(x, others[rank]) for rank in self._others}
            result = LocalTensor({self._first: as_tensor(x).detach(), **own})
            torch._functionalize_unsafe_set(result, x)  # so that who looks for shared memory finds it
        return result

    def _is_own(self, x: Any) -> bool:
        """Whether ranks have memory of their own for a plain tensor."""
        if not self._memory or not isinstance(x, Tensor) or isinstance(x, LocalTensor) or not has_storage(x):
            return False
        return x.untyped_storage()._cdata in self._memory

    def part(self, x: Tensor) -> None:
        """Give every rank memory of its own for a plain tensor."""
        if self._is_own(x):
            return
        if not has_storage(x):
            raise SimulationError(f"ranks write to a tensor that they share, and whose layout is {x.layout}")
        storage = x.untyped_storage()
        self._keep(storage, {rank: storage.clone() for rank in self._others})

    def _keep(self, storage: UntypedStorage, others: dict[int, UntypedStorage]) -> None:
        self._memory = {at: memory for at, memory in self._memory.items() if not memory[0].expired()}
        self._memory[storage._cdata] = StorageWeakRef(storage), others

    def _take_shape(self, x: Tensor, own: LocalTensor) -> None:
        """Give a plain tensor the shape, strides and memory that an op gave it on the ranks, as `out=` may."""
        first = own._local_tensors[self._first]
        if any(_shape(each) != _shape(first) for each in own._local_tensors.values()):
            shapes = [tuple(own._local_tensors[rank].shape) for rank in sorted(self.ranks)]
            raise SimulationError(f"a tensor that ranks share gets another shape on each of them: {shapes}")
        if _shape(x) == _shape(first) and x.untyped_storage()._cdata == first.untyped_storage()._cdata:
            return
        x.set_(first.untyped_storage(), first.storage_offset(), first.shape, first.stride())
        self._keep(first.untyped_storage(), {rank: own._local_tensors[rank].untyped_storage() for rank in self._others})

    @contextmanager
    def _drawn_from(self, generator: Any) -> Iterator[None]:
        """Let every rank draw from the state that a generator of the program has, which goes on once."""
        default: Any = torch.default_generator  # whose state each rank has
        if generator is None or generator._cdata == default._cdata:
            yield
            return
        mine, state = self._per_rank_rng_states, generator.get_state()
        on_cpu = generator.device.type == "cpu"
        drawn = (state, {}) if on_cpu else (torch.get_rng_state(), {generator.device.index or 0: state})
        self._per_rank_rng_states = dict.fromkeys(self.ranks, drawn)
        try:
            yield
            on_device, on_others = self._per_rank_rng_states[self._first]
            generator.set_state(on_device if on_cpu else next(iter(on_others.values())))
        finally:
            self._per_rank_rng_states = mine


_SILENT = ("running_mean", "running_var")
"""What batch norms write to, which some of their schemas do not tell."""


@dataclass(frozen=True)
class _Effects:
    """What an op does beside computing."""

    views: bool
    """It returns a view of an operand."""
    draws: bool
    """It draws random numbers."""
    writes: tuple[tuple[int, str], ...]
    """The positions and names of the operands that it writes to."""

    def written(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[int]:
        """The ids of the tensors that a call writes to."""
        values = [args[at] if at < len(args) else kwargs.get(name) for at, name in self.writes]
        return {id(each) for each in pytree.tree_leaves(values) if isinstance(each, Tensor)}


@cache
def _effects(func: OpOverload) -> _Effects:
    returns, arguments = func._schema.returns, func._schema.arguments
    return _Effects(
        any(each.alias_info is not None and not each.alias_info.is_write for each in returns),
        torch.Tag.nondeterministic_seeded in func.tags,
        tuple((at, each.name) for at, each in enumerate(arguments) if each.is_write or each.name in _SILENT),
    )


def _is_local_int(value: Any) -> bool:
    return isinstance(value, torch.SymInt) and isinstance(value.node, LocalIntNode)


def _shape(x: Tensor) -> tuple[Any, ...]:
    return x.size(), x.stride(), x.storage_offset()


@contextmanager
def _views_unseen_by_dynamo() -> Iterator[None]:
    """Show Dynamo neither that a simulated tensor is a view nor its memory; what shares that of a rank it sees itself.

    Dynamo would replay how a view was made. Of a subclass it then finds other strides for a dimension of size 1, and
    sizes that are symbols of none of its inputs. What shares memory it would set to one storage, which is no method of
    a subclass.
    """

    def storage(x: LocalTensor) -> UntypedStorage:
        first = next(iter(x._local_tensors.values()))
        return first.untyped_storage() if isinstance(first, FakeTensor) else UntypedStorage(0)

    with patch.object(LocalTensor, "_is_view", lambda _: False), patch.object(LocalTensor, "untyped_storage", storage):
        yield


@contextmanager
def _without_classes() -> Iterator[None]:
    """A simulated tensor cannot take another class, such as that of an operand, and is a tensor without it."""
    with patch.object(LocalTensor, "as_subclass", lambda x, _: x):
        yield


@contextmanager
def _numbers_without_dispatch() -> Iterator[None]:
    """Read what all ranks agree on from one of them, as `torch.tensor` of a list has to: it asks no mode."""

    def reader(name: str) -> Callable[[LocalTensor], Any]:
        alone = getattr(Tensor, name)

        @torch._dynamo.disable  # type: ignore[untyped-decorator]
        def read(x: LocalTensor) -> Any:
            with _disable_current_modes():
                first, *others = x._local_tensors.values()
                agreed = all(torch.equal(first, other) for other in others)
                return alone(first) if agreed else alone(x)

        result: Callable[[LocalTensor], Any] = read
        return result

    with ExitStack() as patches:
        for name in ("__bool__", "__int__", "__index__", "__float__", "__complex__"):
            patches.enter_context(patch.object(LocalTensor, name, reader(name)))
        yield


@contextmanager
def _flex_attention_on_each_rank() -> Iterator[None]:
    """LocalTensorMode knows no higher-order operator: its autograd kernel runs on the ranks one by one."""
    alone = flex_attention.py_kernels[DispatchKey.Autograd]

    def kernel(*args: Any) -> Any:
        leaves, spec = pytree.tree_flatten(args)
        ranks = _ranks()
        if ranks is None or not any(map(ranks.differs, leaves)):
            return alone(*args)
        return _OnEachRank.apply(spec, *leaves)  # type: ignore[no-untyped-call]

    with patch.dict(flex_attention.py_kernels, {DispatchKey.Autograd: kernel}):
        flex_attention._dispatch_cache.clear()
        try:
            yield
        finally:
            flex_attention._dispatch_cache.clear()


class _OnEachRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: pytree.TreeSpec, *leaves: Any) -> tuple[Tensor, ...]:
        ctx.runs = {}
        ctx.trained = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves]
        ranks = _ranks()
        assert ranks is not None
        with _disable_current_modes(), torch.enable_grad():
            for rank in sorted(ranks.ranks):
                own = [_of_rank(leaf, rank) for leaf in leaves]
                own = [x.requires_grad_() if t else x for x, t in zip(own, ctx.trained, strict=True)]
                ctx.runs[rank] = own, flex_attention(*pytree.tree_unflatten(own, spec))
            made = [{rank: out[i].detach() for rank, (_, out) in ctx.runs.items()} for i in range(3)]
        out, lse, max_scores = (LocalTensor(each) for each in made)
        ctx.mark_non_differentiable(max_scores)
        return out, lse, max_scores

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        found: dict[Any, list[Tensor | None]] = {}
        with _disable_current_modes():
            for rank, (own, out) in ctx.runs.items():
                wanted = [x for x, t in zip(own, ctx.trained, strict=True) if t]
                given = [_of_rank(grad, rank) for grad in grads[:2]]
                found[rank] = list(torch.autograd.grad(out[:2], wanted, given))
            summed = iter([LocalTensor({r: found[r][i] for r in found}) for i in range(sum(ctx.trained))])
        return None, *(next(summed) if t else None for t in ctx.trained)


def _of_rank(value: Any, rank: Any) -> Any:
    value = on_rank(value, rank)
    return value.detach() if isinstance(value, Tensor) else value
