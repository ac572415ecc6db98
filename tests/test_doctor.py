"""`doctor`: alone, over real ranks, and of ops that are broken on purpose."""

from __future__ import annotations

import json
import re
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sp_compile.__main__ import main
from sp_compile.ops import sp_ops as ops
from sp_compile.placement.sharded_dim import ShardedDim
from sp_compile.tools.doctor import CHECKS, Diagnosis, doctor

from .commands.mutants import MUTANTS
from .gloo_pool import GlooPool


def test_every_op_is_tested() -> None:
    defined = {name.removeprefix("sp::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("sp::")}
    assert defined == set(re.findall(r"\w+", " ".join(CHECKS))) - {"sum", "max", "min"}


def test_a_world_of_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch       {torch.__version__}" in printed and "gloo        yes" in printed
    assert "1 rank: start it with torchrun to see the others" in printed
    assert "All 17 checks passed." in printed
    assert not dist.is_initialized(), "its groups are gone"


def test_an_op_that_is_wrong_and_one_that_raises(capsys: pytest.CaptureFixture[str]) -> None:
    def twice(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return 2 * grad, None

    with patch.object(ops._Replicate, "backward", staticmethod(twice)), patch.object(ShardedDim, "cut", None):
        assert main(["doctor"]) == 1
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["replicate"].endswith("WRONG") and "TypeError" in lines["shard"]
    assert lines["positions"].endswith("right")


def diagnosis(mutant: str) -> Diagnosis:
    if not mutant:
        return doctor()
    with MUTANTS[mutant]():
        return doctor()


@pytest.mark.slow
def test_real_ranks(gloo2: GlooPool) -> None:
    first, second = gloo2.run(diagnosis, "")
    assert first.passed and first.to_dict()["checks"] == second.to_dict()["checks"]
    assert first.links == second.links and first.links.bandwidth > 0
    assert first.group["world"] == "2 ranks" and "us a launch" in str(first)
    assert json.dumps(first.to_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutant", "op"),
    [
        ("padded rows not zeroed in the backward of an all-to-all", "all_to_all"),
        ("padded rows not zeroed in the backward of an all-gather", "all_gather"),
        ("a rank's block off by one granule", "positions"),
        ("padding keeps the rows that a slice cut off", "refill_padding"),
        ("padded query heads keep their gradient", "all_to_all_kv"),
        ("an extremum gives its whole gradient to each winner", "all_reduce max"),
    ],
)
def test_broken_ops_are_found_on_real_ranks(mutant: str, op: str, gloo2: GlooPool) -> None:
    for of_rank in gloo2.run(diagnosis, mutant):
        assert op in [each.op for each in of_rank.checks if not each.passed]
