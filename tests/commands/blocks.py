"""What blocks of diffusion transformers move, by `sp_backend` and by hand: `python -m tests.commands.blocks`.

Blocks of Flux, SD3 and Wan as diffusers has them, with 13 tokens of text beside 140 of an image or a video. By hand
they keep their code, but get my rows of both streams, each cut along its own sequence, and processors of their own:
one all-to-all brings q, k and v of all streams to their heads, one brings the result back. Modulation is computed on
every rank, and so is text that is only attended to (Wan): local queries read all of it.

Counted are the collectives of one block; those that gather the outputs of the last one are not. Bytes are what each
rank receives, own block excluded: forward without padding, as in `planning.cost`, and as launched, padded; in
backward by the exchanges, and by the sums of gradients, which by hand are DDP's of all parameters. Both versions run
and are compared with one device: values on every rank and all gradients, by hand as DDP averages them over the ranks.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed._local_tensor import LocalTensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from sp_compile import rewritten_graphs, sp_backend
from sp_compile.functional import gather_heads_scatter_seq, gather_outputs, gather_seq_scatter_heads_qkv, slice_inputs
from sp_compile.placement.placements import block_rows
from sp_compile.tools.simulation import simulate

from ..equivalence import Step, differences, step

TEXT, IMAGE, HEAD, DEPTH = 13, 140, 8, 2
CASES = ((4, 2), (4, 4), (6, 4))
"""Heads, and ranks."""


# By hand


@dataclass(frozen=True)
class JointAttention:
    """Attention over streams laid end to end, of each of which a rank holds its rows, padded."""

    lengths: tuple[int, ...]
    heads: int
    parts: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, s, H, D]` -> `[B, s, H, D]`, s my rows of every stream, by two exchanges."""
        qkv = torch.stack([q, k, v], 2).flatten(2)
        qkv = gather_seq_scatter_heads_qkv(qkv, seq_dim=1, heads=self.heads, restore_shape=False)
        rows = self._rows()
        real = torch.tensor([rows.index((token, True)) for token in range(sum(self.lengths))])
        q, k, v = qkv.index_select(1, real).unflatten(-1, (-1, q.shape[-1])).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out = out.index_select(1, torch.tensor([token for token, _ in rows]))
        return gather_heads_scatter_seq(out, head_dim=2, seq_dim=1, unpad_dim_size=self.heads)

    def _rows(self) -> list[tuple[int, bool]]:
        """The token of every row, those of the first rank first, and whether it is real."""
        rows = []
        for rank in range(self.parts):
            start = 0
            for length in self.lengths:
                block = block_rows(length, 1, self.parts)
                mine = range(rank * block, (rank + 1) * block)
                rows += [(start + min(row, length - 1), row < length) for row in mine]
                start += length
        return rows

    @property
    def real(self) -> float:
        """The share of what is exchanged that is no padding, of rows or of heads."""
        heads = self.parts * block_rows(self.heads, 1, self.parts)
        return sum(self.lengths) * self.heads / (len(self._rows()) * heads)


class FluxByHand:
    """The processor of Flux, `[text; image]`."""

    def __init__(self, attention: JointAttention) -> None:
        self.attention = attention

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v = (to(hidden_states).unflatten(-1, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_q, text_k, text_v = (to(encoder_hidden_states).unflatten(-1, (attn.heads, -1)) for to in added)
            q = torch.cat([attn.norm_added_q(text_q), q], 1)
            k = torch.cat([attn.norm_added_k(text_k), k], 1)
            v = torch.cat([text_v, v], 1)
        rotary: Any = partial(apply_rotary_emb, freqs_cis=image_rotary_emb, sequence_dim=1)
        out = self.attention(rotary(q), rotary(k), v).flatten(2)
        if encoder_hidden_states is None:
            return out
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        return attn.to_out[0](image), attn.to_add_out(text)


class SD3ByHand:
    """The processor of SD3, `[image; text]`."""

    def __init__(self, attention: JointAttention) -> None:
        self.attention = attention

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        image = (to(hidden_states).unflatten(-1, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = (to(encoder_hidden_states).unflatten(-1, (attn.heads, -1)) for to in added)
        q, k, v = (torch.cat(pair, 1) for pair in zip(image, text, strict=True))
        out = self.attention(q, k, v).flatten(2)
        mine, theirs = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        return attn.to_out[0](mine), attn.to_add_out(theirs)


class WanByHand:
    """The processor of Wan's self-attention."""

    def __init__(self, attention: JointAttention) -> None:
        self.attention = attention

    def __call__(
        self, attn: Any, hidden_states: Tensor, memory: None, mask: None, rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
        cos, sin = (table[..., ::2] for table in rotary_emb)
        q, k = (
            torch.stack([x[..., ::2] * cos - x[..., 1::2] * sin, x[..., ::2] * sin + x[..., 1::2] * cos], -1).flatten(3)
            for x in (q, k)
        )
        out: Tensor = attn.to_out[0](self.attention(q, k, v).flatten(2))
        return out


# The blocks


class Blocks(nn.Module):
    """Two blocks of a kind, which share their width."""

    name: ClassVar[str]
    streams: ClassVar[tuple[int, ...]] = (TEXT, IMAGE)
    """What attends, as it is laid end to end."""
    attention: ClassVar[str] = "attn"
    """The module of a block whose processor is replaced."""
    processor: ClassVar[type] = FluxByHand
    tolerance: ClassVar[float] = 1e-6
    """Of the largest value: Flux and Wan compute in fp32 here and there."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.blocks = nn.ModuleList(self.block(heads * HEAD) for _ in range(DEPTH))

    def block(self, width: int) -> nn.Module:
        raise NotImplementedError

    def after(
        self, block: nn.Module, image: Tensor, text: Tensor, temb: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The image and the text after one block."""
        text, image = block(image, text, temb, (cos, sin))
        return image, text

    def forward(self, image: Tensor, text: Tensor, temb: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """`[B, 140, C]`, `[B, 13, C]`, `[B, C]`, and a rotary table of what attends: the streams that attend."""
        for block in self.blocks:
            image, text = self.after(block, image, text, temb, cos, sin)
        return (image, text) if TEXT in self.streams else (image,)

    def by_hand(self, parts: int) -> Callable[..., tuple[Tensor, ...]]:
        """`forward` by hand, on whole values as well; from then on these blocks want rows of one rank."""
        attention = JointAttention(self.streams, self.heads, parts)
        for block in self.blocks:
            block.get_submodule(self.attention).processor = self.processor(attention)

        def run(image: Tensor, text: Tensor, temb: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
            image = slice_inputs(image, 1, scale_grad=True)
            if TEXT in self.streams:
                text = slice_inputs(text, 1, scale_grad=True)
            tables = (torch.cat([slice_inputs(rows, 0) for rows in t.split(list(self.streams))]) for t in (cos, sin))
            outputs = self(image, text, temb, *tables)
            return tuple(
                gather_outputs(rows, gather_dim=1, padding_dim=1, unpad_shape=[[length]])
                for rows, length in zip(outputs, (IMAGE, TEXT), strict=False)
            )

        return run


class Flux(Blocks):
    name = "Flux, two streams"

    def block(self, width: int) -> nn.Module:
        return FluxTransformerBlock(width, self.heads, HEAD)


class FluxSingle(Blocks):
    name = "Flux, one stream"

    def block(self, width: int) -> nn.Module:
        return FluxSingleTransformerBlock(width, self.heads, HEAD)


class SD3(Blocks):
    name = "SD3"
    streams = (IMAGE, TEXT)
    processor = SD3ByHand
    tolerance = 1e-9

    def block(self, width: int) -> nn.Module:
        return JointTransformerBlock(width, self.heads, HEAD)

    def after(
        self, block: nn.Module, image: Tensor, text: Tensor, temb: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        text, image = block(image, text, temb)
        return image, text


class Wan(Blocks):
    name = "Wan"
    streams = (IMAGE,)
    attention = "attn1"
    processor = WanByHand

    def block(self, width: int) -> nn.Module:
        return WanTransformerBlock(width, 4 * width, self.heads, cross_attn_norm=True)

    def after(
        self, block: nn.Module, image: Tensor, text: Tensor, temb: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        modulation = temb.unsqueeze(1).expand(-1, 6, -1)
        return block(image, text, modulation, (cos[None, :, None], sin[None, :, None])), text


BLOCKS: Mapping[str, type[Blocks]] = {"flux": Flux, "flux_single": FluxSingle, "sd3": SD3, "wan": Wan}


def inputs_of(model: Blocks) -> list[Tensor]:
    """All trained, but the rotary tables."""
    width, random = model.heads * HEAD, partial(torch.randn, dtype=torch.float64)
    angles = random(sum(model.streams), HEAD // 2).repeat_interleave(2, -1)
    trained = [random(1, IMAGE, width), random(1, TEXT, width), random(1, width)]
    return [*(x.requires_grad_() for x in trained), angles.cos(), angles.sin()]


# What they move


@dataclass(frozen=True)
class Launch:
    """One collective, as it was launched."""

    op: str
    bytes: float
    """What a rank receives, own block excluded, padding included."""


class Launches(TorchDispatchMode):
    """The collectives that are launched on P ranks inside, in order."""

    def __init__(self, parts: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        others = (parts - 1) / parts
        self.received = {"all_to_all_single": others, "all_gather_into_tensor": parts - 1, "all_reduce": 2 * others}
        self.forward: list[Launch] = []
        self.backward: list[Launch] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "_c10d_functional" and func._opname != "wait_tensor":
            launches = self.forward if torch._C._current_graph_task_id() == -1 else self.backward
            sent = args[0].numel() * args[0].element_size()
            launches.append(Launch(func._opname, sent * self.received[func._opname]))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Moved:
    """What one of the blocks moves, and how far all of them are from one device."""

    launches: Mapping[str, int]
    """How many, by op, forward."""
    bytes: int
    """Received per rank, forward, own block and padding excluded."""
    padded: int
    """As launched: padding included."""
    backward: int
    """As launched, by all-to-all in backward."""
    summed: int
    """As launched, to sum gradients over the ranks; by hand what DDP sums, all parameters."""
    errors: Mapping[str, float]
    """The largest, of outputs and of gradients."""


def run(model: Blocks, inputs: Sequence[Tensor], parts: int, make: Callable[[Blocks], Any]) -> tuple[Step, Launches]:
    """A step of a copy of the model, called as `make` makes it."""
    model = copy.deepcopy(model)
    with simulate(parts):
        call = make(model)
        with Launches(parts) as launched:
            return step(call, model, inputs, {}), launched


def moved_by_us(model: Blocks, inputs: Sequence[Tensor], parts: int, expected: Step, **options: Any) -> Moved:
    backend = partial(sp_backend, options={"inner_backend": "eager", **options})
    got, launched = run(model, inputs, parts, lambda model: torch.compile(model, backend=backend))
    graph = rewritten_graphs()[-1]
    planned = [each.bytes for each in graph.collectives if not each.name.startswith("gather_output")]
    assert len(graph.collectives) == len(launched.forward), "a collective of the graph is one launch"
    launches = of_one_block(launched.forward[: len(planned)])
    summed = received(launched.backward, "all_reduce") / DEPTH
    return moved(launches, sum(planned) / DEPTH, launched.backward, summed, worst(expected, got, parts))


def moved_by_hand(model: Blocks, inputs: Sequence[Tensor], parts: int, expected: Step) -> Moved:
    got, launched = run(model, inputs, parts, lambda model: model.by_hand(parts))
    outputs = sum(name.startswith("output") for name in got.values)
    launches = of_one_block(launched.forward[:-outputs])
    real = JointAttention(model.streams, model.heads, parts).real * sum(each.bytes for each in launches)
    parameters = sum(each.numel() * each.element_size() for each in model.parameters())
    summed = 2 * parameters * (parts - 1) / parts / DEPTH
    return moved(launches, real, launched.backward, summed, worst(expected, averaged(got), parts))


def of_one_block(launches: Sequence[Launch]) -> Sequence[Launch]:
    """The launches of the last block, which are those of every other one."""
    count = len(launches) // DEPTH
    assert list(launches) == list(launches[:count]) * DEPTH, "blocks differ in what they move"
    return launches[:count]


def received(launches: Sequence[Launch], op: str) -> float:
    return sum(each.bytes for each in launches if each.op == op)


def moved(
    launches: Sequence[Launch], real: float, backward: Sequence[Launch], summed: float, errors: Mapping[str, float]
) -> Moved:
    padded, exchanged = sum(each.bytes for each in launches), received(backward, "all_to_all_single") / DEPTH
    counts = Counter(each.op for each in launches)
    return Moved(counts, round(real), round(padded), round(exchanged), round(summed), errors)


def averaged(got: Step) -> Step:
    """With the average of every gradient over the ranks, as DDP leaves it."""
    return Step(
        {
            name: torch.stack(list(value._local_tensors.values())).mean(0)
            if name.startswith("grad") and isinstance(value, LocalTensor)
            else value
            for name, value in got.values.items()
        }
    )


def worst(expected: Step, got: Step, parts: int) -> dict[str, float]:
    errors = differences(expected, got, parts)
    return {kind: max(e for name, e in errors.items() if name.startswith(kind)) for kind in ("output", "grad")}


def compare(name: str, heads: int, parts: int) -> tuple[Moved, Moved]:
    """What a block moves: by `sp_backend`, and by hand."""
    torch.manual_seed(0)
    model = BLOCKS[name](heads).double()
    inputs = inputs_of(model)
    expected = step(model, model, inputs, {})
    return moved_by_us(model, inputs, parts, expected), moved_by_hand(model, inputs, parts, expected)


COLUMNS = (
    *("block", "heads", "P", "", "launches", "bytes", "padded", "backward", "gradient sums"),
    *("error: values", "gradients"),
)


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    rows = []
    for name, kind in BLOCKS.items():
        for heads, parts in CASES:
            for version, each in zip(("sp_backend", "by hand"), compare(name, heads, parts), strict=True):
                launches = ", ".join(f"{count} {op}" for op, count in each.launches.items())
                sizes = (f"{size:,}" for size in (each.bytes, each.padded, each.backward, each.summed))
                errors = (f"{error:.0e}" for error in each.errors.values())
                rows.append([kind.name, heads, parts, version, launches, *sizes, *errors])
    align = ("left", "right", "right", "left", "left", *["right"] * 6)
    print(tabulate(rows, COLUMNS, disable_numparse=True, colalign=align))


if __name__ == "__main__":
    main()
