"""Time a training step: one device, sequence parallelism by hand, and `sp_backend`, side by side in one run.

    python examples/benchmark.py --sequence 4096 8192 --kv-heads 8 --plot llama.png
    python examples/benchmark.py --sequence 4096 8192 --kv-heads 2
    python examples/benchmark.py --model vit --sequence 4096
    python examples/benchmark.py --model my_models.py:make     make() -> (model, args, kwargs)
    python examples/benchmark.py --sequence 4096 --ranks 2 4   one after the other
    torchrun --nproc-per-node 2 examples/benchmark.py          ranks of your own

A step is forward and backward, from the loss, or the sum of the first output. Every round runs each variant once, in
turn; a rank has one thread.

    one device     rank 0 runs the whole model, the others wait
    ceiling        every rank does its part of the work, S/P rows and H/P heads of all S, and nothing is sent: what P
                   processes that share this machine can reach at best. Its results mean nothing.
    by hand        `sp_compile.functional` in the model's code, eager, gradients averaged by DDP
    by hand, compiled
    sp_backend     the model as it is

Written by hand (llama, vit): rows cut before the embedding, one all-to-all for q, k and v with grouped KV heads beside
Q, one for the output, rotary tables cut by rank, a loss over my rows. Printed: medians with the middle half of the
rounds; launches and bytes that a rank receives in a step, counted at the process group; what a step adds to resident
memory at its peak, the heap trimmed before and what is freed given back at once, the median of three; the first step,
which compiles. The exit code is 1 if losses and gradients are not those of one device.
"""

import argparse
import ctypes
import gc
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from sp_compile import get_sequence_parallel_group, init_sequence_parallel, sp_backend
from sp_compile.functional import gather_heads_scatter_seq, gather_seq_scatter_heads

TOLERANCE = 1e-4
CEILING = "ceiling"
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of malloc.h
LEAST_KEPT, MOST_KEPT = 2**17, 2**25
STEPS_OF_PEAK = 3


# The model, and how it is written by hand


@dataclass(frozen=True)
class Sizes:
    """Of a transformer; lengths in tokens."""

    kind: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int = 256


Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""`[B, s, H, D]`, `[B, s, G, D]` twice, and whether causal -> `[B, s, H * D]`; s is S, or the rows of a rank."""


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2).flatten(2)


def attend_by_hand(q: Tensor, k: Tensor, v: Tensor, causal: bool, parts: int, sends: bool) -> Tensor:
    """All rows for my heads, by one all-to-all there and one back; without `sends` as much work on rows of mine."""
    if k.shape[2] % parts:
        k, v = (x.repeat_interleave(parts // math.gcd(x.shape[2], parts), 2) for x in (k, v))
    dim, width = q.shape[-1], [x.shape[2] // parts for x in (q, k, v)]
    of_ranks = torch.cat([x.unflatten(2, (parts, -1)) for x in (q, k, v)], 3)  # [B, s, P, heads of a rank, D]
    if sends:
        qkv = gather_seq_scatter_heads(of_ranks.flatten(2), seq_dim=1, head_dim=2).unflatten(2, (-1, dim))
    else:
        qkv = of_ranks.transpose(1, 2).flatten(1, 2)
    out = attend(*qkv.split(width, 2), causal)  # type: ignore[call-arg, arg-type]
    if sends:
        return gather_heads_scatter_seq(out, head_dim=2, seq_dim=1)
    return out.unflatten(1, (parts, -1)).transpose(1, 2).flatten(2)


def rotary(x: Tensor, table: Tensor) -> Tensor:
    """`[B, s, H, D]` turned by `[s, 2, D / 2]`."""
    (cos, sin), (a, b) = table.unsqueeze(2).unbind(1), x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, head = sizes, sizes.hidden // sizes.heads
        self.norm, self.mlp_norm = nn.RMSNorm(sizes.hidden), nn.RMSNorm(sizes.hidden)
        self.q = nn.Linear(sizes.hidden, sizes.heads * head, bias=False)
        self.k, self.v = (nn.Linear(sizes.hidden, sizes.kv_heads * head, bias=False) for _ in range(2))
        self.o = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.gate, self.up = (nn.Linear(sizes.hidden, 3 * sizes.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * sizes.hidden, sizes.hidden, bias=False)

    def forward(self, x: Tensor, table: Tensor, attention: Attend) -> Tensor:
        h = self.norm(x)
        q, k, v = (to(h).unflatten(2, (-1, self.sizes.hidden // self.sizes.heads)) for to in (self.q, self.k, self.v))
        x = x + self.o(attention(rotary(q, table), rotary(k, table), v, self.sizes.kind == "llama"))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Transformer(nn.Module):
    """`llama`: next-token cross-entropy of int64 `[1, S]`. `vit`: a class from the mean over float `[1, S, 192]`."""

    def __init__(self, sizes: Sizes, length: int) -> None:
        super().__init__()
        self.sizes, head = sizes, sizes.hidden // sizes.heads
        self.embed = (
            nn.Embedding(sizes.vocabulary, sizes.hidden) if sizes.kind == "llama" else nn.Linear(192, sizes.hidden)
        )
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm, self.head = nn.RMSNorm(sizes.hidden), nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)
        angles = torch.outer(torch.arange(length), 10000 ** -(torch.arange(0, head, 2) / head))
        self.register_buffer("table", torch.stack([angles.cos(), angles.sin()], 1))

    def body(self, x: Tensor, table: Tensor, attention: Attend) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, table, attention)
        return self.norm(h)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.body(x, self.table, attend)
        logits = self.head(h) if self.sizes.kind == "llama" else self.head(h.mean(1))
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


class ByHand(nn.Module):
    """The same weights on this rank's rows. The mean over ranks of its losses is the loss, and so for gradients."""

    def __init__(self, model: Transformer, parts: int, rank: int, sends: bool = True) -> None:
        super().__init__()
        self.model, self.parts, self.rank = model, parts, rank
        self.attention: Attend = partial(attend_by_hand, parts=parts, sends=sends)
        self.sends = sends

    def rows(self, x: Tensor, dim: int) -> Tensor:
        return x.chunk(self.parts, dim)[self.rank]

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        model = self.model
        h = model.body(self.rows(x, 1), self.rows(model.table, 0), self.attention)
        if model.sizes.kind == "llama":
            total = F.cross_entropy(model.head(h).flatten(0, 1), self.rows(labels, 1).flatten(), reduction="sum")
            return total * self.parts / (labels != -100).sum()
        pooled = h.sum(1) / x.shape[1]
        pooled = _AllReduced.apply(pooled) if self.sends else pooled  # type: ignore[no-untyped-call]
        return F.cross_entropy(model.head(pooled), labels)


class _AllReduced(torch.autograd.Function):
    """The sum over ranks; every rank goes on with it, so that each has the whole gradient of its own rows P times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduced(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduced(grad)


def all_reduced(x: Tensor) -> Tensor:
    group = get_sequence_parallel_group()
    assert group is not None
    total: Tensor = funcol.all_reduce(x, "sum", group.group_name)
    return total


# What is measured


@dataclass
class Variant:
    name: str
    model: nn.Module
    step: Callable[[], Tensor]
    alone: bool = False
    """Only rank 0 runs it."""
    whole: bool = True
    """Its loss is that of the whole sequence, not of a rank's rows."""
    loss: Tensor | None = None
    first: float = 0.0
    seconds: list[float] = field(default_factory=list)
    launches: int = 0
    received: float = 0.0
    peak: int = 0


class CountingGroup(dist.ProcessGroup):
    """Passes collectives on to a group, and counts launches and the bytes that a rank receives from others."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())  # type: ignore[call-arg]
        self.group, self.launches, self.received = group, 0, 0.0

    def count(self, made: Tensor, times: int = 1) -> None:
        self.launches += 1
        self.received += times * made.nbytes * (self.group.size() - 1) / self.group.size()

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        self.count(tensors[0], 2)
        return self.group.allreduce(tensors, opts)

    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        self.count(outputs[0])
        return self.group.allgather_into_tensor_coalesced(outputs, inputs, opts)

    def alltoall_base(self, output: Any, given: Any, output_sizes: Any, sizes: Any, opts: Any = None) -> Any:
        self.count(output)
        return self.group.alltoall_base(output, given, output_sizes, sizes, opts)


def counted_average(counter: CountingGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's own average of a bucket of gradients, counted."""
    counter.count(bucket.buffer(), 2)
    return allreduce_hook(None, bucket)  # type: ignore[arg-type]


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory: now, or the most since `reset_peak`."""
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM:" if peak else "VmRSS:"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")


def keep_freed(kept: int) -> None:
    """Give what is freed back at once if it is larger, so that the size of the process is what is in use.

    That takes time: steps are timed with `MOST_KEPT`, which malloc comes to by itself.
    """
    if not torch.cuda.is_available():
        malloc = ctypes.CDLL("libc.so.6")
        malloc.mallopt(M_MMAP_THRESHOLD, kept)
        malloc.mallopt(M_TRIM_THRESHOLD, 2 * kept)


def peak_of(model: nn.Module, step: Callable[[], Tensor]) -> int:
    """What a step adds to memory at its peak, gradients too: the median of some steps."""
    added = []
    for _ in range(STEPS_OF_PEAK):
        model.zero_grad()
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            added.append(torch.cuda.max_memory_allocated() - before)
        else:
            reset_peak()
            before = resident()
            step()
            added.append(resident(peak=True) - before)
    return statistics.median_low(added)


def training_step(model: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    model.zero_grad()
    output = call(*args, **kwargs)
    loss = output if isinstance(output, Tensor) else next(x for x in output if isinstance(x, Tensor))
    loss = loss.sum()
    loss.backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return loss.detach()


def variants(options: argparse.Namespace, length: int, group: CountingGroup) -> list[Variant]:
    """What to time, one device first."""
    rank, parts = dist.get_rank(), dist.get_world_size()

    def made() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        torch.manual_seed(0)
        return make(options, length)

    def variant(name: str, model: nn.Module, call: Callable[..., Any], **kind: bool) -> Variant:
        return Variant(name, model, partial(training_step, model, call, args, kwargs), **kind)

    model, args, kwargs = made()
    found = [variant("one device", model, torch.compile(model, dynamic=False), alone=True)]
    if isinstance(model, Transformer):
        for name, compiles, sends in (
            (CEILING, True, False),
            ("by hand", False, True),
            ("by hand, compiled", True, True),
        ):
            twin, _, _ = made()
            assert isinstance(twin, Transformer)
            by_hand: Any = ByHand(twin, parts, rank, sends)
            call = torch.compile(by_hand, dynamic=False) if compiles else by_hand
            if sends:
                call = DistributedDataParallel(call)
                call.register_comm_hook(group, counted_average)
            found.append(variant(name, twin, call, whole=False))
    ours, _, _ = made()
    found.append(variant("sp_backend", ours, torch.compile(ours, backend=sp_backend, dynamic=False)))
    return found


def make(options: argparse.Namespace, length: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model of one device, and its inputs."""
    if ":" in options.model:
        file, _, name = options.model.partition(":")
        spec = importlib.util.spec_from_file_location("model_to_time", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] = getattr(module, name)()
        return found
    if options.model == "mmdit":
        from hand_written_mmdit import GRID, TEXT, WIDTH, Model

        inputs = torch.randn(GRID[0] * GRID[1] * GRID[2], 8), torch.randn(TEXT, WIDTH)
        return Model(), inputs, {}
    sizes = Sizes(options.model, options.layers, options.hidden, options.heads, options.kv_heads)
    model = Transformer(sizes, length)
    if options.model == "vit":
        return model, (torch.randn(1, length, 192), torch.randint(sizes.vocabulary, (1,))), {}
    ids = torch.randint(sizes.vocabulary, (1, length))
    return model, (ids, F.pad(ids[:, 1:], (0, 1), value=-100)), {}


def run(variant: Variant) -> tuple[float, Tensor | None]:
    """Seconds of a step that all ranks begin together, and its loss; on ranks that wait it takes as long."""
    dist.barrier()
    started = time.perf_counter()
    loss = variant.step() if dist.get_rank() == 0 or not variant.alone else None
    own = time.perf_counter() - started
    dist.barrier()
    return (own if variant.alone else time.perf_counter() - started), loss


def measure(options: argparse.Namespace, length: int, group: CountingGroup) -> tuple[list[Variant], float]:
    """The variants, timed, and the largest error of a loss, or of a gradient, relative to that of one device."""
    torch._dynamo.reset()
    timed = variants(options, length, group)
    keep_freed(LEAST_KEPT)
    for each in tqdm(timed, desc=f"S = {length}: compiling", disable=dist.get_rank() > 0, leave=False):
        each.first, each.loss = run(each)
    errors = []
    for each in timed[1:]:
        if each.name != CEILING:
            errors += [relative(timed[0].model, each.model), error_of_loss(timed[0], each)]
    for each in timed:
        group.launches, group.received = 0, 0.0
        run(each)
        each.launches, each.received = group.launches, group.received
        for other in timed:
            other.model.zero_grad()
        dist.barrier()
        if dist.get_rank() == 0 or not each.alone:
            each.peak = peak_of(each.model, each.step)
    keep_freed(MOST_KEPT)
    for _ in tqdm(range(options.rounds), desc=f"S = {length}", disable=dist.get_rank() > 0, leave=False):
        for each in timed:
            each.seconds.append(run(each)[0])
    return timed, max(errors)


def error_of_loss(alone: Variant, other: Variant) -> float:
    """On any rank, relative; only rank 0 has the loss of one device."""
    assert other.loss is not None
    expected = torch.zeros_like(other.loss) if alone.loss is None else alone.loss.clone()
    dist.broadcast(expected, 0)
    got = other.loss if other.whole else all_reduced(other.loss) / dist.get_world_size()
    return worst(((expected - got) / expected).abs())


def worst(error: Tensor) -> float:
    """The largest of an error on any rank; what is no number is not a small error."""
    error = error.detach().double().reshape(1).nan_to_num(nan=float("inf"))
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return float(error)


def relative(alone: nn.Module, other: nn.Module) -> float:
    """The largest error of a gradient on any rank; only rank 0 has those of one device."""
    error = torch.zeros(1, dtype=torch.float64)
    for mine, theirs in zip(alone.parameters(), other.parameters(), strict=True):
        expected = mine.grad.clone() if mine.grad is not None else torch.zeros_like(mine)
        dist.broadcast(expected, 0)
        got = theirs.grad if theirs.grad is not None else torch.zeros_like(theirs)
        error = torch.maximum(error, ((expected - got).abs().max() / expected.abs().max().clamp(min=1e-12)).double())
    return worst(error)


# What is shown


def table(timed: list[Variant]) -> str:
    alone = statistics.median(timed[0].seconds)
    rows = []
    for each in timed:
        times = [1e3 * seconds for seconds in each.seconds]
        low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else 3 * times
        ratio, spread = 1e3 * alone / median, f"{low:.0f} to {high:.0f}"
        peak = f"{each.peak / 2**20:.0f} ({each.peak / max(timed[0].peak, 1):.2f})"
        moved = f"{each.received / 2**20:.1f}"
        rows.append(
            [each.name, f"{median:.0f}", spread, f"{ratio:.2f}", each.launches, moved, peak, f"{each.first:.1f}"]
        )
    columns = ["", "step, ms", "middle half", "speed-up", "launches", "MiB received", "peak MiB (of one)", "first, s"]
    return tabulate(rows, columns, disable_numparse=True, colalign=("left", *["right"] * 7))


def largest_costs(step: Callable[[], Tensor]) -> str:
    """The five largest costs of a step but attention and products of matrices."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    dist.barrier()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    products = ("mm", "flash_attention", "mkldnn", "linear", "gemm")
    others = [event for event in events if not any(word in event.key for word in products)]
    rows = [
        [
            event.key[:90],
            event.count,
            f"{event.self_cpu_time_total / 1e3:.1f}",
            f"{event.self_cpu_time_total / whole:.1%}",
        ]
        for event in others[:5]
    ]
    return tabulate(rows, ["sp_backend, a step on rank 0", "calls", "ms", "of all"], disable_numparse=True)


def plot(results: dict[int, list[Variant]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    names = [each.name for each in next(iter(results.values()))]
    for at, name in enumerate(names):
        medians = [1e3 * statistics.median(timed[at].seconds) for timed in results.values()]
        bars = axes.bar(
            [x + 0.8 * at / len(names) for x in range(len(results))], medians, 0.75 / len(names), label=name
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks([x + 0.4 for x in range(len(results))], [f"S = {length}" for length in results])
    axes.set(ylabel="ms a step (median)", title=f"{dist.get_world_size()} ranks, one thread each")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama", help="llama, vit, mmdit or FILE:CALLABLE (default: llama)")
    parser.add_argument("--sequence", type=int, nargs="+", default=[4096], help="lengths, multiples of the ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="numbers of ranks (default: 2)")
    for name, default in (("rounds", 7), ("layers", 4), ("hidden", 256), ("heads", 8), ("kv-heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--plot", help="a PNG to draw the medians to; of several numbers of ranks NAME_2.png, ...")
    parser.add_argument("--profile", action="store_true", help="also the largest costs of a step of sp_backend")
    options = parser.parse_args()
    uneven = [f"{length} by {ranks}" for length in options.sequence for ranks in options.ranks if length % ranks]
    if uneven and options.model in ("llama", "vit"):
        parser.error(f"by hand a rank has S/P rows, all as many: {', '.join(uneven)} is not whole")
    return options


def launch(options: argparse.Namespace, ranks: int) -> int:
    """Run this file on so many ranks; returns the exit code."""
    environment = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", **os.environ}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(ranks), *sys.argv]
    if options.plot and len(options.ranks) > 1:
        name, dot, kind = options.plot.rpartition(".")
        command += ["--plot", f"{name}_{ranks}{dot}{kind}"]
    return subprocess.run(command, env=environment).returncode


def main() -> None:
    options = parse_arguments()
    if "RANK" not in os.environ:
        codes = [launch(options, ranks) for ranks in options.ranks]
        sys.exit(any(codes))
    torch.set_num_threads(1)
    init_sequence_parallel()
    group = get_sequence_parallel_group()
    assert group is not None
    counter = CountingGroup(group)
    _unregister_process_group(group.group_name)
    _register_process_group(group.group_name, counter)
    results, largest = {}, 0.0
    for length in options.sequence:
        results[length], error = measure(options, length, counter)
        largest = max(largest, error)
        costs = largest_costs(results[length][-1].step) if options.profile else ""
        if dist.get_rank() == 0:
            print(f"\n{options.model}, S = {length}, {dist.get_world_size()} ranks, {options.rounds} rounds; ", end="")
            print(f"largest error of a loss or gradient {error:.1e}\n{table(results[length])}\n{costs}", flush=True)
    if options.plot and dist.get_rank() == 0:
        plot(results, options.plot)
    dist.barrier()
    os._exit(0 if largest <= TOLERANCE else 1)  # the counting group outlives the one that it counts for


if __name__ == "__main__":
    main()
