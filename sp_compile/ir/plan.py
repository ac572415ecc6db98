"""What passes hand over: attention sites, the sharding plan, the rewritten graph. Frozen, and printed as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..placement.placements import REPLICATED, Placement, Size
from ..rules.rule import OpSharding
from .graph import source_of

COMPUTED_AGAIN = {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": 1 << 30}
"""What a node has in `meta` for AOTAutograd's partitioner not to keep its value for backward: it is of a region of its
own, behind all that the user checkpoints."""


Output = Literal["gather", "shard", "dtensor"]
"""How an output leaves a graph: whole, as a rank's own rows, or as these in a DTensor."""
RandomNumbers = Literal["parallel", "exact"]
"""How a sharded value is drawn: on each rank, equal in distribution; or whole and cut, equal bit for bit."""


@dataclass(frozen=True)
class SiteOperand:
    """One operand of one node of a site, and the dimension of it that is the sequence."""

    node: fx.Node
    index: int
    dim: int


@dataclass(frozen=True)
class AttentionSite:
    """One attention, however it is written. `nodes` are in the order of the graph; the last makes the output."""

    nodes: tuple[fx.Node, ...]
    query: SiteOperand
    key: SiteOperand
    value: SiteOperand

    @property
    def output(self) -> fx.Node:
        return self.nodes[-1]


@dataclass(frozen=True)
class NodePlan:
    """How one op runs, and what its consumers see."""

    sharding: OpSharding | None
    """None: on whole values."""
    delivered: tuple[Placement, ...]
    """The placement of each result after it went home."""
    sources: Mapping[int, fx.Node] = field(default_factory=dict)
    """Operands that are taken from another value: K and V before they were repeated for every query head."""

    def operand(self, index: int) -> Placement:
        """What the op needs of an operand."""
        placement = self.sharding.operands[index] if self.sharding else None
        return placement or REPLICATED

    def results(self) -> tuple[Placement, ...]:
        """What the op makes, before it goes home."""
        return self.sharding.results if self.sharding else tuple(REPLICATED for _ in self.delivered)


@dataclass(frozen=True)
class SitePlan:
    """How one attention site is made whole."""

    site: AttentionSite
    strategy: str
    """`ulysses`, `all_gather_kv`, `local` or `replicate`."""
    reason: str
    moved: tuple[fx.Node, ...]
    """The values that are brought to the site for q, k and v: K and V as they were before a repetition of heads."""


NO_RULE = "it has no sharding rule"


@dataclass(frozen=True)
class Fallback:
    """An op that ran on gathered values because nothing better was known."""

    node: fx.Node
    reason: str
    bytes: int
    """What each rank receives for it, in one forward."""

    @property
    def takes_a_rule(self) -> bool:
        """Whether `register_sharding_rule` would help: not an opaque part, nor an op whose rule refuses the call."""
        return self.reason == NO_RULE and self.node.op != "call_module"


@dataclass(frozen=True)
class ShardingPlan:
    """A placement for every value of a graph of `parts` ranks."""

    parts: int
    nodes: Mapping[fx.Node, NodePlan]
    sites: tuple[SitePlan, ...]
    fallbacks: tuple[Fallback, ...]
    homes: Mapping[tuple[fx.Node, int], Placement] = field(default_factory=dict)
    """Where the sequence sits in each result of a node, wherever it is computed."""

    def home(self, node: fx.Node) -> Placement:
        """Where the sequence sits in a value; replicated if that is not known."""
        return self.homes.get(source_of(node), REPLICATED)

    def placement(self, node: fx.Node) -> Placement:
        """What the consumers of a single-result node see."""
        plan = self.nodes.get(node)
        return plan.delivered[0] if plan else REPLICATED

    @property
    def shards(self) -> bool:
        """Whether anything is sharded at all."""
        return any(plan.sharding is not None for plan in self.nodes.values())


@dataclass(frozen=True)
class LeavingOutput:
    """How one output leaves the graph."""

    placement: Placement
    """Replicated unless it leaves as a shard."""
    is_padded: bool
    """Whether some ranks may hold padding."""
    size: Size | None
    """Of a DTensor the global size of the sharded dimension; None: it is a plain tensor."""
    gathered: str
    """Why it is whole though it was to stay sharded."""


@dataclass(frozen=True)
class ShardedGraph:
    """The rewritten graph: Dynamo's placeholders and then `sp_rank`, int64 `[1]`; Dynamo's outputs.

    Behind them follow, of each output that leaves as a shard, a mask of the rows that are no padding, bool `[local]`,
    if it is padded, and `LeavingOutput.size` if that is symbolic.
    """

    graph_module: fx.GraphModule
    origins: Mapping[str, str]
    """Which captured node each node stands for, or was made for, by name."""
    outputs: tuple[LeavingOutput, ...]
    values: tuple[tuple[str, str, Placement], ...]
    """(node, captured node whose value it holds, in which placement), by name: where an op made it, and wherever it was
    brought to; in the order of the graph."""
