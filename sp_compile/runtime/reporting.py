"""What a user is told of a graph that is not run as it could be: warnings, or errors with `strict`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..config import SequenceParallelConfig
from ..errors import FallbackError, user_line
from ..ir.plan import Fallback, SitePlan
from ..pipeline import PlannedGraph

log = logging.getLogger(__name__)


def report(planned: PlannedGraph, config: SequenceParallelConfig) -> None:
    """Warn of ops on gathered values, strategies that could not be had, and outputs that are gathered after all.

    Raises `FallbackError` of the first and the last with `strict`.
    """
    _report_fallbacks(planned.plan.fallbacks, config.strict)
    _report_strategies(planned.plan.sites, config.attention)
    _report_outputs(planned, config.strict)


def _report_fallbacks(fallbacks: Sequence[Fallback], strict: bool) -> None:
    for fallback in fallbacks:
        text = f"{fallback.node.target} runs on gathered values: {fallback.reason} ({user_line(fallback.node)})"
        if strict:
            rule = "give it a rule with register_sharding_rule, " if fallback.takes_a_rule else ""
            raise FallbackError(f"{text}; {rule}opt it out with replicated_region(), or compile without strict=True")
        log.warning("%s", text)


def _report_strategies(sites: Sequence[SitePlan], attention: str) -> None:
    """Tell of sites that do not run by the strategy that was asked for. One that moves nothing is as good as any."""
    told = {
        f"attention runs by {site.strategy!r}, not by {attention!r} as asked for: {site.reason} "
        f"({user_line(site.site.output)})": None
        for site in sites
        if attention not in ("auto", site.strategy) and site.strategy != "local"
    }
    for text in told:  # the layers of a model say the same
        log.warning("%s", text)


def _report_outputs(planned: PlannedGraph, strict: bool) -> None:
    outputs = planned.sharded.outputs if planned.sharded is not None else ()
    for index, (name, plan) in enumerate(zip(planned.captured.output_names, outputs, strict=False)):
        if plan.gathered:
            text = f"output {index} ({name!r}) is gathered: {plan.gathered}"
            if strict:
                raise FallbackError(f"{text}, 'gather' it with the option 'outputs', or compile without strict=True")
            log.warning("%s", text)
