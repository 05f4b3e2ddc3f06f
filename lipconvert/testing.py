"""The conformance suite that a plugin inherits. Needs pytest: ``pip install "lipconvert[test]"``.

    from lipconvert.testing import PluginConformance

    class TestMine(PluginConformance):
        plugin = "mine"

Every test about a model runs over the plugin's own ``example_models`` for each of ``seeds``. Each example needs an
attribute ``input_shape`` (of one sample), an output vector or image for each sample, and trainable parameters.

Tolerances are class attributes. Override one only with the reason beside it:

* ``output_tolerance``, ``gradient_tolerance``, ``W_tolerance``, ``float32_tolerance``: what a conversion promises,
  relative to the largest entry compared (W: to max(1, ‖W‖)). A gradient passes through one more linear solve than an
  output, and float32 rounds the parameters themselves.
* ``eigenvalue_tolerance``: for λ_min of H, relative to the size of the terms that add up to it. H is singular at the
  constant of most networks, so round-off of either sign is what is left.
* ``trained_eigenvalue_tolerance``: the same after training, where V is no longer the root of anything known.
* ``jacobian_slack``: ‖∂y/∂x‖₂ ≤ L(1 + slack); only round-off may exceed L.
* ``batch_tolerance``: a prediction may depend on its batch by the order of additions only.
* ``strict_delta``: the δ of the strict start.

``device``: where the models, the converted networks and their inputs are. Conversion runs on the CPU in any case.
``directions``: Jacobians are taken in so many random directions of the output, in all of them for None.
``options(model)`` gives what a weights file of the architecture does not hold, for plugins with ``from_state_dict``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints.checkpoint import load, save
from .conversion.convert import convert, to_dae
from .conversion.trace import Step, group, stage_dae, trace
from .conversion.validate import jacobian, relative_difference
from .dae.conditions import check
from .dae.dae import DAE
from .equilibria.equilibrium import evaluate
from .errors import LipconvertError, MissingOptionError, NotFiniteError
from .networks.glue import MeanPool
from .networks.lben import LBEN
from .networks.network import Network
from .plugin_api import hookspecs
from .plugin_api.hookspecs import PluginInfo
from .plugin_api.registry import Plugin, registry
from .plugin_api.weights import from_state_dict, read_weights

try:
    import pytest
except ImportError as error:
    raise ImportError('lipconvert.testing needs pytest: pip install "lipconvert[test]"') from error

__all__ = ["PluginConformance"]


def _at_most(what: str, value: float, bound: float) -> None:
    """Fail with the numbers: pytest does not rewrite assertions in installed packages. NaN fails."""
    if not value <= bound:
        pytest.fail(f"{what}: {value:.6e} is not <= {bound:.6e}", pytrace=False)


def _true(what: str, condition: bool) -> None:
    if not condition:
        pytest.fail(what, pytrace=False)


def _same_tensors(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether two state dicts hold the same names, dtypes and bits; other entries are compared with ==."""
    if list(actual) != list(expected):
        return False
    for key, value in expected.items():
        other = actual[key]
        if not isinstance(value, Tensor):
            if other != value:
                return False
        elif other.dtype != value.dtype or not torch.equal(other, value):
            return False
    return True


def _matrices(kernel: Tensor) -> Tensor:
    """A parameter of an LBEN as in paper eq. (2): itself, or the conjugate spectrum of its kernels, (F, rows, cols)."""
    return kernel if kernel.dim() == 2 else torch.fft.rfft2(kernel).conj().flatten(2).permute(2, 0, 1)


def _least_eigenvalue(dae: DAE) -> tuple[float, float]:
    """λ_min of Λ^{-1/2} H Λ^{-1/2}, H written out from paper eq. (10), and the size of the terms that add up to it, over all
    frequencies of a grid."""
    Lambda, L = torch.diag(dae.Lambda).to(dae.W.dtype), dae.lipschitz
    root = torch.diag(dae.Lambda.rsqrt()).to(dae.W.dtype)
    terms = [
        2.0 * Lambda.expand_as(dae.W),
        -Lambda @ dae.W,
        -dae.W.mH @ Lambda,
        -dae.G.mH @ dae.G / L,
        -Lambda @ dae.U @ dae.U.mH @ Lambda / L,
    ]
    H = root @ torch.stack(terms).sum(0) @ root
    size = sum(float(torch.linalg.matrix_norm(root @ term @ root, 2).amax()) for term in terms)
    return float(torch.linalg.eigvalsh(0.5 * (H + H.mH)).amin()), max(1.0, size)


def _given(steps: Sequence[Step]) -> Iterator[tuple[Step, tuple[int, ...]]]:
    """Each step with the shape its module is given: that of the glue made for it, where it has some."""
    for before, step in zip((steps[0], *steps), steps, strict=False):
        yield step, before.input_shape if before.path == step.path else step.input_shape


def _inputs_of(dae: DAE, x: Tensor) -> Tensor:
    """The inputs of a model as its DAE takes them: flat, or unshuffled where it lives on a coarser grid."""
    stride = x.shape[-1] // dae.grid.image[1] if dae.grid else 1
    return nn.functional.pixel_unshuffle(x, stride) if stride > 1 else x.reshape(-1, *dae.input_shape)


def _lipschitz_quotient(function: Callable[[Tensor], Tensor], x: Tensor, directions: int | None) -> float:
    """The largest of ‖∂y/∂x‖₂ over a batch and of |f(x) − f(x′)|/|x − x′| over neighbours in it."""
    norm = float(torch.linalg.matrix_norm(jacobian(function, x, directions), 2).max())
    with torch.no_grad():
        y = function(x)
    quotients = [
        float((a - b).norm() / (p - q).norm()) for (a, b), (p, q) in zip(pairwise(y), pairwise(x), strict=True)
    ]
    return max(norm, *quotients)


def _train(model: nn.Module, x: Tensor, steps: int, learning_rate: float = 1e-2) -> None:
    """Adam on a loss that drives the outputs up without bound: what a constraint has to withstand."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        target = torch.randn(model(x).shape, generator=generator, dtype=x.dtype).to(x.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    _true(f"{type(model).__name__} has no trainable parameters", bool(parameters))
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    for _ in range(steps):
        optimiser.zero_grad()
        (-(model(x) * target).flatten(1).sum(1).mean()).backward()
        optimiser.step()


class PluginConformance:
    """About 25 tests for the plugin named ``plugin``; see the module docstring. Inherit, and name the class ``Test...``."""

    plugin: str = ""
    device: str = "cpu"
    directions: int | None = None
    seeds: tuple[int, ...] = (0, 1)
    samples: int = 8

    output_tolerance: float = 1e-10
    gradient_tolerance: float = 1e-8
    W_tolerance: float = 1e-12
    float32_tolerance: float = 1e-5
    eigenvalue_tolerance: float = 1e-12
    trained_eigenvalue_tolerance: float = 1e-10
    jacobian_slack: float = 1e-6
    batch_tolerance: float = 1e-12
    strict_delta: float = 1e-3

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test for each example model and seed; collection fails where a plugin has no examples."""
        if "model" in metafunc.fixturenames:
            if self.plugin not in registry().names():
                refused = next((p.error for p in registry().plugins() if p.name == self.plugin), "it is not installed")
                raise pytest.Collector.CollectError(f"plugin {self.plugin!r} is not loaded: {refused}")
            counts = {seed: len(registry().example_models(self.plugin, seed)) for seed in self.seeds}
            if not all(counts.values()):
                raise pytest.Collector.CollectError(
                    f"plugin {self.plugin!r} has no example_models for seeds {[s for s, n in counts.items() if not n]}: "
                    "without examples nothing can be tested. Implement the hook."
                )
            cases = [(seed, index) for seed, count in counts.items() for index in range(count)]
            metafunc.parametrize("model", cases, indirect=True, ids=[f"seed{s}-example{i}" for s, i in cases])

    @pytest.fixture
    def model(self, request: pytest.FixtureRequest) -> nn.Module:
        """One example in float64 and eval mode."""
        seed, index = request.param
        return registry().example_models(self.plugin, seed)[index].to(self.device, torch.float64).eval()

    @property
    def record(self) -> Plugin:
        """The registry's record of the plugin."""
        return next(p for p in registry().plugins() if p.name == self.plugin)

    def inputs(self, model: nn.Module, count: int | None = None) -> Tensor:
        """Standard normal samples of the model's input shape, float64, always the same."""
        shape = tuple(model.input_shape)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(7)
        return torch.randn(count or self.samples, *shape, generator=generator, dtype=torch.float64).to(self.device)

    def options(self, model: nn.Module) -> dict[str, Any]:
        """What the architecture's weights files do not hold: sizes, L, and numbers the model carries as attributes."""
        known = {name: getattr(model, name) for name in ("m", "epsilon") if hasattr(model, name)}
        x = self.inputs(model, 1)
        with torch.no_grad():
            classes = model(x).shape[1]
        dae = to_dae(model)
        activation = next((str(a) for a, _ in dae.sigma if a.name != "identity"), "relu")
        shape = tuple(x.shape[1:])
        if len(shape) == 3:
            pools = [m.kernel_size for m in model.modules() if isinstance(m, MeanPool)]
            known |= {"image": f"{shape[1]}x{shape[2]}", "in_channels": shape[0], "pool": pools[0] if pools else 1}
        if getattr(model, "prescribed", 0.0) is None:
            known["lipschitz"] = "free"
        return {
            "inputs": x[0].numel(),
            "classes": classes,
            "lipschitz": dae.lipschitz,
            "activation": activation,
            **known,
        }

    def stages(self, model: nn.Module, net: Network) -> Iterator[tuple[DAE, LBEN]]:
        """The DAE of each stage of a model beside the LBEN it became."""
        groups = group(trace(model))
        _true(f"{len(groups)} groups of layers became {len(net.steps)} steps", len(groups) == len(net.steps))
        for members, step in zip(groups, net.steps, strict=True):
            if isinstance(step, LBEN):
                yield stage_dae(members), step

    # What the plugin says of itself

    def test_listed_with_provenance(self) -> None:
        """It is loaded, and it is known where it comes from."""
        record = self.record
        _true(f"{self.plugin}: {record.error}", record.error is None)
        _true(f"no provenance in {record}", bool(record.distribution and record.module))

    def test_described(self) -> None:
        """``describe`` fills every field."""
        info = self.record.info
        _true(f"describe() must return a PluginInfo, not {info!r}", isinstance(info, PluginInfo))
        for field in ("name", "paper", "lipschitz", "covers"):
            _true(f"describe() leaves {field} empty", bool(str(getattr(info, field)).strip()))

    def test_hooks_are_known(self) -> None:
        """Every hook is one of the contract, and the two that are needed are there."""
        hooks = set(self.record.hooks)
        known = {name for name, value in vars(hookspecs).items() if hasattr(value, "lipconvert_spec")}
        _true(f"unknown hooks {sorted(hooks - known)}", hooks <= known)
        for needed in ("to_dae", "example_models"):
            _true(f"{needed} is not implemented", needed in hooks)

    def test_examples_reproducible(self) -> None:
        """The same seed gives the same weights bit by bit, another seed gives others."""
        ask = registry().example_models
        for seed in self.seeds:
            pairs = zip(ask(self.plugin, seed), ask(self.plugin, seed), strict=True)
            same = all(_same_tensors(a.state_dict(), b.state_dict()) for a, b in pairs)
            _true(f"seed {seed} does not give the same examples twice", same)
        for one, other in pairwise(self.seeds):
            pairs = zip(ask(self.plugin, one), ask(self.plugin, other), strict=True)
            differ = all(not _same_tensors(a.state_dict(), b.state_dict()) for a, b in pairs)
            _true(f"seeds {one} and {other} give an example with the same weights", differ)

    def test_leaves_foreign_modules_alone(self) -> None:
        """torch's own modules, and the layers other plugins claim in their examples, are not claimed."""
        foreign: list[tuple[nn.Module, tuple[int, ...]]] = [
            (nn.Linear(3, 2), (3,)),
            (nn.Linear(3, 3, bias=False), (3,)),
            (nn.Conv2d(3, 4, 3, padding=1), (3, 8, 8)),
            (nn.ReLU(), (3,)),
            (nn.BatchNorm1d(3), (3,)),
            (nn.Sequential(), (3,)),
        ]
        for other in registry().names():
            if other != self.plugin:
                for model in registry().example_models(other, self.seeds[0]):
                    with suppress(LipconvertError):  # an example that fails is the other plugin's own affair
                        steps = trace(model, plugin=other)
                        foreign.extend((step.module, shape) for step, shape in _given(steps) if step.plugin == other)
        for module, shape in foreign:
            answer = registry().ask(self.plugin, "to_dae", model=module.double().eval(), input_shape=shape)
            _true(f"to_dae claims a foreign {type(module).__name__}: {answer!r}", answer is None)

    def test_new_model(self) -> None:
        """``new_model``, where there is one: takes the asked sizes, trains a step, converts, is the same for a seed."""
        new = [registry().new_model(self.plugin, 6, 3, seed) for seed in (0, 0)]
        if "new_model" not in self.record.hooks:
            _true(f"new_model is not among the hooks, but answers {new}", new == [None, None])
            return
        model, again = new
        assert model is not None
        assert again is not None
        same = _same_tensors(model.state_dict(), again.state_dict())
        _true("new_model does not give the same weights twice for one seed", same)
        _true(f"input_shape is {model.input_shape}, not (6,)", tuple(model.input_shape) == (6,))  # type: ignore[arg-type]
        model = model.to(self.device, torch.float64)
        x = self.inputs(model)
        labels = torch.arange(len(x), device=x.device) % 3
        before = copy.deepcopy(model.state_dict())
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        nn.functional.cross_entropy(model(x), labels).backward()
        optimiser.step()
        _true("a training step changes no weight", not _same_tensors(model.state_dict(), before))
        convert(model)  # validates, and raises when it fails

    # The examples and their DAE

    def test_example_runs(self, model: nn.Module) -> None:
        """``input_shape`` is there, and the model maps a batch (B, *input_shape) to (B, q), or to images (B, q, h, w)."""
        shape = tuple(model.input_shape)  # type: ignore[arg-type]
        _true(f"input_shape {shape} must be positive integers", all(isinstance(n, int) and n > 0 for n in shape))
        with torch.no_grad():
            y = model(self.inputs(model))
        _true(f"the output has shape {tuple(y.shape)}", y.dim() in (2, 4) and len(y) == self.samples)

    def test_claims_its_layers(self, model: nn.Module) -> None:
        """At least one module of an example is claimed, and each answer is a DAE or a tuple of four."""
        claimed = [(step, shape) for step, shape in _given(trace(model)) if step.plugin == self.plugin]
        _true(f"no module of {type(model).__name__} is claimed by {self.plugin}", bool(claimed))
        for step, shape in claimed:
            answer = registry().ask(self.plugin, "to_dae", model=step.module, input_shape=shape)
            fits = isinstance(answer, DAE) or (isinstance(answer, tuple) and len(answer) == 4)
            _true(f"to_dae of {step.path!r} returns {type(answer).__name__}", fits)

    def test_dae_fits_the_model(self, model: nn.Module) -> None:
        """Inputs and outputs of the DAE are those of the model; its tensors are finite, Λ and L positive."""
        dae = to_dae(model)
        x = self.inputs(model, 2)
        with torch.no_grad():
            sizes = (x[0].numel(), model(x)[0].numel())
        found = (math.prod(dae.input_shape), math.prod(dae.output_shape))
        _true(f"{dae} is not {sizes[0]} → {sizes[1]}", found == sizes)
        _true(f"a tensor of {dae} is not finite", all(bool(torch.isfinite(t).all()) for t in dae))
        _true(f"Λ or L of {dae} is not positive", bool((dae.Lambda > 0).all()) and 0.0 < dae.lipschitz < math.inf)

    def test_condition_10(self, model: nn.Module) -> None:
        """H(Λ, L) ⪰ 0 for every claimed layer and for the whole model, H written out from paper eq. (10)."""
        daes = [step.dae for step in trace(model) if step.dae is not None and step.plugin == self.plugin]
        for dae in (*daes, to_dae(model)):
            least, size = _least_eigenvalue(dae)
            _at_most(f"-λ_min of H of {dae}", -least, self.eigenvalue_tolerance * size)

    def test_well_posed(self, model: nn.Module) -> None:
        """The whole model has one equilibrium for every input: W is strictly triangular, or X(Λ) ≻ 0."""
        conditions = check(to_dae(model))
        _true(f"neither triangular nor X ≻ 0: {conditions}", conditions.well_posed)

    # The conversion

    def test_lipschitz_unchanged(self, model: nn.Module) -> None:
        """L of the network is the product over the steps of the source."""
        L = math.prod(step.lipschitz for step in trace(model))
        _at_most(
            "|L of the network / L of the source - 1|", abs(convert(model, check=False).lipschitz / L - 1.0), 1e-14
        )

    def test_W_rebuilt(self, model: nn.Module) -> None:
        """W written out from the parameters by paper eq. (2), and the W in use, are the W of the DAE."""
        for dae, stage in self.stages(model, convert(model, check=False)):
            Psi, L = stage.log_psi.detach().cpu().exp(), stage.lipschitz
            G, U, V, S = (_matrices(p.detach().cpu()) for p in (stage.G, stage.U, stage.V, stage.S))
            eye = torch.eye(len(Psi), dtype=G.dtype)
            inverse = torch.diag(1.0 / Psi).to(G.dtype)
            inner = G.mH @ G / (2 * L) + inverse @ U @ U.mH @ inverse / (2 * L) + V.mH @ V + S - S.mH
            W = eye - torch.diag(Psi).to(G.dtype) @ (inner + stage.epsilon * eye)
            size = max(1.0, float(torch.linalg.matrix_norm(dae.W).amax()))
            for name, rebuilt in (("by eq. (2)", W), ("in use", stage.W.detach().cpu())):
                error = float(torch.linalg.matrix_norm(rebuilt - dae.W).amax()) / size
                _at_most(f"‖W {name} - W‖ of {stage.name}", error, self.W_tolerance)

    def test_outputs_equal(self, model: nn.Module) -> None:
        """Source, its DAE and the converted network give the same outputs."""
        x = self.inputs(model)
        with torch.no_grad():
            y = model(x)
            dae = to_dae(model)
            through_dae = evaluate(dae, _inputs_of(dae, x.cpu())).reshape(y.shape).to(self.device)
            through_net = convert(model, check=False)(x)
        _at_most("outputs, DAE - source", relative_difference(through_dae, y), self.output_tolerance)
        _at_most("outputs, LBEN - source", relative_difference(through_net, y), self.output_tolerance)

    def test_input_gradients_equal(self, model: nn.Module) -> None:
        """∂y/∂x of the source by its own backward pass is that of the converted network."""
        x = self.inputs(model)
        expected, actual = (jacobian(f, x, self.directions) for f in (model, convert(model, check=False)))
        _at_most("input gradients, LBEN - source", relative_difference(actual, expected), self.gradient_tolerance)

    def test_bounded_by_L(self, model: nn.Module) -> None:
        """‖∂y/∂x‖₂ and difference quotients of source and network do not exceed L."""
        net = convert(model, check=False)
        x = self.inputs(model)
        for name, function in (("source", model), ("network", net)):
            bound = net.lipschitz * (1.0 + self.jacobian_slack)
            _at_most(f"slope of the {name}", _lipschitz_quotient(function, x, self.directions), bound)

    def test_float32_end_to_end(self, model: nn.Module) -> None:
        """A float32 model, its conversion cast to float32: the outputs of the same weights in float64."""
        single = model.float()
        net = convert(single, check=False).float()
        x = self.inputs(single).float()
        with torch.no_grad():
            actual, expected = net(x), copy.deepcopy(single).double()(x.double())
        _true(f"the output is {actual.dtype}", actual.dtype is torch.float32)
        _at_most("float32 outputs, LBEN - source", relative_difference(actual, expected), self.float32_tolerance)

    def test_conversion_leaves_the_model_alone(self, model: nn.Module) -> None:
        """Weights bit by bit, dtype, training flags, requires_grad and the values of gradients stay as they were."""
        model = model.float().train()
        first = next(model.parameters())
        first.requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        flags = [m.training for m in model.modules()]
        wanted = [p.requires_grad for p in model.parameters()]
        convert(model)
        _true("conversion changed weights or dtype", _same_tensors(model.state_dict(), before))
        _true("conversion changed training flags", [m.training for m in model.modules()] == flags)
        _true("conversion changed requires_grad", [p.requires_grad for p in model.parameters()] == wanted)
        _true("conversion left gradients behind", all(p.grad is None for p in model.parameters()))

    def test_shares_no_memory_with_the_model(self, model: nn.Module) -> None:
        """Changing the source afterwards does not change the network."""
        net = convert(model, check=False)
        before = copy.deepcopy(net.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        _true("the network moved with its source", _same_tensors(net.state_dict(), before))

    def test_bad_weights_refused(self, model: nn.Module) -> None:
        """One NaN or infinite entry in any parameter is a `NotFiniteError` that names the parameter."""
        for name, parameter in model.named_parameters():
            first = (0,) * parameter.dim()
            kept = parameter.detach()[first].clone()
            for bad in (math.nan, math.inf):
                with torch.no_grad():
                    parameter[first] = bad
                with pytest.raises(NotFiniteError) as caught:
                    convert(model, check=False)
                _true(f"the error does not name {name!r}: {caught.value}", name in caught.value.where)
            with torch.no_grad():
                parameter[first] = kept

    def test_batch_independence(self, model: nn.Module) -> None:
        """A prediction is the same alone, in any order, and beside any other samples."""
        net = convert(model, check=False)
        x = self.inputs(model)
        with torch.no_grad():
            together = net(x)
            alone = torch.cat([net(sample) for sample in x.split(1)])
            reversed_ = net(x.flip(0)).flip(0)
            beside = net(torch.cat([x, 1e3 * x]))[: len(x)]
        for name, y in (("alone", alone), ("reversed", reversed_), ("beside large samples", beside)):
            _at_most(f"outputs {name} - in the batch", relative_difference(y, together), self.batch_tolerance)

    def test_conversion_is_deterministic(self, model: nn.Module) -> None:
        """Two conversions give the same parameters bit by bit, whatever the state of torch's generator."""
        torch.manual_seed(1)
        one = convert(model, check=False)
        torch.manual_seed(2)
        _true("two conversions differ", _same_tensors(convert(model, check=False).state_dict(), one.state_dict()))

    def test_network_keeps_L_in_training(self, model: nn.Module) -> None:
        """After ten Adam steps at learning rate 1e-2 the converted network is still within its L."""
        net = convert(model, check=False)
        L, x = net.lipschitz, self.inputs(model)
        before = copy.deepcopy(net.state_dict())
        _train(net, x, 10)
        _true("ten steps changed nothing", not _same_tensors(net.state_dict(), before))
        _at_most("|L after - L before|", abs(net.lipschitz - L), 0.0)
        for stage in net.stages:
            least, size = _least_eigenvalue(stage.dae())
            _at_most(f"-λ_min of H of {stage.name}", -least, self.trained_eigenvalue_tolerance * size)
        _at_most("slope of the network", _lipschitz_quotient(net, x, self.directions), L * (1.0 + self.jacobian_slack))

    def test_source_keeps_L_in_training(self, model: nn.Module) -> None:
        """After ten Adam steps the source is within the L its DAE states then: the constraint holds by construction."""
        x = self.inputs(model)
        _train(model, x, 10)
        dae = to_dae(model)
        least, size = _least_eigenvalue(dae)
        _at_most("-λ_min of H", -least, self.eigenvalue_tolerance * size)
        bound = dae.lipschitz * (1.0 + self.jacobian_slack)
        _at_most("slope of the source", _lipschitz_quotient(model, x, self.directions), bound)
        convert(model)  # validates, and raises when it fails

    def test_strict_start(self, model: nn.Module) -> None:
        """With δ > 0 every stage has H ≻ 0 at L(1 + δ) and takes an ε > 0, with the function unchanged."""
        delta = self.strict_delta
        loose = convert(model, delta=delta)
        least = min(check(stage.dae()).least_eigenvalue for stage in loose.stages)
        _true(f"λ_min of H at L(1 + {delta}) is {least:.3e}", least > 0.0)
        strict = convert(model, epsilon=least / 4.0, delta=delta)  # H ⪰ 2εI with a factor of two to spare
        L = convert(model, check=False).lipschitz * (1.0 + delta) ** len(strict.stages)
        _at_most("|L / (L₀ Π(1 + δ)) - 1|", abs(strict.lipschitz / L - 1.0), 1e-13)
        for stage in strict.stages:
            _true(f"(4) does not hold for {stage.name}: {check(stage.dae())}", check(stage.dae()).condition_4)

    # Files

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
    def test_checkpoint_round_trip(self, model: nn.Module, dtype: torch.dtype, tmp_path: Path) -> None:
        """A saved and loaded network has the same tensors, the same outputs and the same L, bit by bit."""
        net = convert(model, check=False).to(dtype)
        save(net, tmp_path / "net.safetensors")
        loaded = load(tmp_path / "net.safetensors").to(self.device)
        x = self.inputs(model).to(dtype)
        _true("the tensors differ", _same_tensors(loaded.state_dict(), net.state_dict()))
        _true(f"L is {loaded.lipschitz}, not {net.lipschitz}", loaded.lipschitz == net.lipschitz)
        with torch.no_grad():
            _true("the outputs differ", torch.equal(loaded(x), net(x)))

    def test_state_dict_recognised(self, model: nn.Module, tmp_path: Path) -> None:
        """``from_state_dict``, where there is one: a weights file gives back the weights, and the same DAE.

        Files of weights do not hold activations: outputs are compared where those of the rebuilt model are the same.
        """
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        tensors = read_weights(tmp_path / "weights.pt")
        if "from_state_dict" not in self.record.hooks:
            answer = registry().ask(self.plugin, "from_state_dict", state_dict=tensors, options={})
            _true(f"from_state_dict is not among the hooks, but answers {answer!r}", answer is None)
            return
        options: dict[str, Any] = {}
        known = self.options(model)
        while True:  # the plugin asks for what it lacks, one option at a time
            try:
                rebuilt = from_state_dict(tensors, options, path="weights.pt")
                break
            except MissingOptionError as error:
                unknown = error.option not in known or error.option in options
                _true(f"{error} Override options(model) in the test class.", not unknown)
                options[error.option] = known[error.option]
        _true(f"{type(rebuilt).__name__} is not {type(model).__name__}", type(rebuilt) is type(model))
        found = {k: v for k, v in rebuilt.state_dict().items() if isinstance(v, Tensor)}
        _true(
            "the weights differ",
            found.keys() == {k for k, v in tensors.items() if isinstance(v, Tensor)}
            and all(torch.equal(found[k], tensors[k]) for k in found),
        )
        expected, dae = to_dae(model), to_dae(rebuilt, self.inputs(model).shape[1:])
        for name, actual, wanted in zip("WUGΛ", dae, expected, strict=True):
            _true(f"{name} of the rebuilt model differs", torch.equal(actual, wanted))
        _true(f"L is {dae.lipschitz}, not {expected.lipschitz}", dae.lipschitz == expected.lipschitz)
        if dae.sigma == expected.sigma:
            x = self.inputs(model)
            with torch.no_grad():
                _true("the outputs differ", torch.equal(rebuilt.to(self.device).eval()(x), model(x)))
