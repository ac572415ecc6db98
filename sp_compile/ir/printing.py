"""A graph as text.

    # model.py:12 in forward: h = self.embed(ids)
    slice_ids: i64[1, 16 of 32] = sp.shard(ids, S(1: 32))
    h: f32[1, 16 of 32, 64] = aten.embedding(replicate_w, slice_ids)

`16 of 32` is the local size of the global one; `S(1: 32)` a placement, see `sp_compile.placement.placements`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._dtype_abbrs import dtype_abbrs

from ..errors import user_line
from ..ops.exchange import PACKED
from ..placement.sharded_dim import ShardedDim


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
