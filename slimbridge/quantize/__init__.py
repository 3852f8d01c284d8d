"""Quantization: grids, observers, and the quantizer."""

from slimbridge.quantize.grid import (
    grid_of,
    limits_of,
    step_array,
    to_integers,
    to_reals,
    zero_point_array,
)
from slimbridge.quantize.histogram import statistics_of
from slimbridge.quantize.quantizer import Quantizer, integer_weights, real_weights

__all__ = [
    "Quantizer",
    "grid_of",
    "integer_weights",
    "limits_of",
    "real_weights",
    "statistics_of",
    "step_array",
    "to_integers",
    "to_reals",
    "zero_point_array",
]
