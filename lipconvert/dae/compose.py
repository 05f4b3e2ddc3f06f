"""Algebra of DAEs: small ones are built here, stacked, thinned out and rescaled; (10) is inherited at every step.

Rows in closed form (``DAE.V``, V′V = H/2) are carried through each operation, so a chain of one-layer DAEs ends with
the closed-form V of the whole: the paper's (16), or the corrected (23).
"""

from __future__ import annotations

from functools import reduce
from itertools import product

import torch
from torch import Tensor

from ..errors import InvalidParameterError, ShapeError, UnsupportedActivationError
from ..foundation.arguments import isolated, number
from ..linalg.spectrum import DENSE, Grid, hull, psd_sqrt, require_finite, spectral_norm, triangular_factor
from .activations import Activation, Activations
from .dae import DAE

# States up to which images are expanded into dense matrices: 128 MB for each, and a conversion holds a dozen.
MOST_DENSE = 4096


def affine(
    M: Tensor, b: Tensor | None = None, lipschitz: float | None = None, name: str = "affine", grid: Grid = DENSE
) -> DAE:
    """y = M x + b as a DAE of identity rows: W = 0, U = M, G = I, b_z = b, Λ = I/L; H = (I − MM′/L²)/L.

    ``M`` (q, p), or (F, q, p) on a grid; ``b`` (q,). ``lipschitz`` defaults to an upper bound of ‖M‖ (1 if M = 0).
    Raises `NotPSDError` when a given L is below ‖M‖, `NotFiniteError`, `ShapeError`, `InvalidParameterError` for L ≤ 0.
    """
    if M.dim() < 2:
        raise ShapeError(f"M of {name!r}", (*grid.batch, "q", "p"), tuple(M.shape))
    require_finite(M, f"M of {name!r}")
    if lipschitz is not None:
        lipschitz = number(lipschitz, f"L of {name!r}", "a Lipschitz constant must be positive and finite", above=0.0)
    M = M.detach().to(torch.complex128 if M.is_complex() else torch.float64)
    L = (float(spectral_norm(M)) or 1.0) if lipschitz is None else lipschitz
    eye = _identity(grid, M.shape[-2], M.device)
    if not 1e-150 < L < 1e150:
        raise InvalidParameterError(
            f"‖M‖ of {name!r}", L, "a norm outside [1e-150, 1e150] leaves nothing to compute with"
        )
    contraction = M / L
    V = psd_sqrt(eye - contraction @ contraction.mH, f"I - MM'/L² of {name!r} (L = {L:g})", 1.0) * (2.0 * L) ** -0.5
    q = M.shape[-2]
    Lambda = torch.full((q,), 1.0 / L, dtype=torch.float64, device=M.device)
    sigma = Activations("identity", q)
    return DAE(torch.zeros_like(eye), M, eye, Lambda, b, None, sigma, L, V, name=name, grid=grid)


@isolated
def elementwise(activation: Activation | str, size: int, name: str = "activation", grid: Grid = DENSE) -> DAE:
    """y = σ(x), x of ``size`` coordinates, or channels on a grid: W = 0, U = G = Λ = I, L = 1; H = 0. On the CPU."""
    eye = _identity(grid, size)
    ones = torch.ones(size, dtype=torch.float64)
    sigma, V = Activations(activation, size), eye[..., :0, :]
    zero = torch.zeros_like(eye[:1] if grid else eye).expand_as(eye)
    return DAE.own(W=zero, U=eye, G=eye, Lambda=ones, activations=sigma, V=V, name=name, grid=grid)


@isolated
def max_min(size: int, name: str = "maxmin", grid: Grid = DENSE) -> DAE:
    """`MaxMin` on ``size`` coordinates (a, b) as one residual step: z = [v; s], v = x, s = relu(b − a), y = (a + s, b − s).

        W = [[0, 0], [w′, 0]],  U = [I; 0],  G = [I, −w],  w′ = [−I, I],  Λ = I,  L = 1,  H = 0, w′w = 2I = T  (FORMULAS 1.2)

    Raises `ShapeError` for an odd size.
    """
    if size % 2:
        raise ShapeError(f"the input of {name!r}", "an even number of channels", size)
    half, states = size // 2, size + size // 2
    eye = torch.eye(size, dtype=torch.complex128 if grid else torch.float64)
    w = torch.cat([-eye[:half, :half], eye[:half, :half]])
    lower = torch.cat([w.mT, eye.new_zeros(half, half)], dim=1)

    def everywhere(M: Tensor) -> Tensor:
        return M.expand(*grid.batch, *M.shape)

    return DAE.own(
        W=everywhere(torch.cat([eye.new_zeros(size, states), lower])),
        U=everywhere(torch.cat([eye, eye.new_zeros(half, size)])),
        G=everywhere(torch.cat([eye, -w], dim=1)),
        Lambda=torch.ones(states, dtype=torch.float64),
        activations=Activations("identity", size) + Activations("relu", half),
        V=everywhere(lower[:0]),
        blocks=(size, half),
        name=name,
        grid=grid,
    )


def coarsen(dae: DAE, rows: int, columns: int) -> DAE:
    """The same function on ``pixel_unshuffle``d images: (c, h, w) ↦ (c·rows·columns, h/rows, w/columns) on both sides.

    The polyphase form (FORMULAS 4). Λ, L and H go with their channels: unshuffling is a permutation.
    Raises `ShapeError` unless the factors divide h and w.
    """
    if not dae.grid or dae.grid.image[0] % rows or dae.grid.image[1] % columns:
        raise ShapeError(f"the image of {dae.name!r}", f"(h, w), multiples of ({rows}, {columns})", dae.grid.image)
    fine, coarse = dae.grid, Grid((dae.grid.image[0] // rows, dae.grid.image[1] // columns))
    phases = rows * columns

    def polyphase(M: Tensor) -> Tensor:
        # y[rows·s + a] = Σ_t K[t] x[rows·s + a + t]: phase a of the output reads the kernel rolled by a
        K = fine.kernels(M)
        rolled = [torch.roll(K, (a, b), (2, 3)) for a in range(rows) for b in range(columns)]
        split = torch.stack(rolled, 1).reshape(
            len(K) * phases, K.shape[1], coarse.image[0], rows, coarse.image[1], columns
        )
        return coarse.matrices(split.permute(0, 1, 3, 5, 2, 4).reshape(len(split), K.shape[1] * phases, *coarse.image))

    return dae.derive(
        W=polyphase(dae.W),
        U=polyphase(dae.U),
        G=polyphase(dae.G),
        Lambda=dae.Lambda.repeat_interleave(phases),
        b_z=dae.bias_z.repeat_interleave(phases),
        b_y=dae.bias_y.repeat_interleave(phases),
        activations=Activations.of((activation, size * phases) for activation, size in dae.sigma),
        V=None if dae.V is None else polyphase(dae.V),
        blocks=tuple(size * phases for size in dae.blocks),
        grid=coarse,
    )


def require_small(size: int, where: str) -> None:
    """Raise `ShapeError` for a dense matrix of more than `MOST_DENSE` rows or columns."""
    if size > MOST_DENSE:
        hint = "Images stay on their grid in lipconvert.convert(model), without dense=True."
        raise ShapeError(where, f"at most {MOST_DENSE} of them", f"{size} rows or columns", hint)


def densify(dae: DAE) -> DAE:
    """The same function on flattened images, as a dense DAE: its coarsest polyphase form, n·h·w states. For small images.

    Raises `ShapeError` above `MOST_DENSE` states.
    """
    if not dae.grid:
        return dae
    require_small(dae.states * dae.grid.pixels, f"the dense form of {dae.name!r}")
    flat = coarsen(dae, *dae.grid.image)
    W, U, G, V = (None if M is None else M.real[0] for M in (flat.W, flat.U, flat.G, flat.V))
    return flat.derive(W=W, U=U, G=G, V=V, grid=DENSE)


def compose(*daes: DAE) -> DAE:
    """The cascade fₖ ∘ … ∘ f₁ of ``compose(f₁, …, fₖ)``, every row kept.

        z = [z₁; z₂],  W = [[W₁, 0], [U₂G₁, W₂]],  U = [U₁; 0],  G = [0, G₂],  b_z = [b₁; b₂ + U₂b_y₁],  b_y = b_y₂,
        L = L₁L₂,  Λ = blkdiag(L₂Λ₁, Λ₂/L₁),
        V = [√L₂ V₁ on block 1;  V₂/√L₁ on block 2;  [L₂G₁, −U₂′Λ₂]/√(2L₁L₂)]                               (FORMULAS L3)

    Raises `ShapeError` when an output does not fit the next input.
    """
    if not daes:
        raise InvalidParameterError("compose", 0, "at least one DAE is needed")
    return reduce(_compose, daes)


def _compose(f: DAE, g: DAE) -> DAE:
    if f.output_shape != g.input_shape:
        raise ShapeError(f"the output of {f.name!r}", f"the input of {g.name!r}: {g.input_shape}", f.output_shape)
    n, m = f.states, g.states
    zeros, batch = f.W.new_zeros, f.grid.batch
    W = zeros(*batch, n + m, n + m)
    W[..., :n, :n], W[..., n:, :n], W[..., n:, n:] = f.W, g.U @ f.G, g.W
    V = None
    if f.V is not None and g.V is not None:
        r, s = f.V.shape[-2], g.V.shape[-2]
        V = zeros(*batch, r + s + f.outputs, n + m)
        V[..., :r, :n], V[..., r : r + s, n:] = g.lipschitz**0.5 * f.V, g.V / f.lipschitz**0.5
        # A product, not a quotient: where G and the next layer cancel, they then do so exactly.
        factor = (2.0 * f.lipschitz * g.lipschitz) ** -0.5
        V[..., r + s :, :n] = g.lipschitz * f.G * factor
        V[..., r + s :, n:] = -(g.Lambda.unsqueeze(-1) * g.U).mH * factor
        V = _stack_rows(V)
    return f.derive(
        W=W,
        U=torch.cat([f.U, zeros(*batch, m, f.inputs)], dim=-2),
        G=torch.cat([zeros(*batch, g.outputs, n), g.G], dim=-1),
        Lambda=torch.cat([g.lipschitz * f.Lambda, g.Lambda / f.lipschitz]),
        b_z=torch.cat([f.bias_z, g.bias_z + _through(g.U, f.bias_y)]),
        b_y=g.bias_y,
        activations=f.sigma + g.sigma,
        lipschitz=f.lipschitz * g.lipschitz,
        V=V,
        blocks=f.blocks + g.blocks,
        name=f"{f.name} > {g.name}",
    )


def eliminate(dae: DAE) -> DAE:
    """Remove every identity block that is not needed: z_e = v_e is linear and can be substituted.

        E, F: z = E z_r + F x,   W ← W_r E,  U ← U_r + W_r F,  G ← G E,  Λ ← Λ_r,  L unchanged

    (10) is inherited: it says Q(z, x) = L|x|² − |y|²/L − 2⟨v − z, z⟩_Λ ≥ 0 for all (z, x), and the eliminated rows'
    term vanishes on z_e = v_e. Q = |√2 V z|² + L|x − U′Λz/L|² becomes |R z_r + N x|² with N′N = L I, hence
    V ← (I − NN′/L) R/√2, which is V E where the eliminated rows do not read x.

    A block is kept when its removal would leave a feed-through from x to y (the first block of a residual network), or
    when its rows read each other. Blocks are visited from last to first.
    """
    offsets = [0]
    for size in dae.blocks:
        offsets.append(offsets[-1] + size)
    for k in reversed(range(len(dae.blocks))):
        rows = slice(offsets[k], offsets[k + 1])
        if len(dae.blocks) > 1 and all(a.name == "identity" for a, _ in dae.sigma[rows]):
            thinner = _without(dae, k, rows)
            if thinner is not None:
                dae = thinner
    return dae


def _without(dae: DAE, k: int, rows: slice) -> DAE | None:
    """The DAE without block k, or None when the block is needed."""
    if bool((dae.W[..., rows, rows] != 0).any()) or bool((dae.G[..., rows] @ dae.U[..., rows, :] != 0).any()):
        return None
    # z_e = We z_r + Ue x + b_e
    We, Ue, be = _drop(dae.W[..., rows, :], rows, -1), dae.U[..., rows, :], dae.bias_z[rows]
    into_W, into_G = _drop(dae.W[..., rows], rows, -2), dae.G[..., rows]
    return dae.derive(
        W=_read_through(_drop(dae.W, rows, -2, -1), into_W, We),
        U=_read_through(_drop(dae.U, rows, -2), into_W, Ue),
        G=_read_through(_drop(dae.G, rows, -1), into_G, We),
        Lambda=_drop(dae.Lambda, rows, 0),
        b_z=_drop(dae.bias_z, rows, 0) + _through(into_W, be),
        b_y=dae.bias_y + _through(into_G, be),
        activations=dae.sigma[: rows.start] + dae.sigma[rows.stop :],
        V=None if dae.V is None else _restricted_rows(dae, dae.V, rows, We, Ue),
        blocks=dae.blocks[:k] + dae.blocks[k + 1 :],
    )


def _drop(M: Tensor, rows: slice, *dims: int) -> Tensor:
    """A copy without some rows (−2), columns (−1), both, or without some entries of a vector (0)."""
    shape = list(M.shape)
    for dim in dims:
        shape[dim] -= rows.stop - rows.start
    kept = M.new_empty(shape)
    halves = ((slice(0, rows.start), slice(0, rows.start)), (slice(rows.stop, None), slice(rows.start, None)))
    for choice in product(halves, repeat=len(dims)):
        source, target = [slice(None)] * M.dim(), [slice(None)] * M.dim()
        for dim, (old, new) in zip(dims, choice, strict=True):
            source[dim], target[dim] = old, new
        kept[tuple(target)] = M[tuple(source)]
    return kept


def _read_through(M: Tensor, into: Tensor, through: Tensor) -> Tensor:
    """M + into·through, written over M; rows of ``into`` that are zero at either end (most do not read the block) are free.

    The product is rounded before it is added: what cancels (see `_compose`) then cancels exactly.
    """
    reading, read = hull(into, -2), hull(through, -1)
    M[..., reading, read] += into[..., reading, :] @ through[..., read]
    return M


def _restricted_rows(dae: DAE, V: Tensor, rows: slice, We: Tensor, Ue: Tensor) -> Tensor:
    reduced = _read_through(_drop(V, rows, -1), V[..., rows], We)
    if not bool((Ue != 0).any()):
        return _stack_rows(reduced)
    L = dae.lipschitz
    LU = dae.Lambda.unsqueeze(-1) * dae.U
    drift = (_drop(LU, rows, -2) + We.mH @ LU[..., rows, :]).mH  # U′ΛE
    eye = torch.eye(dae.inputs, dtype=V.dtype, device=V.device)
    R = torch.cat([2.0**0.5 * reduced, -drift / L**0.5], dim=-2)
    N = torch.cat([2.0**0.5 * V[..., rows] @ Ue, L**0.5 * eye - LU[..., rows, :].mH @ Ue / L**0.5], dim=-2)
    return _stack_rows((R - N @ (N.mH @ R) / L) / 2.0**0.5)


def scale(dae: DAE, alpha: float = 1.0, beta: float = 1.0) -> DAE:
    """x → β f(α x): U ← αU, G ← βG, b_y ← βb_y, Λ ← (β/α)Λ, L ← αβL, H ← (β/α)H. α, β > 0. (FORMULAS L1)"""
    alpha, beta = (number(scale, "alpha, beta", "both scales must be positive", above=0.0) for scale in (alpha, beta))
    ratio = beta / alpha
    return dae.derive(
        U=alpha * dae.U,
        G=beta * dae.G,
        b_y=beta * dae.bias_y,
        Lambda=ratio * dae.Lambda,
        lipschitz=alpha * beta * dae.lipschitz,
        V=None if dae.V is None else ratio**0.5 * dae.V,
    )


def absorb(dae: DAE, P: Tensor | None = None, C: Tensor | None = None) -> DAE:
    """x → C f(P x) with ‖P‖, ‖C‖ ≤ 1: U ← UP, G ← CG, b_y ← Cb_y, Λ and L unchanged. (FORMULAS L2)

        H ← H + G′(I − C′C)G/L + ΛU(I − PP′)U′Λ/L

    ``P`` (..., p, p′), ``C`` (..., q′, q). Raises `NotPSDError` when a norm exceeds 1, `ShapeError` for misfits.
    """
    rows = [] if dae.V is None else [dae.V]
    U, G, b_y, L = dae.U, dae.G, dae.bias_y, dae.lipschitz
    if P is not None:
        P = P.detach().to(dae.W.dtype)
        if P.shape[-2] != dae.inputs:
            raise ShapeError("P", f"(..., {dae.inputs}, p')", tuple(P.shape))
        root = psd_sqrt(_identity_like(P @ P.mH) - P @ P.mH, f"I - PP' in front of {dae.name!r}", scale=1.0)
        rows.append(root @ (dae.Lambda.unsqueeze(-1) * U).mH / (2.0 * L) ** 0.5)
        U = U @ P
    if C is not None:
        C = C.detach().to(dae.W.dtype)
        if C.shape[-1] != dae.outputs:
            raise ShapeError("C", f"(..., q', {dae.outputs})", tuple(C.shape))
        root = psd_sqrt(_identity_like(C.mH @ C) - C.mH @ C, f"I - C'C behind {dae.name!r}", scale=1.0)
        rows.append(root @ G / (2.0 * L) ** 0.5)
        G, b_y = C @ G, _through(C, b_y)
    return dae.derive(U=U, G=G, b_y=b_y, V=None if dae.V is None else _stack_rows(*rows))


def gauge(dae: DAE, D: Tensor | None = None) -> DAE:
    """The same function with states D z, D > 0 diagonal: W ← DWD⁻¹, U ← DU, b_z ← Db_z, G ← GD⁻¹, Λ ← D⁻¹ΛD⁻¹.

    H ← D⁻¹HD⁻¹. ``D`` (n,) defaults to Λ^{1/2}, which makes Λ = I and removes bad scaling. (FORMULAS L4)
    Raises `UnsupportedActivationError` unless every activation is positively homogeneous.
    """
    bad = next((str(a) for a, _ in dae.sigma if not a.homogeneous), None)
    if bad is not None:
        raise UnsupportedActivationError(dae.name, bad, "the diagonal gauge needs σ(cv) = cσ(v) for c > 0.")
    D = dae.Lambda.sqrt() if D is None else D.to(dae.Lambda)
    if tuple(D.shape) != (dae.states,) or not bool((D > 0).all()):
        raise InvalidParameterError("D", tuple(D.shape), f"it must hold {dae.states} positive numbers")
    return dae.derive(
        W=D.unsqueeze(-1) * dae.W / D,
        U=D.unsqueeze(-1) * dae.U,
        G=dae.G / D,
        b_z=D * dae.bias_z,
        Lambda=dae.Lambda / D**2,
        V=None if dae.V is None else dae.V / D,
    )


def _identity_like(M: Tensor) -> Tensor:
    return torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)


def _identity(grid: Grid, size: int, device: torch.device | None = None) -> Tensor:
    """I (n, n) in double precision, one for each frequency of a grid."""
    eye = torch.eye(size, dtype=torch.complex128 if grid else torch.float64, device=device)
    return eye.expand(*grid.batch, size, size)


def _through(M: Tensor, b: Tensor) -> Tensor:
    """A constant b sent through M: (..., q, p), (p,) → (q,). A constant image lives at frequency 0, the first one."""
    flat = M.reshape(-1, *M.shape[-2:])[0]
    return flat.real @ b if flat.is_complex() else flat @ b


def _stack_rows(*parts: Tensor) -> Tensor:
    """Rows on top of one another, those that are exactly zero left out, at most n of them with the same V′V."""
    rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
    rows = rows[..., hull(rows, -2), :]
    alive = (rows != 0).any(dim=-1)
    if alive.dim() > 1:
        alive = alive.flatten(0, -2).any(0)
    if not bool(alive.all()):
        rows = rows[..., alive, :]
    return triangular_factor(rows) if rows.shape[-2] > rows.shape[-1] else rows
