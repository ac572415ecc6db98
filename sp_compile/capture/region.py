"""`replicated_region()`: code of the model that every rank is to run whole."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.fx import Node
from torch.fx.traceback import annotate

_KEY = "sp_compile.replicated_region"


def replicated_region() -> AbstractContextManager[None]:
    """Opt code out of sharding: in a compiled model what is inside runs on whole values on every rank.

        with replicated_region():
            x = self.odd_mixer(x)  # its operands are gathered

    Also a decorator, `@replicated_region()`. What stands around it shards as before. Nothing inside is a fallback, so
    it compiles with `strict=True`. Without the backend it does nothing. A graph break inside makes Dynamo leave the
    function around it uncompiled.
    """
    return annotate({_KEY: True})


def in_replicated_region(node: Node) -> bool:
    """Whether a node, of Dynamo's graph or freshly traced from it, stands inside a replicated region."""
    return _KEY in node.meta.get("custom", {})
