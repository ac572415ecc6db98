"""What programs and models are rewritten to, as text: held against what they were before a change.

    python -m tests.commands.pinned write FILE       keep the texts
    python -m tests.commands.pinned against FILE     print each text that is another one as a diff, and exit with 1

Of every program of the table on 2, 3 and 4 ranks, and of every model of the zoo on 2. Nothing is computed in earnest:
the ranks are those of torch's fake process group, which moves no data. `--parts` and parts of names choose among them.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from difflib import unified_diff
from functools import partial
from pathlib import Path
from typing import Any

# Read when torch is first imported, here and in the workers; and the order of sets is that of the file.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTHONHASHSEED", "0")

import torch
from tqdm import tqdm

from sp_compile import init_sequence_parallel, rewritten_graphs, sp_backend
from sp_compile.runtime.records import unsharded_graphs
from sp_compile.tools.simulation import bare, fake_world

from ..gloo_pool import collect_rarely
from ..programs import PROGRAMS
from ..zoo import ZOO, build

Case = tuple[str, int]
"""The name of a program, or that of a model with its attention, and P."""


def cases() -> list[Case]:
    programs = [case.name for case in PROGRAMS]
    models = [f"{name}/{attention}" for name, model in ZOO.items() for attention in model.attentions]
    return [(name, parts) for name in programs for parts in (2, 3, 4)] + [(name, 2) for name in models]


def rewritten(case: Case) -> tuple[str, str]:
    """(the name of a case, the text of its graphs)"""
    name, parts = case
    torch._dynamo.reset()
    torch.manual_seed(0)
    call, options, settings = _program(name) if "/" not in name else _model(*name.split("/"))
    known = {each.name for each in (*rewritten_graphs(), *unsharded_graphs())}
    text = []
    with fake_world(parts), torch._dynamo.config.patch(**settings):
        init_sequence_parallel()
        backend = partial(sp_backend, options={"inner_backend": bare, "guards": "off", **options})
        try:
            call(backend)
        except Exception as error:  # what the values that nobody sent led to
            text.append(f"ended by {type(error).__name__}")
    for graph in rewritten_graphs():
        if graph.name not in known:
            text.append(str(graph.rewritten.graph))
            text += [f"whole: {each.node}: {each.reason}" for each in graph.plan.fallbacks]
            text += [f"{each.site.output}: {each.strategy}: {each.reason}" for each in graph.plan.sites]
    text += [f"unsharded: {each.reason}" for each in unsharded_graphs() if each.name not in known]
    return f"{name} P={parts}", "\n".join(text)


Call = Callable[[Callable[..., Any]], Any]


def _program(name: str) -> tuple[Call, dict[str, Any], Mapping[str, Any]]:
    case = next(each for each in PROGRAMS if each.name == name)
    module, inputs = case.module(), case.inputs()
    return (
        lambda backend: torch.compile(module, backend=backend, dynamic=case.dynamic)(*inputs),
        {"attention": case.attention},
        {},
    )


def _model(name: str, attention: str) -> tuple[Call, dict[str, Any], Mapping[str, Any]]:
    model = ZOO[name]
    module, inputs = build(model, attention, model.short), model.inputs(model.short)
    return lambda backend: torch.compile(module, backend=backend)(**inputs), {}, model.dynamo


def prepare() -> None:
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    collect_rarely()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.commands.pinned", description=__doc__)
    parser.add_argument("mode", choices=["write", "against"])
    parser.add_argument("file", type=Path)
    parser.add_argument("names", nargs="*", help="parts of names (all)")
    parser.add_argument("--parts", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    names = options.names or [""]
    chosen = [case for case in cases() if case[1] in options.parts and any(name in case[0] for name in names)]
    # The cases of one worker after another are the same in every run, for a worker lives for one chunk.
    with multiprocessing.get_context("spawn").Pool(options.workers, prepare, maxtasksperchild=60) as workers:
        found = dict(tqdm(workers.imap_unordered(rewritten, chosen), total=len(chosen)))
    if options.mode == "write":
        options.file.write_text(json.dumps(found, indent=0, sort_keys=True))
        return
    pinned = json.loads(options.file.read_text())
    changed = [name for name, text in found.items() if pinned.get(name) != text]
    for name in changed:
        lines = unified_diff(pinned.get(name, "").splitlines(), found[name].splitlines(), name, name, lineterm="")
        print("\n".join(lines))
    print(f"{len(found)} compared, {len(changed)} changed")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
