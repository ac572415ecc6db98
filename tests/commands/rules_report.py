"""What has to be whole, and why: `python -m tests.commands.rules_report`.

First the overloads that a smarter local body would shard (`until`), then those that are whole by what they compute
(`because`), with the factors of one sample call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from tabulate import tabulate
from torch._ops import OpOverload

from sp_compile.rules.registry import _RULES, _WHOLE
from sp_compile.rules.rule import OpShardingRule, factors_of

from ..rules import CASES


def text_of(rule: OpShardingRule) -> str:
    """A rule in its notation."""

    def term(dims: tuple[object, ...]) -> str:
        shown = []
        for dim in dims:
            factors = [f + "!" * (f in rule.need_replication) for f in factors_of(dim)]  # type: ignore[arg-type]
            shown.append(factors[0] if len(factors) == 1 else f"({' '.join(factors)})" if factors else "1")
        return " ".join(shown)

    return f"{', '.join(map(term, rule.operands))} -> {', '.join(map(term, rule.results))}"


def example(target: OpOverload) -> str:
    """The rule of the sample call with the fewest factors that has to be whole in one."""
    rules = [sample.rule for sample in CASES[target]]
    whole = [rule for rule in rules if rule is not None and rule.need_replication & set(rule.sizes)]
    return min(map(text_of, whole), key=len, default="")


def rows(kind: str) -> Iterator[list[str]]:
    """Overloads that share a reason, the reason, and an example."""
    shared: dict[str, list[OpOverload]] = defaultdict(list)
    for target, whole in _WHOLE.items():
        if getattr(whole, kind):
            shared[getattr(whole, kind)].append(target)
    for reason, targets in shared.items():
        yield [", ".join(str(target).removeprefix("aten.") for target in targets), reason, example(targets[0])]


def main() -> None:
    """Print both tables."""
    print(f"{len(_RULES)} overloads have a rule, {len(_WHOLE)} of them a factor that has to be whole.\n")
    for kind, title in (("until", "Whole for want of"), ("because", "Whole because")):
        print(tabulate(rows(kind), ["overload", title, "a rule"], maxcolwidths=[48, 44, 48]))
        print()


if __name__ == "__main__":
    main()
