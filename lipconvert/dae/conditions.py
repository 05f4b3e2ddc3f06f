"""The conditions the paper states, on any DAE: (3), (4), (10), and the multipliers that make them strict.

    X(Λ)    = 2Λ − ΛW − W′Λ                                                          left side of (3)   (FORMULAS 0.2)
    H(Λ, L) = X(Λ) − G′G/L − ΛUU′Λ/L                                         left side of (4), (10)     (FORMULAS 0.1)

Margins are least eigenvalues in the gauge Λ = I, that is of Λ^{-1/2} H Λ^{-1/2}: there they do not depend on how the
states happen to be scaled. They are LAPACK's eigenvalues in float64, good to round-off; not yet a proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidParameterError, ShapeError
from ..foundation.arguments import isolated, number
from ..linalg.spectrum import add_gram, least_eigenvalue, roundoff
from ..linalg.state_map import StateMap, falling_weights
from .dae import DAE


def X_matrix(dae: DAE, Lambda: Tensor | None = None) -> Tensor:
    """X(Λ) = 2Λ − ΛW − W′Λ, (..., n, n), float64. Λ defaults to the DAE's own. (FORMULAS 0.2)"""
    Lambda = dae.Lambda if Lambda is None else Lambda
    LW = Lambda.unsqueeze(-1) * dae.W
    X = (LW + LW.mH).neg_()
    X.diagonal(dim1=-2, dim2=-1).add_(2.0 * Lambda)
    return X


def H_matrix(dae: DAE, Lambda: Tensor | None = None, lipschitz: float | None = None) -> Tensor:
    """H(Λ, L) = X(Λ) − G′G/L − ΛUU′Λ/L, (..., n, n), float64. Λ and L default to the DAE's own. (FORMULAS 0.1)"""
    Lambda = dae.Lambda if Lambda is None else Lambda
    L = dae.lipschitz if lipschitz is None else lipschitz
    LU = Lambda.unsqueeze(-1) * dae.U
    H = add_gram(X_matrix(dae, Lambda), dae.G, -1.0 / L)
    return add_gram(H, LU.mH, -1.0 / L)


def unit_gauge(M: Tensor, Lambda: Tensor) -> Tensor:
    """Λ^{-1/2} M Λ^{-1/2}, (..., n, n): the matrix in the gauge Λ = I (FORMULAS L4)."""
    root = Lambda.rsqrt()
    return (root.unsqueeze(-1) * M).mul_(root)


def H_scale(dae: DAE, Lambda: Tensor | None = None, lipschitz: float | None = None) -> float:
    """Size of the terms that add up to Λ^{-1/2} H Λ^{-1/2}: what its round-off is measured against."""
    Lambda = dae.Lambda if Lambda is None else Lambda
    L = dae.lipschitz if lipschitz is None else lipschitz
    root = Lambda.sqrt()
    terms = ((root.unsqueeze(-1) * dae.W).div_(root), dae.G / root, root.unsqueeze(-1) * dae.U)
    norms = [float(torch.linalg.matrix_norm(term).amax()) for term in terms]
    return 2.0 + 2.0 * norms[0] + (norms[1] ** 2 + norms[2] ** 2) / L


@dataclass(frozen=True)
class Conditions:
    """What `check` measured.

    ``margin_3``: λ_min of X in the gauge Λ = I; > 0 means well-posed (Proposition 2.1). Half of it is μ, X ⪰ 2μΛ.
    ``margin_10``: λ_min of H in the gauge Λ = I; ≥ 0 means L-Lipschitz if well-posed (Theorem 3.1), > 0 is (4)
    (Proposition 2.2). ``least_eigenvalue``: λ_min of H itself. ``tolerance``: round-off of both margins.
    ``contracting``: the spectral radius of |W| is below 1, as for every triangular W: σ(Wz + u) is then a contraction in a
    weighted maximum norm (`StateMap.comparison`). ``well_posed``: one of the two.
    """

    margin_3: float
    margin_10: float
    least_eigenvalue: float
    tolerance: float
    contracting: bool
    lipschitz: float

    @property
    def condition_3(self) -> bool:
        """X(Λ) ≻ 0 beyond round-off."""
        return self.margin_3 > self.tolerance

    @property
    def condition_4(self) -> bool:
        """H(Λ, L) ≻ 0 beyond round-off."""
        return self.margin_10 > self.tolerance

    @property
    def condition_10(self) -> bool:
        """H(Λ, L) ⪰ 0 up to round-off."""
        return self.margin_10 >= -self.tolerance

    @property
    def well_posed(self) -> bool:
        """A unique equilibrium exists for every input."""
        return self.contracting or self.condition_3

    @property
    def mu(self) -> float:
        """The largest μ with X ⪰ 2μΛ (0 when (3) fails): the monotonicity of I − W in the metric Λ."""
        return max(self.margin_3 / 2.0, 0.0)


@isolated
def check(dae: DAE, Lambda: Tensor | None = None, lipschitz: float | None = None) -> Conditions:
    """Measure conditions (3), (4) and (10) of a DAE at (Λ, L), by default its own.

    ``Lambda`` (n,) positive. Returns `Conditions`; raises `ShapeError`, and `InvalidParameterError` for Λ ≤ 0 or L ≤ 0.
    """
    Lambda = dae.Lambda if Lambda is None else Lambda.to(dae.Lambda)
    L = (
        dae.lipschitz
        if lipschitz is None
        else number(lipschitz, "lipschitz", "it must be positive and finite", above=0.0)
    )
    if Lambda.shape != dae.Lambda.shape:
        raise ShapeError("Lambda", tuple(dae.Lambda.shape), tuple(Lambda.shape))
    if not bool((Lambda > 0).all()):
        raise InvalidParameterError("Lambda", float(Lambda.min()), "every entry of Λ must be positive")
    H = H_matrix(dae, Lambda, L)
    gauged = unit_gauge(H, Lambda)
    scale = H_scale(dae, Lambda, L)
    return Conditions(
        margin_3=least_eigenvalue(unit_gauge(X_matrix(dae, Lambda), Lambda)),
        margin_10=least_eigenvalue(gauged),
        least_eigenvalue=least_eigenvalue(H),
        tolerance=roundoff(gauged, scale),
        contracting=StateMap(dae.W, grid=dae.grid).comparison is not None,
        lipschitz=L,
    )


@isolated
def strict_multiplier(dae: DAE, delta: float) -> Tensor:
    """Λ_δ, (n,): a multiplier for which H(Λ_δ, L(1+δ)) ≻ 0 where the DAE's own Λ only gives H(Λ, L) ⪰ 0.

        d_k = (1+δ)^{1 − 2(k+1)/(N+1)} on the block of layer k = 0..N−1,   1+δ on a leading identity block   (FORMULAS 3)

    The weights fall from layer to layer, inside (1/(1+δ), 1+δ), so each layer passes a little less than it is given:
    every direction that is tight at L gains. Blocks that do not form a cascade share one weight; a single one keeps Λ, for
    which H grows by δ/(1+δ) (G′G + ΛUU′Λ)/L. Strict for chains of 1-Lipschitz layers of any depth (residual ones also
    deeper than wide) and for monotone equilibrium models. For other DAEs check at Λ_δ and L(1 + δ) tells.

    Raises `InvalidParameterError` for δ ≤ 0.
    """
    delta = number(delta, "delta", "the relative inflation of L must be positive", above=0.0)
    return dae.Lambda * strict_weights(cascade(dae), starts_linear(dae), delta).to(dae.Lambda)


def strict_weights(sizes: Sequence[int], linear: bool, delta: float) -> Tensor:
    """The weights of `strict_multiplier`, (n,), for a cascade of layers of these sizes, the first ``linear`` or not."""
    leading = linear and len(sizes) > 1
    weights = [1.0 + delta] * leading + falling_weights(len(sizes) - leading, delta)
    return torch.tensor(weights, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))


def starts_linear(dae: DAE) -> bool:
    """Whether the first block is an identity."""
    return bool(dae.sigma.runs) and dae.sigma.runs[0][0].name == "identity"


def cascade(dae: DAE) -> list[int]:
    """The DAE's blocks, merged where an earlier one reads a later one: only a cascade may be weighted layer by layer.

    What is small against the largest entry, in the gauge Λ = I, does not count: W rebuilt or cast has round-off everywhere,
    and a multiplier is only a candidate.
    """
    sizes: list[int] = []
    offset = 0
    size_W = unit_gauge(dae.Lambda.unsqueeze(-1) * dae.W, dae.Lambda).abs()
    reads = size_W > 1e-5 * size_W.max() if size_W.numel() else size_W != 0
    for size in dae.blocks:
        if offset and not bool(reads[..., :offset, offset:].any()):
            sizes.append(size)
        elif sizes:
            sizes[-1] += size
        else:
            sizes.append(size)
        offset += size
    return sizes
