"""Every model of the zoo is on every rank what it is on one device: outputs, loss and all gradients."""

from __future__ import annotations

from zlib import crc32

import pytest
import torch

from .equivalence import Step, differences, step
from .zoo import ZOO, Model, build, run_on_ranks

PARTS = (2, 3, 4)
VARIANTS = [(name, attention) for name, model in ZOO.items() for attention in model.attentions]


def on_one_device(model: Model, attention: str) -> Step:
    module = build(model, attention, model.short)
    torch.manual_seed(1)
    return step(module, module, (), model.inputs(model.short))


def assert_right(name: str, attention: str, parts: int) -> None:
    model = ZOO[name]
    expected = on_one_device(model, attention)
    got, _ = run_on_ranks(model, build(model, attention, model.short), model.short, parts)
    errors = differences(expected, got, parts)
    wrong = {which: error for which, error in errors.items() if not error <= model.tolerance}
    assert not wrong, f"P={parts}: {wrong}"
    assert any(which.startswith("grad") for which in errors)


@pytest.mark.parametrize("name", ZOO)
def test_model(name: str) -> None:
    """One attention implementation and one P, which rotate by name."""
    turn = crc32(name.encode())
    attentions = ZOO[name].attentions
    assert_right(name, attentions[turn % len(attentions)], PARTS[turn // 2 % len(PARTS)])


@pytest.mark.full
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("name", "attention"), VARIANTS)
def test_every_variant(name: str, attention: str, parts: int) -> None:
    assert_right(name, attention, parts)


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
