"""`python -m sp_compile doctor`: what this machine has, which groups its ranks form, and if each `sp::` op is right.

Alone, in a world of one rank; under `torchrun`, over the real groups. The same call on every rank.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from .._torch_version import TESTED, is_tested
from ..distributed.group import (
    destroy_sequence_parallel,
    get_sequence_parallel_group,
    init_sequence_parallel,
    rank_tensor,
)
from ..distributed.measure_links import measure_links
from ..distributed.words import gather_json
from ..links import Links
from ..ops.exchange import packed_exchange
from ..placement.placements import Layout, Segment, whole_layout
from .comparison import relative_error

_TOLERANCE = 1e-5
"""float32."""
sp = torch.ops.sp


@dataclass(frozen=True)
class OpCheck:
    """One op on one kind of device against its plain definition; the worst of all ranks."""

    op: str
    device: str
    forward: float
    backward: float | None
    """None: it has no gradient."""
    raised: str = ""

    @property
    def passed(self) -> bool:
        return not self.raised and max(self.forward, self.backward or 0.0) <= _TOLERANCE


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found."""

    versions: dict[str, str]
    back_ends: dict[str, str]
    group: dict[str, str]
    links: Links | None
    """None: a world of one rank has none."""
    checks: tuple[OpCheck, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        rows = [*self.versions.items(), *self.back_ends.items(), *self.group.items()]
        if self.links is not None:
            rows.append(("bandwidth", f"{self.links.bandwidth / 1e9:.3g} GB/s received per rank"))
            rows.append(("latency", f"{self.links.latency * 1e6:.3g} us a launch"))
        checks = [
            (each.op, each.device, *_errors(each), each.raised or ("right" if each.passed else "WRONG"))
            for each in self.checks
        ]
        align = ("left", "left", "right", "right", "left")
        table = tabulate(checks, ("op", "device", "forward", "backward", ""), disable_numparse=True, colalign=align)
        wrong = sum(not each.passed for each in self.checks)
        verdict = f"{wrong} of {len(checks)} checks failed" if wrong else f"All {len(checks)} checks passed"
        return f"{tabulate(rows, tablefmt='plain', disable_numparse=True)}\n\n{table}\n\n{verdict}."


def _errors(check: OpCheck) -> tuple[str, str]:
    return f"{check.forward:.0e}", "" if check.backward is None else f"{check.backward:.0e}"


def doctor() -> Diagnosis:
    """Examine this machine and, under `torchrun`, its ranks; each of them calls this and gets the same diagnosis.

    Uses the groups that there are. Makes them where there are none, and ends those again.
    """
    with _groups() as group:
        checks = tuple(check for device in _devices(group) for check in self_test(group, device))
        links = measure_links(group) if group.size() > 1 else None
        return Diagnosis(_versions(), _back_ends(), _members(group), links, checks)


@contextmanager
def _groups() -> Iterator[dist.ProcessGroup]:
    group = get_sequence_parallel_group()
    if group is not None:
        yield group
        return
    mine = not dist.is_initialized()
    if mine and "WORLD_SIZE" not in os.environ:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        init_sequence_parallel()
        made = get_sequence_parallel_group()
        assert made is not None
        yield made
    finally:
        destroy_sequence_parallel()
        if mine and dist.is_initialized():
            dist.destroy_process_group()


def _devices(group: dist.ProcessGroup) -> list[torch.device]:
    """The present devices between which the group moves data."""
    present = [torch.device("cpu")]
    if torch.accelerator.is_available():
        present.append(
            torch.device(f"{torch.accelerator.current_accelerator()}:{torch.accelerator.current_device_index()}")
        )
    served = {each.type for each in group._device_types}
    return [device for device in present if device.type in served]


def _versions() -> dict[str, str]:
    try:
        own = version("sp-compile")
    except PackageNotFoundError:
        own = "not installed, imported from its folder"
    torch_version = str(torch.__version__)
    torch_version += "" if is_tested(torch_version) else f", not tested: that is {' and '.join(TESTED)}"
    return {"python": platform.python_version(), "torch": torch_version, "sp_compile": own}


def _back_ends() -> dict[str, str]:
    has = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = "cpu" if accelerator is None else f"cpu, {torch.accelerator.device_count()} x {accelerator.type}"
    return {**{name: "yes" if each else "no" for name, each in has.items()}, "devices": devices}


def _members(group: dist.ProcessGroup) -> dict[str, str]:
    world = dist.get_world_size()
    return {
        "world": f"{world} {'ranks' if world > 1 else 'rank: start it with torchrun to see the others'}",
        "SP group": f"{group.size()} ranks, {dist.get_backend_config(group)}" if world > 1 else "1 rank",
    }


# Self-test


@dataclass(frozen=True)
class _Rank:
    """A rank under test. Values are float32 and the same in every run; what is padding on entry is NaN."""

    group: dist.ProcessGroup
    device: torch.device

    @property
    def parts(self) -> int:
        return self.group.size()

    @property
    def index(self) -> int:
        return dist.get_rank(self.group)

    @property
    def name(self) -> str:
        return self.group.group_name

    def tensor(self) -> Tensor:
        """The rank as the ops take it."""
        return rank_tensor(self.group, self.device)

    def value(self, *shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return (torch.arange(count, device=self.device, dtype=torch.float32) * 0.7 + 1).cos().view(shape)

    def rows(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """(local, global) rows of this rank."""
        rows = torch.tensor(layout.real_rows(self.index, self.parts), dtype=torch.int64, device=self.device)
        return rows.reshape(-1, 2)[:, 0], rows.reshape(-1, 2)[:, 1]

    def cut(self, whole: Tensor, dim: int, layout: Layout, padding: float) -> Tensor:
        here, there = self.rows(layout)
        sizes = list(whole.shape)
        sizes[dim] = int(layout.local_size(self.parts))
        return whole.new_full(sizes, padding).index_copy(dim, here, whole.index_select(dim, there))


_Placed = tuple[int, Layout] | None
"""A dimension and how its rows lie on the ranks; None: every rank has the whole."""
_Errors = tuple[float, float | None]


def _check(
    rank: _Rank,
    op: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    source: _Placed,
    target: _Placed,
    function: Callable[[Tensor], Tensor] = lambda x: x,
) -> _Errors:
    """An op is a function of the whole value between two placements; and its backward that of the whole gradient."""
    whole = rank.value(*shape).requires_grad_()
    expected = function(whole)
    cotangent = rank.value(*expected.shape).flip(-1)
    (gradient,) = torch.autograd.grad(expected, whole, cotangent)
    expected = expected.detach()
    given = rank.cut(whole.detach(), *source, float("nan")) if source else whole.detach()
    made = op(given.requires_grad_())
    sent = rank.cut(cotangent, *target, 0.0) if target else cotangent
    (received,) = torch.autograd.grad(made, given, sent)
    wanted = rank.cut(gradient, *source, 0.0) if source else gradient
    made, scale = made.detach(), float(expected.abs().max())
    if target is not None:
        here, there = rank.rows(target[1])
        # Padding repeats a real row: as finite as the others.
        scale = scale if bool(made.isfinite().all()) else 0.0
        made, expected = made.index_select(target[0], here), expected.index_select(target[0], there)
    forward = relative_error(expected, made, scale) if scale else float("inf")
    return forward, relative_error(wanted, received, float(gradient.abs().max()))


def _layout_arguments(dim: int, layout: Layout) -> tuple[int, int, list[int], list[int]]:
    sizes = [(int(each.size), int(each.granule)) for each in layout.segments]
    return dim, int(layout.outer), [size for size, _ in sizes], [granule for _, granule in sizes]


def _tokens(rank: _Rank) -> tuple[int, Layout]:
    """Two segments along dimension 1, neither of which P divides if P > 1."""
    return 1, Layout((Segment(2 * rank.parts + 1), Segment(rank.parts + 1)))


def _heads(rank: _Rank) -> tuple[int, Layout]:
    return 2, whole_layout(rank.parts + 1)


def _shape(rank: _Rank) -> list[int]:
    return [2, 3 * rank.parts + 2, rank.parts + 1, 3]


def _shard(rank: _Rank) -> _Errors:
    at = _tokens(rank)
    op = sp.shard.default
    return _check(rank, lambda x: op(x, rank.tensor(), *_layout_arguments(*at), rank.name), _shape(rank), None, at)


def _all_gather(rank: _Rank) -> _Errors:
    at = _tokens(rank)
    op = sp.all_gather.default
    return _check(rank, lambda x: op(x, rank.tensor(), *_layout_arguments(*at), rank.name), _shape(rank), at, None)


def _all_to_all(rank: _Rank) -> _Errors:
    source, target = _tokens(rank), _heads(rank)
    arguments = (*_layout_arguments(*source), *_layout_arguments(*target))
    return _check(rank, lambda x: sp.all_to_all.default(x, *arguments, rank.name), _shape(rank), source, target)


def _all_to_all_in_halves(rank: _Rank) -> _Errors:
    source, target = _tokens(rank), _heads(rank)

    def op(x: Tensor) -> Tensor:
        pieces = sp.start_all_to_all.default(x, *_layout_arguments(*target), rank.name)
        whole: Tensor = sp.finish_all_to_all.default(pieces, *_layout_arguments(*source), x.dtype, rank.name)
        return whole

    return _check(rank, op, _shape(rank), source, target)


def _all_to_all_kv(rank: _Rank) -> _Errors:
    source, queries = _tokens(rank), 2 * (rank.parts + 1)
    arguments = (*_layout_arguments(*source), 2, queries, rank.name)
    return _check(
        rank,
        lambda x: sp.all_to_all_kv.default(x, rank.tensor(), *arguments),
        _shape(rank),
        source,
        (2, whole_layout(queries)),
        lambda x: x.repeat_interleave(2, 2),
    )


def _all_to_all_packed(rank: _Rank) -> _Errors:
    source, target = _tokens(rank), _heads(rank)
    names = ("dim", "outer", "sizes", "granules")
    gather = dict(zip((f"gather_{name}" for name in names), _layout_arguments(*source), strict=True))
    scatter = dict(zip((f"scatter_{name}" for name in names), _layout_arguments(*target), strict=True))
    numbers = packed_exchange(sp.all_to_all.default, gather | scatter)

    def op(x: Tensor) -> Tensor:
        once, twice = sp.all_to_all_packed.default([x, 2 * x], rank.tensor(), 2 * numbers, rank.name)
        total: Tensor = once + twice
        return total

    return _check(rank, op, _shape(rank), source, target, lambda x: 3 * x)


def _all_gather_replicate(rank: _Rank) -> _Errors:
    """Each rank's share of the gradient is a P-th of the whole."""
    at = _tokens(rank)

    def op(x: Tensor) -> Tensor:
        whole: Tensor = sp.all_gather_replicate.default(x, *_layout_arguments(*at), rank.name)
        scaled: Tensor = sp.scale_gradient.default(whole, 1 / rank.parts)
        return scaled

    return _check(rank, op, _shape(rank), at, None)


def _reduction(kind: str) -> Callable[[_Rank], _Errors]:
    def check(rank: _Rank) -> _Errors:
        """Two ranks after two have `x`, `2 x`, ...: extrema are shared, and so is their gradient."""
        x, cotangent = rank.value(2, 3).abs() + 1, rank.value(2, 3)
        factors = [1 + each // 2 for each in range(rank.parts)]
        own = (x * factors[rank.index]).requires_grad_()
        made = sp.all_reduce.default(own, kind, rank.name)
        (received,) = torch.autograd.grad(made, own, cotangent)
        times = {"sum": sum(factors), "max": max(factors), "min": min(factors)}[kind]
        share = 1.0 if kind == "sum" else (factors[rank.index] == times) / factors.count(times)
        wanted = cotangent * share
        return relative_error(x * times, made.detach()), relative_error(wanted, received, float(cotangent.abs().max()))

    return check


def _replicate(rank: _Rank) -> _Errors:
    x = rank.value(2, 3).requires_grad_()
    made = sp.replicate.default(x, rank.name)
    (received,) = torch.autograd.grad(made, x, x.detach() * (rank.index + 1))
    wanted = x.detach() * (rank.parts * (rank.parts + 1) // 2)
    return relative_error(x.detach(), made.detach()), relative_error(wanted, received)


def _scale_gradient(rank: _Rank) -> _Errors:
    x = rank.value(2, 3).requires_grad_()
    made = sp.scale_gradient.default(x, 3.0)
    (received,) = torch.autograd.grad(made, x, x.detach())
    return relative_error(x.detach(), made.detach()), relative_error(3 * x.detach(), received)


def _mask_padding(rank: _Rank) -> _Errors:
    """Summed over the ranks, as a reduction does: it is the sum of all rows if padding was filled with zeros."""
    at = _tokens(rank)

    def op(x: Tensor) -> Tensor:
        filled = sp.mask_padding.default(x, rank.tensor(), *_layout_arguments(*at), 0, rank.name)
        summed: Tensor = sp.all_reduce.default(filled.sum(1), "sum", rank.name)
        return summed

    return _check(rank, op, _shape(rank), at, None, lambda x: x.sum(1))


def _refill_padding(rank: _Rank) -> _Errors:
    """The first row is gone from its place."""
    size = 2 * rank.parts
    at = 1, Layout((Segment(size, 1, 1, 0),))
    arguments = rank.tensor(), 1, 1, [size], [1], rank.name, [1, 0]
    return _check(rank, lambda x: sp.refill_padding.default(x, *arguments), [2, size, 3], at, at)


def _positions(rank: _Rank) -> _Errors:
    _, layout = _tokens(rank)
    made = sp.positions.default(rank.tensor(), *_layout_arguments(0, layout)[1:], rank.name)
    here, there = rank.rows(layout)
    return relative_error(there, made.index_select(0, here)), None


def _select_rows(rank: _Rank) -> _Errors:
    at = _tokens(rank)
    index = torch.tensor([-1, 0, rank.parts], device=rank.device)
    wanted = index % (3 * rank.parts + 2)
    return _check(
        rank,
        lambda x: sp.select_rows.default(x, rank.tensor(), *_layout_arguments(*at), index, rank.name),
        _shape(rank),
        at,
        None,
        lambda x: x.index_select(1, wanted),
    )


def _bernoulli(rank: _Rank) -> _Errors:
    """The same draws from the same seed, and about as many ones as asked for."""
    like, seed = rank.value(64, 64), torch.ones(1, dtype=torch.int64, device=rank.device)
    drawn, again = (sp.bernoulli.default(like, seed, rank.tensor(), 0.25) for _ in range(2))
    return (0.0 if torch.equal(drawn, again) and abs(float(drawn.mean()) - 0.25) < 0.05 else float("inf")), None


CHECKS: dict[str, Callable[[_Rank], _Errors]] = {
    "shard": _shard,
    "all_gather": _all_gather,
    "all_to_all": _all_to_all,
    "start_all_to_all, finish_all_to_all": _all_to_all_in_halves,
    "all_to_all_kv": _all_to_all_kv,
    "all_to_all_packed": _all_to_all_packed,
    "all_gather_replicate": _all_gather_replicate,
    "all_reduce sum": _reduction("sum"),
    "all_reduce max": _reduction("max"),
    "all_reduce min": _reduction("min"),
    "replicate": _replicate,
    "scale_gradient": _scale_gradient,
    "mask_padding": _mask_padding,
    "refill_padding": _refill_padding,
    "positions": _positions,
    "select_rows": _select_rows,
    "bernoulli": _bernoulli,
}
"""By the ops that they test."""


def self_test(group: dist.ProcessGroup, device: torch.device) -> list[OpCheck]:
    """Every `sp::` op over a group: forward and backward against the plain definition, the worst of all ranks.

    Raises:
        RankLostError, DataError: a rank ended meanwhile, or does not come.
    """
    rank, mine = _Rank(group, device), list[OpCheck]()
    for name, check in CHECKS.items():
        try:
            forward, backward = check(rank)
            mine.append(OpCheck(name, device.type, forward, backward))
        except Exception as error:  # whatever it is: it belongs in the table
            mine.append(OpCheck(name, device.type, float("inf"), None, f"{type(error).__name__}: {error}"))
    said = gather_json([*map(asdict, mine)], group, "doctor") if group.size() > 1 else [[*map(asdict, mine)]]
    found = [[OpCheck(**check) for check in checks] for checks in said]
    return [max(of_ranks, key=_badness) for of_ranks in zip(*found, strict=True)]


def _badness(check: OpCheck) -> float:
    return max(check.forward, check.backward or 0.0)
