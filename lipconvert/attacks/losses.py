"""What an attack climbs: functions of logits y (B, q) and labels (B,) that grow as the label is left behind."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional


def rivals(y: Tensor, labels: Tensor) -> Tensor:
    """The logits without that of the label: −∞ in its place."""
    return y.scatter(1, labels[:, None], -math.inf)


def logit_of(y: Tensor, labels: Tensor) -> Tensor:
    """y_label, (B,)."""
    return y.gather(1, labels[:, None]).squeeze(1)


def margin_of(y: Tensor, labels: Tensor) -> Tensor:
    """y_label − max_{j≠label} y_j, (B,); in floats it is positive exactly where the label is strictly the largest."""
    return logit_of(y, labels) - rivals(y, labels).amax(1)


def _margin_loss(y: Tensor, labels: Tensor) -> Tensor:
    return -margin_of(y, labels)


def _cross_entropy(y: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(y, labels, reduction="none")


def _dlr(y: Tensor, labels: Tensor) -> Tensor:
    if y.shape[1] < 3:  # there is no third logit
        return -margin_of(y, labels)
    top = y.topk(3, dim=1).values
    return -margin_of(y, labels) / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "margin": _margin_loss,
    "cross_entropy": _cross_entropy,
    "dlr": _dlr,
}
