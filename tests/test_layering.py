"""Who may import whom: a module imports its own layer and those below it, never above."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up: folders, and the modules beside them.
LAYERS = (
    "errors",
    "_torch_version",
    "links",
    "placement",
    "ops",
    "rules",
    "ir",
    "planning",
    "passes",
    "config",
    "distributed",
    "capture",
    "pipeline",
    "guards",
    "runtime",
    "backend",
    "functional",
    "data",
    "tools",
    "__main__",
)
KNOWS_NO_GRAPH = {"distributed": {"errors", "links", "placement", "distributed"}}
"""What a folder imports that stands beside the planner."""


def source_of(module: str) -> Path:
    """The file of `rules.rule` (from sp_compile), be it a module or a package."""
    path = ROOT.joinpath("sp_compile", *module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def all_modules() -> list[str]:
    # A link to a folder is not followed by rglob, so passes/ is listed where it is.
    found = [path.relative_to(ROOT / "sp_compile") for path in (ROOT / "sp_compile").rglob("*.py")]
    found += [path.relative_to(ROOT) for path in (ROOT / "passes").rglob("*.py")]
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in found}
    return sorted(names - {"__init__"})


def imported_modules(source: str, module: str) -> set[str]:
    """The modules of sp_compile that `source`, the text of `module`, imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(node, module)
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    inside = {name.removeprefix("sp_compile.") for name in names if name.startswith("sp_compile.")}
    return {resolve(name) for name in inside}


def absolute(node: ast.ImportFrom, module: str) -> str:
    """`from ..rule import parse` in `rules.aten.views` imports from `sp_compile.rules.rule`."""
    if node.level == 0:
        return node.module or ""
    parts = ["sp_compile", *module.split(".")]
    ups = node.level - (source_of(module).name == "__init__.py")
    return ".".join(parts[: len(parts) - ups] + ([node.module] if node.module else []))


def resolve(name: str) -> str:
    """`links.Links` is `links`; `passes.propagate.propagate` is `passes.propagate`."""
    while "." in name and not source_of(name).exists():
        name = name.rpartition(".")[0]
    return name


def pass_of(module: str) -> list[str]:
    """`insert_collectives` of `passes.insert_collectives.writer`; none of `passes`."""
    return module.split(".")[1:2]


def complaints(source: str, module: str) -> list[str]:
    top = module.partition(".")[0]
    found = []
    for other in sorted(imported_modules(source, module) - {module}):
        other_top = other.partition(".")[0]
        if other_top not in LAYERS or LAYERS.index(other_top) > LAYERS.index(top):
            found.append(f"{module} imports {other}, which is above it")
        if other_top not in KNOWS_NO_GRAPH.get(top, {other_top}):
            found.append(f"{module} imports {other}: {top} knows no graph")
        if top == other_top == "passes" and module != "passes" and pass_of(module) != pass_of(other):
            found.append(f"{module} imports {other}: no pass imports another")
        if other == "capture.capture" and top != "pipeline":
            found.append(f"{module} imports {other}, which only the pipeline does")
    return found


@pytest.mark.parametrize("module", all_modules())
def test_imports_point_down(module: str) -> None:
    assert module.partition(".")[0] in LAYERS, f"{module} has no layer: add it to LAYERS"
    assert complaints(source_of(module).read_text(), module) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("placement.placements", "import sp_compile.backend", "placements imports backend, which is above it"),
        ("errors", "from sp_compile.config import X", "errors imports config, which is above it"),
        ("rules.aten.views", "from sp_compile import passes", "rules.aten.views imports passes, which is"),
        ("passes.a", "def f():\n    import sp_compile.passes.b", "no pass imports another"),
        ("passes.a", "from . import b", "no pass imports another"),
        ("passes", "from ..backend import x", "passes imports backend, which is above it"),
        ("passes.a", "from sp_compile.config import SequenceParallelConfig", "passes.a imports config, which is above"),
        ("planning.cost", "from ..distributed.group import x", "planning.cost imports distributed.group, which is"),
        ("rules.a", "from ..passes.b import x", "rules.a imports passes, which is above it"),
        ("distributed.group", "from ..ir.plan import x", "distributed knows no graph"),
        ("backend", "from sp_compile.capture.capture import capture", "only the pipeline does"),
    ],
)
def test_a_planted_wrong_import_is_found(module: str, source: str, complaint: str) -> None:
    assert complaint in "\n".join(complaints(source, module))


def test_imports_that_are_right() -> None:
    assert complaints("from sp_compile.passes import propagate", "passes") == []
    assert complaints("from . import propagate", "passes") == []
    writer = "from sp_compile.passes.insert_collectives.writer import GraphWriter"
    assert complaints(writer, "passes.insert_collectives.outputs") == []
    assert complaints("from ..rule import parse\nfrom .views import x", "rules.aten.linalg") == []
    assert complaints("from sp_compile.placement.placements import Sharded", "passes.propagate") == []
    assert complaints("import sp_compile.capture.capture, sp_compile.passes", "pipeline") == []


PICKLING = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
OBJECT_COLLECTIVES = {
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}
"""Of torch.distributed; they pickle."""
UNPICKLING_FUNCTIONS = {("data", "sync_data")}


def unpicklers(source: str, module: str) -> list[str]:
    """What `source`, the text of `module`, pickles or unpickles with, but in `UNPICKLING_FUNCTIONS`."""
    tree = ast.parse(source)
    allowed = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (module, node.name) in UNPICKLING_FUNCTIONS
        for inner in ast.walk(node)
    }
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and module not in {each for each, _ in UNPICKLING_FUNCTIONS}:
            used |= {alias.name for alias in node.names} & PICKLING
        elif isinstance(node, ast.ImportFrom):
            used |= {node.module} & PICKLING | {alias.name for alias in node.names} & {*OBJECT_COLLECTIVES, "load"}
        elif isinstance(node, ast.Attribute) and node.attr in {*OBJECT_COLLECTIVES, "load"} and node not in allowed:
            used.add(node.attr)
        elif isinstance(node, ast.Name) and node.id in PICKLING and node not in allowed:
            used.add(node.id)
    return sorted(filter(None, used))


@pytest.mark.parametrize("module", all_modules())
def test_nothing_is_unpickled_but_by_sync_data(module: str) -> None:
    assert unpicklers(source_of(module).read_text(), module) == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("guard", "import pickle", ["pickle"]),
        ("guard", "from pickle import loads", ["pickle"]),
        ("guard", "dist.all_gather_object(a, b)", ["all_gather_object"]),
        ("guard", "from torch.distributed import broadcast_object_list", ["broadcast_object_list"]),
        ("guard", "torch.load(path)", ["load"]),
        ("guard", "def sync_data():\n    import dill", ["dill"]),
        ("data", "import pickle\ndef sync_data():\n    pickle.loads(x)", []),
        ("data", "import pickle\ndef other():\n    pickle.loads(x)", ["pickle"]),
    ],
)
def test_a_planted_unpickler_is_found(module: str, source: str, found: list[str]) -> None:
    assert unpicklers(source, module) == found
