"""Walk a model, ask the registry about each module, and group what becomes one stage.

A module is asked about from the outside in: first every plugin, then the core, which knows activations, affine layers
(``nn.Linear``, ``nn.Conv2d``) and glue; an ``nn.Sequential`` that nobody claims is entered. Neighbouring layers of one
plugin become one LBEN stage, with the activations and affine layers between and beside them; glue stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..dae.activations import MaxMin, activation_of, is_activation, without_writing
from ..dae.compose import MOST_DENSE, affine, coarsen, compose, densify, elementwise, eliminate, gauge, max_min
from ..dae.dae import DAE
from ..equilibria.equilibrium import evaluate
from ..errors import LipconvertError, PluginError, ShapeError, UnsupportedModuleError
from ..foundation.arguments import isolated, sizes
from ..foundation.integrity import DROPOUT, computes_as, require_source
from ..linalg.spectrum import Grid, require_finite, same_origin, strided_weight
from ..networks.glue import KNOWN, Normalize, PadChannels, affine_image, core_lipschitz, pair
from ..networks.network import SAMPLE, Network
from ..plugin_api.registry import registry

CORE = "core"
# what `trace` puts around a layer to reshape images for it
DETOUR = "detour"
# max Λ / min Λ above which a stage is rescaled
SPREAD = 1e4


@dataclass(frozen=True)
class Step:
    """One module of the source in order: its path, the shape it is given, and either its DAE with the plugin it comes from
    (``CORE`` for activations and affine layers) or, as glue, its Lipschitz constant. A strided layer is two of them:
    ``PixelUnshuffle`` as glue, and a DAE on the coarse grid."""

    path: str
    module: nn.Module
    input_shape: tuple[int, ...]
    dae: DAE | None
    plugin: str
    lipschitz: float
    rounding: tuple[float, float] | None = (
        None  # of glue that a plugin knows (`lipconvert.plugin_api.hookspecs.glue_rounding`)
    )


@isolated
def trace(
    model: nn.Module, input_shape: Iterable[int] | None = None, plugin: str | None = None, dense: bool = False
) -> list[Step]:
    """The steps of a model, in float64 on the CPU; the model itself is not touched.

    ``input_shape`` of one sample; by default the model's own attribute ``input_shape``, or what its first layer says.
    ``dense``: layers on images are stated on flattened ones, which takes small images but any padding.
    Raises `UnsupportedModuleError`, `UnsupportedActivationError`, `AmbiguousModelError`, `NotFiniteError`, `NotPSDError`
    (a layer that is not as Lipschitz as its architecture promises) and `ShapeError`, each naming the layer.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModuleError(
            "", str(model), "it is not an nn.Module; give the model itself, not its class or file."
        )
    require_source(model)
    model = copy.deepcopy(model).to("cpu", torch.float64).eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() or tensor.is_complex():
            require_finite(tensor, f"parameter {name!r}")
    shape = input_shape if input_shape is not None else getattr(model, "input_shape", None)
    walker = _Walker(None if shape is None else sizes(shape, "input_shape", SAMPLE), plugin, dense)
    steps = _without_detours(list(walker.walk(model, "")))
    if not steps:
        raise UnsupportedModuleError("", type(model).__name__, "there is nothing in it.")
    return steps


class _Walker:
    """Carries the shape of one sample through the model."""

    def __init__(self, shape: tuple[int, ...] | None, plugin: str | None, dense: bool) -> None:
        self.shape, self.plugin, self.dense = shape, plugin, dense

    def walk(self, module: nn.Module, path: str) -> Iterator[Step]:
        try:
            claim = registry().to_dae(module, self.shape, self.plugin, path, self.dense)
        except LipconvertError as error:
            if error.layer is None:  # a plugin does not know where in the model it is
                error.layer = f"{label(path, module)!r}, {type(module).__name__}"
            raise
        if claim is not None:
            name, dae = claim
            yield from self._layer(module, path, dae.derive(name=label(path, module)), name)
        elif computes_as(module, nn.Sequential):
            # Not named_children(), which names a module that stands twice (one shared ReLU) only once.
            for key, child in module._modules.items():
                if child is not None:
                    yield from self.walk(child, f"{path}.{key}" if path else key)
        elif is_activation(module) or type(module) is MaxMin:
            module = without_writing(module)
            make = max_min if type(module) is MaxMin else partial(elementwise, activation_of(module, path))
            shape = self._known(path, module)
            if len(shape) in (1, 3):
                yield from self._layer(module, path, make(shape[0], label(path, module), Grid(shape[1:])), CORE)
            else:
                yield self._glue(module, path, 1.0)
        elif computes_as(module, Network):
            for index, step in enumerate(module.steps):
                yield from self.walk(step, f"{path}.steps.{index}" if path else f"steps.{index}")
        elif type(module) in DROPOUT:
            return  # the identity of the eval mode that is converted
        elif computes_as(module, nn.Linear):
            yield from self._layer(module, path, affine(module.weight, module.bias, name=label(path, module)), CORE)
        elif computes_as(module, nn.Conv2d):
            yield from self._layer(module, path, self._convolution(module, path), CORE)
        else:
            known = core_lipschitz(module)
            if known is not None:
                yield self._glue(module, path, known)
                return
            if type(module) in (nn.Flatten, nn.Unflatten):
                reason = (
                    "it mixes the samples: dimension 0 is the batch. nn.Flatten() begins at 1, like Unflatten(1, ...)."
                )
                raise UnsupportedModuleError(path, type(module).__name__, reason)
            known = registry().glue_lipschitz(module, self.plugin, path)
            if known is None:
                raise UnsupportedModuleError(path, type(module).__name__, self._why(module))
            step = self._glue(module, path, known)
            rounding = registry().glue_rounding(module, step.input_shape, self.plugin, path)
            yield replace(step, rounding=rounding)

    def _known(self, path: str, module: nn.Module) -> tuple[int, ...]:
        if self.shape is None:
            raise ShapeError(
                f"the input of {label(path, module)!r}",
                "known",
                "unknown",
                "Give input_shape=... (one sample, no batch).",
            )
        return self.shape

    def _convolution(self, module: nn.Conv2d, path: str) -> DAE:
        """A circular nn.Conv2d as an affine layer; a strided one on the coarse grid. Dense, with any padding, on request."""
        name, shape = label(path, module), self._known(path, module)
        stride, dilation = pair(module.stride), pair(module.dilation)
        if self.dense:
            self._image(module, path)
            return affine(*affine_image(module, shape, path), name=name)
        pointwise = pair(module.kernel_size) == (1, 1) and _padding(module) in ((0, 0), "same", "valid")
        refusals = (
            (
                module.padding_mode != "circular" and not pointwise,
                f'its padding_mode is "{module.padding_mode}": only circular padding turns into one small matrix for each '
                "frequency.",
            ),
            (module.groups != 1, f"groups = {module.groups} is not supported, only 1."),
            (dilation != (1, 1), f"dilation = {dilation} is not supported, only 1."),
            (stride[0] != stride[1], f"its strides {stride} differ."),
            (
                not pointwise and module.padding != "same" and not _keeps(module),
                f"its padding {module.padding} does not keep the image with kernel_size {module.kernel_size}: for odd sizes "
                '(kernel_size - 1)//2 does, for all padding="same".',
            ),
        )
        for refused, reason in refusals:
            if refused:
                remedy = "For small images convert(model, dense=True) takes it."
                raise UnsupportedModuleError(path, type(module).__name__, f"{reason} {remedy}")
        s = stride[0]
        if len(shape) != 3 or shape[1] % s or shape[2] % s:
            raise ShapeError(f"the input of {name!r}", f"(c, h, w), h and w multiples of {s}", shape)
        weight, origin = strided_weight(module.weight, s)
        grid = Grid((shape[1] // s, shape[2] // s))
        return affine(grid.convolution(weight, origin), module.bias, name=name, grid=grid)

    def _image(self, module: nn.Module, path: str, probes: int = 3) -> tuple[Tensor, Tensor]:
        """Random inputs of the current shape and what a module makes of them."""
        shape = self._known(path, module)
        probe = torch.randn(probes, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        try:
            with torch.no_grad():
                image = module(probe.clone())
        except LipconvertError as error:
            error.layer = error.layer or f"{label(path, module)!r}, {type(module).__name__}"
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            where = f"the input of {label(path, module)!r}"
            raise ShapeError(where, f"one that {type(module).__name__} takes ({error})", shape) from error
        if image.dim() < 1 or len(image) != probes:
            reason = f"it makes {tuple(image.shape)} of a batch {tuple(probe.shape)}: the first dimension is the batch."
            raise UnsupportedModuleError(path, type(module).__name__, reason)
        return probe, image

    def _glue(self, module: nn.Module, path: str, lipschitz: float) -> Step:
        shape = self._known(path, module)
        self.shape = tuple(self._image(module, path)[1].shape[1:])
        return Step(path, module, shape, None, CORE, lipschitz)

    def _layer(self, module: nn.Module, path: str, dae: DAE, plugin: str) -> Iterator[Step]:
        """A module with its DAE, and the glue that reshapes images for it."""
        if self.shape is None and not dae.grid:
            self.shape = dae.input_shape
        shape = self._known(path, module)
        unshuffle = _unshuffle(shape, dae)
        flat = self.dense and len(shape) > 1
        before = [nn.PixelUnshuffle(unshuffle)] * (unshuffle > 1) + [nn.Flatten()] * flat
        if flat:
            dae = densify(dae)
        given = tuple(nn.Sequential(*before)(torch.empty(1, *shape)).shape[1:])
        if given != dae.input_shape:
            hint = "Put an nn.Flatten() in front of it." if len(shape) > 1 and not dae.grid else ""
            raise ShapeError(f"the input of {label(path, module)!r}", dae.input_shape, shape, hint)
        probe, image = self._image(module, path)
        after = [nn.Unflatten(1, tuple(image.shape[1:]))] * flat
        expected = tuple(image.flatten(1).shape[1:]) if flat else tuple(image.shape[1:])
        if expected != dae.output_shape:
            raise ShapeError(f"the output of {label(path, module)!r}", dae.output_shape, expected)
        if plugin != CORE:
            answer = evaluate(dae, nn.Sequential(*before)(probe))
            self._require_same(module, path, plugin, image.flatten(1), answer.flatten(1))
        for glue in before:
            yield Step(path, glue, shape, None, DETOUR, 1.0)
            shape = tuple(glue(torch.empty(1, *shape)).shape[1:])
        yield Step(path, module, shape, dae, plugin, dae.lipschitz)
        for glue in after:
            yield Step(path, glue, dae.output_shape, None, DETOUR, 1.0)
        self.shape = tuple(image.shape[1:])

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


def _keeps(module: nn.Conv2d) -> bool:
    """Whether its padding, in pixels, keeps the image (of which a stride then takes every s-th pixel)."""
    origin = same_origin(module.weight)
    odd = all(k % 2 for k in pair(module.kernel_size))
    return _padding(module) == origin and (odd or pair(module.stride)[0] > 1)


def _padding(module: nn.Conv2d) -> tuple[int, int] | str:
    return module.padding if isinstance(module.padding, str) else pair(module.padding)


def _unshuffle(shape: tuple[int, ...], dae: DAE) -> int:
    """The s for which ``PixelUnshuffle(s)`` takes a shape to the DAE's own, 1 if there is none."""
    if not dae.grid or len(shape) != 3:
        return 1
    s = shape[1] // dae.grid.image[0]
    return s if s > 1 and dae.input_shape == (shape[0] * s * s, shape[1] // s, shape[2] // s) else 1


def _without_detours(steps: list[Step]) -> list[Step]:
    """Unflatten and Flatten right after it, between two layers that are stated densely, left out."""
    kept: list[Step] = []
    for step in steps:
        flatten = step.module
        whole = type(flatten) is nn.Flatten and (flatten.start_dim, flatten.end_dim) == (1, -1)
        if whole and kept and kept[-1].plugin == DETOUR and type(kept[-1].module) is nn.Unflatten:
            kept.pop()
        else:
            kept.append(step)
    return kept


# Glue that acts on each pixel by itself: the same affine map of the channels everywhere.
_PIXELWISE = (Normalize, PadChannels, nn.Identity)


def glue_dae(step: Step) -> DAE | None:
    """Affine glue as a DAE in the space it stands in, flat or on the grid of its images; None if it has none there."""
    name = label(step.path, step.module)
    if step.dae is not None:
        return step.dae
    if type(step.module) not in KNOWN or type(step.module) in (MaxMin, nn.Unflatten):
        return None  # a stranger's may be anything, and have images as outputs
    if len(step.input_shape) == 1:
        if step.input_shape[0] > MOST_DENSE:
            return None
        return affine(*affine_image(step.module, step.input_shape, step.path), step.lipschitz, name)
    if len(step.input_shape) == 3 and type(step.module) in _PIXELWISE:
        M, b = affine_image(step.module, (step.input_shape[0], 1, 1), step.path)
        grid = Grid(step.input_shape[1:])
        return affine(M.to(torch.complex128).expand(*grid.batch, *M.shape), b, step.lipschitz, name, grid)
    return None


def group(steps: list[Step], merge: bool = False) -> list[list[Step]]:
    """Steps that become one stage, or one glue module, in order.

    Neighbours with DAEs join unless they come from two different plugins; activations and affine layers join either.
    Activations on images with no layer beside them stay glue. ``merge``: layers of different plugins join too, and affine
    glue between and beside them, where they share a space; ``PixelUnshuffle`` takes what is before it to the coarse grid.
    """
    groups: list[list[Step]] = []
    for step in steps:
        previous = groups[-1] if groups else None
        if merge and step.dae is None:
            step = replace(step, dae=glue_dae(step))
        if previous is not None and previous[0].dae is not None:
            plugins = {s.plugin for s in (*previous, step)} - {CORE}
            if (step.dae is not None and (merge or len(plugins) <= 1)) or (merge and unshuffling(step)):
                previous.append(step)
                continue
        groups.append([step])
    return [part for members in groups for part in _stages_of(members)]


def unshuffling(step: Step) -> int:
    """The factor of a ``PixelUnshuffle`` of images that is glue, 0 for any other step."""
    module = step.module
    if step.dae is None and type(module) is nn.PixelUnshuffle and len(step.input_shape) == 3:
        return int(module.downscale_factor)
    return 0


def _stages_of(members: list[Step]) -> list[list[Step]]:
    """A group as one stage; or its members one by one as glue, where nothing in it needs to be solved for.

    A stage with ``PixelUnshuffle`` between its layers takes coarse images from its start: it stands in front as well.
    """
    if all(_is_glue(step) for step in members):
        return [[replace(step, dae=None)] for step in members]
    last = max(k for k, step in enumerate(members) if not unshuffling(step)) + 1
    stage, behind = members[:last], members[last:]
    front = []
    shape = stage[0].input_shape
    for step in filter(unshuffling, stage):
        front.append([replace(step, input_shape=shape)])
        factor = unshuffling(step)
        shape = (shape[0] * factor**2, shape[1] // factor, shape[2] // factor)
    return [*front, stage, *([step] for step in behind)]


def _is_glue(step: Step) -> bool:
    """Whether a step can be left as the module it is: glue, and activations on images."""
    glue = type(step.module) in KNOWN or (is_activation(step.module) and len(step.input_shape) > 1)
    return step.dae is None or (step.plugin == CORE and glue)


def stage_dae(steps: list[Step]) -> DAE:
    """One DAE for steps that all have one: composed, identity rows that are not needed removed, well scaled.

    Eliminating after each layer keeps the sizes of one layer more than the result's. Where Λ spans more than `SPREAD`
    (neurons of an SLL with tiny q), and every σ allows it, the states are put into the gauge Λ = I: the same function, but
    small changes of its parameters are then small changes of W.
    """
    result = steps[0].dae
    assert result is not None
    for step in steps[1:]:
        if step.dae is None:
            result = coarsen(result, unshuffling(step), unshuffling(step))
        else:
            result = eliminate(compose(result, step.dae))
    spread = float(result.Lambda.max() / result.Lambda.min())
    return gauge(result) if spread > SPREAD and result.sigma.homogeneous else result
