"""Models by name: ``package.module:factory``, imported and called, with errors that say whose code failed and where."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import LipconvertError, ModelError


def build(spec: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Import ``package.module``, from the current folder too, and call ``factory(**arguments)``.

    What that code prints goes to stderr. Raises `ModelError` for whatever goes wrong in it, but its own `LipconvertError`.
    """
    module_name, colon, path = spec.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise ModelError(spec, "it does not read package.module:factory")
    with redirect_stdout(sys.stderr):
        return _called(spec, module_name, path, dict(arguments or {}))


def _called(spec: str, module_name: str, path: str, arguments: dict[str, Any]) -> nn.Module:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            reason = f"there is no module {error.name!r}, neither installed nor in {here}"
        else:
            reason = f"importing {module_name} failed: {error}"
        raise ModelError(spec, reason) from error
    except (Exception, SystemExit) as error:  # whatever the user's import raises
        raise ModelError(spec, f"importing {module_name} failed with {_named(error)}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            own = (n for n, v in vars(found).items() if getattr(v, "__module__", None) == module_name)
            defined = ", ".join([n for n in own if not n.startswith("_")][:8])
            where = getattr(found, "__name__", path)
            raise ModelError(spec, f"{where} has no {name!r}" + (f"; it has {defined}" if defined else ""))
        found = getattr(found, name)
    if isinstance(found, nn.Module) and not arguments:
        return found
    if not callable(found) or isinstance(found, nn.Module):
        raise ModelError(spec, f"{path} is of type {type(found).__name__}, not a function that returns the model")
    try:
        model = found(**arguments)
    except LipconvertError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's factory raises
        shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ModelError(spec, f"{path}({shown}) failed with {_named(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(spec, f"{path}() returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _named(error: BaseException) -> str:
    """Type, message, and the last line of the user's code it came through."""
    trace, line = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if trace.tb_frame.f_globals.get("__name__") != __name__ and not file.startswith("<frozen"):
            line = f" ({file}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}{line}"
