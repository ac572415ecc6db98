"""The command line.

    python -m sp_compile explain MODULE:CALLABLE --sp-size 8 [--html out.html]
    python -m sp_compile verify MODULE:CALLABLE --sp-size 4
    torchrun --nproc-per-node 8 -m sp_compile doctor

The exit status is 0 if all is well, 1 if `verify` or `doctor` found something wrong, 2 if there was nothing to examine.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigurationError, VerificationError
from .tools.doctor import doctor
from .tools.explain import explain
from .tools.verify import verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sp_compile")
    commands = parser.add_subparsers(required=True, metavar="command")
    add_explain(commands)
    add_verify(commands)
    add_doctor(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except (argparse.ArgumentTypeError, ConfigurationError) as error:
        parser.error(str(error))
    return status


def add_explain(commands: Any) -> None:
    parser = commands.add_parser("explain", help="what the backend would do to a model", description=explain.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model(parser)
    parser.add_argument("--sp-size", type=int, default=8, metavar="P", help="ranks (8)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page there as well")
    parser.set_defaults(run=_explain)


def add_verify(commands: Any) -> None:
    parser = commands.add_parser("verify", help="P simulated ranks against one device", description=verify.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model(parser)
    parser.add_argument("--sp-size", type=int, default=4, metavar="P", help="ranks (4)")
    parser.add_argument("--tolerance", type=float, help="the largest relative error; by dtype if it is not given")
    parser.set_defaults(run=_verify)


def add_doctor(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="versions, groups, links, and a self-test of every sp:: op")
    parser.set_defaults(run=_doctor)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The argument that names a model and its inputs; `load` follows it."""
    parser.add_argument(
        "model",
        metavar="MODULE:CALLABLE",
        help="a function without arguments that returns (model, args) or (model, args, kwargs)",
    )


def load(target: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The model and its inputs that `MODULE:CALLABLE` returns. Raises `ArgumentTypeError` where it does not."""
    name, _, attribute = target.partition(":")
    if not all(part.isidentifier() for part in (*name.split("."), attribute)):
        raise argparse.ArgumentTypeError(
            f"{target!r} is not of the form MODULE:CALLABLE, as in package.models:tiny_llama"
        )
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise argparse.ArgumentTypeError(f"there is no module {name!r}") from error
    if not callable(make := getattr(module, attribute, None)):
        raise argparse.ArgumentTypeError(f"the module {name!r} has no callable {attribute!r}")
    made = make()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not callable(made[0]):
        raise argparse.ArgumentTypeError(f"{target} has to return (model, args) or (model, args, kwargs)")
    model, args, *rest = made
    return model, tuple(args) if isinstance(args, (tuple, list)) else (args,), dict(rest[0]) if rest else {}


def _explain(options: argparse.Namespace) -> int:
    if options.html is not None:
        _check_writable(options.html)
    model, args, kwargs = load(options.model)
    report = explain(model, *args, sp_size=options.sp_size, **kwargs)
    print(report)
    if options.html is not None:
        options.html.write_text(report.to_html(), encoding="utf-8")
    return 0


def _check_writable(page: Path) -> None:
    """Raise `ArgumentTypeError` for a file that cannot be written, before anything is computed for it."""
    if page.is_dir():
        raise argparse.ArgumentTypeError(f"{page} is a folder: --html takes the name of a file")
    if not page.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {page.parent} for the page: make it first")
    if not os.access(page if page.exists() else page.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"the page {page} cannot be written here")


def _verify(options: argparse.Namespace) -> int:
    model, args, kwargs = load(options.model)
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


if __name__ == "__main__":
    sys.exit(main())
