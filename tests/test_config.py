from __future__ import annotations

from typing import Any

import pytest
import torch

from sp_compile.config import SequenceParallelConfig
from sp_compile.errors import ConfigurationError, SequenceParallelError


def test_no_options_are_the_defaults() -> None:
    assert SequenceParallelConfig.from_options(None) == SequenceParallelConfig()
    assert SequenceParallelConfig.from_options({}) == SequenceParallelConfig()


def test_options_arrive_and_the_result_is_frozen() -> None:
    config = SequenceParallelConfig.from_options(
        {"inner_backend": "aot_eager", "outputs": "shard", "strict": True, "dump": "graphs"}
    )
    assert (config.inner_backend, config.outputs) == ("aot_eager", "shard")
    assert (config.strict, config.dump) == (True, "graphs")
    with pytest.raises(AttributeError, match="cannot assign to field 'strict'"):
        config.strict = False  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"inner_backed": "eager"},
            "unknown option 'inner_backed'; did you mean 'inner_backend'? The options are group, "
            "inner_backend, outputs, param_grads, gradient_bucket_mb, overlap, attention, links, rng, strict, dump, "
            "skip, guards, guard_timeout.",
        ),
        (
            {"outputs": "gathered"},
            "option 'outputs' is 'gathered'; did you mean 'gather'? It takes one of 'gather', 'shard', 'dtensor'.",
        ),
        (
            {"outputs": {"logits": "tensor"}},
            "option \"outputs['logits']\" is 'tensor'; did you mean 'dtensor'? It takes one of",
        ),
        ({"outputs": {None: "shard"}}, "It takes the names or positions of outputs as keys."),
        ({"outputs": ["shard"]}, "or a mapping of names or positions to these."),
        (
            {"attention": "ring"},
            "option 'attention' is 'ring'. It takes one of 'auto', 'ulysses', 'all_gather_kv', 'replicate'.",
        ),
        (
            {"param_grads": None},
            "option 'param_grads' is None. It takes one of 'all_reduce', 'local'.",
        ),
        ({"rng": "exactly"}, "did you mean 'exact'? It takes one of 'parallel', 'exact'."),
        ({"strict": 1}, "option 'strict' is 1, of type int. It takes True or False."),
        ({"dump": 3}, "option 'dump' is 3, of type int. It takes the path of a folder or None."),
        ({"guards": "no"}, "It takes one of 'off', 'shapes', 'on', 'debug'."),
        ({"guard_timeout": "1 h"}, "option 'guard_timeout' is '1 h', of type str. It takes a number of seconds."),
        ({"overlap": "yes"}, "option 'overlap' is 'yes', of type str. It takes True or False."),
        ({"gradient_bucket_mb": "25"}, "of type str. It takes a number of megabytes."),
        ({"gradient_bucket_mb": -1}, "option 'gradient_bucket_mb' is -1. It takes megabytes, or 0 for no buckets."),
        ({"guard_timeout": 0}, "option 'guard_timeout' is 0. It takes seconds, more than 0."),
        ({"group": 2}, "of type int. It takes a ProcessGroup, a DeviceMesh or None."),
        ({"inner_backend": None}, "of type NoneType. It takes a name or a callable."),
    ],
)
def test_a_wrong_option_is_named_with_the_right_ones(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        SequenceParallelConfig.from_options(options)
    assert message in str(caught.value)
    assert isinstance(caught.value, SequenceParallelError)


def test_an_unknown_inner_backend_lists_those_of_torch() -> None:
    with pytest.raises(ConfigurationError) as caught:
        SequenceParallelConfig(inner_backend="inducter")
    message = str(caught.value)
    assert "'inducter'; did you mean 'inductor'? It takes a callable or one of" in message
    for name in torch._dynamo.list_backends(None):
        assert (repr(name) in message) == (name != "sp_compile")


def test_the_inner_backend_is_not_this_one() -> None:
    with pytest.raises(ConfigurationError, match="'sp_compile', which would call itself"):
        SequenceParallelConfig(inner_backend="sp_compile")


def test_the_inner_backend_may_be_a_callable() -> None:
    def bare(graph_module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        return graph_module

    assert SequenceParallelConfig(inner_backend=bare).inner_backend is bare


def test_outputs_by_name_and_position() -> None:
    config = SequenceParallelConfig(outputs={"logits": "dtensor", -1: "shard"})
    assert hash(config) == hash(SequenceParallelConfig(outputs={-1: "shard", "logits": "dtensor"}))
    assert config.output_kinds(["loss", "logits", "hidden"]) == ("gather", "dtensor", "shard")
    assert SequenceParallelConfig(outputs="shard").output_kinds(["loss", "logits"]) == ("shard", "shard")
    with pytest.raises(ConfigurationError, match="This graph returns 0: 'loss'"):
        config.output_kinds(["loss"])
    with pytest.raises(ConfigurationError, match=r"names output 1 \('logits'\) twice"):
        config.output_kinds(["loss", "logits"])
