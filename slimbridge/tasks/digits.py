"""Scikit-learn's handwritten digits: 1,797 real grey images of 8x8 pixels in 10 classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimbridge.tasks.data import Data, DataError, Split

SIDE = 8
"""Side of the original images, pixels."""
LEVELS = 16.0
"""Largest grey value of the original images."""


def load(channels: int = 3, image_size: int = SIDE) -> Data:
    """The digits, a stratified quarter of them (450) for the test, always the same ones.

    Pixels are scaled to 0..1 and then normalised by the mean and the standard deviation of all pixels of the
    training part, so that the training part has mean 0 and variance 1.

    Args:
        channels: 1, or 3 for the grey value three times.
        image_size: side in pixels, at least 8; larger images are interpolated bilinearly (pixel centres at halves,
            borders repeated).

    Raises:
        DataError: channels or image_size is not allowed.
    """
    if channels not in (1, 3):
        raise DataError(f"digits: channels must be 1 or 3, found {channels!r}")
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < SIDE:
        raise DataError(f"digits: image_size must be an integer of at least {SIDE}, found {image_size!r}")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, targets = _enlarged(digits.images / LEVELS, image_size), digits.target.astype(np.int64)
    rows = train_test_split(np.arange(len(targets)), test_size=0.25, stratify=targets, random_state=0)
    mean, std = images[rows[0]].mean(), images[rows[0]].std()
    inputs = np.repeat(((images - mean) / std)[:, None], channels, axis=1).astype(np.float32)
    train, test = (Split(inputs[part], targets[part]) for part in rows)
    return Data(train, test, num_classes=10, name="digits")


def _enlarged(images: NDArray[Any], size: int) -> NDArray[np.float64]:
    """(N, 8, 8) -> (N, size, size), float64."""
    if size == SIDE:
        return np.asarray(images, dtype=np.float64)
    from scipy.ndimage import zoom

    factors = (1.0, size / SIDE, size / SIDE)
    return np.asarray(zoom(images, factors, order=1, mode="nearest", grid_mode=True), dtype=np.float64)
