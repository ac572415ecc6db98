"""Every architecture that Hugging Face has for a task, once: `python -m tests.sweep [task] [--parts P] [model ...]`.

Far more than the zoo, and nobody chose the models. Each is made tiny, as far as its configuration has the usual names,
and takes one step of 67 tokens, the last of them masked: on every simulated rank outputs, loss and all gradients have
to be those of one device. What one device does not run so, or has too many parameters, is left out, and told. Exits
with an error if a model is wrong, or fails on ranks alone.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tabulate import tabulate
from torch import nn
from tqdm import tqdm
from transformers.models.auto import configuration_auto, modeling_auto

from .equivalence import Step, differences, run_simulated, step
from .zoo import OPTIONS, configured, random, tokens

TASKS: Mapping[str, Mapping[str, Any]] = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
LENGTH, MASKED, SIDE = 67, 7, 48
LARGEST, SECONDS = 30_000_000, 150
TOLERANCE = 1e-4
"""Of the largest value: some compute in fp32 whatever their dtype is, and take differences there."""

EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 8)
SMALL: Mapping[str, Any] = {
    **EXPERTS,
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256},
    **{"image_size": SIDE, "patch_size": 8, "num_labels": 2},
}
HEADS = ("num_key_value_heads", "head_dim")
WAYS: tuple[tuple[str, torch.dtype, tuple[str, ...]], ...] = (
    ("sdpa", torch.float64, ()),
    ("eager", torch.float64, ()),
    ("sdpa", torch.float64, HEADS),
    ("sdpa", torch.float32, ()),
    ("sdpa", torch.float32, HEADS),
    ("eager", torch.float32, (*EXPERTS, *HEADS)),
)
"""Attention, dtype (grouped_mm has no fp64), and what is left as the configuration has it; the first that runs."""


class Unsuitable(Exception):
    """What one device does not run either."""


class TooSlow(BaseException):
    """Not an `Exception`, which a compiler would take for its own."""


@dataclass(frozen=True)
class Outcome:
    model: str
    verdict: str
    told: str = ""


def inputs_of(task: str, dtype: torch.dtype) -> dict[str, Any]:
    if task == "image":
        return {"pixel_values": random(1, 3, SIDE, SIDE).to(dtype), "labels": torch.tensor([1])}
    ids, mask, labels = tokens(LENGTH), torch.ones(1, LENGTH, dtype=torch.long), tokens(LENGTH)
    mask[:, -MASKED:], labels[:, [1, *range(LENGTH - MASKED, LENGTH)]] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def build(task: str, name: str, way: int) -> nn.Module:
    """The model, in training mode, from a fixed seed."""
    attention, dtype, left = WAYS[way]
    config = getattr(transformers, configuration_auto.CONFIG_MAPPING_NAMES[name])
    known = set(inspect.signature(config.__init__).parameters).difference(left)
    made = configured(config, attention, **{key: value for key, value in SMALL.items() if key in known})
    architecture = TASKS[task][name]
    cls = getattr(transformers, architecture if isinstance(architecture, str) else architecture[0])
    with torch.device("meta"):
        if sum(parameter.numel() for parameter in cls(made).parameters()) > LARGEST:
            raise Unsuitable("too many parameters")
    torch.manual_seed(0)
    model: nn.Module = cls(made).to(dtype).train()
    return model


def on_one_device(task: str, name: str) -> tuple[int, Step]:
    """The first way in which a model runs, and its step."""
    told = ""
    for way, (_, dtype, _) in enumerate(WAYS):
        try:
            model = build(task, name, way)
            torch.manual_seed(1)
            return way, step(model, model, (), inputs_of(task, dtype))
        except Unsuitable:
            raise
        except Exception as error:  # whatever its configuration, or the model, objects to
            told = f"{type(error).__name__}: {error}".splitlines()[0]
    raise Unsuitable(told)


def outcome(task: str, name: str, parts: int) -> Outcome:
    try:
        way, expected = on_one_device(task, name)
    except Unsuitable as error:
        return Outcome(name, "left out", str(error))
    try:
        model, inputs = build(task, name, way), inputs_of(task, WAYS[way][1])
        torch.manual_seed(1)
        got, graphs = run_simulated(model, (), inputs, parts, OPTIONS)
    except Exception as error:
        return Outcome(name, "fails", f"{type(error).__name__}: {error}".splitlines()[0])
    errors = differences(expected, got, parts)
    worst = max(errors, key=lambda which: float("inf") if errors[which] != errors[which] else errors[which])
    whole = Counter(str(each.node.target) for graph in graphs for each in graph.plan.fallbacks)
    ran = ", ".join(f"{op} {count} times" for op, count in whole.items()) or "nothing"
    told = f"{errors[worst]:.0e} ({worst}); whole: {ran}"
    return Outcome(name, "right" if errors[worst] <= TOLERANCE else "wrong", told)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def late(*args: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", default="causal", choices=TASKS)
    parser.add_argument("models", nargs="*", help="model types (default: all)")
    parser.add_argument("--parts", type=int, default=3, help="simulated ranks (default: 3)")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    started, found = time.monotonic(), []
    for name in tqdm(options.models or sorted(TASKS[options.task])):
        try:
            with time_limit(SECONDS):
                found.append(outcome(options.task, name, options.parts))
        except TooSlow:
            found.append(Outcome(name, "left out", "too slow"))
        torch._dynamo.reset()
    rows = sorted(((each.verdict, each.model, each.told[:110]) for each in found), reverse=True)
    print(tabulate(rows, ["", "model", "largest error, and what ran on gathered values; or why not"]))
    counts = Counter(each.verdict for each in found)
    print(f"{dict(counts)} on {options.parts} ranks, {time.monotonic() - started:.0f} s")
    if counts["wrong"] or counts["fails"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
