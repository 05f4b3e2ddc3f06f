"""A converted model: LBEN stages and glue in the order of the source, with the bookkeeping of its Lipschitz constant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .equilibrium import Solution, SolverOptions, state_error
from .errors import NoCertificateError, ShapeError
from .lben import LBEN
from .schema import NetworkInfo, StageInfo


@dataclass(frozen=True)
class Evaluation:
    """Logits with a bound of what the equilibrium solves may have left in them.

    ``value`` (B, q); ``error`` (B,): a bound of ‖value − exact output‖₂, the residual of every stage carried through the
    constants of what follows it (evaluation round-off not included); ``converged`` (B,) bool; ``methods`` of the stages.
    """

    value: Tensor
    error: Tensor
    converged: Tensor
    methods: tuple[str, ...]


class Network(nn.Module):
    """Steps in order: `LBEN` stages, and glue modules whose Lipschitz constants are given.

    ``steps``: all modules; ``stages``: the LBEN among them; ``lipschitz``: the product of all their constants, L of the
    network from input to output; ``input_shape`` of one sample. Glue parameters are frozen: their constants are fixed.
    Raises `ShapeError` for inputs that do not fit, `NotConvergedError` from the stages.
    """

    def __init__(
        self, steps: Sequence[nn.Module], glue_lipschitz: Sequence[float | None], input_shape: Sequence[int]
    ) -> None:
        super().__init__()
        if len(steps) != len(glue_lipschitz):
            raise ShapeError("glue_lipschitz", f"{len(steps)} entries", f"{len(glue_lipschitz)} entries")
        self.steps = nn.ModuleList(steps)
        self.glue_lipschitz = tuple(
            None if isinstance(s, LBEN) else g for s, g in zip(steps, glue_lipschitz, strict=True)
        )
        self.input_shape = tuple(int(size) for size in input_shape)
        for step, known in zip(steps, self.glue_lipschitz, strict=True):
            if not isinstance(step, LBEN):
                if known is None or not 0.0 < known < math.inf:
                    raise NoCertificateError(type(step).__name__, f"its Lipschitz constant is {known}")
                step.requires_grad_(False)

    @property
    def stages(self) -> list[LBEN]:
        """The LBEN stages, in order."""
        return [step for step in self.steps if isinstance(step, LBEN)]

    @property
    def step_lipschitz(self) -> list[float]:
        """The constant of every step, in order."""
        return [
            step.lipschitz if isinstance(step, LBEN) else float(known or 0.0)
            for step, known in zip(self.steps, self.glue_lipschitz, strict=True)
        ]

    @property
    def lipschitz(self) -> float:
        """L: the product of the constants of all steps."""
        return math.prod(self.step_lipschitz)

    def set_options(self, options: SolverOptions) -> Network:
        """Solve all stages with these options; returns the network."""
        for stage in self.stages:
            stage.options = options
        return self

    def _checked(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.input_shape or x.dim() < 1:
            shape = ", ".join(["B", *map(str, self.input_shape)])
            raise ShapeError(
                "the input of the network", f"({shape})", tuple(x.shape), "The first dimension is the batch."
            )
        return x

    def forward(self, x: Tensor) -> Tensor:  # (B, *input_shape) -> (B, q)
        """The output for a batch."""
        x = self._checked(x)
        for step in self.steps:
            x = step(x)
        return x

    def evaluate(self, x: Tensor) -> Evaluation:
        """Outputs of a batch with a bound of the error left by inexact solves (FORMULAS 6); no gradient.

        Samples that do not converge are marked, not raised: nothing may be certified about them.
        Raises `NoCertificateError` when a stage offers no bound: neither (3) with its Λ nor a spectral radius of |W|
        below 1.
        """
        with torch.no_grad():
            x = self._checked(x)
            error = torch.zeros(len(x), dtype=torch.float64, device=x.device)
            converged = torch.ones(len(x), dtype=torch.bool, device=x.device)
            methods = []
            for step, L in zip(self.steps, self.step_lipschitz, strict=True):
                error = L * error
                if isinstance(step, LBEN):
                    options = SolverOptions(step.options.method, step.options.tolerance, step.options.max_steps, False)
                    solution = step.solve(x, options)
                    x, bound = _readout(step, x, solution)
                    error = error + bound
                    converged &= solution.converged
                    methods.append(solution.method)
                else:
                    x = step(x)
            return Evaluation(x, error, converged, tuple(methods))

    def methods(self, x: Tensor) -> list[str]:
        """Which solver each stage takes for a batch, in order."""
        found = []
        with torch.no_grad():
            for step in self.steps:
                if isinstance(step, LBEN):
                    found.append(step.solve(x).method)
                x = step(x)
        return found

    def info(self) -> NetworkInfo:
        """Sizes, constants and activations of every step."""
        steps = []
        for step, L in zip(self.steps, self.step_lipschitz, strict=True):
            count = sum(p.numel() for p in step.parameters())
            if isinstance(step, LBEN):
                steps.append(
                    StageInfo(
                        kind="lben",
                        name=step.name,
                        inputs=step.U.shape[1],
                        states=len(step.b_z),
                        outputs=len(step.b_y),
                        blocks=list(step.blocks),
                        activations=", ".join(f"{activation} x {size}" for activation, size in step.sigma),
                        epsilon=step.epsilon,
                        lipschitz=L,
                        parameters=count,
                    )
                )
            else:
                steps.append(StageInfo(kind="glue", name=repr(step), lipschitz=L, parameters=count))
        dtype = next((p.dtype for p in self.parameters()), torch.float64)
        return NetworkInfo(
            input_shape=list(self.input_shape),
            lipschitz=self.lipschitz,
            parameters=sum(s.parameters for s in steps),
            dtype=str(dtype).removeprefix("torch."),
            steps=steps,
        )

    def extra_repr(self) -> str:
        return f"L={self.lipschitz:g}, input_shape={self.input_shape}"


def _readout(stage: LBEN, x: Tensor, solution: Solution) -> tuple[Tensor, Tensor]:
    """y = Gs + b_y at s = σ(Wz + u), one evaluation after the solve, and a bound of ‖G(s − z*)‖ (B,).

    With d = W(z − s): min( √(2L/μ), ‖GΛ^{-1/2}‖/μ ) |d|_Λ where μ > 0 (FORMULAS f1, f4), and ‖ |G| N |d| ‖,
    N = (I − |W|)⁻¹ ≥ 0, where the spectral radius of |W| is below 1; the smaller one counts.
    """
    map = stage.state_map()
    s, d, mu = state_error(map, stage.sigma, solution.value, stage.drive(x))
    s, d = s.double(), d.double()
    Lambda, G = stage.Psi.double().reciprocal(), stage.G.double()
    bounds = []
    if mu is not None and mu > 0.0:
        size = torch.linalg.vector_norm(d * Lambda.sqrt(), dim=-1)
        bounds.append(
            min((2.0 * stage.lipschitz / mu) ** 0.5, float(torch.linalg.matrix_norm(G * Lambda.rsqrt(), 2)) / mu) * size
        )
    if map.comparison is not None:
        bounds.append(torch.linalg.vector_norm(d.abs() @ map.comparison.double().mT @ G.abs().mT, dim=-1))
    if not bounds:
        raise NoCertificateError(
            stage.name,
            f"condition (3) has margin μ = {mu:.2e} with Λ = Ψ⁻¹ and |W| has spectral radius ≥ 1, so the error of an "
            "inexact solve cannot be bounded. Convert with epsilon > 0 and delta > 0 for a strict start.",
        )
    return (s @ G.mT + stage.b_y.double()).to(x.dtype), torch.stack(bounds).amin(0)
