"""Random streams named by a seed and words, the same on every framework and machine."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from slimbridge.errors import SlimbridgeError


def generator(seed: int, *stream: int | str) -> np.random.Generator:
    """A generator of its own for each (seed, *stream): counter-based Philox, keyed by a hash of the arguments.

    Args:
        seed: any integer.
        stream: what the numbers are for, e.g. ("order", 3); 1 and "1" are different streams.

    Raises:
        SlimbridgeError: an argument is neither an integer nor (in `stream`) a string.
    """
    return np.random.Generator(_philox(seed, stream))


def epoch_order(n: int, seed: int, *stream: int | str) -> NDArray[np.int64]:
    """A permutation of 0..n-1 that depends on the arguments only, shape (n,).

    It sorts raw Philox words, which NumPy promises to keep (NEP 19); the order of its own shuffles it does not.

    Args:
        n: number of samples, at least 1.
        seed: the run's seed.
        stream: what the order is for, usually the stage's name and the epoch.

    Raises:
        SlimbridgeError: n is below 1, or an argument has a wrong type.
    """
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise SlimbridgeError(f"order: the number of samples must be an integer of at least 1, found {n!r}")
    words = _philox(seed, stream).random_raw(int(n))
    return np.argsort(words, kind="stable").astype(np.int64)


def _philox(seed: int, stream: tuple[int | str, ...]) -> np.random.Philox:
    if not isinstance(seed, (int, np.integer)):
        raise SlimbridgeError(f"random stream: the seed must be an integer, found {seed!r}")
    parts = [_tagged("seed", seed), *(_tagged("stream", part) for part in stream)]
    digest = sha256("\x00".join(parts).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


def _tagged(what: str, part: object) -> str:
    """A text that differs for 1 and "1", and that no other sequence of parts can imitate (length first)."""
    if isinstance(part, str):
        return f"s{len(part)}:{part}"
    if isinstance(part, (int, np.integer)) and not isinstance(part, bool):
        return f"i:{int(part)}"
    raise SlimbridgeError(f"random stream: {what} must be an integer or a string, found {part!r}")
