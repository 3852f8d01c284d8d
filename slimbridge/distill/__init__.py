"""Distillation: losses and the distiller."""

from slimbridge.distill.distiller import Distiller, missing_paths, terms
from slimbridge.distill.losses import hard_labels, l2_feature, soft_labels

__all__ = ["Distiller", "hard_labels", "l2_feature", "missing_paths", "soft_labels", "terms"]
