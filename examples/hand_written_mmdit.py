"""A two-stream video block, sequence parallel by hand and by `sp_backend`: the same numbers.

    python examples/hand_written_mmdit.py         it starts its own two ranks; about half a minute
    torchrun --nproc-per-node 4 examples/hand_written_mmdit.py

Video tokens are sharded, text tokens replicated. A window of video attends to itself and to all of the text, so that
attention wants whole video tokens: each rank gathers them and keeps some of the heads, of the text too. Printed are the
largest differences of the hand-written model and of `sp_backend` from one device, and between the two; the exit code is
1 if one is more than 2e-5 of the largest value.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sp_compile import init_sequence_parallel, rewritten_graphs, sp_backend
from sp_compile.functional import (
    Cache,
    gather_heads,
    gather_heads_scatter_seq,
    gather_outputs,
    gather_seq_scatter_heads_qkv,
    scatter_heads,
    slice_inputs,
)

TOLERANCE = 2e-5
GRID = (9, 3, 5)  # frames, height, width: 135 video tokens, which two ranks cannot share evenly
WINDOWS = 3  # of three frames each; the second lies on both ranks
TEXT, WIDTH, HEADS = 11, 64, 4


def window_attention(video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Joint attention in each window: q, k, v `[S, 3*h*D]` and `[L, 3, h, D]` -> `[S, h, D]` and `[L, h, D]`.

    Text takes part in every window; its results are averaged.
    """
    tokens, heads = video.shape[0] // WINDOWS, text.shape[2]
    video = video.reshape(WINDOWS, tokens, 3, heads, -1)
    joint = torch.cat([video, text.expand(WINDOWS, *text.shape)], 1)  # [windows, tokens, 3, h, D]
    q, k, v = joint.movedim(2, 0).transpose(2, 3)
    out = scaled_dot_product_attention(q, k, v).transpose(1, 2)  # [windows, tokens, h, D]
    video, text = out.split([tokens, text.shape[0]], 1)
    return video.flatten(0, 1), text.mean(0)


class Stream(nn.Module):
    """What a block does to the tokens of one stream, one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.after = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended.flatten(1))
        return x + self.mlp(self.after(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.video, self.text = Stream(), Stream()

    def forward(self, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The whole of both streams: `[S, C]`, `[L, C]`."""
        video_qkv = self.video.qkv(self.video.before(video))
        text_qkv = self.text.qkv(self.text.before(text)).unflatten(1, (3, HEADS, -1))
        video_out, text_out = window_attention(video_qkv, text_qkv)
        return self.video.finish(video, video_out), self.text.finish(text, text_out)

    def by_hand(self, video: Tensor, text: Tensor, grid: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """My part of the video, `[ceil(S/P), C]`, the whole text, `[L, C]`."""
        video_qkv = self.video.qkv(self.video.before(video))
        video_qkv = gather_seq_scatter_heads_qkv(video_qkv, seq_dim=0, qkv_shape=grid, cache=cache, heads=HEADS)
        text_qkv = self.text.qkv(self.text.before(text)).unflatten(1, (3, HEADS, -1))
        text_qkv = scatter_heads(text_qkv, 2, grad_scale=True)
        video_out, text_out = window_attention(video_qkv, text_qkv)
        video_out = gather_heads_scatter_seq(video_out, head_dim=1, seq_dim=0, unpad_dim_size=HEADS)
        text_out = gather_heads(text_out, 1, grad_scale=True, unpad_dim_size=HEADS)
        return self.video.finish(video, video_out), self.text.finish(text, text_out)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        video = self.embed(video)
        for block in self.blocks:
            video, text = block(video, text)
        return self.head(video), text

    def by_hand(self, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        grid, cache = torch.tensor([GRID]), Cache().namespace("video")
        video = slice_inputs(self.embed(video), 0, scale_grad=True)
        for block in self.blocks:
            video, text = block.by_hand(video, text, grid, cache)
        return gather_outputs(self.head(video), gather_dim=0, padding_dim=0, unpad_shape=grid, cache=cache), text


def train_once(forward: Callable[..., tuple[Tensor, Tensor]], model: Model, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and loss of a step, and all gradients in one row, those of the inputs first."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    model.zero_grad()
    video, text = forward(*inputs)
    loss = video.pow(2).mean() + (video.mean(0, keepdim=True) * text.mean()).sum()
    loss.backward()
    gradients = [x.grad.flatten() for x in [*inputs, *model.parameters()] if x.grad is not None]
    return {"video": video.detach(), "text": text.detach(), "loss": loss.detach(), "gradients": torch.cat(gradients)}


def difference(expected: Tensor, got: Tensor) -> float:
    """The largest difference, relative to the largest value; infinite where something is not finite."""
    if expected.shape != got.shape or not (expected.isfinite().all() and got.isfinite().all()):
        return float("inf")
    return float((expected - got).abs().max() / expected.abs().max())


def compare() -> bool:
    """Train a step in three ways and print how far they are apart; whether they agree."""
    torch.manual_seed(0)
    model, inputs = Model(), [torch.randn(GRID[0] * GRID[1] * GRID[2], 8), torch.randn(TEXT, WIDTH)]
    alone = train_once(model, model, inputs)
    by_hand = train_once(model.by_hand, model, inputs)
    dist.all_reduce(by_hand["gradients"])  # what DDP does: the average over all ranks
    by_hand["gradients"] /= dist.get_world_size()
    options = {"inner_backend": "aot_eager"}  # quicker to compile than Inductor
    compiled = train_once(torch.compile(model, backend=sp_backend, options=options), model, inputs)
    pairs = ((alone, by_hand), (alone, compiled), (by_hand, compiled))
    found = torch.tensor([[difference(one[name], other[name]) for one, other in pairs] for name in alone])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        for site in rewritten_graphs()[-1].plan.sites:
            print(f"sp_backend, attention: {site.strategy}")
        columns = ["largest difference, any rank", "by hand", "sp_backend", "one from the other"]
        rows = [[name, *(f"{x:.1e}" for x in row)] for name, row in zip(alone, found.tolist(), strict=True)]
        print(tabulate(rows, columns, disable_numparse=True))
    return bool((found <= TOLERANCE).all())


def main() -> None:
    if "RANK" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
        os.execv(sys.executable, [sys.executable, *launch, *sys.argv])
    torch.set_num_threads(1)
    init_sequence_parallel()
    correct = compare()
    dist.destroy_process_group()
    if not correct:
        sys.exit(f"Not the same: a difference is more than {TOLERANCE:.0e} of the largest value")


if __name__ == "__main__":
    main()
