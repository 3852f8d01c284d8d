"""Fixtures that all tests share: the backends, and the device that their models go to."""

from __future__ import annotations

from typing import Any

import pytest

from slimbridge.discovery import get_backend
from slimbridge.ports import Backend, Device

BACKENDS = ("torch", "paddle")


@pytest.fixture(scope="session")
def torch_backend() -> Backend:
    return get_backend("torch")


@pytest.fixture(scope="session")
def paddle_backend() -> Backend:
    return get_backend("paddle")


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: Any) -> Backend:
    return get_backend(request.param)


@pytest.fixture(scope="session")
def device(backend: Backend) -> Device:
    """The GPU where the backend has one, so that the same tests hold there."""
    return "gpu" if "gpu" in backend.capabilities().devices else "cpu"
