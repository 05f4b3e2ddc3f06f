"""Linear algebra of (..., rows, cols) matrices, ′ being the conjugate transpose (``.mH``).

A dense matrix has no leading dimension. Every function broadcasts over leading dimensions, so a batch of
per-frequency matrices (F, rows, cols) goes through the same lines. All of it runs in the dtype it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import NotFiniteError, NotPSDError


def require_finite(tensor: Tensor, where: str) -> None:
    """Raise `NotFiniteError` when any entry is NaN or infinite."""
    if bool(torch.isfinite(tensor.sum())):  # one bad entry spoils the sum; so may an overflow, hence the count
        return
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise NotFiniteError(where, bad, tensor.numel())


def hermitian(M: Tensor) -> Tensor:
    """(M + M′)/2, (..., n, n) → (..., n, n)."""
    return 0.5 * (M + M.mH)


def spectral_norm(M: Tensor) -> Tensor:
    """An upper bound of ‖M‖₂, the largest over the leading dimensions; 0-d, differentiable.

    The largest singular value of a backward stable SVD is within p(m, n) u ‖M‖ of the true one (u: unit round-off);
    ``4 max(m, n) u`` is added for it, so that a certificate may rest on the value. Power iteration, which
    under-estimates, is never used.
    """
    if 0 in M.shape:
        return M.new_zeros((), dtype=M.real.dtype)
    inflation = 1.0 + 4.0 * max(M.shape[-2:]) * torch.finfo(M.dtype).eps
    return torch.linalg.svdvals(M).amax() * inflation


def least_eigenvalue(H: Tensor) -> float:
    """λ_min of a Hermitian matrix, the smallest over the leading dimensions (LAPACK's, error about n u ‖H‖)."""
    if 0 in H.shape:
        return float("inf")
    return float(torch.linalg.eigvalsh(hermitian(H)).amin())


def roundoff(H: Tensor, scale: float = 0.0) -> float:
    """Allowance for λ_min of a computed H: 32 n u max(‖H‖_F, scale).

    Forming H by products of length n and LAPACK's eigenvalues both err by a small multiple of n u times the size of
    the terms that were added up; ``scale`` is that size where H itself is what is left after they cancelled.
    """
    size = max(float(torch.linalg.matrix_norm(H).amax()), scale) if 0 not in H.shape else scale
    return 32.0 * max(H.shape[-1], 1) * torch.finfo(H.dtype).eps * size


def psd_sqrt(H: Tensor, where: str, scale: float = 0.0) -> Tensor:
    """The principal square root F = F′ of H ⪰ 0, so F′F = H; (..., n, n) → (..., n, n).

    Eigenvalues in [−roundoff(H, scale), 0) are round-off and count as 0: F′F is then PSD by construction and differs
    from H by no more than that. The principal root keeps the symmetry of a real convolution's spectrum.

    Raises `NotPSDError` with λ_min when it is below −roundoff(H, scale). (FORMULAS 0, "Getting V".)
    """
    if 0 in H.shape:
        return H
    values, vectors = torch.linalg.eigh(hermitian(H))
    tolerance = roundoff(H, scale)
    least = float(values.amin())
    if least < -tolerance:
        raise NotPSDError(where, least, tolerance)
    return (vectors * values.clamp(min=0.0).sqrt().unsqueeze(-2)) @ vectors.mH


def triangular_factor(rows: Tensor) -> Tensor:
    """The R of a QR: R′R = rows′rows with at most n rows; (..., r, n) → (..., min(r, n), n).

    Never squares the condition number and works for singular R′R (FORMULAS 0, "Getting V").
    """
    return torch.linalg.qr(rows, mode="r").R
