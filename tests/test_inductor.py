"""Where work stands among collectives: on graphs without a machine, and in the code that Inductor writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.profiler import ProfilerActivity, profile

from sp_compile import sp_backend
from sp_compile.runtime import inductor
from sp_compile.runtime.inductor import PUT_OFF, put_work_under_collectives

from .commands.overlap import Parallel
from .gloo_pool import GlooPool

Reorder = Callable[[list["Node"]], list["Node"]]


class Read(NamedTuple):
    name: str


@dataclass(eq=False)
class Node:
    """What the pass asks of a `BaseSchedulerNode`."""

    name: str
    reads: Sequence[str]
    kind: str = "work"
    unmet_dependencies: list[Read] = field(init=False)

    def __post_init__(self) -> None:
        self.unmet_dependencies = [Read(name) for name in (*self.reads, "an_input_of_the_graph")]

    def get_buffer_names(self) -> list[str]:
        return [self.name]


def graph_of(text: str) -> list[Node]:
    """`a`, `b<a`, `>c<b` (a collective), `c.<c` (its wait), in the order in which they stand."""
    nodes = []
    for word in text.split():
        name, _, reads = word.partition("<")
        kind = "collective" if name.startswith(">") else "wait" if name.endswith(".") else "work"
        nodes.append(Node(name.lstrip(">"), [each for each in reads.split(",") if each], kind))
    return nodes


def memory_of(nodes: Sequence[Node]) -> list[int]:
    """Each node makes one byte, which is freed after its last reader; what nobody reads is an output, and stays."""
    last = {name: at for at, node in enumerate(nodes) for name in node.reads}
    return [sum(last.get(made.name, len(nodes)) >= at for made in nodes[: at + 1]) for at in range(len(nodes))]


def reordered(reorder: Reorder, nodes: list[Node]) -> list[Node]:
    with (
        patch.object(inductor, "_memory", memory_of),
        patch.object(inductor, "contains_collective", lambda node: node.kind == "collective"),
        patch.object(inductor, "contains_wait", lambda node: node.kind == "wait"),
    ):
        return reorder(list(nodes))


def complaint(before: Sequence[Node], after: Sequence[Node]) -> str:
    """What is wrong with an order; empty if nothing is."""
    if len(after) != len(before) or set(after) != set(before):
        return "not the same nodes"
    seen: set[str] = set()
    for node in after:
        if not seen.issuperset(node.reads):
            return f"{node.name} runs before what it reads"
        seen.add(node.name)
    starts = [[node for node in order if node.kind == "collective"] for order in (before, after)]
    if starts[0] != starts[1]:
        return "collectives in another order"
    passed = [
        {node: sum(x.kind == "collective" for x in order[:at]) for at, node in enumerate(order)}
        for order in (before, after)
    ]
    for node in before:
        if node.kind == "work" and passed[1][node] > passed[0][node] + PUT_OFF and not behind_late_wait(node, after):
            return f"{node.name} is put off too far"
    return ""


def behind_late_wait(node: Node, after: Sequence[Node]) -> bool:
    """Whether a node reads what nobody but the end of the graph waits for."""
    above = {node.name}
    for each in reversed(after):
        if each.name in above:
            above |= set(each.reads)
    return any(each.kind == "wait" and each.name in above for each in after)


@st.composite
def graphs(draw: st.DrawFn) -> list[Node]:
    """Each collective reads one node and is waited for somewhere after it; work reads up to three nodes."""
    nodes: list[Node] = [Node("n0", [])]
    started: list[str] = []
    for at in range(1, draw(st.integers(1, 40))):
        readable = [node.name for node in nodes if node.kind != "collective"]
        kind = draw(st.sampled_from(["work", "work", "work", "collective", "wait"]))
        if kind == "wait" and started:
            nodes.append(Node(f"n{at}", [started.pop(0)], "wait"))
        elif kind == "collective":
            nodes.append(Node(f"n{at}", [draw(st.sampled_from(readable))], "collective"))
            started.append(f"n{at}")
        else:
            nodes.append(Node(f"n{at}", draw(st.lists(st.sampled_from(readable), max_size=3, unique=True))))
    return nodes


@given(graphs())
def test_any_graph_keeps_its_meaning_and_its_memory(nodes: list[Node]) -> None:
    after = reordered(put_work_under_collectives, nodes)
    assert complaint(nodes, after) == ""
    assert max(memory_of(after)) <= max(memory_of(nodes))


def test_a_planted_wrong_is_told() -> None:
    nodes = graph_of("a >x<a x.<x b<x. >y<b y.<y c<y. d")
    assert complaint(nodes, nodes) == ""
    assert "before what it reads" in complaint(nodes, nodes[::-1])
    assert "not the same" in complaint(nodes, nodes[:-1])
    swapped = graph_of("a b >x<a >y<b x.<x y.<y")
    assert "another order" in complaint(swapped, [*swapped[:2], swapped[3], swapped[2], *swapped[4:]])
    late = graph_of("a b >x<a x.<x >y<x. y.<y >z<y. z.<z")
    assert "too far" in complaint(late, [*late[:1], *late[2:], late[1]])


BACKWARD = "a aw<a b<a bw<b >x<b x.<x t<x. >y<t y.<y c<y. cw<c d<c dw<d >z<d z.<z e<z."


def test_gradients_of_parameters_stand_under_exchanges() -> None:
    """The example of the module: what the next exchange does not need is computed while it, or the one after, runs."""
    after = " ".join(node.name for node in reordered(put_work_under_collectives, graph_of(BACKWARD)))
    assert after == "a b x aw x. t y bw y. c d z cw dw z. e"


def test_independent_work_is_brought_forward() -> None:
    """Of a block whose MLP is parallel to the attention, half stands under each of its two exchanges."""
    after = [
        node.name
        for node in reordered(
            put_work_under_collectives, graph_of("i j k q<i,j,k >x<q x.<x s<x. >y<s y.<y m n<m o<n,y.")
        )
    ]
    assert after[4:] == ["x", "m", "x.", "s", "y", "n", "y.", "o"]


def test_nothing_is_kept_across_the_peak_of_memory() -> None:
    """`h`, put off past the attention, would keep two values where attention takes most."""
    nodes = graph_of("a b c d<a,b,c g<a h<b,c >x<d x.<x t<x. u<x.,t v<x.,t,u w<v >y<w y.<y z<y.")
    anyhow = reordered(lambda given: inductor._under_collectives(given, set()), nodes)
    assert max(memory_of(anyhow)) > max(memory_of(nodes))
    after = [node.name for node in reordered(put_work_under_collectives, nodes)]
    assert after[4:8] == ["h", "x", "g", "x."]


def test_memory_is_what_a_step_takes() -> None:
    """The products make 1, 1 and 4 MiB; `relu`, a kernel of Inductor's own, writes over what it reads last."""
    seen: list[list[int]] = []

    def look(nodes: list[Any]) -> list[Any]:
        seen.append(inductor._memory(nodes))
        return nodes

    def program(x: Tensor, w: Tensor, wide: Tensor) -> Tensor:
        return torch.relu(torch.relu(x @ w) @ w) @ wide

    settings = {"reorder_for_compute_comm_overlap": True, "reorder_for_compute_comm_overlap_passes": [look]}
    inputs = [torch.randn(512, columns) for columns in (512, 512, 2048)]
    compiled = torch.compile(program, options=settings)
    compiled(*inputs)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        compiled(*inputs)
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    used = list(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    assert [bytes_in_use / 2**20 for bytes_in_use in seen[0]] == [1, 1, 2, 1, 5]
    assert max(used) == max(seen[0])


def products_under_exchanges() -> tuple[int, int]:
    """In the code of a training step: products between the start of an exchange and its wait, and exchanges."""
    torch.manual_seed(0)
    model, x = Parallel(width=32, heads=4, depth=2), torch.randn(1, 16, 32)
    compiled = torch.compile(model, backend=sp_backend)
    _, codes = run_and_get_code(lambda: compiled(x).backward())
    under = starts = 0
    on_the_way = False
    for line in "\n".join(codes).splitlines():
        called = re.match(r"\s*(?:\w+ = )?(?:torch\.ops\.)?(_c10d_functional\.\w+|extern_kernels)\.", line)
        name = called.group(1).rpartition(".")[2] if called else ""
        if name == "all_to_all_single":
            on_the_way, starts = True, starts + 1
        elif name == "wait_tensor":
            on_the_way = False
        elif name == "extern_kernels":
            under += on_the_way
    return under, starts


def test_the_code_computes_while_something_is_on_its_way(gloo2: GlooPool) -> None:
    """Two layers: the MLP forward, gradients of weights backward."""
    for under, starts in gloo2.run(products_under_exchanges):
        assert starts == 8 and under >= 6
