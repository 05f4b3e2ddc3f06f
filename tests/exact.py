"""The network of the floats in use in extended precision: equilibria by Newton's method, glue by its definition.

What counts is the residual, which is checked: a start may come from anywhere, here from the network's own solver.
And linear networks, whose constants have a closed form.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from plain import circulant
from torch import Tensor, nn

import lipconvert as lc

Wide = (
    np.longdouble
)  # 80 bits on x86; float64 on some machines, which is precise enough for bounds that are 20 times larger
Function = Callable[[np.ndarray, float], np.ndarray]

SIGMA: dict[str, tuple[Function, Function]] = {  # value, slope
    "identity": (lambda v, a: v, lambda v, a: np.ones_like(v)),
    "relu": (lambda v, a: np.maximum(v, 0), lambda v, a: (v > 0) * 1.0),
    "tanh": (lambda v, a: np.tanh(v), lambda v, a: 1 - np.tanh(v) ** 2),
    "sigmoid": (lambda v, a: 1 / (1 + np.exp(-v)), lambda v, a: np.exp(-abs(v)) / (1 + np.exp(-abs(v))) ** 2),
    "leaky_relu": (lambda v, a: np.where(v > 0, v, Wide(a) * v), lambda v, a: np.where(v > 0, 1.0, a)),
    "elu": (
        lambda v, a: np.where(v > 0, v, Wide(a) * np.expm1(np.minimum(v, 0))),
        lambda v, a: np.where(v > 0, 1.0, a * np.exp(np.minimum(v, 0))),
    ),
    "softplus": (lambda v, a: np.logaddexp(Wide(a) * v, Wide(0)) / Wide(a), lambda v, a: 1 / (1 + np.exp(-a * v))),
}


def _sigma(dae: lc.DAE, which: int, v: np.ndarray) -> np.ndarray:
    parts, offset = [], 0
    for activation, size in dae.sigma:
        width = size * dae.grid.pixels
        parts.append(SIGMA[activation.name][which](v[:, offset : offset + width], activation.parameter))
        offset += width
    return np.concatenate(parts, axis=1)


def flat(stage: lc.LBEN) -> tuple[np.ndarray, ...]:
    """(W, U, G, b_z, b_y) of the floats in use, on flattened images; a half spectrum counts as the mean of both halves."""
    dae = stage.running()
    W, U, G = (circulant(dae.grid.kernels(M)) if dae.grid else M for M in (dae.W, dae.U, dae.G))
    b_z, b_y = (b.repeat_interleave(dae.grid.pixels) for b in (dae.bias_z, dae.bias_y))
    return tuple(part.cpu().numpy() for part in (W, U, G, b_z, b_y))


def states(stage: lc.LBEN, x: np.ndarray) -> np.ndarray:
    """z = σ(Wz + Ux + b_z) for x (B, p, ...), on flattened images, to the last places of `Wide`."""
    dae = stage.running()
    W, U, _, b_z, _ = flat(stage)
    u = x.reshape(len(x), -1) @ U.T.astype(Wide) + b_z
    wide = W.T.astype(Wide)
    coordinates = dae.grid.coordinates(torch.from_numpy(u.astype(float)).reshape(len(x), -1, *dae.grid.image))
    start = lc.solve(lc.StateMap(dae.W, dae.blocks, dae.Lambda, grid=dae.grid), dae.sigma, coordinates)
    z = dae.grid.values(start.value).flatten(1).numpy().astype(Wide)
    size = 1e-300 + np.abs(z).max(1) + np.abs(u).max(1)
    for _ in range(6):
        v = z @ wide + u
        residual = z - _sigma(dae, 0, v)
        if (np.abs(residual).max(1) <= 4 * len(W) * np.finfo(Wide).eps * size).all():
            return z
        slopes = _sigma(dae, 1, v).astype(float)[:, :, None]
        z = z - np.linalg.solve(np.eye(len(W)) - slopes * W, residual.astype(float)[:, :, None])[:, :, 0]
    raise AssertionError(f"the reference did not converge: {np.abs(residual).max() / size.max():.1e}")


def _windows(y: np.ndarray, k: int) -> np.ndarray:
    b, c, h, w = y.shape
    return y.reshape(b, c, h // k, k, w // k, k)


def _glue(step: nn.Module, y: np.ndarray) -> np.ndarray:
    along = (1, -1) + (1,) * (y.ndim - 2)
    if isinstance(step, lc.Normalize):
        mean, std = (part.cpu().double().numpy().astype(Wide).reshape(along) for part in (step.mean, step.std))
        return (y - mean) / std
    if isinstance(step, lc.PadChannels):
        return np.pad(y, [(0, 0), (0, step.channels - y.shape[1]), *[(0, 0)] * (y.ndim - 2)])
    if isinstance(step, lc.FirstFeatures):
        return y[:, : step.features]
    if isinstance(step, lc.MeanPool | nn.AvgPool2d):
        k = step.kernel_size
        return _windows(y, k).sum((3, 5)) / (k if isinstance(step, lc.MeanPool) else k * k)
    if isinstance(step, nn.PixelUnshuffle):
        k = step.downscale_factor
        b, c, h, w = y.shape
        return _windows(y, k).transpose(0, 1, 3, 5, 2, 4).reshape(b, c * k * k, h // k, w // k)
    if isinstance(step, lc.MaxMin):
        first, second = np.split(y, 2, axis=1)
        return np.concatenate([np.maximum(first, second), np.minimum(first, second)], axis=1)
    if isinstance(step, nn.Flatten):
        return y.reshape(len(y), -1)
    if isinstance(step, nn.Linear):
        weight, bias = (part.detach().double().numpy().astype(Wide) for part in (step.weight, step.bias))
        return y @ weight.T + bias
    if isinstance(step, nn.ReLU | nn.Tanh | nn.Sigmoid):
        return SIGMA[type(step).__name__.lower()][0](y, 0.0)
    if isinstance(step, nn.Softplus):
        return SIGMA["softplus"][0](y, step.beta)
    raise NotImplementedError(repr(step))


def exact(net: lc.Network, x: Tensor) -> Tensor:
    """The output for the inputs as the network casts them, rounded to float64 once."""
    y = x.to(net.dtype).double().cpu().numpy().astype(Wide)
    for step in net.steps:
        if isinstance(step, lc.LBEN):
            _, _, G, _, b_y = flat(step)
            y = states(step, y) @ G.T.astype(Wide) + b_y
            y = y.reshape(len(y), -1, *step.grid.image)
        else:
            y = _glue(step, y)
    return torch.from_numpy(y.astype(float))


def pair_distances(rows: Tensor) -> Tensor:
    """‖r_i − r_j‖ for the rows of (q, p), or of each matrix of a batch."""
    return torch.linalg.vector_norm(rows.unsqueeze(-2) - rows.unsqueeze(-3), dim=-1)


def linear(*matrices: Tensor, glue: tuple[nn.Module, ...] = ()) -> lc.Network:
    """x ↦ … M₂(glue(M₁ x)): each matrix a stage whose states are its inputs, W = 0, U = I, G = M; glue behind the first."""
    stages = []
    for k, M in enumerate(matrices):
        p, L = M.shape[1], float(lc.spectral_norm(M))
        eye = torch.eye(p)
        sigma = lc.Activations("identity", p)
        dae = lc.DAE(0.0 * eye, eye, M, torch.full((p,), L), activations=sigma, lipschitz=L, name=f"M{k}")
        stages.append(lc.LBEN.from_dae(dae))
    steps = [stages[0], *glue, *stages[1:]]
    return lc.Network(steps, [None] * len(steps), (matrices[0].shape[1],))
