"""Weights that runs start from, trained once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.quantized import PARTS, learned


@pytest.fixture(scope="session")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained weights of each net of `quantized`, equal for both frameworks."""
    return {name: learned(name, tmp_path_factory.mktemp(name) / "run") for name in PARTS}
