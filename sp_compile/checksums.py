"""Checksums of tensors and of generators, by which ranks compare what they hold without sending it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .tensor_kinds import bits, dense_parts, has_data, has_storage

CHUNK = 1 << 20


def checksums_of(values: Sequence[Any]) -> list[int | None]:
    """A checksum of each dense tensor, bit for bit; None of what is none, or has no data."""
    sums: dict[torch.device, list[tuple[int, Tensor]]] = {}
    with torch.no_grad():
        for index, value in enumerate(values):
            # Of a subclass such as a sharded input or a DTensor every rank has other rows.
            if isinstance(value, Tensor) and has_storage(value) and has_data(value):
                sums.setdefault(value.device, []).append((index, checksum(value)))
        found: list[int | None] = [None] * len(values)
        for of_device in sums.values():
            for (index, _), number in zip(of_device, torch.stack([s for _, s in of_device]).tolist(), strict=True):
                found[index] = number
    return found


def checksum(tensor: Tensor) -> Tensor:
    """A 0-dimensional int64 on the device of `tensor`: sum of w_i x_i modulo 2^64, x its bits, w pseudo-random."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    number = 0
    for part in dense_parts(tensor):
        words = _words(part)
        weights = _weights(min(CHUNK, words.numel()), tensor.device)
        for chunk in words.split(CHUNK):
            number += 1
            total += (chunk.to(torch.int64) * weights[: chunk.numel()]).sum() * (2 * number + 1)
    return total


def _words(part: Tensor) -> Tensor:
    """The bits of a dense part as integers of at most 32: in wider ones a change of two signs could cancel."""
    flat = bits(part).contiguous().view(-1)
    return flat.view({1: torch.uint8, 2: torch.int16}.get(flat.element_size(), torch.int32))


def _weights(count: int, device: torch.device) -> Tensor:
    """Odd numbers without a pattern, so that neither another order nor equal changes cancel (splitmix64)."""
    x = torch.arange(1, count + 1, dtype=torch.int64, device=device) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) | 1


def generator_checksums(values: Sequence[Any]) -> dict[str, int]:
    """By device type, of the CPU and of the devices that `values` are on: the state of the default generator."""
    states = {"cpu": torch.get_rng_state()}
    for kind in sorted({value.device.type for value in values if isinstance(value, Tensor)} - {"cpu", "meta"}):
        states[kind] = torch.get_device_module(kind).get_rng_state()
    return {kind: int(checksum(state)) for kind, state in states.items()}
