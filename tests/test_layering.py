"""Who may import whom: a module imports its own layer and those below it, never above."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up. A package stands for all of its modules.
LAYERS = (
    {"errors", "_torch_version"},
    {
        "sharding",
        "rule",
        "sharded_dim",
        "transport",
        "exchange",
        "ops",
        "random_ops",
        "config",
        "group",
        "words",
        "structure",
        "links",
        "patch_embedding",
        "canonicalize",
        "opaque",
        "region",
        "sharded_input",
        "inductor",
        "capture",
        "dropped_backward",
        "accounts",
        "checksums",
        "tensor_kinds",
        "event",
        "guard",
        "guards",
        "gate",
        "peers",
        "samples",
        "watch",
    },
    {"rules", "graph", "features", "plan", "homes", "cost", "site_plans", "borrowers", "traffic", "functional", "data"},
    {"passes"},
    {"debug", "guarded_graph", "backend"},
    {"page", "report", "explain", "simulation", "comparison", "divergence", "verify", "doctor"},
    {"__main__"},
)
LAYER_OF = {name: number for number, layer in enumerate(LAYERS) for name in layer}


def source_of(module: str) -> Path:
    """The file of `passes.lower` (from sp_compile), be it a module or a package."""
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
    """`from ..rule import parse` in `rules.views` imports from `sp_compile.rule`."""
    if node.level == 0:
        return node.module or ""
    parts = ["sp_compile", *module.split(".")]
    ups = node.level - (source_of(module).name == "__init__.py")
    return ".".join(parts[: len(parts) - ups] + ([node.module] if node.module else []))


def resolve(name: str) -> str:
    """`sharding.Sharded` is `sharding`; `passes.lower.lower` is `passes.lower`."""
    while "." in name and not source_of(name).exists():
        name = name.rpartition(".")[0]
    return name


def complaints(source: str, module: str) -> list[str]:
    top = module.partition(".")[0]
    found = []
    for other in sorted(imported_modules(source, module) - {module}):
        other_top = other.partition(".")[0]
        if LAYER_OF.get(other_top, -1) > LAYER_OF[top]:
            found.append(f"{module} imports {other}, which is above it")
        if top == other_top == "passes" and module != "passes":
            found.append(f"{module} imports {other}: no pass imports another")
        if other_top == "capture" and top != "backend":
            found.append(f"{module} imports capture, which only the backend does")
    return found


@pytest.mark.parametrize("module", all_modules())
def test_imports_point_down(module: str) -> None:
    assert module.partition(".")[0] in LAYER_OF, f"{module} has no layer: add it to LAYERS"
    assert complaints(source_of(module).read_text(), module) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("sharding", "import sp_compile.backend", "sharding imports backend, which is above it"),
        ("errors", "from sp_compile.config import X", "errors imports config, which is above it"),
        ("rules.views", "from sp_compile import passes", "rules.views imports passes, which is"),
        ("passes.a", "def f():\n    import sp_compile.passes.b", "no pass imports another"),
        ("passes.a", "from . import b", "no pass imports another"),
        ("passes", "from ..backend import x", "passes imports backend, which is above it"),
        ("rules.a", "from ..passes.b import x", "rules.a imports passes, which is above it"),
        ("passes.a", "from sp_compile.capture import capture", "only the backend does"),
    ],
)
def test_a_planted_wrong_import_is_found(module: str, source: str, complaint: str) -> None:
    assert complaint in "\n".join(complaints(source, module))


def test_imports_that_are_right() -> None:
    assert complaints("from sp_compile.passes import lower", "passes") == []
    assert complaints("from . import lower", "passes") == []
    assert complaints("from ..rule import parse\nfrom .views import x", "rules.linear") == []
    assert complaints("from sp_compile.sharding import Sharded", "passes.lower") == []
    assert complaints("import sp_compile.capture, sp_compile.passes", "backend") == []


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
