"""What the ranks of an SP group say of where they are, and what follows from all of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..distributed.samples import are_close
from ..errors import RankLostError, RankMismatchError, RankRaisedError, SequenceParallelError

Account = dict[str, Any]
"""Where a rank is, as JSON: see `guard.Guard._account`."""

_ADVICE = "Every rank of an SP group makes the same calls in the same order, with the same inputs."
_LOST = "The SP group cannot be used any more: call init_sequence_parallel() on all ranks to go on, or start them anew."


class Value(NamedTuple):
    """An input of a graph on one rank."""

    name: str
    kind: str
    spec: str
    checksum: int | None = None
    samples: Sequence[float] = ()
    tolerance: float = 0.0
    """How far samples of two ranks may be apart, relative to the largest."""

    def differs_from(self, other: Value) -> bool:
        """Whether another rank has other values of this input."""
        known = len(self.samples) == len(other.samples)
        return self.checksum != other.checksum or (known and not are_close(self.samples, other.samples, self.tolerance))


def explain_accounts(
    accounts: Mapping[int, Account], size: int, store_answers: bool = True
) -> tuple[type[SequenceParallelError], str]:
    """What the accounts of the ranks mean, on whichever rank it is asked; some of `size` ranks may have given none."""
    absent = [rank for rank in range(size) if rank not in accounts]
    at: dict[str, list[int]] = {}
    for rank, account in sorted(accounts.items()):
        at.setdefault(_where(account), []).append(rank)
    places = "".join(f"\n  {_ranks(ranks)}: {where}" for where, ranks in at.items())
    threads = [rank for rank, account in accounts.items() if account["cause"] == "threads"]
    if threads:
        return RankMismatchError, (
            f"on {_ranks(threads)} two threads were in compiled models of one SP group at once:{places}\nRanks could "
            f"not agree on which comes first: call the models from one thread, or one after the other. {_LOST}"
        )
    raised = {rank: account["raised"] for rank, account in sorted(accounts.items()) if account.get("raised")}
    if raised and (len(raised) < size or len({(each["kind"], each["launched"]) for each in raised.values()}) > 1):
        return RankRaisedError, _raised(raised, places)
    for one, other in itertools.combinations(sorted(accounts), 2):
        a, b = accounts[one], accounts[other]
        if a["number"] == b["number"] and (a["digest"] != b["digest"] or _other_values(a, b)):
            alike = [r for r in sorted(accounts) if r >= other and accounts[r]["digest"] == b["digest"]]
            text = f"the ranks of the SP group do not agree:{places}\n{_difference(a, b, one, alike)}\n{_LOST}"
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
        silent = f" There is no word of {_ranks(absent)}: stopped, or guards are off there." if absent else ""
        return RankMismatchError, (
            f"{_ranks(missing)} of the SP group did not come within {late[0]['timeout']:g} s to where {_ranks(ahead)} "
            f"waited:{places}\n{_ADVICE}{silent} A rank that alone works for longer between two calls, on a checkpoint "
            f"say, needs options={{'guard_timeout': seconds}}.\n{_LOST}"
        )
    silent_for = [account["timeout"] for account in accounts.values() if account["cause"] == "silent"]
    if silent_for:
        silent_ranks = _ranks(absent) if absent else "a rank"
        return RankLostError, (
            f"{silent_ranks} of the SP group gave no sign of life for {silent_for[0]:g} s while others needed it:"
            f"{places}\nIts process is stopped, by a signal or a debugger, or its machine cannot be reached. {_LOST}"
        )
    gone = sorted(absent + [rank for rank, account in accounts.items() if account["cause"] == "left"])
    if gone:
        said = [f"{_ranks([rank])} {accounts[rank]['text']}" for rank in gone if accounts.get(rank, {}).get("text")]
        unknown = (
            f"The cause is in the output of {_ranks(gone)}: an exception, a loop with fewer batches than those of the "
            "others, or a process that the system killed for its memory."
        )
        cause = f"{'; '.join(said)}." if said else unknown
        return RankLostError, (
            f"{_ranks(gone)} of the SP group ended, or left the group, while others needed it:{places}\n{cause} "
            "Then start all ranks anew."
        )
    texts = sorted({account["text"] for account in accounts.values()} - {""})
    return RankLostError, (
        f"the connections of the SP group broke, though all its ranks are alive:{places}\n{' '.join(texts)}".rstrip()
    )


def _where(account: Account) -> str:
    what: str = account["what"]
    return what if account["inside"] or account.get("raised") else f"is elsewhere, last seen where it {what}"


def _raised(raised: Mapping[int, Account], places: str) -> str:
    """What is said of exceptions, by rank, that other ranks did not raise, or not there."""
    alike: dict[str, list[int]] = {}
    for rank, each in raised.items():
        line = f" ({each['line']})" if each["line"] else ""
        alike.setdefault(f"{each['text']}{line}", []).append(rank)
    said = "; ".join(f"{_ranks(ranks)} of the SP group raised {text}" for text, ranks in alike.items())
    return (
        f"{said}, and not all ranks did:{places}\nWhat they were computing together was not finished, and nothing of "
        f"it is returned. {_LOST}"
    )


def _values(account: Account) -> list[Value]:
    return [Value(*value) for value in account.get("values", ())]


def _other_values(a: Account, b: Account) -> bool:
    return any(mine.differs_from(yours) for mine, yours in zip(_values(a), _values(b), strict=False))


def _difference(a: Account, b: Account, one: int, others: Sequence[int]) -> str:
    """The first thing that differs between two accounts, and what to do."""
    first, second = f"on rank {one}", f"on {_ranks(others)}"
    for name, value in a.get("options", {}).items():
        other = b.get("options", {}).get(name, value)
        if value != other:
            return f"Option {name!r} is {value} {first} and {other} {second}: pass the same options on every rank."
    ours, theirs = _values(a), _values(b)
    # The size of a tensor may be an input as well, and comes first; the tensor says more.
    for mine, yours in sorted(zip(ours, theirs, strict=False), key=lambda pair: pair[0].spec.isdigit()):
        if mine.name == yours.name and mine.spec != yours.spec:
            return f"{_title(mine)} is {mine.spec} {first} and {yours.spec} {second}. {_advice_on_shapes(mine, yours)}"
    plans = [account.get("plan", "").splitlines() for account in (a, b)]
    if a.get("does") == b.get("does") and plans[0] == plans[1]:
        for mine, yours in zip(ours, theirs, strict=False):
            if mine.differs_from(yours):
                advice = _advice_on_values(mine, bool(a.get("is_first", True)))
                return f"{_title(mine)}, {mine.spec}, has other values {second} than {first}. {advice}"
        for device, state in (a.get("random") or {}).items():
            if state != (b.get("random") or {}).get(device):
                return (
                    f"The random numbers of {device} are in another state {second} than {first}, and this graph draws "
                    "some: call torch.manual_seed with the same seed on every rank, and draw on all ranks or none."
                )
    for number, (mine, yours) in enumerate(itertools.zip_longest(*plans, fillvalue="(nothing)"), 1):
        if mine != yours:
            return (
                f"Their graphs differ first in line {number}:\n  rank {one}: {mine}\n  rank {others[0]}: {yours}\n"
                f"A graph break, a branch or a loop that one rank takes alone does this; "
                f"TORCH_LOGS=graph_breaks,recompiles shows them. {_ADVICE}"
            )
    return _ADVICE


def _advice_on_shapes(mine: Value, yours: Value) -> str:
    """What to do of one input in two shapes."""
    if mine.kind == "parameter":
        return "The ranks call different models, or have built one in different ways."
    if mine.spec.partition("[")[0] != yours.spec.partition("[")[0]:
        return "Give it the same dtype on every rank."
    return (
        "All ranks of an SP group work on the same batch: give the loader sp_compile.data.sp_sampler, or let each load "
        "its own and loop over sync_inputs(batch), which takes batches of unequal shapes."
    )


_WHOLE_NUMBERS = ("i", "u", "b8")


def _advice_on_values(value: Value, is_first: bool) -> str:
    """What to do of one input with two values, at the first call of its graph or later."""
    if value.kind == "parameter":
        return "Seed alike before the model is made, or load one checkpoint."
    if value.kind == "buffer":
        return "Load one checkpoint on every rank, and update buffers from values that all ranks have."
    if not is_first:
        return (
            "They agreed before: one rank has skipped a batch, such as one that it failed to decode, has drawn one "
            "more, or shuffles by another seed. Where a rank skips a batch all have to; sync_inputs(batch) gives all "
            "ranks the batch of one."
        )
    if value.spec.startswith(_WHOLE_NUMBERS):
        return (
            "All ranks of an SP group work on the same sample: give the loader sp_compile.data.sp_sampler, or let each "
            "load its own and loop over sync_inputs(batch)."
        )
    return (
        "Noise, latents and augmentations that a rank draws need the same generator on every rank, as by "
        "torch.manual_seed(seed); what is loaded needs sp_compile.data.sp_sampler or sync_inputs(batch). Values that "
        "differ in their last bits only need options={'guards': 'shapes'}."
    )


def _title(value: Value) -> str:
    return f"{value.kind.capitalize()} {value.name}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
