"""What a module computes is what its class says: what stands in the way of that is found, and refused by name.

A conversion, a certificate, an attack and a file speak of classes: of what ``nn.ReLU``, `lipconvert.LBEN` or a plugin's layer
compute from their values. ``module(x)`` may be something else. It is with hooks, on the module or on all modules; with a
compiled call; with a method set on the instance; with a method of the class replaced after it was defined; with an attribute
in front of a parameter. `require_source` refuses them in a model that is to be converted, `require_own` in a converted
network. One walk costs a few microseconds for each module, so certificates repeat it before every batch.

Backward hooks are refused too: the value stays, but attacks and training follow the gradient. Not seen is what replaces the
functions below the modules (``torch.nn.functional.relu = ...``): with them nothing at all could be said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple, TypeGuard, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from ..errors import ModifiedModuleError, UnsupportedModuleError

HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}

UNHOOK = (
    "Remove hooks first (handle.remove(), torch.nn.utils.prune.remove); for spectral_norm and weight_norm use the functions "
    "of torch.nn.utils.parametrizations, which need none."
)
UNCOMPILE = "Take a copy, copy.deepcopy(module), which has no compiled call."
RESTORE = "Restore what its class says; a function of its own is a class of its own, and a plugin's to describe."

# By these a call finds ``forward``; nobody else's are taken.
_CALL = ("__call__", "_wrapped_call_impl", "_call_impl", "_slow_forward", "__getattribute__")

# What says nothing about the function a module computes.
_EXEMPT = frozenset(
    {*dir(type)}
    | {
        "__constants__",
        "__getstate__",
        "__orig_bases__",
        "__parameters__",
        "__repr__",
        "__setstate__",
        "__slotnames__",
        "__static_attributes__",
        "extra_repr",
        "reset_parameters",
    }
) - {"__call__", "__getattribute__", "__setattr__", "__delattr__", "__eq__", "__hash__"}

K = TypeVar("K", bound=type[nn.Module])
M = TypeVar("M", bound=nn.Module)


class Change(NamedTuple):
    """Why a module does not compute what its class says: where it is, what was found there, and what to do."""

    path: str
    module: nn.Module
    found: str
    remedy: str


def _raw(kind: type, name: str) -> object:
    """An attribute of a class as it stands in the class that has it: functions and properties themselves."""
    for base in kind.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return None


@dataclasses.dataclass(frozen=True)
class _Record:
    """A class as it was defined: ``members`` that its function rests on, ``names`` of all, and the attributes of an instance
    that its function does not depend on (``aside``). ``whole``: a subclass is taken for it, so it must not replace any."""

    members: Mapping[str, object]
    names: frozenset[str]
    aside: frozenset[str] = frozenset()
    own: bool = True
    whole: bool = False


_RECORDS: dict[type[nn.Module], _Record] = {}
_MODULE = {name: _raw(nn.Module, name) for name in (*_CALL, "__getattr__")}
_TORCH = frozenset(vars(nn.Module()))  # what torch itself keeps in every module

# torch's own, with what their ``forward`` calls of themselves.
_FORWARD: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Sequential: ("forward", "__iter__"),
    nn.ModuleList: ("__iter__",),
    nn.Conv2d: ("forward", "_conv_forward"),
    **dict.fromkeys(
        (nn.Linear, nn.Identity, nn.Flatten, nn.Unflatten, nn.AvgPool2d, nn.PixelShuffle, nn.PixelUnshuffle),
        ("forward",),
    ),
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU), ("forward",)),
    **dict.fromkeys((nn.Softplus, nn.Tanh, nn.Sigmoid), ("forward",)),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), ("forward",)),
    **dict.fromkeys((nn.AlphaDropout, nn.FeatureAlphaDropout), ("forward",)),
}
for _kind, _names in _FORWARD.items():
    _RECORDS[_kind] = _Record({n: _raw(_kind, n) for n in _names}, frozenset(_kind.__dict__), own=False)

# In eval mode the identity, whatever their other attributes.
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def recorded(*aside: str, whole: bool = False) -> Callable[[K], K]:
    """A class decorator: remember the class as it is defined, to see what is replaced of it later; see `_Record`."""

    def remember(kind: K) -> K:
        members = {name: value for name, value in kind.__dict__.items() if name not in _EXEMPT}
        _RECORDS[kind] = _Record(members, frozenset(kind.__dict__), frozenset(aside), whole=whole)
        return kind

    return remember


def computes_as(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether a module is of a kind and computes with that kind's own ``forward``: a subclass may have another one.

    What a plugin asks before it claims a layer. Overriding a constraint (the T of a residual layer) is no obstacle; hooks,
    and whatever else `require_source` refuses on this module, are.
    """
    if not isinstance(module, kind):
        return False
    record = _RECORDS.get(kind)
    members = {"forward": _raw(kind, "forward")} if record is None else record.members
    members = {**members, "__getattr__": _raw(kind, "__getattr__")}
    return (
        all(_raw(type(module), name) is member for name, member in members.items())
        and _of_class(type(module), False) is None
        and _of_instance(module, False) is None
    )


def require_source(model: nn.Module) -> None:
    """Raise `UnsupportedModuleError` where a module of a model to be converted does not compute what its class says."""
    if (change := _first(model, "", own=False)) is not None:
        path, module, found, remedy = change
        raise UnsupportedModuleError(
            path, type(module).__name__, f"{found}, so it is not what its class says. {remedy}"
        )


def require_own(net: nn.Module, where: str = "") -> None:
    """Raise `ModifiedModuleError` where a module of a converted network does not compute what its class says.

    Here subclasses of `Network` and `LBEN` are held to their methods, tensors to torch's own types, and glue to eval mode.
    ``where``: what the module is called, where it is not the network.
    """
    if (change := _first(net, where, own=True)) is not None:
        raise ModifiedModuleError(change.path, type(change.module).__name__, change.found, change.remedy)


def _first(tree: nn.Module, path: str, own: bool) -> Change | None:
    for table, hook in HOOKS.items():
        if hooks := getattr(torch_module, f"_global{table}"):
            return Change(
                path, tree, f"a global {hook} ({_name(next(iter(hooks.values())))}) is on every module", UNHOOK
            )
    classes: dict[type, tuple[str, str] | None] = {}
    for place, module in _walk(tree, path):
        kind = type(module)
        if kind not in classes:
            classes[kind] = _of_class(kind, own)
        if (found := _of_instance(module, own) or classes[kind]) is not None:
            return Change(place, module, *found)
    return None


def _walk(tree: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules with their paths, from where torch keeps them: nothing is called that may have been replaced."""
    pending, seen = [(path, tree)], {id(tree)}
    while pending:
        place, module = pending.pop()
        yield place, module
        children = vars(module).get("_modules") or {}
        for name, child in reversed(list(children.items())):
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                pending.append((f"{place}.{name}" if place else name, child))


def _of_class(kind: type[nn.Module], own: bool) -> tuple[str, str] | None:
    """What was found in the class of a module, and the remedy."""
    for name in _CALL:
        if _raw(kind, name) is not _MODULE[name]:
            return f"its class has a {name} of its own", RESTORE
    if kind._compiled_call_impl is not None:
        return "its class has a compiled call", RESTORE
    for base in kind.__mro__:
        record = _RECORDS.get(base)
        if record is None:
            continue
        if _raw(kind, "__getattr__") is not _MODULE["__getattr__"]:
            return "its class has a __getattr__ of its own", RESTORE
        for name, member in record.members.items():
            if _raw(base, name) is not member:
                return f"{base.__name__}.{name} is not the one that was defined with its class", RESTORE
            if own and record.whole and kind is not base and _raw(kind, name) is not member:
                return f"its class, a subclass of {base.__name__}, has a {name} of its own", RESTORE
            if not record.own and _foreign(member):
                return f"{base.__name__}.{name} had been replaced before lipconvert was imported", RESTORE
        for name in base.__dict__.keys() - record.names - _EXEMPT:
            value = base.__dict__[name]
            if hasattr(type(value), "__set__") or (record.own and (callable(value) or hasattr(value, "__get__"))):
                return f"{base.__name__}.{name} was added after its class was defined", RESTORE
    return None


def _foreign(member: object) -> bool:
    """Whether a method of one of torch's modules was not written there."""
    written = getattr(member, "__globals__", {}).get("__name__", "")
    return not str(written).startswith("torch.nn.modules.")


def _of_instance(module: nn.Module, own: bool) -> tuple[str, str] | None:
    """What was found on a module itself, and the remedy."""
    attributes, kind = vars(module), type(module)
    record = _RECORDS.get(kind) or next(
        (_RECORDS[b] for b in kind.__mro__ if b in _RECORDS and _RECORDS[b].whole), None
    )
    for table in ("_parameters", "_buffers", "_modules"):
        for name, value in (attributes.get(table) or {}).items():
            if is_lazy(value):
                return f"the size of its {name} is not known yet", "Run one batch through the model first."
            if name in attributes or hasattr(kind, name):
                return f"an attribute stands in front of its {name}", RESTORE
            if own and record is not None and isinstance(value, Tensor) and type(value) not in (nn.Parameter, Tensor):
                return f"its {name} is a {type(value).__name__}, which may compute as it likes", RESTORE
    for table, hook in HOOKS.items():
        if hooks := attributes.get(table):
            return f"a {hook} ({_name(next(iter(hooks.values())))}) changes what a call of it computes", UNHOOK
    if attributes.get("_compiled_call_impl") is not None:
        return "it is compiled (module.compile()): what runs is the compiler's", UNCOMPILE
    for name in attributes.keys() & _standing(kind):
        return f"its {name} was set on this one module ({_name(attributes[name])})", RESTORE
    if own and attributes.get("training") and (record is None or kind in DROPOUT):
        return "it is in training mode, where glue may compute anything", "Call net.eval()."
    return None


_STANDING: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()


def _standing(kind: type[nn.Module]) -> frozenset[str]:
    """The names of a class that an attribute of an instance must not hide: methods, and all that the core's own say."""
    if kind not in _STANDING:
        names = set()
        for base in kind.__mro__[:-1]:
            for name, value in base.__dict__.items():
                code = (callable(value) or hasattr(value, "__get__")) and not isinstance(value, cached_property)
                plain = base in _RECORDS and _RECORDS[base].own
                if (code or plain) and not hasattr(type(value), "__set__") and not name.startswith("__"):
                    names.add(name)
        _STANDING[kind] = frozenset(names - {"_compiled_call_impl"})
    return _STANDING[kind]


def _name(function: object) -> str:
    kind = type(function)
    return str(getattr(function, "__qualname__", f"a {kind.__module__}.{kind.__qualname__}"))


def settings(tree: nn.Module, *, copy: bool = False) -> dict[str, object]:
    """All that the function of a tree of modules depends on, by name: classes with their ``forward``, attributes, tensors.

    Values to be compared by `same`. ``copy``: tensors are copied, so that later writes do not change them. Left out are the
    mode, torch's own attributes and what a class says its function does not depend on.
    """
    found: dict[str, object] = {}
    for path, module in _walk(tree):
        kind, prefix = type(module), f"{path}." if path else ""
        found[f"{prefix}forward"] = (kind, _raw(kind, "forward"))
        aside = _TORCH.union(*(_RECORDS[base].aside for base in kind.__mro__ if base in _RECORDS))
        tables = (vars(module), vars(module)["_parameters"], vars(module)["_buffers"])
        for table in tables:
            for name, value in table.items():
                if table is not tables[0] or name not in aside:
                    found[prefix + name] = frozen(value, copy)
    return found


def unshown(tree: nn.Module) -> list[tuple[str, str]]:
    """The numbers and words among the attributes of the core's modules, which ``repr`` need not show, as text by name."""
    found = []
    for path, module in _walk(tree):
        if type(module) in _RECORDS:
            aside = _TORCH | _RECORDS[type(module)].aside
            shown = {k: v for k, v in vars(module).items() if k not in aside and _is_plain(v)}
            found += [(f"{path}.{name}", repr(value)) for name, value in sorted(shown.items())]
    return found


def _is_plain(value: object) -> bool:
    """Numbers, words, nothing, and tuples or lists of them."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def frozen(value: object, copy: bool = False) -> object:
    """A value as `same` compares it: floats bit by bit, containers entry by entry, other objects by identity."""
    match value:
        case Tensor():
            return value.detach().clone() if copy else value.detach()
        case float():
            return ("float", value.hex())
        case complex():
            return ("complex", value.real.hex(), value.imag.hex())
        case list() | tuple():
            return (type(value), *(frozen(entry, copy) for entry in value))
        case Mapping():
            return (type(value), *((frozen(key, copy), frozen(entry, copy)) for key, entry in value.items()))
        case np.ndarray():
            return ("array", str(value.dtype), value.shape, value.tobytes())
        case _:
            return _frozen_object(value, copy)


def _frozen_object(value: Any, copy: bool) -> object:
    kind = type(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
    elif kind.__module__.partition(".")[0] == __name__.partition(".")[0]:
        names = list(vars(value))
    else:
        return value
    return (kind, *((name, frozen(getattr(value, name), copy)) for name in names))


def same(a: object, b: object) -> bool:
    """Whether two values of `frozen` are the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    plain = isinstance(a, bool | int | str | bytes | torch.dtype | torch.device | set | frozenset)
    return a is b or (plain and a == b)
