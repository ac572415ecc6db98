"""Find the ops that mix the rows of a sequence in a graph without attention: convolutions, scans, linear attention.

    h:    f32[1, 32, 64]  = aten.linear(x, w_in)               64 is a feature: a weight made it
    h_t:  f32[1, 64, 32]  = aten.transpose(h, 1, 2)
    conv: f32[1, 64, 32]  = aten.conv1d(h_t, taps, groups=64)  needs dimension 2 of h_t whole: the sequence

    kv:   f32[1, 64, 64]  = aten.matmul(k_t, v)                sums k and v over the sequence

    mix:  f32[1, 64, 20]  = aten.linear(h_t, w_tokens)         a weight sums rows of features: so does MLP-Mixer

A dimension that an op needs whole, takes apart or sums two activations over is a sequence if it is no feature, which a
weight made (a linear layer, an embedding) or will sum over, unless beside features; a batch is not mixed at all. A
region is worth sharding only where such an op has another dimension to run on, or reads but a halo of the rows of other
ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from torch import fx

from sp_compile.graph import GraphRules, source_of
from sp_compile.plan import SiteOperand
from sp_compile.rule import Dim, Joined, OpShardingRule, factors_of

Dimensions: TypeAlias = set[tuple[fx.Node, int, int]]
"""By (node, result, dimension)."""


def find_mixers(rules: GraphRules) -> tuple[SiteOperand, ...]:
    """The operands that are mixed along a sequence, in the order of the graph."""
    made: Dimensions = set()
    by_weights: dict[fx.Node, set[str]] = {}
    for node in rules.graph.nodes:
        if (rule := rules.rule(node)) is not None:
            by_weights[node] = _mixed_by_weights(rules, node, rule, made)
            _follow(rules, node, rule, made, by_weights[node])
    features = _summed_by_weights(rules, by_weights)
    found: list[SiteOperand] = []
    for node, rows in by_weights.items():
        rule = rules.rule(node)
        assert rule is not None
        known = _follow(rules, node, rule, features, rows) | (_of_weights(rules, node, rule) - rows)
        for at, operand in enumerate(rules.operands(node)):
            if rules.is_activation(operand) and rules.varies(operand):
                mixed = _mixed(rule, at, known)
                found += [SiteOperand(node, at, dim) for dim in mixed if _has_another(rule, at, dim)]
    return tuple(found)


def _is_made_of_weights(rules: GraphRules, value: fx.Node) -> bool:
    """Whether a value is a weight, or made of some, such as a product of two."""
    return rules.is_activation(value) and not rules.varies(value)


def _of_weights(rules: GraphRules, node: fx.Node, rule: OpShardingRule) -> set[str]:
    """The factors of an op that weights have."""
    operands = zip(rules.operands(node), rule.operands, strict=True)
    return _factors([dims for operand, dims in operands if _is_made_of_weights(rules, operand)])


def _of_activations(rules: GraphRules, node: fx.Node, rule: OpShardingRule) -> set[str]:
    """The factors of an op that something beside weights has."""
    operands = zip(rules.operands(node), rule.operands, strict=True)
    return _factors([dims for operand, dims in operands if not _is_made_of_weights(rules, operand)])


def _summed_by_weights(rules: GraphRules, by_weights: Mapping[fx.Node, set[str]]) -> Dimensions:
    """The dimensions that become one which a linear layer sums over, all of it, as what makes its features."""
    found: Dimensions = set()
    for node, rows in reversed([*by_weights.items()]):
        rule = rules.rule(node)
        assert rule is not None
        summed = _of_weights(rules, node, rule) - _factors(rule.results) - rows
        for result, dims in enumerate(rule.results):
            for dim, each in enumerate(dims):
                if (node, result, dim) in found:
                    summed.update(factors_of(each))
        for operand, dims in zip(rules.operands(node), rule.operands, strict=True):
            for dim, each in enumerate(dims):
                if factors_of(each) and summed.issuperset(factors_of(each)):
                    found.add((*source_of(operand), dim))
    return found


def _mixed_by_weights(rules: GraphRules, node: fx.Node, rule: OpShardingRule, made: Dimensions) -> set[str]:
    """The factors, no features, that weights sum over of a value whose features pass: its rows (Tolstikhin et al. 2021,
    MLP-Mixer, section 2)."""
    kept, features = _factors(rule.results), _given_features(rules, node, rule, made)
    if features.isdisjoint(kept):
        return set()
    return _of_weights(rules, node, rule) & _of_activations(rules, node, rule) - kept - features


def _given_features(rules: GraphRules, node: fx.Node, rule: OpShardingRule, features: Dimensions) -> set[str]:
    """The factors of an op that are features of what it takes beside weights."""
    return {
        factor
        for operand, dims in zip(rules.operands(node), rule.operands, strict=True)
        for dim, each in enumerate(dims)
        if not _is_made_of_weights(rules, operand) and (*source_of(operand), dim) in features
        for factor in factors_of(each)
    }


def _follow(rules: GraphRules, node: fx.Node, rule: OpShardingRule, features: Dimensions, rows: set[str]) -> set[str]:
    """Add the features among the results of an op, and give its factors that are features.

    They are features before, or take their place; of a weight alone or of a vector of weights, but where weights mix
    `rows` to other rows; or such as classes and the parts of a complex number, which the op makes of nothing and whole.
    """
    given, made = _factors(rule.operands), _factors(rule.results)
    found = _given_features(rules, node, rule, features)
    if not rows:
        operands = zip(rules.operands(node), rule.operands, strict=True)
        vectors = [
            dims
            for operand, dims in operands
            if rules.is_weight(operand) and sum(bool(factors_of(dim)) for dim in dims) == 1
        ]
        found |= (_of_weights(rules, node, rule) - _of_activations(rules, node, rule)) | _factors(vectors)
    if given <= made:
        found |= (made - given) & rule.need_replication
    for dims in rule.results:
        pairs = zip(rule.operands[0], dims, strict=True) if rule.operands and len(rule.operands[0]) == len(dims) else ()
        for old, new in pairs:
            if not found.isdisjoint(factors_of(old)):
                found |= set(factors_of(new)) - given
    features |= {
        (node, result, dim)
        for result, dims in enumerate(rule.results)
        for dim, each in enumerate(dims)
        if _is_feature(each, found)
    }
    return found


def _is_feature(dim: Dim, features: set[str]) -> bool:
    """Whether a dimension has a factor that is a feature; all, if it is of streams: a class token stands among rows."""
    factors = factors_of(dim)
    return not features.isdisjoint(factors) and (not isinstance(dim, Joined) or features.issuperset(factors))


def _factors(tensors: Iterable[Sequence[Dim]]) -> set[str]:
    return {factor for dims in tensors for dim in dims for factor in factors_of(dim)}


def _mixed(rule: OpShardingRule, operand: int, features: set[str]) -> list[int]:
    """The dimensions of an operand, no features themselves, along which the op mixes rows."""
    kept = _factors(rule.results)
    contracted = _factors([*rule.operands[:operand], *rule.operands[operand + 1 :]]) - kept
    found = []
    for dim, each in enumerate(rule.operands[operand]):
        factors = set(factors_of(each))
        if not factors or not features.isdisjoint(factors):
            continue
        taken_apart = rule.movement and not factors <= kept
        if taken_apart or not rule.mixed.isdisjoint(factors) or factors <= contracted:
            found.append(dim)
    return found


def _has_another(rule: OpShardingRule, operand: int, dim: int) -> bool:
    """Whether the op may run on shards of another dimension than the first, the batch, or of this one with a halo."""
    halos = {halo.source for halo in rule.halos.values()}
    in_place = operand == 0 and not halos.isdisjoint(factors_of(rule.operands[0][dim]))
    return in_place or any(at not in (0, dim) for _, at in rule.borrowable(operand))
