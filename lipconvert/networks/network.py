"""A converted model: LBEN stages and glue in the order of the source, with the bookkeeping of its Lipschitz constant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..equilibria.equilibrium import SolverOptions
from ..errors import InvalidParameterError, NoCertificateError, ShapeError
from ..foundation.arguments import inputs_of, make_ordinary, number, sizes
from ..foundation.integrity import recorded
from ..linalg.spectrum import from_samples
from .documents import NetworkInfo, Provenance, StageInfo, TrainingSummary
from .glue import applied, core_lipschitz, may_write
from .lben import LBEN

# What an input shape is.
SAMPLE = "positive sizes of one sample, such as (1, 28, 28)"


def passed(step: nn.Module, x: Tensor) -> Tensor:
    """What a step makes of x; x stays as it is, and with it the caller's input, whatever the step does in place."""
    return step(x) if isinstance(step, LBEN) else applied(step, x.clone() if may_write(step) else x)


@recorded("class_names", "provenance", "training_summary", whole=True)
class Network(nn.Module):
    """Steps in order: `LBEN` stages, and glue modules of known Lipschitz constant.

    ``steps``: all modules; ``stages``: the LBEN among them; ``lipschitz``: the product of all their constants, L of the
    network from input to output; ``input_shape`` of one sample. ``glue_lipschitz``: for each step None, or the constant of
    glue the core does not know; that of its own glue is read off the module whenever it is asked for. ``glue_rounding``: for
    each step None, or (a, b) of glue the core does not know: evaluated with unit roundoff u it errs by at most u(a + b‖x‖₂);
    without it nothing is certified. Glue is frozen, and in eval mode whatever the network's.
    ``class_names``, ``provenance`` (set by `convert`) and ``training_summary`` go into checkpoints with it.
    Raises `ShapeError` for inputs that do not fit, `NotFiniteError` naming samples that are not numbers, `NotConvergedError`
    from the stages.
    """

    def __init__(
        self,
        steps: Sequence[nn.Module],
        glue_lipschitz: Sequence[float | None],
        input_shape: Sequence[int],
        glue_rounding: Sequence[tuple[float, float] | None] | None = None,
    ) -> None:
        super().__init__()
        glue_rounding = [None] * len(steps) if glue_rounding is None else glue_rounding
        for name, given in (("glue_lipschitz", glue_lipschitz), ("glue_rounding", glue_rounding)):
            if len(steps) != len(given):
                raise ShapeError(name, f"{len(steps)} entries", f"{len(given)} entries")
        self.steps = nn.ModuleList(steps)
        self.glue_lipschitz = tuple(None if g is None else number(g, "glue_lipschitz") for g in glue_lipschitz)
        self.glue_rounding = tuple(
            None if g is None else (number(g[0], "glue_rounding"), number(g[1], "glue_rounding")) for g in glue_rounding
        )
        self.input_shape = sizes(input_shape, "input_shape", SAMPLE)
        self.class_names: tuple[str, ...] = ()
        self.provenance: Provenance | None = None
        self.training_summary: TrainingSummary | None = None
        for step, L in zip(steps, self.step_lipschitz, strict=True):
            if not 0.0 < L < math.inf:
                raise NoCertificateError(type(step).__name__, f"its Lipschitz constant is {L}")
            if not isinstance(step, LBEN):
                step.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Network:
        """Set the mode of the stages; glue stays in eval mode, of which its constant is."""
        super().train(mode)
        for step in self.steps:
            if not isinstance(step, LBEN):
                step.eval()
        return self

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
        """The dtype of all numbers of all steps; float64 where there are none. Raises `InvalidParameterError` for several."""
        return self._common("dtype", torch.float64)

    @property
    def device(self) -> torch.device:
        """The device of all numbers of all steps, else the CPU. Raises `InvalidParameterError` for several."""
        return self._common("device", torch.device("cpu"))

    def _common(self, what: str, default: Any) -> Any:
        found, first = default, -1
        for k, step in enumerate(self.steps):
            for tensor in (*step.parameters(), *step.buffers()):
                if not tensor.is_floating_point():
                    continue
                if first < 0:
                    found, first = getattr(tensor, what), k
                elif getattr(tensor, what) != found:
                    name = step.name if isinstance(step, LBEN) else type(step).__name__
                    raise InvalidParameterError(
                        f"the {what} of step {k} ({name!r})",
                        getattr(tensor, what),
                        f"that of step {first} is {found}: a network is cast and moved as a whole, as by net.float()",
                    )
        return found

    @property
    def lipschitz(self) -> float:
        """L: the product of the constants of all steps."""
        return math.prod(self.step_lipschitz)

    def _apply(self, fn: Any, recurse: bool = True) -> Network:
        with torch.inference_mode(False):  # a network that is cast in inference mode can be trained on
            make_ordinary(self)
            return super()._apply(fn, recurse)

    def set_options(self, options: SolverOptions) -> Network:
        """Solve all stages with these options; returns the network."""
        for stage in self.stages:
            stage.options = options
        return self

    def checked(self, x: Any) -> Tensor:
        """A batch (B, *input_shape) in the network's dtype: the one place where inputs are admitted (`inputs_of`).

        Raises `ShapeError`, and `InvalidParameterError` for what are no floats of an ordinary tensor or array.
        """
        x = inputs_of(x, "the input of the network")
        if tuple(x.shape[1:]) != self.input_shape or x.dim() < 1:
            shape = ", ".join(["B", *map(str, self.input_shape)])
            raise ShapeError(
                "the input of the network", f"({shape})", tuple(x.shape), "The first dimension is the batch."
            )
        return x.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:  # (B, *input_shape) -> (B, q)
        """The output for a batch, in the network's dtype (the input is cast to it)."""
        given = x = self.checked(x)
        with from_samples(given, "the input of the network"):
            for step in self.steps:
                x = passed(step, x)
        if x.dim() < 1 or len(x) != len(given):
            raise ShapeError(
                "the output of the network", f"({len(given)}, ...)", tuple(x.shape), "Glue mixes the samples."
            )
        return x

    def methods(self, x: Tensor) -> list[str]:
        """Which solver each stage takes for a batch, in order; the batch, and what is raised, as for `forward`."""
        found = []
        with torch.no_grad():
            x = self.checked(x)
            for step in self.steps:
                if isinstance(step, LBEN):
                    solution = step.solve(x)
                    found.append(solution.method)
                    x = step.readout(solution.value)
                else:
                    x = passed(step, x)
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
