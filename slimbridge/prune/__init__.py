"""Pruning: importances, selection, and the pruner."""

from slimbridge.prune.pruner import Pruner
from slimbridge.prune.select import remove_count
from slimbridge.prune.verify import zeroed

__all__ = ["Pruner", "remove_count", "zeroed"]
