"""ATen overload -> op sharding rule: `rule_for`, `stays_whole`, and `register_sharding_rule` for a user's own ops."""

from .aten import (  # noqa: F401
    attention,
    batch_norm,
    contractions,
    convolutions,
    flex,
    images,
    linalg,
    lookup,
    losses,
    normalisation,
    pointwise,
    pooling,
    random,
    reductions,
    rows,
    scatter,
    views,
)
from .registry import has_rule, register_sharding_rule, rule_for, stays_whole

__all__ = ["has_rule", "register_sharding_rule", "rule_for", "stays_whole"]
