"""Pruning: importances, selection, and the pruner."""

from slimbridge.prune.pruner import Pruner
from slimbridge.prune.select import least_important, remove_count, unit_importance
from slimbridge.prune.verify import zeroed

__all__ = ["Pruner", "least_important", "remove_count", "unit_importance", "zeroed"]
