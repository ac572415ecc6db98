"""What `explain` found: plain data, and its tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from ..links import Links
from .page import render


@dataclass(frozen=True)
class Op:
    """One node of a graph as a rank runs it."""

    name: str
    op: str
    module: str
    """The path of the module that it is in: `model.layers.0.mlp`."""
    line: str
    placement: str
    """`sharded`, `replicated`, `collective`, `input` or `output`."""
    layout: str
    """`S(1: 32)`, or nothing."""
    shape: list[int]
    local_shape: list[int]
    dtype: str
    flops: int
    """Of the whole value, forward; as in `Totals`."""
    operands: list[str]


@dataclass(frozen=True)
class Strategy:
    """A way to make a site whole, and what each rank receives for it in one forward."""

    strategy: str
    bytes: int


@dataclass(frozen=True)
class Site:
    """One attention site."""

    module: str
    line: str
    heads: int
    kv_heads: int
    length: int
    """Of the keys."""
    strategy: str
    bytes: int
    """What each rank receives for it, forward."""
    reason: str
    others: list[Strategy]
    """The strategies not taken."""


@dataclass(frozen=True)
class Launches:
    """One node that launches collectives. Bytes are received per rank, own block and padding excluded."""

    name: str
    op: str
    role: str
    """The name without its number: `gather_seq_scatter_heads_q`."""
    module: str
    line: str
    bytes_forward: int
    bytes_backward: int
    launches_forward: int
    launches_backward: int
    padded_forward: int
    """The bytes with padding: what the transport counts."""
    padded_backward: int


@dataclass(frozen=True)
class FallbackCost:
    """What a fallback costs each rank, forward."""

    bytes: int
    """Received to gather its operands."""
    flops: int
    """Computed whole on every rank."""


@dataclass(frozen=True)
class WholeOp:
    """A fallback: an op that runs on gathered values."""

    op: str
    line: str
    why: str
    cost: FallbackCost
    remedy: str


@dataclass(frozen=True)
class Output:
    """One tensor that a graph returns, and what each rank receives for it to be whole."""

    name: str
    shape: list[int]
    bytes: int
    expensive: bool
    remedy: str


@dataclass(frozen=True)
class Graph:
    """One graph of the model."""

    name: str
    unsharded: str
    """Why nothing of it is sharded; empty if something is."""
    ends: str
    """Where and why Dynamo ended it before the model did: a graph break."""
    ops: list[Op]
    sites: list[Site]
    collectives: list[Launches]
    fallbacks: list[WholeOp]
    outputs: list[Output]
    calls: int = 1
    """How often the model runs it in one forward: layers that each break share a graph. All else is of one call."""


@dataclass(frozen=True)
class Totals:
    """A step of the model, per rank, every graph as often as it is called. Bytes and launches as in `Launches`; FLOPs
    are those of one forward."""

    bytes_forward: int
    bytes_backward: int
    launches_forward: int
    launches_backward: int
    lower_bound_forward: int
    """The cheapest strategy of every site, and the sums over ranks of reductions such as the loss."""
    lower_bound_backward: int
    """The sites again if they take gradients, and one all-reduce of each trained parameter's, in its own dtype."""
    flops_sharded: int
    flops_replicated: int
    flops_unknown: list[str]
    """Opaque parts and ops of your own, which count as 0 unless `register_flop_formula` tells of them."""
    activation_bytes: int
    """The most that values made in a forward take at once on a rank, each freed after its last use."""
    activation_bytes_one_device: int
    seconds: dict[str, float] | None
    """Communication alone, forward and backward, by the links; nothing overlapped."""


@dataclass(frozen=True)
class Scale:
    """What each strategy receives per rank, forward, for the largest site, on so many ranks."""

    sp_size: int
    strategies: dict[str, int]


@dataclass(frozen=True)
class Report:
    """What `explain` found. `str` gives tables; `to_dict` plain data for JSON; `to_html` a page."""

    model: str
    sp_size: int
    links: Links | None
    incomplete: str
    """Why the tracing stopped before the end of the model; empty if it did not."""
    graphs: list[Graph]
    totals: Totals
    scaling: list[Scale]

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers."""
        return asdict(self)

    def to_html(self) -> str:
        """The report as one page that needs nothing else."""
        return render(self.to_dict())

    def __str__(self) -> str:
        return "\n\n".join(_sections(self))


def _sections(report: Report) -> Iterator[str]:
    title = f"{report.model} on {report.sp_size} ranks"
    yield f"{title}\nincomplete: {report.incomplete}" if report.incomplete else title
    for graph in report.graphs:
        if len(report.graphs) > 1 or graph.unsharded or graph.calls != 1:
            calls = "" if graph.calls == 1 else f", called {graph.calls} times; its numbers are of one call"
            yield graph.name + (f" is not sharded: {graph.unsharded}" if graph.unsharded else "") + calls
        if graph.sites:
            yield _table(("attention", "heads", "length", "strategy", "forward", "instead", "why"), _site_rows(graph))
            yield "\n".join(dict.fromkeys(f"at {each.line}" for each in graph.sites))
        if graph.collectives:
            yield _table(("collective", "op", "launches", "back", "forward", "backward"), _launch_rows(graph))
        if graph.fallbacks:
            counts = Counter(graph.fallbacks)
            yield "\n".join(_fallback(each, count) for each, count in counts.items())
        for output in graph.outputs:
            if output.expensive:
                yield f"{output.name} {output.shape} is made whole for {_bytes(output.bytes)}: {output.remedy}"
        if graph.ends:
            yield f"{graph.name} ends: {graph.ends}"
    yield _totals(report.totals)
    if report.scaling:
        names = list(report.scaling[0].strategies)
        rows = [[each.sp_size, *(_bytes(each.strategies[name]) for name in names)] for each in report.scaling]
        yield _table(("largest site, ranks", *names), rows)


_Row = Sequence[object]


def _table(headers: Sequence[str], rows: Iterable[_Row]) -> str:
    texts = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    return str(tabulate(texts, headers, disable_numparse=True))


def _bytes(count: float) -> str:
    if count < 1024:
        return f"{count:,.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:,.1f} {unit}"
    return f"{count / 1024:,.1f} TiB"


def _numberless(name: str) -> str:
    """`model.layers.3.mlp` as `model.layers.*.mlp`, for layers that are alike."""
    return re.sub(r"(?<=[._])\d+(?=[._])", "*", name)


def _site_rows(graph: Graph) -> list[_Row]:
    counts = Counter(
        (
            _numberless(f"{each.module}.")[:-1] or graph.name,
            f"{each.heads}" if each.heads == each.kv_heads else f"{each.heads}/{each.kv_heads}",
            each.length,
            each.strategy,
            _bytes(each.bytes),
            ", ".join(f"{other.strategy} {_bytes(other.bytes)}" for other in each.others),
            each.reason,
        )
        for each in graph.sites
    )
    return [(f"{name} ×{count}" if count > 1 else name, *rest) for (name, *rest), count in counts.items()]


def _launch_rows(graph: Graph) -> list[_Row]:
    alike: dict[tuple[str, str], list[Launches]] = {}
    for each in graph.collectives:
        name = each.role if each.role.startswith("gather_output_") else _numberless(each.role)
        alike.setdefault((name, each.op), []).append(each)
    return [
        (
            f"{name} ×{len(each)}" if len(each) > 1 else name,
            op,
            sum(one.launches_forward for one in each),
            sum(one.launches_backward for one in each),
            _bytes(sum(one.bytes_forward for one in each)),
            _bytes(sum(one.bytes_backward for one in each)),
        )
        for (name, op), each in alike.items()
    ]


def _totals(totals: Totals) -> str:
    rows: list[_Row] = [
        ("launches", totals.launches_forward, totals.launches_backward),
        ("received per rank", _bytes(totals.bytes_forward), _bytes(totals.bytes_backward)),
        ("lower bound", _bytes(totals.lower_bound_forward), _bytes(totals.lower_bound_backward)),
    ]
    if totals.seconds is not None:
        rows.append(("seconds, not overlapped", *(f"{each:.3g}" for each in totals.seconds.values())))
    flops = totals.flops_sharded + totals.flops_replicated
    shared = f"{totals.flops_sharded / flops:.1%} are shared" if flops else "none"
    unknown = f"; not counted: {', '.join(totals.flops_unknown)}" if totals.flops_unknown else ""
    return (
        f"{_table(('a step', 'forward', 'backward'), rows)}\n\n"
        f"FLOPs of a forward: {flops:.3g}, of which {shared}{unknown}\n"
        f"activations at the peak of a forward: {_bytes(totals.activation_bytes)} a rank, "
        f"{_bytes(totals.activation_bytes_one_device)} on one device (values made, each freed after its last use;\n"
        "  not parameters, their gradients, what an optimiser holds, or what is saved for backward)"
    )


def _fallback(whole: WholeOp, count: int) -> str:
    times = f" ×{count}" if count > 1 else ""
    return (
        f"{whole.op}{times} runs whole: {whole.why}; it gathers {_bytes(whole.cost.bytes)}, and each rank does its "
        f"{whole.cost.flops:,} FLOPs\n  at {whole.line}\n  {whole.remedy}"
    )
