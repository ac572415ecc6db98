"""How fast the ranks of a group reach one another and compute, in numbers: what plans are priced by."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ConfigurationError


@dataclass(frozen=True)
class Links:
    """What a collective takes: `latency + bytes received / bandwidth` (Hockney 1994); and how fast a rank computes.

    Raises `ConfigurationError` for what is no speed.
    """

    bandwidth: float
    """Bytes per second that a rank receives while all ranks exchange."""
    latency: float
    """Seconds of a launch that moves nothing."""
    flops: float = 4e14
    """Floating-point operations per second of a rank in products of matrices."""

    def __post_init__(self) -> None:
        if not (0 < self.bandwidth < math.inf and 0 < self.flops < math.inf and 0 <= self.latency < math.inf):
            raise ConfigurationError(
                f"{self} is no machine: bandwidth in bytes and flops in operations per second are more than 0, "
                "and the latency is in seconds"
            )

    def seconds(self, launches: int, received: float) -> float:
        """The time of some launches, one after the other."""
        return launches * self.latency + received / self.bandwidth


DEFAULT_LINKS = Links(bandwidth=3e11, latency=0.0)
"""What plans are priced by where no links are given: a node of H100s on NVLink, in bfloat16.

A launch costs nothing here: strategies differ by one or two, and no default knows what those are worth on your machine.
"""
