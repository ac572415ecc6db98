"""What the ranks of an SP group say of where they are, and what follows from all of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .errors import RankLostError, RankMismatchError, SequenceParallelError

Account = dict[str, Any]
"""Where a rank is, as JSON: see `guard.Guard._account`."""

_ADVICE = "Every rank of an SP group makes the same calls in the same order, with the same inputs."


class Value(NamedTuple):
    """An input of a graph on one rank."""

    name: str
    kind: str
    spec: str
    checksum: int | None


def explain_accounts(
    accounts: Mapping[int, Account], size: int, store_answers: bool = True
) -> tuple[type[SequenceParallelError], str]:
    """What the accounts of the ranks mean, on whichever rank it is asked; some of `size` ranks may have given none."""
    absent = [rank for rank in range(size) if rank not in accounts]
    at: dict[str, list[int]] = {}
    for rank, account in sorted(accounts.items()):
        at.setdefault(_where(account), []).append(rank)
    places = "".join(f"\n  {_ranks(ranks)}: {where}" for where, ranks in at.items())
    for one, other in itertools.combinations(sorted(accounts), 2):
        a, b = accounts[one], accounts[other]
        if a["number"] == b["number"] and a["digest"] != b["digest"]:
            alike = [r for r in sorted(accounts) if r >= other and accounts[r]["digest"] == b["digest"]]
            text = f"the ranks of the SP group do not agree:{places}\n{_difference(a, b, one, alike)}"
            return RankMismatchError, text
    if absent and not store_answers:
        return RankLostError, (
            f"the process that hosts the store of the job, most likely that of global rank 0, has ended:{places}\n"
            f"What became of {_ranks(absent)} cannot be said without it: look at the output of each, and start all "
            "ranks anew."
        )
    late = [account for account in accounts.values() if account["cause"] == "late"]
    if late:
        ahead = [rank for rank, account in sorted(accounts.items()) if account["number"] == late[0]["number"]]
        missing = [rank for rank in range(size) if rank not in ahead] or ahead
        silent = f" There is no word of {_ranks(absent)}, where guards may be off." if absent else ""
        return RankMismatchError, (
            f"{_ranks(missing)} of the SP group did not come within {late[0]['timeout']:g} s to where {_ranks(ahead)} "
            f"waited:{places}\n{_ADVICE}{silent} A rank that alone works for longer between two calls, on a checkpoint "
            "say, needs options={'guard_timeout': seconds}."
        )
    gone = sorted(absent + [rank for rank, account in accounts.items() if account["cause"] == "left"])
    if gone:
        return RankLostError, (
            f"{_ranks(gone)} of the SP group ended, or left the group, while others needed it:{places}\nThe cause is "
            f"in the output of {_ranks(gone)}: an exception, or a process that the system killed for its memory. Then "
            "start all ranks anew."
        )
    texts = sorted({account["text"] for account in accounts.values()} - {""})
    return RankLostError, (
        f"the connections of the SP group broke, though all its ranks are alive:{places}\n{' '.join(texts)}".rstrip()
    )


def _where(account: Account) -> str:
    what: str = account["what"]
    return what if account["inside"] else f"is elsewhere, last seen where it {what}"


def _difference(a: Account, b: Account, one: int, others: Sequence[int]) -> str:
    """The first thing that differs between two accounts, and what to do."""
    first, second = f"on rank {one}", f"on {_ranks(others)}"
    for name, value in a.get("options", {}).items():
        other = b.get("options", {}).get(name, value)
        if value != other:
            return f"Option {name!r} is {value} {first} and {other} {second}: pass the same options on every rank."
    ours, theirs = ([Value(*value) for value in account.get("values", ())] for account in (a, b))
    # The size of a tensor may be an input as well, and comes first; the tensor says more.
    for mine, yours in sorted(zip(ours, theirs, strict=False), key=lambda pair: pair[0].spec.isdigit()):
        if mine.name == yours.name and mine.spec != yours.spec:
            return f"{_title(mine)} is {mine.spec} {first} and {yours.spec} {second}. {_ADVICE}"
    plans = [account.get("plan", "").splitlines() for account in (a, b)]
    if a.get("does") == b.get("does") and plans[0] == plans[1]:
        for mine, yours in zip(ours, theirs, strict=False):
            if mine.checksum != yours.checksum:
                advice = (
                    "Seed alike before the model is made, or load one checkpoint."
                    if mine.kind == "parameter"
                    else ("All ranks of an SP group work on the same sample: see sp_compile.data.sp_sampler.")
                )
                return f"{_title(mine)}, {mine.spec}, has other values {second} than {first}. {advice}"
        for device, state in (a.get("random") or {}).items():
            if state != (b.get("random") or {}).get(device):
                return (
                    f"The random numbers of {device} are in another state {second} than {first}, and this graph draws "
                    "some: call torch.manual_seed with the same seed on every rank."
                )
    for number, (mine, yours) in enumerate(itertools.zip_longest(*plans, fillvalue="(nothing)"), 1):
        if mine != yours:
            return (
                f"Their graphs differ first in line {number}:\n  rank {one}: {mine}\n  rank {others[0]}: {yours}\n"
                f"A graph break, a branch or a loop that one rank takes alone does this; "
                f"TORCH_LOGS=graph_breaks,recompiles shows them. {_ADVICE}"
            )
    return _ADVICE


def _title(value: Value) -> str:
    return f"{value.kind.capitalize()} {value.name}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
