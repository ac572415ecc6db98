"""What happened to a graph, as text: `rewritten_graphs()`, `TORCH_LOGS="+sp_compile"`, the `dump` folder, tlparse.

    h: f32[1, 16 of 32, 64] = aten.embedding(replicate_w, slice_ids)        # S(1: 32)  model.py:12

`16 of 32`: the local size of the global one. The comment has the placement and the line of the user's file.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils._dtype_abbrs import dtype_abbrs
from torch._logging._internal import trace_structured

from .errors import user_line
from .graph import GraphRules
from .passes import ShardedGraph
from .plan import AttentionSite, ShardingPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewrittenGraph:
    """One graph that was sharded."""

    name: str
    captured: fx.GraphModule
    """As Dynamo gave it, in ATen ops with global shapes."""
    rewritten: fx.GraphModule
    """With collectives and local shapes; the last input is `sp_rank`."""
    plan: ShardingPlan
    stages: tuple[tuple[str, str], ...]
    """(pass, the graph after it as text), in order."""

    def __str__(self) -> str:
        return self.stages[-1][1]


_rewritten: deque[RewrittenGraph] = deque(maxlen=256)
_numbers = itertools.count()


def rewritten_graphs() -> list[RewrittenGraph]:
    """The graphs that `sp_backend` rewrote in this process, in order; the last 256 of them."""
    return list(_rewritten)


def record(
    captured: fx.GraphModule,
    rules: GraphRules,
    sites: Sequence[AttentionSite],
    plan: ShardingPlan,
    sharded: ShardedGraph,
    dump: str | os.PathLike[str] | None,
) -> RewrittenGraph:
    """Print, dump and keep what each pass did to a graph."""
    name = f"graph_{next(_numbers)}"
    places = {node.name: _placement(plan, node) for node in rules.graph.nodes}
    shapes = {node.name: node.meta.get("val") for node in rules.graph.nodes}
    stages = (
        ("capture", format_graph(captured)),
        ("find_attention", "\n".join(_format_site(site, rules) for site in sites) or "no attention"),
        ("propagate", format_graph(captured, lambda node: places[node.name])),
        ("insert_collectives", format_graph(sharded.graph_module, origin=sharded.origins, whole=shapes)),
    )
    for number, (stage, text) in enumerate(stages):
        title = f"{name}.{number}_{stage}"
        log.debug("%s\n%s", title, text)
        trace_structured(
            "artifact",
            metadata_fn=partial(dict, name=f"sp_compile_{title}", encoding="string"),
            payload_fn=partial(str, text),
        )
        if dump is not None:
            folder = Path(dump)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{title}.txt").write_text(text + "\n")
    graph = RewrittenGraph(name, captured, sharded.graph_module, plan, stages)
    _rewritten.append(graph)
    return graph


def _placement(plan: ShardingPlan, node: fx.Node) -> str:
    if node not in plan.nodes:
        return ""
    own = plan.nodes[node]
    made, seen = ", ".join(map(str, own.results())), ", ".join(map(str, own.delivered))
    return made if made == seen or not own.sharding else f"{made}, then {seen}"


def _format_site(site: AttentionSite, rules: GraphRules) -> str:
    names = ", ".join(
        f"{role} {rules.operands(end.node)[end.index].name} (dim {end.dim})"
        for role, end in (("query", site.query), ("key", site.key), ("value", site.value))
    )
    return f"{' '.join(node.name for node in site.nodes)}: {names}  # {user_line(site.output)}"


def format_graph(
    module: fx.GraphModule,
    note: Callable[[fx.Node], str] = lambda node: "",
    origin: Mapping[str, str] | None = None,
    whole: Mapping[str, Any] | None = None,
) -> str:
    """One line a node: name, dtype and shape, call, and what is noted of it."""
    lines = []
    for node in module.graph.nodes:
        value = node.meta.get("val")
        full = (whole or {}).get((origin or {}).get(node.name, ""))
        described = _describe(value, full)
        shown = f"{node.name}: {described}" if described else node.name
        if node.op == "output":
            shown = f"return {_format(node.args[0])}"
        elif node.op != "placeholder":
            arguments = [_format(arg) for arg in node.args]
            arguments += [f"{key}={_format(arg)}" for key, arg in node.kwargs.items()]
            shown += f" = {_target(node)}({', '.join(arguments)})"
        remarks = [note(node), user_line(node) if node.meta.get("stack_trace") else ""]
        remark = "  ".join(each for each in remarks if each)
        lines.append(f"{shown}  # {remark}" if remark else shown)
    return "\n".join(lines)


def _describe(value: Any, whole: Any) -> str:
    if isinstance(value, (tuple, list)):
        wholes = whole if isinstance(whole, (tuple, list)) and len(whole) == len(value) else [None] * len(value)
        return f"({', '.join(_describe(v, w) for v, w in zip(value, wholes, strict=True))})"
    if not isinstance(value, torch.Tensor):
        return str(value) if isinstance(value, torch.SymInt) else ""
    sizes = [str(size) for size in value.shape]
    if isinstance(whole, torch.Tensor) and whole.dim() == value.dim():
        sizes = [
            size if size == str(full) else f"{size} of {full}" for size, full in zip(sizes, whole.shape, strict=True)
        ]
    return f"{dtype_abbrs[value.dtype]}[{', '.join(sizes)}]"


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}.{node.target._opname}"
    return getattr(node.target, "__name__", str(node.target))


def _format(argument: Any) -> str:
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(map(_format, argument))}]"
    return str(argument)
