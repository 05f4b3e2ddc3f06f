"""Is the converted network the same function, with the same constant? Measured, reported, and a verdict."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..dae.conditions import H_matrix
from ..dae.dae import DAE
from ..equilibria.equilibrium import evaluate
from ..errors import EquivalenceError, InvalidParameterError, ShapeError
from ..foundation.arguments import inputs_of, isolated, require_no_autocast
from ..foundation.integrity import require_own
from ..linalg.spectrum import least_eigenvalue, require_finite_samples
from ..networks.lben import LBEN
from ..networks.network import Network, passed
from .documents import CheckResult, ValidationReport
from .trace import Step, group, stage_dae, trace

# What a conversion promises, relative: outputs, input gradients, W. Float32 rounds the parameters themselves.
TOLERANCE = {torch.float64: (1e-10, 1e-8, 1e-12), torch.float32: (1e-5, 1e-3, 1e-5)}
# H(Ψ⁻¹, L) = 2V′V + 2εI ⪰ 0 by construction; what is measured is round-off in the gauge-free matrix.
EIGENVALUE = {torch.float64: 1e-12, torch.float32: 1e-5}
JACOBIAN = 1e-6
# Outputs up to which the whole Jacobian is compared: an image has thousands, and each is a backward pass.
DIRECTIONS = 32
# Entries of the Jacobians that are compared: all 64 samples of a 784 → 10 network, 17 of a 3x32x32 → 10 one.
GRADIENTS = 2**19


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor, most: int | None = None) -> Tensor:
    """∂f/∂x for each sample of a batch, (B, ...) → (B, q, p), input and output flattened; one backward pass an output.

    ``most``: with more outputs than that, Q ∂f/∂x for ``most`` fixed random directions, orthonormal rows Q: (B, most, p).
    """
    with torch.enable_grad():
        return _jacobian(function, x.detach().clone().requires_grad_(True), most)


def _jacobian(function: Callable[[Tensor], Tensor], x: Tensor, most: int | None) -> Tensor:
    y = function(x.clone()).flatten(1)  # x is a leaf, which nothing may write to
    if most is not None and y.shape[1] > most:
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(y.shape[1], most, generator=generator, dtype=torch.float64)
        y = y @ torch.linalg.qr(directions).Q.to(y)
    rows = [torch.autograd.grad(y[:, k].sum(), x, retain_graph=True)[0].flatten(1) for k in range(y.shape[1])]
    return torch.stack(rows, dim=1)


@isolated
def validate(
    model: nn.Module,
    net: Network,
    inputs: Tensor | None = None,
    *,
    delta: float | None = 0.0,
    throw: bool = True,
    plugin: str | None = None,
    merge: bool = False,
    dense: bool = False,
) -> ValidationReport:
    """Compare a source network with its DAEs and with its converted form.

    On ``inputs`` (B, *input_shape), 64 standard normal samples by default: outputs and input-gradients of source, DAE and
    LBEN (in 32 random directions where there are more outputs, and of the first samples only where they have many pixels);
    for each stage W rebuilt against W, λ_min of H(Ψ⁻¹, L) and L(1 + δ); the Jacobian's 2-norm against L(1 + 1e-6).
    Tolerances are those of the converted network's dtype (float64: 1e-10 outputs, 1e-8 gradients, 1e-12 W and H; float32:
    1e-5, 1e-3, 1e-5), relative to the largest entry compared (W: Frobenius norms in the gauge Λ = I, relative to
    max(1, ‖W‖); H: to max(1, ‖Λ‖)).
    ``delta``: the δ the network was converted with, 0 if its constants must be the source's own; None takes any δ ≥ 0.
    ``plugin``, ``merge``, ``dense``: as it was converted.

    Raises `EquivalenceError` with the report when a check fails, unless ``throw`` is False; `ShapeError`,
    `InvalidParameterError` and `NotFiniteError` for inputs that do not fit, are none, or no numbers; `ModifiedModuleError`
    for hooks and the like on the network; whatever converting the source raises.
    """
    groups = group(trace(model, net.input_shape, plugin, dense), merge)
    daes = [None if members[0].dae is None else stage_dae(members) for members in groups]
    return compare(model, net, groups, daes, inputs, delta=delta, throw=throw)


@isolated
def compare(
    model: nn.Module,
    net: Network,
    groups: Sequence[Sequence[Step]],
    daes: Sequence[DAE | None],
    inputs: Tensor | None = None,
    *,
    delta: float | None = 0.0,
    throw: bool = True,
) -> ValidationReport:
    """`validate`, for a source that is traced and composed already: ``daes``, None for glue, one for each of ``groups``."""
    require_own(net)
    if len(groups) != len(net.steps):
        hint = "A network made with merge or dense is validated with the same."
        expected, actual = f"{len(groups)} steps as its source has", f"{len(net.steps)} steps"
        raise ShapeError("the converted network", expected, actual, hint)
    if inputs is None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(64, *net.input_shape, generator=generator, dtype=torch.float64)
    else:
        inputs = inputs_of(inputs, "inputs")
        if inputs.dim() < 1 or tuple(inputs.shape[1:]) != net.input_shape:
            raise ShapeError("inputs", ("B", *net.input_shape), tuple(inputs.shape))
        if not len(inputs):
            raise InvalidParameterError("inputs", "empty", "at least one sample is needed to compare on")
        require_finite_samples(inputs, "inputs")
    dtype, device = net.dtype, net.device
    if dtype not in TOLERANCE:
        raise InvalidParameterError("the dtype of the network", dtype, "networks are compared in float32 or float64")
    if dtype != torch.float64:
        require_no_autocast(device)
    original = copy.deepcopy(model).to("cpu", torch.float64).eval()
    network = copy.deepcopy(net).eval()
    for module in (original, network):
        module.requires_grad_(False)

    def source(x: Tensor) -> Tensor:
        return original(x.clone())  # its first activation may work in place

    def through_daes(x: Tensor) -> Tensor:
        for members, dae in zip(groups, daes, strict=True):
            x = passed(members[0].module, x) if dae is None else evaluate(dae, x)
        return x

    def through_network(x: Tensor) -> Tensor:
        return network(x.to(device, dtype)).to("cpu", torch.float64)

    x = inputs.detach().to("cpu", torch.float64)
    if dtype is torch.float32:
        x = x.float().double()  # the same inputs for both
    output_tolerance, gradient_tolerance, W_tolerance = TOLERANCE[dtype]
    checks: list[CheckResult] = []

    def at_most(name: str, where: str, value: float, bound: float) -> None:
        checks.append(_result(name, where, value, bound, "<="))

    with torch.no_grad():
        expected = source(x)
        at_most("output: DAE - source", "network", relative_difference(through_daes(x), expected), output_tolerance)
        at_most("output: LBEN - source", "network", relative_difference(through_network(x), expected), output_tolerance)
    few = x[: max(4, GRADIENTS // (x[0].numel() * min(expected[0].numel(), DIRECTIONS)))]
    J, J_dae, J_net = (jacobian(f, few, DIRECTIONS) for f in (source, through_daes, through_network))
    # Where every path is dead, what is left of a gradient is round-off of size u·L.
    least = 1e3 * torch.finfo(dtype).eps * net.lipschitz
    at_most("input gradient: DAE - source", "network", relative_difference(J_dae, J, least), gradient_tolerance)
    at_most("input gradient: LBEN - source", "network", relative_difference(J_net, J, least), gradient_tolerance)
    norm = float(torch.linalg.matrix_norm(J_net, 2).amax())
    at_most("Jacobian 2-norm / L", "network", norm / net.lipschitz, 1.0 + JACOBIAN)
    for members, dae, stage, L in zip(groups, daes, network.steps, network.step_lipschitz, strict=True):
        if dae is None or not isinstance(stage, LBEN):
            if dae is not None or isinstance(stage, LBEN):
                raise ShapeError("the converted network", "stages and glue in the order of its source", repr(stage))
            where = members[0].path or type(stage).__name__
            at_most("L of the glue - L of its source", where, abs(L / members[0].lipschitz - 1.0), 1e-14)
            continue
        rebuilt = copy.deepcopy(stage).cpu().dae()
        if (rebuilt.states, rebuilt.input_shape, rebuilt.output_shape) != (
            dae.states,
            dae.input_shape,
            dae.output_shape,
        ):
            raise ShapeError(f"stage {stage.name!r}", repr(dae), repr(rebuilt))
        root = dae.Lambda.sqrt()
        W_error, W_size = (
            float(torch.linalg.matrix_norm(root.unsqueeze(-1) * M / root).amax()) for M in (rebuilt.W - dae.W, dae.W)
        )
        at_most("W rebuilt - W", stage.name, W_error / max(1.0, W_size), W_tolerance)
        allowance = EIGENVALUE[dtype] * max(1.0, float(rebuilt.Lambda.max()))
        least = least_eigenvalue(H_matrix(rebuilt))
        checks.append(_result("least eigenvalue of H", stage.name, least, -allowance, ">="))
        # L is carried as a number, never recomputed: equal up to the rounding of L(1 + δ).
        growth = stage.lipschitz / dae.lipschitz - 1.0
        if delta is None:
            checks.append(_result("L of the stage - L of its DAE", stage.name, growth, -1e-14, ">="))
        else:
            at_most("L of the stage - L of its DAE", stage.name, abs(growth - delta), 1e-14)
    report = ValidationReport(
        model=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        samples=len(x),
        lipschitz=net.lipschitz,
        methods=network.methods(x[:8].to(device, dtype)),
        checks=checks,
        passed=all(result.passed for result in checks),
    )
    if throw and not report.passed:
        raise EquivalenceError(report, report.failures())
    return report


def relative_difference(actual: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """max|actual − expected| / max(max|expected|, least), in float64 (the difference itself where that is 0).

    Raises `ShapeError` when the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ShapeError("the compared output", tuple(expected.shape), tuple(actual.shape))
    size = max(float(expected.abs().max()), least)
    return float((actual.double() - expected.double()).abs().max()) / (size if size > 0.0 else 1.0)


def _result(name: str, where: str, value: float, bound: float, relation: Literal["<=", ">="]) -> CheckResult:
    passed = value <= bound if relation == "<=" else value >= bound
    return CheckResult(
        name=name,
        where=where,
        value=value if math.isfinite(value) else None,
        bound=bound,
        relation=relation,
        passed=passed,
    )
