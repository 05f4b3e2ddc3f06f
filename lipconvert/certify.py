"""Certified accuracy: how many samples are right, and provably stay right within a radius."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .errors import InvalidParameterError, ShapeError
from .network import Network
from .schema import RobustnessReport

RADII = (36 / 255, 72 / 255, 108 / 255, 1.0)
METHODS = ("prescribed",)


def certified_radii(net: Network, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per sample of a batch: (radius, correct, converged, error), each (B,), float64 and bool.

    The margin of the label over every other logit, less what the solver may have left in their difference, divided by √2·L:

        radius = ( y_label − max_j y_j − √2·error ) / (√2·L)

    Logit differences have constant √2·L, and an output error of norm e moves one by at most √2·e. Negative: not certified
    at any radius; −∞ where the solve did not converge. Round-off of the evaluation itself is not yet included.
    Raises `ShapeError` for labels or logits that do not fit, `NoCertificateError` (see `Network.evaluate`).
    """
    evaluation = net.evaluate(x)
    y = evaluation.value.double()
    if y.dim() != 2 or y.shape[1] < 2:
        raise ShapeError("the logits", "(B, at least 2)", tuple(y.shape))
    if labels.shape != (len(y),):
        raise ShapeError("labels", (len(y),), tuple(labels.shape))
    if labels.is_floating_point() or labels.is_complex():
        raise InvalidParameterError("the dtype of the labels", labels.dtype, "labels must be integers")
    labels = labels.to(y.device).long()
    wrong = labels[(labels < 0) | (labels >= y.shape[1])]
    if len(wrong):
        raise InvalidParameterError("a label", int(wrong[0]), f"the network has the classes 0..{y.shape[1] - 1}")
    own = y.gather(1, labels[:, None]).squeeze(1)
    others = y.scatter(1, labels[:, None], -math.inf).amax(1)
    radius = (own - others - math.sqrt(2.0) * evaluation.error) / (math.sqrt(2.0) * net.lipschitz)
    # Without a finite error nothing is known of a sample, however its solve ended.
    known = evaluation.converged & torch.isfinite(evaluation.error)
    return torch.where(known, radius, -math.inf), own > others, known, evaluation.error


def certify(
    net: Network,
    data: Any,
    radii: Sequence[float] = RADII,
    method: str = "prescribed",
    *,
    batch_size: int = 256,
) -> RobustnessReport:
    """Natural and certified accuracy of a network on a data set.

    ``data``: a map-style data set of (input, label), or a data loader of batches. ``radii``: l2, in the units of the input
    ([0, 1] pixels), by default 36/255, 72/255, 108/255 and 1. ``method="prescribed"``: certified at ε when the margin is
    strictly greater than √2·L·ε, with the network's own L, the solver's error subtracted first (`certified_radii`).
    A sample counts as certified only if it is also classified correctly and its solve converged.

    Raises `InvalidParameterError` for a negative radius, an unknown method or an empty data set, `ShapeError` for inputs or
    labels that do not fit.
    """
    if not isinstance(net, Network):
        raise InvalidParameterError(
            "net",
            type(net).__name__,
            "only a converted network has a constant to certify with: lipconvert.convert(model)",
        )
    if method not in METHODS:
        raise InvalidParameterError("method", repr(method), f"it must be one of {', '.join(METHODS)}")
    if isinstance(radii, str) or not isinstance(radii, Sequence):
        raise InvalidParameterError("radii", repr(radii), "it must be a list of numbers")
    if not radii or not all(0.0 <= r < math.inf for r in radii):
        raise InvalidParameterError("radii", list(radii), "at least one is needed, none of them negative or infinite")
    device = net.device
    if not isinstance(data, DataLoader) and (isinstance(data, str) or not hasattr(data, "__getitem__")):
        raise InvalidParameterError("data", type(data).__name__, "it must be a map-style data set or a DataLoader")
    loader = data if isinstance(data, DataLoader) else DataLoader(data, batch_size=batch_size)
    thresholds = torch.tensor(sorted(float(r) for r in radii), dtype=torch.float64, device=device)
    samples = natural = unconverged = 0
    certified = torch.zeros(len(thresholds), dtype=torch.long, device=device)
    worst = 0.0
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(b, Tensor) for b in batch):
            raise InvalidParameterError("data", type(batch).__name__, "its samples must be pairs (input tensor, label)")
        x, labels = batch
        radius, correct, converged, error = certified_radii(net, x.to(net.device), labels)
        samples += len(correct)
        natural += int((correct & converged).sum())
        unconverged += int((~converged).sum())
        certified += ((radius[:, None] > thresholds) & correct[:, None]).sum(0)
        worst = max(worst, float(error[converged].max()) if bool(converged.any()) else 0.0)
    if samples == 0:
        raise InvalidParameterError("data", "empty", "there is nothing to certify")
    return RobustnessReport(
        method="prescribed",
        lipschitz=net.lipschitz,
        samples=samples,
        natural_accuracy=natural / samples,
        radii=thresholds.tolist(),
        certified_accuracy=[int(count) / samples for count in certified],
        unconverged=unconverged,
        worst_error=worst,
    )
