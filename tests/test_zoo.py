"""Every model of the zoo is on every rank what it is on one device: outputs, loss and all gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from zlib import crc32

import pytest
import torch

from sp_compile import RewrittenGraph

from .commands.coverage import measure
from .equivalence import Step, differences, step
from .zoo import ZOO, Model, build, run_on_ranks, tokens

PARTS = (2, 3, 4)
VARIANTS = [(name, attention) for name, model in ZOO.items() for attention in model.attentions]


def on_one_device(model: Model, attention: str) -> Step:
    module = build(model, attention, model.short)
    torch.manual_seed(1)
    return step(module, module, (), model.inputs(model.short))


def assert_right(model: Model, attention: str, parts: int) -> list[RewrittenGraph]:
    expected = on_one_device(model, attention)
    got, graphs = run_on_ranks(model, build(model, attention, model.short), model.short, parts)
    errors = differences(expected, got, parts)
    wrong = {which: error for which, error in errors.items() if not error <= model.tolerance}
    assert not wrong, f"P={parts}: {wrong}"
    assert any(which.startswith("grad") for which in errors)
    return graphs


@pytest.mark.parametrize("name", ZOO)
def test_model(name: str) -> None:
    """One attention implementation and one P, which rotate by name."""
    turn = crc32(name.encode())
    attentions = ZOO[name].attentions
    assert_right(ZOO[name], attentions[turn % len(attentions)], PARTS[turn // 2 % len(PARTS)])


@pytest.mark.full
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("name", "attention"), VARIANTS)
def test_every_variant(name: str, attention: str, parts: int) -> None:
    assert_right(ZOO[name], attention, parts)


OUT_OF_PATCHES = {"sd3", "dit", "pixart", "wan", "cogvideox", "hunyuan_video"}
"""Diffusion models that gather their output, behind all layers, on its way out of patches."""


@pytest.mark.full
@pytest.mark.parametrize(("name", "attention"), VARIANTS)
def test_what_the_readme_says_of_its_coverage(name: str, attention: str) -> None:
    """With the settings of the model: DeBERTa's graphs end where it reads a length, unless Dynamo goes on there."""
    result = measure(ZOO[name], attention)
    assert result.right and result.share >= 0.99, result.share
    gathered = [each.name for _, each in result.elsewhere(gathers=True)]
    assert len(gathered) == (name in OUT_OF_PATCHES), gathered


def padded(name: str, side: str, length: int) -> dict[str, Any]:
    """Two samples, of which the second is a few tokens shorter; no loss of what is padding."""
    ids = tokens(2 * length).view(2, length)
    kept = torch.ones(2, length, dtype=torch.int64)
    kept[1, -5:] = 0
    kept = kept.flip(1) if side == "left" else kept
    inputs = {"input_ids": ids * kept, "attention_mask": kept, "labels": ids.masked_fill(kept == 0, -100)}
    return {**inputs, "decoder_attention_mask": kept} if name == "t5" else inputs


@pytest.mark.parametrize(
    ("name", "attention", "side", "parts"),
    [
        ("llama", "sdpa", "left", 3),
        ("llama", "eager", "right", 2),
        ("bert", "eager", "left", 4),
        ("bert", "sdpa", "right", 3),
        ("t5", "eager", "left", 2),
        ("t5", "eager", "right", 4),
    ],
)
def test_a_padded_batch(name: str, attention: str, side: str, parts: int) -> None:
    model = replace(ZOO[name], inputs=partial(padded, name, side))
    graphs = assert_right(model, attention, parts)
    assert all(site.strategy == "ulysses" for graph in graphs for site in graph.plan.sites)
    assert sum(len(graph.plan.sites) for graph in graphs) == (6 if name == "t5" else 2)
    assert not [fallback for graph in graphs for fallback in graph.plan.fallbacks]


def test_the_zoo_is_broad() -> None:
    families = [model.family for model in ZOO.values()]
    assert len(families) - families.count("diffusion") >= 24
    assert families.count("diffusion") >= 3
    assert len(set(families)) == 8


def test_another_weight_is_noticed() -> None:
    """A planted wrong: the ranks' model has one weight that is 1e-4 larger."""
    model = ZOO["gpt2"]
    expected = on_one_device(model, "sdpa")
    module = build(model, "sdpa", model.short)
    with torch.no_grad():
        module.get_parameter("transformer.h.1.mlp.c_fc.weight").mul_(1 + 1e-4)
    got, _ = run_on_ranks(model, module, model.short, 2)
    assert max(differences(expected, got, 2).values()) > model.tolerance
