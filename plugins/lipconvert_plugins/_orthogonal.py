"""Orthonormal columns from free parameters: the Cayley transform, of matrices or of each frequency of a convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipconvert import linear_solve


def cayley(M: Tensor) -> Tensor:
    """Matrices with orthonormal columns from any tall M = [X; Y], X (c, c): (..., r, c) → (..., r, c), r ≥ c.

    Z = X − X′ + Y′Y,  [ (I + Z)⁻¹(I − Z);  −2Y(I + Z)⁻¹ ]                                             (FORMULAS 4)
    """
    c = M.shape[-1]
    X, Y = M[..., :c, :], M[..., c:, :]
    eye = torch.eye(c, dtype=M.dtype, device=M.device).expand_as(X)
    Z = X - X.mH + Y.mH @ Y
    stacked = linear_solve(eye + Z, torch.cat([eye - Z, eye], -1))
    return torch.cat([stacked[..., :c], -2.0 * Y @ stacked[..., c:]], -2)


def inverse_cayley(Q: Tensor) -> Tensor:
    """An M with cayley(M) = Q, for Q = [A; B] (r, c) with orthonormal columns and A + I regular.

    Z = (I + A)⁻¹(I − A),  Y = −B(I + Z)/2,  X = (Z − Y′Y)/2, which is skew.
    """
    c = Q.shape[-1]
    A, B = Q[..., :c, :], Q[..., c:, :]
    eye = torch.eye(c, dtype=Q.dtype, device=Q.device).expand_as(A)
    Z = linear_solve(eye + A, eye - A)
    Y = -0.5 * B @ (eye + Z)
    return torch.cat([0.5 * (Z - Y.mH @ Y), Y], -2)


class Orthogonal(nn.Module):
    """A parametrisation: a weight with orthonormal columns, or rows where it is wide, the Cayley transform of its original.

    What is assigned to the weight is made orthonormal first (QR, so a random weight becomes a random orthogonal one).
    """

    def forward(self, original: Tensor) -> Tensor:
        return cayley(original) if original.shape[0] >= original.shape[1] else cayley(original.mT).mT

    def right_inverse(self, weight: Tensor) -> Tensor:
        wide = weight.shape[0] < weight.shape[1]
        Q, _ = torch.linalg.qr(weight.mT if wide else weight)
        # Columns are only fixed up to their sign: the one with A_ii ≥ 0 keeps A + I far from singular.
        Q = Q * torch.where(Q.diagonal() < 0, -1.0, 1.0)
        if Q.shape[0] == Q.shape[1] and torch.linalg.det(Q) < 0:  # a reflection has the eigenvalue −1
            Q[:, Q.diagonal().argmin()] *= -1.0
        return inverse_cayley(Q).mT if wide else inverse_cayley(Q)
