"""Find the attention sites of a captured graph, however each one is written.

    scores: f32[1, 4, 32, 32] = aten.matmul(q, k_t)        one site: nodes (scores, probs, out),
    probs:  f32[1, 4, 32, 32] = aten.softmax(scores, -1)   query q, key k_t, value v
    out:    f32[1, 4, 32, 8]  = aten.matmul(probs, v)

    out:    f32[1, 4, 32, 8]  = aten.scaled_dot_product_attention(q, k, v)     the same site, as one node

A written-out attention is a contraction of two activations whose result carries a dimension of each, the query length
and the key length, then something that mixes the keys of a query (a softmax, or the sum under one), then a contraction
that sums over the key length. What lies between belongs to the site. The op names are never asked for: the rules know
which dimension is which.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from sp_compile.graph import GraphRules
from sp_compile.plan import AttentionSite, SiteOperand
from sp_compile.rule import OpSharding, OpShardingRule, factors_of
from sp_compile.rules.attention import ATTENTION
from sp_compile.sharding import REPLICATED, Placement, Sharded, whole_layout


def find_attention(rules: GraphRules) -> tuple[AttentionSite, ...]:
    """The attention sites, in the order of the graph; no node belongs to two."""
    sites: list[AttentionSite] = []
    taken: set[fx.Node] = set()
    for node in rules.graph.nodes:
        rule = rules.rule(node)
        if rule is None or node in taken:
            continue
        site = _fused(node, rule) if node.target in ATTENTION else _written_out(node, rule, rules)
        if site is not None and taken.isdisjoint(site.nodes):
            sites.append(site)
            taken.update(site.nodes)
    return tuple(sites)


def _fused(node: fx.Node, rule: OpShardingRule) -> AttentionSite:
    roles = ATTENTION[node.target]
    query, key = rule.operands[roles.query], rule.operands[roles.key]
    return AttentionSite(
        (node,),
        SiteOperand(node, roles.query, len(query) - 2),
        SiteOperand(node, roles.key, len(key) - 2),
        SiteOperand(node, roles.value, len(rule.operands[roles.value]) - 2),
    )


def _own_dimension(rule: OpShardingRule, operand: int, other: int) -> int | None:
    """The one dimension of an operand that the result has and the other operand has not."""
    elsewhere = {f for dim in rule.operands[other] for f in factors_of(dim)}
    made = {f for dim in rule.results[0] for f in factors_of(dim)}
    own = [at for at, dim in enumerate(rule.operands[operand]) if dim and made >= {*dim} and elsewhere.isdisjoint(dim)]
    return own[0] if len(own) == 1 else None


def _contracts(rule: OpShardingRule) -> bool:
    made = {f for dim in rule.results[0] for f in factors_of(dim)}
    shared = {f for dim in rule.operands[0] for f in factors_of(dim)} & {
        f for dim in rule.operands[1] for f in factors_of(dim)
    }
    return not shared <= made


def _written_out(node: fx.Node, rule: OpShardingRule, rules: GraphRules) -> AttentionSite | None:
    """The site that begins with the product of queries and keys, if this node is one."""
    operands = rules.operands(node)
    if len(operands) < 2 or not _contracts(rule) or not all(map(rules.is_activation, operands[:2])):
        return None
    dims = (_own_dimension(rule, 0, 1), _own_dimension(rule, 1, 0))
    if dims[0] is None or dims[1] is None:
        return None
    lengths = [Sharded(dim, whole_layout(rules.shape(n)[dim])) for dim, n in zip(dims, operands, strict=False)]
    carried = [
        _carried(
            node,
            rule.carry(side, [lengths[side] if side == at else REPLICATED for at in range(len(operands))])[0],
            rules,
        )
        for side in (0, 1)
    ]
    for last in _after(node):
        for key in filter(lambda side: rules.varies(operands[side]), (0, 1)):
            value = _sums_over(last, carried[key], carried[1 - key], rules)
            if value is not None:
                query_dim, key_dim = dims[1 - key], dims[key]
                assert query_dim is not None and key_dim is not None
                between = _between(node, last)
                if not any(_mixes(each, carried[key], rules) for each in between[1:-1]):
                    continue
                return AttentionSite(
                    between, SiteOperand(node, 1 - key, query_dim), SiteOperand(node, key, key_dim), value
                )
    return None


def _after(node: fx.Node) -> list[fx.Node]:
    """The nodes that depend on this one, in the order of the graph."""
    found = {node}
    after = []
    at = node.next
    while at.op != "output":
        if not found.isdisjoint(at.all_input_nodes):
            found.add(at)
            after.append(at)
        at = at.next
    return after


def _between(first: fx.Node, last: fx.Node) -> tuple[fx.Node, ...]:
    ancestors, stack = {last}, [last]
    while stack:
        for above in stack.pop().all_input_nodes:
            if above not in ancestors:
                ancestors.add(above)
                stack.append(above)
    return (first, *(node for node in _after(first) if node in ancestors))


def _carried(first: fx.Node, start: Placement, rules: GraphRules) -> Mapping[fx.Node, Placement]:
    """Where one dimension of the scores is in each value made from them."""
    places: dict[fx.Node, Placement] = {first: start}
    for node in _after(first):
        rule, operands = rules.rule(node), rules.operands(node)
        if rule is None:
            continue
        placements = [places.get(operand, REPLICATED) for operand in operands]
        for index, placement in enumerate(placements):
            result = rule.carry(index, placements)[0]
            if isinstance(placement, Sharded) and isinstance(result, Sharded):
                places[node] = result
                break
    return places


def _mixes(node: fx.Node, keys: Mapping[fx.Node, Placement], rules: GraphRules) -> bool:
    """Whether an op needs the keys of a query together: linear attention has none such and is no site."""
    rule, operands = rules.rule(node), rules.operands(node)
    placements = [keys.get(operand, REPLICATED) for operand in operands]
    return any(
        rule is None
        or not isinstance(sharding := rule.follow(index, placements), OpSharding)
        or not any(isinstance(result, Sharded) for result in sharding.results)
        for index, placement in enumerate(placements)
        if isinstance(placement, Sharded)
    )


def _sums_over(
    node: fx.Node, keys: Mapping[fx.Node, Placement], queries: Mapping[fx.Node, Placement], rules: GraphRules
) -> SiteOperand | None:
    """The value operand, if this node contracts the key length of the scores and keeps their query length."""
    rule, operands = rules.rule(node), rules.operands(node)
    if rule is None or len(operands) < 2 or not _contracts(rule) or node not in queries:
        return None
    for scores, value in ((0, 1), (1, 0)):
        placement = keys.get(operands[scores])
        if not isinstance(placement, Sharded) or operands[value] in keys:
            continue
        factors = factors_of(rule.operands[scores][placement.dim])
        made = {f for dim in rule.results[0] for f in factors_of(dim)}
        shared = [at for at, dim in enumerate(rule.operands[value]) if factors and dim == factors]
        if made.isdisjoint(factors) and shared and rules.varies(operands[value]):
            return SiteOperand(node, value, shared[0])
    return None
