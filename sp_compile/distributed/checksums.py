"""Checksums of tensors and of generators, by which ranks compare what they hold without sending it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .samples import SAMPLES
from .tensor_kinds import bits, dense_parts, has_data, has_storage

CHUNK = 1 << 20

WHOLE = 1 << 17
"""Elements of an integer tensor that `integer_checksum` reads all of; of a longer one it reads as many at most."""


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


def is_compared_whole(dtype: torch.dtype) -> bool:
    """Whether `integer_checksum` takes it at every call, and not `samples_of`: whole numbers, and floats of a byte."""
    return not (dtype.is_floating_point or dtype.is_complex) or dtype.itemsize == 1 or dtype == torch.complex32


def integer_checksum(tensor: Tensor) -> Tensor:
    """A 0-dimensional int64 on the device of `tensor`, one that `is_compared_whole`: a checksum for every call.

    It reads every element of up to `WHOLE`, and sees a change of one; of a longer tensor it reads every n-th in
    row-major order, n odd.
    """
    flat = tensor.detach()
    if flat.is_floating_point() or flat.is_complex():
        flat = flat.view(torch.uint8 if flat.element_size() == 1 else torch.int32)
    count = flat.numel()
    if count > WHOLE:
        flat = flat.take(_every(count, flat.device))
    weights = _known_weights(flat.device)[: flat.numel()]
    return (flat.reshape(-1).to(torch.int64) * weights).sum()


def samples_of(tensors: Sequence[Tensor], found: Tensor) -> list[int]:
    """Write elements of floating-point or complex tensors to `found`, `SAMPLES` doubles. Returns how many of each.

    Of n tensors it takes `SAMPLES // n` elements each, at places without a pattern, or one of each of the first
    `SAMPLES` tensors. Of a complex number it takes the real part. What is left of `found` it leaves as it is.
    """
    counts, at = [0] * len(tensors), 0
    share = max(SAMPLES // max(len(tensors), 1), 1)
    for index, tensor in enumerate(tensors[:SAMPLES]):
        values = tensor.detach()
        if values.numel():
            taken = values.take(_places(values.numel(), share, values.device))
            found[at : at + share].copy_(taken.real if taken.is_complex() else taken)
            counts[index] = share
            at += share
    return counts


def generator_checksum(kind: str) -> int:
    """As `generator_checksums`, of one device type and cheap enough for every call."""
    state = torch.get_rng_state() if kind == "cpu" else torch.get_device_module(kind).get_rng_state()
    return int(integer_checksum(state))


@lru_cache(maxsize=8)
def _known_weights(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _weights(WHOLE, device)


@lru_cache(maxsize=64)
def _every(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(0, count, -(-count // WHOLE) | 1, dtype=torch.int64, device=device)


@lru_cache(maxsize=256)
def _places(count: int, number: int, device: torch.device) -> Tensor:
    """Places spread over `count` elements: multiples of the golden ratio, modulo 1 (Weyl's sequence)."""
    golden = 0.6180339887498949
    places = [int(((k + 0.5) * golden % 1.0) * count) for k in range(number)]
    with torch.inference_mode(False):
        return torch.tensor(places, dtype=torch.int64, device=device)
