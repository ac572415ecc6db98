"""Let ops that borrow the same dimension keep it between them, rather than go home after each.

    conv over tokens   [B, C, S]   borrows C     all_to_all, conv, all_to_all                  all_to_all, conv
    silu, gate                     at home       silu                                     →    silu
    scan over tokens   [B, C, S]   borrows C     all_to_all, scan, all_to_all                  scan, all_to_all

Each op that borrows proposes the dimensions that it might. One is followed through the rules, up and down, as far as
ops can run on shards of it: each of these either stays as it is planned, at home, or runs on such shards, away. That is
a choice of two for every op, with a price for each value that is brought from one side to the other, and the cheapest
is a minimum cut (Greig, Porteous and Seheult 1989). A plan changes only where less is then moved in all.

The batch is never such a dimension, though an op by itself may borrow it: on it a whole model would run without moving
anything, which is data parallelism.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import getitem
from typing import TypeAlias

import networkx as nx
import torch
from torch import fx

from ..ir.graph import op_of, source_of
from ..ir.plan import NodePlan
from ..links import Links
from ..placement.placements import REPLICATED, Placement, Replicated, Sharded, whole_layout
from ..rules.rule import OpSharding, factors_of
from .cost import Conversion, Price, conversion_price, sum_price
from .site_plans import PlannedSoFar

Value: TypeAlias = tuple[fx.Node, int]
"""A result of an op."""

_HOME, _AWAY = "home", "away"


def join_borrowers(so_far: PlannedSoFar, fixed: Collection[fx.Node], links: Links) -> frozenset[fx.Node]:
    """Plan ops between borrowers anew, where that moves less; which ones. Those in `fixed` stay as they are."""
    regions = _Regions(so_far, fixed, links)
    joined: set[fx.Node] = set()
    tried: set[tuple[Value, Sharded]] = set()
    for node in so_far.rules.graph.nodes:
        found: list[tuple[int, Mapping[fx.Node, NodePlan]]] = [(0, {})]
        for value, placement in regions.proposals(node) if regions.borrows(node) else ():
            if (value, placement) not in tried:
                away = regions.follow(value, placement)
                tried |= set(away.placements.items())
                found.append(regions.cut(away))
        _, plans = max(found, key=lambda each: each[0])
        for each, plan in plans.items():
            so_far.nodes[each] = plan
            for user in each.users:
                if user.target is getitem:
                    so_far.nodes[user] = NodePlan(None, (plan.delivered[source_of(user)[1]],))
        joined |= plans.keys()
    return frozenset(joined)


@dataclass
class _Away:
    """A dimension as far as it was followed."""

    placements: dict[Value, Sharded]
    plans: dict[fx.Node, NodePlan] = field(default_factory=dict)
    """Of the ops that can run on shards of it."""
    is_of_input: bool = False
    is_of_weight: bool = False

    @property
    def is_batch(self) -> bool:
        """Whether it is a dimension of what the user gives, and meets none of a parameter."""
        return self.is_of_input and not self.is_of_weight


class _Regions:
    def __init__(self, so_far: PlannedSoFar, fixed: Collection[fx.Node], links: Links) -> None:
        self.so_far, self.rules, self.parts, self.links = so_far, so_far.rules, so_far.parts, links
        (output,) = self.rules.graph.find_nodes(op="output")
        returned = {source_of(each)[0] for each in output.all_input_nodes}
        self.movable = {
            node
            for node, plan in so_far.nodes.items()
            if node not in fixed and node not in returned and op_of(node) is not None and self.rules.rule(node)
            if plan.sharding is not None or (self.rules.is_activation(node) and self.rules.varies(node))
        }
        self.users: dict[Value, list[tuple[fx.Node, int]]] = defaultdict(list)
        for node, plan in so_far.nodes.items():
            rule = self.rules.rule(node)
            for index, operand in enumerate(self.rules.operands(node)):
                if rule is None or index not in rule.metadata:
                    self.users[source_of(plan.sources.get(index, operand))].append((node, index))

    def borrows(self, node: fx.Node) -> bool:
        """Whether an op takes another dimension than it is given, or goes home when it is done."""
        plan = self.so_far.nodes.get(node)
        if node not in self.movable or plan is None or plan.sharding is None:
            return False
        given = self.so_far.placements(node)
        return plan.delivered != plan.results() or any(
            isinstance(old, Sharded) and isinstance(new, Sharded) and old.dim != new.dim
            for old, new in zip(given, plan.sharding.operands, strict=True)
        )

    def proposals(self, node: fx.Node) -> Iterator[tuple[Value, Sharded]]:
        """The results of an op on shards of what it borrows, or might."""
        plan, rule = self.so_far.nodes[node], self.rules.rule(node)
        assert rule is not None
        others = dict.fromkeys(factor for at in range(len(rule.operands)) for factor, _ in rule.borrowable(at))
        for sharding in (plan.sharding, *map(rule.shard_factor, others)):
            for result, made in enumerate(sharding.results if sharding else ()):
                if isinstance(made, Sharded) and made != plan.delivered[result]:
                    yield (node, result), made

    # Along the rules

    def follow(self, value: Value, placement: Sharded) -> _Away:
        """What can run on shards of a dimension of a value."""
        away, waiting = _Away({value: placement}), deque([value])
        while waiting:
            at = waiting.popleft()
            away.is_of_weight |= any(self._meets_weight(*use, away.placements[at].dim) for use in self.users[at])
            for node in (at[0], *(user for user, _ in self.users[at])):
                if node in self.movable and node not in away.plans:
                    waiting += self._pass(node, away)
        for node, plan in list(away.plans.items()):
            assert plan.sharding is not None
            if plan == self.so_far.nodes[node] or not self._agrees(node, plan.sharding, away.placements):
                del away.plans[node]
        return away

    def _pass(self, node: fx.Node, away: _Away) -> Iterator[Value]:
        """Run an op on the shards that it is given or asked for; what is new above and below it."""
        rule, operands = self.rules.rule(node), [source_of(each) for each in self.rules.operands(node)]
        assert rule is not None
        placements = [away.placements.get(each, REPLICATED) for each in operands]
        asked = [at for at in range(len(rule.results)) if (node, at) in away.placements]
        given = [at for at, placement in enumerate(placements) if isinstance(placement, Sharded)]
        if asked:
            sharding = rule.follow_result(asked[0], away.placements[node, asked[0]], placements)
        else:
            sharding = rule.follow(given[0], placements)
        if sharding is None or not self._agrees(node, sharding, away.placements):
            return
        away.plans[node] = NodePlan(sharding, sharding.results)
        results = [((node, at), made) for at, made in enumerate(sharding.results)]
        for value, placement in (*results, *zip(operands, sharding.operands, strict=True)):
            above = value[0]
            if isinstance(placement, Sharded) and value not in away.placements:
                away.is_of_input |= above.op == "placeholder" and not self.rules.is_weight(above)
                if above in self.movable and placement != self._delivered(value, self.so_far.nodes):
                    away.placements[value] = placement
                    yield value

    def _meets_weight(self, node: fx.Node, operand: int, dim: int) -> bool:
        """Whether an op takes a dimension of an operand together with one of a parameter, if only to sum over it; not
        one that the parameter is expanded by."""
        rule = self.rules.rule(node)
        taken = set(factors_of(rule.operands[operand][dim])) if rule else set()
        return any(
            self.rules.is_weight(value) and not taken.isdisjoint(factors_of(each)) and self._is_own(value, at)
            for value, dims in zip(self.rules.operands(node), rule.operands if rule else (), strict=False)
            for at, each in enumerate(dims)
        )

    def _is_own(self, weight: fx.Node, dim: int) -> bool:
        """Whether a dimension of a weight is one of the parameters that it is made of."""
        at: Sharded | None = Sharded(dim, whole_layout(self.rules.shape(weight)[dim]))
        while weight.op != "placeholder" and at is not None:
            rule = self.rules.rule(weight)
            at = rule.carry_back(0, at)[0] if rule else None
            (weight,) = weight.all_input_nodes
        return at is not None

    def _agrees(self, node: fx.Node, sharding: OpSharding, placements: Mapping[Value, Sharded]) -> bool:
        """Whether an op takes and makes what others do as they do."""
        values = [source_of(each) for each in self.rules.operands(node)]
        values += [(node, at) for at in range(len(sharding.results))]
        wanted = (*sharding.operands, *sharding.results)
        return all(placements.get(value, want) == want for value, want in zip(values, wanted, strict=True))

    # The cut

    def cut(self, away: _Away) -> tuple[int, Mapping[fx.Node, NodePlan]]:
        """What is saved if the best of these ops run away, and their plans; none if that saves nothing."""
        layout = next(iter(away.placements.values())).layout
        padded = self.parts * self.rules.hint(layout.local_size(self.parts)) > 2 * self.rules.hint(layout.size)
        if away.is_batch or padded or not away.plans:
            return 0, {}
        values = {(node, at): None for node, plan in away.plans.items() for at in range(len(plan.delivered))}
        values |= {source_of(operand): None for node in away.plans for operand in self.rules.operands(node)}
        network = nx.DiGraph()
        network.add_nodes_from((_AWAY, _HOME))
        for node, plan in away.plans.items():
            planned = self.so_far.nodes[node]
            if plan.sharding == planned.sharding:
                network.add_edge(_AWAY, node)  # it is away already, whoever brings its result home
            else:
                _pay(network, _AWAY, node, self._own_price(node, planned))
                _pay(network, node, _HOME, self._own_price(node, plan))
        for value in values:
            self._connect(network, value, away.plans)
        _, (gone, _) = nx.minimum_cut(network, _AWAY, _HOME)
        plans = {node: plan for node, plan in away.plans.items() if node in gone}
        saved = self._total(values, away.plans, {}) - self._total(values, away.plans, plans)
        return (saved, plans) if saved > 0 else (0, {})

    def _connect(self, network: nx.DiGraph, value: Value, away: Mapping[fx.Node, NodePlan]) -> None:
        """The prices of a value: all who need it alike on one side pay once, and more if it comes from the other."""
        stayed = self._delivered(value, self.so_far.nodes)
        left = self._delivered(value, away) if value[0] in away else stayed
        for need, takers in self._takers(value, self.so_far.nodes).items():
            here, there = self._price(value, stayed, need), self._price(value, left, need)
            for payer, price in ((_AWAY, min(here, there)), (value[0], there - here)):
                if price > 0:
                    _pay(network, payer, (value, need, payer), price)
                    for taker in takers:
                        network.add_edge((value, need, payer), taker if taker in away else _HOME)
        for need, takers in self._takers(value, away).items():
            here, there = self._price(value, left, need), self._price(value, stayed, need)
            maker = value[0] if value[0] in away else _HOME
            for payer, price in ((_HOME, min(here, there)), (maker, there - here)):
                if price > 0:
                    _pay(network, (value, need, payer, _AWAY), payer, price)
                    for taker in takers:
                        network.add_edge(taker, (value, need, payer, _AWAY))

    def _total(
        self, values: Collection[Value], away: Mapping[fx.Node, NodePlan], chosen: Mapping[fx.Node, NodePlan]
    ) -> int:
        """What is paid for these values and the ops that might leave, if the chosen ones do."""
        plans = {**self.so_far.nodes, **chosen}
        total = sum(self._own_price(node, plans[node]) for node in away)
        for value in values:
            made = self._delivered(value, plans)
            total += sum(self._price(value, made, need) for need in self._takers(value, plans))
        return total

    def _takers(self, value: Value, plans: Mapping[fx.Node, NodePlan]) -> dict[tuple[Placement, bool], list[fx.Node]]:
        """Who of the ops that have plans take a value, by the placement that they need and whether they are sharded."""
        found: dict[tuple[Placement, bool], list[fx.Node]] = {}
        for user, index in self.users[value]:
            if user in plans:
                found.setdefault((plans[user].operand(index), plans[user].sharding is not None), []).append(user)
        return found

    def _delivered(self, value: Value, plans: Mapping[fx.Node, NodePlan]) -> Placement:
        node, result = value
        return plans[node].delivered[result] if node in plans else REPLICATED

    # Prices

    def _price(self, value: Value, source: Placement, need: tuple[Placement, bool]) -> int:
        """What it takes to bring a value to where it is needed. Gradients of weights are summed in any case."""
        node, _ = value
        target, sharded = need
        if self.rules.is_weight(node) or (source == target and not (isinstance(source, Replicated) and sharded)):
            return 0
        return self._weight(conversion_price(self._conversion(value, source, target), self.parts))

    def _own_price(self, node: fx.Node, plan: NodePlan) -> int:
        """What an op sends while it runs, and on its way home."""
        rule, sharding, price = self.rules.rule(node), plan.sharding, Price()
        assert rule is not None
        if sharding is None:
            return 0
        for result, (made, delivered) in enumerate(zip(sharding.results, plan.delivered, strict=True)):
            whole = self._conversion((node, result), made, delivered)
            if isinstance(made, Replicated):
                price += sum_price(whole.value, self.parts)
            elif made != delivered:
                price += conversion_price(whole, self.parts)
        if rule.halos and (share := rule.received_share(sharding, self.parts)):
            again = 1 + (node in self.rules.trained)
            price += Price(again, again * share * self.rules.bytes(self.rules.operands(node)[0]))
        return self._weight(price)

    def _conversion(self, value: Value, source: Placement, target: Placement) -> Conversion:
        node, result = value
        whole = node.meta["val"]
        whole = whole if isinstance(whole, torch.Tensor) else whole[result]
        return Conversion(whole, source, target, torch.is_grad_enabled() and node in self.rules.trained)

    def _weight(self, price: Price) -> int:
        """Bytes, and what a launch is worth in bytes: one, if nothing is known of the links."""
        return round(price.seconds(self.links) * self.links.bandwidth) + price.launches


def _pay(network: nx.DiGraph, tail: Hashable, head: Hashable, price: int) -> None:
    network.add_edge(tail, head, capacity=price)
