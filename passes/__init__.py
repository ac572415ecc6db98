"""The passes, in the order in which `sp_compile.pipeline` runs them. Installed as `sp_compile.passes`.

    outline_experts     the experts of a mixture as one call            (transform, in place)
    find_attention      which nodes are an attention                    (analysis)
    find_mixers         without one: what else mixes a sequence         (analysis)
    propagate           a placement for every value                     (analysis)
    insert_collectives  the plan written into the graph as `sp::` ops   (transform)
    set_local_values    the value of every node on one rank             (analysis, in `meta["val"]` of the new graph)
    pack_exchanges      q, k and v of a site sent in one launch         (transform)

An analysis returns frozen dataclasses; a transform takes a graph and a plan and returns a new graph. Experts are
outlined before there is a plan, in the captured graph itself.
"""

if __name__ == "passes":
    raise ImportError("import sp_compile.passes, not passes")

from sp_compile.passes.find_attention import find_attention
from sp_compile.passes.find_mixers import find_mixers
from sp_compile.passes.insert_collectives import insert_collectives
from sp_compile.passes.outline_experts import outline_experts
from sp_compile.passes.pack_exchanges import pack_exchanges
from sp_compile.passes.propagate import propagate
from sp_compile.passes.set_local_values import set_local_values

__all__ = [
    "find_attention",
    "find_mixers",
    "insert_collectives",
    "outline_experts",
    "pack_exchanges",
    "propagate",
    "set_local_values",
]
