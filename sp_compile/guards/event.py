"""A place in the program that every rank comes to, and numbers that say the same in every process."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._dtype_abbrs import dtype_abbrs
from torch.utils._python_dispatch import _disable_current_modes

from ..distributed.samples import Samples
from .accounts import Account

DTYPES = {dtype: index for index, dtype in enumerate(sorted(dtype_abbrs, key=str))}
"""A number for each dtype, the same in every process."""

_BITS = (1 << 63) - 1


class Event:
    """A place that every rank comes to, and what each says of it."""

    def __init__(
        self, number: int, digest: int, account: Callable[[], Account], samples: Samples, timeout: float
    ) -> None:
        self.number, self.digest, self.account = number, digest, account
        self.samples, self.timeout = samples, timeout
        self.started, self.thread = time.monotonic(), threading.get_ident()
        self.inside, self.agreed = True, False
        self.launched = 0
        """Collectives that this rank has launched in it."""
        self.work: Any = None
        self.said: Tensor | None = None


@contextmanager
def unseen() -> Iterator[None]:
    """What the user's modes count, record or replace are the user's own ops; the guard's have no gradients either."""
    with torch.no_grad():
        if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                yield
        else:
            yield


def digest_of(*parts: Any) -> int:
    """63 bits of what JSON can say, alike in every process."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") & _BITS


def hash_of(*numbers: Any) -> int:
    """The same of numbers and tuples of them, in a microsecond: Python salts the hashes of text only."""
    return hash(numbers) & _BITS
