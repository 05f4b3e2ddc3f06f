"""A converted model: LBEN stages and glue in the order of the source, with the bookkeeping of its Lipschitz constant."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .equilibrium import SolverOptions
from .errors import InvalidParameterError, NoCertificateError, ShapeError
from .glue import applied, core_lipschitz
from .lben import LBEN
from .schema import NetworkInfo, Provenance, StageInfo, TrainingSummary
from .spectrum import from_samples


class Network(nn.Module):
    """Steps in order: `LBEN` stages, and glue modules of known Lipschitz constant.

    ``steps``: all modules; ``stages``: the LBEN among them; ``lipschitz``: the product of all their constants, L of the
    network from input to output; ``input_shape`` of one sample. ``glue_lipschitz``: for each step None, or the constant of
    glue the core does not know; that of its own glue is read off the module whenever it is asked for. Glue is frozen.
    ``class_names``, ``provenance`` (set by `convert`) and ``training_summary`` go into checkpoints with it.
    Raises `ShapeError` for inputs that do not fit, `NotFiniteError` naming samples that are not numbers, `NotConvergedError`
    from the stages.
    """

    def __init__(
        self, steps: Sequence[nn.Module], glue_lipschitz: Sequence[float | None], input_shape: Sequence[int]
    ) -> None:
        super().__init__()
        if len(steps) != len(glue_lipschitz):
            raise ShapeError("glue_lipschitz", f"{len(steps)} entries", f"{len(glue_lipschitz)} entries")
        self.steps = nn.ModuleList(steps)
        self.glue_lipschitz = tuple(None if g is None else float(g) for g in glue_lipschitz)
        self.input_shape = tuple(int(size) for size in input_shape)
        self.class_names: tuple[str, ...] = ()
        self.provenance: Provenance | None = None
        self.training_summary: TrainingSummary | None = None
        for step, L in zip(steps, self.step_lipschitz, strict=True):
            if not 0.0 < L < math.inf:
                raise NoCertificateError(type(step).__name__, f"its Lipschitz constant is {L}")
            if not isinstance(step, LBEN):
                step.requires_grad_(False)

    @property
    def stages(self) -> list[LBEN]:
        """The LBEN stages, in order."""
        return [step for step in self.steps if isinstance(step, LBEN)]

    @property
    def step_lipschitz(self) -> list[float]:
        """The constant of every step, in order."""
        constants = []
        for step, given in zip(self.steps, self.glue_lipschitz, strict=True):
            known = step.lipschitz if isinstance(step, LBEN) else core_lipschitz(step)
            if known is None and given is None:
                raise NoCertificateError(type(step).__name__, "its Lipschitz constant is not known")
            constants.append(float(given if known is None else known))  # type: ignore[arg-type]
        return constants

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, or of the numbers of glue where there are none."""
        numbers = (t.dtype for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())
        return next(numbers, torch.float64)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def lipschitz(self) -> float:
        """L: the product of the constants of all steps."""
        return math.prod(self.step_lipschitz)

    def set_options(self, options: SolverOptions) -> Network:
        """Solve all stages with these options; returns the network."""
        for stage in self.stages:
            stage.options = options
        return self

    def checked(self, x: Tensor) -> Tensor:
        """A batch (B, *input_shape) in the network's dtype. Raises `ShapeError`, `InvalidParameterError` for integers."""
        if tuple(x.shape[1:]) != self.input_shape or x.dim() < 1:
            shape = ", ".join(["B", *map(str, self.input_shape)])
            raise ShapeError(
                "the input of the network", f"({shape})", tuple(x.shape), "The first dimension is the batch."
            )
        if not x.is_floating_point():
            raise InvalidParameterError(
                "the dtype of the input", x.dtype, "pixels must be floats (in [0, 1], not 0..255)"
            )
        return x.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:  # (B, *input_shape) -> (B, q)
        """The output for a batch, in the network's dtype (the input is cast to it)."""
        given = x = self.checked(x)
        with from_samples(given, "the input of the network"):
            for step in self.steps:
                x = applied(step, x)
        return x

    def methods(self, x: Tensor) -> list[str]:
        """Which solver each stage takes for a batch, in order."""
        found = []
        with torch.no_grad():
            for step in self.steps:
                if isinstance(step, LBEN):
                    solution = step.solve(x)
                    found.append(solution.method)
                    x = step.readout(solution.value)
                else:
                    x = applied(step, x)
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
                        image=list(step.grid.image),
                        blocks=list(step.blocks),
                        activations=", ".join(f"{activation} x {size}" for activation, size in step.sigma),
                        epsilon=step.epsilon,
                        lipschitz=L,
                        parameters=count,
                    )
                )
            else:
                steps.append(StageInfo(kind="glue", name=repr(step), lipschitz=L, parameters=count))
        return NetworkInfo(
            input_shape=list(self.input_shape),
            lipschitz=self.lipschitz,
            parameters=sum(s.parameters for s in steps),
            dtype=str(self.dtype).removeprefix("torch."),
            steps=steps,
            class_names=list(self.class_names),
            provenance=self.provenance,
            training=self.training_summary,
        )

    def extra_repr(self) -> str:
        return f"L={self.lipschitz:g}, input_shape={self.input_shape}"
