"""Choose a placement for every value: marks go up from the attention sites, homes come down, moves happen at sites.

    ids      i64[1, 32]                         R            marked: dim 1 becomes the sequence of q, k and v
    h        f32[1, 32, 64]     embedding       S(1: 32)     the first op of a marked activation cuts its operands
    q, k, v  f32[1, 4, 32, 16]  linear, view    S(2: 32)     home: where the sequence sits if nothing moves
    o        f32[1, 4, 32, 16]  attention       S(1: 4)      the site borrows the heads, and delivers S(2: 32)
    y        f32[1, 32, 64]     view, linear    S(1: 32)

Three walks. *Marks* (backward): every value whose dimension becomes the home of a site, or without any site the
sequence of what else mixes one, with the granule that the views below need. *Homes* (forward): an op follows the shards
that it is given; where two operands disagree the cheaper conversion wins; an op that needs its home factor whole
borrows another and returns home at once, or later if that moves less (`planning.borrowers`). *Sites*: what lies
between two contractions borrows the heads as one region (Ulysses), or keeps its queries and takes K and V whole
(all-gather-KV) or as they are (local), whichever takes the fewest seconds of a step; a tie stays home. What cannot be
sharded runs on whole values, and is written down as a fallback.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import getitem

import torch
from torch import fx

from sp_compile.ir.graph import GraphRules, op_of, source_of
from sp_compile.ir.plan import NO_RULE, AttentionSite, Fallback, NodePlan, ShardingPlan, SiteOperand, SitePlan
from sp_compile.links import DEFAULT_LINKS, Links
from sp_compile.placement.placements import (
    REPLICATED,
    Layout,
    Placement,
    Replicated,
    Sharded,
    exact_quotient,
    moved_rows,
    product,
    whole_layout,
)
from sp_compile.planning.borrowers import join_borrowers
from sp_compile.planning.homes import Vote, choose_homes, homes_of_mixed
from sp_compile.planning.site_plans import PlannedSoFar, SitePlanner
from sp_compile.rules import has_rule
from sp_compile.rules.rule import OpSharding, OpShardingRule

MOST_PADDING = 1.5
"""How many times its share of a sequence a rank computes, at most, before rows go to the ranks that have none."""


def propagate(
    rules: GraphRules,
    sites: Sequence[AttentionSite],
    mixers: Sequence[SiteOperand],
    parts: int,
    attention: str,
    inputs: Mapping[fx.Node, Sharded] | None = None,
    links: Links | None = None,
) -> ShardingPlan:
    """Plan the graph for `parts` ranks; `attention` and `links` are the options of these names.

    The sequence is that of the attention sites; in a graph without any, that of the `mixers`. `inputs` are the
    placeholders that come sharded.
    """
    return _Planner(rules, sites, mixers, parts, attention, inputs or {}, links or DEFAULT_LINKS).plan()


def find_marks(rules: GraphRules, homes: Sequence[Vote]) -> dict[tuple[fx.Node, int], Sharded]:
    """Where the home of some operands sits in each value above them, by (node, result).

    Where two of them want different dimensions of one value, the one with more bytes below it wins.
    """
    votes: dict[fx.Node, dict[int, dict[Sharded, int]]] = {}

    def vote(value: fx.Node, placement: Sharded, weight: int) -> None:
        node, result = source_of(value)
        ballot = votes.setdefault(node, {}).setdefault(result, {})
        ballot[placement] = ballot.get(placement, 0) + weight

    for value, home in homes:
        vote(value, home, rules.bytes(value))
    marks: dict[tuple[fx.Node, int], Sharded] = {}
    for node in reversed(rules.graph.nodes):
        for result, ballot in votes.get(node, {}).items():
            mark = marks[node, result] = _elect(ballot)
            rule = rules.rule(node)
            if rule is not None:
                for operand, placement in zip(rules.operands(node), rule.carry_back(result, mark), strict=True):
                    if placement is not None:
                        vote(operand, placement, sum(ballot.values()))
    return marks


def _elect(votes: Mapping[Sharded, int]) -> Sharded:
    best = max(votes, key=lambda mark: votes[mark])
    granule = 1
    for mark in votes:
        same = mark.dim == best.dim and mark.layout.outer == best.layout.outer and len(mark.layout.segments) == 1
        if same and len(best.layout.segments) == 1:
            own = mark.layout.segments[0].granule
            if not isinstance(own, int) or not isinstance(granule, int):
                return best
            granule = math.lcm(granule, own)
    size = best.layout.segments[0].size
    if len(best.layout.segments) > 1 or exact_quotient(size, granule) is None:
        return best
    return Sharded(best.dim, Layout(whole_layout(size, granule).segments, best.layout.outer))


class _Planner(PlannedSoFar):
    def __init__(
        self,
        rules: GraphRules,
        sites: Sequence[AttentionSite],
        mixers: Sequence[SiteOperand],
        parts: int,
        attention: str,
        inputs: Mapping[fx.Node, Sharded],
        links: Links,
    ) -> None:
        homes = choose_homes(rules, sites, parts) or [vote for end in mixers for vote in homes_of_mixed(rules, end)]
        super().__init__(rules, parts, find_marks(rules, homes))
        self.links = links
        self.site_planner = SitePlanner(self, attention, links)
        self.sites = {site.nodes[0]: site for site in sites}
        self.attending = {node for site in sites for node in site.nodes}
        self.homes: dict[tuple[fx.Node, int], Placement] = dict(self.marks)
        self.nodes.update({node: NodePlan(OpSharding("", (), (home,)), (home,)) for node, home in inputs.items()})
        self.homes |= {(node, 0): home for node, home in inputs.items()}
        self.site_plans: list[SitePlan] = []
        self.fallbacks: dict[fx.Node, Fallback] = {}

    def plan(self) -> ShardingPlan:
        planned: dict[fx.Node, NodePlan] = {}
        for node in self.rules.graph.nodes:
            if node in self.sites:
                region = self.site_planner.plan(self.sites[node])
                # Views of K and V that moved into the site.
                self.nodes.update({each: plan for each, plan in region.nodes.items() if each in self.nodes})
                self.site_planner.begin_beside(self.sites[node], region.nodes)
                moved = self.site_planner.moved(self.sites[node], region.nodes)
                self.site_plans.append(SitePlan(self.sites[node], region.strategy, region.reason, moved))
                planned |= region.nodes
            if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
                continue  # numbers are those of the global shapes
            self._plan_node(node, planned.get(node))
        joined = join_borrowers(self, self.attending | planned.keys(), self.links)
        for node in self.rules.graph.nodes if joined else ():
            if node in joined:
                self.fallbacks.pop(node, None)
            elif node in self.nodes and self._is_given_shards(node):
                self._plan_node(node, None)
        self._build_masks_locally()
        return ShardingPlan(self.parts, self.nodes, tuple(self.site_plans), tuple(self.fallbacks.values()), self.homes)

    def _plan_node(self, node: fx.Node, planned: NodePlan | None) -> None:
        if op_of(node) is not None:
            self._find_home(node)
            self.fallbacks.pop(node, None)
            self.nodes[node] = planned or self._plan_op(node)
        elif node.target is getitem:
            source, index = source_of(node)
            seen = self.nodes[source].delivered if source in self.nodes else ()
            self.nodes[node] = NodePlan(None, (seen[index] if index < len(seen) else REPLICATED,))

    def _is_given_shards(self, node: fx.Node) -> bool:
        """Whether an op that runs on whole values has sharded operands, for others now run otherwise."""
        if node.target is getitem:
            return True
        whole = self.nodes[node].sharding is None and node not in self.attending
        return whole and any(isinstance(placement, Sharded) for placement in self.placements(node))

    def _build_masks_locally(self) -> None:
        """What is as large as a mask of all pairs of rows and cut by all who use it is made as `[S/P, S]`.

        Only where no gradient goes: a cut further up would have its gradient summed over the ranks.
        """
        for node in reversed(self.rules.graph.nodes):
            plan, rule = self.nodes.get(node), self.rules.rule(node)
            if plan is None or plan.sharding or rule is None or self.rules.is_activation(node) or _is_random(node):
                continue
            target = self._cut_by_users(node)
            if target is None or plan.delivered != (REPLICATED,):
                continue
            rows = self.rules.hint(target.layout.size)
            if self.rules.hint(product(self.rules.shape(node))) < rows * rows:
                continue
            sharding = rule.follow_result(0, target, self.placements(node))
            if sharding is not None and sharding.results == (target,):
                self.nodes[node] = NodePlan(sharding, sharding.results)

    def _cut_by_users(self, value: fx.Node) -> Sharded | None:
        """The one placement that every use of a value needs."""
        found: set[Placement] = set()
        for user in value.users:
            rule, plan = self.rules.rule(user), self.nodes.get(user)
            if rule is None or plan is None or plan.sharding is None or plan.sources:
                return None
            operands = enumerate(self.rules.operands(user))
            found |= {plan.operand(at) for at, operand in operands if operand is value and at not in rule.metadata}
        target = next(iter(found), None)
        return target if len(found) == 1 and isinstance(target, Sharded) else None

    def _find_home(self, node: fx.Node) -> None:
        """Where the sequence sits in the results of an op: as marked, or where its operands bring it.

        Where both are one dimension rows stay together that are together in either.
        """
        rule = self.rules.rule(node)
        if rule is None:
            return
        above = [self.homes.get(source_of(operand), REPLICATED) for operand in self.rules.operands(node)]
        carried = [rule.carry(at, above) for at, home in enumerate(above) if isinstance(home, Sharded)]
        for result in range(len(rule.results)):
            found = [home for homes in carried if isinstance(home := homes[result], Sharded)]
            mark = self.marks.get((node, result))
            votes = dict.fromkeys(found, 0) | ({mark: 1} if mark else {})
            self.homes[node, result] = _elect(votes) if mark else next(iter(found), REPLICATED)

    def _homeward(self, node: fx.Node, sharding: OpSharding) -> tuple[Placement, ...]:
        """The results of an op that borrows another dimension than that of the sequence are brought home.

        So are, where no attention follows that levels them, the first rows of a long sequence: few ranks have them all.
        """
        homes = [self.homes.get((node, result), REPLICATED) for result in range(len(sharding.results))]
        return tuple(
            home if isinstance(home, Sharded) and self._is_away(made, home) else made
            for made, home in zip(sharding.results, homes, strict=True)
        )

    def _is_away(self, made: Placement, home: Sharded) -> bool:
        if not isinstance(made, Sharded):
            return False
        rows, equal = (self.rules.hint(each.layout.local_size(self.parts)) for each in (made, home))
        return made.dim != home.dim or (not self.sites and rows > MOST_PADDING * equal)

    # One op

    def _plan_op(self, node: fx.Node) -> NodePlan:
        rule, placements = self.rules.rule(node), self.placements(node)
        outputs = len(node.meta["val"]) if isinstance(node.meta.get("val"), (tuple, list)) else 1
        whole = NodePlan(None, tuple(REPLICATED for _ in range(outputs)))
        sharded = [index for index, placement in enumerate(placements) if isinstance(placement, Sharded)]
        if rule is None:
            if sharded and node not in self.rules.replicated and not _writes_input(node):
                self._fall_back(node, placements, None, self._why_no_rule(node))
            return whole
        if not sharded:
            return self._begin(node, rule, placements) or whole
        following = [s for s in (rule.follow(index, placements) for index in sharded) if s is not None]
        best = min(following, key=lambda s: self._cost(node, placements, s), default=None)
        moved = self._cost(node, placements, best) + self._left_whole(node, rule, placements, best)
        borrowed = self._borrow(node, rule, placements, sharded, moved) if moved else None
        if borrowed is not None:
            if self._gathers(rule, placements, borrowed.sharding):
                self._fall_back(node, placements, borrowed.sharding, "what it needs whole, it needs beside a shard")
            return borrowed
        if best is not None:
            placements = self._begin_otherwise(node, placements, best)
        if self._gathers(rule, placements, best) and not self._is_returned(node):
            self._fall_back(node, placements, best, "it needs a sharded dimension whole or cut in another way")
        return NodePlan(best, self._homeward(node, best)) if best else whole

    def _why_no_rule(self, node: fx.Node) -> str:
        if self.rules.sized_by_data(node):
            return "a size is read from a tensor"
        op = op_of(node)
        return "its rule is not for such arguments or sizes" if op and has_rule(op) else NO_RULE

    def _begin(self, node: fx.Node, rule: OpShardingRule, placements: Sequence[Placement]) -> NodePlan | None:
        """Whole operands, but the result is marked: this is where the sequence is cut; weights, where they meet it."""
        if self.rules.is_weight(node):
            return None
        for result in range(len(rule.results)):
            # Below a site that did not shard nothing begins; below a mixer of what the user gives whole, all that does.
            mark = (self.marks if self.sites else self.homes).get((node, result))
            if isinstance(mark, Sharded) and self.rules.is_activation(node) and self._is_followed(node, mark):
                sharding = rule.follow_result(result, mark, placements)
                if sharding is not None:
                    return NodePlan(sharding, sharding.results)
        return None

    def _is_followed(self, value: fx.Node, mark: Sharded) -> bool:
        """Whether some consumer runs on such shards, or may borrow; a second convolution would only gather them."""
        for user in value.users:
            rule, operands = self.rules.rule(user), self.rules.operands(user)
            if user in self.attending:
                return True
            if rule is None or value not in operands:
                continue
            index = operands.index(value)
            placements = [mark if operand is value else REPLICATED for operand in operands]
            if rule.follow(index, placements) or any(dim not in (0, mark.dim) for _, dim in rule.borrowable(index)):
                return True
        return False

    def _begin_otherwise(self, node: fx.Node, placements: Sequence[Placement], sharding: OpSharding) -> list[Placement]:
        """Operands that are cut above this op only, such as rows of a position table, are cut as the op needs them."""
        operands = self.rules.operands(node)
        for operand, target in zip(operands, sharding.operands, strict=True):
            self.nodes.update(self.begun_otherwise(node, operand, target) or {})
        return [self.placement(operand) for operand in operands]

    def _is_returned(self, node: fx.Node) -> bool:
        """Whether an op only moves rows of what is an output anyway, such as an image out of its patches."""
        rule = self.rules.rule(node)
        moves = node.target is getitem or (rule is not None and rule.movement)
        return moves and all(user.op == "output" or self._is_returned(user) for user in node.users)

    def _gathers(self, rule: OpShardingRule, placements: Sequence[Placement], sharding: OpSharding | None) -> bool:
        """Whether an operand that is sharded is gathered: to be whole, or to be cut in another way."""
        for index, placement in enumerate(placements):
            if not isinstance(placement, Sharded) or index in rule.metadata:
                continue
            target = sharding.operands[index] if sharding else None
            if target is None:
                return True
            if target == placement or target.dim != placement.dim:
                continue
            if not isinstance(target, Sharded) or moved_rows(placement.layout, target.layout, self.parts) is None:
                return True
        return False

    def _borrow(
        self,
        node: fx.Node,
        rule: OpShardingRule,
        placements: Sequence[Placement],
        sharded: Sequence[int],
        stay: float,
    ) -> NodePlan | None:
        """Run an op that needs its home factor whole on shards of another factor, and return home at once.

        None if that moves more than the `stay` bytes of the alternative.
        """
        best: tuple[float, int, NodePlan] | None = None
        for operand in sharded:
            for factor, _ in rule.borrowable(operand):
                sharding = rule.shard_factor(factor)
                if sharding is None:
                    continue
                delivered = self._homeward(node, sharding)
                moved = self._cost(node, placements, sharding) / (
                    self._alike(node, rule, operand) if rule.movement else 1
                )
                if delivered != sharding.results and isinstance(node.meta["val"], torch.Tensor):
                    moved += self._move(self.rules.bytes(node), sharding.results[0], delivered[0])
                size = self.rules.hint(rule.sizes[factor])
                priced = moved * self.padding(size), -size
                if priced[0] <= stay and (best is None or priced < best[:2]):
                    best = *priced, NodePlan(sharding, delivered)
        return best[2] if best else None

    def _left_whole(
        self, node: fx.Node, rule: OpShardingRule, placements: Sequence[Placement], sharding: OpSharding | None
    ) -> float:
        """Bytes for a whole result that has a home: it is summed over the ranks, and its gradient gathered.

        A result without a home may stay whole; but not each of the rows that a scan takes.
        """
        results = sharding.results if sharding else (REPLICATED,)
        at_home = [isinstance(self.homes.get((node, result)), Sharded) for result in range(len(results))]
        if results != (REPLICATED,) or not isinstance(node.meta["val"], torch.Tensor):
            return 0.0
        scanned = rule.movement and any(
            isinstance(placement, Sharded)
            and 2 * self._alike(node, rule, index) > self.rules.hint(placement.layout.size)
            for index, placement in enumerate(placements)
        )
        received = self.rules.bytes(node) * (self.parts - 1) / self.parts
        return received * (2 * (sharding is not None and (at_home[0] or scanned)) + at_home[0])

    def _alike(self, node: fx.Node, rule: OpShardingRule, operand: int) -> int:
        """How many ops take an operand of this one in the same way: the steps of a scan share its exchange."""
        value = self.rules.operands(node)[operand]
        rules = [self.rules.rule(user) for user in value.users if user.target is node.target]
        return sum(each is not None and each.operands == rule.operands for each in rules)

    def _cost(self, node: fx.Node, placements: Sequence[Placement], sharding: OpSharding | None) -> float:
        """Bytes that each rank receives for the operands of an op."""
        rule, operands = self.rules.rule(node), self.rules.operands(node)
        total = 0.0
        for index, (operand, placement) in enumerate(zip(operands, placements, strict=True)):
            target = sharding.operands[index] if sharding else None
            moves = target is not None or rule is None or index not in rule.metadata
            if moves and not self.begun_otherwise(node, operand, target):
                total += self._move(self.rules.bytes(operand), placement, target or REPLICATED)
        if rule is not None and sharding is not None and rule.halos:
            total += rule.received_share(sharding, self.parts) * self.rules.bytes(operands[0])
        return total

    def _move(self, size: int, source: Placement, target: Placement) -> float:
        """Bytes that each rank receives to bring a value of `size` bytes from one placement to another."""
        others = (self.parts - 1) / self.parts
        if source == target or isinstance(source, Replicated):
            return 0.0
        if isinstance(target, Sharded) and isinstance(source, Sharded) and source.dim != target.dim:
            return size / self.parts * others
        if isinstance(target, Sharded) and isinstance(source, Sharded):
            rows = moved_rows(source.layout, target.layout, self.parts)
            if rows is not None:
                return size * rows / int(source.layout.size)
        return size * others

    def _fall_back(
        self, node: fx.Node, placements: Sequence[Placement], sharding: OpSharding | None, reason: str
    ) -> None:
        self.fallbacks[node] = Fallback(node, reason, round(self._cost(node, placements, sharding)))


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _writes_input(node: fx.Node) -> bool:
    """Whether a node is the write to an input at the end of a graph, which is whole as an output is."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
