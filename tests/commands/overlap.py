"""How much of the communication of a training step is hidden: `python -m tests.commands.overlap`.

Two gloo ranks of one thread on a transport of artificial latency and bandwidth (`tests.slow_transport`), Inductor as
inner backend. Models: a Llama, whose exchanges have little beside them, and parallel blocks as Flux has them in one
stream, whose MLP is independent of the attention. With and without the option `overlap`, and without buckets.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sp_compile import sp_backend

from ..gloo_pool import GlooPool
from ..slow_transport import slow_transport

VARIANTS: dict[str, dict[str, Any]] = {
    "each gradient by itself, waits where they stand": {"overlap": False, "gradient_bucket_mb": 0},
    "buckets": {"overlap": False},
    "buckets, work under collectives": {},
    "buckets of 4 MB, work under collectives": {"gradient_bucket_mb": 4},
}
ROUNDS = 5


class Parallel(nn.Module):
    """Blocks whose attention and MLP read the same norm: `[1, S, 256]` -> `[]`."""

    def __init__(self, width: int = 256, heads: int = 8, depth: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.qkv, self.up = (nn.ModuleList(nn.Linear(width, n * width) for _ in range(depth)) for n in (3, 4))
        self.out = nn.ModuleList(nn.Linear(5 * width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for norm, qkv, up, out in zip(self.norms, self.qkv, self.up, self.out, strict=True):
            h = norm(x)
            q, k, v = qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + out(torch.cat([attended, F.gelu(up(h))], -1))
        return x.square().mean()


class Loss(nn.Module):
    """A Llama of 4 layers that returns its loss alone: int64 `[1, S]` -> `[]`."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            use_cache=False,
        )
        self.model = LlamaForCausalLM(config)

    def forward(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss


def measured(name: str, length: int, latency: float, bandwidth: float, options: dict[str, Any]) -> tuple[float, float]:
    """The median hidden share, and milliseconds, of a step."""
    torch.manual_seed(0)
    model = Loss() if name == "llama" else Parallel()
    x = torch.randint(256, (1, length)) if name == "llama" else torch.randn(1, length, 256)
    compiled = torch.compile(model, backend=partial(sp_backend, options={**options, "guards": "off"}), dynamic=False)
    compiled(x).backward()
    hidden, seconds = [], []
    with slow_transport(latency, bandwidth) as transport:
        for _ in range(ROUNDS):
            model.zero_grad()
            transport.reset()
            started = time.perf_counter()
            compiled(x).backward()
            seconds.append(time.perf_counter() - started)
            hidden.append(transport.hidden)
    return statistics.median(hidden), 1e3 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=1.0, help="milliseconds of a launch (default: 1)")
    parser.add_argument("--mib-s", type=float, default=200.0, help="MiB a second (default: 200)")
    parser.add_argument("--sequence", type=int, default=1024)
    options = parser.parse_args()
    pool, rows = GlooPool(2), []
    for name in ("llama", "parallel"):
        for told, variant in VARIANTS.items():
            link = (options.latency / 1e3, options.mib_s * 2**20)
            found = pool.run(measured, name, options.sequence, *link, variant)
            hidden, step = (statistics.mean(values) for values in zip(*found, strict=True))
            rows.append([name, told, f"{hidden:.0%}", f"{step:.0f}"])
    pool.close()
    print(tabulate(rows, ["model", "options", "hidden", "step, ms"], disable_numparse=True))


if __name__ == "__main__":
    main()
