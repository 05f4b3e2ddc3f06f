"""Trace, compose, construct, validate: a model becomes one DAE, or a network of LBEN stages and glue."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from .activations import activation_of, is_activation
from .compose import affine, elementwise
from .dae import DAE
from .equilibrium import DEFAULT, SolverOptions
from .errors import InvalidParameterError
from .glue import affine_image
from .lben import LBEN
from .network import Network
from .trace import group, label, stage_dae, trace
from .validate import validate


def to_dae(model: nn.Module, input_shape: Iterable[int] | None = None, plugin: str | None = None) -> DAE:
    """A whole model as one DAE on flattened inputs, float64; affine glue is taken in as a layer.

    ``input_shape`` of one sample, where the model does not say it; ``plugin``: who has the first word.
    Raises what `trace` raises.
    """
    steps = []
    for step in trace(model, input_shape, plugin):
        if step.dae is None:
            if is_activation(step.module):
                size = torch.Size(step.input_shape).numel()
                dae = elementwise(activation_of(step.module, step.path), size, step.path)
            else:
                M, b = affine_image(step.module, step.input_shape, step.path)
                dae = affine(M, b, step.lipschitz, label(step.path, step.module))
            step = replace(step, dae=dae)
        steps.append(step)
    return replace(stage_dae(steps), name=type(model).__name__)


def convert(
    model: nn.Module,
    input_shape: Iterable[int] | None = None,
    epsilon: float = 0.0,
    *,
    delta: float = 0.0,
    plugin: str | None = None,
    options: SolverOptions = DEFAULT,
    check: bool = True,
) -> Network:
    """The same function with the same Lipschitz constant as LBEN stages and glue, float64 until ``.float()``.

    ``input_shape`` of one sample, where the model does not say it (an attribute ``input_shape``, or its first layer).
    ``epsilon``: ε of every stage; 0 is exact. ``delta``: state each stage's constant at L(1 + δ), which ε > 0 needs for
    most networks (`lipconvert.construction.construct`). ``plugin``: who has the first word where two claim a layer.
    ``options``: how the stages are solved. ``check``: run `validate` and raise when it fails.

    Raises what `trace` raises, `NotPSDError` and `EquivalenceError`.
    """
    if not epsilon >= 0.0:
        raise InvalidParameterError("epsilon", epsilon, "it must be finite and not negative")
    steps = trace(model, input_shape, plugin)
    modules: list[nn.Module] = []
    constants: list[float | None] = []
    for members in group(steps):
        if members[0].dae is None:
            modules.append(members[0].module)
            constants.append(members[0].lipschitz)
        else:
            modules.append(LBEN.from_dae(stage_dae(members), epsilon, delta, options))
            constants.append(None)
    network = Network(modules, constants, steps[0].input_shape).eval()
    if check:
        validate(model, network, delta=delta, plugin=plugin)
    return network
