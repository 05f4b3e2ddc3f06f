"""Whether a conversion fits into memory: said from shapes alone, before anything of its size is made.

A stage with n states holds W, V and S of n × n numbers, on images for each of F frequencies. A conversion has several of them
at a time, and of composed layers the states add up: what ends with a machine that is out of memory began in a second.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from ..dae.activations import MaxMin, is_activation
from ..dae.dae import DAE
from ..errors import InsufficientMemoryError, LipconvertError
from ..foundation.integrity import DROPOUT, require_source
from ..linalg.spectrum import Grid
from ..networks.glue import core_lipschitz
from ..plugin_api.registry import registry

# Matrices of n × n (× F) that exist at a time while a stage is composed and constructed, with its validation too, and that
# stay: the least met in chains of SLL, CPL, AOL and linear layers, dense and on images, where the most are 24, 34 and 5.
WORKING, VALIDATING, KEPT = 7.0, 13.0, 3.5


@dataclass(frozen=True)
class StageSize:
    """What becomes one stage: its layers in words, the least number n of states, and the grid they live on."""

    name: str
    states: int
    grid: Grid

    @property
    def matrix(self) -> int:
        """Bytes of one n × n matrix, float64 or, for each frequency, complex128."""
        return self.states**2 * (16 * self.grid.batch[0] if self.grid else 8)


def available() -> int:
    """Bytes that this process may still take: of the machine, and of the control group it runs in, where there is one."""
    free = int(psutil.virtual_memory().available)
    try:
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().rsplit(":", 1)[-1].strip().lstrip("/")
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:  # no Linux, no such group, no limit that can be read
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - int(used)))


def require_memory(sizes: list[StageSize], check: bool = False) -> None:
    """Raise `InsufficientMemoryError` where stages of these sizes cannot be converted one after the other.

    ``check``: whether they are validated as well.
    """
    kept = 0.0
    for size in sizes:
        needed = kept + (VALIDATING if check else WORKING) * size.matrix
        if needed > 2**28 and needed > (free := available()):
            raise InsufficientMemoryError(size.name, size.states, size.grid.image, needed, free)
        kept += KEPT * size.matrix


def size_of(daes: list[DAE], name: str) -> StageSize:
    """The least size of a stage that these DAEs are composed to: identity rows may be eliminated, others not."""
    states = sum(count for dae in daes for activation, count in dae.sigma if activation.name != "identity")
    return StageSize(name, states, daes[-1].grid)


def sizes_of(model: nn.Module, input_shape: tuple[int, ...], plugin: str | None, dense: bool) -> list[StageSize]:
    """The stages of a model as far as shapes tell: layers whose plugin knows its ``nonlinear_states``, and activations.

    Shapes are found by running modules without numbers (torch's meta device); at a module that cannot run so the list ends.
    """
    found: list[StageSize] = []
    apart = True  # glue stands between what was found last and what follows
    try:
        require_source(model)
        model = copy.deepcopy(model).to("meta").eval()
        for path, module, states, shape in _layers(model, input_shape, "", plugin):
            if states is None:
                apart = True
                continue
            grid = Grid(shape[1:] if len(shape) == 3 and not dense else ())
            states *= math.prod(shape[1:]) if dense else 1
            if found and not apart and found[-1].grid == grid:
                first = found.pop()
                found.append(StageSize(f"{first.name.split(' to ')[0]} to {path}", first.states + states, grid))
            else:
                found.append(StageSize(path or type(module).__name__, states, grid))
            apart = False
    except (LipconvertError, ArithmeticError, NotImplementedError, RuntimeError, TypeError, ValueError, IndexError):
        pass  # whoever converts it says what is wrong; what was found before counts
    return found


def _layers(
    module: nn.Module, shape: tuple[int, ...], path: str, plugin: str | None
) -> Iterator[tuple[str, nn.Module, int | None, tuple[int, ...]]]:
    """(path, module, nonlinear states or None for glue, shape of one output) of what a conversion meets, in order."""
    claim = registry().nonlinear_states(module, shape, plugin, path)
    if claim is None and type(module) is nn.Sequential:
        for key, child in module._modules.items():
            if child is not None:
                for layer in _layers(child, shape, f"{path}.{key}" if path else key, plugin):
                    yield layer
                    shape = layer[3]
        return
    if type(module) in DROPOUT:
        return
    try:
        shape = tuple(module(torch.empty(1, *shape, device="meta", dtype=_dtype(module))).shape[1:])
    except RuntimeError:  # an equilibrium looks at its numbers
        if claim is not None:
            yield path, module, claim, shape
        raise
    if claim is None and is_activation(module):
        claim = shape[0]
    elif claim is None and type(module) is MaxMin:
        claim = shape[0] // 2
    elif claim is None and core_lipschitz(module) is None:
        claim = 0  # a layer of which nothing is known, or one that is affine
    yield path, module, claim, shape


def _dtype(module: nn.Module) -> torch.dtype:
    return next((t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), torch.float64)
