"""Quantization: grids, observers, and the quantizer."""

from slimbridge.quantize.grid import symmetric_limit, symmetric_step, to_integers, to_reals
from slimbridge.quantize.quantizer import Quantizer, integer_weights, real_weights

__all__ = [
    "Quantizer",
    "integer_weights",
    "real_weights",
    "symmetric_limit",
    "symmetric_step",
    "to_integers",
    "to_reals",
]
