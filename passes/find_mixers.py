"""Find the ops that mix the rows of a sequence in a graph without attention: convolutions, scans, linear attention.

    h:    f32[1, 32, 64]  = aten.linear(x, w_in)               64 is a feature: a weight made it
    h_t:  f32[1, 64, 32]  = aten.transpose(h, 1, 2)
    conv: f32[1, 64, 32]  = aten.conv1d(h_t, taps, groups=64)  needs dimension 2 of h_t whole: the sequence

    kv:   f32[1, 64, 64]  = aten.matmul(k_t, v)                sums k and v over the sequence

A dimension that an op needs whole, takes apart or sums two activations over is a sequence if it is no feature, which a
weight made (a linear layer, an embedding) or will sum over; a batch is not mixed at all. A region is worth sharding
only where such an op has another dimension to run on, or reads but a halo of the rows of other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from sp_compile.graph import GraphRules, source_of
from sp_compile.plan import SiteOperand
from sp_compile.rule import OpShardingRule, factors_of


def find_mixers(rules: GraphRules) -> tuple[SiteOperand, ...]:
    """The operands that are mixed along a sequence, in the order of the graph."""
    features = _summed_by_weights(rules)
    found: list[SiteOperand] = []
    for node in rules.graph.nodes:
        rule, operands = rules.rule(node), rules.operands(node)
        if rule is None:
            continue
        weights = [at for at, operand in enumerate(operands) if rules.is_weight(operand)]
        made = _features(rule, operands, weights, features)
        features |= {
            (node, result, dim)
            for result, dims in enumerate(rule.results)
            for dim, each in enumerate(dims)
            if not made.isdisjoint(factors_of(each))
        }
        for at, operand in enumerate(operands):
            if at not in weights and rules.is_activation(operand) and rules.varies(operand):
                mixed = _mixed(rule, at, weights, made)
                found += [SiteOperand(node, at, dim) for dim in mixed if _has_another(rule, at, dim)]
    return tuple(found)


def _summed_by_weights(rules: GraphRules) -> set[tuple[fx.Node, int, int]]:
    """The dimensions, by (node, result, dimension), that become one which a linear layer sums over, all of it."""
    found: set[tuple[fx.Node, int, int]] = set()
    for node in reversed(rules.graph.nodes):
        rule, operands = rules.rule(node), rules.operands(node)
        if rule is None:
            continue
        weights = [at for at, operand in enumerate(operands) if rules.is_weight(operand)]
        summed = _factors(rule, weights) - {f for dims in rule.results for dim in dims for f in factors_of(dim)}
        for result, dims in enumerate(rule.results):
            for dim, each in enumerate(dims):
                if (node, result, dim) in found:
                    summed.update(factors_of(each))
        for at, operand in enumerate(operands):
            for dim, each in enumerate(rule.operands[at]):
                if factors_of(each) and summed.issuperset(factors_of(each)):
                    found.add((*source_of(operand), dim))
    return found


def _features(
    rule: OpShardingRule, operands: Sequence[fx.Node], weights: Sequence[int], features: set[tuple[fx.Node, int, int]]
) -> set[str]:
    """The factors of an op that are features: of a weight alone or of a vector of weights, or features before."""
    of_activations: set[str] = set()
    found: set[str] = set()
    for at, operand in enumerate(operands):
        for dim, each in enumerate(rule.operands[at]):
            if at in weights:
                continue
            of_activations.update(factors_of(each))
            if (*source_of(operand), dim) in features:
                found.update(factors_of(each))
    vectors = [at for at in weights if len(rule.operands[at]) == 1]
    return found | (_factors(rule, weights) - of_activations) | _factors(rule, vectors)


def _factors(rule: OpShardingRule, operands: Sequence[int]) -> set[str]:
    return {factor for at in operands for dim in rule.operands[at] for factor in factors_of(dim)}


def _mixed(rule: OpShardingRule, operand: int, weights: Sequence[int], features: set[str]) -> list[int]:
    """The dimensions of an operand, no features themselves, along which the op mixes rows."""
    kept = {factor for dims in rule.results for dim in dims for factor in factors_of(dim)}
    others = [at for at in range(len(rule.operands)) if at != operand]
    contracted = _factors(rule, others) - kept
    found = []
    for dim, each in enumerate(rule.operands[operand]):
        factors = set(factors_of(each))
        if not factors or not features.isdisjoint(factors) or not _factors(rule, weights).isdisjoint(factors):
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
