"""The PyTorch backend of slimbridge."""

from __future__ import annotations

from slimbridge_torch.backend import TorchBackend

__all__ = ["TorchBackend", "create"]


def create() -> TorchBackend:
    """The backend object, as the entry point "slimbridge.backends" expects it."""
    return TorchBackend()
