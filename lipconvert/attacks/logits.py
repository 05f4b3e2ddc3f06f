"""A network as a search over its inputs sees it: it stands still, and gives logits and gradients at flat samples (B, p)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import InvalidParameterError
from ..foundation.arguments import count
from ..foundation.integrity import require_own
from ..networks.network import Network


def require_network(net: Network) -> Network:
    """The network itself; `InvalidParameterError` for anything that is none."""
    if not isinstance(net, Network):
        raise InvalidParameterError(
            "net", type(net).__name__, "it must be a converted network: lipconvert.convert(model)"
        )
    return net


def require_counts(**counts: int) -> None:
    """`InvalidParameterError` for what is no whole number of at least one; numbers by their names."""
    for name, given in counts.items():
        count(given, name, "at least one is needed, a whole number")


def places(x: Tensor, seed: int, first: int) -> Tensor:
    """The places (B,) of the samples in the data, on the CPU."""
    _, first = (
        count(value, name, "it must be a whole number, not negative", least=0)
        for name, value in (("seed", seed), ("first", first))
    )
    return torch.arange(first, first + len(x))


@contextmanager
def standing_still(net: Network) -> Iterator[None]:
    """Inside, parameters take no gradient and unconverged solves raise; afterwards the network is as it was."""
    require_own(require_network(net))
    trained = [p for p in net.parameters() if p.requires_grad]
    options = [stage.options for stage in net.stages]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for stage in net.stages:
            stage.options = replace(stage.options, throw=True)
        # Gradients are taken inside also when the caller wants none.
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for stage, before in zip(net.stages, options, strict=True):
            stage.options = before


def logits(net: Network, x: Tensor) -> Tensor:
    """y (B, q) of flat samples (B, p)."""
    return net(x.reshape(-1, *net.input_shape))


def derived(net: Network, x: Tensor, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(y, v, g) at flat samples (B, p): the logits, v = value(y), and the gradient (B, p) of Σv."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = logits(net, x)
        v = value(y)
        (g,) = torch.autograd.grad(v.sum(), x)
    return y.detach(), v.detach(), g
