"""Outline what is computed with rows in the order of their groups: a mixture's experts, as `grouped_mm` takes them.

    values, order = sort(ids)                        ids [T k]: the expert of each of the k uses of T tokens
    ends = cumsum(histc(values))                     where the rows of each expert end
    x_g = x[order // k]; scale_g = scale[order]      rows in the order of their experts
    y_g = grouped_mm(x_g, w, ends) * scale_g         each row by itself, by the matrix of its expert
    y = y_g[inverse of order]                    →   y = self.grouped_rows_0(ids, x, scale, w)

No op of it is right on a rank's rows by itself: a sort and what follows it say nothing about single rows. As a whole
each row of y is made of its own rows of x, ids and scale, so that a rank may sort, count and multiply its rows alone.
(The idiom is that of Hugging Face's `grouped_mm` experts; after Gale et al. 2023, MegaBlocks, section 4.)
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx import Node

from sp_compile.ir.effects import STATE, has_effect
from sp_compile.ir.graph import GraphRules, is_tensor, source_of
from sp_compile.placement.placements import Size, product
from sp_compile.rules.grouped import PRODUCTS, GroupedRows
from sp_compile.rules.op_call import named_arguments
from sp_compile.rules.rule import OpShardingRule, factors_of

aten = torch.ops.aten

_SORTS = (aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)
_VIEWS = (aten.reshape.default, aten.squeeze.dim, aten.unsqueeze.default, aten.flatten.using_ints)
_SHAPED = (aten.reshape.default, aten.expand.default)
_INTEGERS = (torch.int32, torch.int64)
_NEW = (aten.empty_like.default, aten.zeros_like.default, aten.new_empty.default, aten.new_zeros.default)
_NOT_NEGATIVE = (aten.topk.default, aten.argmax.default, aten.argmin.default)
"""The last result of each is an index."""


def outline_experts(module: fx.GraphModule, rules: GraphRules) -> bool:
    """Replace each such part of a captured graph by one call; whether there was any."""
    graph, count = module.graph, 0
    for sort in [node for node in graph.nodes if node.target in _SORTS]:
        if not _sorts_groups(rules, sort):
            continue
        reading = _Reading(rules, sort)
        for result in [node for node in graph.nodes if node in reading.results]:
            part = reading.part(result)
            if part and rules.replicated.isdisjoint(part) and not _switches_between(rules, part):
                _outline(module, reading, result, part, f"grouped_rows_{count}")
                count += 1
    if count:
        graph.eliminate_dead_code(has_effect)
        graph.lint()
        module.recompile()
    return count > 0


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call by name."""
    assert isinstance(node.target, OpOverload)
    return named_arguments(node.target, node.args, node.kwargs)


def _sorts_groups(rules: GraphRules, sort: Node) -> bool:
    """Whether a vector of indices is sorted upwards. Below 0 they would be sorted, and counted in no group."""
    ids, given = sort.args[0], _arguments(sort)
    if not isinstance(ids, Node) or len(rules.shape(ids)) != 1 or given["descending"]:
        return False
    while ids.target in _VIEWS or (ids.target is aten._to_copy.default and ids.meta["val"].dtype in _INTEGERS):
        ids = ids.args[0]
        assert isinstance(ids, Node)
    source, result = source_of(ids)
    return source.target in _NOT_NEGATIVE and result == (source.target is aten.topk.default)


def _switches_between(rules: GraphRules, part: list[Node]) -> bool:
    """Whether gradients, autocast or kernels are switched while the part is computed."""
    first, last = rules.position(part[0]), rules.position(part[-1])
    return any(node.target in STATE and first < rules.position(node) < last for node in rules.graph.nodes)


class _Reading:
    """What is known of the nodes after a sort of `ids`."""

    def __init__(self, rules: GraphRules, sort: Node) -> None:
        ids = sort.args[0]
        assert isinstance(ids, Node)
        self.rules, self.sort, self.ids = rules, sort, ids
        self.count = rules.shape(ids)[0]
        self.labels = {ids}
        """Hold the ids as numbers, in any order."""
        self.order: dict[Node, int] = {}
        """Which row, each standing for so many of `ids`, comes where in the order of groups."""
        self.inverse: dict[Node, Node] = {}
        """Where each row has come to, by the order that it undoes."""
        self.sizes: dict[Node, Size] = {}
        """How many rows each of so many groups has."""
        self.ends: dict[Node, Size] = {}
        self.grouped: set[Node] = set()
        """Have their rows, which are dimension 0, in the order of groups."""
        self.rows = {ids: 1}
        """What rows are taken from: how many of `ids` one of them stands for."""
        self.results: dict[Node, int] = {}
        """Have rows where they were."""
        self.by_rows: set[Node] = set()
        """Those of `grouped` that are made of others by an op that knows rows by their place alone."""
        readers: dict[object, Callable[[Node], None]] = {
            getitem: self._read_result,
            aten._to_copy.default: self._read_cast,
            aten.floor_divide.default: self._read_division,
            aten.index.Tensor: self._read_index,
            aten.index_put.default: self._read_put,
            aten.index_add.default: self._read_add,
            aten.histc.default: self._read_sizes,
            aten.cumsum.default: self._read_ends,
            **dict.fromkeys(_SORTS, self._read_sort),
        }
        for node in rules.graph.nodes:
            if node.op != "call_function" or rules.position(node) < rules.position(sort):
                continue
            if node.target in readers:
                readers[node.target](node)
            known = node in self.results or self.grouped.isdisjoint(node.all_input_nodes)
            if not known and self._keeps_rows(node):
                self.by_rows.add(node)
                self.grouped.add(node)

    def _read_sort(self, node: Node) -> None:
        given = _arguments(node)
        vector_only = node.target in (aten.argsort.default, aten.argsort.stable)
        if vector_only and node is self.sort:
            self.order[node] = 1
        elif vector_only and self.order.get(given["self"]) == 1 and not given["descending"]:
            self.inverse[node] = given["self"]

    def _read_result(self, node: Node) -> None:
        source, result = node.args
        assert isinstance(source, Node)
        if source is self.sort and result == 0:
            self.grouped.add(node)
            self.labels.add(node)
        elif source is self.sort:
            self.order[node] = 1
        elif source.target in _SORTS and result == 1:
            given = _arguments(source)
            if self.order.get(given["self"]) == 1 and not given["descending"]:
                self.inverse[node] = given["self"]

    def _read_cast(self, node: Node) -> None:
        value: Tensor = node.meta["val"]
        if node.args[0] in self.labels and value.dtype in (*_INTEGERS, torch.float32, torch.float64):
            self.labels.add(node)

    def _read_division(self, node: Node) -> None:
        order, by = node.args
        if isinstance(order, Node) and self.order.get(order) == 1 and isinstance(by, int) and by > 0:
            self.order[node] = by

    def _read_index(self, node: Node) -> None:
        value, indices = node.args
        index = indices[0] if isinstance(indices, (list, tuple)) and len(indices) == 1 else None
        if not isinstance(value, Node) or not isinstance(index, Node):
            return
        if index in self.order and self._has_rows(value, self.order[index]):
            self.grouped.add(node)
        elif index in self.inverse and value in self.grouped:
            self.results[node] = 1

    def _read_put(self, node: Node) -> None:
        """`empty[order] = arange` and `empty[order] = y_g`: all rows are written, each once."""
        given = _arguments(node)
        indices, values = given["indices"], given["values"]
        if given["accumulate"] or len(indices) != 1 or self.order.get(indices[0]) != 1:
            return
        if given["self"] in self.rules.trained and given["self"].target not in _NEW:
            return  # it would have a gradient, of zeros
        if self.rules.shape(node) != self.rules.shape(values) or self.rules.shape(node)[0] != self.count:
            return
        if values in self.grouped:
            self.results[node] = 1
        elif values.target is aten.arange.default:
            self.inverse[node] = indices[0]

    def _read_add(self, node: Node) -> None:
        """`y.index_add(0, order // k, y_g)`"""
        given = _arguments(node)
        base, index = given["self"], given["index"]
        adds = given["source"] in self.grouped and given["dim"] == 0 and given["alpha"] == 1 and index in self.order
        if adds and self._has_rows(base, self.order[index]):
            self.results[node] = self.order[index]

    def _has_rows(self, value: Node, each: int) -> bool:
        """Whether a value from outside has a row for `each` of the ids; it is then known to."""
        known = self.rows.get(value, each)
        shape = self.rules.shape(value)
        inside = (self.order, self.inverse, self.sizes, self.ends, self.grouped, self.results)
        if known != each or any(value in facts for facts in inside):
            return False
        if not shape or product([shape[0], each]) != self.count or not self._fits(each):
            return False
        self.rows[value] = each
        return True

    def _fits(self, each: int) -> bool:
        return len({1, each, *self.rows.values()}) <= 2

    def _read_sizes(self, node: Node) -> None:
        """`histc(ids, n, 0, n - 1)` counts integers."""
        given = _arguments(node)
        if given["self"] in self.labels and given["min"] == 0 and given["max"] == given["bins"] - 1:
            self.sizes[node] = given["bins"]

    def _read_ends(self, node: Node) -> None:
        if node.args[0] in self.sizes:
            self.ends[node] = self.sizes[node.args[0]]  # type: ignore[index]

    def _keeps_rows(self, node: Node) -> bool:
        """Whether an op makes each row of its results from that row of what it is given in the order of groups."""
        operands = self.rules.operands(node)
        if node.target is getitem:
            return True
        if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded in node.target.tags:
            return False
        if node.target.name() in PRODUCTS:
            given = list(_arguments(node).values())
            matrices = given[1]
            count = self.rules.shape(matrices)[0] if len(self.rules.shape(matrices)) == 3 else None
            known = given[2] in self.ends and self.ends[given[2]] == count
            return known and given[0] in self.grouped and matrices not in self.grouped and len(operands) == 3
        rule = self.rules.rule(node)
        others = (self.order, self.inverse, self.sizes, self.ends, self.results)
        if rule is None or any(operand in facts for facts in others for operand in operands):
            return False
        if node.target not in _SHAPED and rule.shape_argument is not None:
            return False
        return _is_by_rows(rule, [operand in self.grouped for operand in operands]) and _keeps_length(node)

    def part(self, result: Node) -> list[Node]:
        """The nodes that make a result, in the order of the graph; none if it is not of its own rows alone, or if what
        is computed in between is also used elsewhere: it would be computed twice."""
        inside = {*self.order, *self.inverse, *self.sizes, *self.ends, *self.grouped, *self.labels} - {self.ids}
        found, waiting = {result}, [result]
        while waiting:
            for operand in self.needed(waiting.pop()):
                source, _ = source_of(operand)
                new = {operand, source} - found if operand in inside or source is self.sort else set()
                found |= new
                waiting += new
        whole = {operand for node in found & self.by_rows for operand in node.all_input_nodes} - self.grouped
        readers = {user for node in found & self.by_rows for user in node.users if user.target not in _NEW}
        return sorted(found, key=self.rules.position) if whole.isdisjoint(self.rows) and readers <= found else []

    def needed(self, node: Node) -> list[Node]:
        """What a node of the part is made of."""
        if node in self.inverse:
            return [self.inverse[node]]
        if node in self.results and node.target is aten.index_put.default:
            given = _arguments(node)
            return [given["indices"][0], given["values"]]
        if node.target in _SHAPED:
            return node.all_input_nodes[:1]
        return node.all_input_nodes


def _is_by_rows(rule: OpShardingRule, grouped: list[bool]) -> bool:
    """Whether dimension 0 of all operands and results that have the rows is one factor, which passes through."""
    if not all(rule.operands[at] for at, known in enumerate(grouped) if known) or not all(rule.results):
        return False
    rows = {rule.operands[at][0] for at, known in enumerate(grouped) if known} | {dims[0] for dims in rule.results}
    (dim,) = rows if len(rows) == 1 else ((),)
    if not isinstance(dim, tuple) or len(dim) != 1:
        return False
    special = {*rule.mixed, *rule.bodies, *rule.windows, *(source for source, *_ in rule.windows.values())}
    elsewhere = [dims for dims, known in zip(rule.operands, grouped, strict=True) if not known]
    elsewhere += [dims[1:] for dims in (*rule.results, *rule.operands) if dims and dims[0] == dim]
    return dim[0] not in special and all(dim[0] not in factors_of(other) for dims in elsewhere for other in dims)


def _keeps_length(node: Node) -> bool:
    """Whether a call takes no size but that of its rows, as the first of its shape."""
    if any(not is_tensor(each) for each in node.all_input_nodes) and node.target not in _SHAPED:
        return False
    shape: Any = node.args[1] if node.target in _SHAPED else ()
    return all(isinstance(size, int) and size >= 0 for size in shape[1:])


def _outline(module: fx.GraphModule, reading: _Reading, result: Node, part: list[Node], name: str) -> None:
    """Write `part` as a module of its own, called in the place of `result`."""
    body = fx.Graph()
    inner: dict[Any, Node] = {}
    shape: Any
    operands = dict.fromkeys(each for node in part for each in reading.needed(node) if each not in part)
    for operand in operands:
        inner[operand] = body.placeholder(operand.name)
        inner[operand].meta = {"val": operand.meta["val"]}

    def emit(target: Any, *args: Any) -> Node:
        return body.call_function(target, args)

    for node in part:
        if node in reading.inverse:
            inner[node] = emit(aten.argsort.default, inner[reading.inverse[node]])
        elif node is result and node.target is aten.index_put.default:
            order, values = reading.needed(node)
            inner[node] = emit(aten.index.Tensor, inner[values], [emit(aten.argsort.default, inner[order])])
        elif node.target in _SHAPED:
            source, shape = node.args
            inner[node] = emit(node.target, inner[source], [-1, *shape[1:]])
        else:
            inner[node] = body.node_copy(node, inner.__getitem__)
        inner[node].meta = dict(node.meta)
    body.output(inner[result])
    rows = [*(reading.rows.get(operand, 0) for operand in operands), reading.results[result]]
    module.add_submodule(name, GroupedRows({}, body, rows))
    with module.graph.inserting_before(result):
        call = module.graph.call_module(name, tuple(operands))
    call.meta = dict(result.meta)
    result.replace_all_uses_with(call)
    module.graph.erase_node(result)
