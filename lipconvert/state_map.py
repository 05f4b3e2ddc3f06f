"""z → Wz, and everything a solver, an adjoint or an error bound asks of it.

Solvers never touch W itself: they apply it, apply its rows block by block, invert I + α(I − W), and take the adjoint.
Another representation of W (per frequency, factored) is another class with these methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .errors import InvalidParameterError, ShapeError
from .spectrum import spectral_norm


def triangular_blocks(W: Tensor) -> tuple[int, ...] | None:
    """The fewest consecutive blocks for which W (..., n, n) is strictly block lower triangular, or None if there are none.

    Exact zeros decide. A row starts a new block when it reads a state of the current one.
    """
    n = W.shape[-1]
    nonzero = (W != 0).reshape(-1, n, n).any(0) if n else W.new_zeros(0, 0, dtype=torch.bool)
    columns = torch.arange(1, n + 1, device=W.device)
    reach = (nonzero * columns).amax(-1).tolist() if n else []  # row i reads states 0 .. reach[i] - 1
    starts = [0]
    for row, last in enumerate(reach):
        if last > row:
            return None
        if last > starts[-1]:
            starts.append(row)
    return tuple(b - a for a, b in zip(starts, [*starts[1:], n], strict=True)) if n else ()


def falling_weights(count: int, delta: float) -> list[float]:
    """(1+δ)^{1 − 2(k+1)/(N+1)} for k = 0..N−1: a multiplier's weights along a cascade of N layers (FORMULAS 3)."""
    return [(1.0 + delta) ** (1.0 - 2.0 * (k + 1) / (count + 1)) for k in range(count)]


@dataclass(frozen=True)
class ErrorBound:
    """What d = W(z − s), s = σ(Wz + u), says of ‖G(s − z*)‖; built by `StateMap.error_bound`.

    ``metrics``: pairs (P^{1/2} (n,), c) with ‖G(s − z*)‖ ≤ c |d|_P. ``comparison``: |G|N (q, n) with
    |G(s − z*)| ≤ |G|N |d| entry by entry, or None.
    """

    metrics: tuple[tuple[Tensor, float], ...]
    comparison: Tensor | None

    def __bool__(self) -> bool:
        return bool(self.metrics) or self.comparison is not None

    def __call__(self, d: Tensor) -> Tensor:  # (B, n) -> (B,)
        """The smallest of the bounds, per sample, float64."""
        d = d.double()
        bounds = [factor * torch.linalg.vector_norm(d * root, dim=-1) for root, factor in self.metrics]
        if self.comparison is not None:
            bounds.append(torch.linalg.vector_norm(d.abs() @ self.comparison.mT, dim=-1))
        return torch.stack(bounds).amin(0)


class StateMap:
    """A dense W (n, n) with its block structure; states are rows of a batch, (B, n).

    ``blocks``: sizes of the blocks that substitution and sweeps go by; by default those for which W is exactly strictly
    lower triangular, else one block. ``Lambda`` (n,): a diagonal metric in which I − W is monotone, for step sizes and
    error bounds; None if unknown. ``remainder``: a bound of ‖W − T‖ for the strictly block lower triangular part T
    that `rows_below` applies, 0 for an exactly triangular W.
    """

    def __init__(
        self,
        W: Tensor,
        blocks: tuple[int, ...] | None = None,
        Lambda: Tensor | None = None,
        *,
        reverse: bool = False,
    ) -> None:
        if W.dim() != 2 or W.shape[0] != W.shape[1]:
            raise ShapeError("W", "(n, n)", tuple(W.shape))
        self.W = W.detach()
        self.states = W.shape[0]
        self.blocks = blocks or triangular_blocks(self.W) or (self.states,)
        if sum(self.blocks) != self.states:
            raise ShapeError("blocks", f"sizes that add up to {self.states}", self.blocks)
        self.Lambda = Lambda
        self.reverse = reverse
        starts = [0, *accumulate(self.blocks)]
        self._slices = [slice(a, b) for a, b in pairwise(starts)]

    @property
    def order(self) -> list[slice]:
        """The blocks in the order in which they are evaluated (backwards for the adjoint of a lower triangular W)."""
        return self._slices[::-1] if self.reverse else self._slices

    @cached_property
    def adjoint(self) -> StateMap:
        """p → W′p, monotone in the metric Λ⁻¹, evaluated backwards."""
        metric = None if self.Lambda is None else self.Lambda.reciprocal()
        return StateMap(self.W.mT, self.blocks, metric, reverse=not self.reverse)

    def apply(self, z: Tensor) -> Tensor:  # (B, n) -> (B, n)
        """W z for each sample."""
        return z @ self.W.mT

    def rows(self, block: slice, z: Tensor) -> Tensor:  # (B, n) -> (B, size of block)
        """The rows of one block of W z."""
        return z @ self.W[block].mT

    @cached_property
    def _windows(self) -> dict[int, slice]:
        """For each block the states before it (in evaluation order) that it reads, as one slice.

        Leading blocks whose entries are round-off of the largest entry of W are left out (a chain reads only its
        predecessor) and counted in ``remainder``.
        """
        windows = {}
        floor = 8.0 * torch.finfo(self.W.dtype).eps * float(self.W.abs().amax()) if self.states else 0.0
        for block in self._slices:
            before = slice(block.stop, self.states) if self.reverse else slice(0, block.start)
            significant = (self.W[block, before].abs() > floor).any(0).nonzero().flatten()
            if significant.numel() == 0:
                windows[block.start] = slice(before.start, before.start)
            elif self.reverse:
                windows[block.start] = slice(before.start, before.start + int(significant[-1]) + 1)
            else:
                windows[block.start] = slice(before.start + int(significant[0]), before.stop)
        return windows

    def rows_below(self, block: slice, z: Tensor, u: Tensor) -> Tensor:  # (B, n), (B, n) -> (B, size of block)
        """The rows of one block of T z + u, T the strictly triangular part: only states evaluated before are read."""
        window = self._windows[block.start]
        return torch.addmm(u[:, block], z[:, window], self.W[block, window].mT)

    @cached_property
    def remainder(self) -> float:
        """An upper bound of ‖W − T‖₂: the Frobenius norm, refined to ‖(EE′)²‖_F^{1/4}, E = W − T, where it is small.

        ‖E‖_F may be √n ‖E‖₂ for the round-off left by rebuilding W; only there does the difference decide anything.
        """
        if not self.states:
            return 0.0
        E = self.W.clone()
        for block in self._slices:
            E[block, self._windows[block.start]] = 0.0
        frobenius = float(torch.linalg.matrix_norm(E))
        if not 0.0 < frobenius < 1e-3:
            return frobenius
        E = E / frobenius
        gram = E @ E.mT
        return frobenius * min(1.0, float(torch.linalg.matrix_norm(gram @ gram)) ** 0.25)

    def resolvent(self, v: Tensor, alpha: float) -> Tensor:  # (B, n) -> (B, n)
        """(I + α(I − W))⁻¹ v for each sample, through one LU factorisation per α."""
        LU, pivots = self._factor(alpha)
        return torch.linalg.lu_solve(LU, pivots, v.mT).mT

    def newton_step(self, D: Tensor, r: Tensor) -> Tensor:  # (B, n), (B, n) -> (B, n)
        """(I − DW)⁻¹ r for each sample, D its slopes; infinite where the matrix is singular."""
        eye = torch.eye(self.states, dtype=self.W.dtype, device=self.W.device)
        return torch.linalg.solve_ex(eye - D.unsqueeze(-1) * self.W, r.unsqueeze(-1))[0].squeeze(-1)

    def _factor(self, alpha: float) -> tuple[Tensor, Tensor]:
        if alpha not in self._factors:
            eye = torch.eye(self.states, dtype=self.W.dtype, device=self.W.device)
            # Without the check: a singular matrix gives infinite states, and the solve reports that it diverged.
            LU, pivots, _ = torch.linalg.lu_factor_ex((1.0 + alpha) * eye - alpha * self.W)
            self._factors[alpha] = (LU, pivots)
        return self._factors[alpha]

    @cached_property
    def _factors(self) -> dict[float, tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def monotonicity(self) -> tuple[float, float]:
        """(μ, ℓ) of I − W in the metric Λ: ⟨(I − W)e, e⟩_Λ ≥ μ|e|²_Λ and |(I − W)e|_Λ ≤ ℓ|e|_Λ; X(Λ) ⪰ 2μΛ.

        Computed in float64 whatever the dtype of W, and μ lowered by its round-off: error bounds divide by it.
        """
        if self.Lambda is None:
            raise InvalidParameterError("Lambda", None, "a diagonal metric is needed to know how monotone I - W is")
        mu, A = self._monotone_in(self.Lambda.double())
        return mu, float(torch.linalg.matrix_norm(A, 2))

    def _monotone_in(self, P: Tensor) -> tuple[float, Tensor]:
        """μ in the metric P (n,) > 0, and I − W in the gauge P = I, both float64."""
        root, W = P.sqrt(), self.W.double()
        A = torch.eye(self.states, dtype=W.dtype, device=W.device) - root.unsqueeze(-1) * W / root
        # what LAPACK's least eigenvalue may be off
        allowance = 8.0 * self.states * torch.finfo(A.dtype).eps * float(torch.linalg.matrix_norm(A))
        return float(torch.linalg.eigvalsh(0.5 * (A + A.mT))[0]) - allowance, A

    @property
    def _metrics(self) -> list[Tensor]:
        """Diagonal metrics worth trying, (n,), float64: Λ, and Λ with weights that fall along the blocks.

        At ε = 0 a converted network has X(Λ) singular, often; the second one is what makes a cascade strictly monotone.
        """
        if self.Lambda is None:
            return []
        Lambda = self.Lambda.double()
        if len(self.blocks) == 1:
            return [Lambda]
        weights = Lambda.new_tensor(falling_weights(len(self.blocks), 1.0))
        repeats = torch.tensor(self.blocks, device=Lambda.device)
        return [Lambda, Lambda * (weights.flip(0) if self.reverse else weights).repeat_interleave(repeats)]

    def error_bound(self, G: Tensor, lipschitz: float) -> ErrorBound:
        """How far an inexact solve may move the output Gz, from one evaluation after it.

        For every diagonal metric P with X(P) ⪰ 2μP, μ > 0: |s − z*|_P ≤ |d|_P/μ (FORMULAS f1), so c = ‖GP^{-1/2}‖/μ; in the
        metric Λ, for which (10) holds with L = ``lipschitz``, c = √(2L/μ) too (FORMULAS f4). `comparison` covers the rest.
        """
        G = G.detach().double()
        metrics = []
        for k, P in enumerate(self._metrics):
            mu, _ = self._monotone_in(P)
            if mu > 0.0:
                factor = float(spectral_norm(G * P.rsqrt())) / mu
                metrics.append((P.sqrt(), min(factor, (2.0 * lipschitz / mu) ** 0.5) if k == 0 else factor))
        N = self.comparison
        return ErrorBound(tuple(metrics), None if N is None else G.abs() @ N)

    @cached_property
    def splitting_steps(self) -> tuple[float, float]:
        """(fast, safe) steps α of Peaceman-Rachford: min(1, 1/√(μℓ)) and min(fast, 1/ℓ) in the best metric, (1, 1) without.

        1/√(μℓ) has the best worst case of a symmetric I − W: a fine-tuned network with ℓ in the hundreds needs four times
        fewer steps than with α = 1, and a stiffer one converges only with it. Above 1 it was never better: a small μ belongs
        to a few directions. Where the skew part dominates, 1/ℓ is what keeps the rate at 1 − μ/ℓ. Any α > 0 converges, so a
        few power iterations from a fixed vector are enough; nothing is proved by them.
        """
        found = [pair for pair in map(self._estimated_in, self._metrics) if pair[0] > 0.0] if self.states else []
        if not found:
            return 1.0, 1.0
        mu, ell = max(found, key=lambda pair: pair[0] / pair[1])
        fast = min(1.0, (mu * ell) ** -0.5)
        return fast, min(fast, 1.0 / ell)

    def _estimated_in(self, P: Tensor) -> tuple[float, float]:
        """(μ, ℓ) in the metric P by power iterations: estimates, for step sizes only."""
        root = P.to(self.W).sqrt()

        def A(v: Tensor) -> Tensor:
            return v - root * (self.W @ (v / root))

        def A_adjoint(v: Tensor) -> Tensor:
            return v - (self.W.mT @ (v * root)) / root

        start = torch.cos(torch.arange(self.states, dtype=self.W.dtype, device=self.W.device) ** 2)
        v = start
        for _ in range(12):
            v = A_adjoint(A(v / torch.linalg.vector_norm(v)))
        ell = float(torch.linalg.vector_norm(v)) ** 0.5
        v = start
        for _ in range(36):  # the smallest eigenvalue of (A + A′)/2 as the largest of ℓI − (A + A′)/2
            v = v / torch.linalg.vector_norm(v)
            v = ell * v - 0.5 * (A(v) + A_adjoint(v))
        return ell - float(torch.linalg.vector_norm(v)), ell

    @cached_property
    def comparison(self) -> Tensor | None:
        """N = (I − |W|)⁻¹ ≥ 0 (n, n), float64, if the spectral radius of |W| is below 1, else None.

        Then z = σ(Wz + u) is well-posed, and |σ(Wz + u) − z*| ≤ N |W| |z − σ(Wz + u)| entry by entry. It covers every
        triangular W, also where no metric gives μ > 0.
        """
        size = self.W.double().abs()
        eye = torch.eye(self.states, dtype=size.dtype, device=size.device)
        LU, pivots, singular = torch.linalg.lu_factor_ex(eye - size)
        if int(singular):
            return None
        # Collatz-Wielandt: a positive w with |W| w < w proves the radius below 1.
        weight = torch.linalg.lu_solve(LU, pivots, torch.ones_like(size[:, :1]))
        if not bool((weight > 0).all()) or not bool((size @ weight < weight).all()):
            return None
        return torch.linalg.lu_solve(LU, pivots, eye)
