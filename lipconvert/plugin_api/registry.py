"""Which plugins there are, where they come from, and which of them claims a model.

Discovery goes through the entry-point group ``lipconvert``; the built-in plugins use the same door. A plugin that fails
to load is reported by name and takes no other down. Two claims on one model are an error, never a race.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
from torch import Tensor, nn

from ..dae.dae import DAE
from ..errors import (
    AmbiguousModelError,
    InvalidParameterError,
    LipconvertError,
    MissingOptionError,
    PluginError,
    WeightsError,
)
from . import hookspecs
from .hookspecs import PluginInfo

GROUP = "lipconvert"
RESTRICT = "LIPCONVERT_PLUGINS"
_HOOKS = tuple(name for name, value in vars(hookspecs).items() if hasattr(value, "lipconvert_spec"))


@dataclass(frozen=True)
class Plugin:
    """One registered (or refused) plugin: its name, the distribution and version it comes from, the hooks it implements,
    what it says of itself, and the reason if it could not be loaded."""

    name: str
    distribution: str
    version: str
    module: str
    hooks: tuple[str, ...] = ()
    info: PluginInfo | None = None
    error: str | None = None


class Registry:
    """A pluggy plugin manager that remembers provenance. ``Registry.discover()`` loads what is installed."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._plugins: dict[str, Plugin] = {}

    @classmethod
    def discover(cls) -> Registry:
        """Load every entry point of the group, in order of name; ``LIPCONVERT_PLUGINS=a,b`` restricts it to those.

        Raises `PluginError` when the variable names a plugin that is not installed.
        """
        self = cls()
        # From a source checkout the metadata of one installation is found twice: compare, do not count.
        found: dict[str, dict[tuple[str, str, str], EntryPoint]] = defaultdict(dict)
        for entry in entry_points(group=GROUP):
            found[entry.name][(*_source(entry), entry.value)] = entry
        restriction = os.environ.get(RESTRICT)
        wanted = sorted(found) if restriction is None else [n.strip() for n in restriction.split(",") if n.strip()]
        for name in wanted:
            if name not in found:
                raise PluginError(name, f"{RESTRICT} names it, but no installed distribution provides it")
            entries = list(found[name].values())
            if len(entries) > 1:
                sources = ", ".join(f"{' '.join(_source(e))} ({e.value})" for e in entries)
                reason = f"the name is registered more than once: {sources}; none is loaded. Uninstall all but one."
                self._plugins[name] = Plugin(name, "conflict", "", "", error=reason)
            else:
                self._load(entries[0])
        return self

    def _load(self, entry: EntryPoint) -> None:
        distribution, version = _source(entry)
        try:
            module = entry.load()
        except Exception as error:  # noqa: BLE001 - whatever a stranger's import raises must not take the other plugins down
            reason = f"{type(error).__name__}: {error}"
            self._plugins[entry.name] = Plugin(entry.name, distribution, version, entry.value, error=reason)
            return
        try:
            self.register(module, entry.name, distribution, version)
        except PluginError as error:
            self._plugins[entry.name] = Plugin(entry.name, distribution, version, entry.value, error=str(error))

    def register(self, module: object, name: str, distribution: str = "(this process)", version: str = "") -> None:
        """Register a module or object of hook implementations under a name.

        Raises `PluginError` when the name is taken, when a hook is unknown or has a wrong signature, or when there is no
        ``to_dae`` among them.
        """
        if name in self._plugins:
            raise PluginError(name, f"a plugin of this name is registered already ({self._plugins[name].module})")
        try:
            self._manager.register(module, name=name)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            if self._manager.has_plugin(name):  # pluggy < 1.7 leaves a plugin that failed validation registered
                self._manager.unregister(name=name)
            raise PluginError(name, str(error)) from error
        hooks = tuple(h for h in _HOOKS if module in [i.plugin for i in getattr(self._manager.hook, h).get_hookimpls()])
        if "to_dae" not in hooks:
            self._manager.unregister(name=name)
            raise PluginError(name, "it has no to_dae marked with lipconvert.hookimpl")
        path = getattr(module, "__name__", type(module).__name__)
        self._plugins[name] = Plugin(name, distribution, version, path, hooks)
        try:
            info = self.ask(name, "describe")
            if info is not None and not _is_text(info):
                raise PluginError(name, f"it must return a PluginInfo of texts, not {info!r}")
        except LipconvertError as error:
            self._manager.unregister(name=name)
            del self._plugins[name]
            raise PluginError(name, f"describe() failed: {error}") from error
        self._plugins[name] = Plugin(name, distribution, version, path, hooks, info)

    def unregister(self, name: str) -> None:
        """Forget a plugin."""
        if self._manager.has_plugin(name):
            self._manager.unregister(name=name)
        self._plugins.pop(name, None)

    def plugins(self) -> list[Plugin]:
        """All plugins, the refused ones with their ``error``, in order of name."""
        return [self._plugins[name] for name in sorted(self._plugins)]

    def names(self) -> list[str]:
        """The names of the plugins that are loaded."""
        return [plugin.name for plugin in self.plugins() if plugin.error is None]

    def ask(self, name: str, hook: str, **arguments: Any) -> Any:
        """One plugin's answer to one hook, None where it does not implement it; ``dense`` of ``to_dae`` may be left out.

        Raises `PluginError` for an unknown or refused plugin, or when the implementation itself fails.
        """
        plugin = self._plugins.get(name)
        if plugin is None or plugin.error is not None:
            reason = "it is not installed" if plugin is None else plugin.error or ""
            raise PluginError(name, f"{reason}. Loaded plugins: {', '.join(self.names()) or 'none'}.")
        others = [p for other, p in self._manager.list_name_plugin() if other != name and p is not None]
        caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
        if hook == "to_dae":
            arguments.setdefault("dense", False)
        try:
            answers = caller(**arguments)
        except LipconvertError:
            raise
        except Exception as error:  # a stranger's code: name it, keep the cause
            raise PluginError(name, f"{hook} failed with {type(error).__name__}: {error}") from error
        return answers[0] if answers else None

    def _claim(self, hook: str, plugin: str | None, path: str, **arguments: Any) -> tuple[str, Any] | None:
        if plugin is not None and (answer := self.ask(plugin, hook, **arguments)) is not None:
            return plugin, answer
        claims = [(name, answer) for name in self.names() if (answer := self.ask(name, hook, **arguments)) is not None]
        if len(claims) > 1:
            raise AmbiguousModelError(path, [name for name, _ in claims])
        return claims[0] if claims else None

    def to_dae(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...] | None = None,
        plugin: str | None = None,
        path: str = "",
        dense: bool = False,
    ) -> tuple[str, DAE] | None:
        """(plugin, DAE) of the one plugin that claims a module, None if none does; ``plugin`` has the first word.

        Raises `AmbiguousModelError` for two claims, `PluginError` for an answer that is neither a DAE nor (W, U, G, Λ).
        """
        claim = self._claim("to_dae", plugin, path, model=model, input_shape=input_shape, dense=dense)
        if claim is None:
            return None
        name, answer = claim
        if isinstance(answer, DAE):
            return name, answer
        if isinstance(answer, tuple) and len(answer) == 4:
            return name, DAE(*answer, name=path or type(model).__name__)
        raise PluginError(name, f"to_dae must return a DAE or a tuple (W, U, G, Lambda), not {type(answer).__name__}")

    def glue_lipschitz(self, module: nn.Module, plugin: str | None = None, path: str = "") -> float | None:
        """The Lipschitz bound of a module a plugin keeps as it is, None if no plugin knows it."""
        claim = self._claim("glue_lipschitz", plugin, path, module=module)
        return None if claim is None else float(claim[1])

    def nonlinear_states(
        self, model: nn.Module, input_shape: tuple[int, ...], plugin: str | None = None, path: str = ""
    ) -> int | None:
        """The states with another σ than the identity that a plugin's layer or model has, None if no plugin says so."""
        claim = self._claim("nonlinear_states", plugin, path, model=model, input_shape=input_shape)
        return None if claim is None else int(claim[1])

    def glue_rounding(
        self, module: nn.Module, input_shape: tuple[int, ...], plugin: str | None = None, path: str = ""
    ) -> tuple[float, float] | None:
        """(a, b) of a module a plugin keeps as it is: it errs by at most u(a + b‖x‖₂); None if no plugin says so.

        Raises `PluginError` for an answer that is not two finite numbers, neither below 0.
        """
        claim = self._claim("glue_rounding", plugin, path, module=module, input_shape=input_shape)
        if claim is None:
            return None
        name, answer = claim
        try:
            a, b = map(float, answer)
        except (TypeError, ValueError, OverflowError):
            a = b = math.nan
        if not (0.0 <= a < math.inf and 0.0 <= b < math.inf):
            raise PluginError(name, f"glue_rounding must return (a, b), finite and not negative, not {answer!r}")
        return a, b

    def from_state_dict(
        self, state_dict: Mapping[str, Tensor], options: Mapping[str, Any], plugin: str | None = None, path: str = ""
    ) -> tuple[str, nn.Module]:
        """(plugin, model) of the one plugin that recognises these weights.

        Raises `WeightsError` when none does, `AmbiguousModelError` for two, `MissingOptionError` from the plugin, and
        `InvalidParameterError` for an option that the plugin never looked at: a misspelt one must not be ignored.
        """
        asked_for = _Options(options)
        claim = self._claim("from_state_dict", plugin, path, state_dict=state_dict, options=asked_for)
        if claim is None:
            keys = ", ".join(list(state_dict)[:6])
            asked = plugin or ", ".join(self.names())
            raise WeightsError(path, f"no plugin recognises these weights (keys: {keys}, ...; asked: {asked})")
        unknown = sorted(set(options) - asked_for.seen)
        if unknown:
            known = ", ".join(sorted(asked_for.seen)) or "none"
            raise InvalidParameterError(
                f"option {unknown[0]!r}", options[unknown[0]], f"{claim[0]} weights take: {known}"
            )
        return claim

    def example_models(self, name: str, seed: int) -> Sequence[nn.Module]:
        """The example models of one plugin (empty where it has none)."""
        return self.ask(name, "example_models", seed=seed) or ()

    def new_model(
        self, name: str, inputs: int, classes: int, seed: int, image: tuple[int, int, int] | None = None
    ) -> nn.Module | None:
        """An untrained classifier of one plugin's architecture, convolutional with an image; None where it offers none."""
        model = self.ask(name, "new_model", inputs=inputs, classes=classes, seed=seed, image=image)
        # a plugin that does not look at ``image`` answers with a flat model
        return None if image is not None and getattr(model, "input_shape", None) != image else model


def required_option(
    options: Mapping[str, Any], name: str, plugin: str, meaning: str, kind: Callable[[Any], Any] | None = None
) -> Any:
    """The value of an option that the weights themselves do not say, read by ``kind`` (``float``, ...).

    Raises `MissingOptionError` when it is not given, `InvalidParameterError` when ``kind`` cannot read it.
    """
    try:
        value = options[name]
    except KeyError:
        raise MissingOptionError(plugin, name, meaning) from None
    try:
        return value if kind is None else kind(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidParameterError(f"option {name!r}", repr(value), f"it must be the {meaning}") from None


class _Options(Mapping[str, Any]):
    """Options that remember which of them were asked for."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options, self.seen = options, set[str]()

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)  # also on the way to a KeyError: the plugin knows the option
        return self._options[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)


def _is_text(info: object) -> bool:
    return isinstance(info, PluginInfo) and all(isinstance(said, str) for said in vars(info).values())


def _source(entry: EntryPoint) -> tuple[str, str]:
    return (entry.dist.name, entry.dist.version) if entry.dist is not None else ("unknown", "")


@cache
def registry() -> Registry:
    """The registry of this process, discovered at first use."""
    return Registry.discover()


def plugins() -> list[Plugin]:
    """What is registered, from which distribution and version; refused plugins carry their ``error``."""
    return registry().plugins()
