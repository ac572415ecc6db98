"""What ranks that start again find: the same graph on all, and a cache on disk."""

from __future__ import annotations

import copy
import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from sp_compile import sp_backend

from .equivalence import gradient_errors
from .gloo_pool import GlooPool
from .test_passes import Block

pytestmark = pytest.mark.slow


def lowered_hashes() -> list[str]:
    """The hash of each graph that AOTAutograd hands on, forward and backward: no `sp::` op is left in them."""
    texts: list[str] = []

    def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        text = gm.print_readable(print_output=False)
        assert "torch.ops.sp." not in text and "_c10d_functional" in text
        texts.append(text)
        return gm.forward

    model = Block(3, repeat="flag")
    inner = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    compiled = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": inner}))
    compiled(torch.randn(1, 7, 12)).sum().backward()
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def test_all_ranks_lower_to_the_same_text(gloo3: GlooPool) -> None:
    first, *others = gloo3.run(lowered_hashes)
    assert len(first) == 2
    assert all(other == first for other in others)


def cached(folder: str) -> dict[str, Any]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    counters.clear()
    alone = Block(4, repeat="flag")
    model = copy.deepcopy(alone)
    x = torch.randn(1, 7, 12)
    alone(x).square().sum().backward()
    out = torch.compile(model, backend=sp_backend)(x)
    out.square().sum().backward()
    wrong = max(gradient_errors(alone, model).values()), float((out - alone(x)).detach().abs().max())
    hits = counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"]
    return {"wrong": max(wrong), "hits": sum(hits)}


def test_ranks_share_a_cache_folder_and_a_second_start_hits_it(tmp_path: Path) -> None:
    for start in ("cold", "warm"):
        pool = GlooPool(2)
        try:
            ranks = pool.run(cached, str(tmp_path))
        finally:
            pool.close()
        assert all(rank["wrong"] < 1e-4 for rank in ranks), (start, ranks)
    assert all(rank["hits"] > 0 for rank in ranks), ranks
