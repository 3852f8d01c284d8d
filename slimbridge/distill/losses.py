"""Losses of distillation, written once over a backend's ops. Logits are (N, classes), features (N, ...)."""

from __future__ import annotations

from slimbridge.plan.registries import LOSSES, DistillLoss
from slimbridge.ports import Ops, Tensor


def hard_labels(ops: Ops, student: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy with integer labels, mean over the batch: -mean_n log softmax(student_n)[label_n].

    Args:
        ops: the backend's operations.
        student: logits, shape (N, classes).
        labels: integers 0..classes-1, shape (N,).

    Returns:
        scalar, 0 or more.
    """
    targets = ops.one_hot(labels, ops.shape(student)[-1], student)
    return -ops.mean(ops.sum(targets * ops.log_softmax(student, -1), axis=-1))


def soft_labels(ops: Ops, student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 times the Kullback-Leibler divergence of softened outputs, mean over the batch.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2; the factor T^2 keeps
    gradients at the size of those of the hard labels. PyTorch's name for this reduction is "batchmean".

    Args:
        ops: the backend's operations.
        student, teacher: logits, shape (N, classes).
        temperature: T, above 0.

    Returns:
        scalar, 0 or more.
    """
    log_p = ops.log_softmax(teacher / temperature, -1)
    log_q = ops.log_softmax(student / temperature, -1)
    divergence = ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)
    return ops.mean(divergence) * temperature**2


def l2_feature(ops: Ops, student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two feature maps of one shape, over all entries.

    Source: Romero et al. 2015, "FitNets", equation 3 without the regressor, as a mean instead of half a sum.

    Args:
        ops: the backend's operations.
        student, teacher: equal shapes (N, ...).

    Returns:
        scalar, 0 or more.
    """
    difference = student - teacher
    return ops.mean(difference * difference)


LOSSES.register("hard_labels")(DistillLoss(hard_labels, "labels", False, "cross entropy"))
LOSSES.register("soft_labels")(DistillLoss(soft_labels, "teacher", True, "Hinton et al. 2015"))
LOSSES.register("l2_feature")(DistillLoss(l2_feature, "feature", False, "Romero et al. 2015"))
