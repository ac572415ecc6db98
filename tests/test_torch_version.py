"""Which versions of torch are tested, and what is said of another."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from sp_compile._torch_version import TESTED, is_tested, warn_of_another

ROOT = Path(__file__).parent.parent


def test_what_is_required_is_what_is_tested() -> None:
    (first, beyond) = re.findall(r'"torch>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text())[0]
    major, minor = TESTED[-1].split(".")
    assert (first, beyond) == (TESTED[0], f"{major}.{int(minor) + 1}")
    run = dict(re.findall(r"^(TORCH\w*) \?= torch==([\d.]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert [".".join(version.split(".")[:2]) for version in (run["TORCH"], run["TORCH_NEXT"])] == [*TESTED]


@pytest.mark.parametrize(
    ("version", "known"),
    [("2.13.0+cpu", True), ("2.14.1", True), ("2.15.0a0+git123", False), ("2.1.3", False), ("3.13", False)],
)
def test_another_version_is_warned_of(version: str, known: bool) -> None:
    assert is_tested(version) is known
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_another(version)
    assert len(caught) == (not known)
    for each in caught:
        assert f"is tested with torch 2.13 and 2.14, and this is {version}" in str(each.message)
