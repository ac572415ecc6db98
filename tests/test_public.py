"""What `import sp_compile` gives, and what it does not need."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import sp_compile
from sp_compile import rewritten_graphs, unsharded_graphs

IMPORTED = """
import sys
sys.modules["numpy"] = None  # torch does without it, and so do we
import torch._dynamo  # has parts of Inductor itself
before = set(sys.modules)
import sp_compile
heavy = ("torch._inductor", "matplotlib", "tqdm", "transformers")
print([name for name in set(sys.modules) - before if name.startswith(heavy)])
print(callable(sp_compile.explain), callable(sp_compile.verify))
"""


def test_what_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\nTrue True\n", done.stderr


def test_public_names() -> None:
    assert [name for name in sp_compile.__all__ if not hasattr(sp_compile, name)] == []
    assert sp_compile.__version__ == version("sp-compile")
    assert isinstance(rewritten_graphs(), list) and isinstance(unsharded_graphs(), list)
