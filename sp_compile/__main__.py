"""`python -m sp_compile explain MODULE:CALLABLE --sp-size 8 [--html out.html]`"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .explain import explain


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sp_compile")
    commands = parser.add_subparsers(required=True, metavar="command")
    add_explain(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return status


def add_explain(commands: Any) -> None:
    parser = commands.add_parser("explain", help="what the backend would do to a model", description=explain.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model(parser)
    parser.add_argument("--sp-size", type=int, default=8, metavar="P", help="ranks (8)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page there as well")
    parser.set_defaults(run=_explain)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The argument that names a model and its inputs; `load` follows it."""
    parser.add_argument(
        "model",
        metavar="MODULE:CALLABLE",
        help="a function without arguments that returns (model, args) or (model, args, kwargs)",
    )


def load(target: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The model and its inputs that `MODULE:CALLABLE` returns. Raises `ArgumentTypeError` where it does not."""
    name, colon, attribute = target.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{target!r} is not of the form MODULE:CALLABLE")
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
    return model, tuple(args), dict(rest[0]) if rest else {}


def _explain(options: argparse.Namespace) -> int:
    model, args, kwargs = load(options.model)
    report = explain(model, *args, sp_size=options.sp_size, **kwargs)
    print(report)
    if options.html is not None:
        options.html.write_text(report.to_html(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
