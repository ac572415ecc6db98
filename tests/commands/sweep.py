"""Every architecture that Hugging Face has for a task, once: `python -m tests.commands.sweep [task] [model ...]`.

Far more than the zoo, and nobody chose the models. Each is made tiny, as far as its configuration has the usual names,
and takes one step, of 67 tokens with the last of them masked where it reads text. `verify` compares: on every simulated
rank outputs, loss, buffers and all gradients have to be those of one device. What one device does not run so, or has
too many parameters, is left out, and told. Exits with an error if a model is wrong, or fails on ranks alone.
"""

from __future__ import annotations

import argparse
import copy
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

from sp_compile import VerificationError, rewritten_graphs, verify

from ..zoo import configured, random, tokens

TASKS: Mapping[str, Mapping[str, Any]] = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "segmentation": modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    "video": modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
    "speech": modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
}
LENGTH, MASKED, SIDE, FRAMES, SAMPLES = 67, 7, 72, 6, 4000
LARGEST, SECONDS = 30_000_000, 150
TOLERANCE = 1e-4
"""Of the largest value: some compute in fp32 whatever their dtype is, and take differences there."""

EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 8)
SMALL: Mapping[str, Any] = {
    **EXPERTS,
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256},
    **{"image_size": SIDE, "crop_size": SIDE, "patch_size": 8, "num_frames": FRAMES, "num_labels": 2},
    **{"mask_time_prob": 0.0, "apply_spec_augment": False},
}
HEADS = ("num_key_value_heads", "head_dim")
WAYS: tuple[tuple[str, torch.dtype, tuple[str, ...]], ...] = (
    ("sdpa", torch.float64, ()),
    ("eager", torch.float64, ()),
    ("sdpa", torch.float64, HEADS),
    ("sdpa", torch.float64, ("patch_size", "num_frames")),
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


def inputs_of(task: str, model: nn.Module) -> dict[str, Any]:
    name = model.main_input_name
    if name in ("input_values", "input_features"):
        config = model.config
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_projection_input_dim", None)
        wave = random(1, SAMPLES) if name == "input_values" else random(1, LENGTH, bins)
        return {name: wave.to(model.dtype), "labels": tokens(4)}
    if task in ("image", "segmentation", "video"):
        labels = torch.arange(2 * SIDE**2).view(2, SIDE, SIDE) % 2 if task == "segmentation" else torch.tensor([0, 1])
        frames = (getattr(model.config, "num_frames", FRAMES),) if task == "video" else ()
        side = getattr(model.config, "image_size", SIDE) if task == "video" else SIDE
        return {name: random(2, *frames, 3, side, side).to(model.dtype), "labels": labels}
    ids, mask, labels = tokens(LENGTH), torch.ones(1, LENGTH, dtype=torch.long), tokens(LENGTH)
    mask[:, -MASKED:], labels[:, [1, *range(LENGTH - MASKED, LENGTH)]] = 0, -100
    labels = torch.tensor([1]) if task == "classification" else labels
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


def prepared(task: str, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model in the first way in which one device runs it, and its inputs."""
    told = ""
    for way in range(len(WAYS)):
        try:
            model = build(task, name, way)
            inputs = inputs_of(task, model)
            copy.deepcopy(model)(**inputs)
            return model, inputs
        except Unsuitable:
            raise
        except Exception as error:  # whatever its configuration, or the model, objects to
            told = f"{type(error).__name__}: {error}".splitlines()[0]
    raise Unsuitable(told)


def outcome(task: str, name: str, parts: int) -> Outcome:
    try:
        model, inputs = prepared(task, name)
    except Unsuitable as error:
        return Outcome(name, "left out", str(error))
    try:
        found = verify(model, **inputs, sp_size=parts, tolerance=TOLERANCE)
    except VerificationError as error:
        return Outcome(name, "wrong" if error.verification else "fails", str(error).splitlines()[0])
    whole = Counter(
        str(each.node.target)
        for graph in rewritten_graphs()
        if graph.name in found.graphs
        for each in graph.plan.fallbacks
    )
    worst = max(found.errors, key=lambda which: max(found.errors[which]) * (which not in found.rounding))
    ran = ", ".join(f"{op} {count} times" for op, count in whole.items()) or "nothing"
    return Outcome(name, "right", f"{max(found.errors[worst]):.0e} ({worst}); whole: {ran}")


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
