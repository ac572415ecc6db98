"""What the guard costs: `python -m tests.commands.guard_cost`, steps of two gloo ranks with it and without.

The same model is compiled once for each setting of the option `guards`, in one run; the settings take turns, a step
each, so that what else the machine does falls on all alike. The cost is the median over rounds of the difference to the
step without guards of the same round, with the quartiles of that difference; and its share of that step.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sp_compile import sp_backend

from ..gloo_pool import GlooPool
from ..test_passes import Block

SETTINGS = ("off", "shapes", "on")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(64, 12), Block()

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (self.block(self.embed(input_ids)).square().mean() + 0 * labels.sum(),)


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "one attention, 64 tokens": (Small, 64, 64),
    "Llama of 4 layers, 1,024 tokens": (llama, 2048, 1024),
    "the same, 4,096 tokens": (llama, 2048, 4096),
}


def steps_of(name: str, rounds: int) -> dict[str, list[float]]:
    """By setting, the seconds of each step on this rank."""
    make, vocabulary, length = MODELS[name]
    model = make()
    calls = {}
    for setting in SETTINGS:
        options = {"guards": setting}
        calls[setting] = torch.compile(copy.deepcopy(model), backend=partial(sp_backend, options=options))
    seconds: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    generator = torch.Generator().manual_seed(0)
    for number in range(rounds + 3):
        ids = torch.randint(vocabulary, (1, length), generator=generator)
        # The order rotates: what follows the longest step, say, is each of them in turn.
        for at in range(len(SETTINGS)):
            setting = SETTINGS[(at + number) % len(SETTINGS)]
            dist.barrier()
            started = time.perf_counter()
            calls[setting](input_ids=ids, labels=ids)[0].backward()
            if number >= 3:
                seconds[setting].append(time.perf_counter() - started)
    return seconds


def row(name: str, setting: str, seconds: dict[str, list[float]]) -> list[Any]:
    """A row of the table."""
    without, found = seconds["off"], seconds[setting]
    more = [a - b for a, b in zip(found, without, strict=True)]
    low, middle, high = statistics.quantiles(more, n=4)
    step = statistics.median(without)
    spread = statistics.quantiles(without, n=4)
    return [
        name,
        setting,
        f"{1e3 * step:.2f} ({1e3 * spread[0]:.2f} to {1e3 * spread[2]:.2f})",
        f"{1e3 * middle:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f})",
        f"{100 * middle / step:.2f}%",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--model", choices=MODELS, action="append", help="without any: all")
    options = parser.parse_args()
    rounds = options.rounds
    pool, rows = GlooPool(2), []
    for name in options.model or MODELS:
        seconds = pool.run(steps_of, name, rounds, timeout=3600.0)[0]
        rows += [row(name, setting, seconds) for setting in SETTINGS if setting != "off"]
    pool.close()
    print(tabulate(rows, ["model", "guards", "a step without, ms (quartiles)", "more with them, ms", "share"]))


if __name__ == "__main__":
    main()
