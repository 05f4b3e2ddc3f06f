"""The least Lipschitz constants that can be proved for a converted network, of the logits and of each of their differences.

A network is read as a chain of *segments*: LBEN stages, each with the affine glue around it taken into its U and G
where it is small enough to be a matrix, and glue that is left, with its constant. Dense stages with nothing but affine glue
and activations between them make one segment: together they have a better constant than the product of theirs (FORMULAS L3).

Three methods, each at least as strong as the one before for every pair of classes:

    prescribed   √2·L, L the product of the constants the stages were built with
    pairwise     the constant of y_i − y_j for the Λ at hand: G replaced by G_i − G_j
    tightened    the same with the best Λ for each pair (`lipconvert.certification.tighten`)

Where the whole network is one dense segment, tightened constants are the optimum of LipSDP with one multiplier for each
neuron (Fazlyab et al. 2019, arXiv:1906.04893), of slopes in [0, 1], to a relative 1e-6: of every pair, and of the logits as a
vector. Linear rows are none of its neurons, wherever they are (`certification.linear_rows`). It is more than that optimum

- where there are several segments: stages on images and what follows them, more than `MOST_MERGED` states together, glue of
  plugins, or an activation that is glue behind the last stage. Constants of segments multiply;
- on images, where Λ is the same in all pixels of a channel, and linear rows are covered as neurons are;
- where the linear rows read each other in a cycle that is singular to float64, which are then covered as neurons are, too;
- where ``seconds`` end the search.

Everything is proved for the floats in use (`lipconvert.certification.proofs`).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ..dae.activations import MaxMin, activation_of, is_activation
from ..dae.compose import MOST_DENSE, elementwise, max_min
from ..dae.conditions import cascade, starts_linear, strict_weights
from ..dae.dae import DAE
from ..errors import InvalidParameterError, NoCertificateError
from ..foundation.arguments import isolated, number
from ..foundation.integrity import frozen, require_own, same, settings
from ..linalg.rounding import SLACK, gamma, operations, product
from ..linalg.spectrum import Grid, hermitian, linear_solve
from ..linalg.state_map import StateMap
from ..networks.documents import Method, Search
from ..networks.glue import KNOWN, PadChannels
from ..networks.lben import LBEN
from ..networks.network import Network
from .documents import LipschitzReport, PairBound, StageProof
from .linear_rows import Reduced, without_linear_rows
from .proofs import Enclosure, NotProved, Proof, prove_constant, prove_gains, prove_lmi, prove_monotone
from .sdp import sdp_gain, sdp_output
from .tighten import MIDDLE, best_gains, best_outputs, best_scales, least_gains, least_output

METHODS: tuple[Method, ...] = ("prescribed", "pairwise", "tightened")
# What can be asked of a bound alone: "sdp" finds Λ by a semidefinite program, for small dense networks (`certification.sdp`).
SEARCHES: tuple[Search, ...] = (*METHODS, "sdp")

# States up to which neighbouring dense stages are proved as one: a Newton step costs a dozen n³ for each pair of classes.
MOST_MERGED = 1024

# A multiplier is sought only where it may lower the square of a constant by more than this.
WORTH = 1.0 + 1e-6

# δ of the strict multiplier that a search starts from: large enough to be far from where R is singular.
CENTRE = 0.1

# δ of the steepest weights of a metric for errors: trained networks are next to singular in Λ, and errors grow as 1/μ.
STEEP = 4.0

# A product of a few constants, each correct to the last place.
UP = 1.0 + 2.0**-44

Progress = Callable[[str, int, int], object]


@dataclass(frozen=True, eq=False)
class Segment:
    """x ↦ Gz + const with H(Λ, L) ≻ 0 proved: consecutive steps of a network as one enclosed equilibrium network."""

    name: str
    enclosure: Enclosure
    Lambda: Tensor
    lipschitz: float
    layers: tuple[int, ...]  # states of each layer of a cascade
    first_linear: bool  # whether the first of them is an identity
    linear: Tensor  # (n,), which rows have an identity as activation: the slope 1

    @cached_property
    def start(self) -> Tensor:
        """Q with R(Q) ≻ 0, well inside if possible: the strict multiplier of a larger L, else Λ/L, where R = (H + G′G/L)/L.

        H may be next to singular at Λ, and from there the search needs a hundred steps to get away from the boundary.
        """
        Q = self.Lambda * strict_weights(self.layers, self.first_linear, CENTRE) / (self.lipschitz * (1.0 + CENTRE))
        R, _, _ = self.enclosure.lmi(Q, None, "U")
        inside = not bool(torch.linalg.cholesky_ex(R)[1].any())
        return Q if inside else self.Lambda / self.lipschitz

    def whole(self, G: Tensor, radius_G: Tensor | None) -> Reduced:
        """x ↦ Gz with all rows."""
        E = replace(self.enclosure, G=G, radius_G=radius_G)
        return Reduced(E, torch.arange(E.states), 0, torch.zeros(len(G), dtype=torch.float64))

    def reduced(self, G: Tensor, radius_G: Tensor | None) -> Reduced:
        """x ↦ Gz without the linear rows, what the best multiplier is searched for.

        With all where there are none, on a grid, or where they cannot be taken out in float64 (`without_linear_rows`).
        """
        whole = self.whole(G, radius_G)
        if whole.enclosure.grid or not bool(self.linear.any()):
            return whole
        return without_linear_rows(whole.enclosure, self.linear) or whole


@dataclass(frozen=True, eq=False)
class LipschitzBound:
    """What was proved by one method: ‖f(x) − f(x′)‖ ≤ ``lipschitz`` ‖x − x′‖, |(y_i − y_j)(x) − …(x′)| ≤
    ``pairs``_ij ‖x − x′‖.

    ``pairs`` (q, q) float64, symmetric, 0 on the diagonal, at most √2·``lipschitz``; None where the output is no vector of
    logits. ``prescribed``: L the network was built with. ``segments``: names and constants of what was multiplied.
    ``seconds``: time it took.
    """

    method: Search
    lipschitz: float
    pairs: Tensor | None
    prescribed: float
    segments: tuple[tuple[str, float], ...]
    stages: tuple[StageProof, ...]
    seconds: float

    def report(self, net: Network, empirical: float | None = None) -> LipschitzReport:
        """As a document."""
        pairs = []
        if self.pairs is not None:
            pairs = [PairBound(i=i, j=j, lipschitz=float(self.pairs[i, j])) for i, j in class_pairs(len(self.pairs))]
        return LipschitzReport(
            method=self.method,
            dtype=str(net.dtype).removeprefix("torch."),
            prescribed=self.prescribed,
            lipschitz=self.lipschitz,
            empirical=empirical,
            pairs=pairs,
            stages=list(self.stages),
            seconds=self.seconds,
        )


class Bounds:
    """Proofs for one network, kept while several methods are asked for; made on the CPU in float64.

    Raises `NoCertificateError` where a stage has no proof at all: the message names the stage and says why.
    """

    @isolated
    def __init__(self, net: Network) -> None:
        self.net, self.dtype = net, net.dtype
        self.stages: list[StageProof] = []
        self.monotone: list[list[tuple[Tensor, float]]] = []  # of each LBEN: metrics P with their proved μ, 0 without
        self._chain: list[Segment | tuple[str, float]] = []
        self._functionals: tuple[Tensor, Tensor] | None = None
        self._followed: Segment | None = None  # the last segment with the glue behind it taken in
        self._found: dict[str, LipschitzBound] = {}
        self._read()

    @property
    def delta(self) -> float:
        """The largest δ of the stages: their constants are proved at L(1 + δ)."""
        return max((stage.delta or 0.0 for stage in self.stages), default=0.0)

    def require_unchanged(self) -> None:
        """Raises `NoCertificateError` where the network is no longer the one that was proved."""
        require_own(self.net)
        before, now = self._state, _state(self.net)
        for name in before.keys() | now.keys():
            if name not in before or name not in now or not same(before[name], now[name]):
                reason = (
                    "it has changed since its constants were proved (trained, cast, moved or set). Make a new Certifier"
                )
                raise NoCertificateError(f"{name!r} of the network", reason)

    def _read(self) -> None:
        net = self.net
        require_own(net)
        for stage in net.stages:
            stage.refresh()  # a few entries written through ``.data`` are not noticed: what is proved is what runs
        self._state = _state(net, copy=True)
        pending: list[tuple[nn.Module, tuple[int, ...], float]] = []  # glue not yet taken in or counted
        shape = net.input_shape
        for step, L in zip(net.steps, net.step_lipschitz, strict=True):
            if isinstance(step, LBEN):
                segment = self._prove(step)
                self._append(segment, pending)
                pending = []
            else:
                self.stages.append(StageProof(name=repr(step), kind="glue", prescribed=L, proved=L * UP))
                pending.append((step, shape, L * UP))
            shape = output_shape(step, shape)
        self.shape = shape
        self.classes = shape[0] if len(shape) == 1 and shape[0] > 1 else None
        self._behind = math.prod([L for _, _, L in pending]) * UP
        if not self._chain:
            return
        last = self._chain[-1]
        assert isinstance(last, Segment)
        M = _matrix(pending, last.enclosure, behind=True)
        if self.classes:
            self._functionals = M
        if pending and M is not None and not last.enclosure.grid:
            self._followed = _followed(last, M, self._behind)

    def _prove(self, stage: LBEN) -> Segment:
        dae = stage.running()
        enclosure = Enclosure.of_stage(stage)
        proof = prove_constant(dae, enclosure)
        self.monotone.append([(P, prove_monotone(enclosure, P)) for P in metrics(dae)])
        mu = max(mu for _, mu in self.monotone[-1])
        self.stages.append(
            StageProof(
                name=stage.name,
                kind="lben",
                states=dae.states,
                prescribed=stage.lipschitz,
                proved=proof.lipschitz if isinstance(proof, Proof) else None,
                delta=proof.delta if isinstance(proof, Proof) else None,
                mu=mu or None,
                rounding=proof.rounding,
                reason=proof.reason if isinstance(proof, NotProved) else "",
            )
        )
        if isinstance(proof, NotProved):
            raise NoCertificateError(f"stage {stage.name!r}", proof.reason)
        return _segment(dae, enclosure, proof.Lambda, proof.lipschitz)

    def _append(self, segment: Segment, pending: list[tuple[nn.Module, tuple[int, ...], float]]) -> None:
        """Put a stage behind the chain, with the glue between taken into it or counted, and joined where that is possible."""
        for k, (module, shape, _) in enumerate(pending):
            if (nonlinear := _nonlinear(module, shape)) and _may_join(nonlinear, segment):
                self._append(nonlinear, pending[:k])
                pending = pending[k + 1 :]
                break
        before = self._chain[-1] if self._chain and isinstance(self._chain[-1], Segment) else None
        if not segment.enclosure.grid:
            M = _matrix(pending, segment.enclosure, behind=False)
            if M is not None:
                constant = math.prod([L for _, _, L in pending]) * UP
                if before is not None and _may_join(before, segment):
                    self._chain[-1] = _joined(before, segment, M, constant)
                    return
                self._chain.append(_absorbed(segment, M, constant))
                return
        elif all(type(module) is PadChannels for module, _, _ in pending) and pending:
            channels = pending[0][1][0]  # zero channels do nothing: their columns of U are not needed
            enclosure = segment.enclosure
            kept = replace(
                enclosure,
                U=enclosure.U[..., :channels],
                radius_U=None if enclosure.radius_U is None else enclosure.radius_U[..., :channels],
            )
            self._chain.append(replace(segment, enclosure=kept))
            return
        self._chain += [(repr(module), L) for module, _, L in pending]
        self._chain.append(segment)

    @isolated
    def bound(
        self, method: str = "tightened", *, seconds: float | None = None, seen: Progress | None = None
    ) -> LipschitzBound:
        """The constants by one method; those of weaker ones are found first, none is ever better than a stronger one's.

        ``seconds``: for the search of Λ, all told; the proofs of what was found come on top. ``seen``: called with what is
        being done, done and total. Raises `InvalidParameterError` for an unknown method.
        """
        if method not in SEARCHES:
            raise InvalidParameterError("method", repr(method), f"it must be one of {', '.join(SEARCHES)}")
        if seconds is not None:
            seconds = number(seconds, "seconds", "it must be a positive number", above=0.0, finite=False)
        deadline = None if seconds is None else time.monotonic() + seconds
        for name in _up_to(method):
            if name not in self._found:
                begun = time.monotonic()
                bound = self._by(name, deadline, seen or (lambda what, done, total: None))
                self._found[name] = replace(bound, seconds=time.monotonic() - begun)
        return self._found[method]

    def _by(self, method: Search, deadline: float | None, seen: Progress) -> LipschitzBound:
        weaker = [self._found[name] for name in _up_to(method)[:-1]]
        constants: list[tuple[str, float]] = []
        behind = self._behind
        for k, part in enumerate(self._chain):
            if isinstance(part, Segment) and method in ("tightened", "sdp"):
                seen(f"the constant of {part.name}", k, len(self._chain))
                if k == len(self._chain) - 1 and self._followed is not None:
                    part, behind = self._followed, 1.0
                constants.append((part.name, _least_constant(part, method, deadline)))
            else:
                constants.append((part.name, part.lipschitz) if isinstance(part, Segment) else part)
        lipschitz = math.prod([L for _, L in constants]) * behind * UP
        lipschitz = min([lipschitz, *(other.lipschitz for other in weaker)])
        pairs = None
        if self.classes is not None:
            pairs = torch.full((self.classes, self.classes), 2.0**0.5 * UP * lipschitz, dtype=torch.float64)
            if self._functionals is not None and method != "prescribed":
                prefix = math.prod([L for _, L in constants[:-1]]) * UP
                pairs = torch.minimum(pairs, prefix * self._gains(method, deadline, seen) * UP)
            for other in weaker:
                assert other.pairs is not None
                pairs = torch.minimum(pairs, other.pairs)
            pairs.fill_diagonal_(0.0)
        return LipschitzBound(
            method, lipschitz, pairs, self.net.lipschitz, tuple(constants), tuple(self.stages), seconds=0.0
        )

    def readout_rows(self) -> tuple[Tensor, Tensor] | None:
        """(outputs (classes, …), their sizes): the logits as functionals of the last stage's output, and |·| of the same with
        radii, (classes, q) or (classes, F, q) in coordinates; None without them."""
        if self._functionals is None:
            return None
        M, radius = self._functionals
        return M, (M.abs() + radius) * UP

    @cached_property
    def functionals(self) -> tuple[Tensor, Tensor, list[tuple[int, int]]] | None:
        """(rows (m, [F,] n), their radii, the pairs (i, j), i > j): y_i − y_j as functionals of the last segment's states."""
        if self._functionals is None or self.classes is None:
            return None
        segment = self._chain[-1]
        assert isinstance(segment, Segment)
        E = segment.enclosure
        M, radius_M = (
            self._functionals
        )  # (q, outputs) or (q, F, outputs), coordinates of functionals of the stage's output
        pairs = class_pairs(self.classes)
        i, j = torch.tensor(pairs).T
        difference, spread = M[i] - M[j], radius_M[i] + radius_M[j] + 2.0**-52 * (M[i].abs() + M[j].abs())
        G = E.G.mH  # (…, n, q)
        rows = torch.einsum("fnq,mfq->mfn", G, difference) if E.grid else difference @ E.G
        abs_G = E.G.abs()
        contract = "fqn,mfq->mfn" if E.grid else "qn,mq->mn"
        count = gamma(operations(abs_G.shape[-2] + 4, E.G))
        radius = torch.einsum(contract, abs_G, count * difference.abs() + (1.0 + count) * spread)
        if E.radius_G is not None:
            radius = radius + torch.einsum(contract, E.radius_G, difference.abs() + spread)
        return rows, radius * UP, pairs

    def _gains(self, method: Search, deadline: float | None, seen: Progress) -> Tensor:
        """(q, q): the proved constants of all logit differences over the last segment alone."""
        segment = self._chain[-1]
        assert self.functionals is not None
        assert isinstance(segment, Segment)
        rows, radius, pairs = self.functionals
        squares = self._squares
        taken = (segment.whole if method == "pairwise" else segment.reduced)(rows, radius)
        E, known, rest, start = taken.enclosure, taken.known, taken.rest, taken.multiplier(segment.start)
        rows, radius = E.G, E.radius_G

        def prove(Q: Tensor, which: Tensor) -> None:
            """Lower the squares of some pairs to what a multiplier proves."""
            proved, _ = prove_gains(E, Q, rows[which], None if radius is None else radius[which])
            proved = torch.where(rest[which] > 0.0, (proved.sqrt() + rest[which]).square() * UP, proved)
            squares[which] = torch.minimum(squares[which], proved)

        if method != "pairwise":  # Λ proves more where linear rows are none of its
            prove(taken.multiplier(segment.Lambda / segment.lipschitz), torch.arange(len(rows)))
        # Where slopes that the multipliers must cover reach the bound, there is nothing to gain: the identity in a residual
        # network, for one.
        left = (squares > WORTH * least_gains(E, rows, known)).nonzero().flatten()
        Q = start.expand(len(left), -1)
        if method == "pairwise":
            Q = best_scales(E, segment.Lambda, rows[left]).unsqueeze(-1) * segment.Lambda
        elif method == "sdp" and len(left):
            Q = torch.stack([sdp_gain(E, row)[0] for row in rows[left]])
        elif len(left):
            seen("the best multiplier of all pairs", 0, len(pairs))
            common = best_gains(E, start, rows[left].unsqueeze(0), known=known, deadline=deadline, last=MIDDLE)
            prove(common[0], left)
            parts = []
            for part in left.split(16):
                seen("the best multiplier of each pair", len(pairs) - len(left) + 16 * len(parts), len(pairs))
                parts.append(best_gains(E, common[0], rows[part].unsqueeze(1), known=known, deadline=deadline))
            Q = torch.cat(parts)
        for k in range(len(left)):
            prove(Q[k], left[k : k + 1])
        assert self.classes is not None
        constants = torch.zeros(self.classes, self.classes, dtype=torch.float64)
        i, j = torch.tensor(pairs).T
        constants[i, j] = constants[j, i] = squares.sqrt() * UP
        return constants

    @cached_property
    def _squares(self) -> Tensor:
        """(m,) the squared constants of the logit differences over the last segment, the best so far: L²‖c_i −
        c_j‖² at first."""
        segment = self._chain[-1]
        assert self.functionals is not None
        assert isinstance(segment, Segment)
        assert self._functionals is not None
        M, radius = self._functionals
        i, j = torch.tensor(self.functionals[2]).T
        squares = (((M[i] - M[j]).abs() + radius[i] + radius[j]) * UP).square().sum(-1)
        grid = segment.enclosure.grid
        squares = squares @ grid.weights(squares) if grid else squares
        return segment.lipschitz**2 * squares * SLACK


@isolated
def lipschitz_bound(
    net: Network, method: str = "tightened", *, seconds: float | None = None, seen: Progress | None = None
) -> LipschitzBound:
    """The best constant that can be proved for a network: of its logits as a vector, and of every difference of two.

    ``method``: ``"prescribed"``, ``"pairwise"`` or ``"tightened"`` (module docstring); ``"sdp"``: what ``tightened`` finds by
    the interior-point solver of the extra ``sdp``, small dense networks only. ``seconds`` limits the search.
    Raises `NoCertificateError` where a stage has no proof, `InvalidParameterError` for what is not a converted network.
    """
    if not isinstance(net, Network):
        hint = "only a converted network has conditions to prove: lipconvert.convert(model)"
        raise InvalidParameterError("net", type(net).__name__, hint)
    return Bounds(net).bound(method, seconds=seconds, seen=seen)


def _up_to(method: str) -> list[Search]:
    """The methods up to one, weakest first; a semidefinite program is a road of its own to what ``tightened`` finds."""
    return ["prescribed", "pairwise", "sdp"] if method == "sdp" else list(METHODS[: METHODS.index(method) + 1])  # type: ignore[arg-type]


def class_pairs(classes: int) -> list[tuple[int, int]]:
    """(i, j) with i > j, in the order in which pairs of classes are numbered."""
    return [(i, j) for i in range(classes) for j in range(i)]


def extremes(pairs: Tensor) -> tuple[float, float]:
    """The least and the greatest constant (q, q) of a logit difference."""
    off = pairs[~torch.eye(len(pairs), dtype=torch.bool)]
    return float(off.min()), float(off.max())


def _state(net: Network, copy: bool = False) -> dict[str, object]:
    """All that the network's outputs and constants depend on, but for how equilibria are solved; also W, U, G as they run."""
    found = settings(net, copy=copy)
    for k, stage in enumerate(net.stages):
        found[f"the assembled matrices of stage {k}"] = frozen(stage.assembled(), copy)
    return found


def _segment(dae: DAE, enclosure: Enclosure, Lambda: Tensor, lipschitz: float) -> Segment:
    linear = torch.tensor([a.linear for a, size in dae.sigma for _ in range(size)], dtype=torch.bool)
    return Segment(dae.name, enclosure, Lambda, lipschitz, tuple(cascade(dae)), starts_linear(dae), linear)


def metrics(dae: DAE) -> list[Tensor]:
    """Diagonal metrics P (n,) in which I − W may be strongly monotone.

    Λ; Λ with weights that fall along the blocks (FORMULAS 3), gently and steeply (`STEEP`); and, where ρ(|W|) < 1,
    Perron's: with x = (I − |W|)⁻¹1 and y = (I − |W|′)⁻¹1, P = y/x makes I − |W|, so all the more I − W, strongly monotone.
    """
    map = StateMap(dae.W, dae.blocks, dae.Lambda, grid=dae.grid)
    found = list(map.metrics)
    if len(dae.blocks) > 1:
        found.append(dae.Lambda * strict_weights(dae.blocks, False, STEEP).to(dae.Lambda))
    if (N := map.comparison) is not None:
        found.append(N.sum(0) / N.sum(1))
    return [P.to("cpu", torch.float64) for P in found]


def output_shape(step: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one output of a step, from that of one input."""
    if isinstance(step, LBEN):
        return (len(step.b_y), *step.grid.image)
    probe = next(iter((*step.parameters(), *step.buffers())), torch.zeros((), dtype=torch.float32, device="cpu"))
    with torch.no_grad():
        return tuple(step(torch.zeros(1, *shape, dtype=probe.dtype, device=probe.device)).shape[1:])


def _matrix(
    pending: Sequence[tuple[nn.Module, tuple[int, ...], float]], enclosure: Enclosure, behind: bool
) -> tuple[Tensor, Tensor] | None:
    """Affine glue as a matrix with entrywise radii, or None: not affine, not the core's own, or too large.

    In front of a stage (p, inputs). ``behind`` it (outputs, q), on a grid in the coordinates of functionals (outputs, F, q).
    """
    known = all(
        type(module) in KNOWN and not is_activation(module) and type(module) is not MaxMin for module, _, _ in pending
    )
    grid = enclosure.grid if behind else Grid()
    neighbour = enclosure.G.shape[-2] if behind else enclosure.U.shape[-1]
    shape = pending[0][1] if pending else (neighbour, *grid.image)
    size = math.prod(shape)
    if not known or size > MOST_DENSE:
        return None
    # M of a chain, from its end: rows of derivatives at 0, which for an affine map is everywhere
    shape_behind = output_shape(pending[-1][0], pending[-1][1]) if pending else shape
    M = torch.eye(math.prod(shape_behind), dtype=torch.float64)
    with torch.enable_grad():
        for module, inside, _ in reversed(pending):
            at = torch.zeros(len(M), *inside, dtype=torch.float64, requires_grad=True)
            y = copy.deepcopy(module).cpu().double()(at)
            M = torch.autograd.grad(y, at, M.reshape(y.shape))[0].flatten(1)
    radius = 2.0**-52 * 4 * len(pending) * M.abs() * (M.abs() != 1.0)
    if behind and grid:
        images, spread = M.reshape(len(M), *shape), radius.reshape(len(M), *shape)
        spectra = grid.matrices(images)  # (F, outputs, q), conjugates of the coordinates
        error = grid.matrices_error(images, spectra) + spread.sum((2, 3))
        return spectra.conj().movedim(0, 1), error.movedim(0, 1)
    return M, radius


def _nonlinear(module: nn.Module, shape: tuple[int, ...]) -> Segment | None:
    """An activation or MaxMin of vectors that is glue, as the equilibrium network that it also is; None for other glue."""
    if len(shape) != 1:
        return None
    if type(module) is MaxMin:
        dae = max_min(*shape, name=repr(module))
    elif is_activation(module):
        dae = elementwise(activation_of(module), *shape, name=repr(module))
    else:
        return None
    proof = prove_constant(dae)
    return _segment(dae, Enclosure.of(dae), proof.Lambda, proof.lipschitz) if isinstance(proof, Proof) else None


def _absorbed(segment: Segment, M: tuple[Tensor, Tensor], constant: float) -> Segment:
    """A dense stage with affine glue in front taken into it: U ← UM; it keeps (10) with L·‖M‖ and Λ/‖M‖.

    With c ≥ ‖M‖: H(Λ/c, cL) ⪰ H(Λ, L)/c, so a proof of the stage is one of the two together.
    """
    matrix, radius = M
    if torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype)):
        return segment
    E = segment.enclosure
    U, spread = product(E.U, E.radius_U, matrix, radius)
    enclosure = replace(E, U=U, radius_U=spread)
    Lambda, L = segment.Lambda / constant, segment.lipschitz * constant * UP
    return _checked(replace(segment, enclosure=enclosure, Lambda=Lambda, lipschitz=L))


def _followed(segment: Segment, M: tuple[Tensor, Tensor], constant: float) -> Segment:
    """A dense segment with affine glue behind taken into it: G ← MG; it keeps (10) with L·‖M‖ and Λ·‖M‖ (FORMULAS L1, L2)."""
    E = segment.enclosure
    G, radius_G = product(*M, E.G, E.radius_G)
    enclosure = replace(E, G=G, radius_G=radius_G)
    return replace(
        segment, enclosure=enclosure, Lambda=segment.Lambda * constant, lipschitz=segment.lipschitz * constant * UP
    )


def _joined(first: Segment, second: Segment, M: tuple[Tensor, Tensor], constant: float) -> Segment:
    """second ∘ M ∘ first as one segment: every row kept, Λ = blkdiag(cL₂Λ₁, Λ₂/(cL₁)), L = cL₁L₂ (FORMULAS L3, L1)."""
    A, B = first.enclosure, second.enclosure
    UM, spread_UM = product(B.U, B.radius_U, *M)
    cross, spread = product(UM, spread_UM, A.G, A.radius_G)
    n, m = A.states, B.states

    def stacked(a: Tensor | None, c: Tensor | None, b: Tensor | None) -> Tensor:
        W = A.W.new_zeros(n + m, n + m)
        for block, rows, columns in ((a, slice(0, n), slice(0, n)), (c, slice(n, None), slice(0, n))):
            if block is not None:
                W[rows, columns] = block
        if b is not None:
            W[n:, n:] = b
        return W

    def below(U: Tensor | None) -> Tensor:
        zeros = A.U.new_zeros(n + m, A.U.shape[1])
        if U is not None:
            zeros[:n] = U
        return zeros

    def right(G: Tensor | None) -> Tensor:
        zeros = A.U.new_zeros(B.G.shape[0], n + m)
        if G is not None:
            zeros[:, n:] = G
        return zeros

    enclosure = Enclosure(
        stacked(A.W, cross, B.W),
        below(A.U),
        right(B.G),
        radius_W=stacked(A.radius_W, spread, B.radius_W),
        radius_U=below(A.radius_U),
        radius_G=right(B.radius_G),
    )
    L1, L2 = first.lipschitz, second.lipschitz
    Lambda = torch.cat([L2 * constant * first.Lambda, second.Lambda / (L1 * constant)])
    name = f"{first.name} > {second.name}"
    L, layers = L1 * L2 * constant * UP, first.layers + second.layers
    linear = torch.cat([first.linear, second.linear])
    return _checked(
        replace(first, name=name, enclosure=enclosure, Lambda=Lambda, lipschitz=L, layers=layers, linear=linear)
    )


def _may_join(first: Segment, second: Segment) -> bool:
    return not first.enclosure.grid and first.enclosure.states + second.enclosure.states <= MOST_MERGED


def _checked(segment: Segment) -> Segment:
    """The segment at the least inflation of its L for which there is a proof: its matrices were rounded once more."""
    for slack in (1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        L = segment.lipschitz * (1.0 + slack)
        answer = prove_lmi(segment.enclosure, segment.Lambda, L)
        if isinstance(answer, Proof):
            return replace(segment, lipschitz=L)
    assert isinstance(answer, NotProved)
    raise NoCertificateError(f"segment {segment.name!r}", answer.reason)


def _least_constant(segment: Segment, method: Search, deadline: float | None) -> float:
    """The constant of a segment's output as a vector, with the best Λ; never above the one it was proved with."""
    taken = segment.reduced(segment.enclosure.G, segment.enclosure.radius_G)
    E, known = taken.enclosure, taken.known
    least = _proved_output(taken, taken.multiplier(segment.Lambda / segment.lipschitz), segment.lipschitz)
    if least**2 <= WORTH * least_output(E, known) ** 2:
        return least
    if method == "sdp":
        Q = sdp_output(E)[0]
    else:
        # from the best multiplier for the sum of all outputs: far fewer steps away than one at the boundary
        together = (E.G.movedim(-2, 0) if E.grid else E.G).unsqueeze(0)
        start = taken.multiplier(segment.start)
        start = best_gains(E, start, together, known=known, deadline=deadline, last=MIDDLE)[0]
        Q = best_outputs(E, start, known=known, deadline=deadline)
    return _proved_output(taken, Q, least)


def _proved_output(taken: Reduced, Q: Tensor, least: float) -> float:
    """The constant of an output as a vector that a multiplier proves, where it is below ``least``; else ``least``."""
    E, rest = taken.enclosure, float(torch.linalg.vector_norm(taken.rest)) * SLACK
    H, d, _ = E.lmi(Q, None, "U")
    G = E.G / d
    square = float(torch.linalg.eigvalsh(hermitian(G @ linear_solve(H, G.mH))).amax())
    if not square > 0.0:
        return least
    for slack in (1e-9, 1e-7, 1e-5, 1e-3):
        L = square**0.5 * (1.0 + slack)
        if least <= L + rest:
            break
        if prove_lmi(E, Q * L, L):
            return (L + rest) * UP if rest else L
    return least
