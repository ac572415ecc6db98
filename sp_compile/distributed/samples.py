"""Some values of the inputs of a call, which ranks compare at every call: enough to tell one batch from another."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SAMPLES = 32
"""How many floating-point numbers a rank tells of a call, of all inputs together."""


class Samples:
    """What a rank tells of an event: a digest, in which all have to agree, and numbers, in which they nearly do."""

    def __init__(self) -> None:
        self.words = torch.zeros(1 + SAMPLES, dtype=torch.int64, device="cpu")
        """The digest, and the bits of `SAMPLES` doubles."""
        self.values = self.words.view(torch.float64)[1:]
        self.parts: Sequence[tuple[int, float]] = ()
        """How many of the doubles each tensor has, and how far two ranks may be apart, relative to the largest."""

    def are_close_to(self, words: Sequence[int]) -> bool:
        """Whether what another rank tells is the same up to rounding."""
        other = struct.unpack(f"{SAMPLES}d", struct.pack(f"{SAMPLES}q", *words[1:]))
        pairs = zip(self.by_tensor(self.values.tolist()), self.by_tensor(other), self.parts, strict=True)
        return all(are_close(ours, theirs, tolerance) for ours, theirs, (_, tolerance) in pairs)

    def by_tensor(self, values: Sequence[float]) -> list[Sequence[float]]:
        """The doubles of each tensor."""
        ends = list(itertools.accumulate((count for count, _ in self.parts), initial=0))
        return [values[start:end] for start, end in itertools.pairwise(ends)]


class LateSamples:
    """Checksums and samples that an accelerator is computing: to wait for them at once would hold up the host."""

    def __init__(
        self,
        checksums: Sequence[Tensor],
        values: Tensor,
        parts: Sequence[tuple[int, float]],
        inputs: Callable[..., Any],
    ) -> None:
        """`checksums` are int64, `values` `SAMPLES` doubles, on one device.

        `inputs` tells of what they are: it is called with what `read` returns.
        """
        device, self._parts, self.inputs = values.device, parts, inputs
        words = torch.cat([*(x.view(1) for x in checksums), values.view(torch.int64)])
        self._words = torch.empty(words.shape, dtype=words.dtype, device="cpu", pin_memory=device.type != "cpu")
        self._words.copy_(words, non_blocking=True)
        self._event = torch.get_device_module(device.type).Event()
        self._event.record()

    def read(self) -> tuple[list[int], Samples]:
        """Wait until they are there. Returns the checksums and the samples."""
        self._event.synchronize()
        samples = Samples()
        samples.words[1:].copy_(self._words[-SAMPLES:])
        samples.parts = self._parts
        return self._words[:-SAMPLES].tolist(), samples


def are_close(own: Sequence[float], other: Sequence[float], tolerance: float) -> bool:
    """Whether samples of one tensor are the same on two ranks, up to `tolerance` times the largest of them."""
    scale = max((abs(x) for x in (*own, *other) if math.isfinite(x)), default=0.0)
    pairs = zip(own, other, strict=True)
    return all(a == b or abs(a - b) <= tolerance * scale or (math.isnan(a) and math.isnan(b)) for a, b in pairs)
