"""Choose where an attention site would have its operands sharded: along its sequence, or along its windows.

    x  f32[1, 36, 64]                    36 rows are 4 windows of 9
    w  f32[4, 9, 64]     view            the windows are the batch of the attention
    q  f32[4, 3, 9, 8]   linear, view    home S(0: 4): whole windows on a rank, and the site is local
    y  f32[1, 36, 64]    view            S(1: 36/9)

Every dimension of a query that the keys share is followed upwards, and taken apart where a view merged it. What ends in
dimension 0 of an input is the batch and is never sharded; what a weight made is a feature, such as heads; the rest are
rows. A dimension of rows is worth the bytes of the sites that it is the sequence of (they move their operands), and
twice those of the sites that it is the windows of (they move nothing), all over the region that it reaches. Each site
votes for its best one: so one kind of site is local and the other is not where attention is factorised over space and
time, and attention over everything is cut in whole windows where other layers have windows; in whole rows of an image
where layers above, which take the image, would else run on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Flag, auto
from functools import cached_property, reduce
from operator import or_

from torch import fx

from ..ir.graph import GraphRules, is_tensor, source_of
from ..ir.plan import AttentionSite, SiteOperand
from ..placement.placements import (
    REPLICATED,
    Placement,
    Sharded,
    Size,
    exact_quotient,
    longest_share,
    product,
    whole_layout,
)
from ..rules.rule import factors_of
from .cost import contraction_flops

Vote = tuple[fx.Node, Sharded]
"""A value, and where it would be sharded."""

Worth = tuple[int, int, int]
"""The bytes of all sites that a dimension serves, where it serves the most; how many rows it has there, and the number
of the dimension, negated: a tie that the topmost value decides alike for all sites below it."""


def choose_homes(rules: GraphRules, sites: Sequence[AttentionSite], parts: int) -> list[Vote]:
    """For q, k and v of every site, the placement that is best for all sites together.

    None for a memory so short that no rank computes more of it whole than its share of the queries, such as a prompt.
    None for queries that are fewer than the ranks, such as the one token of a step of generation, and none for their
    keys and values, unless a layer computes those row by row: a cache that is given whole would only be moved.
    """
    found: list[Vote] = []
    chooser = _Chooser(rules, sites, parts)
    for site, votes in zip(sites, chooser.choose(), strict=True):
        if votes and chooser.rows(votes[0][1]) < parts:
            found += votes[1:] if chooser.projects_keys(site) else []
        else:
            found += votes[:1] if is_shorter(rules, site, parts) else votes
    return found


def is_shorter(rules: GraphRules, site: AttentionSite, times: int) -> bool:
    """Whether the queries of a site are at least so many times as long as its keys, and longer."""
    queries, keys = (
        rules.hint(rules.shape(rules.operands(end.node)[end.index])[end.dim]) for end in (site.query, site.key)
    )
    return keys < queries and keys * times <= queries


def sequence_home(rules: GraphRules, end: SiteOperand) -> Vote:
    """The sequence of one operand, whole rows of it anywhere."""
    value = rules.operands(end.node)[end.index]
    return value, Sharded(end.dim, whole_layout(rules.shape(value)[end.dim]))


def homes_of_mixed(rules: GraphRules, end: SiteOperand) -> list[Vote]:
    """The sequence of an operand that an op mixes, and the one that it makes of it in the same place."""
    homes, rule = [sequence_home(rules, end)], rules.rule(end.node)
    shape = rules.shape(end.node) if is_tensor(end.node) else ()
    assert rule is not None
    if end.dim < len(shape):
        mixed, made = (set(factors_of(dims[end.dim])) for dims in (rule.operands[end.index], rule.results[0]))
        others = [at for at, operand in enumerate(rules.operands(end.node)) if not rules.is_weight(operand)]
        given = {factor for at in others for dim in rule.operands[at] for factor in factors_of(dim)}
        if made and made.isdisjoint(given - mixed):
            homes.append((end.node, Sharded(end.dim, whole_layout(shape[end.dim]))))
    return homes


class _Kind(Flag):
    """What the rows of a dimension are."""

    BATCH = auto()
    FEATURE = auto()
    ROWS = auto()
    UNKNOWN = auto()


@dataclass(frozen=True)
class _Factor:
    """A factor `size` of a dimension that is read as `(left size right)`."""

    left: Size
    size: Size
    right: Size

    @staticmethod
    def of(placement: Sharded) -> _Factor | None:
        """The factor that a placement cuts; None if it has several segments."""
        layout = placement.layout
        if len(layout.segments) > 1 or layout.segments[0].span != layout.segments[0].size:
            return None
        right = layout.segments[0].granule
        size = exact_quotient(layout.segments[0].size, right)
        return None if size is None else _Factor(layout.outer, size, right)

    def placed(self, dim: int) -> Sharded:
        return Sharded(dim, whole_layout(self.size).scaled(self.left, self.right))

    def of_part(self, whole: Sharded) -> Sharded:
        """This factor of the factor that a placement cuts."""
        own = _Factor.of(whole)
        assert own is not None
        return self.inside(own).placed(whole.dim)

    def within(self, whole: _Factor) -> _Factor | None:
        """This factor as one of `whole`, both being factors of the same dimension; None if it is none."""
        left, right = exact_quotient(self.left, whole.left), exact_quotient(self.right, whole.right)
        if left is None or right is None or exact_quotient(whole.size, product([left, self.size, right])) != 1:
            return None
        return _Factor(left, self.size, right)

    def inside(self, whole: _Factor) -> _Factor:
        """The inverse of `within`."""
        return _Factor(product([whole.left, self.left]), self.size, product([self.right, whole.right]))


@dataclass
class _Origin:
    """What is above a placement of a value."""

    above: list[_Origin] = field(default_factory=list)
    """The operands that bring the rows."""
    pieces: list[tuple[_Factor, _Origin]] = field(default_factory=list)
    """What a view above merged, outermost first; the factors are those of this one."""
    kind: _Kind = _Kind.UNKNOWN
    projected: int = 0
    """The layers with a matrix of weights that rows of it pass, a bit for each."""
    as_sequence: int = 0
    as_windows: int = 0
    """The sites below, a bit for each."""
    worth: Worth = (0, 0, 0)


class _Chooser:
    def __init__(self, rules: GraphRules, sites: Sequence[AttentionSite], parts: int) -> None:
        self.rules, self.sites, self.parts = rules, sites, parts
        self.origins: dict[fx.Node, dict[tuple[int, Sharded], _Origin]] = {}
        self.weights = [rules.bytes(self._query(site)) for site in sites]
        self.worths: dict[tuple[int, int], int] = {}

    def choose(self) -> Iterator[list[Vote]]:
        """The votes of each site."""
        sequences, windows = [], []
        for number, site in enumerate(self.sites):
            value, placement = sequence_home(self.rules, site.query)
            sequences.append((placement, self._want(value, placement)))
            sequences[-1][1].as_sequence |= 1 << number
            windows.append([(placement, self._want(value, placement)) for placement in self._batches(site)])
            for _, origin in windows[-1]:
                origin.as_windows |= 1 << number
            self._want(*sequence_home(self.rules, site.key))
        for node in reversed(self.rules.graph.nodes):
            self._trace(node)
        for node in self.rules.graph.nodes:
            self._weigh(node)
        for site, sequence, batches in zip(self.sites, sequences, windows, strict=True):
            yield self._best(site, sequence, batches)

    def projects_keys(self, site: AttentionSite) -> bool:
        """Whether a layer with a matrix of weights makes the keys of a site, of which there are enough, row by row."""
        value, placement = sequence_home(self.rules, site.key)
        return bool(self._want(value, placement).projected) and self.rows(placement) >= self.parts

    def _query(self, site: AttentionSite) -> fx.Node:
        return self.rules.operands(site.query.node)[site.query.index]

    def _want(self, value: fx.Node, placement: Sharded) -> _Origin:
        node, result = source_of(value)
        return self.origins.setdefault(node, {}).setdefault((result, placement), _Origin())

    def _batches(self, site: AttentionSite) -> list[Sharded]:
        """The dimensions of the query that the keys have as well, and that need not be whole."""
        rule, found = self.rules.rule(site.query.node), []
        assert rule is not None
        for dim, size in enumerate(self.rules.shape(self._query(site))):
            placements: list[Placement] = [REPLICATED] * len(rule.operands)
            placements[site.query.index] = placement = Sharded(dim, whole_layout(size))
            sharding = rule.follow(site.query.index, placements)
            if dim != site.query.dim and sharding is not None and sharding.operands[site.key.index] is not None:
                found.append(placement)
        return found

    def _votes(self, site: AttentionSite, query: Sharded) -> list[Vote]:
        """The placements of q, k and v for a site that runs on shards of a dimension of its query; none if it cannot.

        Its operands need not be whole along that dimension, for all nodes pass it on.
        """
        places: dict[fx.Node, Placement] = {self._query(site): query}
        for node in site.nodes:
            rule = self.rules.rule(node)
            if rule is None:
                continue
            placements = [places.get(operand, REPLICATED) for operand in self.rules.operands(node)]
            for at, placement in enumerate(placements):
                sharding = rule.follow(at, placements) if isinstance(placement, Sharded) else None
                if sharding is not None and node not in places:
                    places[node] = sharding.results[0]
        votes = [(self._query(site), query)]
        for end in (site.key, site.value):
            rule, made = self.rules.rule(end.node), places.get(end.node)
            own = rule.carry_back(0, made)[end.index] if rule and isinstance(made, Sharded) else None
            if own is None:
                return []
            votes.append((self.rules.operands(end.node)[end.index], own))
        return votes

    # Upwards

    def _trace(self, node: fx.Node) -> None:
        """Find what is above the placements that are asked for of a node, and tell it who asks."""
        origins = self.origins.get(node, {})
        waiting = list(origins)
        for result, placement in waiting:
            origin, known = origins[result, placement], len(origins)
            self._find_above(node, result, placement, origin)
            if not origin.above and origin.kind is _Kind.UNKNOWN:
                self._take_apart(node, result, placement, origin)
            waiting += list(origins)[known:]
        # Pieces behind what they are pieces of.
        self.origins[node] = origins = dict(sorted(origins.items(), key=lambda each: -self.rows(each[0][1])))
        for origin in origins.values():
            for other in (*origin.above, *(piece for _, piece in origin.pieces)):
                other.as_sequence |= origin.as_sequence
                other.as_windows |= origin.as_windows

    def rows(self, placement: Sharded) -> int:
        """How many granules a placement has."""
        layout = placement.layout
        return sum(self.rules.hint(each.size) // self.rules.hint(each.granule) for each in layout.segments)

    def _find_above(self, node: fx.Node, result: int, placement: Sharded, origin: _Origin) -> None:
        if node.op in ("placeholder", "get_attr"):
            origin.kind = _Kind.BATCH if node.op == "placeholder" and placement.dim == 0 else _Kind.ROWS
            return
        rule, operands = self.rules.rule(node), self.rules.operands(node)
        if rule is None:
            return
        carried = list(zip(operands, rule.carry_back(result, placement), strict=True))
        weights = [(operand, at) for operand, at in carried if self.rules.is_weight(operand)]
        rows = [(operand, at) for operand, at in carried if at and not self.rules.is_weight(operand)]
        if any(at is None and len(self.rules.shape(weight)) > 1 for weight, at in weights):
            origin.projected = 1 << self.rules.position(node)
        if not rows and any(at for _, at in weights):
            origin.kind = _Kind.FEATURE
        activations = [(operand, at) for operand, at in rows if self.rules.is_activation(operand)]
        origin.above = [self._want(operand, at) for operand, at in activations or rows if at]

    def _take_apart(self, node: fx.Node, result: int, placement: Sharded, origin: _Origin) -> None:
        """The factors of a dimension that was merged of several."""
        rule, whole = self.rules.rule(node), _Factor.of(placement)
        if rule is None or whole is None:
            return
        names = rule.results[result][placement.dim]
        if not isinstance(names, tuple):
            return
        sizes = [rule.sizes[name] for name in factors_of(names)]
        for at, size in enumerate(sizes):
            factor = _Factor(product(sizes[:at]), size, product(sizes[at + 1 :]))
            own = factor.within(whole)
            if own is not None and own != _Factor(1, whole.size, 1):
                origin.pieces.append((own, self._want(node, factor.placed(placement.dim))))

    # Downwards

    def _weigh(self, node: fx.Node) -> None:
        """What the placements of a node are, and are worth."""
        origins = self.origins[node]
        served: dict[tuple[int, int, Size], tuple[int, int]] = {}
        for (result, placement), origin in origins.items():
            dimension = result, placement.dim, placement.layout.outer
            sequence, windows = served.get(dimension, (0, 0))
            served[dimension] = sequence | origin.as_sequence, windows | origin.as_windows
        for (result, placement), origin in reversed(origins.items()):
            if origin.above:
                origin.kind = _agreed([other.kind for other in origin.above])
            elif origin.pieces:
                origin.kind = reduce(or_, (piece.kind for _, piece in origin.pieces))
            for other in (*origin.above, *(piece for _, piece in origin.pieces)):
                origin.projected |= other.projected
            rows = self.rules.hint(placement.layout.size) // self.rules.hint(placement.layout.outer)
            own = self._worth(*served[result, placement.dim, placement.layout.outer]), rows, -placement.dim
            above = max((other.worth for other in origin.above), default=own)
            origin.worth = above if above[0] >= own[0] else own
            if origin.above:
                origin.pieces = origin.above[0].pieces
            else:
                origin.pieces = [each for factor, piece in origin.pieces for each in _unmixed(factor, piece)]

    def _worth(self, as_sequence: int, as_windows: int) -> int:
        """The bytes of the sites that one dimension serves; where both of a site's come together, it tells nothing."""
        key = as_sequence, as_windows
        if key not in self.worths:
            only = [as_sequence & ~as_windows, as_windows & ~as_sequence]
            self.worths[key] = sum(
                weight * ((only[0] >> number & 1) + 2 * (only[1] >> number & 1))
                for number, weight in enumerate(self.weights)
            )
        return self.worths[key]

    def _best(
        self, site: AttentionSite, sequence: tuple[Sharded, _Origin], batches: Sequence[tuple[Sharded, _Origin]]
    ) -> list[Vote]:
        """The votes of a site for what is worth most.

        Of what is worth the same a sequence is cut in single rows, unless coarser ones spare work; and windows as far
        out as there are enough. What is one dimension further up is rather windows.
        """
        placement, origin = sequence
        best = [sequence_home(self.rules, end) for end in (site.query, site.key, site.value)]
        coarse, most = self._coarser(placement, origin)
        if coarse is not None:
            alike = [vote[1].layout.size == placement.layout.size for vote in best]
            best = [
                (value, replace(at, layout=coarse.layout) if same else at)
                for same, (value, at) in zip(alike, best, strict=True)
            ]
        taken = (0, 0, 0)
        for batch, above in batches if origin.kind is not _Kind.BATCH else ():  # the sequence first, the batch behind
            for windows, worth in self._rows_of(batch, above):
                votes = self._votes(site, windows) if above.projected and worth >= most and worth != taken else []
                if votes:
                    best, most, taken = votes, worth, worth
        return best

    def _coarser(self, rows: Sharded, origin: _Origin) -> tuple[Sharded | None, Worth]:
        """The rows to cut a sequence in that was merged of some, None for single ones; and what they are worth."""
        pieces = list(self._pieces(rows, origin))
        _, most = best = max(
            ((at, piece.worth) for at, piece in pieces), key=lambda each: each[1], default=(None, origin.worth)
        )
        if most[0] > origin.worth[0]:
            return best
        alike = (at for at, piece in pieces if piece.worth[0] == origin.worth[0] and self._spares_work(at, rows, piece))
        return next(alike, None), origin.worth

    def _spares_work(self, coarse: Sharded, rows: Sharded, piece: _Origin) -> bool:
        """Whether layers that single rows cannot pass, and all ranks would run, take more than the longer blocks do."""
        longer = longest_share(self.rows(coarse), self.parts) - longest_share(self.rows(rows), self.parts)
        whole = sum(self.flops[node] for node in self.flops if piece.projected >> self.rules.position(node) & 1)
        return longer * sum(self.flops.values()) < whole * (self.parts - 1)

    @cached_property
    def flops(self) -> dict[fx.Node, int]:
        counted = ((node, contraction_flops(node)) for node in self.rules.graph.nodes)
        return {node: flops for node, flops in counted if flops}

    def _rows_of(self, whole: Sharded, origin: _Origin) -> Iterator[tuple[Sharded, Worth]]:
        """What is rows in a dimension of windows, beside a batch and heads, and is enough for all ranks."""
        outermost = next(self._pieces(whole, origin), None)
        if origin.kind is not _Kind.ROWS:
            for factor, piece in origin.pieces:
                yield from self._rows_of(factor.of_part(whole), piece)
        elif outermost is not None and outermost[1].worth[0] >= origin.worth[0]:
            yield outermost[0], max(outermost[1].worth, origin.worth)
        elif self.rows(whole) >= self.parts:
            yield whole, origin.worth

    def _pieces(self, whole: Sharded, origin: _Origin) -> Iterator[tuple[Sharded, _Origin]]:
        """The rows that a factor of a dimension was merged of, outermost first; those that are enough for all ranks.

        None where rows stand beside those that were merged, such as a class token.
        """
        for factor, piece in origin.pieces:
            placement = factor.of_part(whole)
            covers = placement.layout.size == whole.layout.size
            if covers and piece.kind is _Kind.ROWS and self.rows(placement) >= self.parts:
                yield placement, piece


def _agreed(kinds: Sequence[_Kind]) -> _Kind:
    """What the same rows of several operands are: a mask that is made in the model, or a table, tells less than others.

    The first dimension of a table of positions is no batch.
    """
    known = set(kinds) if set(kinds) == {_Kind.UNKNOWN} else set(kinds) - {_Kind.UNKNOWN}
    if _Kind.FEATURE in known:
        return _Kind.FEATURE
    return _Kind.ROWS if known == {_Kind.BATCH, _Kind.ROWS} else reduce(or_, known)


def _unmixed(factor: _Factor, origin: _Origin) -> list[tuple[_Factor, _Origin]]:
    """A factor, or the factors in it if they are not all of one kind."""
    if origin.kind in tuple(_Kind) or not origin.pieces:
        return [(factor, origin)]
    return [(inner.inside(factor), piece) for inner, piece in origin.pieces]
