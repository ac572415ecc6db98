"""The table of programs, and the parts that they are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import getitem
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sp_compile import RewrittenGraph
from sp_compile.ir.effects import STATE
from sp_compile.ops.exchange import GatherExchange
from sp_compile.placement.sharded_dim import ShardedDim
from sp_compile.planning.cost import packed_exchanges

Argument = tuple[int, ...] | Callable[[], Tensor]
"""The shape of a float64 input that needs a gradient, or what makes another input."""

X = (2, 13, 12)
WIDE = (2, 13, 24)


def given(*values: int) -> Argument:
    return lambda: torch.tensor(values)


def single(shape: tuple[int, ...]) -> Argument:
    return lambda: torch.randn(shape, requires_grad=True)


def ids(*shape: int, high: int = 40) -> Argument:
    return lambda: torch.randint(0, high, shape)


def labels(ignored: Any = ()) -> Argument:
    """`[2, 13]` of 17 classes, without those at the positions `ignored`."""

    def make() -> Tensor:
        target = torch.randint(0, 17, (2, 13))
        target[:, list(ignored)] = -100
        return target

    return make


class Parts(nn.Module):
    """The parameters of a small transformer, for a program to use what it needs; the rest has no gradient."""

    def __init__(
        self, body: Callable[..., Any], heads: int = 3, dim: int = 4, kv: int | None = None, double: bool = True
    ) -> None:
        super().__init__()
        self.body, self.heads, self.dim, self.kv = body, heads, dim, kv or heads
        c = heads * dim
        self.q, self.k, self.v = nn.Linear(c, c), nn.Linear(c, self.kv * dim), nn.Linear(c, self.kv * dim)
        self.o, self.up, self.down = nn.Linear(c, c), nn.Linear(c, 20), nn.Linear(20, c)
        self.norm, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.head, self.mod = nn.Linear(c, 17), nn.Linear(c, 3 * c)
        self.table, self.rel = nn.Embedding(40, c), nn.Embedding(20, heads)
        self.cls, self.bias = nn.Parameter(torch.randn(1, 1, c)), nn.Parameter(torch.randn(heads))
        self.w, self.mat = nn.Parameter(torch.randn(c)), nn.Parameter(torch.randn(c, c) / 3)
        self.count: Tensor
        self.register_buffer("count", torch.zeros(()))
        if double:
            self.double()

    def forward(self, *args: Tensor) -> Any:
        return self.body(self, *args)

    def split(self, y: Tensor, heads: int | None = None) -> Tensor:
        """`[B, S, (h d)] -> [B, h, S, d]`"""
        return y.view(y.shape[0], y.shape[1], heads or self.heads, self.dim).transpose(1, 2)

    def join(self, y: Tensor) -> Tensor:
        """`[B, h, S, d] -> [B, S, (h d)]`"""
        return y.transpose(1, 2).reshape(y.shape[0], -1, self.heads * self.dim)

    def repeated(self, y: Tensor) -> Tensor:
        """`[B, g, S, d] -> [B, (g r), S, d]`, as Llama repeats its KV heads."""
        b, g, s, d = y.shape
        r = self.heads // g
        return y[:, :, None].expand(b, g, r, s, d).reshape(b, g * r, s, d)

    def attend(self, x: Tensor, memory: Tensor | None = None, **options: Any) -> Tensor:
        memory = x if memory is None else memory
        q = self.split(self.q(x))
        k, v = self.split(self.k(memory), self.kv), self.split(self.v(memory), self.kv)
        out: Tensor = self.o(self.join(F.scaled_dot_product_attention(q, k, v, **options)))
        return out

    def block(self, x: Tensor, **options: Any) -> Tensor:
        x = x + self.attend(self.norm(x), **options)
        return mlp(self, x)


def mlp(m: Parts, x: Tensor) -> Tensor:
    """A residual layer of each row by itself."""
    out: Tensor = x + m.down(F.gelu(m.up(m.norm2(x))))
    return out


@dataclass(frozen=True)
class Program:
    name: str
    module: Callable[[], nn.Module]
    arguments: tuple[Argument, ...]
    parts: int
    dynamic: bool | None = None
    whole: bool = False
    """Something runs on gathered values, for want of a rule or of a dimension to borrow."""
    moves: dict[str, int] = field(default_factory=dict)
    """How often each collective runs in a forward; not asserted if empty."""
    attention: str = "auto"
    shards: bool = True
    """False: there may be nothing to shard, or nothing that sharding starts from."""
    tolerance: float = 1e-9

    def inputs(self) -> list[Tensor]:
        return [
            torch.randn(a, dtype=torch.float64, requires_grad=True) if isinstance(a, tuple) else a()
            for a in self.arguments
        ]


PROGRAMS: list[Program] = []


def program(
    *arguments: Argument,
    parts: int | None = None,
    dynamic: bool | None = None,
    whole: bool = False,
    moves: dict[str, int] | None = None,
    shards: bool = True,
    attention: str = "auto",
    tolerance: float = 1e-9,
    **options: int,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a program `(parts, *inputs) -> outputs` to the table; P rotates over the names unless it is given."""

    def add(body: Callable[..., Any]) -> Callable[..., Any]:
        make = partial(Parts, body, **options)
        p = parts or 2 + sum(map(ord, body.__name__)) % 3  # by name: it stays when the table grows
        PROGRAMS.append(
            Program(body.__name__, make, arguments, p, dynamic, whole, moves or {}, attention, shards, tolerance)
        )
        return body

    return add


def moved(graph: RewrittenGraph) -> Counter[str]:
    """How many values each op moves; an all-gather of K or V, or of an output, goes by that name."""
    counts: Counter[str] = Counter()
    for node in graph.rewritten.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "sp":
            if node.target is torch.ops.sp.all_to_all_packed.default:
                exchanges = [exchange for _, exchange in packed_exchanges(node, graph.plan.parts)]
                gathers = sum(isinstance(exchange, GatherExchange) for exchange in exchanges)
                seq = "gather_seq" if any("gather_seq" in user.name for user in node.users) else "all_gather"
                counts["all_to_all"] += len(exchanges) - gathers
                counts[seq] += gathers
                continue
            name = node.target._opname.removesuffix("_kv").removesuffix("_replicate")
            for role in ("gather_output", "gather_seq", "halo"):
                if name == "all_gather" and node.name.startswith(role):
                    name = role
            counts[name] += 1
    return Counter({name: counts[name] for name in COLLECTIVES if counts[name]})


def wasted(graph: RewrittenGraph) -> list[str]:
    """The moves that repeat another of the same grad mode and autocast, or undo one."""
    found, region = [], 0
    seen: dict[str, str] = {}
    made_by: dict[Any, tuple[Any, ...]] = {}
    for node in graph.sharded.graph_module.graph.nodes:
        op = getattr(node.target, "_opname", "") if getattr(node.target, "namespace", "") == "sp" else ""
        region += node.target in STATE
        moves = []
        if op == "all_to_all_packed":
            moves = [(sent, type(move).__name__, *move) for sent, move in packed_exchanges(node, graph.plan.parts)]
        elif op == "all_to_all":
            moves = [(node.args[0], "Exchange", ShardedDim(*node.args[1:5]), ShardedDim(*node.args[5:9]), False)]
        elif op in ("all_gather", "shard"):
            moves = [(node.args[0], op, *node.args[2:], *node.kwargs.values())]
        for move in moves:
            key = f"{move} {region}"
            if key in seen:
                found.append(f"{node} repeats {seen[key]}")
            seen[key] = str(node)
            above = made_by.get(move[0], (None, ""))
            undone = move[1] == above[1] == "Exchange" and move[2:4] == above[3:1:-1]
            if undone or ((move[1], above[1]) == ("shard", "all_gather") and move[2:] == above[2:]):
                found.append(f"{node} undoes {move[0]}")
        if len(moves) == 1:
            made_by[node] = moves[0]
        elif isinstance(node.args[0] if node.args else None, fx.Node) and op == "" and node.target is getitem:
            packed = getattr(node.args[0].target, "_opname", "") == "all_to_all_packed"
            if packed:
                sent, move = packed_exchanges(node.args[0], graph.plan.parts)[node.args[1]]
                made_by[node] = (sent, type(move).__name__, *move)
    return found


COLLECTIVES = ("all_to_all", "all_gather", "gather_seq", "all_reduce", "select_rows", "gather_output", "halo")


def rope(x: Tensor, pos: Tensor, interleaved: bool = False) -> Tensor:
    d = x.shape[-1]
    angle = pos[..., None].to(x.dtype) * 10000 ** -(torch.arange(0, d, 2, dtype=x.dtype) / d)
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)
    both = torch.cat([angle, angle], -1)
    a, b = x.chunk(2, -1)
    return x * both.cos() + torch.cat([-b, a], -1) * both.sin()
