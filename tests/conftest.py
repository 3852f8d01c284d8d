"""Fixtures that all tests share: the backends, and the device that their models go to."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# The nets are tiny: more threads only wait for each other, many times longer where tests share the processor.
# Before the first import of a framework, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from slimbridge.discovery import get_backend
from slimbridge.ports import Backend, Device

# The same examples each time, and no deadlines: a test that fails fails for everybody.
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.register_profile("search", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

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
