"""What rounding may have done, and positive definiteness that survives it.

The standard model of floating-point arithmetic (Higham, *Accuracy and Stability of Numerical Algorithms*, 2002): an operation
errs by a factor 1 + θ, |θ| ≤ u, and a sum of k products by at most γ_k Σ|terms|, γ_k = ku/(1 − ku), in whatever order, blocks
or fused steps it is evaluated. Assumed of the machine: IEEE 754 round to nearest, matrix products and Cholesky factorisations
of the classical kind (no Strassen), cos and sin within an ulp. Everything here runs in float64 on the CPU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidParameterError

# Underflow adds at most a few units of 2^-1074 to each of n² entries of matrices of size about 1.
UNDERFLOW = 1e-290

# Relative allowance for what a bound itself loses when it is added up in float64: sums of up to 10^7 positive terms.
SLACK = 1.0 + 2e-9


def unit_roundoff(dtype: torch.dtype, device: torch.device | None = None, *, convolutions: bool = False) -> float:
    """u of products and sums in a dtype, 2⁻⁵³ for float64; float32 as it is set to be multiplied: 2⁻²⁴, TF32 2⁻¹¹,
    bfloat16 2⁻⁸. ``convolutions``: of ``torch.nn.functional.conv2d`` and its like as well, whose settings are their own.

    The settings are those of ``torch.backends`` and the environment (`_VARIABLES`), as it is now and as it was when this
    module was imported. A variable that would make products more precise than torch says is not believed: libraries read
    it once, and it may have been set later. Raises `InvalidParameterError` for other dtypes, for devices other than CPU
    and CUDA, and where products are emulated in ways that have no such bound: it names the variable.
    """
    kind = "cpu" if device is None else device.type
    if dtype not in (torch.float32, torch.float64):
        raise InvalidParameterError("the dtype of a certified network", dtype, "float32 and float64 have proofs")
    if kind not in ("cpu", "cuda"):
        raise InvalidParameterError(
            "the device of a certified network", kind, "rounding is bounded on CPU and CUDA devices: net.to('cpu')"
        )
    units = [2.0**-53 if dtype == torch.float64 else 2.0**-24]
    for variable in _VARIABLES:
        if kind == variable.device and dtype in variable.dtypes:
            for value in {os.environ.get(variable.name, ""), _AT_IMPORT[variable.name]}:
                units.append(variable.unit(value))
    if dtype == torch.float32:
        backends: Any = torch.backends
        places = [backends, backends.cuda.matmul if kind == "cuda" else backends.mkldnn.matmul]
        if convolutions:
            places.append(backends.cudnn.conv if kind == "cuda" else backends.mkldnn.conv)
        # what is not known counts as the worst
        units += [_REDUCED.get(place.fp32_precision, 2.0**-8) for place in places]
    return max(units)


# How float32 products are multiplied where that is allowed: https://docs.pytorch.org/docs/stable/backends.html
_REDUCED = {"ieee": 2.0**-24, "none": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8}


@dataclass(frozen=True)
class _Variable:
    """An environment variable by which a library multiplies otherwise than torch says, on one kind of device.

    ``units``: what u is at least, by its value in lower case; ∞ where nothing bounds it. Others count as ``other``.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    units: Mapping[str, float]
    other: float

    def unit(self, value: str) -> float:
        """u for a value; 0 where it changes nothing. Raises `InvalidParameterError` where there is none."""
        u = self.units.get(value.strip().lower(), self.other)
        if u == math.inf:
            raise InvalidParameterError(
                f"the environment variable {self.name}",
                repr(value),
                "what products round is not bounded then: unset it before the process starts",
            )
        return u


_FLOAT32 = (torch.float32,)
_UNCHANGED = {"": 0.0, "0": 0.0}
_FPMATH = {"": 0.0, "strict": 0.0, "tf32": 2.0**-11, "bf16": 2.0**-8}  # f16 overflows, and "any" may be f16
_VARIABLES = (
    # NVIDIA reserves values other than 0 ("never"); 1 forces TF32 in cuBLAS and cuDNN whatever torch asks for.
    _Variable("NVIDIA_TF32_OVERRIDE", "cuda", _FLOAT32, _UNCHANGED, 2.0**-11),
    # cuBLAS 12.9 and 13: products from several of fewer bits
    _Variable("CUBLAS_EMULATE_SINGLE_PRECISION", "cuda", _FLOAT32, _UNCHANGED, math.inf),
    _Variable("CUBLAS_EMULATE_DOUBLE_PRECISION", "cuda", (torch.float64,), _UNCHANGED, math.inf),
    # oneDNN's default floating-point math mode, which torch's own setting does not know of
    _Variable("ONEDNN_DEFAULT_FPMATH_MODE", "cpu", _FLOAT32, _FPMATH, math.inf),
    _Variable("DNNL_DEFAULT_FPMATH_MODE", "cpu", _FLOAT32, _FPMATH, math.inf),
)
_AT_IMPORT = {variable.name: os.environ.get(variable.name, "") for variable in _VARIABLES}


def gamma(count: int, u: float = 2.0**-53) -> float:
    """γ_k = ku/(1 − ku); ∞ where ku ≥ 1, as nothing is known then."""
    return count * u / (1.0 - count * u) if count * u < 1.0 else float("inf")


def operations(count: int, like: Tensor) -> int:
    """k for which γ_k covers ``count`` operations on entries of ``like``.

    A sum of m complex products is two real sums of 2m, each within γ_2m Σ|a||b|; √2·2m ≤ 4m.
    """
    return 4 * count if like.is_complex() else count


def product(A: Tensor, radius_A: Tensor | None, B: Tensor, radius_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """(AB as computed, entrywise radii of it) for all A, B within entrywise radii of real A, B: rounding, and both radii."""
    radius = gamma(A.shape[1] + 2) * (A.abs() @ B.abs())
    if radius_A is not None:
        radius = radius + radius_A @ B.abs()
    if radius_B is not None:
        radius = radius + A.abs() @ radius_B
    if radius_A is not None and radius_B is not None:
        radius = radius + radius_A @ radius_B
    return A @ B, radius * SLACK


def transform_growth(image: tuple[int, ...]) -> float:
    """η/u for ‖fl(rfft2 x) − rfft2 x‖₂ ≤ η ‖rfft2 x‖₂, and likewise for the inverse; 0 without an image.

    A stage of radix r errs by at most γ_r and a twiddle factor (Higham, theorem 24.2): 8r is allowed for each prime factor r
    of h and w, also where a library takes other roads to a large prime. Measured errors are a tenth of u log₂(hw).
    """
    total = 0
    for size in image:
        factor = 2
        while size > 1:
            while size % factor == 0:
                total, size = total + 8 * factor, size // factor
            factor += 1
    return float(total)


def root_power(Lambda: Tensor) -> Tensor:
    """Powers of two next to Λ^{1/2}: a gauge (FORMULAS L4) that rounds nothing."""
    return torch.exp2(torch.round(0.5 * torch.log2(Lambda)))


def nonnegative_norm(A: Tensor, iterations: int = 12) -> float:
    """An upper bound of ‖A‖₂ for A ≥ 0 (..., m, n), the largest over the leading dimensions; 0 for an empty one.

    For every w > 0, ‖A‖² = ρ(A′A) ≤ max_i (A′Aw)_i / w_i (Collatz-Wielandt); a few power iterations make it sharp.
    """
    if 0 in A.shape:
        return 0.0
    A, unit = _about_one(A)
    if not bool(A.any()):
        return 0.0
    w = A.new_ones(*A.shape[:-2], A.shape[-1], 1)
    best = float("inf")
    for _ in range(iterations):
        following = A.mT @ (A @ w)
        best = min(best, float((following / w).amax()))
        # Entries that no path reaches stay positive: any w > 0 gives a bound.
        w = following / following.amax(-2, keepdim=True).clamp(min=1e-300) + 1e-6
    return math.nextafter((best * SLACK) ** 0.5 * SLACK * unit, math.inf)


def _about_one(A: Tensor) -> tuple[Tensor, float]:
    """(A/unit, unit), a power of two for which no square of a small A underflows: exact, as it only makes A larger."""
    largest = float(A.abs().amax())
    if not 0.0 < largest < 1.0:
        return A, 1.0
    power = min(-math.frexp(largest)[1], 1000)  # 2^1000 is enough for the smallest subnormal, and its inverse is normal
    return A * 2.0**power, 2.0**-power


def norm_bound(M: Tensor) -> float:
    """A proved upper bound of ‖M‖₂ (..., m, n), the largest over the leading dimensions, a few per cent above it;
    0 when empty.

    t from a power iteration (which under-estimates), then t²I − MM′ ≻ 0 by `exceeds`, t growing until that is proved.
    """
    if 0 in M.shape:
        return 0.0
    M, unit = _about_one(M if M.shape[-2] <= M.shape[-1] else M.mH)
    frobenius = float(torch.linalg.matrix_norm(M).amax()) * SLACK
    if not 0.0 < frobenius < float("inf"):
        return frobenius * unit
    M = M / frobenius
    size = 1.0 + 2.0**-50  # of ‖M‖_F, now
    gram = M @ M.mH
    v = torch.cos(torch.arange(M.shape[-2], dtype=torch.float64) ** 2 + 0.3).to(M.dtype).unsqueeze(-1)
    for _ in range(20):
        v = gram @ v
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp(min=1e-300)
    t = float(torch.linalg.vector_norm(gram @ v, dim=-2).amax()) ** 0.5
    error = (gamma(operations(M.shape[-1] + 4, M)) + 2.0**-50) * size
    for factor in (1.001, 1.01, 1.05, 1.2, 1.5):
        A = -gram
        A.diagonal(dim1=-2, dim2=-1).add_((factor * t) ** 2)
        if factor * t < 1.0 and exceeds(A, error):
            return math.nextafter(factor * t * frobenius * SLACK * unit, math.inf)
    return math.nextafter(frobenius * SLACK * unit, math.inf)


def exceeds(A: Tensor, error: float, margin: float = 0.0) -> bool:
    """Whether every Hermitian matrix within ``error`` (in ‖·‖₂) of A has λ_min > ``margin``: proved, or False.

    ``A`` (..., n, n) float64 or complex128, its lower triangle is read; all leading dimensions must pass. Rump (2006),
    *Verification of positive definiteness*: when the Cholesky factorisation of A − cI runs to its end in floating point, then
    A − cI ⪰ −γ/(1 − γ) tr(A) I with γ = γ_{n+1}; c is chosen so that what is left is ``error + margin``.
    """
    n = A.shape[-1]
    if 0 in A.shape:
        return True
    if A.device.type != "cpu" or A.real.dtype != torch.float64:
        raise InvalidParameterError("the matrix of a proof", (A.dtype, A.device), "proofs run in float64 on the CPU")
    diagonal = A.diagonal(dim1=-2, dim2=-1).real
    if (
        not (0.0 <= error < float("inf") and 0.0 <= margin < float("inf"))
        or not bool(torch.isfinite(A).all())
        or not bool((diagonal > 0.0).all())
    ):
        return False
    g = gamma(operations(n + 2, A))
    if g >= 0.5:
        return False
    trace = float(diagonal.sum(-1).amax())
    shift = (g / (1.0 - g) * trace + error + margin + n * UNDERFLOW) * SLACK
    shift += 2.0**-50 * (float(diagonal.amax()) + shift)  # the subtraction below rounds
    shifted = A.clone()
    shifted.diagonal(dim1=-2, dim2=-1).sub_(shift)
    R, info = torch.linalg.cholesky_ex(shifted)
    if bool(info.any()) or not bool(torch.isfinite(R).all()):
        return False
    return _is_factor(R, shifted, 8.0 * g * trace)


def _is_factor(R: Tensor, A: Tensor, allowance: float) -> bool:
    """Whether RR′ = A on a few vectors: a factorisation that went wrong without saying so is not the theorem's."""
    n = A.shape[-1]
    places = torch.arange(n, dtype=torch.float64).unsqueeze(-1)
    probes = torch.cos(places * torch.tensor([0.7, 1.9, 2.6], dtype=torch.float64) ** 2 + 0.3).to(A.dtype)
    difference = torch.tril(A) @ probes + torch.tril(A, -1).mH @ probes - R @ (R.mH @ probes)
    return bool(torch.linalg.vector_norm(difference, dim=-2).amax() <= allowance * n**0.5 + n * UNDERFLOW)
