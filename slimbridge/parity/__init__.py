"""Parity: the comparison of two runs, and the one tolerance table."""

from slimbridge.parity.compare import compare
from slimbridge.parity.measure import differing, largest, relative
from slimbridge.parity.tolerances import TOLERANCES, Tolerance, tolerance

__all__ = ["TOLERANCES", "Tolerance", "compare", "differing", "largest", "relative", "tolerance"]
