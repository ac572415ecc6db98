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

from sp_compile.ir.graph import GraphRules
from sp_compile.ir.plan import SiteOperand
from sp_compile.planning.features import Features
from sp_compile.rules.rule import OpShardingRule, all_factors, factors_of


def find_mixers(rules: GraphRules) -> tuple[SiteOperand, ...]:
    """The operands that are mixed along a sequence, in the order of the graph."""
    features = Features(rules)
    found: list[SiteOperand] = []
    for node in rules.graph.nodes:
        rule = rules.rule(node)
        if rule is None:
            continue
        for at, operand in enumerate(rules.operands(node)):
            if rules.is_activation(operand) and rules.varies(operand):
                mixed = _mixed(rule, at, features.of(node))
                found += [SiteOperand(node, at, dim) for dim in mixed if _has_another(rule, at, dim)]
    return tuple(found)


def _mixed(rule: OpShardingRule, operand: int, features: set[str]) -> list[int]:
    """The dimensions of an operand, no features themselves, along which the op mixes rows."""
    kept = all_factors(rule.results)
    contracted = all_factors([*rule.operands[:operand], *rule.operands[operand + 1 :]]) - kept
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
