"""`sp_compile.data` without other ranks, the sampler, and the group that inputs move on."""

from __future__ import annotations

import collections
import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedTokenizerFast

from sp_compile.data import SPDistForward, check_same_inputs, sp_sampler, sync_data, sync_inputs
from sp_compile.distributed import group as sp
from sp_compile.distributed.structure import Structure, build
from sp_compile.errors import ConfigurationError
from sp_compile.tools.simulation import fake_world


def check_pass_through() -> None:
    batch = {"x": torch.ones(2, requires_grad=True), "name": "x"}
    assert [found is batch for found in sync_inputs(batch)] == [True]
    assert [found["x"].device.type for found in SPDistForward("moved", False, "meta")(batch)] == ["meta"]
    assert sync_data(batch, 0) is batch
    check_same_inputs(torch.ones(1), torch.zeros(0))


def test_without_a_group_all_is_passed_through() -> None:
    check_pass_through()
    with fake_world(4):
        check_pass_through()
        sp.init_sequence_parallel(1)
        check_pass_through()


def test_a_rank_that_the_group_does_not_have() -> None:
    for source in (1, -1):
        with pytest.raises(ConfigurationError, match=rf"sp_idx={source} is no rank .* it has 1, from 0 to 0"):
            sync_data("x", source)
    with fake_world(4):
        sp.init_sequence_parallel(2)
        with pytest.raises(ConfigurationError, match=r"sp_idx=2 is no rank .* it has 2, from 0 to 1"):
            sync_data("x", 2)


def drawn(rank: int, size: int | None, epoch: int) -> list[int]:
    with fake_world(4, rank):
        if size is not None:
            sp.init_sequence_parallel(size)
        sampler = sp_sampler(torch.arange(10), seed=3, drop_last=True)  # type: ignore[arg-type]
        sampler.set_epoch(epoch)
        return list(sampler)


@pytest.mark.parametrize("epoch", [0, 1])
def test_ranks_of_an_sp_group_draw_the_same_samples(epoch: int) -> None:
    ranks = [drawn(rank, 2, epoch) for rank in range(4)]
    assert ranks[0] == ranks[1] and ranks[2] == ranks[3]
    assert sorted(ranks[0] + ranks[2]) == list(range(10))
    assert drawn(0, 4, epoch) == drawn(3, 4, epoch)
    assert len({tuple(drawn(rank, None, epoch)) for rank in range(4)}) == 4
    assert drawn(0, 2, 0) != drawn(0, 2, 1)


def test_the_sampler_without_a_process_group() -> None:
    assert list(sp_sampler(torch.arange(3), shuffle=False)) == [0, 1, 2]  # type: ignore[arg-type]


@pytest.mark.parametrize("as_mesh", [False, True])
def test_inputs_move_on_a_group_apart(as_mesh: bool) -> None:
    with fake_world(4, rank=3):
        assert sp.get_data_group() is None
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sp", "dp")) if as_mesh else None
        sp.init_sequence_parallel(None if as_mesh else 2, device_mesh=mesh)
        data, shared = sp.get_data_group(), sp.get_sequence_parallel_group()
        assert data is not None and shared is not None and data is not shared
        assert dist.get_process_group_ranks(data) == dist.get_process_group_ranks(shared)
        sp.init_sequence_parallel(4)
        assert sp.get_data_group() is not data
        sp.destroy_sequence_parallel()
        assert sp.get_data_group() is None
        with pytest.raises(ValueError, match="Invalid process group"):
            dist.destroy_process_group(data)


@pytest.mark.parametrize(
    ("world", "data"), [("cuda:nccl", "cpu:gloo,cuda:nccl"), ("cpu:gloo,cuda:gloo", None), ("cpu:gloo,cuda:nccl", None)]
)
def test_what_is_on_the_cpu_can_move_too(monkeypatch: pytest.MonkeyPatch, world: str, data: str | None) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda: world)
    assert sp._data_backend() == data


class Marked(dict[str, Any]):
    pass


def marked(**attributes: Any) -> Marked:
    made = Marked(x=1)
    made.__dict__.update(attributes)
    return made


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"f": abs}, "batch['f'] is a builtins.builtin_function_or_method; what goes from rank to rank is tensors"),
        ([1, ("x", range(3))], r"batch[1][1] is a builtins.range"),
        ({"x": [np.array([None])]}, "batch['x'][0] is a numpy array of object"),
        (collections.defaultdict(lambda: 0), "batch is a defaultdict of <function"),
        ({2: collections.namedtuple("Pair", "one other")(1, object())}, "batch[2].other is a builtins.object"),
        ({object: 1}, "a key of batch is a builtins.type"),
        (marked(scale=object()), "batch.scale is a builtins.object"),
    ],
)
def test_what_a_batch_cannot_have(batch: Any, words: str) -> None:
    with pytest.raises(TypeError) as caught:
        Structure(batch)
    assert str(caught.value).startswith(words)


def rebuilt(batch: Any) -> Any:
    structure = Structure(batch)
    return build(json.loads(json.dumps(structure.json)), structure.tensors, structure.buffers, structure.classes)


def test_what_a_container_keeps_to_itself_is_left_out() -> None:
    """As a fast tokenizer's output does its `Encoding`s, and the tensors in what cannot be sent."""
    x = torch.ones(2)
    batch = {"odd": marked(_cache=[x, object()], _seen=[x], scale=3), "x": x}
    structure = Structure(batch)
    assert len(structure.tensors) == 1 and structure.tensors[0] is x
    found = rebuilt(batch)
    assert vars(found["odd"]) == {"_seen": [x], "scale": 3} and found["x"] is found["odd"]._seen[0]
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    encoding = PreTrainedTokenizerFast(tokenizer_object=words)(["a", "b"], return_tensors="pt")
    assert encoding.is_fast
    found = rebuilt(encoding)
    assert type(found) is type(encoding) and found["input_ids"].tolist() == [[0], [1]] and not found.is_fast
