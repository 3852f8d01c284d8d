"""What holds for the source as a whole: who imports whom, no prints, small files, one table of tolerances."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = sorted(ROOT.glob("slimbridge/**/*.py"))
BACKENDS = {name: sorted(ROOT.glob(f"backends/slimbridge_{name}/*.py")) for name in ("torch", "paddle")}
LIBRARY = [*CORE, *BACKENDS["torch"], *BACKENDS["paddle"]]
TESTS = sorted(ROOT.glob("tests/**/*.py"))
FRAMEWORKS = {"torch": {"torch", "torchao", "torch_pruning"}, "paddle": {"paddle", "paddleslim"}}
LONGEST = 400
KEYWORDS = {"atol", "rtol", "rel", "abs", "rel_tol", "abs_tol"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, at any depth of its code."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module or ""


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_files_are_found() -> None:
    assert min(len(CORE), len(BACKENDS["torch"]), len(BACKENDS["paddle"])) > 5


@pytest.mark.parametrize("path", CORE, ids=label)
def test_the_core_imports_no_framework_and_no_backend(path: Path) -> None:
    assert not tops(path) & {*FRAMEWORKS["torch"], *FRAMEWORKS["paddle"], "slimbridge_torch", "slimbridge_paddle"}


@pytest.mark.parametrize(("name", "other"), [("torch", "paddle"), ("paddle", "torch")])
def test_a_backend_knows_its_framework_and_the_contract(name: str, other: str) -> None:
    contract = {"slimbridge.ports", "slimbridge.graph", "slimbridge.decisions", "slimbridge.errors"}
    for path in BACKENDS[name]:
        found = set(imported(path))
        assert not {top.partition(".")[0] for top in found} & {*FRAMEWORKS[other], f"slimbridge_{other}"}, path
        core = {module for module in found if module.partition(".")[0] == "slimbridge"}
        assert {".".join(module.split(".")[:2]) for module in core} <= contract, path


@pytest.mark.parametrize("package", ["prune", "quantize", "distill"])
def test_the_algorithms_do_not_know_each_other(package: str) -> None:
    others = {f"slimbridge.{name}" for name in ("prune", "quantize", "distill") if name != package}
    for path in ROOT.glob(f"slimbridge/{package}/*.py"):
        assert not {".".join(module.split(".")[:2]) for module in imported(path)} & others, path


def test_no_branch_on_a_backends_name() -> None:
    """A table, an entry point or a capability instead of a comparison with "torch" or "paddle"."""
    for path in CORE:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Compare):
                sides = {part.value for part in (node.left, *node.comparators) if isinstance(part, ast.Constant)}
                assert not sides & {"torch", "paddle"}, f"{label(path)}:{node.lineno}"


@pytest.mark.parametrize("path", LIBRARY, ids=label)
def test_a_library_file_is_quiet_and_of_readable_length(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{label(path)}:{node.lineno}"
    assert ast.get_docstring(tree(path)), "a module says what it is for"


MAY_RAISE_ANYTHING = (
    "slimbridge/conformance/suite.py",
    "backends/slimbridge_torch/trace.py",
    "backends/slimbridge_paddle/capture.py",
)


def test_no_blanket_except() -> None:
    """But in the suite, and where a user's forward is traced: what is under test there may raise anything."""
    for path in LIBRARY:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and label(path) not in MAY_RAISE_ANYTHING:
                names = [part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)] if node.type else [""]
                assert not {"", "Exception", "BaseException"} & set(names), f"{label(path)}:{node.lineno}"


def literals(path: Path) -> list[int]:
    """Lines of calls that are given a tolerance as a number of their own."""
    lines = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                numbers = [part for part in ast.walk(keyword.value) if isinstance(part, ast.Constant)]
                if keyword.arg in KEYWORDS and any(isinstance(part.value, (int, float)) for part in numbers):
                    lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", TESTS, ids=label)
def test_tolerances_come_from_the_table(path: Path) -> None:
    assert literals(path) == []
