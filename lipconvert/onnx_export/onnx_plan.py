"""How each stage of a network is written as an ONNX graph: what the graph, its error bounds and the manifest agree on."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ..certification.accuracy import ABSOLUTE, ELEMENTARY, Road
from ..dae.dae import DAE
from ..equilibria.equilibrium import SolverOptions, solve
from ..errors import CheckpointError, NotPSDError
from ..linalg.rounding import SLACK, gamma, norm_bound, operations, unit_roundoff
from ..linalg.spectrum import Grid, spectral_norm
from ..linalg.state_map import StateMap
from ..networks.documents import GraphEntry, GraphMethod
from ..networks.lben import LBEN
from .onnx_author import NOISE, centred, noise, window

# Methods without a loop.
STRAIGHT: tuple[GraphMethod, ...] = ("substitution", "convolutions")

# σ whose proximal map is known for every step α; of the others prox_{1·f} = σ is, and α = 1.
CLOSED = ("identity", "relu", "relu6", "hardtanh", "leaky_relu")

# Relative residual at which an answer is one, and the share of it at which a loop stops: the residual is evaluated afresh at
# the end. Looser than lipconvert's own solvers: transforms by products round ten times as much as FFTs.
TOLERANCE, STOP = {torch.float32: 4e-6, torch.float64: 1e-12}, 0.25

# A residual of ‖I − AR‖ for which refining a product with R once is as good as solving with A.
INVERSE = {torch.float32: 1e-4, torch.float64: 1e-8}

# Share by which a norm that is stated is above the one found here.
OUTWARDS = 1e-6

# Sweeps, and Peaceman-Rachford steps, beyond which no such graph is written; how many times as many as a few inputs needed
# a graph may take.
MOST_SWEEPS, MOST_STEPS, SPARE = 100, 4000, 10

# Newton-Schulz steps beyond which an inverse is refused: each doubles the digits, after one for each binary digit of the
# condition number.
MOST_INVERSE = 200


@dataclass(frozen=True, eq=False)
class Plan:
    """How one stage is written: what the manifest says of it, and W as it is stored, with the offset of its first tap."""

    how: GraphEntry
    stage: LBEN
    W: Tensor
    origin: tuple[int, int]

    @cached_property
    def map(self) -> StateMap:
        """z → Wz for the W that is stored."""
        stage = self.stage
        W = stage.grid.matrices(full_kernels(self.W, self.origin, stage.grid))
        return StateMap(W, stage.blocks, stage.log_psi.detach().neg().exp().cpu(), grid=stage.grid)

    @cached_property
    def exact(self) -> LBEN:
        """The stage of the floats that are stored, its W too (`LBEN.with_W`): what is proved, and what errors refer to."""
        return self.stage.with_W(full_kernels(self.W, self.origin, self.stage.grid))

    @cached_property
    def kept(self) -> Tensor:
        """(n, n) bool: the entries of W that the graph reads, whole blocks: all in a loop; by substitution those from the
        first to the last block that is read, by convolutions each block that is."""
        below = self.map.below
        if self.how.method not in STRAIGHT:
            return torch.ones_like(below)
        kept = torch.zeros_like(below)
        parts = slices(self.stage.blocks)
        for block in parts:
            read = [other for other in parts if bool(below[block, other].any())]
            if read and self.how.method == "substitution":
                read = [slice(read[0].start, read[-1].stop)]
            for other in read:
                kept[block, other] = True
        return kept


def plan(stage: LBEN, name: str, W: Tensor, origin: tuple[int, int]) -> Plan:
    """How a stage is written for the weights as they are, W and its origin being what is stored (`stored_W`).

    Raises `CheckpointError` where a few random inputs have no equilibrium within `MOST_STEPS` steps.
    """
    stage = copy.deepcopy(stage).cpu()
    draft = Plan(GraphEntry(function=name, method="substitution", skipped=0.0), stage, W, origin)
    map, dtype = draft.map, stage.b_z.dtype

    def chosen(method: GraphMethod, skipped: float = 0.0, **given: Any) -> Plan:
        # a bound that is still one where it is added up in another order
        how = GraphEntry(function=name, method=method, skipped=skipped * (1.0 + OUTWARDS), **given)
        return Plan(how, stage, W, origin)

    if map.remainder <= TOLERANCE[dtype]:  # but for what rebuilding W has rounded
        return chosen("convolutions" if _convolves(draft) else "substitution", map.remainder)
    until = {"tolerance": TOLERANCE[dtype]}
    sweeps = _steps(stage, map, SolverOptions("sweep", max_steps=MOST_SWEEPS, throw=False)) if _contracts(map) else None
    if sweeps is not None:
        return chosen("sweeps", map.remainder, max_steps=_most(sweeps), **until)
    alpha, steps = _splitting_step(stage, map)
    inverse_steps = _inverse_steps(map, alpha)
    return chosen("splitting", max_steps=_most(steps), alpha=alpha, inverse_steps=inverse_steps, **until)


def flaw(chosen: Plan, own: Plan) -> str:
    """Why a stage may not be written as ``chosen``, empty if it may; ``own``: the plan made here, from the same floats.

    Another machine, or another version, may count a step more or take another α. What has to hold is what makes the answers
    right: nothing is left out but what error bounds and the tolerance allow for, the iteration contracts, its steps suffice.
    """
    how, stage, map, dtype = chosen.how, chosen.stage, chosen.map, chosen.stage.b_z.dtype
    if how == own.how:
        return ""
    said = GraphEntry(function=own.how.function, method=how.method, skipped=how.skipped)
    if how.method in STRAIGHT:
        conditions = {
            f"W above its blocks has norm {map.remainder:.1e}, {TOLERANCE[dtype]:g} may be left out": (
                map.remainder <= TOLERANCE[dtype]
            ),
            "convolutions are of images in float32": (
                how.method == "substitution" or (bool(stage.grid) and dtype is torch.float32)
            ),
            "it has no loop": how == said,
        }
    else:
        conditions = {f"the tolerance of a loop is {TOLERANCE[dtype]:g}": how.tolerance == TOLERANCE[dtype]}
        options = None
        if how.method == "sweeps":
            conditions["sweeps contract"] = _contracts(map)
            conditions["they have no step α"] = (how.alpha, how.inverse_steps) == (said.alpha, said.inverse_steps)
            options = SolverOptions("sweep", max_steps=MOST_SWEEPS, throw=False)
        else:
            conditions[f"α = {how.alpha:g} has a proximal map"] = how.alpha == 1.0 or _closed(stage)
            conditions["nothing of W is left out"] = how.skipped == 0.0
            if 1e-3 <= how.alpha <= 1e3:  # beyond, no α of a monotone map is
                conditions["Newton-Schulz steps suffice"] = (
                    _inverse_steps(map, how.alpha) <= how.inverse_steps <= MOST_INVERSE
                )
                options = SolverOptions("peaceman_rachford", max_steps=MOST_STEPS, throw=False, alpha=how.alpha)
        if all(conditions.values()):
            steps = None if options is None else _steps(stage, map, options)
            wanted = None if steps is None else _most(steps)
            conditions[f"at some input {steps} steps are needed, and a graph has about {wanted}"] = (
                wanted is not None and 0.5 * wanted <= how.max_steps <= 2.0 * wanted
            )
    if how.method != "splitting":
        conditions[f"what is left out has norm {map.remainder:.3e}"] = map.remainder <= how.skipped <= 1.0
    conditions[f"its function is {own.how.function}"] = how.function == own.how.function
    return "; ".join(reason for reason, holds in conditions.items() if not holds)


def _most(steps: int) -> int:
    """The steps that a graph may take where a few inputs needed so many."""
    return max(100, SPARE * steps)


def stored_W(stage: LBEN) -> tuple[Tensor, tuple[int, int]]:
    """W as it is stored, and the offset of its first tap.

    Dense: the floats in use on a CPU (a GPU may assemble them in TF32). On images, where those are spectra: the window of its
    kernels that holds anything, rebuilt in float64 and rounded once; what rounding has left is stored as 0.
    """
    dtype, grid = stage.b_z.dtype, stage.grid
    if not grid:
        stage = stage if stage.b_z.device.type == "cpu" else copy.deepcopy(stage).cpu()
        return stage.state_map().W.detach().contiguous(), (0, 0)
    K = _without_noise(grid.kernels(stage.dae().W.cpu()), grid, dtype)
    (h, w), places = grid.image, [centred(size) for size in grid.image]
    rows, columns = window(K, places[0], places[1], 0.0)
    taps = K[..., [r % h for r in rows], :][..., [c % w for c in columns]]
    return taps.to(dtype).contiguous(), (rows.start, columns.start)


def _without_noise(K: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Kernels of W without the taps that are small and, together, less than half of what a solver leaves."""
    eps, largest = torch.finfo(dtype).eps, float(K.abs().max()) if K.numel() else 0.0
    for floor in (64.0 * eps, eps, NOISE):
        kept = K.where(K.abs() > floor * largest, 0.0)
        if float(torch.linalg.matrix_norm(grid.matrices(K - kept)).amax()) <= 0.5 * TOLERANCE[dtype]:
            return kept
    return K


def full_kernels(W: Tensor, origin: Sequence[int], grid: Grid) -> Tensor:
    """The inverse of `stored_W`: kernels of the image's size, zero where nothing is stored; a dense W as it is."""
    if not grid:
        return W
    h, w = grid.image
    K = W.new_zeros(*W.shape[:2], h, w)
    rows, columns = (
        [(o + k) % size for k in range(length)] for o, length, size in zip(origin, W.shape[2:], (h, w), strict=True)
    )
    K[..., torch.tensor(rows).unsqueeze(-1), torch.tensor(columns)] = W
    return K


def slices(sizes: Sequence[int]) -> list[slice]:
    """Consecutive slices of these sizes."""
    return [slice(a, b) for a, b in pairwise([0, *accumulate(sizes)])]


def _convolves(draft: Plan) -> bool:
    """Whether convolutions are worth it: onnxruntime has them in float32, and they cost less than the transforms."""
    stage, W, kept = draft.stage, draft.W, draft.kept
    if not stage.grid or W.dtype != torch.float32:
        return False
    h, w = stage.grid.image
    taps = float(kept.sum()) * math.prod(W.shape[2:])
    for K in (stage.U.detach(), stage.G.detach()):
        rows, columns = window(K, centred(h), centred(w), noise(K))
        taps += float((K != 0).flatten(2).any(-1).sum()) * len(rows) * len(columns)
    nonlinear = sum(size for activation, size in stage.sigma if activation.name != "identity")
    transforms = (2 * nonlinear + stage.U.shape[1] + len(stage.b_y)) * (w + 2 * h)
    products = 2.0 * (float(kept.sum()) + stage.U[..., 0, 0].numel() + stage.G[..., 0, 0].numel())
    return taps <= 2.0 * (transforms + products)


def _contracts(map: StateMap) -> bool:
    """Whether block sweeps converge from anywhere: ρ(N) < 1 for the norms N of the blocks of W, as |e_k| ≤ Σ_j N_kj |e_j|."""
    if len(map.blocks) == 1:
        return False
    parts = slices(map.blocks)
    N = torch.tensor([[float(spectral_norm(map.W[..., a, b])) for b in parts] for a in parts], dtype=torch.float64)
    return float(torch.linalg.eigvals(N).abs().max()) < 1.0


def _probes(stage: LBEN) -> Tensor:
    """A few random inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, *stage.input_shape, generator=generator, dtype=torch.float64)
    return torch.cat([x, torch.randn(x.shape, generator=generator, dtype=torch.float64)]).to(stage.b_z)


def _steps(stage: LBEN, map: StateMap, options: SolverOptions) -> int | None:
    """The most steps that any of a few inputs needs; None where one does not get there."""
    solution = solve(map, stage.sigma, stage.drive(_probes(stage)), options, f"the equilibrium of {stage.name!r}")
    return int(solution.steps.max()) if bool(solution.converged.all()) else None


def _splitting_step(stage: LBEN, map: StateMap) -> tuple[float, int]:
    """(α, steps): the better of the map's two steps on a few inputs, 1 where σ has no closed proximal map."""
    trials = []
    for alpha in dict.fromkeys(map.splitting_steps if _closed(stage) else (1.0,)):
        options = SolverOptions("peaceman_rachford", max_steps=MOST_STEPS, throw=False, alpha=alpha)
        if (steps := _steps(stage, map, options)) is not None:
            trials.append((steps, alpha))
    if not trials:
        raise CheckpointError(
            stage.name,
            "its equilibrium",
            f"is not found within {MOST_STEPS} Peaceman-Rachford steps at some random input, so no graph is written for "
            "it. Usual cause: training at epsilon = 0 has used up the margin of condition (3). A file of the weights alone, "
            "with the suffix .safetensors, can be written",
        )
    steps, alpha = min(trials)
    return alpha, steps


def _closed(stage: LBEN) -> bool:
    """Whether prox_{αf} of all its σ is known for every α."""
    return all(activation.name in CLOSED for activation, _ in stage.sigma)


def _inverse_steps(map: StateMap, alpha: float) -> int:
    """How many Newton-Schulz steps R ← R(2I − AR) make R the inverse of A = I + α(I − W) to `INVERSE`."""
    eye = torch.eye(map.states, dtype=map.W.dtype, device=map.W.device)
    A = (1.0 + alpha) * eye - alpha * map.W
    size = A.real.abs() + A.imag.abs() if A.is_complex() else A.abs()  # sums of the real form that the graph has
    R = A.mH / (size.sum(-1).amax(-1) * size.sum(-2).amax(-1)).reshape(*map.grid.batch, 1, 1)
    wanted = INVERSE[eye.real.dtype]
    for step in range(MOST_INVERSE):
        defect = eye - A @ R
        if float(torch.linalg.matrix_norm(defect).amax()) <= wanted:
            return step
        R = R + R @ defect
    raise NotPSDError("I + α(I - W)", 0.0, wanted)


def road(chosen: Plan, exact: DAE) -> Road:
    """What the sums of the graph add up, for error bounds (`certification.accuracy`): IEEE sums in any order, no TF32.

    ``exact``: what errors are measured from; the graph runs the stored W, U and G, which may be off it.
    """
    stage = chosen.stage
    u, grid = unit_roundoff(stage.b_z.dtype), stage.grid
    more = len(stage.blocks) + 8  # partial sums, bias
    smooth = sum(size for activation, size in stage.sigma if activation.name in ABSOLUTE)
    rest = {
        "skipped": norm_bound(exact.W.masked_fill(chosen.kept, 0.0)),
        "tolerance": chosen.how.tolerance,
        "absolute": ELEMENTARY * u * (smooth * grid.pixels) ** 0.5,
    }
    if not grid:
        W, U, G = (M.detach().double() for M in (chosen.W, stage.U, stage.G))
        # the subtraction rounds
        off = [(M - N).abs() * SLACK for M, N in ((W, exact.W), (U, exact.U), (G, exact.G))]
        T, U, G = W.abs() * chosen.kept, U.abs(), G.abs()
        counts = ((T != 0).sum(-1) + (U != 0).sum(-1) + more, (G != 0).sum(-1) + more)
        return Road(T, U, G, counts, (off[0], off[1], off[2]), eta=0.0, **rest)
    kernels = [
        full_kernels(chosen.W, chosen.origin, grid).double(),
        stage.U.detach().double(),
        stage.G.detach().double(),
    ]
    spectra = (exact.W, exact.U, exact.G)
    sums = [K.abs().sum((2, 3)) for K in kernels]
    floors = [noise(K) for K in kernels]
    # off the exact spectra: those of the kernels themselves, and what is taken for noise
    blurs = [
        grid.matrices_error(K, M) + K.abs().where(K.abs() <= floor, 0.0).sum((2, 3)) + floor
        for K, M, floor in zip(kernels, spectra, floors, strict=True)
    ]
    if chosen.how.method == "convolutions":
        T, U, G = (S.expand(*grid.batch, -1, -1) for S in (sums[0] * chosen.kept, *sums[1:]))
        taps = [(K != 0).flatten(2).sum(-1) for K in kernels]
        counts = ((taps[0] * chosen.kept).sum(-1) + taps[1].sum(-1) + more, taps[2].sum(-1) + more)
        return Road(T, U, G, counts, (blurs[0], blurs[1], blurs[2]), eta=0.0, pixels=True, **rest)
    h, w = grid.image
    # two products, of w and of 2h terms, with cosines that are rounded once: of kernels entry by entry, of images in norm
    each = 2.0 * (gamma(w + 4, u) + 2.0 * gamma(2 * h + 4, u))
    along, across = gamma(w + 4, u) * (w + 2) ** 0.5, gamma(2 * h + 4, u) * (2.0 * h) ** 0.5
    eta = SLACK * (along + across * (1.0 + along))
    blurs = [blur + each * S for blur, S in zip(blurs, sums, strict=True)]
    T, U, G = (exact.W * chosen.kept).abs(), exact.U.abs(), exact.G.abs()
    count = operations(1, exact.W)
    counts = (
        count * ((T != 0).sum(-1).amax(0) + (U != 0).sum(-1).amax(0) + more),
        count * ((G != 0).sum(-1).amax(0) + more),
    )
    return Road(T, U, G, counts, (blurs[0], blurs[1], blurs[2]), eta=eta, **rest)
