"""A report as `explain` gives it, written by hand: a decoder of identical layers, its totals summed from its ops."""

from __future__ import annotations

import copy
from typing import Any

MIB = 2**20
HEADS, KV_HEADS, HEAD_DIM, WIDTH, HIDDEN, VOCABULARY = 32, 8, 128, 4096, 14336, 128256


def decoder_report(layers: int, parts: int = 8, length: int = 131072, model: str = "Decoder") -> dict[str, Any]:
    """A report of about 75 ops a layer; every number follows from the sizes above."""
    return Decoder(layers, parts, length, model).report


class Decoder:
    """Writes ops one after another."""

    def __init__(self, layers: int, parts: int, length: int, model: str) -> None:
        self.parts, self.length = parts, length
        self.ops: list[dict[str, Any]] = []
        self.collectives: list[dict[str, Any]] = []
        self.sites: list[dict[str, Any]] = []
        ids = self.op("input_ids", "input", "", [1, length], [], kind="input", dtype="i64")
        weights = [self.op(f"p_{i}", "input", "", [WIDTH, WIDTH], [], kind="input") for i in range(9 * layers)]
        sliced = self.move("slice_input_ids", "shard", "model.embed_tokens", [1, length], ids, 1, 0, 0)
        x = self.op("embedding", "aten.embedding", "model.embed_tokens", [1, length, WIDTH], [sliced], dim=1)
        tables = [
            self.op(name, f"aten.{name}", "model.rotary_emb", [1, length, HEAD_DIM], [ids], kind="replicated", work=1)
            for name in ("cos", "sin")
        ]
        for layer in range(layers):
            x = self.layer(f"model.layers.{layer}", x, tables, weights[9 * layer : 9 * layer + 9])
        x = self.norm("model.norm", x)
        logits = self.op("lm_head", "aten.linear", "lm_head", [1, length, VOCABULARY], [x], dim=1, work=2 * WIDTH)
        loss = self.op("nll", "aten.nll_loss", "", [], [logits], kind="sharded", work=5)
        self.move("reduce_loss", "all_reduce", "", [], loss, None, 8, 0)
        self.op("output", "output", "", [], ["reduce_loss"], kind="output")
        self.report = {
            "model": model,
            "sp_size": parts,
            "links": {"bandwidth": 4e11, "latency": 1e-5},
            "incomplete": "",
            "graphs": [
                {
                    "name": "graph_0",
                    "unsharded": "",
                    "ends": "",
                    "ops": self.ops,
                    "sites": self.sites,
                    "collectives": self.collectives,
                    "fallbacks": [],
                    "outputs": [{"name": "loss", "shape": [], "bytes": 0, "expensive": False, "remedy": ""}],
                    "calls": 1,
                }
            ],
            "totals": {},
            "scaling": [{"sp_size": p, "strategies": self.strategies(p)} for p in (2, 4, 8, 16, 32, 64)],
        }
        self.report["totals"] = totals(self.report)

    def strategies(self, parts: int) -> dict[str, int]:
        query = self.length * WIDTH * 2 // parts
        return {
            "local": 0,
            "ulysses": round((2 + 2 * max(KV_HEADS, parts) / HEADS) * query * (parts - 1) / parts),
            "all_gather_kv": 2 * query * KV_HEADS // HEADS * (parts - 1),
        }

    def op(
        self,
        name: str,
        op: str,
        module: str,
        shape: list[int],
        operands: list[str],
        *,
        dim: int | None = None,
        kind: str = "",
        work: int = 0,
        dtype: str = "bf16",
    ) -> str:
        """`work` is in FLOPs an element of the result."""
        taken = {each["name"] for each in self.ops}
        if name in taken:
            name = next(f"{name}_{i}" for i in range(1, 10**6) if f"{name}_{i}" not in taken)
        local = [-(-size // self.parts) if i == dim else size for i, size in enumerate(shape)]
        size = 1
        for each in shape:
            size *= each
        self.ops.append(
            {
                "name": name,
                "op": op,
                "module": module,
                "line": f"modeling_decoder.py:{100 + len(op)} in forward: {op.rpartition('.')[2]}(...)",
                "placement": kind or ("sharded" if dim is not None else "replicated"),
                "layout": "" if dim is None else f"S({dim}: {shape[dim]})",
                "shape": shape,
                "local_shape": local,
                "dtype": dtype,
                "flops": work * size,
                "operands": operands,
            }
        )
        return name

    def move(
        self, name: str, op: str, module: str, shape: list[int], source: str, dim: int | None, forward: int, back: int
    ) -> str:
        made = self.op(name, f"sp.{op}", module, shape, [source], dim=dim, kind="collective")
        self.collectives.append(
            {
                "name": made,
                "op": f"sp.{op}",
                "role": name,
                "module": module,
                "line": self.ops[-1]["line"],
                "bytes_forward": forward,
                "bytes_backward": back,
                "launches_forward": int(forward > 0),
                "launches_backward": int(back > 0),
                "padded_forward": forward,
                "padded_backward": back,
            }
        )
        return made

    def linear(self, module: str, x: str, weight: str, rows: int, columns: int) -> str:
        moved = 2 * rows * columns * 2 * (self.parts - 1) // self.parts
        whole = self.move(f"replicate_{weight}", "replicate", module, [columns, rows], weight, None, 0, moved)
        return self.op("linear", "aten.linear", module, [1, self.length, columns], [x, whole], dim=1, work=2 * rows)

    def norm(self, module: str, x: str) -> str:
        shape = [1, self.length, WIDTH]
        made = x
        for name in ("to", "pow", "mean", "add", "rsqrt", "mul", "to", "mul"):
            made = self.op(name, f"aten.{name}", module, shape, [made], dim=1, work=int(name != "to"))
        return made

    def layer(self, module: str, x: str, tables: list[str], weights: list[str]) -> str:
        attention = f"{module}.self_attn"
        normed = self.norm(f"{module}.input_layernorm", x)
        heads = []
        for (name, number), weight in zip((("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)), weights[:3], strict=True):
            made = self.linear(f"{attention}.{name}_proj", normed, weight, WIDTH, number * HEAD_DIM)
            made = self.op("view", "aten.reshape", attention, [1, self.length, number, HEAD_DIM], [made], dim=1)
            shape = [1, number, self.length, HEAD_DIM]
            made = self.op("transpose", "aten.transpose", attention, shape, [made], dim=2)
            if name != "v":
                half = self.op("cat", "aten.cat", attention, shape, [made], dim=2)
                terms = [
                    self.op("mul", "aten.mul", attention, shape, [each, table], dim=2, work=1)
                    for each, table in zip((made, half), tables, strict=True)
                ]
                made = self.op("add", "aten.add", attention, shape, terms, dim=2, work=1)
            size = number * self.length * HEAD_DIM * 2 // self.parts * (self.parts - 1) // self.parts
            heads.append(
                self.move(f"gather_seq_scatter_heads_{name}", "all_to_all", attention, shape, made, 1, size, size)
            )
        shape = [1, HEADS, self.length, HEAD_DIM]
        made = self.op(
            "sdpa", "aten.scaled_dot_product_attention", attention, shape, heads, dim=1, work=4 * self.length
        )
        moved = sum(each["bytes_forward"] for each in self.collectives[-5:] if "gather_seq" in each["role"])
        size = HEADS * self.length * HEAD_DIM * 2 // self.parts * (self.parts - 1) // self.parts
        self.sites.append(
            {
                "module": attention,
                "line": self.ops[-1]["line"],
                "heads": HEADS,
                "kv_heads": KV_HEADS,
                "length": self.length,
                "strategy": "ulysses",
                "bytes": moved + size,
                "reason": "32 heads over 8 ranks",
                "others": [{"strategy": "all_gather_kv", "bytes": self.strategies(self.parts)["all_gather_kv"]}],
            }
        )
        made = self.move("gather_heads_scatter_seq", "all_to_all", attention, shape, made, 2, size, size)
        made = self.op("view", "aten.reshape", attention, [1, self.length, WIDTH], [made], dim=1)
        made = self.linear(f"{attention}.o_proj", made, weights[3], WIDTH, WIDTH)
        x = self.op("add", "aten.add", module, [1, self.length, WIDTH], [x, made], dim=1, work=1)
        normed = self.norm(f"{module}.post_attention_layernorm", x)
        gate = self.linear(f"{module}.mlp.gate_proj", normed, weights[4], WIDTH, HIDDEN)
        gate = self.op("silu", "aten.silu", f"{module}.mlp.act_fn", [1, self.length, HIDDEN], [gate], dim=1, work=1)
        up = self.linear(f"{module}.mlp.up_proj", normed, weights[5], WIDTH, HIDDEN)
        made = self.op("mul", "aten.mul", f"{module}.mlp", [1, self.length, HIDDEN], [gate, up], dim=1, work=1)
        made = self.linear(f"{module}.mlp.down_proj", made, weights[6], HIDDEN, WIDTH)
        return self.op("add", "aten.add", module, [1, self.length, WIDTH], [x, made], dim=1, work=1)


def totals(report: dict[str, Any]) -> dict[str, Any]:
    """What the parts of a report sum to."""
    moves = [each for graph in report["graphs"] for each in graph["collectives"]]
    ops = [each for graph in report["graphs"] for each in graph["ops"]]
    summed = {
        f"{what}_{way}": sum(each[f"{what}_{way}"] for each in moves)
        for what in ("bytes", "launches")
        for way in ("forward", "backward")
    }
    return {
        **summed,
        "lower_bound_forward": summed["bytes_forward"],
        "lower_bound_backward": summed["bytes_backward"],
        "flops_sharded": sum(each["flops"] for each in ops if each["placement"] == "sharded"),
        "flops_replicated": sum(each["flops"] for each in ops if each["placement"] == "replicated"),
        "activation_bytes": 34 * 1024 * MIB,
        "activation_bytes_one_device": 260 * 1024 * MIB,
        "seconds": {"forward": 0.025, "backward": 0.075},
    }


def with_fallback(report: dict[str, Any]) -> dict[str, Any]:
    """The same with an op on gathered values, and logits that are gathered."""
    changed = copy.deepcopy(report)
    graph = changed["graphs"][0]
    op = next(each for each in graph["ops"] if each["op"] == "aten.silu")
    graph["fallbacks"].append(
        {
            "op": op["op"],
            "line": op["line"],
            "why": "no sharding rule for mylib.scan",
            "cost": {"bytes": 512 * MIB, "flops": 10**12},
            "remedy": 'register_sharding_rule(torch.ops.mylib.scan, "b s! c, c -> b s! c")',
        }
    )
    graph["outputs"].append(
        {
            "name": "logits",
            "shape": [1, 131072, VOCABULARY],
            "bytes": 28 * 1024 * MIB,
            "expensive": True,
            "remedy": 'return the loss alone, or options={"outputs": "shard"}',
        }
    )
    return changed
