"""z → Wz, and everything a solver, an adjoint or an error bound asks of it.

Solvers never touch W itself: they apply it, apply its rows block by block, invert I + α(I − W), and take the adjoint.
W is dense, or one matrix for each frequency of a grid; another representation (factored) is another class with these methods.
"""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..errors import InvalidParameterError, ShapeError
from .spectrum import DENSE, Grid, least_eigenvalue, linear_solve, lu_factor


def triangular_blocks(W: Tensor) -> tuple[int, ...] | None:
    """The fewest consecutive blocks for which W (..., n, n) is strictly block lower triangular, or None if there are none.

    Exact zeros decide. A row starts a new block when it reads a state of the current one.
    """
    n = W.shape[-1]
    if n == 0:
        return ()
    nonzero = (W != 0).reshape(-1, n, n).any(0).byte()
    last = n - nonzero.flip(-1).argmax(-1)  # argmax finds the first of equal values
    reach = (last * nonzero.amax(-1)).tolist()  # row i reads states 0 .. reach[i] - 1
    starts = [0]
    for row, last in enumerate(reach):
        if last > row:
            return None
        if last > starts[-1]:
            starts.append(row)
    return tuple(b - a for a, b in zip(starts, [*starts[1:], n], strict=True))


def falling_weights(count: int, delta: float) -> list[float]:
    """(1+δ)^{1 − 2(k+1)/(N+1)} for k = 0..N−1: a multiplier's weights along a cascade of N layers (FORMULAS 3)."""
    return [(1.0 + delta) ** (1.0 - 2.0 * (k + 1) / (count + 1)) for k in range(count)]


class StateMap:
    """A W with its block structure, (n, n), or (F, n, n) on a ``grid``; it acts on coordinates, (B, n) or (B, n, F).

    ``blocks``: sizes of the blocks that substitution and sweeps go by; by default those for which W is exactly strictly
    lower triangular, else one block. ``Lambda`` (n,): a diagonal metric in which I − W is monotone, for step sizes and
    error bounds; None if unknown. ``remainder``: a bound of ‖W − T‖ for the strictly block lower triangular part T
    that `rows_below` applies, 0 for an exactly triangular W. ``kept``: it is worth products of W with itself to know it
    sharply, because the map will be used again.
    """

    def __init__(
        self,
        W: Tensor,
        blocks: tuple[int, ...] | None = None,
        Lambda: Tensor | None = None,
        *,
        grid: Grid = DENSE,
        kept: bool = True,
        reverse: bool = False,
    ) -> None:
        if W.dim() < 2 or W.shape != (*grid.batch, W.shape[-1], W.shape[-1]):
            raise ShapeError("W", (*grid.batch, "n", "n"), tuple(W.shape))
        self.W = W.detach()
        self.grid, self.kept = grid, kept
        self.states = W.shape[-1]
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
        W = self.W.mH.resolve_conj()
        mirrored = StateMap(W, self.blocks, metric, grid=self.grid, kept=self.kept, reverse=not self.reverse)
        # Its steps are the same, and its resolvents the transposed ones: what a solve has found serves its adjoint.
        if "splitting_steps" in vars(self):
            mirrored.splitting_steps = self.splitting_steps
        mirrored._inverses.update({alpha: R.mH.resolve_conj() for alpha, R in self._inverses.items()})
        return mirrored

    def norm(self, z: Tensor) -> Tensor:  # (B, n) or (B, n, F) -> (B,)
        """The l2 norm of each sample (of its pixels, on a grid)."""
        return self.grid.norm(z)

    def apply(self, z: Tensor) -> Tensor:  # (B, n) -> (B, n)
        """W z for each sample."""
        return self.grid.apply(self.W, z)

    def rows(self, block: slice, z: Tensor, u: Tensor) -> Tensor:  # (B, n), (B, n) -> (B, size of block)
        """The rows of one block of W z + u."""
        return self.grid.apply_onto(u[:, block], self.W[..., block, :], z)

    @cached_property
    def _windows(self) -> dict[int, slice]:
        """For each block the states before it (in evaluation order) that it reads, as one slice.

        Leading blocks whose entries are round-off of the largest entry of W are left out (a chain reads only its
        predecessor) and counted in ``remainder``.
        """
        windows = {}
        size = self._size
        floor = 8.0 * torch.finfo(self.W.dtype).eps * float(size.amax()) if self.states else 0.0
        for block in self._slices:
            before = slice(block.stop, self.states) if self.reverse else slice(0, block.start)
            significant = (size[block, before] > floor).any(0).nonzero().flatten()
            if significant.numel() == 0:
                windows[block.start] = slice(before.start, before.start)
            elif self.reverse:
                windows[block.start] = slice(before.start, before.start + int(significant[-1]) + 1)
            else:
                windows[block.start] = slice(before.start + int(significant[0]), before.stop)
        return windows

    @property
    def _size(self) -> Tensor:
        """|W| (n, n): the largest over the frequencies, so that |(Wz)_i| ≤ Σ_j |W|_ij |z_j| for l2 norms of channels."""
        return self.W.abs().amax(0) if self.grid else self.W.abs()

    def rows_below(self, block: slice, z: Tensor, u: Tensor) -> Tensor:  # (B, n), (B, n) -> (B, size of block)
        """The rows of one block of T z + u, T the strictly triangular part: only states evaluated before are read."""
        window = self._windows[block.start]
        if window.start == window.stop:
            return u[:, block]
        return self.grid.apply_onto(u[:, block], self.W[..., block, window], z[:, window])

    @property
    def below(self) -> Tensor:
        """(n, n) bool: the entries of T, those of W that `rows_below` reads."""
        read = torch.zeros(self.states, self.states, dtype=torch.bool, device=self.W.device)
        for block in self._slices:
            read[block, self._windows[block.start]] = True
        return read

    @cached_property
    def remainder(self) -> float:
        """An upper bound of ‖W − T‖₂: the Frobenius norm, refined to ‖(EE′)²‖_F^{1/4}, E = W − T, where it is small.

        ‖E‖_F may be √n ‖E‖₂ for the round-off left by rebuilding W; only there does the difference decide anything.
        """
        if not self.states:
            return 0.0
        E = self.W.masked_fill(self.below, 0.0)
        frobenius = float(torch.linalg.matrix_norm(E).amax())
        if not 0.0 < frobenius < 1e-3 or not (self.kept or self.states <= 64):
            return frobenius
        E = E / frobenius
        gram = E @ E.mH
        return frobenius * min(1.0, float(torch.linalg.matrix_norm(gram @ gram).amax()) ** 0.25)

    def resolvent(self, v: Tensor, alpha: float, onto: Tensor | None = None) -> Tensor:  # (B, n) -> (B, n)
        """(I + α(I − W))⁻¹ v for each sample, added to ``onto``.

        By the inverse, computed once per α: a product is several times as fast as two triangular solves, and with (3) the
        matrix is well-conditioned.
        """
        inverse = self._inverse(alpha)
        return self.grid.apply(inverse, v) if onto is None else self.grid.apply_onto(onto, inverse, v)

    def newton_step(self, D: Tensor, r: Tensor) -> Tensor:  # (B, n), (B, n) -> (B, n)
        """(I − DW)⁻¹ r for each sample, D its slopes; infinite where the matrix is singular. Not on a grid: there D, which
        differs from pixel to pixel, couples the frequencies."""
        return linear_solve(self._eye() - D.unsqueeze(-1) * self.W, r.unsqueeze(-1)).squeeze(-1)

    def _eye(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.eye(self.states, dtype=dtype or self.W.dtype, device=self.W.device)

    def _inverse(self, alpha: float) -> Tensor:
        if alpha not in self._inverses:
            # Without the check: a singular matrix gives infinite states, and the solve reports that it diverged.
            LU, pivots, _ = lu_factor((1.0 + alpha) * self._eye() - alpha * self.W)
            self._inverses[alpha] = torch.linalg.lu_solve(LU, pivots, self._eye().expand_as(self.W))
        return self._inverses[alpha]

    @cached_property
    def _inverses(self) -> dict[float, Tensor]:
        return {}

    @cached_property
    def monotonicity(self) -> tuple[float, float]:
        """(μ, ℓ) of I − W in the metric Λ: ⟨(I − W)e, e⟩_Λ ≥ μ|e|²_Λ and |(I − W)e|_Λ ≤ ℓ|e|_Λ; X(Λ) ⪰ 2μΛ.

        Computed in float64 whatever the dtype of W, and μ lowered by its round-off: error bounds divide by it.
        """
        if self.Lambda is None:
            raise InvalidParameterError("Lambda", None, "a diagonal metric is needed to know how monotone I - W is")
        mu, A = self._monotone_in(self.Lambda.double())
        return mu, float(torch.linalg.matrix_norm(A, 2).amax())

    def _monotone_in(self, P: Tensor) -> tuple[float, Tensor]:
        """μ in the metric P (n,) > 0, and I − W in the gauge P = I, both in double precision."""
        root, W = P.sqrt(), self.W.to(torch.complex128 if self.grid else torch.float64)
        A = self._eye(W.dtype) - root.unsqueeze(-1) * W / root
        # what LAPACK's least eigenvalue may be off
        allowance = 8.0 * self.states * torch.finfo(A.dtype).eps * float(torch.linalg.matrix_norm(A).amax())
        return least_eigenvalue(A) - allowance, A

    @property
    def metrics(self) -> list[Tensor]:
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

    @cached_property
    def splitting_steps(self) -> tuple[float, float]:
        """(fast, safe) steps α of Peaceman-Rachford: min(1, 1/√(μℓ)) and min(fast, 1/ℓ) in the best metric, (1, 1) without.

        1/√(μℓ) has the best worst case of a symmetric I − W: a fine-tuned network with ℓ in the hundreds needs four times
        fewer steps than with α = 1, and a stiffer one converges only with it. Above 1 it was never better: a small μ belongs
        to a few directions. Where the skew part dominates, 1/ℓ is what keeps the rate at 1 − μ/ℓ. Any α > 0 converges, so a
        few power iterations from a fixed vector are enough; nothing is proved by them.
        """
        found = [pair for pair in map(self._estimated_in, self.metrics) if pair[0] > 0.0] if self.states else []
        if not found:
            return 1.0, 1.0
        mu, ell = max(found, key=lambda pair: pair[0] / pair[1])
        fast = min(1.0, (mu * ell) ** -0.5)
        return fast, min(fast, 1.0 / ell)

    def _estimated_in(self, P: Tensor) -> tuple[float, float]:
        """(μ, ℓ) in the metric P by power iterations, on all frequencies at once: estimates, for step sizes only."""
        root = P.sqrt().to(self.W).unsqueeze(-1)
        W, adjoint = self.W, self.W.mH

        def A(v: Tensor) -> Tensor:
            return v - root * (W @ (v / root))

        def A_adjoint(v: Tensor) -> Tensor:
            return v - (adjoint @ (v * root)) / root

        def size(v: Tensor) -> Tensor:
            return torch.linalg.vector_norm(v, dim=-2, keepdim=True)

        start = torch.cos(torch.arange(self.states, device=W.device, dtype=torch.float64) ** 2)
        v = start = start.to(W).unsqueeze(-1).expand(*self.grid.batch, -1, -1)
        few = 1 if self.kept else 3  # a map of one training step is not worth as many
        for _ in range(12 // few):
            v = A_adjoint(A(v / size(v)))
        ell = float(size(v).amax()) ** 0.5
        v = start
        for _ in range(36 // few):  # the smallest eigenvalue of (A + A′)/2 as the largest of ℓI − (A + A′)/2
            v = v / size(v)
            v = ell * v - 0.5 * (A(v) + A_adjoint(v))
        return ell - float(size(v).amax()), ell

    @cached_property
    def comparison(self) -> Tensor | None:
        """N = (I − |W|)⁻¹ ≥ 0 (n, n), float64, if the spectral radius of |W| is below 1, else None.

        Then z = σ(Wz + u) is well-posed, and |σ(Wz + u) − z*| ≤ N |W| |z − σ(Wz + u)| entry by entry. It covers every
        triangular W, also where no metric gives μ > 0. On a grid |W|_ij is the largest over the frequencies and |z_j| the
        l2 norm of a channel: ‖K * z_j‖ ≤ max|K̂| ‖z_j‖, and σ does not increase the norm of a channel's difference.
        """
        size, eye = self._size.double(), self._eye(torch.float64)
        LU, pivots, singular = lu_factor(eye - size)
        if int(singular):
            return None
        # Collatz-Wielandt: a positive w with |W| w < w proves the radius below 1.
        weight = torch.linalg.lu_solve(LU, pivots, torch.ones_like(size[:, :1]))
        if not bool((weight > 0).all()) or not bool((size @ weight < weight).all()):
            return None
        return torch.linalg.lu_solve(LU, pivots, eye)
