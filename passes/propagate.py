"""Choose a placement for every value: marks go up from the attention sites, homes come down, moves happen at sites.

    ids      i64[1, 32]                         R            marked: dim 1 becomes the sequence of q, k and v
    h        f32[1, 32, 64]     embedding       S(1: 32)     the first op of a marked activation cuts its operands
    q, k, v  f32[1, 4, 32, 16]  linear, view    S(2: 32)     home: where the sequence sits if nothing moves
    o        f32[1, 4, 32, 16]  attention       S(1: 4)      the site borrows the heads, and delivers S(2: 32)
    y        f32[1, 32, 64]     view, linear    S(1: 32)

Three walks. *Marks* (backward): every value whose dimension becomes the home of a site, or without any site the
sequence of what else mixes one, with the granule that the views below need. *Homes* (forward): an op follows the shards
that it is given; where two operands disagree the cheaper conversion wins; an op that needs its home factor whole
borrows another and returns home at once. *Sites*: what lies between two contractions borrows the heads as one region
(Ulysses), or keeps its queries and takes K and V whole (all-gather-KV) or as they are (local), whichever takes the
fewest seconds of a step; a tie stays home. What cannot be sharded runs on whole values, and is written down as a
fallback.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import getitem

import torch
from torch import fx

from sp_compile.cost import Conversion, Price, attention_price, conversion_price
from sp_compile.graph import GraphRules, op_of, source_of
from sp_compile.homes import Vote, choose_homes, sequence_home
from sp_compile.links import DEFAULT_LINKS, Links
from sp_compile.plan import AttentionSite, Fallback, NodePlan, ShardingPlan, SiteOperand, SitePlan
from sp_compile.rule import OpSharding, OpShardingRule
from sp_compile.sharding import (
    REPLICATED,
    GroupedHeads,
    Layout,
    Placement,
    Replicated,
    Sharded,
    Size,
    exact_quotient,
    moved_rows,
    product,
    whole_layout,
)


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


@dataclass(frozen=True)
class _Region:
    """A site as planned: a plan per node, and why."""

    nodes: Mapping[fx.Node, NodePlan]
    strategy: str
    reason: str


@dataclass(frozen=True)
class _Candidate:
    """A way to run a site: its region, and what a step of it costs."""

    nodes: Mapping[fx.Node, NodePlan]
    strategy: str
    told: str
    padding: float
    """How many times as much the slowest rank has as its share, of heads or windows."""
    price: Price


class _Planner:
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
        self.rules = rules
        self.parts = parts
        self.attention = attention
        self.links = links
        homes = choose_homes(rules, sites, parts) or [sequence_home(rules, end) for end in mixers]
        self.marks = find_marks(rules, homes)
        self.sites = {site.nodes[0]: site for site in sites}
        self.attending = {node for site in sites for node in site.nodes}
        self.homes: dict[tuple[fx.Node, int], Placement] = dict(self.marks)
        self.nodes = {node: NodePlan(OpSharding("", (), (home,)), (home,)) for node, home in inputs.items()}
        self.homes |= {(node, 0): home for node, home in inputs.items()}
        self.site_plans: list[SitePlan] = []
        self.fallbacks: list[Fallback] = []

    def plan(self) -> ShardingPlan:
        planned: dict[fx.Node, NodePlan] = {}
        for node in self.rules.graph.nodes:
            if node in self.sites:
                region = self._plan_site(self.sites[node])
                # Views of K and V that moved into the site.
                self.nodes |= {each: plan for each, plan in region.nodes.items() if each in self.nodes}
                self._begin_beside(self.sites[node], region.nodes)
                moved = self._moved(self.sites[node], region.nodes)
                self.site_plans.append(SitePlan(self.sites[node], region.strategy, region.reason, moved))
                planned |= region.nodes
            if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
                continue  # numbers are those of the global shapes
            if op_of(node) is not None:
                self._find_home(node)
                self.nodes[node] = planned.get(node) or self._plan_op(node)
            elif node.target is getitem:
                source, index = source_of(node)
                seen = self.nodes[source].delivered if source in self.nodes else ()
                self.nodes[node] = NodePlan(None, (seen[index] if index < len(seen) else REPLICATED,))
        self._build_masks_locally()
        return ShardingPlan(self.parts, self.nodes, tuple(self.site_plans), tuple(self.fallbacks))

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
            sharding = rule.follow_result(0, target, self._placements(node))
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

    def _placement(self, node: fx.Node) -> Placement:
        return self.nodes[node].delivered[0] if node in self.nodes else REPLICATED

    def _placements(self, node: fx.Node) -> list[Placement]:
        return [self._placement(operand) for operand in self.rules.operands(node)]

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
        """The results of an op that borrows another dimension than that of the sequence are brought home."""
        homes = [self.homes.get((node, result), REPLICATED) for result in range(len(sharding.results))]
        return tuple(
            home if isinstance(made, Sharded) and isinstance(home, Sharded) and made.dim != home.dim else made
            for made, home in zip(sharding.results, homes, strict=True)
        )

    # One op

    def _plan_op(self, node: fx.Node) -> NodePlan:
        rule, placements = self.rules.rule(node), self._placements(node)
        outputs = len(node.meta["val"]) if isinstance(node.meta.get("val"), (tuple, list)) else 1
        whole = NodePlan(None, tuple(REPLICATED for _ in range(outputs)))
        sharded = [index for index, placement in enumerate(placements) if isinstance(placement, Sharded)]
        if rule is None:
            if sharded and node not in self.rules.replicated and not _writes_input(node):
                unknown = self.rules.sized_by_data(node)
                why = "a size is read from a tensor" if unknown else "it has no sharding rule"
                self._fall_back(node, placements, None, why)
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

    def _begin(self, node: fx.Node, rule: OpShardingRule, placements: Sequence[Placement]) -> NodePlan | None:
        """Whole operands, but the result is marked: this is where the sequence is cut; weights, where they meet it."""
        if self.rules.is_weight(node):
            return None
        for result in range(len(rule.results)):
            mark = self.marks.get((node, result))
            if mark is not None and self.rules.is_activation(node) and self._is_followed(node, mark):
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
            self.nodes |= self._begun_otherwise(node, operand, target) or {}
        return [self._placement(operand) for operand in operands]

    def _begun_otherwise(
        self, user: fx.Node, value: fx.Node, target: Sharded | GroupedHeads | None
    ) -> dict[fx.Node, NodePlan] | None:
        """The plans of what stands between whole values and this one for it to be made so; None if that moves more."""
        plan, rule = self.nodes.get(value), self.rules.rule(value)
        if plan is None or rule is None or plan.sharding is None or not isinstance(target, Sharded):
            return None
        shared = any(other is not user and other in self.nodes for other in value.users)
        sharding = rule.follow_result(0, target, self._placements(value))
        if shared or len(rule.results) > 1 or plan.delivered == (target,) or sharding is None:
            return None
        plans = {value: NodePlan(sharding, sharding.results)}
        for operand, needed in zip(self.rules.operands(value), sharding.operands, strict=True):
            placement = self._placement(operand)
            if isinstance(placement, Sharded) and placement != needed:
                above = self._begun_otherwise(value, operand, needed)
                if above is None:
                    return None
                plans |= above
        return plans

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
                priced = moved * self._padding(size), -size
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

    def _padding(self, size: Size) -> float:
        """How much more is held for a factor of this size to fall into equal blocks."""
        count = self.rules.hint(size)
        return self.parts * -(-count // self.parts) / count

    def _cost(self, node: fx.Node, placements: Sequence[Placement], sharding: OpSharding | None) -> float:
        """Bytes that each rank receives for the operands of an op."""
        rule, operands = self.rules.rule(node), self.rules.operands(node)
        total = 0.0
        for index, (operand, placement) in enumerate(zip(operands, placements, strict=True)):
            target = sharding.operands[index] if sharding else None
            moves = target is not None or rule is None or index not in rule.metadata
            if moves and not self._begun_otherwise(node, operand, target):
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
        self.fallbacks.append(Fallback(node, reason, round(self._cost(node, placements, sharding))))

    # A site

    def _plan_site(self, site: AttentionSite) -> _Region:
        first = site.nodes[0]
        rule, placements = self.rules.rule(first), self._placements(first)
        assert rule is not None
        query, key = placements[site.query.index], placements[site.key.index]
        if self.attention == "replicate":
            return _Region({node: NodePlan(None, (REPLICATED,)) for node in site.nodes}, "replicate", "as asked for")
        if not isinstance(query, Sharded) and not isinstance(key, Sharded):
            return _Region({}, "replicate", "no operand is sharded")
        candidates = self._candidates(site, rule, placements)
        asked = [each for each in candidates if self.attention == each.strategy or each.strategy == "local"]
        if self.attention == "auto":  # the memory of padding has no price, and is not more than doubled
            asked = [each for each in candidates if each.padding <= 2]
        if not candidates:
            return _Region({}, "replicate", "no dimension that every op of the site passes")
        best = min(asked or candidates, key=self._seconds)  # the first of equals, which is at home
        if self.attention != "auto":
            told = "as asked for" if asked else f"not every op of the site passes {self.attention}, as asked for"
            return _Region(best.nodes, best.strategy, best.told if best.strategy == "local" else told)
        least: dict[str, float] = {}
        for each in sorted(candidates, key=self._seconds):
            least.setdefault(each.strategy, self._seconds(each))
        prices = ", ".join(f"{strategy} {_readable(seconds)}" for strategy, seconds in least.items())
        return _Region(best.nodes, best.strategy, f"{best.told}: {prices}")

    def _candidates(
        self, site: AttentionSite, rule: OpShardingRule, placements: Sequence[Placement]
    ) -> list[_Candidate]:
        """The ways to run a site that every op of it passes; what keeps its queries at home comes first."""
        found = []
        stay = rule.follow(site.query.index, placements)
        kept = self._region(site, stay) if stay else None
        if stay is not None and kept is not None:
            strategy, told = "all_gather_kv", "K and V are gathered"
            if isinstance(placements[site.key.index], Replicated):
                strategy, told = "local", "keys and values are whole on every rank"
            elif self._stays(site, kept):
                strategy, told = "local", "keys and values are where their queries are"
            padding = self._padded(site, stay)
            found.append(_Candidate(kept, strategy, told, padding, self._price(site, kept, padding)))
        for heads, sharding in self._head_shardings(site, rule):
            borrowed = self._region(site, sharding)
            if borrowed is not None:
                told, padding = f"{heads} heads on {self.parts} ranks", self._padded(site, sharding)
                found.append(_Candidate(borrowed, "ulysses", told, padding, self._price(site, borrowed, padding)))
        return found

    def _seconds(self, candidate: _Candidate) -> float:
        return candidate.price.seconds(self.links)

    def _padded(self, site: AttentionSite, sharding: OpSharding) -> float:
        """How much more a rank has of heads or windows than its share; of rows it has its share."""
        cut = sharding.operands[site.query.index]
        if not isinstance(cut, Sharded) or cut.dim == site.query.dim:
            return 1.0
        return self.parts * self.rules.hint(cut.layout.local_size(self.parts)) / self.rules.hint(cut.layout.size)

    def _price(self, site: AttentionSite, plans: Mapping[fx.Node, NodePlan], padding: float) -> Price:
        """What a step of a site costs, from the placements in which values reach it to those in which they leave.

        What is exchanged on the way to the site is one launch.
        """
        ends = [(end.node, end.index) for end in (site.query, site.key, site.value)]
        trains = torch.is_grad_enabled()
        moved: dict[tuple[fx.Node, Placement], Conversion] = {}
        total = Price()
        for node, plan in plans.items():
            rule = self.rules.rule(node)
            assert rule is not None and plan.sharding is not None
            if node in site.nodes:
                trained = trains and node in self.rules.trained
                total += attention_price(node, padding / self.parts, rule.body(plan.sharding) is not None, trained)
            for index, operand in enumerate(self.rules.operands(node)):
                value, target = plan.sources.get(index, operand), plan.operand(index)
                if source_of(value)[0] in plans or index in rule.metadata:
                    continue
                if (node, index) not in ends and self._begun_otherwise(node, value, plan.sharding.operands[index]):
                    continue
                source, trained = self._arrival(value), trains and value in self.rules.trained
                moved[value, target] = Conversion(value.meta["val"], source, target, trained, padding)
        exchanges = [each for each in moved.values() if each.exchanges]
        total += sum((conversion_price(each, self.parts) for each in moved.values()), Price())
        packed = len(exchanges) - 1 + sum(each.trained for each in exchanges) - any(each.trained for each in exchanges)
        total += Price(launches=-packed if exchanges else 0)
        for value, made, home in self._results(site.output, plans[site.output]):
            trained = trains and value in self.rules.trained
            total += conversion_price(Conversion(value.meta["val"], made, home, trained, padding), self.parts)
        return total

    def _arrival(self, value: fx.Node) -> Placement:
        """The placement in which a value reaches a site; a value operand may stand behind the scores."""
        planned = source_of(value)[0] in self.nodes
        return self._placement(value) if planned else self.marks.get(source_of(value), REPLICATED)

    def _results(self, node: fx.Node, plan: NodePlan) -> Iterator[tuple[fx.Node, Placement, Placement]]:
        """The results of an op as values, where it makes them and where they go."""
        values = {0: node} if isinstance(node.meta["val"], torch.Tensor) else {source_of(u)[1]: u for u in node.users}
        for at, (made, home) in enumerate(zip(plan.results(), plan.delivered, strict=True)):
            if at in values:
                yield values[at], made, home

    def _stays(self, site: AttentionSite, plans: Mapping[fx.Node, NodePlan]) -> bool:
        """Whether a site takes its keys and values as they are, for it is sharded along its windows."""
        for end in (site.key, site.value):
            arrived = self._arrival(self.rules.operands(end.node)[end.index])
            if isinstance(arrived, Replicated) or plans[end.node].operand(end.index) != arrived:
                return False
        return True

    def _begin_beside(self, site: AttentionSite, plans: Mapping[fx.Node, NodePlan]) -> None:
        """What else a site takes is cut as it needs it: of a bias looked up in a table of heads, the table."""
        ends = [(end.node, end.index) for end in (site.query, site.key, site.value)]
        for node, plan in plans.items():
            for index, operand in enumerate(self.rules.operands(node)):
                target = plan.operand(index)
                if operand not in plans and (node, index) not in ends and isinstance(target, Sharded):
                    self.nodes |= self._begun_otherwise(node, operand, target) or {}

    def _moved(self, site: AttentionSite, plans: Mapping[fx.Node, NodePlan]) -> tuple[fx.Node, ...]:
        """The values that are brought to a site for q, k and v: those before the views that moved into it."""
        values = []
        for end in (site.query, site.key, site.value):
            user, index = end.node, end.index
            value = self.rules.operands(user)[index]
            while value in plans and value not in site.nodes:
                user, index, value = value, 0, self.rules.operands(value)[0]
            values.append(plans[user].sources.get(index, value) if user in plans else value)
        return tuple(values)

    def _region(self, site: AttentionSite, start: OpSharding) -> dict[fx.Node, NodePlan] | None:
        """The plans of a site whose first op runs so, and whose other ops follow; None if one of them cannot."""
        inside: dict[fx.Node, tuple[Placement, ...]] = {}
        homes: dict[fx.Node, tuple[Placement, ...]] = {}
        plans: dict[fx.Node, NodePlan] = {}
        for node in site.nodes:
            if node.target is getitem:
                continue
            rule, operands = self.rules.rule(node), self.rules.operands(node)
            if rule is None:
                return None
            placements = [_result(inside, operand) for operand in operands]
            sharding = start if node is site.nodes[0] else _agreed(rule, placements)
            if sharding is None:
                return None
            at_home = [_result(homes, operand) for operand in operands]
            if node is site.query.node:
                at_home[site.query.index] = self._placement(operands[site.query.index])
            carried = [rule.carry(at, at_home) for at, home in enumerate(at_home) if isinstance(home, Sharded)]
            whole = tuple(REPLICATED for _ in sharding.results)
            homes[node] = next((each for each in carried if each != whole), whole)
            inside[node] = sharding.results
            plans[node] = NodePlan(sharding, sharding.results)
        plan = plans[site.output]
        delivered = tuple(
            home if isinstance(home, Sharded) else made
            for home, made in zip(homes[site.output], plan.delivered, strict=True)
        )
        plans[site.output] = replace(plan, delivered=delivered)
        for end in (site.key, site.value):
            self._exchange_before_repeat(end.node, end.index, plans)
        return plans

    def _head_shardings(self, site: AttentionSite, rule: OpShardingRule) -> Iterator[tuple[int, OpSharding]]:
        """Ways to run the first op of a site on shards of its heads: the head count and the sharding, best first."""
        sequences = {(site.query.index, site.query.dim), (site.key.index, site.key.dim)}
        candidates: dict[str, int] = {}
        for operand in (site.key.index, site.query.index):
            for factor, dim in rule.borrowable(operand):
                if (operand, dim) not in sequences and rule.sizes[factor] != 1:
                    candidates[factor] = dim
        query_factors = dict(rule.borrowable(site.query.index))
        for factor in sorted(candidates, key=lambda f: (self._padding(rule.sizes[f]), -candidates[f])):
            query = self.rules.operands(site.nodes[0])[site.query.index]
            merged = self._split_above(query, query_factors[factor]) if factor in query_factors else None
            for layout in (merged, whole_layout(rule.sizes[factor])):
                sharding = rule.run_on({factor: layout}) if layout else None
                if layout and sharding:
                    yield self.rules.hint(layout.segments[0].size), self._group_heads(site, sharding)

    def _split_above(self, value: fx.Node, dim: int) -> Layout | None:
        """The layout of the heads in a dimension that was made by merging batch and heads, `(b h)`."""
        rule = self.rules.rule(value)
        while rule is not None and len(rule.results) == 1:
            factors = rule.results[0][dim]
            if not isinstance(factors, tuple) or not factors:
                return None
            if len(factors) > 1:
                return rule.layout_within(factors, whole_layout(rule.sizes[factors[-1]]))
            above = [at for at, dims in enumerate(rule.operands[0]) if dims == factors]
            if not above:
                return None
            value, dim = self.rules.operands(value)[0], above[0]
            rule = self.rules.rule(value)
        return None

    def _group_heads(self, site: AttentionSite, sharding: OpSharding) -> OpSharding:
        """Where the op groups its query heads itself and P does not divide the groups, cut the query heads.

        Whole groups would leave ranks idle: 6 query heads on 2 KV heads and 4 ranks are 3 + 3 + 0 + 0 heads in whole
        groups, and 2 + 2 + 2 + 0 when each rank is sent the KV heads that its query heads read.
        """
        query, key = sharding.operands[site.query.index], sharding.operands[site.key.index]
        if not isinstance(query, Sharded) or not isinstance(key, Sharded) or query.layout == key.layout:
            return sharding
        heads, groups = query.layout.size, key.layout.size
        if not isinstance(heads, int) or not isinstance(groups, int) or groups % self.parts == 0:
            return sharding

        def cut(placement: Sharded | GroupedHeads | None) -> Sharded | GroupedHeads | None:
            if not isinstance(placement, Sharded):
                return placement
            if placement.layout.size == groups:
                return GroupedHeads(placement.dim, heads)
            return Sharded(placement.dim, whole_layout(heads))

        results = tuple(cut(result) if isinstance(result, Sharded) else result for result in sharding.results)
        return OpSharding(
            sharding.factor, tuple(map(cut, sharding.operands)), tuple(each or REPLICATED for each in results)
        )

    def _exchange_before_repeat(self, user: fx.Node, index: int, plans: dict[fx.Node, NodePlan]) -> bool:
        """K and V that were repeated for every query head are exchanged as they were before; whether they were.

        Views between the repetition and the site move into the site.
        """
        plan = plans[user]
        wanted = plan.operand(index)
        value = self.rules.operands(user)[index]
        if not isinstance(wanted, Sharded) or wanted.layout != whole_layout(wanted.layout.size):
            return False
        source = self._repeated(value, wanted.dim)
        heads = wanted.layout.size
        if source is not None and isinstance(heads, int) and isinstance(self._placement(source), Sharded):
            assert plan.sharding is not None
            operands = list(plan.sharding.operands)
            operands[index] = GroupedHeads(wanted.dim, heads)
            sharding = replace(plan.sharding, operands=tuple(operands))
            plans[user] = replace(plan, sharding=sharding, sources={**plan.sources, index: source})
            return True
        rule = self.rules.rule(value)
        if rule is None or not rule.movement or len(value.users) > 1 or len(rule.operands) != 1:
            return False
        moved = rule.follow_result(0, wanted, [REPLICATED])
        if moved is None:
            return False
        plans[value] = NodePlan(moved, moved.results)
        if self._exchange_before_repeat(value, 0, plans):
            return True
        del plans[value]
        return False

    def _repeated(self, value: fx.Node, dim: int) -> fx.Node | None:
        """The value of which `value` repeats each row of dimension `dim` some times in a row, if it is one."""
        shape = self.rules.shape(value)
        path: list[OpShardingRule] = []
        at = value
        while (rule := self.rules.rule(at)) is not None and rule.movement and len(rule.operands) == 1:
            path.append(rule)
            at = self.rules.operands(at)[0]
            above = self.rules.shape(at)
            rest = [(mine, theirs) for d, (mine, theirs) in enumerate(zip(above, shape, strict=False)) if d != dim]
            if len(above) != len(shape) or any(mine != theirs for mine, theirs in rest):
                continue
            times = exact_quotient(shape[dim], above[dim])
            if times is None or times == 1:
                continue
            rows = Sharded(dim, whole_layout(shape[dim], times))
            others = [Sharded(d, whole_layout(size)) for d, size in enumerate(shape) if d != dim and size != 1]
            came_from = None if above[dim] == 1 else Sharded(dim, whole_layout(above[dim]))
            if _back(path, rows) == came_from and all(_back(path, other) == other for other in others):
                return at
        return None


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _readable(seconds: float) -> str:
    """`1.2 ms`: two digits."""
    unit, size = next((each for each in _UNITS if seconds >= each[1]), _UNITS[-1])
    return f"{float(f'{seconds / size:.2g}'):g} {unit}"


_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))


def _writes_input(node: fx.Node) -> bool:
    """Whether a node is the write to an input at the end of a graph, which is whole as an output is."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _result(results: Mapping[fx.Node, tuple[Placement, ...]], value: fx.Node) -> Placement:
    """The placement of a value among those of the results of ops."""
    source, index = source_of(value)
    return results[source][index] if source in results else REPLICATED


def _agreed(rule: OpShardingRule, placements: Sequence[Placement]) -> OpSharding | None:
    """The op on the shards that its operands inside the site come in, if they all fit."""
    sharded = [index for index, placement in enumerate(placements) if isinstance(placement, Sharded)]
    for index in sharded:
        sharding = rule.follow(index, placements)
        if sharding is not None and all(sharding.operands[other] == placements[other] for other in sharded):
            return sharding
    return None


def _back(path: Sequence[OpShardingRule], placement: Sharded) -> Sharded | None:
    """Where a placement of the last value sits in the first, up a path of single-operand ops."""
    at: Sharded | None = placement
    for rule in path:
        if at is None:
            return None
        at = rule.carry_back(0, at)[0]
    return at
