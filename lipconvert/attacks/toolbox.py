"""Attacks of the Adversarial Robustness Toolbox (extra ``attack``), drawn into the ball by what they find."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InvalidParameterError
from ..networks.network import Network
from .ascent import Attempt
from .ball import Ball
from .logits import logits
from .losses import margin_of

# Below, the toolbox's Square attack has tiles without pixels.
LEAST_SQUARE = 10


def toolbox_modules() -> tuple[Any, Any]:
    """The attacks and the classifiers of the Adversarial Robustness Toolbox."""
    try:
        return import_module("art.attacks.evasion"), import_module("art.estimators.classification")
    except ImportError as error:
        raise InvalidParameterError(
            "method", "'ensemble'", f"it needs the extra: pip install 'lipconvert[attack]' ({error})"
        ) from error


def toolbox_attempts(
    net: Network, toolbox: tuple[Any, Any], classes: int, box: tuple[float, float] | None, steps: int, seed: int
) -> list[Attempt]:
    """The toolbox's attacks that have a meaning for this network."""
    attacks, _ = toolbox

    def auto(loss: str) -> Callable[..., Any]:
        return lambda classifier, eps, **options: attacks.AutoProjectedGradientDescent(
            classifier, eps=eps, eps_step=2.0 * eps, max_iter=steps, nb_random_init=1, loss_type=loss, **options
        )

    makers = [auto("cross_entropy")]
    if classes > 2:
        makers.append(auto("difference_logits_ratio"))
    if box is not None and len(net.input_shape) == 3 and min(net.input_shape[1:]) >= LEAST_SQUARE:
        makers.append(partial(attacks.SquareAttack, max_iter=10 * steps))
    return [partial(_by_toolbox, net, toolbox, make, classes, seed) for make in makers]


class _Logits(nn.Module):
    """A network for the toolbox, which puts the modules it is given into training mode: this one holds none."""

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.logits = [net]

    def forward(self, x: Tensor) -> Tensor:
        net = self.logits[0]
        # Its Square attack divides by the norms of tiles, some of them 0.
        return net(torch.nan_to_num(x).to(net.device)).to(x)


def _by_toolbox(
    net: Network,
    toolbox: tuple[Any, Any],
    make: Callable[..., Any],
    classes: int,
    seed: int,
    ball: Ball,
    labels: Tensor,
    index: Tensor,
) -> tuple[Tensor, Tensor]:
    """An attack of the toolbox on a batch with one radius; what it returns is drawn into the ball."""
    del index
    _, classifiers = toolbox
    classifier = classifiers.PyTorchClassifier(
        _Logits(net),
        nn.CrossEntropyLoss(),
        net.input_shape,
        classes,
        clip_values=ball.box or (-math.inf, math.inf),
        device_type="cpu",
    )
    images = ball.x.reshape(-1, *net.input_shape).float().cpu().numpy()
    with _seeded(seed), torch.enable_grad(), np.errstate(all="ignore"):
        attempt = make(classifier, eps=float(ball.radius[0]), norm=2, batch_size=len(images), verbose=False)
        found = torch.from_numpy(attempt.generate(images, labels.cpu().numpy())).to(ball.x).flatten(1)
    point = ball.project(torch.where(torch.isfinite(found), found, ball.x))
    return point, margin_of(logits(net, point), labels)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators that the toolbox draws from, seeded inside and as they were afterwards."""
    state, state_of_numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(state_of_numpy)
