"""The one family of errors that this library raises, and the line of the user's file that their texts name."""

import linecache
import re
import traceback
from functools import lru_cache
from pathlib import Path

import torch
from torch.fx import Node


class SequenceParallelError(RuntimeError):
    """Base of every error of `sp_compile`; its text says what was met, where, and what to do."""


class ConfigurationError(SequenceParallelError, ValueError):
    """An option, a group size or a device mesh that cannot be used."""


class CaptureError(SequenceParallelError):
    """A Dynamo graph that cannot be re-traced or rewritten safely; the backend then runs it unsharded."""


class RuleError(SequenceParallelError, ValueError):
    """A sharding rule that does not parse, or does not fit the operator that it is given for."""


class DataError(SequenceParallelError):
    """Inputs that ranks of an SP group cannot share, or calls in which they do not agree."""


class RankMismatchError(SequenceParallelError):
    """Ranks of an SP group that came to different graphs, options, inputs, parameters or random numbers, or not at all.

    Every rank raises it. The group cannot be used any more; `init_sequence_parallel` makes another.
    """


class RankRaisedError(SequenceParallelError):
    """A rank of the SP group left a compiled call by an exception that other ranks did not raise, while they needed it.

    Those raise it, and so does that rank at its next call. Nothing is returned of what was not finished. The group
    cannot be used any more; `init_sequence_parallel` makes another.
    """


class RankLostError(SequenceParallelError):
    """A rank of the SP group whose process ended while others needed it; those raise it."""


class FallbackError(SequenceParallelError):
    """With `strict=True`: something ran on gathered values that could not be sharded."""


class VerificationError(SequenceParallelError):
    """P ranks do not give what one device gives; see `verify`.

    `verification` has the errors of all tensors (None: the ranks could not run), `divergence` the first node that
    differs (None: no node of a rewritten graph does).
    """

    def __init__(self, text: str, verification: object = None, divergence: object = None) -> None:
        super().__init__(text)
        self.verification = verification
        self.divergence = divergence


class SimulationError(SequenceParallelError):
    """What ranks that are simulated in one process cannot do; real ones may."""


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)\n\s*(?P<code>.*)')
_TORCH = str(Path(torch.__file__).parent)
_NOBODYS = (_TORCH, str(Path(__file__).parent), "<")
"""How the names of files begin that no user wrote; that of generated code with <."""
_STANDARD = str(Path(linecache.__file__).parent)


def user_line(node: Node) -> str:
    """`file.py:12 in forward: y = f(x)`: the innermost frame of `node` outside torch."""
    return place_of(node.meta.get("stack_trace") or "") or f"node {node.name}"


@lru_cache(maxsize=4096)
def place_of(stack_trace: str) -> str:
    """As `user_line`, of a trace, which many nodes of all layers of a model share. Empty: no frame."""
    frames = list(_FRAME.finditer(stack_trace))
    if not frames:
        return ""
    frame = next((f for f in reversed(frames) if not f["file"].startswith(_TORCH)), frames[-1])
    place = f"{Path(frame['file']).name}:{frame['line']} in {frame['function']}"
    return f"{place}: {frame['code'].strip()}"


def raised_at(error: BaseException) -> str:
    """`train.py:12 in step: loss = model(ids)`: the innermost line of the user on the way to what raised `error`.

    Called where it is caught. Empty: there is none.
    """
    if error.__traceback__ is None:
        return ""
    outer = [(frame, line) for frame, line in traceback.walk_stack(error.__traceback__.tb_frame)][::-1]
    for frame, line in reversed([*outer, *traceback.walk_tb(error.__traceback__)]):
        file = frame.f_code.co_filename
        standard = file.startswith(_STANDARD) and "site-packages" not in file
        if not standard and not file.startswith(_NOBODYS) and "torchinductor" not in file:
            code = linecache.getline(file, line).strip()
            return f"{Path(file).name}:{line} in {frame.f_code.co_name}" + (f": {code}" if code else "")
    return ""


def in_words(error: BaseException) -> str:
    """`IndexError: index out of range in self`: its type, and the first line of its text."""
    first = str(error).strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
