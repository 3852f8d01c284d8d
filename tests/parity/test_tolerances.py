"""The one table of tolerances, and the measures that are held against it."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from slimbridge.parity import TOLERANCES, differing, largest, relative, tolerance

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("slimbridge/**/*.py"), *ROOT.glob("tests/**/*.py")])


def words(path: Path) -> set[str]:
    """Every string of a file that stands alone (a row is named in a call, a tuple or a mapping)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("name", list(TOLERANCES))
def test_a_row_has_a_reason_and_a_use(name: str) -> None:
    row = tolerance(name)
    assert row.value >= 0
    assert len(row.reason.split()) >= 4
    assert row.unit
    table = ROOT / "slimbridge" / "parity" / "tolerances.py"
    assert any(name in words(path) for path in FILES if path not in (table, Path(__file__))), f"nobody uses '{name}'"


def test_an_unknown_row_is_an_error() -> None:
    with pytest.raises(KeyError):
        tolerance("frward")


def test_relative() -> None:
    assert relative(np.array([3.0, 4.0]), np.array([0.0, 0.0])) == 5.0
    assert relative(np.array([3.0, 5.0]), np.array([3.0, 4.0])) == 0.2
    assert relative(np.zeros(3), np.zeros(3)) == 0.0
    assert relative(np.zeros(3), np.zeros(4)) == np.inf
    assert relative(np.array([np.nan]), np.array([np.nan])) == np.inf
    assert relative(np.zeros(0), np.zeros(0)) == 0.0


def test_relative_keeps_what_float32_would_lose() -> None:
    a = np.full(1000, 1.0, np.float32)
    assert relative(np.nextafter(a, np.float32(2)), a) == float(np.finfo(np.float32).eps)


def test_largest() -> None:
    assert largest(np.array([1.0, -2.0]), np.array([1.5, 2.0])) == 4.0
    assert largest(np.zeros(0), np.zeros(0)) == 0.0
    assert largest(np.zeros(3), np.zeros((3, 1))) == np.inf
    assert largest(np.array([np.inf]), np.array([np.inf])) == np.inf


def test_differing() -> None:
    a = {"x": np.array([1, 2, 3]), "y": np.zeros((2, 2))}
    assert differing(a, a) == 0
    assert differing(a, {"x": np.array([1, 0, 0]), "y": np.zeros((2, 2))}) == 2
    assert differing(a, {"x": np.array([1, 2, 3])}) == 4
    assert differing({"x": np.zeros(3)}, {"x": np.zeros(4)}) == 3
    nan = {"x": np.array([np.nan])}
    assert differing(nan, nan) == 1, "what is not a number is equal to nothing"


@pytest.mark.parametrize("row", ["decision", "macs", "integers", "fake_quant"])
def test_what_is_exact_has_no_tolerance(row: str) -> None:
    assert tolerance(row).value == 0.0
