"""Shared by all tests: float64, seeded, one thread; random models; a plain evaluation of a DAE."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from lipconvert_plugins.aol import AOLLinear
from lipconvert_plugins.cpl import CPLLinear
from lipconvert_plugins.g_mondeq import GMonDEQ
from lipconvert_plugins.mondeq import MonDEQ
from lipconvert_plugins.sandwich import SandwichLinear
from lipconvert_plugins.sll import SLLLinear
from pretended_device import PretendedDevice
from torch import Tensor, nn
from torch.nn import functional

import lipconvert as lc


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture(params=[pytest.param("real", marks=pytest.mark.gpu), "pretended"])
def device(request: pytest.FixtureRequest, reproducible: None) -> Iterator[None]:
    """A CUDA device: a real one, where there is one, and one that is pretended on the CPU."""
    with PretendedDevice() if request.param == "pretended" else nullcontext():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


SIGMA: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda v, a: v,
    "relu": lambda v, a: torch.relu(v),
    "tanh": lambda v, a: torch.tanh(v),
    "sigmoid": lambda v, a: torch.sigmoid(v),
    "leaky_relu": lambda v, a: functional.leaky_relu(v, a),
    "softplus": lambda v, a: functional.softplus(v, a, threshold=100.0 * a),
}


def _evaluate(dae: lc.DAE, x: Tensor) -> Tensor:
    W, U, G, _ = dae
    assert bool((W.triu() == 0).all()), "only an explicit network is evaluated row by row"
    rows = [activation for activation, size in dae.sigma for _ in range(size)]
    z = x.new_zeros(len(x), len(rows))
    for i, activation in enumerate(rows):
        v = z @ W[i] + x @ U[i] + dae.bias_z[i]
        z[:, i] = SIGMA[activation.name](v, activation.parameter)
    return z @ G.mT + dae.bias_y


@pytest.fixture(scope="session")
def evaluate() -> Callable[[lc.DAE, Tensor], Tensor]:
    """y of a DAE with strictly lower triangular W, one state after the other: (B, p) -> (B, q)."""
    return _evaluate


def _shake(model: nn.Module) -> nn.Module:
    # Weights of size about 1/sqrt(fan-in), biases and diagonal parameters of size about 1/2.
    for parameter in model.parameters():
        fan = parameter.shape[-1] if parameter.dim() == 2 else 4
        if parameter.dim():
            nn.init.normal_(parameter, std=fan**-0.5)
    return model


def _random_model(kind: str, size: int, seed: int, activation: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(1000 * seed + size)
    widths = torch.randint(1, 6, (size + 2,)).tolist()
    act = nn.ReLU() if activation is None else activation
    if kind in ("sll", "cpl"):
        residual = SLLLinear if kind == "sll" else CPLLinear
        d = widths[0] + 1
        model = nn.Sequential(*[residual(d, h, activation=act) for h in widths[1 : size + 1]])
    elif kind == "aol":
        model = nn.Sequential()
        for k in range(size + 1):
            model.append(AOLLinear(widths[k], widths[k + 1]))
            if k < size:
                model.append(copy.deepcopy(act))
    elif kind == "sandwich":
        model = nn.Sequential()
        root = 2.5**0.5  # L = 2.5
        for k in range(size + 1):
            scale = root if k in (0, size) else 1.0
            model.append(SandwichLinear(widths[k], widths[k + 1], activation=act if k < size else None, scale=scale))
    elif kind in ("mondeq", "g_mondeq"):
        m = 0.3 + 0.2 * (seed % 5)
        model = (MonDEQ if kind == "mondeq" else GMonDEQ)(widths[0], size, widths[-1], m=m, activation=act)
    else:
        raise AssertionError(kind)
    return _shake(model)


@pytest.fixture(scope="session")
def random_model() -> Callable[..., nn.Module]:
    """``random_model(kind, size, seed, activation)``: the depth is the size of an explicit network, the number of states
    that of an equilibrium one. Widths are random and rectangular, biases are not zero; a sandwich network has L = 2.5."""
    return _random_model
