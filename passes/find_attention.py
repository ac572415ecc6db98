"""Find the attention sites of a captured graph, however each one is written.

    scores: f32[1, 4, 32, 32] = aten.matmul(q, k_t)        one site: nodes (scores, probs, out),
    probs:  f32[1, 4, 32, 32] = aten.softmax(scores, -1)   query q, key k_t, value v
    out:    f32[1, 4, 32, 8]  = aten.matmul(probs, v)

    out:    f32[1, 4, 32, 8]  = aten.scaled_dot_product_attention(q, k, v)     the same site, as one node

A written-out attention is a contraction of two activations whose result carries a dimension of each, the query length
and the key length, and then a contraction that sums over the key length. What lies between belongs to the site: a
softmax over the keys, or scores that are taken as they are, under a sigmoid, a ReLU or a matrix of decays (Ramapuram et
al. 2024; Sun et al. 2023, RetNet, section 2.1), if it is features that were summed. Linear attention, `q @ (k_t @ v)`,
sums rows first: what would be the lengths are features, and it is no site, nor are the blocks of rows that it is
written in, whose values are summed once more. The op names are never asked for: the rules know which dimension is
which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from heapq import heappop, heappush
from operator import getitem

from torch import fx

from sp_compile.ir.graph import GraphRules
from sp_compile.ir.plan import AttentionSite, SiteOperand
from sp_compile.placement.placements import REPLICATED, Placement, Sharded, whole_layout
from sp_compile.planning.features import Features
from sp_compile.rules.registry import ATTENTION, AttentionRoles
from sp_compile.rules.rule import OpShardingRule, all_factors, factors_of


def find_attention(rules: GraphRules) -> tuple[AttentionSite, ...]:
    """The attention sites, in the order of the graph; no node belongs to two."""
    sites: list[AttentionSite] = []
    taken: set[fx.Node] = set()
    features = Features(rules)
    for node in rules.graph.nodes:
        rule = rules.rule(node)
        if rule is None or node in taken:
            continue
        roles = ATTENTION.get(node.target)
        site = _fused(node, rule, roles) if roles is not None else _written_out(node, rule, rules, features)
        if site is not None and taken.isdisjoint(site.nodes):
            sites.append(site)
            taken.update(site.nodes)
    return tuple(sites)


def _fused(node: fx.Node, rule: OpShardingRule, roles: AttentionRoles) -> AttentionSite:
    def end(role: tuple[int, int]) -> SiteOperand:
        index, dim = role
        return SiteOperand(node, index, dim % len(rule.operands[index]))

    return AttentionSite((node,), end(roles.query), end(roles.key), end(roles.value))


def _own_dimension(rule: OpShardingRule, operand: int, other: int) -> int | None:
    """The dimension of an operand that the result has and the other operand has not; the last of the result's."""
    elsewhere = all_factors([rule.operands[other]])
    for made in reversed(rule.results[0]):
        if made and made in rule.operands[operand] and elsewhere.isdisjoint(factors_of(made)):
            return rule.operands[operand].index(made)
    return None


def _contracted(rule: OpShardingRule) -> tuple[int, int] | None:
    """The two operands that an op contracts, if it does."""
    operands = [at for at in range(len(rule.operands)) if at not in rule.additive]
    if len(operands) != 2:
        return None
    left, right = operands
    shared = all_factors([rule.operands[left]]) & all_factors([rule.operands[right]])
    return None if shared <= all_factors(rule.results[:1]) else (left, right)


def _written_out(node: fx.Node, rule: OpShardingRule, rules: GraphRules, features: Features) -> AttentionSite | None:
    """The site that begins with the product of queries and keys, if this node is one."""
    sides, operands = _contracted(rule), rules.operands(node)
    if sides is None or any(rules.is_weight(operands[side]) for side in sides):
        return None
    for key, query in (sides[::-1], sides):
        query_dim, key_dim = _own_dimension(rule, query, key), _own_dimension(rule, key, query)
        if query_dim is None or key_dim is None or not rules.varies(operands[key]):
            continue
        queries = _carried(node, rule, query, query_dim, rules)
        keys = _carried(node, rule, key, key_dim, rules)
        for last in sorted({user for scores in keys for user in scores.users}, key=rules.position):
            value = _summed_with(last, keys, queries, rules)
            if value is None:
                continue
            between = _between(node, last, rules)
            lengths = (*factors_of(rule.operands[query][query_dim]), *factors_of(rule.operands[key][key_dim]))
            mixed = any(_mixes(each, keys, rules) for each in between[1:-1])
            if mixed or (_sums_features(node, rule, lengths, features) and not _is_summed_elsewhere(value, rules)):
                return AttentionSite(
                    between, SiteOperand(node, query, query_dim), SiteOperand(node, key, key_dim), value
                )
    return None


def _carried(
    first: fx.Node, rule: OpShardingRule, operand: int, dim: int, rules: GraphRules
) -> Mapping[fx.Node, Placement]:
    """Where one dimension of an operand of `first` is in each value made from the scores, as far as it is there.

    It is one granule, so that a view may take it apart, as into rows and columns of an image.
    """
    size = rules.shape(rules.operands(first)[operand])[dim]
    start: list[Placement] = [REPLICATED] * len(rule.operands)
    start[operand] = Sharded(dim, whole_layout(size, size))
    places: dict[fx.Node, Placement] = {first: rule.carry(operand, start)[0]}
    waiting = [(rules.position(user), user) for user in first.users]
    while waiting:
        _, node = heappop(waiting)
        own = rules.rule(node)
        if own is None or node in places:
            continue
        placements = [places.get(each, REPLICATED) for each in rules.operands(node)]
        results = [own.carry(at, placements)[0] for at, each in enumerate(placements) if isinstance(each, Sharded)]
        found = next((result for result in results if isinstance(result, Sharded)), None)
        if found is not None:
            places[node] = found
            for user in node.users:
                heappush(waiting, (rules.position(user), user))
    return places


def _sums_features(node: fx.Node, rule: OpShardingRule, lengths: Iterable[str], features: Features) -> bool:
    """Whether a contraction is over features, and what it keeps beside the lengths is a batch and features, as heads.

    Linear attention sums rows first, and keeps chunks of rows where it has products of a query and a key.
    """
    known, batch = features.of(node), factors_of(rule.results[0][0])
    return all_factors(rule.operands).difference(batch, lengths) <= known and known.isdisjoint(lengths)


def _is_summed_elsewhere(value: SiteOperand, rules: GraphRules) -> bool:
    """Whether rows of the value are summed once more, to the state that linear attention hands to the next rows."""
    operand = rules.operands(value.node)[value.index]
    for user in operand.users:
        rule = rules.rule(user)
        if user is value.node or rule is None or _contracted(rule) is None:
            continue
        dims = rule.operands[rules.operands(user).index(operand)]
        if all_factors(rule.results[:1]).isdisjoint(factors_of(dims[value.dim])):
            return True
    return False


def _between(first: fx.Node, last: fx.Node, rules: GraphRules) -> tuple[fx.Node, ...]:
    """The nodes that depend on the first and that the last depends on, both included, in the order of the graph."""
    above, stack = {last}, [last]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in above and rules.position(node) >= rules.position(first):
                above.add(node)
                stack.append(node)
    found = {first}
    for node in sorted(above, key=rules.position):
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return tuple(sorted(found, key=rules.position))


def _mixes(node: fx.Node, keys: Mapping[fx.Node, Placement], rules: GraphRules) -> bool:
    """Whether an op needs the keys of a query together."""
    if node.target is getitem:
        return False
    rule = rules.rule(node)
    if rule is None:
        return True
    placements = [keys.get(operand, REPLICATED) for operand in rules.operands(node)]
    for index, placement in enumerate(placements):
        sharding = rule.follow(index, placements)
        kept = sharding is not None and any(isinstance(result, Sharded) for result in sharding.results)
        if isinstance(placement, Sharded) and not kept:
            return True
    return False


def _summed_with(
    node: fx.Node, keys: Mapping[fx.Node, Placement], queries: Mapping[fx.Node, Placement], rules: GraphRules
) -> SiteOperand | None:
    """The value operand, if this node contracts the key length of the scores and keeps their query length."""
    rule, operands = rules.rule(node), rules.operands(node)
    sides = _contracted(rule) if rule is not None else None
    if rule is None or sides is None or node not in queries:
        return None
    for scores, value in (sides, sides[::-1]):
        placement = keys.get(operands[scores])
        if not isinstance(placement, Sharded) or operands[value] in keys or not rules.varies(operands[value]):
            continue
        length = rule.operands[scores][placement.dim]
        if factors_of(length) and all_factors(rule.results[:1]).isdisjoint(factors_of(length)):
            shared = [at for at, dim in enumerate(rule.operands[value]) if dim == length]
            if shared:
                return SiteOperand(node, value, shared[0])
    return None
