"""`python -m sp_compile verify|doctor`.

    python -m sp_compile verify my_models:tiny_llama --sp-size 8
    torchrun --nproc-per-node 8 -m sp_compile doctor

`MODULE:CALLABLE` returns a model and its inputs: `(model, inputs)`, where inputs are a tuple of positional arguments, a
dict of keyword arguments or one argument; or `(model, args, kwargs)`. The exit code is 0 if all is well, 1 if something
is wrong, and 2 if nothing could be said.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from .doctor import doctor
from .errors import ConfigurationError, SequenceParallelError, VerificationError
from .verify import verify


def load(target: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model, the positional and the keyword arguments that `MODULE:CALLABLE` returns."""
    name, colon, attribute = target.partition(":")
    if not colon:
        raise ConfigurationError(f"{target!r} is no MODULE:CALLABLE, such as my_models:tiny_llama")
    try:
        made = getattr(import_module(name), attribute)()
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigurationError(f"{target}: {error}") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise ConfigurationError(f"{target} returned {type(made).__name__}; return (model, inputs)")
    model, inputs, *more = made
    kwargs: dict[str, Any] = dict(more[0]) if more else {}
    if isinstance(inputs, Mapping) and not more:
        return model, (), dict(inputs)
    return model, inputs if isinstance(inputs, tuple) else (inputs,), kwargs


def _verify(options: argparse.Namespace) -> int:
    model, args, kwargs = load(options.target)
    try:
        print(verify(model, *args, sp_size=options.sp_size, tolerance=options.tolerance, **kwargs))
    except VerificationError as error:
        print(error)
        return 1
    return 0


def _doctor(_: argparse.Namespace) -> int:
    diagnosis = doctor()
    if int(os.environ.get("RANK", "0")) == 0:
        print(diagnosis)
    return 0 if diagnosis.passed else 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m sp_compile", description="Sequence parallelism as a torch.compile backend"
    )
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    verifying = commands.add_parser("verify", help="P simulated ranks against one device")
    verifying.add_argument("target", metavar="MODULE:CALLABLE", help="returns (model, inputs)")
    verifying.add_argument("--sp-size", type=int, default=4, metavar="P", help="ranks (4)")
    verifying.add_argument("--tolerance", type=float, help="the largest relative error; by dtype if not given")
    verifying.set_defaults(run=_verify)
    examining = commands.add_parser("doctor", help="versions, groups, links, and a self-test of every sp:: op")
    examining.set_defaults(run=_doctor)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit code."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except SequenceParallelError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    raise SystemExit(main())
