"""Trace, compose, construct, validate: a model becomes one DAE, or a network of LBEN stages and glue."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib.metadata import version

import torch
from torch import nn

from ..dae.activations import MaxMin, activation_of, is_activation
from ..dae.compose import affine, coarsen, compose, densify, elementwise, eliminate, max_min
from ..dae.dae import DAE
from ..equilibria.equilibrium import DEFAULT, SolverOptions
from ..foundation.arguments import isolated, number, sizes
from ..foundation.shards import fingerprint
from ..networks.documents import PluginSource, Provenance
from ..networks.glue import affine_image
from ..networks.lben import LBEN
from ..networks.network import SAMPLE, Network
from ..plugin_api.registry import plugins
from .memory import require_memory, size_of, sizes_of
from .trace import Step, glue_dae, group, label, stage_dae, trace, unshuffling
from .validate import compare


@isolated
def to_dae(
    model: nn.Module, input_shape: Iterable[int] | None = None, plugin: str | None = None, *, dense: bool = False
) -> DAE:
    """A whole model as one DAE, float64; affine glue is taken in as a layer.

    Layers on images stay on their grid as long as all that follows has a place there; where something has not (``Flatten``,
    pooling), what came before is expanded into a dense DAE on flattened images, which only small ones allow (`densify`).
    ``input_shape`` of one sample, where the model does not say it; ``plugin``: who has the first word; ``dense``: expand
    from the start. Layers with strides: a DAE on a grid takes unshuffled images, a dense one flattened images as they are.
    Raises what `trace` raises, `ShapeError` where the dense form is too large.
    """
    _require_memory(model, input_shape, plugin, dense)
    result: DAE | None = None
    unshuffled: list[nn.Module] = []  # what the model's input goes through before it is the DAE's
    steps = trace(model, input_shape, plugin, dense)
    for step in steps:
        if result is not None and result.grid and (factor := unshuffling(step)):
            result = coarsen(result, factor, factor)
            unshuffled.append(step.module)
            continue
        dae = glue_dae(step) or _flat_dae(step)
        if result is not None and result.grid != dae.grid:
            result, dae = _in_order(densify(result), unshuffled, steps[0].input_shape), densify(dae)
            unshuffled = []
        result = dae if result is None else eliminate(compose(result, dae))
    assert result is not None
    return result.derive(name=type(model).__name__)


def _require_memory(
    model: nn.Module, input_shape: Iterable[int] | None, plugin: str | None, dense: bool, check: bool = False
) -> None:
    """Refuse what is too large before anything of it is made, as far as shapes are known."""
    shape = input_shape if input_shape is not None else getattr(model, "input_shape", None)
    if isinstance(model, nn.Module) and shape is not None:
        require_memory(sizes_of(model, sizes(shape, "input_shape", SAMPLE), plugin, dense), check)


def _name(members: Sequence[Step]) -> str:
    first, last = (label(step.path, step.module) for step in (members[0], members[-1]))
    return first if len(members) == 1 else f"{first} to {last}"


def _in_order(dae: DAE, unshuffled: Sequence[nn.Module], shape: tuple[int, ...]) -> DAE:
    """A dense DAE of unshuffled images as one of the images themselves, flattened: the columns of U in their order."""
    if not unshuffled:
        return dae
    place = torch.arange(math.prod(shape), device=dae.U.device).reshape(1, *shape)
    U = torch.empty_like(dae.U)
    U[:, nn.Sequential(*unshuffled)(place).flatten()] = dae.U
    return dae.derive(U=U)


def _flat_dae(step: Step) -> DAE:
    """Glue that has no place on a grid, on flattened images."""
    size, name = step.input_shape, label(step.path, step.module)
    if is_activation(step.module):
        return elementwise(activation_of(step.module, step.path), math.prod(size), name)
    if type(step.module) is MaxMin:
        return max_min(math.prod(size), name)
    return affine(*affine_image(step.module, size, step.path), step.lipschitz, name)


@isolated
def convert(
    model: nn.Module,
    input_shape: Iterable[int] | None = None,
    epsilon: float = 0.0,
    *,
    delta: float = 0.0,
    plugin: str | None = None,
    options: SolverOptions = DEFAULT,
    merge: bool = False,
    dense: bool = False,
    check: bool = True,
) -> Network:
    """The same function with the same Lipschitz constant as LBEN stages and glue, float64 until ``.float()``.

    Conversion and validation run on the CPU; the network is handed back on the model's device.

    ``input_shape`` of one sample, where the model does not say it (an attribute ``input_shape``, or its first layer).
    ``epsilon``: ε of every stage; 0 is exact. ``delta``: state each stage's constant at L(1 + δ), which ε > 0 needs for
    most networks (`lipconvert.networks.construction.construct`). ``plugin``: who has the first word where two claim a layer.
    ``options``: how the stages are solved. ``merge``: join neighbouring stages, and the affine glue beside them, into one
    where they share a space: flat, or images of one size. ``dense``: state layers on images densely, on flattened ones: any
    padding, but small images only. ``check``: run `validate` and raise when it fails.

    Raises what `trace` raises, `NotPSDError` and `EquivalenceError`.
    """
    epsilon = number(epsilon, "epsilon", "it must be finite and not negative", least=0.0)
    delta = number(delta, "delta", "it must be finite and not negative", least=0.0)
    _require_memory(model, input_shape, plugin, dense, check)
    groups = group(trace(model, input_shape, plugin, dense), merge)
    stages = [(members, [s.dae for s in members if s.dae is not None]) for members in groups]
    require_memory([size_of(parts, _name(members)) for members, parts in stages if parts], check)
    daes = [None if members[0].dae is None else stage_dae(members) for members in groups]
    modules: list[nn.Module] = []
    constants: list[float | None] = []
    roundings: list[tuple[float, float] | None] = []
    for members, dae in zip(groups, daes, strict=True):
        modules.append(members[0].module if dae is None else LBEN.from_dae(dae, epsilon, delta, options))
        constants.append(members[0].lipschitz if dae is None else None)
        roundings.append(members[0].rounding if dae is None else None)
    network = Network(modules, constants, groups[0][0].input_shape, roundings).eval()
    network.provenance = _provenance(model, {step.plugin for members in groups for step in members})
    if check:
        compare(model, network, groups, daes, delta=delta)
    return network.to(next((p.device for p in model.parameters()), network.device))


def _provenance(model: nn.Module, used: set[str]) -> Provenance:
    """Where a network comes from: the plugins that described it, and the SHA-256 of the source's tensors."""
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    sources = [
        PluginSource(name=plugin.name, distribution=plugin.distribution, version=plugin.version)
        for plugin in plugins()
        if plugin.name in used
    ]
    versions = {"lipconvert": version("lipconvert"), "torch": torch.__version__}
    return Provenance(model=type(model).__name__, sha256=fingerprint(**tensors), plugins=sources, versions=versions)
