"""From a DAE to the parameters of a Lipschitz-bounded equilibrium network, and back: M, S and V.

    M = Λ(I − W) − (G′G + ΛUU′Λ)/2L,   M + M′ = H(Λ, L)                                            (FORMULAS 0.3)
    Ψ = Λ⁻¹,   V′V = H/2 − εI,   S = −ΛW/2,   G, U, b_z, b_y unchanged                              (FORMULAS 0.5)
    W = I − Ψ( G′G/2L + Ψ⁻¹UU′Ψ⁻¹/2L + V′V + S − S′ + εI )                                          (paper eq. 2)

Convention (2) throughout; Theorems 3.2 and 3.4 of the paper fit only its (7), where S has the other sign (FORMULAS P1).
S = −ΛW/2 and the paper's S = M/2 have the same S − S′; ours keeps the zeros of W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dae.conditions import H_matrix, H_scale, strict_multiplier, unit_gauge
from ..dae.dae import DAE
from ..errors import InvalidParameterError, NotPSDError
from ..foundation.arguments import isolated, number
from ..linalg.spectrum import add_gram, gram, least_eigenvalue, psd_sqrt, roundoff, triangular_factor


@dataclass(frozen=True)
class Parameters:
    """LBEN parameters (float64) with the margin they were built at.

    ``Psi`` (n,), ``G`` (q, n), ``U`` (n, p), ``V`` (r, n), ``S`` (n, n), ``epsilon``, ``lipschitz``. ``closed_form``: V is
    the architecture's own rows, which show H = 2V′V ⪰ 0 without an eigenvalue, not a numerical square root. ``margin``: for
    the latter λ_min of H in the gauge Λ = I, negative by round-off at most.
    """

    Psi: Tensor
    G: Tensor
    U: Tensor
    V: Tensor
    S: Tensor
    epsilon: float
    lipschitz: float
    closed_form: bool
    margin: float | None


@isolated
def construct(dae: DAE, epsilon: float = 0.0, delta: float = 0.0) -> Parameters:
    """LBEN parameters that rebuild the W of a DAE to round-off.

    ε = 0 is exact for every DAE with H ⪰ 0. ``epsilon`` > 0 needs H ⪰ 2εI, which most converted networks do not have at
    their own L: ``delta`` > 0 states the constant at L(1 + δ) with the strict multiplier of FORMULAS 3, where they do.

    Raises `NotPSDError` when H ⋡ 2εI by more than round-off, `InvalidParameterError` for ε, δ < 0 or for closed-form rows
    V that do not belong to H.
    """
    epsilon, delta = (
        number(value, name, "it must be finite and not negative", least=0.0)
        for name, value in (("epsilon", epsilon), ("delta", delta))
    )
    if delta > 0.0:
        dae = _inflated(dae, delta)
    H, Lambda = H_matrix(dae), dae.Lambda
    gauged, scale = unit_gauge(H, Lambda), H_scale(dae)
    tolerance = roundoff(gauged, scale)
    closed_form = dae.V is not None and epsilon == 0.0
    margin = None
    if closed_form:
        assert dae.V is not None
        V = triangular_factor(dae.V) if dae.V.shape[-2] > dae.states else dae.V
        excess = add_gram(H, V, -2.0)  # H - 2V'V; H itself is not needed any more
        error = float(torch.linalg.matrix_norm(unit_gauge(excess, Lambda)).amax()) if H.numel() else 0.0
        if error > tolerance:
            _require_psd(dae, least_eigenvalue(gauged), tolerance)
            raise InvalidParameterError(
                f"2V'V - H of {dae.name!r}",
                f"{error:.3e} in norm",
                f"closed-form rows must satisfy V'V = H/2 to {tolerance:.1e}",
            )
    else:
        margin = least_eigenvalue(gauged)
        _require_psd(dae, margin, tolerance)
        V = _root(dae, H, epsilon, scale)
    S = (-0.5 * Lambda).unsqueeze(-1) * dae.W
    return Parameters(Lambda.reciprocal(), dae.G, dae.U, V, S, epsilon, dae.lipschitz, closed_form, margin)


def _inflated(dae: DAE, delta: float) -> DAE:
    """The DAE at L(1 + δ) with the strict multiplier, or with its own Λ, which always does, where that has more margin."""
    candidates = [
        dae.derive(Lambda=Lambda, lipschitz=dae.lipschitz * (1.0 + delta), V=None)
        for Lambda in (strict_multiplier(dae, delta), dae.Lambda)
    ]
    return max(candidates, key=lambda d: least_eigenvalue(unit_gauge(H_matrix(d), d.Lambda)))


def _require_psd(dae: DAE, margin: float, tolerance: float) -> None:
    if margin < -tolerance:
        raise NotPSDError(f"H(Λ, L) of {dae.name!r} at L = {dae.lipschitz:g} (gauge Λ = I)", margin, tolerance)


def _root(dae: DAE, H: Tensor, epsilon: float, scale: float) -> Tensor:
    """V with V′V = H/2 − εI: the principal root in the gauge Λ = I, scaled back, so bad scaling costs no digits."""
    eye = torch.eye(dae.states, dtype=H.dtype, device=H.device)
    reduced = unit_gauge(0.5 * H - epsilon * eye, dae.Lambda)
    where = f"H/2 - εI of {dae.name!r} at L = {dae.lipschitz:g}, ε = {epsilon:g} (gauge Λ = I)"
    try:
        return psd_sqrt(reduced, where, scale) * dae.Lambda.sqrt()
    except NotPSDError as error:
        if epsilon == 0.0:
            raise
        most = max(least_eigenvalue(H) / 2.0, 0.0)
        raise NotPSDError(
            where,
            error.least_eigenvalue,
            error.tolerance,
            (
                f"ε is too large: at this L at most {most:.2e} leaves the function unchanged",
                "H is singular at the network's own L, as for most converted networks: give delta > 0 as well, which "
                "states the constant at L(1 + δ) with a strict multiplier (ε up to about δ/10)",
            ),
        ) from error


def assemble(Psi: Tensor, G: Tensor, U: Tensor, V: Tensor, S: Tensor, epsilon: float, lipschitz: float) -> Tensor:
    """W of an LBEN, (..., n, n), differentiable, in the dtype of the parameters. (paper eq. 2)

    W = I − Ψ( G′G/2L + Ψ⁻¹UU′Ψ⁻¹/2L + V′V + S − S′ + εI ) = I − ΨG′G/2L − UU′Ψ⁻¹/2L − Ψ(V′V + S − S′ + εI)
    """
    eye = torch.eye(Psi.shape[-1], dtype=Psi.dtype, device=Psi.device)
    half = (2.0 * lipschitz) ** -0.5
    inner = gram(half * G, half * (U / Psi.unsqueeze(-1)).mH, V) + (S - S.mH) + epsilon * eye
    return eye - Psi.unsqueeze(-1) * inner
