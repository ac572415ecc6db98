"""The versions of torch that this library is tested with: it stands on much of torch that moves between releases."""

from __future__ import annotations

import warnings

import torch

TESTED = ("2.13", "2.14")
"""As `pyproject.toml` requires; `make test` takes the first, `make test-next` the last."""


def is_tested(version: str) -> bool:
    """Whether a version of torch, `2.14.1+cpu` say, is one of `TESTED`."""
    return ".".join(version.split(".")[:2]) in TESTED


def warn_of_another(version: str) -> None:
    if not is_tested(version):
        warnings.warn(
            f"sp_compile is tested with torch {' and '.join(TESTED)}, and this is {version}: it may fail, or give "
            "other values than one device. `python -m sp_compile doctor` and sp_compile.verify(model, ...) tell.",
            stacklevel=2,
        )


warn_of_another(str(torch.__version__))
