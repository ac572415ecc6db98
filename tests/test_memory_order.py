"""Where values lie in memory, which code that looks may tell: as on one device, and outputs that share it still do."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sp_compile import replicated_region, sp_backend
from sp_compile.tools.simulation import on_rank, simulate

from .equivalence import assert_equivalent, differences, run_simulated, step, tokens
from .programs import Parts
from .test_passes import Block


class ReadInMemory(nn.Module):
    """Code behind the graph reads an output as it lies in memory: a spectrum that no rank has a part of, and one of the
    sharded sequence."""

    def __init__(self, spectrum: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.spectrum = Block(), spectrum

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.block(x)
        whole, sharded = self.spectrum(x[:, 2:4]), self.spectrum(y)
        torch._dynamo.graph_break()
        return y, *(each.as_strided((each.numel(),), (1,)).abs() for each in (whole, sharded))


SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "c2c": torch.fft.fft2,
    "r2c": torch.fft.rfft2,
    "c2r": torch.fft.irfft2,
    "three": torch.fft.rfftn,
    "outer": lambda y: torch.fft.rfft2(y.unflatten(2, (3, -1)), dim=(1, 2)),
    "transposed": lambda y: torch.fft.fft2(y.transpose(1, 2), dim=(2, 0)),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_spectra_lie_in_memory_as_on_one_device(spectrum: str) -> None:
    assert_equivalent(ReadInMemory(SPECTRA[spectrum]).double(), (tokens(2, 7, 12),), parts=2)


class WholeInMemory(nn.Module):
    """The same of what is made of gathered values, which do not lie as on one device."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.make = Block(), make

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.block(x).transpose(1, 2) * 1.5
        whole = self.make(y)
        torch._dynamo.graph_break()
        return y, whole.as_strided((whole.numel(),), (1,)) * 1


def in_a_region(y: Tensor) -> Tensor:
    with replicated_region():
        return y * 2


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {"region": in_a_region, "few rows": lambda y: y[:, :, 3:5] * 2}


@pytest.mark.parametrize("make", WHOLE)
@pytest.mark.parametrize("parts", [2, 3])
def test_whole_outputs_lie_in_memory_as_on_one_device(make: str, parts: int) -> None:
    assert_equivalent(WholeInMemory(WHOLE[make]).double(), (tokens(2, 7, 12),), parts=parts)


@pytest.mark.parametrize("length", [3, 6, 7])
def test_gathered_rows_lie_in_memory_as_on_one_device(length: int) -> None:
    """Of one row a rank, too, where the pieces of all ranks could be joined by strides alone."""

    def body(m: Parts, x: Tensor) -> Tensor:
        y = m.block(x)
        torch._dynamo.graph_break()
        return y.as_strided((y.numel(),), (1,)) * 1

    assert_equivalent(Parts(body), (tokens(2, length, 12),), parts=3)


class WrittenBehind(nn.Module):
    """Two outputs of the first graph share their memory, which code behind it writes to."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.view = Block(), view

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, w = self.block(x).detach(), self.block(x)
        z = self.view(y)
        torch._dynamo.graph_break()
        z.mul_(2)
        return y * 1, w


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda y: y.view(2, -1),
    "slice": lambda y: y[:, 2:5],
    "chunk": lambda y: y.chunk(2, -1)[1],
    "transpose": lambda y: y.transpose(1, 2)[:, 3],
}


UNCHANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda y: y.to(y.dtype),
    "reshape": lambda y: y.reshape(y.shape),
    "expand": lambda y: y.expand_as(y),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_what_is_returned_twice_is_one_tensor(name: str) -> None:
    """Transposed in memory, it would else be gathered twice, and what is written to the one be lost for the other."""

    def body(m: Parts, x: Tensor) -> Any:
        y = m.block(x).mT.contiguous().mT.detach() * 1
        z = UNCHANGED[name](y)
        torch._dynamo.graph_break()
        z.mul_(2)
        return y * 1, m.block(x)

    assert_equivalent(Parts(body), (tokens(2, 7, 12),), parts=3)


@pytest.mark.parametrize("view", VIEWS)
def test_outputs_that_share_memory_still_do(view: str) -> None:
    assert_equivalent(WrittenBehind(VIEWS[view]).double(), (tokens(1, 7, 12),), parts=2)


def test_complex_numbers_are_the_memory_that_they_were_made_of() -> None:
    """Of an input, and of another output: what is written there afterwards shows."""

    def body(m: Parts, x: Tensor) -> Any:
        y = m.block(x)
        return y, *(torch.view_as_complex(each.unflatten(-1, (6, 2))) for each in (x, y))

    x = tokens(1, 7, 12).detach()
    with simulate(3), torch.no_grad():
        call = torch.compile(Parts(body), backend=partial(sp_backend, options={"inner_backend": "eager"}))
        y, *numbers = call(x)
        for each, made in zip((x, y), numbers, strict=True):
            each.mul_(2)
            for rank in range(3):
                assert torch.equal(on_rank(each, rank), torch.view_as_real(on_rank(made, rank)).flatten(-2))


class ViewedBehind(nn.Module):
    """An output of the first graph lies transposed in memory, which code behind it relies on."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        z = self.block(x).unflatten(-1, (3, 4)).permute(0, 2, 1, 3)
        torch._dynamo.graph_break()
        return z.transpose(1, 2).view(2, -1) * 2


def test_outputs_keep_their_memory_order() -> None:
    assert_equivalent(ViewedBehind().double(), (tokens(1, 7, 12),), parts=3)


class Normed(nn.Module):
    """Images or videos of some `pixels` between two attentions, with a norm over them; `by_hand`: one written out.

    The CPU's kernel for the gradient of such a norm may take channels_last for contiguous, by the strides of dimensions
    of size 1, on one device as well.
    """

    def __init__(self, norm: str, pixels: tuple[int, ...], back: str, by_hand: bool = False) -> None:
        super().__init__()
        self.block, self.again, self.mix, self.out = Block(), Block(), nn.Conv2d(12, 12, 1), nn.Linear(12, 12)
        self.weight, self.bias = nn.Parameter(torch.rand(12) + 1), nn.Parameter(torch.rand(12))
        self.norm, self.pixels, self.back, self.by_hand = norm, pixels, back, by_hand
        self.register_buffer("mean", torch.rand(12))
        self.register_buffer("variance", torch.rand(12) + 1)

    def normed(self, t: Tensor) -> Tensor:
        if self.by_hand:
            channels = [1, -1, *[1] * (t.dim() - 2)]
            over = [*([] if self.norm == "instance" else [0]), *range(2, t.dim())]
            mean, variance = t.mean(over, True), t.var(over, keepdim=True, correction=0)
            if self.norm == "evaluation":
                mean, variance = self.mean.view(channels), self.variance.view(channels)
            return (t - mean) / (variance + 1e-5).sqrt() * self.weight.view(channels) + self.bias.view(channels)
        if self.norm == "instance":
            return F.instance_norm(t, weight=self.weight, bias=self.bias)
        return F.batch_norm(
            t, self.mean, self.variance, self.weight, self.bias, self.norm != "evaluation", momentum=0.0
        )

    def forward(self, x: Tensor) -> Tensor:
        column, y = self.pixels[-1] == 1, self.block(x).mT
        t = self.mix(y.unsqueeze(-1) if column else y.unflatten(2, (-1, self.pixels[-1])))
        t = self.normed(t.unflatten(2, (self.pixels[0], -1)) if len(self.pixels) == 3 else t)
        x = (t.squeeze(-1) if column else t.flatten(2)).mT
        if self.back == "attention":
            return self.again(x)
        return torch.cat([x.mean(1, keepdim=True), x], 1) if self.back == "cat" else self.out(x)


@pytest.mark.parametrize("back", ["attention", "cat", "linear"])
@pytest.mark.parametrize("norm", ["training", "evaluation", "instance"])
@pytest.mark.parametrize(("batch", "pixels"), [(1, (5, 5)), (1, (5, 1, 5)), (2, (3, 4)), (2, (12, 1))], ids=str)
def test_norms_read_their_gradient_in_its_order(batch: int, pixels: tuple[int, ...], norm: str, back: str) -> None:
    torch.manual_seed(0)
    module = Normed(norm, pixels, back).double()
    alone, x = Normed(norm, pixels, back, by_hand=True).double(), tokens(batch, math.prod(pixels), 12)
    alone.load_state_dict(module.state_dict())
    expected = step(alone, alone, (x,), {})
    for parts in (2, 4):
        got, graphs = run_simulated(module, (x,), parts=parts)
        assert graphs and max(differences(expected, got, parts).values()) < 1e-9
