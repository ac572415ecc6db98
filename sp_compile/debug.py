"""What happened to a graph, as text: `rewritten_graphs()`, `TORCH_LOGS="+sp_compile"`, the `dump` folder, tlparse.

    # model.py:12 in forward: h = self.embed(ids)
    slice_ids: i64[1, 16 of 32] = sp.shard(ids, S(1: 32))
    h: f32[1, 16 of 32, 64] = aten.embedding(replicate_w, slice_ids)

`16 of 32` is the local size of the global one; `S(1: 32)` a placement, see `sp_compile.sharding`.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import unified_diff
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._logging._internal import trace_structured
from torch.utils._dtype_abbrs import dtype_abbrs

from .cost import Collective, collectives, planned_flops
from .errors import user_line
from .exchange import PACKED
from .graph import GraphRules
from .plan import AttentionSite, ShardedGraph, ShardingPlan, SiteOperand
from .sharded_dim import ShardedDim

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
    collectives: tuple[Collective, ...]
    """What it moves in one forward, in order."""
    stages: tuple[tuple[str, str], ...]
    """(pass, the graph after it as text), in order."""

    rules: GraphRules
    """The rules of the captured graph."""
    sharded: ShardedGraph
    """What the last pass gave: which captured value each rewritten node holds."""

    def __str__(self) -> str:
        return self.stages[-1][1]


@dataclass(frozen=True)
class UnshardedGraph:
    """One graph that runs as Dynamo gave it."""

    name: str
    graph_module: fx.GraphModule
    """In ATen ops if it was captured, else Dynamo's."""
    plan: ShardingPlan | None
    """A plan that shards nothing; None: the graph was not captured."""
    reason: str


_rewritten: deque[RewrittenGraph] = deque(maxlen=256)
_unsharded: deque[UnshardedGraph] = deque(maxlen=256)
_numbers = itertools.count()


def rewritten_graphs() -> list[RewrittenGraph]:
    """The graphs that `sp_backend` rewrote in this process, in order; the last 256 of them."""
    return list(_rewritten)


def unsharded_graphs() -> list[UnshardedGraph]:
    """The graphs that `sp_backend` left as they are, on more than one rank; the last 256 of them."""
    return list(_unsharded)


def record_unsharded(graph_module: fx.GraphModule, plan: ShardingPlan | None, reason: str) -> UnshardedGraph:
    """Keep a graph that is not rewritten."""
    graph = UnshardedGraph(f"graph_{next(_numbers)}", graph_module, plan, reason)
    _unsharded.append(graph)
    return graph


def record(
    given: fx.GraphModule,
    captured: fx.GraphModule,
    rules: GraphRules,
    sites: Sequence[AttentionSite],
    mixers: Sequence[SiteOperand],
    plan: ShardingPlan,
    unpacked: ShardedGraph,
    sharded: ShardedGraph,
    dump: str | os.PathLike[str] | None,
) -> RewrittenGraph:
    """Print, dump and keep what each pass did to the graph `given` by Dynamo."""
    name = f"graph_{next(_numbers)}"
    shapes = {node.name: node.meta.get("val") for node in rules.graph.nodes}
    # Without attention it is what else mixes the sequence.
    mixed = [("find_mixers", "\n".join(_format_mixer(each, rules) for each in mixers))] if mixers else []
    stages = (
        ("capture", format_graph(captured)),
        ("find_attention", "\n".join(_format_site(site, rules) for site in sites) or "no attention"),
        *mixed,
        ("propagate", format_graph(captured, partial(_placement, plan))),
        *(
            (name, format_graph(each.graph_module, origin=each.origins, whole=shapes))
            for name, each in (("insert_collectives", unpacked), ("pack_exchanges", sharded))
        ),
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
        # An analysis leaves the graph as it is: its diff is what it noted of it.
        in_site = {node: f"site {number}" for number, site in enumerate(sites) for node in site.nodes}
        mixing = {each.node: f"mixes dim {each.dim} of {_operand_name(each, rules)}" for each in mixers}
        noted = {
            "find_attention": format_graph(captured, lambda node: in_site.get(node, "")),
            "find_mixers": format_graph(captured, lambda node: mixing.get(node, "")),
        }
        graphs = [("dynamo", format_graph(given)), *((stage, noted.get(stage, text)) for stage, text in stages)]
        for number, (stage, text) in enumerate(stages):
            (before, old), (after, new) = graphs[number : number + 2]
            difference = unified_diff(old.splitlines(), new.splitlines(), before, after, lineterm="")
            (folder / f"{name}.{number}_{stage}.txt").write_text(text + "\n")
            (folder / f"{name}.{number}_{stage}.diff").write_text("\n".join(difference) + "\n")
    moved = collectives(sharded.graph_module.graph, plan.parts)
    graph = RewrittenGraph(name, captured, sharded.graph_module, plan, moved, stages, rules, sharded)
    _rewritten.append(graph)
    return graph


def log_summary(
    name: str, rules: GraphRules, plan: ShardingPlan, sharded: ShardedGraph | None, seconds: Mapping[str, float]
) -> None:
    """The line that a compiled graph is at INFO; all else that is no warning is at DEBUG."""
    if not log.isEnabledFor(logging.INFO):
        return
    strategies = Counter(site.strategy for site in plan.sites)
    moved = collectives(sharded.graph_module.graph, plan.parts) if sharded else ()
    log.info(
        "%s on %d ranks: %s; %d collectives, %s bytes received per rank, forward; %.1f%% of FLOPs sharded; "
        "%d fallbacks; planned in %.2f s",
        name,
        plan.parts,
        "attention sites: " + (", ".join(f"{n} {name}" for name, n in strategies.items()) or "none"),
        len(moved),
        f"{sum(each.bytes for each in moved):,}",
        100 * planned_flops(rules, plan).coverage if sharded else 0.0,
        len(plan.fallbacks),
        sum(seconds.values()),
    )


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


def _format_mixer(mixer: SiteOperand, rules: GraphRules) -> str:
    return f"{mixer.node.name}: {_operand_name(mixer, rules)} (dim {mixer.dim})  # {user_line(mixer.node)}"


def _operand_name(operand: SiteOperand, rules: GraphRules) -> str:
    return rules.operands(operand.node)[operand.index].name


def format_graph(
    module: fx.GraphModule,
    note: Callable[[fx.Node], str] = lambda node: "",
    origin: Mapping[str, str] | None = None,
    whole: Mapping[str, Any] | None = None,
) -> str:
    """One line a node: name, dtype and shape, call, and what is noted of it; the user's lines stand between."""
    lines = []
    place = ""
    for node in module.graph.nodes:
        value = node.meta.get("val")
        described = _describe(value, (whole or {}).get((origin or {}).get(node.name, "")))
        shown = f"{node.name}: {described}" if described else node.name
        if node.op == "output":
            shown = f"return {_format(node.args[0])}"
        elif node.op != "placeholder":
            if node.meta.get("stack_trace") and user_line(node) != place:
                place = user_line(node)
                lines.append(f"# {place}")
            shown += f" = {_call(node)}"
        remark = note(node)
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


def _call(node: fx.Node) -> str:
    if not isinstance(node.target, torch._ops.OpOverload):
        name = getattr(node.target, "__name__", str(node.target))
        return f"{name}({', '.join(map(_format, node.args))})"
    schema = node.target._schema.arguments
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | dict(node.kwargs)
    by_name = node.target.namespace == "sp"
    words = []
    for argument in schema:
        name = argument.name
        if name not in given or (argument.has_default_value() and given[name] == argument.default_value):
            continue
        if by_name and (name in ("rank", "group") or name.endswith(("outer", "sizes", "granules", "windows"))):
            continue
        if by_name and name.endswith("dim") and f"{name[:-3]}sizes" in given:
            words.append(_layout(given, name[:-3]))
        elif by_name and name == "exchanges":
            numbers: Any = given["exchanges"]
            words += _exchanges(numbers)
        elif argument.kwarg_only or argument.has_default_value():
            words.append(f"{name}={_format(given[name])}")
        else:
            words.append(_format(given[name]))
    return f"{node.target.namespace}.{node.target._opname}({', '.join(words)})"


def _layout(given: Mapping[str, Any], prefix: str) -> str:
    """The arguments of a layout as the placement that they are, `S(2: 32)`."""
    dim, outer, sizes, granules = (given[f"{prefix}{name}"] for name in ("dim", "outer", "sizes", "granules"))
    layout = ShardedDim(dim, outer, sizes, granules, given.get(f"{prefix}windows", ()))
    return f"{prefix.replace('_', ' ')}{_placed(layout)}"


def _exchanges(numbers: Sequence[Any]) -> list[str]:
    """Those of `all_to_all_packed`, as those of the ops that it packs; once if they are all the same."""
    left, words = iter(numbers), []
    for kind in left:
        words.append(f"gather {_placed(ShardedDim.read(left))}")
        if PACKED[kind] == "all_to_all":
            words[-1] += f" scatter {_placed(ShardedDim.read(left))}"
        elif PACKED[kind] == "all_to_all_kv":
            words[-1] += f" head_dim={next(left)} query_heads={next(left)}"
    return words[:1] if len(set(words)) == 1 else words


def _placed(layout: ShardedDim) -> str:
    windows = layout.windows or [0] * 2 * len(layout.sizes)
    segments = zip(layout.sizes, layout.granules, windows[::2], windows[1::2], strict=True)
    rows = [
        (f"{size}" if granule == 1 else f"{size}/{granule}")
        + (f"[{before}:-{after}]" if (before, after) != (0, 0) else "")
        for size, granule, before, after in segments
    ]
    outer = "" if layout.outer == 1 else f"{layout.outer}x"
    return f"S({layout.dim}: {outer}{'+'.join(rows)})"


def _format(argument: Any) -> str:
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(map(_format, argument))}]"
    return str(argument)
