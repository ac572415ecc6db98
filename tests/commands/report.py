"""What the four models move: `python -m tests.commands.report`, on simulated ranks.

One table a model: each kind of collective of one forward, with its count and the bytes that each rank receives.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from tabulate import tabulate

from ..equivalence import differences, run_simulated, step
from ..models import MODELS, inputs_of


def kind(name: str) -> str:
    """`gather_seq_scatter_heads_q_1` is of the kind `gather_seq_scatter_heads_q`."""
    stem, _, number = name.rpartition("_")
    return stem if number.isdigit() and not name.startswith("gather_output") else name


def main(parts: int = 4, length: int = 33) -> None:
    """Print the tables, and how far each model is from one device."""
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make()
        keywords = {"use_cache": False} if name in ("llama", "gpt2") else {}
        inputs = {**inputs_of(name, length), **keywords}
        expected = step(model, model, (), inputs)
        got, (graph,) = run_simulated(model, (), inputs, parts=parts)
        errors = differences(expected, got, parts)
        worst = {which: max(e for n, e in errors.items() if n.startswith(which)) for which in ("output", "grad")}
        moved: dict[str, list[int]] = defaultdict(list)
        for each in graph.collectives:
            moved[kind(each.name)].append(each.bytes)
        rows = [[role, len(sizes), f"{sum(sizes):,}"] for role, sizes in moved.items()]
        sites = ", ".join(planned.strategy for planned in graph.plan.sites)
        print(f"{name}, S={length}, P={parts}: sites {sites}; fallbacks {len(graph.plan.fallbacks)}")
        print(f"largest relative error: outputs {worst['output']:.1e}, gradients {worst['grad']:.1e} (fp32)")
        print(tabulate(rows, ["collective", "count", "bytes received per rank"], colalign=("left", "right", "right")))
        print()


if __name__ == "__main__":
    main()
