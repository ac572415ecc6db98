"""Train a small Llama on two ranks that share its sequence, next to the same model on one device.

    python examples/quickstart.py         it starts its own ranks; about 2 minutes on 2 cores, most of it compilation
    torchrun --nproc-per-node 2 examples/quickstart.py

A byte-level Llama with grouped KV heads learns the English of Python's own documentation. The sequence-parallel model
runs on every rank; the reference, compiled by plain Inductor, runs on rank 0 while the others wait; one thread each.
Printed: what each attention moves, both losses, the largest differences on any rank, and the step times. The exit code
is 1 if loss or logits differ by more than 2e-5 of their largest value, or a gradient by more than 2e-4 of the largest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
import transformers
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from sp_compile import RewrittenGraph, init_sequence_parallel, rewritten_graphs, sp_backend
from sp_compile.tools.explain import module_path

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 2e-4


@dataclass
class Trainer:
    """One training step, on one device or on all ranks; `step(batch)` gives loss `[]` and logits `[1, S, 256]`."""

    model: nn.Module
    backend: str | Callable[..., Any]

    def __post_init__(self) -> None:
        self.compiled = torch.compile(self.model, backend=self.backend, dynamic=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.seconds: list[float] = []

    def step(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        self.optimizer.zero_grad()
        output = self.compiled(input_ids=batch, labels=batch)
        output.loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - started)
        return output.loss.detach(), output.logits.detach()

    def gradients(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def main() -> None:
    args = parse_arguments()
    if "RANK" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        os.execv(sys.executable, [sys.executable, *launch, "--nproc-per-node", str(args.ranks), *sys.argv])
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    init_sequence_parallel()
    correct = train(args)
    dist.destroy_process_group()
    sys.exit(0 if correct else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sequence-parallel training next to one device.")
    for name, default, text in (
        ("ranks", 2, "processes to start, unless torchrun did"),
        ("steps", 20, "steps of training, at least 3"),
        ("layers", 4, "layers of the Llama"),
        ("sequence", 2048, "tokens in the sequence"),
        ("hidden", 192, "width of the Llama, a multiple of 16"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    args = parser.parse_args()
    if args.steps < 3 or args.hidden % 16:
        parser.error("--steps is at least 3, and --hidden a multiple of 16")
    return args


def make_model(args: argparse.Namespace) -> nn.Module:
    """The same random weights wherever it is called."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=args.sequence,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def train(args: argparse.Namespace) -> bool:
    """Train both models and print what came of it; whether they agree."""
    rank = dist.get_rank()
    text = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8).long()
    sharded = Trainer(make_model(args), sp_backend)
    alone = Trainer(make_model(args), "inductor")
    size = sum(p.numel() for p in sharded.model.parameters())
    if rank == 0:
        print(f"Llama, {args.layers} layers, {size / 1e6:.1f} M parameters; {args.sequence} bytes a step.")
        print("Compiling for one device, then for all ranks ...", flush=True)
    worst: dict[str, float] = {"loss": 0.0}
    starts = torch.randint(len(text) - args.sequence, (args.steps,), generator=torch.Generator().manual_seed(0))
    progress = tqdm(starts.tolist(), desc="training", disable=rank > 0)
    for number, start in enumerate(progress):
        batch = text[start : start + args.sequence].unsqueeze(0)
        loss, logits = alone.step(batch) if rank == 0 else (torch.empty(()), torch.empty(1, args.sequence, 256))
        dist.broadcast(loss, 0)
        sp_loss, sp_logits = sharded.step(batch)
        losses = {"one device": f"{loss:.5f}", f"{dist.get_world_size()} ranks": f"{sp_loss:.5f}"}
        progress.set_postfix(losses, refresh=False)
        worst["loss"] = max(worst["loss"], difference(loss, sp_loss))
        if number == 0:
            gradients = alone.gradients() if rank == 0 else torch.empty(size)
            dist.broadcast(logits, 0)
            dist.broadcast(gradients, 0)
            worst["logits, first step"] = difference(logits, sp_logits)
            worst["gradients, first step"] = difference(gradients, sharded.gradients())
            for graph in rewritten_graphs() if rank == 0 else []:
                progress.write(f"\n{describe_attention(graph)}\n", file=sys.stdout)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, worst)
    largest = {name: max(ranks[name] for ranks in everywhere) for name in worst}
    if rank == 0:
        print(f"\n{describe_differences(largest)}\n\n{describe_times(alone.seconds, sharded.seconds)}")
    wrong = [name for name, value in largest.items() if value > tolerance(name)]
    if rank == 0 and wrong:
        print(f"\nNot the same training as on one device: {'; '.join(wrong)}")
    return not wrong


def difference(expected: Tensor, got: Tensor) -> float:
    """The largest difference, relative to the largest value; infinite where something is not finite."""
    if expected.shape != got.shape or not (expected.isfinite().all() and got.isfinite().all()):
        return float("inf")
    return float((expected - got).abs().max() / expected.abs().max())


def tolerance(name: str) -> float:
    return GRADIENT_TOLERANCE if name.startswith("gradients") else OUTPUT_TOLERANCE


def describe_attention(graph: RewrittenGraph) -> str:
    """A table of the attention sites. An exchange belongs to the site whose output it moves, else to the next one."""
    sites = {planned.site.output.name: number for number, planned in enumerate(graph.plan.sites)}
    moved = [0] * (len(sites) + 1)
    upcoming = 0
    exchanges = {each.name: each for each in graph.collectives}
    for node in graph.rewritten.graph.nodes:
        if node.name in exchanges:
            moved[sites.get(exchanges[node.name].sources[0], upcoming)] += exchanges[node.name].bytes
        upcoming = sites.get(node.name, upcoming - 1) + 1
    rows = []
    for planned, size in zip(graph.plan.sites, moved, strict=False):
        ends = planned.site.query, planned.site.key
        values = [graph.plan.nodes[end.node].sources.get(end.index, end.node.args[end.index]) for end in ends]
        heads = [value.meta["val"].shape[1] for value in values]
        rows.append([module_path(planned.site.output), *heads, planned.strategy, f"{size:,}"])
    columns = ["attention", "heads", "KV heads moved", "strategy", "bytes received per rank, forward"]
    return tabulate(rows, columns, colalign=("left", "right", "right", "left", "right"))


def describe_differences(largest: dict[str, float]) -> str:
    rows = [[name, f"{value:.1e}", f"{tolerance(name):.0e}"] for name, value in largest.items()]
    return tabulate(rows, ["largest difference, any rank", "relative", "allowed"], disable_numparse=True)


def describe_times(alone: list[float], sharded: list[float]) -> str:
    """Median and quartiles of the steps after the first, which compiles."""
    rows, medians = [], []
    for name, seconds in (("one device", alone), (f"{dist.get_world_size()} ranks", sharded)):
        low, median, high = statistics.quantiles([1000 * each for each in seconds[1:]], n=4)
        rows.append([name, f"{median:.0f}", f"{low:.0f} to {high:.0f}", f"{seconds[0]:.0f}"])
        medians.append(median)
    columns = ["one thread each", "median step, ms", "middle half, ms", "first step, s"]
    table = tabulate(rows, columns, colalign=("left", "right", "right", "right"))
    return f"{table}\n\n{medians[0] / medians[1]:.2f} times as fast as one device"


if __name__ == "__main__":
    main()
