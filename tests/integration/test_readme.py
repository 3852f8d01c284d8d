"""The README: its script works as pasted on either framework, its table is the generated one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from slimbridge.support import updated

README = Path(__file__).parents[2] / "README.md"


def script() -> str:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[0]


@pytest.mark.parametrize("backend", ["torch", "paddle"])
def test_script_works_as_pasted(backend: str, tmp_path: Path) -> None:
    text = script().replace('backend="torch"', f'backend="{backend}"')
    assert f'backend="{backend}"' in text
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"plan digits on {backend}" in done.stdout
    assert (tmp_path / "runs/digits/report.html").exists()


def test_own_model_as_pasted(tmp_path: Path) -> None:
    text = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/mine/exports/onnx/model.onnx").exists()


def test_table_is_the_generated_one() -> None:
    text = README.read_text(encoding="utf-8")
    assert updated(text) == text, "run `make readme`"


def test_pictures_and_links_exist() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (README.parent / target).exists()] == []
