"""ATen overload -> op sharding rule: `rule_for`, `stays_whole`, and `register_sharding_rule` for a user's own ops."""

from . import attention, contractions, flex, losses, normalisation, pointwise, random, reductions, rows, views  # noqa: F401
from .registry import has_rule, register_sharding_rule, rule_for, stays_whole

__all__ = ["has_rule", "register_sharding_rule", "rule_for", "stays_whole"]
