"""Every error lipconvert raises, each with its numbers as attributes.

A message says what happened, where (stage, layer, tensor), the number, the usual causes and what to do.
The attributes carry the same facts for programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .escaping import paragraph


def shown(value: object) -> object:
    """A value as a message has it: of an integer of hundreds of digits, which Python may refuse to write, its size."""
    if isinstance(value, int) and value.bit_length() > 300:
        return f"{'-' * (value < 0)}10^{int(value.bit_length() * 0.30103)} or so"
    if isinstance(value, tuple | list):
        return type(value)(map(shown, value))
    return value


class LipconvertError(Exception):
    """Base of all errors raised on purpose by lipconvert. The command line answers it with exit code 2.

    ``layer``: the path of the layer it was raised for, where a plugin could not know it; ``step``: of the training run in
    which it was raised, counted from 0. Both are set by the core. As text it is fit for a terminal, whatever names are in it.
    """

    layer: str | None = None
    step: int | None = None

    def __str__(self) -> str:
        layer = f" [layer {self.layer}]" if self.layer is not None else ""
        step = f" [step {self.step} of the training]" if self.step is not None else ""
        return paragraph(super().__str__() + layer + step)


def _named(samples: Sequence[int], most: int = 3) -> str:
    """``sample 3``, or ``samples 3, 17, 20 and 2 more``."""
    if len(samples) == 1:
        return f"sample {samples[0]}"
    first = [str(sample) for sample in samples[:most]]
    last = first.pop() if len(samples) <= most else f"{len(samples) - most} more"
    return f"samples {', '.join(first)} and {last}"


class ShapeError(LipconvertError):
    """A tensor has the wrong shape.

    Attributes: ``where`` names the tensor, ``expected`` and ``actual`` are the two shapes (or descriptions of them).
    """

    def __init__(self, where: str, expected: object, actual: object, hint: str = "") -> None:
        self.where, self.expected, self.actual = where, expected, actual
        super().__init__(f"{where} has shape {shown(actual)}, expected {expected}." + (f" {hint}" if hint else ""))


class InsufficientMemoryError(LipconvertError):
    """A conversion cannot fit into memory.

    Attributes: ``where`` names the layers that become one stage, ``states`` n, ``image`` (h, w) or (); ``needed`` and
    ``available`` are bytes.
    """

    def __init__(self, where: str, states: int, image: tuple[int, ...], needed: float, available: int) -> None:
        self.where, self.states, self.image = where, states, image
        self.needed, self.available = needed, available
        on = f" on {image[0]}x{image[1]} pixels" if image else ""
        super().__init__(
            f"the conversion of {where!r} does not fit: it becomes one stage of at least {states} states{on}, whose matrices "
            f"need {needed / 2**30:.1f} GiB at a time; {available / 2**30:.1f} GiB are free. Its layers can be kept in "
            "smaller stages by nn.Identity() between them, of which the function and the constant stay the same; fewer "
            "pixels, fewer features or a machine with more memory help as well."
        )


class NotFiniteError(LipconvertError):
    """A tensor holds NaN or infinity: weights, or, with ``samples``, some of a batch or of a data set.

    Attributes: ``where`` names the tensor, ``count`` is the number of bad entries, ``total`` the number of entries,
    ``samples`` the places of the samples that hold them, counted from 0.
    """

    def __init__(self, where: str, count: int, total: int, samples: Sequence[int] = ()) -> None:
        self.where, self.count, self.total, self.samples = where, count, total, tuple(samples)
        if samples:
            super().__init__(
                f"{where}: {_named(self.samples)} (counted from 0), {count} of {total} entries, are NaN or infinite. "
                "Usual causes: (a) values that are missing; (b) a division by zero, or an overflow in half precision, where "
                "the data are made. Leave these samples out: x[torch.isfinite(x).flatten(1).all(1)] is the others."
            )
            return
        super().__init__(
            f"{where}: {count} of {total} entries are NaN or infinite. Usual causes: (a) a training run that diverged; "
            "(b) a division by a zero normaliser (T = 0, a zero column); (c) an overflow in half precision. "
            "Go back to an earlier checkpoint; nothing can be proved about these weights."
        )


class InvalidParameterError(LipconvertError):
    """A parameter lies outside the range its formula needs (Λ > 0, m > 0, ε ≥ 0, slopes in [0, 1], ...).

    Attributes: ``where`` names it, ``value`` is the offending number.
    """

    def __init__(self, where: str, value: object, requirement: str) -> None:
        self.where, self.value, self.requirement = where, value, requirement
        super().__init__(f"{where} is {shown(value)}, but {requirement}.")


class NotPSDError(LipconvertError):
    """A matrix that has to be positive semidefinite is not, by more than round-off.

    Attributes: ``where`` names matrix and layer, ``least_eigenvalue`` is the number, ``tolerance`` the round-off allowed.
    """

    def __init__(self, where: str, least_eigenvalue: float, tolerance: float, causes: Sequence[str] = ()) -> None:
        self.where, self.least_eigenvalue, self.tolerance = where, least_eigenvalue, tolerance
        causes = causes or (
            "weights changed after the constraint that made them Lipschitz was applied",
            "a norm or T estimated from below (power iteration)",
            "weights trained or stored in float32 or less without re-normalising in float64",
        )
        listed = "; ".join(f"({letter}) {cause}" for letter, cause in zip("abcdef", causes, strict=False))
        super().__init__(
            f"{where} is not positive semidefinite: least eigenvalue {least_eigenvalue:.6e}, "
            f"round-off allowance {tolerance:.1e}. Usual causes: {listed}."
        )


class NotConvergedError(LipconvertError):
    """An equilibrium solve stopped before its tolerance was reached.

    Attributes: ``solution`` is the `Solution` as far as it came, ``method``, ``unconverged`` (number of samples),
    ``worst_residual`` (relative to `Solution.scale`), ``tolerance``, ``steps``.
    """

    def __init__(self, solution: Any, tolerance: float, where: str = "equilibrium") -> None:
        self.solution, self.tolerance, self.method = solution, tolerance, solution.method
        self.unconverged = int((~solution.converged).sum())
        self.worst_residual = float(solution.relative_residual.max())
        self.steps = int(solution.steps.max())
        super().__init__(
            f"{where}: {self.unconverged} of {solution.converged.numel()} samples did not converge: {solution.method} "
            f"reached relative residual {self.worst_residual:.3e} after {self.steps} steps, tolerance {tolerance:.1e}. "
            "Usual causes: (a) W is not monotone in any diagonal metric, so there may be no unique equilibrium "
            "(lipconvert.check shows the margin of condition (3)); (b) the margin is tiny: convert with epsilon > 0 or "
            "raise max_steps; (c) a tolerance below the precision of the dtype."
        )


class UnsupportedModuleError(LipconvertError):
    """No plugin and no core rule knows a module.

    Attributes: ``path`` (dotted path inside the model), ``module_type``.
    """

    def __init__(self, path: str, module_type: str, reason: str) -> None:
        self.path, self.module_type = path, module_type
        super().__init__(f"{path or 'the model'} ({module_type}) cannot be converted: {reason}")


class UnsupportedActivationError(LipconvertError):
    """An activation is not elementwise with slope in [0, 1], so condition (10) says nothing about it.

    Attributes: ``path``, ``activation``.
    """

    def __init__(self, path: str, activation: str, reason: str) -> None:
        self.path, self.activation = path, activation
        super().__init__(
            f"{path or 'the model'}: activation {activation} is not supported: {reason} "
            "Theorem 3.1 needs elementwise activations with slope in [0, 1] (ReLU, LeakyReLU, ELU with alpha <= 1, "
            "Softplus, Tanh, Sigmoid, Hardtanh, identity)."
        )


class AmbiguousModelError(LipconvertError):
    """Two plugins claim one module (or one weights file); the order of registration never decides.

    Attributes: ``path``, ``plugins`` (their names).
    """

    def __init__(self, path: str, plugins: Sequence[str]) -> None:
        self.path, self.plugins = path, tuple(plugins)
        super().__init__(
            f"{path or 'the model'} is claimed by {len(self.plugins)} plugins: {', '.join(self.plugins)}. "
            f"Choose one with plugin={self.plugins[0]!r} (command line: --plugin {self.plugins[0]})."
        )


class PluginError(LipconvertError):
    """A plugin is missing, failed to load, clashes with another, or answered a hook with something unusable.

    Attributes: ``plugin`` (its name).
    """

    def __init__(self, plugin: str, reason: str) -> None:
        self.plugin = plugin
        super().__init__(f"plugin {plugin!r}: {reason}")


class WeightsError(LipconvertError):
    """A weights file cannot be opened, or no plugin recognises what is in it.

    Attributes: ``path``.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        super().__init__(f"{path}: {reason}")


class ModelError(LipconvertError):
    """A model named as ``package.module:factory`` cannot be had: not found, not callable, it fails, or gives no module.

    Attributes: ``spec`` (the name as it was given).
    """

    def __init__(self, spec: str, reason: str) -> None:
        self.spec = spec
        super().__init__(f"model {spec!r}: {reason}")


class DataError(LipconvertError):
    """A data set is not there, or its files are damaged.

    Attributes: ``name`` of the set.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        super().__init__(f"data set {name!r}: {reason}")


class MissingOptionError(LipconvertError):
    """A weights file was recognised, but a number it does not hold is needed to rebuild the model.

    Attributes: ``plugin``, ``option``.
    """

    def __init__(self, plugin: str, option: str, meaning: str) -> None:
        self.plugin, self.option = plugin, option
        super().__init__(
            f"these look like {plugin} weights, but {option} ({meaning}) is not stored in the file. "
            f"Give it with options={{{option!r}: ...}} (command line: --option {option}=...)."
        )


class CheckpointError(LipconvertError):
    """A lipconvert checkpoint is damaged, incomplete or of an unknown version.

    Attributes: ``path``, ``field`` (tensor or manifest entry).
    """

    def __init__(self, path: str, field: str, reason: str) -> None:
        self.path, self.field = path, field
        super().__init__(f"{path}: {field}: {reason}")


class EquivalenceError(LipconvertError):
    """A converted network does not do what its source does, or does not keep its constant (exit code 1).

    Attributes: ``report`` is the `ValidationReport`, whose ``checks`` hold every measured number.
    """

    def __init__(self, report: object, failed: Sequence[str]) -> None:
        self.report, self.failed = report, tuple(failed)
        super().__init__("validation failed: " + "; ".join(self.failed))


class NoCertificateError(LipconvertError):
    """A network has no Lipschitz constant to certify with, or no bound on the error of its solve.

    Attributes: ``where``.
    """

    def __init__(self, where: str, reason: str) -> None:
        self.where = where
        super().__init__(f"{where}: no certificate: {reason}")


class ModifiedModuleError(NoCertificateError):
    """A module of a converted network does not compute what its class says: hooks, replaced methods, a compiled call.

    What would be certified, attacked or saved is not what ``net(x)`` runs. Attributes: ``path`` (dotted path inside the
    network), ``module_type``, ``where`` (both in words).
    """

    def __init__(self, path: str, module_type: str, found: str, remedy: str) -> None:
        self.path, self.module_type = path, module_type
        self.where = f"{path or 'the network'} ({module_type})"
        reason = "what runs is then not what its class says, and that alone can be certified, attacked and saved"
        LipconvertError.__init__(self, f"{self.where}: {found}; {reason}. {remedy}")


class ProcessError(LipconvertError):
    """Another process of the same run failed, so that its part of the results is missing.

    Attributes: ``process`` (its rank; None where it ended without a word), ``reason``.
    """

    def __init__(self, process: int | None, reason: str) -> None:
        self.process, self.reason = process, reason
        super().__init__(f"{'another process' if process is None else f'process {process}'} failed: {reason}")
