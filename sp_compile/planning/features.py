"""Tell features from rows: the dimensions of a value that weights have made, or will sum over.

    h:    f32[1, 32, 64]  = aten.linear(x, w_in)               64 is a feature: a weight made it
    h_t:  f32[1, 64, 32]  = aten.transpose(h, 1, 2)            so is dimension 1
    mix:  f32[1, 64, 20]  = aten.linear(h_t, w_tokens)         32 is none: it is summed beside features (MLP-Mixer)

No feature is a sequence. What weights neither make nor sum over may be rows or a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TypeAlias

from torch import fx

from ..ir.graph import GraphRules, source_of
from ..rules.rule import Dim, OpShardingRule, all_factors, factors_of

Dimensions: TypeAlias = set[tuple[fx.Node, int, int]]
"""By (node, result, dimension)."""


class Features:
    """The features of a captured graph, found when first asked for."""

    def __init__(self, rules: GraphRules) -> None:
        self._rules = rules

    def of(self, node: fx.Node) -> set[str]:
        """The factors of an op that are features; the op has a rule."""
        return self._factors[node]

    @cached_property
    def _factors(self) -> Mapping[fx.Node, set[str]]:
        made: Dimensions = set()
        by_weights: dict[fx.Node, set[str]] = {}
        for node in self._rules.graph.nodes:
            if (rule := self._rules.rule(node)) is not None:
                by_weights[node] = _mixed_by_weights(self._rules, node, rule, made)
                _follow(self._rules, node, rule, made, by_weights[node])
        known = _summed_by_weights(self._rules, by_weights)
        found = {}
        for node, rows in by_weights.items():
            rule = self._rules.rule(node)
            assert rule is not None
            found[node] = _follow(self._rules, node, rule, known, rows) | (_of_weights(self._rules, node, rule) - rows)
        return found


def _is_made_of_weights(rules: GraphRules, value: fx.Node) -> bool:
    """Whether a value is a weight, or made of some, such as a product of two."""
    return rules.is_activation(value) and not rules.varies(value)


def _of_weights(rules: GraphRules, node: fx.Node, rule: OpShardingRule) -> set[str]:
    """The factors of an op that weights have."""
    operands = zip(rules.operands(node), rule.operands, strict=True)
    return all_factors([dims for operand, dims in operands if _is_made_of_weights(rules, operand)])


def _of_activations(rules: GraphRules, node: fx.Node, rule: OpShardingRule) -> set[str]:
    """The factors of an op that something beside weights has."""
    operands = zip(rules.operands(node), rule.operands, strict=True)
    return all_factors([dims for operand, dims in operands if not _is_made_of_weights(rules, operand)])


def _summed_by_weights(rules: GraphRules, by_weights: Mapping[fx.Node, set[str]]) -> Dimensions:
    """The dimensions that become one which a linear layer sums over, all of it, as what makes its features."""
    found: Dimensions = set()
    for node, rows in reversed([*by_weights.items()]):
        rule = rules.rule(node)
        assert rule is not None
        summed = _of_weights(rules, node, rule) - all_factors(rule.results) - rows
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
    kept, features = all_factors(rule.results), _given_features(rules, node, rule, made)
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
    given, made = all_factors(rule.operands), all_factors(rule.results)
    found = _given_features(rules, node, rule, features)
    if not rows:
        operands = zip(rules.operands(node), rule.operands, strict=True)
        vectors = [
            dims
            for operand, dims in operands
            if rules.is_weight(operand) and sum(bool(factors_of(dim)) for dim in dims) == 1
        ]
        found |= (_of_weights(rules, node, rule) - _of_activations(rules, node, rule)) | all_factors(vectors)
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
    """Whether all that a dimension is made of are features: a class token stands among rows, and so do the experts of
    each token."""
    return bool(factors_of(dim)) and features.issuperset(factors_of(dim))
