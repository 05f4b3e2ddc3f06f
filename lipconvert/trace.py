"""Walk a model, ask the registry about each module, and group what becomes one stage.

A module is asked about from the outside in: first every plugin, then the core, which knows activations, affine layers
(``nn.Linear``) and glue; an ``nn.Sequential`` that nobody claims is entered. Neighbouring layers of one plugin become
one LBEN stage, with the activations and affine layers between and beside them; glue stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from .activations import activation_of, is_activation
from .compose import affine, compose, elementwise, eliminate
from .dae import DAE
from .equilibrium import evaluate
from .errors import LipconvertError, PluginError, ShapeError, UnsupportedModuleError
from .glue import core_lipschitz
from .network import Network
from .registry import registry
from .spectrum import require_finite

CORE = "core"


M = TypeVar("M", bound=nn.Module)


def computes_as(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether a module is of a kind and computes with that kind's own ``forward``: a subclass may have another one.

    What a plugin asks before it claims a layer. Overriding a constraint (the T of a residual layer) is no obstacle.
    """
    return isinstance(module, kind) and type(module).forward is kind.forward


@dataclass(frozen=True)
class Step:
    """One module of the source in order: its path, the shape it is given, and either its DAE with the plugin it comes from
    (``CORE`` for activations and affine layers) or, as glue, its Lipschitz constant."""

    path: str
    module: nn.Module
    input_shape: tuple[int, ...]
    dae: DAE | None
    plugin: str
    lipschitz: float


def trace(model: nn.Module, input_shape: Iterable[int] | None = None, plugin: str | None = None) -> list[Step]:
    """The steps of a model, in float64; the model itself is not touched.

    ``input_shape`` of one sample; by default the model's own attribute ``input_shape``, or what its first layer says.
    Raises `UnsupportedModuleError`, `UnsupportedActivationError`, `AmbiguousModelError`, `NotFiniteError`, `NotPSDError`
    (a layer that is not as Lipschitz as its architecture promises) and `ShapeError`, each naming the layer.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModuleError(
            "", str(model), "it is not an nn.Module; give the model itself, not its class or file."
        )
    model = copy.deepcopy(model).double().eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() or tensor.is_complex():
            require_finite(tensor, f"parameter {name!r}")
    shape = input_shape if input_shape is not None else getattr(model, "input_shape", None)
    walker = _Walker(None if shape is None else _sizes(shape), plugin)
    steps = list(walker.walk(model, ""))
    if not steps:
        raise UnsupportedModuleError("", type(model).__name__, "there is nothing in it.")
    return steps


def _sizes(shape: Iterable[int] | int) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ShapeError("input_shape", "positive sizes of one sample, such as (1, 28, 28)", shape)
    return sizes


class _Walker:
    """Carries the shape of one sample through the model."""

    def __init__(self, shape: tuple[int, ...] | None, plugin: str | None) -> None:
        self.shape, self.plugin = shape, plugin

    def walk(self, module: nn.Module, path: str) -> Iterator[Step]:
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedModuleError(
                path,
                type(module).__name__,
                "forward hooks change what it computes. Remove them; for spectral_norm and weight_norm use the functions of "
                "torch.nn.utils.parametrizations, which need none.",
            )
        try:
            claim = registry().to_dae(module, self.shape, self.plugin, path)
        except LipconvertError as error:
            if error.layer is None:  # a plugin does not know where in the model it is
                error.layer = f"{label(path, module)!r}, {type(module).__name__}"
            raise
        if claim is not None:
            name, dae = claim
            yield self._step(module, path, replace(dae, name=label(path, module)), name)
        elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            # Not named_children(), which names a module that stands twice (one shared ReLU) only once.
            for key, child in module._modules.items():
                if child is not None:
                    yield from self.walk(child, f"{path}.{key}" if path else key)
        elif is_activation(module):
            activation = activation_of(module, path)
            shape = self._known(path, module)
            if len(shape) == 1:
                yield self._step(module, path, elementwise(activation, shape[0], label(path, module)), CORE)
            else:
                yield self._step(module, path, None, CORE, 1.0)
        elif isinstance(module, Network):
            for index, step in enumerate(module.steps):
                yield from self.walk(step, f"{path}.steps.{index}" if path else f"steps.{index}")
        elif type(module) in (nn.Dropout, nn.AlphaDropout):
            return  # the identity of the eval mode that is converted
        elif computes_as(module, nn.Linear):
            weight, bias = module.weight, module.bias
            yield self._step(module, path, affine(weight, bias, name=label(path, module)), CORE)
        else:
            known = core_lipschitz(module)
            known = registry().glue_lipschitz(module, self.plugin, path) if known is None else known
            if known is None:
                raise UnsupportedModuleError(path, type(module).__name__, self._why(module))
            yield self._step(module, path, None, CORE, known)

    def _known(self, path: str, module: nn.Module) -> tuple[int, ...]:
        if self.shape is None:
            raise ShapeError(
                f"the input of {label(path, module)!r}",
                "known",
                "unknown",
                "Give input_shape=... (one sample, no batch).",
            )
        return self.shape

    def _step(self, module: nn.Module, path: str, dae: DAE | None, plugin: str, lipschitz: float = 1.0) -> Step:
        if self.shape is None and dae is not None:
            self.shape = (dae.inputs,)
        shape = self._known(path, module)
        where = f"the input of {label(path, module)!r}"
        if dae is not None and shape != (dae.inputs,):
            hint = "Put an nn.Flatten() in front of it." if len(shape) > 1 else ""
            raise ShapeError(where, (dae.inputs,), shape, hint)
        probe = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        try:
            with torch.no_grad():
                image = module(probe)
        except LipconvertError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise ShapeError(where, f"one that {type(module).__name__} takes ({error})", shape) from error
        self.shape = tuple(image.shape[1:])
        if dae is not None and self.shape != (dae.outputs,):
            raise ShapeError(f"the output of {label(path, module)!r}", (dae.outputs,), self.shape)
        if dae is not None:
            self._require_same(module, path, plugin, image, evaluate(dae, probe))
        return Step(path, module, shape, dae, plugin, dae.lipschitz if dae is not None else lipschitz)

    @staticmethod
    def _require_same(module: nn.Module, path: str, plugin: str, expected: Tensor, actual: Tensor) -> None:
        """The claim itself is tried on three inputs: what a plugin says must be what the module computes."""
        error = float((actual - expected).abs().max()) if expected.numel() else 0.0
        # Float64 on both roads; two equilibrium solves agree to 1e-13 over their monotonicity.
        if not error <= 1e-8 * max(1.0, float(expected.abs().max())):
            raise PluginError(
                plugin,
                f"what to_dae says of {label(path, module)!r} ({type(module).__name__}) is not what the module computes: "
                f"outputs differ by {error:.3e}. Usual causes: a subclass with a forward of its own; a wrong to_dae.",
            )

    @staticmethod
    def _why(module: nn.Module) -> str:
        names = ", ".join(registry().names()) or "none"
        if any(True for _ in module.children()):
            return (
                f"it has a forward of its own, and no plugin claims it (asked: {names}). Build the model as an "
                "nn.Sequential of registered layers, or register a plugin whose to_dae knows it."
            )
        return (
            f"no plugin claims it (asked: {names}) and it is no glue of known Lipschitz constant. "
            "A plugin says so with to_dae (a layer) or glue_lipschitz (kept as it is)."
        )


def label(path: str, module: nn.Module) -> str:
    """What a module is called in messages and stage names: its path, or its type at the root."""
    return path or type(module).__name__


def group(steps: list[Step]) -> list[list[Step]]:
    """Steps that become one stage, or one glue module, in order.

    Neighbours with DAEs join unless they come from two different plugins; activations and affine layers join either.
    """
    groups: list[list[Step]] = []
    for step in steps:
        previous = groups[-1] if groups else None
        if previous is not None and step.dae is not None and previous[-1].dae is not None:
            plugins = {s.plugin for s in (*previous, step)} - {CORE}
            if len(plugins) <= 1:
                previous.append(step)
                continue
        groups.append([step])
    return groups


def stage_dae(steps: list[Step]) -> DAE:
    """One DAE for steps that all have one: composed, and identity rows that are not needed removed.

    Eliminating after each layer keeps the sizes of one layer more than the result's.
    """
    daes = [step.dae for step in steps if step.dae is not None]
    result = daes[0]
    for dae in daes[1:]:
        result = eliminate(compose(result, dae))
    return result
