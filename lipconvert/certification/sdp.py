"""LipSDP as it is stated, given to an interior-point solver: the road to the least constants that `certification.tighten` is
checked against. Needs the extra ``sdp`` (cvxpy and Clarabel). Dense networks of a few dozen states.

    minimise ρ over Λ = diag(λ), ρ  subject to  [[2Λ − ΛW − W′Λ − G′G, ΛU], [U′Λ, ρI]] ⪰ 0

is LipSDP with one multiplier for each neuron (Fazlyab et al. 2019, arXiv:1906.04893, for networks that are
implicit too), and by a Schur complement ρR(Q) ⪰ G′G for Q = Λ/ρ, R(Q) = 2Q − QW − W′Q − QUU′Q: the least ρ =
λ_max(GR(Q)⁻¹G′) is the square of the constant. It is linear in (Λ, ρ), and has q rows less than the form with a
variable for GR⁻¹G′. Linear rows are taken out before (`linear_rows`); for the rows that then stand for what goes
past all neurons, Λ = ρI is the best, which the program finds by itself.

Interior-point solvers want W, U and G of the same size in all their entries: states are gauged so that what comes
into each is as large as what goes out. Nothing a solver says is believed: `lipconvert.certification.proofs` decides what its
multiplier proves.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidParameterError, NoCertificateError, ShapeError
from .proofs import Enclosure, prove_gains

# R(Q) ⪰ G′G/ρ + 2·margin·Q is asked for, with the least of these margins at which there is a proof.
MARGINS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
# Clarabel's tolerances, the least with which it ends: networks that are tight everywhere (H = 0) can be too singular for it.
TOLERANCES = (1e-8, 1e-7, 1e-6)
# Rounds of balancing; each takes the worst imbalance of a state to its fourth root or so.
ROUNDS = 50


def sdp_gain(enclosure: Enclosure, rows: Tensor) -> tuple[Tensor, float]:
    """(Q (n,), ρ): the multiplier with the least ρ = g′R(Q)⁻¹g for one functional g, ``rows`` (n,): |g′z| is √ρ-Lipschitz.

    Q > 0 is strictly feasible: `prove_gains` proves a ρ with it, within 1e-5 or so of the one the solver states, which
    is returned. ρ = 0, with any feasible Q, where g or U is 0. For the centre of the enclosure; its radii count in the
    proof.

    Raises `NoCertificateError` with the solver's status where that is not "optimal" (there is no multiplier, or
    numbers defeat it), or where nothing is proved; `InvalidParameterError` without the extra ``sdp``, or on a
    grid; `ShapeError`.
    """
    if tuple(rows.shape) != (enclosure.states,):
        raise ShapeError("a functional", (enclosure.states,), tuple(rows.shape))
    return _least(enclosure, rows.unsqueeze(0), "the least constant of a functional by LipSDP")


def sdp_output(enclosure: Enclosure) -> tuple[Tensor, float]:
    """(Q (n,), ρ): the multiplier with the least ρ = λ_max(GR(Q)⁻¹G′): x ↦ Gz is √ρ-Lipschitz. `sdp_gain` for all outputs."""
    return _least(enclosure, enclosure.G, "the least constant of the output by LipSDP")


def _least(enclosure: Enclosure, G: Tensor, where: str) -> tuple[Tensor, float]:
    cvxpy = _solver()
    if enclosure.grid:
        reason = "semidefinite programs are made of dense networks: lipconvert.densify, or method='tightened'"
        raise InvalidParameterError("the grid", enclosure.grid.image, reason)
    if bool((enclosure.W.diagonal() >= 1.0).any()):
        raise NoCertificateError(
            where, "W has 1 or more on its diagonal, so that no multiplier makes R positive definite"
        )
    W, U, trivial = enclosure.W, enclosure.U, not (bool(enclosure.U.any()) and bool(G.any()))
    if not enclosure.states:
        return W.new_ones(0), 0.0
    if trivial:  # any multiplier will do: one for inputs and outputs at every state
        U = G = torch.eye(enclosure.states, dtype=torch.float64)
    d = _gauge(W, U, torch.cat([enclosure.G, G]))
    W, U, H = d.unsqueeze(-1) * W / d, d.unsqueeze(-1) * _thin(U), G / d
    size_U, size_G = float(torch.linalg.matrix_norm(U, 2)), float(torch.linalg.matrix_norm(H, 2))
    for margin in MARGINS:
        Q, rho = _solve(cvxpy, W, U / size_U, H / size_G, margin, where)
        Q = (Q / size_U**2 * d.square()).clamp(min=1e-300)
        if bool(torch.isfinite(prove_gains(enclosure, Q, G)[0]).all()):
            if trivial:  # without inputs X(Q) is homogeneous: the infimum 0 is approached along Q, 2Q, 4Q, ...
                return Q if enclosure.U.any() else Q * 2.0**40, 0.0
            return Q, rho * (size_U * size_G) ** 2
    raise NoCertificateError(where, f"Clarabel's multiplier has no proof, up to a margin of {MARGINS[-1]:g} in R")


def _solve(cvxpy: Any, W: Tensor, U: Tensor, G: Tensor, margin: float, where: str) -> tuple[Tensor, float]:
    """(Q, ρ) of matrices whose norms are about 1; the program is made anew for each tolerance, which costs little."""
    n, r = U.shape
    status = ""
    for tolerance in TOLERANCES:
        weights, rho = cvxpy.Variable(n), cvxpy.Variable()
        half = cvxpy.diag(weights) @ ((1.0 - margin) * torch.eye(n, dtype=torch.float64) - W).numpy()
        driven = cvxpy.diag(weights) @ U.numpy()
        eye = torch.eye(r, dtype=torch.float64).numpy()
        M = cvxpy.bmat([[half + half.T - (G.mT @ G).numpy(), driven], [driven.T, rho * eye]])
        problem = cvxpy.Problem(cvxpy.Minimize(rho), [M >> 0])
        options = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), tolerance)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it would warn of is in the status
            try:
                problem.solve(solver=cvxpy.CLARABEL, **options)
                status = str(problem.status)
            except cvxpy.error.SolverError as error:
                status = f"solver_error ({error})"
        if status == cvxpy.OPTIMAL:
            return torch.from_numpy(weights.value.copy()) / float(rho.value), float(rho.value)
        if "infeasible" in status:
            by = f" by {2.0 * margin:g}Q" if margin else ""
            reason = f"no diagonal multiplier makes R positive definite{by} (Clarabel: {status!r})"
            raise NoCertificateError(where, reason)
    raise NoCertificateError(where, f"Clarabel ended with the status {status!r}: numbers defeat it")


def _gauge(W: Tensor, U: Tensor, G: Tensor) -> Tensor:
    """d (n,) for which DWD⁻¹, DU, GD⁻¹ have rows and columns of the same size for each state (Osborne 1960)."""
    U, G = U / torch.linalg.matrix_norm(U), G / torch.linalg.matrix_norm(G)
    squares = W.square().fill_diagonal_(0.0)
    d = W.new_ones(len(W))
    for _ in range(ROUNDS):
        into = (squares @ d.square().reciprocal() + U.square().sum(1)) * d.square()
        out = (squares.mT @ d.square() + G.square().sum(0)) / d.square()
        d = torch.where((into > 0.0) & (out > 0.0), d * (out / into) ** 0.125, d)
    return d


def _thin(U: Tensor) -> Tensor:
    """Some U₁ (n, r) with U₁U₁′ = UU′ and no more columns than U has rows that are not 0."""
    driven = (U != 0.0).any(1)
    if int(driven.sum()) >= U.shape[1]:
        return U
    factor = torch.linalg.qr(U[driven].mT, mode="r").R.mT
    thin = U.new_zeros(len(U), factor.shape[1])
    thin[driven] = factor
    return thin


def _solver() -> Any:
    try:
        importlib.import_module("clarabel")
        return importlib.import_module("cvxpy")
    except ImportError as error:
        reason = "it needs cvxpy and Clarabel: pip install 'lipconvert[sdp]'"
        raise InvalidParameterError("method", "'sdp'", reason) from error
