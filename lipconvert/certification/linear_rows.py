"""Linear rows taken out of an enclosed equilibrium network, so that a search of multipliers has nothing to cover there.

The multiplier of a neuron allows every slope in [0, 1]; a row whose activation is the identity has the slope 1, and LipSDP
(Fazlyab et al. 2019, arXiv:1906.04893) has no neuron there. With e the linear rows and s the others,

    z_e = E z_s + F x,   E = (I − W_ee)⁻¹W_es,   F = (I − W_ee)⁻¹U_e,

and what is left is a network with a feed-through,

    z_s = σ(A z_s + B x + …),   y = C z_s + D x + …,
    A = W_ss + W_se E,   B = U_s + W_se F,   C = G_s + G_e E,   D = G_e F.

W, U, G have no place for D. A basis T (k, p) of its rows, TT′ = I, gives k linear rows z₀ = Tx that only read the input:

    W = [[0, 0], [BT′, A]],   U = [[T], [B − BT′T]],   G = [DT′, C],   D = DT′T.

Their multiplier is known. z₀ = Tx is an equation, of which any multiplier may be taken; the one that makes R(Q) largest is 1,
where R = [[I, −TB′Q], [−QBT′, 2Q − QA − A′Q − QB(I − T′T)B′Q]], and g′R⁻¹g ≤ ρ is then, by Schur complements,

    [[2Q − QA − A′Q, QB], [B′Q, I]] ⪰ [C, D]′[C, D]/ρ   (off-diagonal signs aside):

LipSDP of (A, B, C, D), of which nothing is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.rounding import SLACK, gamma, product
from ..linalg.spectrum import DENSE
from .proofs import Enclosure, in_range

# Singular values of D below this share of |G_e||F| are rounding: what they contribute is bounded, and gets no row.
NOISE = 1e-13


@dataclass(frozen=True, eq=False)
class Reduced:
    """x ↦ Gz + d x, an enclosure whose first ``known`` rows are linear with the multiplier 1, and ‖d_i‖ ≤ ``rest``_i, (q,).

    ``rows`` (n,): which of the rows before are the others. A constant of Gz is one of the output with ‖d‖ added.
    """

    enclosure: Enclosure
    rows: Tensor
    known: int
    rest: Tensor

    def multiplier(self, Q: Tensor) -> Tensor:
        """The multiplier of all rows, (..., m), from one of the rows before, (..., n).

        R(Q) ≻ 0 is inherited: it says |x|² > 2⟨v − z, z⟩_Q for all (z, x) ≠ 0, and here the linear rows have v = z.
        """
        return torch.cat([Q.new_ones(*Q.shape[:-1], self.known), Q[..., self.rows]], -1)


def without_linear_rows(enclosure: Enclosure, linear: Tensor) -> Reduced | None:
    """The dense network without its ``linear`` rows (a mask (n,)), for every W, U, G of the enclosure.

    None where I − W_ee is too close to singular for float64 to enclose its inverse; X(Λ) ≻ 0 makes it regular.
    """
    E, e, s = enclosure, linear.nonzero().flatten(), (~linear).nonzero().flatten()
    W, U, G = (
        _Interval(M, torch.zeros_like(M) if r is None else r)
        for M, r in ((E.W, E.radius_W), (E.U, E.radius_U), (E.G, E.radius_G))
    )
    from_states, from_input = W[e][:, s], U[e]  # E and F
    if bool(W[e][:, e].size.any()):
        inverse = _inverse(W[e][:, e])
        if inverse is None:
            return None
        from_states, from_input = inverse @ from_states, inverse @ from_input
    if not all(in_range(M.centre, M.radius) for M in (W, U, G, from_states, from_input)):
        return None  # products might underflow unseen
    A, B = W[s][:, s] + W[s][:, e] @ from_states, U[s] + W[s][:, e] @ from_input
    C, D = G[:, s] + G[:, e] @ from_states, G[:, e] @ from_input
    scale = float(torch.linalg.matrix_norm(G[:, e].size @ from_input.size))
    T = _exact(_basis(D.centre, NOISE * scale))
    BT, DT = (_exact(_plain(M.centre @ T.centre.mT)) for M in (B, D))
    B, D = B - BT @ T, D - DT @ T  # whatever T, BT and DT are: what they leave is enclosed
    known = len(T.centre)
    zeros = T.centre.new_zeros
    W = A.beside(BT).below(_exact(zeros(known, known + len(s))))
    U, G = B.below(T), C.beside(DT)
    rest = torch.linalg.vector_norm(D.size, dim=-1) * SLACK
    reduced = Enclosure(W.centre, U.centre, G.centre, DENSE, W.radius, U.radius, G.radius)
    return Reduced(reduced, s, known, rest)


@dataclass(frozen=True, eq=False)
class _Interval:
    """All matrices within entrywise radii of a centre."""

    centre: Tensor
    radius: Tensor

    @property
    def size(self) -> Tensor:
        """The largest |·| of each entry, to rounding upwards."""
        return (self.centre.abs() + self.radius) * SLACK

    def __getitem__(self, index: object) -> _Interval:
        return _Interval(self.centre[index], self.radius[index])  # type: ignore[index]

    def __matmul__(self, other: _Interval) -> _Interval:
        return _Interval(*product(self.centre, self.radius, other.centre, other.radius))

    def __add__(self, other: _Interval) -> _Interval:
        centre = self.centre + other.centre
        return _Interval(centre, (self.radius + other.radius + gamma(1) * centre.abs()) * SLACK)

    def __sub__(self, other: _Interval) -> _Interval:
        return self + _Interval(-other.centre, other.radius)

    def beside(self, left: _Interval) -> _Interval:
        """[left, self]."""
        return _Interval(torch.cat([left.centre, self.centre], 1), torch.cat([left.radius, self.radius], 1))

    def below(self, top: _Interval) -> _Interval:
        """[top; self]."""
        return _Interval(torch.cat([top.centre, self.centre]), torch.cat([top.radius, self.radius]))


def _exact(M: Tensor) -> _Interval:
    return _Interval(M, torch.zeros_like(M))


def _inverse(W: _Interval) -> _Interval | None:
    """(I − W)⁻¹ for all W: with N next to it and |I − N(I − W)| ≤ P entrywise, it is within Σ_{j ≥ 1} P^j |N| of N."""
    eye = _exact(torch.eye(len(W.centre), dtype=W.centre.dtype))
    N, info = torch.linalg.inv_ex(eye.centre - W.centre)
    if bool(info) or not bool(torch.isfinite(N).all()):
        return None
    P = (eye - _exact(N) @ (eye - W)).size
    theta = float(P.sum(1).amax()) * SLACK
    if not theta < 0.5:
        return None
    first = P @ N.abs()
    radius = first + theta / (1.0 - theta) * first.amax(0)
    return _Interval(N, radius * SLACK)


def _basis(D: Tensor, noise: float) -> Tensor:
    """Orthonormal rows (k, p) that span the rows of D (q, p), but for singular values up to ``noise``."""
    _, values, T = torch.linalg.svd(D, full_matrices=False)
    return _plain(T[values > noise])


def _plain(M: Tensor) -> Tensor:
    """M without entries that are only there by rounding, so that no product of them underflows."""
    return torch.where(M.abs() > 1e-30, M, 0.0)
