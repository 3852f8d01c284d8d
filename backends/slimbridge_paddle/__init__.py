"""The PaddlePaddle backend of slimbridge (Paddle 3.3.x)."""

from __future__ import annotations

from slimbridge.ports import Backend
from slimbridge_paddle import _compat  # imports Paddle first, and quietly
from slimbridge_paddle.backend import PaddleBackend

__all__ = ["PaddleBackend", "create"]

_compat.check_version()


def create() -> Backend:
    """The backend; the entry point "slimbridge.backends" names this function."""
    return PaddleBackend()
