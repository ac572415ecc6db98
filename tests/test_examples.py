"""The examples run as a user runs them, and refuse a result that is wrong."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sp_compile.tools.simulation import fake_world

ROOT = Path(__file__).parents[1]


def run(script: str, *args: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "examples" / script), *args]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def example(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_print_graph_shows_the_exchanges_of_ulysses() -> None:
    before, after = run("print_graph.py").split("# On each of 2 ranks")
    assert "aten.scaled_dot_product_attention" in before and "sp." not in before
    assert after.count("sp.all_to_all_packed(") == after.count("sp.all_to_all(") == 1
    assert "gather_seq_scatter_heads_q: f32[1, 2 of 4, 32, 16]" in after
    assert after.splitlines()[-1] == "return [gather_output_0]"


@pytest.mark.slow
def test_quickstart_trains_as_one_device_does() -> None:
    tiny = ["--layers", "1", "--steps", "3", "--sequence", "65", "--hidden", "32"]
    lines = run("quickstart.py", *tiny).splitlines()
    (site,) = (line.split() for line in lines if line.startswith("model.layers.0.self_attn"))
    assert site[1] == "8" and site[3] in ("ulysses", "all_gather_kv") and int(site[4].replace(",", "")) > 0
    assert {line.split()[0] for line in lines if "e-0" in line} == {"loss", "logits,", "gradients,"}


def test_quickstart_refuses_what_differs() -> None:
    pytest.importorskip("transformers")
    quickstart = example("quickstart")
    expected = torch.tensor([1.0, -2.0])
    assert quickstart.difference(expected, expected + 1e-5) <= quickstart.tolerance("loss")
    assert quickstart.difference(expected, expected + 1e-4) > quickstart.tolerance("loss")
    assert quickstart.difference(expected, expected + 1e-4) <= quickstart.tolerance("gradients, first step")
    assert quickstart.difference(expected, expected + float("nan")) == float("inf")


def test_the_benchmark_refuses_what_differs() -> None:
    pytest.importorskip("tqdm")
    benchmark = example("benchmark")
    alone, other = nn.Linear(3, 2), nn.Linear(3, 2)
    for model in (alone, other):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    one, two = (benchmark.Variant(name, alone, lambda: None, loss=torch.tensor(2.0)) for name in ("one", "two"))
    with fake_world(1):
        assert benchmark.relative(alone, other) == benchmark.error_of_loss(one, two) == 0
        for wrong in (1.001, float("nan")):
            other.bias.grad[1], two.loss = wrong, torch.tensor(2 * wrong)
            assert benchmark.relative(alone, other) > benchmark.TOLERANCE
            assert benchmark.error_of_loss(one, two) > benchmark.TOLERANCE


@pytest.mark.slow
def test_the_benchmark_agrees_with_one_device(tmp_path: Path) -> None:
    tiny = ["--layers", "1", "--sequence", "16", "--hidden", "32", "--heads", "4", "--kv-heads", "2", "--rounds", "2"]
    printed = run("benchmark.py", *tiny, "--plot", str(tmp_path / "steps.png"))
    rows = {line[:18].strip(): line.split() for line in printed.splitlines()}
    assert {"one device", "ceiling", "by hand", "by hand, compiled", "sp_backend"} <= set(rows)
    assert rows["sp_backend"][6] == "6"  # two a layer each way, the loss, a bucket of gradients
    assert (tmp_path / "steps.png").stat().st_size > 1000
