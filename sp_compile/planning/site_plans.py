"""How a site is run: the ways that every op of it passes, and what a step of each costs.

    ulysses          q, k, v: S(rows) -> S(heads)    out: S(heads) -> S(rows)
    all_gather_kv    q: S(rows)    k, v: S(rows) -> R
    local            q: S(rows)    k, v as they are: whole, or where their queries are

Where K and V repeat their heads for the queries, the views that do so move into the site, behind the exchange.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import getitem

import torch
from torch import fx

from ..ir.graph import GraphRules, source_of
from ..ir.plan import AttentionSite, NodePlan
from ..links import Links
from ..placement.placements import (
    REPLICATED,
    GroupedHeads,
    Layout,
    Placement,
    Replicated,
    Sharded,
    Size,
    exact_quotient,
    longest_share,
    whole_layout,
)
from ..rules.rule import OpSharding, OpShardingRule
from .cost import Conversion, Price, attention_price, conversion_price


class PlannedSoFar:
    """What is known while the graph is walked: the marks, and the plans of the ops that were passed."""

    def __init__(self, rules: GraphRules, parts: int, marks: Mapping[tuple[fx.Node, int], Sharded]) -> None:
        self.rules, self.parts, self.marks = rules, parts, marks
        self.nodes: dict[fx.Node, NodePlan] = {}

    def placement(self, node: fx.Node) -> Placement:
        """What the consumers of a value see, as far as it is planned."""
        return self.nodes[node].delivered[0] if node in self.nodes else REPLICATED

    def placements(self, node: fx.Node) -> list[Placement]:
        return [self.placement(operand) for operand in self.rules.operands(node)]

    def begun_otherwise(
        self, user: fx.Node, value: fx.Node, target: Sharded | GroupedHeads | None
    ) -> dict[fx.Node, NodePlan] | None:
        """The plans of what stands between whole values and this one for it to be made so; None if that moves more."""
        plan, rule = self.nodes.get(value), self.rules.rule(value)
        if plan is None or rule is None or plan.sharding is None or not isinstance(target, Sharded):
            return None
        shared = any(other is not user and other in self.nodes for other in value.users)
        sharding = rule.follow_result(0, target, self.placements(value))
        if shared or len(rule.results) > 1 or plan.delivered == (target,) or sharding is None:
            return None
        plans = {value: NodePlan(sharding, sharding.results)}
        for operand, needed in zip(self.rules.operands(value), sharding.operands, strict=True):
            placement = self.placement(operand)
            if isinstance(placement, Sharded) and placement != needed:
                above = self.begun_otherwise(value, operand, needed)
                if above is None:
                    return None
                plans |= above
        return plans

    def padding(self, size: Size) -> float:
        """How much more is held for a factor of this size to fall into equal blocks."""
        return longest_share(self.rules.hint(size), self.parts)


@dataclass(frozen=True)
class Region:
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


class SitePlanner:
    """Plans one site after the other, on what is planned so far."""

    def __init__(self, so_far: PlannedSoFar, attention: str, links: Links) -> None:
        self.so_far, self.rules, self.parts = so_far, so_far.rules, so_far.parts
        self.attention, self.links = attention, links

    def plan(self, site: AttentionSite) -> Region:
        """The way that is asked for, or of those that every op of the site passes the fastest."""
        first = site.nodes[0]
        rule, placements = self.rules.rule(first), self.so_far.placements(first)
        assert rule is not None
        if self.attention == "replicate":
            return Region({node: NodePlan(None, (REPLICATED,)) for node in site.nodes}, "replicate", "as asked for")
        placements[site.query.index] = self._query_home(site)
        query, key = placements[site.query.index], placements[site.key.index]
        if not isinstance(query, Sharded) and not isinstance(key, Sharded):
            rows = self.rules.hint(self.rules.shape(self.rules.operands(first)[site.query.index])[site.query.dim])
            few = f"{rows} rows of queries are fewer than {self.parts} ranks"
            return Region({}, "replicate", few if rows < self.parts else "no operand is sharded")
        candidates = self._candidates(site, rule, placements)
        asked = [each for each in candidates if self.attention == each.strategy or each.strategy == "local"]
        if self.attention == "auto":  # the memory of padding has no price, and is not more than doubled
            asked = [each for each in candidates if each.padding <= 2]
        if not candidates:
            return Region({}, "replicate", "no dimension that every op of the site passes")
        best = min(asked or candidates, key=self._seconds)  # the first of equals, which is at home
        if self.attention != "auto":
            told = "as asked for" if asked else f"not every op of the site passes {self.attention}"
            return Region(best.nodes, best.strategy, best.told if best.strategy == "local" else told)
        least: dict[str, float] = {}
        for each in sorted(candidates, key=self._seconds):
            least.setdefault(each.strategy, self._seconds(each))
        prices = ", ".join(f"{strategy} {_readable(seconds)}" for strategy, seconds in least.items())
        return Region(best.nodes, best.strategy, f"{best.told}: {prices}")

    def _query_home(self, site: AttentionSite) -> Placement:
        """Where the queries of a site are; or where the site cuts them, if all of its operands come whole."""
        query, key = (self.rules.operands(end.node)[end.index] for end in (site.query, site.key))
        arrived = self.so_far.placement(query)
        if isinstance(arrived, Sharded) or isinstance(self.so_far.placement(key), Sharded):
            return arrived
        mark = self.so_far.marks.get(source_of(query), REPLICATED)
        return mark if self.rules.is_activation(query) else REPLICATED

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
                needed = plan.sharding.operands[index]
                if (node, index) not in ends and self.so_far.begun_otherwise(node, value, needed):
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
        planned = value.op == "placeholder" or source_of(value)[0] in self.so_far.nodes
        return self.so_far.placement(value) if planned else self.so_far.marks.get(source_of(value), REPLICATED)

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

    def begin_beside(self, site: AttentionSite, plans: Mapping[fx.Node, NodePlan]) -> None:
        """What else a site takes is cut as it needs it: of a bias looked up in a table of heads, the table."""
        ends = [(end.node, end.index) for end in (site.query, site.key, site.value)]
        for node, plan in plans.items():
            for index, operand in enumerate(self.rules.operands(node)):
                target = plan.operand(index)
                if operand not in plans and (node, index) not in ends and isinstance(target, Sharded):
                    self.so_far.nodes.update(self.so_far.begun_otherwise(node, operand, target) or {})

    def moved(self, site: AttentionSite, plans: Mapping[fx.Node, NodePlan]) -> tuple[fx.Node, ...]:
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
                at_home[site.query.index] = self._query_home(site)
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
        for factor in sorted(candidates, key=lambda f: (self.so_far.padding(rule.sizes[f]), -candidates[f])):
            query = self.rules.operands(site.nodes[0])[site.query.index]
            merged = self._split_above(query, query_factors[factor]) if factor in query_factors else None
            for layout in (merged, whole_layout(rule.sizes[factor])):
                sharding = rule.run_on({factor: layout}) if layout else None
                if layout and sharding:
                    yield self.rules.hint(layout.segments[0].size), self._group_heads(site, sharding)

    def _split_above(self, value: fx.Node, dim: int) -> Layout | None:
        """The layout of the heads in a dimension that was made by merging batch and heads, `(b h)`."""
        rule = self.rules.rule(value)
        while rule is not None and rule.operands and len(rule.results) == 1:
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
        if source is not None and isinstance(heads, int) and isinstance(self.so_far.placement(source), Sharded):
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


def _readable(seconds: float) -> str:
    """`1.2 ms`: two digits."""
    unit, size = next((each for each in _UNITS if seconds >= each[1]), _UNITS[-1])
    return f"{float(f'{seconds / size:.2g}'):g} {unit}"


_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))


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
