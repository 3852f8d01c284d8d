"""Scikit-learn's handwritten digits: 1,797 real grey images of 8x8 pixels in 10 classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimbridge.tasks.data import Data, DataError, Split

SIDE = 8
"""Side of the original images, pixels."""
LARGEST = 256
"""Side of the largest images made of them, pixels."""
LEVELS = 16.0
"""Largest grey value of the original images."""


def load(channels: int = 3, image_size: int = SIDE, shifts: bool = False) -> Data:
    """The digits, a stratified quarter of them (450) for the test, always the same ones.

    Pixels are scaled to 0..1 and then normalised by the mean and the standard deviation of all pixels of the
    training part, so that the training part has mean 0 and variance 1.

    Args:
        channels: 1, or 3 for the grey value three times.
        image_size: side in pixels, 8 to 256; larger images are interpolated bilinearly (pixel centres at halves,
            borders repeated).
        shifts: train also on each image moved by one of the original pixels to each of the four sides, which makes
            5 times as many.

    Raises:
        DataError: channels or image_size is not allowed.
    """
    if channels not in (1, 3):
        raise DataError(f"digits: channels must be 1 or 3, found {channels!r}")
    if not isinstance(shifts, bool):
        raise DataError(f"digits: shifts must be true or false, found {shifts!r}")
    if isinstance(image_size, bool) or not isinstance(image_size, int) or not SIDE <= image_size <= LARGEST:
        raise DataError(f"digits: image_size must be an integer {SIDE}..{LARGEST}, found {image_size!r}")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, targets = digits.images / LEVELS, digits.target.astype(np.int64)
    rows = train_test_split(np.arange(len(targets)), test_size=0.25, stratify=targets, random_state=0)
    mean, std = (statistic(_enlarged(images[rows[0]], image_size)) for statistic in (np.mean, np.std))
    parts = []
    for part, moved in zip(rows, (shifts, False), strict=True):
        moves = _MOVES if moved else _MOVES[:1]
        taken = np.concatenate([_moved(images[part], *move) for move in moves])
        inputs = np.repeat(((_enlarged(taken, image_size) - mean) / std)[:, None], channels, axis=1)
        parts.append(Split(inputs.astype(np.float32), np.tile(targets[part], len(moves))))
    return Data(parts[0], parts[1], num_classes=10, name="digits")


_MOVES = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))


def _moved(images: NDArray[Any], down: int, right: int) -> NDArray[Any]:
    """(N, H, W) moved by that many pixels, background (0) coming in at the border."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    height, width = images.shape[1:]
    return padded[:, 1 - down : 1 - down + height, 1 - right : 1 - right + width]


def _enlarged(images: NDArray[Any], size: int) -> NDArray[np.float64]:
    """(N, 8, 8) -> (N, size, size), float64."""
    if size == SIDE:
        return np.asarray(images, dtype=np.float64)
    from scipy.ndimage import zoom

    factors = (1.0, size / SIDE, size / SIDE)
    return np.asarray(zoom(images, factors, order=1, mode="nearest", grid_mode=True), dtype=np.float64)
