"""Fine-tune a converted network, or train a source network, with its Lipschitz constant proved after every epoch.

A network of LBEN stages keeps L whatever its optimiser does (`networks.lben`), so all it takes is Adam, or Muon, and a
margin loss. Source networks are trained by the same loop, and converted after every epoch to see what is proved of them.

Everything random is a function of the seed and the step: the order of an epoch, and the numbers of each augmentation. So the
state of a run is its weights, its optimiser and its step, and a run that is killed goes on bit for bit where it was saved.
"""

from __future__ import annotations

import copy
import csv
import io
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from ..certification.certify import Certifier
from ..conversion.convert import convert
from ..conversion.trace import trace
from ..dae.conditions import H_matrix, H_scale, unit_gauge
from ..data import Images, Shaped
from ..equilibria.equilibrium import SolverOptions
from ..errors import (
    InvalidParameterError,
    LipconvertError,
    NotFiniteError,
    NotPSDError,
    ShapeError,
    WeightsError,
)
from ..foundation.arguments import class_labels, default_dtype, isolated, make_ordinary, plain_tensor
from ..foundation.files import alone, whole
from ..foundation.integrity import require_own
from ..foundation.shards import fingerprint, over
from ..linalg.spectrum import least_eigenvalue, require_finite_samples, roundoff
from ..networks.documents import TrainingSummary
from ..networks.lben import LBEN
from ..networks.network import Network
from ..plugin_api.weights import opened
from ..reports.plotting import radius_name
from .augment import Augmentation
from .curves import plot_training
from .documents import EpochRecord, FinetuneReport, ScheduleConfig, TrainingConfig

# Of H(Ψ⁻¹, L) = 2V′V + 2εI in the gauge Ψ = I, in float64; more is allowed only where the round-off of its terms is more.
LEAST_EIGENVALUE = -1e-8

# Files of a run in its folder, and what the state of one has.
STATE, METRICS, REPORT, CURVES = "state.pt", "metrics.csv", "report.json", "curves.png"
STATE_ENTRIES = ("key", "model", "optimizers", "step", "sums", "history", "kept", "weights")

# Kernel entries below this part of the largest are round-off, of the transform or of the floats a network was stored in.
SUPPORT = {torch.float64: 1e-9, torch.float32: 1e-5}

# Below the square of any norm: the root of 0 has no derivative.
TINY = 1e-30

# What a data set may hold.
ARRAYS = (Tensor, np.ndarray)

OnStep = Callable[[int, int, float], object]
"""(step, steps in all, loss)."""
OnEpoch = Callable[[EpochRecord], object]


@isolated
def finetune(
    net: Network,
    train: Any,
    validation: Any = None,
    config: TrainingConfig | None = None,
    *,
    folder: str | Path | None = None,
    save_seconds: float = 60.0,
    model: str = "",
    data: str = "",
    tensorboard: bool = False,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
) -> FinetuneReport:
    """Train a converted network on, in place: its function gets better, its constant L stays, proved after every epoch.

    ``train``, ``validation``: map-style data sets of (input, label) or loaders, held in memory; inputs in [0, 1], in the
    shape of the network or as images (C, H, W) where it is flat. Without ``validation`` the last ``config.held_out``
    samples of a shuffled ``train`` are used (the same ones for a seed), and with none of them the last weights are kept.
    ``config``: see `TrainingConfig`. After every epoch λ_min(H) ≥ −1e-8, or its round-off where that is more, is checked, L
    is proved of the network in float64, and certified accuracy is measured with it (`EpochRecord`). At the end the network
    holds the weights kept, in the precision it was trained in, in ``eval`` mode, on the device it was on.

    ``folder``: keep the state of the run there, saved every ``save_seconds`` and at the end of an epoch, and go on from it
    after a kill: final weights are bitwise those of a run in one go (on one machine, with as many threads and processes).
    Also metrics.csv, report.json, curves.png, and with ``tensorboard`` events. ``on_step`` and ``on_epoch`` are called as it
    goes. Under torchrun, or with ``config.devices`` > 1, processes take equal shares of every batch: the same but for the
    order of sums, of which Muon, in bfloat16, makes differences of a thousandth of a step.

    Raises `NotFiniteError` when the loss or the weights are no longer finite (naming the step), `NotConvergedError` from an
    equilibrium, `NotPSDError` and `NoCertificateError` when the constant is lost, `InvalidParameterError` for a
    configuration that does not fit, or a folder of another run, `ShapeError` for data that do not fit, and
    `ModifiedModuleError` for hooks and the like: use ``on_step`` and ``on_epoch``, or hooks of parameters, to look on.
    """
    if not isinstance(net, Network):
        hint = "only a converted network is fine-tuned: lipconvert.convert(model). lipconvert.train takes source models"
        raise InvalidParameterError("net", type(net).__name__, hint)
    require_own(net)
    about = _About(model, data, net.input_shape, folder, save_seconds, tensorboard, on_step, on_epoch)
    return _fit(net, lambda: net, train, validation, config, about)


@isolated
def train(
    model: nn.Module,
    train: Any,
    validation: Any = None,
    config: TrainingConfig | None = None,
    *,
    input_shape: Iterable[int] | None = None,
    plugin: str | None = None,
    folder: str | Path | None = None,
    save_seconds: float = 60.0,
    name: str = "",
    data: str = "",
    tensorboard: bool = False,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
) -> FinetuneReport:
    """Train a source network of a registered architecture, in place, with the loop of `finetune`.

    After every epoch it is converted, to prove its constant and to measure certified accuracy. ``input_shape``, ``plugin``:
    as for `convert`. The rest, and what is raised, is as for `finetune`; ``name`` is its ``model``.
    """
    samples = Samples.of(train, "the training data")
    shape = input_shape_of(model, samples.shape, plugin) if input_shape is None else tuple(input_shape)

    def converted() -> Network:
        return convert(model, shape, plugin=plugin, check=False)

    about = _About(name, data, converted().input_shape, folder, save_seconds, tensorboard, on_step, on_epoch)
    return _fit(model, converted, samples, validation, config, about)


def input_shape_of(model: nn.Module, sample: Sequence[int], plugin: str | None = None) -> tuple[int, ...] | None:
    """The shape to convert a model with that is trained on ``sample``s of a shape: None where it says its own.

    Else the samples' shape, or that of flattened ones, whichever it takes.
    """
    if getattr(model, "input_shape", None) is not None:
        return None
    for shape in (tuple(sample), (math.prod(sample),)):
        try:
            trace(model, shape, plugin)
        except ShapeError:  # it takes the other one, or neither: conversion says so
            continue
        return shape
    return tuple(sample)


def margin_loss(logits: Tensor, labels: Tensor, margin: float, temperature: float, reduction: str = "mean") -> Tensor:
    """CE((y − margin·onehot)/T, labels)·T: asks for the label to lead by ``margin``, smoothly in T. (B, q), (B,) → ()"""
    shifted = logits - margin * functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return functional.cross_entropy(shifted / temperature, labels, reduction=reduction) * temperature


def schedule_factor(schedule: ScheduleConfig, step: int, total: int) -> float:
    """The learning rate of a step 0..total − 1 as a part of its peak. (`ScheduleConfig`)"""
    part, up = (step + 0.5) / total, schedule.warm_up  # in the middle of the step: never 0
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "triangular":
        corners = ((0.0, 0.0), (0.4, 1.0), (0.8, 0.05), (1.0, 0.0))
        for (a, low), (b, high) in pairwise(corners):
            if part <= b:
                return low + (high - low) * (part - a) / (b - a)
    share = part / up if part < up else (1.0 - part) / (1.0 - up)
    return share if schedule.kind == "linear" else 0.5 * (1.0 - math.cos(math.pi * share))


class Samples:
    """A data set in memory: inputs as they are stored, labels, and one batch of them as floats.

    ``x`` (N, ...) of any dtype, divided by ``top``; ``labels`` (N,).
    """

    def __init__(self, x: Tensor, labels: Tensor, top: float) -> None:
        self.x, self.labels, self.top = x, labels, top

    @classmethod
    def of(cls, data: Any, where: str) -> Samples:
        """Of a map-style data set of (input, label), of the batches of a loader, or of a pair of tensors.

        Raises `InvalidParameterError` for what is none of them, or empty, and for labels that are no integers, `ShapeError`
        for samples of several shapes, `NotFiniteError` for inputs with NaN or infinity.
        """
        if isinstance(data, Samples):
            return data
        if isinstance(data, Shaped):
            data = data.images.first(len(data))
        if isinstance(data, Images):
            return cls(data.pixels, data.labels, data.top)
        x, labels = cls._tensors(data, where)
        x, labels = x.detach(), labels.detach()
        if x.dim() == 0:
            raise ShapeError(f"the inputs of {where}", "(B, ...)", ())
        if len(x) == 0:
            raise InvalidParameterError(where, "empty", "at least one sample is needed")
        if not x.is_floating_point():
            raise InvalidParameterError(
                f"the inputs of {where}", x.dtype, "pixels must be floats (in [0, 1], not 0..255)"
            )
        if (
            labels.dtype == torch.bool
            or labels.is_floating_point()
            or labels.is_complex()
            or labels.dim() != 1
            or len(labels) != len(x)
        ):
            shape = f"{labels.dtype} {tuple(labels.shape)}"
            raise InvalidParameterError(f"the labels of {where}", shape, f"they must be ({len(x)},) integers")
        require_finite_samples(x, f"the inputs of {where}")
        return cls(x, labels.long(), 1.0)

    @staticmethod
    def _tensors(data: Any, where: str) -> tuple[Tensor, Tensor]:
        """Inputs and labels of a data set or a loader, each in one tensor."""
        kinds = "it must be a data set or loader of (input, label), or a pair of tensors (inputs, labels)"
        if type(data) is TensorDataset:
            data = data.tensors
        if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, ARRAYS) for part in data):
            return plain_tensor(data[0], f"the inputs of {where}"), plain_tensor(data[1], f"the labels of {where}")
        loader = isinstance(data, DataLoader)
        if not loader and (
            isinstance(data, str | Mapping) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__"))
        ):
            raise InvalidParameterError(where, type(data).__name__, kinds)
        given = list(data) if loader else [data[k] for k in range(len(data))]
        inputs, labels = [], []
        for k, pair in enumerate(given):
            what = f"{'batch' if loader else 'sample'} {k} of {where}"
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise InvalidParameterError(what, type(pair).__name__, kinds)
            x, label = pair
            if not isinstance(x, ARRAYS):
                reason = "its input must be a tensor; torchvision.transforms.ToTensor makes one of an image"
                raise InvalidParameterError(what, type(x).__name__, reason)
            if not isinstance(label, (*ARRAYS, int, np.integer)):
                raise InvalidParameterError(what, type(label).__name__, "its label must be an integer")
            x = plain_tensor(x, f"the input of {what}").detach()
            label = plain_tensor(np.asarray(label) if isinstance(label, int) else label, f"the label of {what}")
            inputs.append(x if loader else x.unsqueeze(0))
            labels.append(label if loader else label.reshape(1))
            if inputs[-1].dim() == 0 or labels[-1].dim() == 0 or len(inputs[-1]) != len(labels[-1]):
                raise ShapeError(what, "(B, ...) and (B,)", f"{tuple(x.shape)} and {tuple(label.shape)}")
            if inputs[-1].shape[1:] != inputs[0].shape[1:]:
                raise ShapeError(
                    what, tuple(inputs[0].shape[1:]), tuple(inputs[-1].shape[1:]), "All must have one shape."
                )
        if not given:
            raise InvalidParameterError(where, "empty", "at least one sample is needed")
        return torch.cat(inputs), torch.cat(labels)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.x.shape[1:])

    def to(self, device: torch.device) -> Samples:
        """The same, on a device."""
        return Samples(self.x.to(device), self.labels.to(device), self.top)

    def fingerprint(self) -> str:
        """What tells them from others."""
        return fingerprint(self.x, self.labels, top=self.top)

    def part(self, rows: Tensor | slice) -> Samples:
        """Some of them."""
        return Samples(self.x[rows], self.labels[rows], self.top)

    def batch(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(inputs (B, ...) in [0, 1], labels (B,))."""
        rows = rows.to(self.labels.device)
        x = self.x[rows].to(dtype)
        return (x if self.top == 1.0 else x / self.top), self.labels[rows]

    def dataset(self, shape: Sequence[int], dtype: torch.dtype) -> TensorDataset:
        """All of them in the shape a network takes; raises `ShapeError` where they have not as many entries."""
        if math.prod(shape) != math.prod(self.shape):
            raise ShapeError("a sample of the data", tuple(shape), self.shape)
        x, labels = self.batch(torch.arange(len(self)), dtype)
        return TensorDataset(x.reshape(-1, *shape), labels)


@dataclass(frozen=True)
class _About:
    """What a run is told besides its data and its configuration."""

    model: str
    data: str
    input_shape: tuple[int, ...]
    folder: str | Path | None
    save_seconds: float
    tensorboard: bool
    on_step: OnStep | None
    on_epoch: OnEpoch | None

    def __post_init__(self) -> None:
        for label, value in (("the label of the model", self.model), ("data", self.data)):
            if not isinstance(value, str):
                reason = "it is a word for the report; what to train on is train and validation"
                raise InvalidParameterError(label, type(value).__name__, reason)


def _fit(
    model: nn.Module,
    converted: Callable[[], Network],
    train: Any,
    validation: Any,
    config: TrainingConfig | None,
    about: _About,
) -> FinetuneReport:
    if config is None:
        config = TrainingConfig()
    elif not isinstance(config, TrainingConfig):
        raise InvalidParameterError("config", type(config).__name__, "it must be a TrainingConfig(...)")
    make_ordinary(model)
    samples, held = _split(train, validation, config, about.input_shape)
    fabric = _fabric(config, about)
    with ExitStack() as stack:
        if about.folder is not None and fabric.global_rank == 0:
            stack.enter_context(alone(about.folder))
        run = _Run(model, converted, samples, held, config, about, fabric)
        with run.prepared():
            run.resume()
            run.go()
        return run.finish()


def _split(
    train: Any, validation: Any, config: TrainingConfig, shape: tuple[int, ...]
) -> tuple[Samples, Samples | None]:
    """Training and validation samples, in shapes the network takes."""
    samples = Samples.of(train, "the training data")
    held = None if validation is None else Samples.of(validation, "the validation data")
    if held is None and config.held_out:
        if config.held_out >= len(samples):
            raise InvalidParameterError(
                "held_out", config.held_out, f"there are {len(samples)} training samples in all"
            )
        order = torch.randperm(len(samples), generator=_generator(config.seed, 0, 0))
        samples, held = samples.part(order[: -config.held_out]), samples.part(order[-config.held_out :])
    if held is not None and config.validation_samples is not None:
        held = held.part(slice(config.validation_samples))
    for part, what in ((samples, "training"), (held, "validation")):
        if part is not None and part.shape != shape and (math.prod(part.shape),) != shape:
            raise ShapeError(f"a sample of the {what} data", shape, part.shape)
    if held is None and config.patience is not None:
        raise InvalidParameterError("patience", config.patience, "there are no validation data to be patient about")
    return samples, held


def _generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """The random numbers of one thing that happens in a run, the same whatever came before it."""
    # Three numbers into one seed: a linear map modulo 2^63 − 25, whose multipliers keep small ones apart.
    number = (seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03 + step * 0x8CB92BA72F3D8DD7) % (2**63 - 25)
    return torch.Generator().manual_seed(number)


def _fabric(config: TrainingConfig, about: _About) -> Any:
    """Lightning's Fabric: devices, processes, precision, loggers."""
    from lightning.fabric import Fabric

    devices, nodes = config.devices, 1
    if config.accelerator == "cuda" and (here := torch.cuda.device_count()) < devices:
        reason = f"{here} CUDA devices are here and devices is {devices}: take accelerator cpu, or fewer"
        raise InvalidParameterError("accelerator", "cuda", reason)
    if devices > 1 and "LOCAL_RANK" not in os.environ and sys.argv[0] in ("", "-c", "-"):
        reason = "every process runs the script anew, and there is no file of it: put it into one"
        raise InvalidParameterError("devices", devices, reason)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started the processes
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    loggers: list[Any] = []
    if about.tensorboard:
        if about.folder is None:
            raise InvalidParameterError("tensorboard", True, "a folder is needed for its files")
        from lightning.fabric.loggers.tensorboard import TensorBoardLogger

        try:
            loggers.append(TensorBoardLogger(about.folder, name="", version="tensorboard"))
        except ModuleNotFoundError as error:
            raise InvalidParameterError(
                "tensorboard", True, "it is not installed: pip install lipconvert[tensorboard]"
            ) from error
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy="ddp" if devices * nodes > 1 else "auto",
        precision=config.precision,
        loggers=loggers,
    )
    fabric.launch()
    return fabric


class _Support:
    """Where the kernels W of a stage on images may be other than 0, and what it costs elsewhere. (paper 4.1)"""

    def __init__(self, stage: LBEN) -> None:
        self.stage = stage
        self.outside = self._absent(stage.grid.kernels(stage.dae().W).to(stage.S.dtype))
        self.outside[:, :, 0, 0] &= ~self._diagonal()  # W − εΨ is there whatever the support

    def _absent(self, K: Tensor) -> Tensor:
        """Where kernels are 0 up to round-off."""
        size = K.detach().abs()
        return size <= SUPPORT[K.dtype] * float(size.amax())

    def _diagonal(self) -> Tensor:
        return torch.eye(len(self.outside), dtype=torch.bool, device=self.outside.device)

    def cost(self, norm: str) -> Tensor:
        """‖W outside‖, 1 or 2, of what is more than round-off, where |w| would have the slope ±1 by chance."""
        W = self.stage.grid.kernels(self.stage.matrices()[0])
        outside = W[self.outside.to(W.device) & ~self._absent(W)]
        return outside.abs().sum() if norm == "l1" else outside.square().sum().clamp(min=TINY).sqrt()

    def frozen(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each of G, U, V, S and the mask of the entries that stay: for V those of I, W and W′, as V′V is symmetric."""
        stage = self.stage
        for parameter in (stage.G, stage.U, stage.S):
            yield parameter, self._absent(parameter)
        flipped = self.outside.transpose(0, 1).flip(2, 3).roll((1, 1), (2, 3))  # the kernels of W′
        outside = self.outside & flipped
        outside[:, :, 0, 0] &= ~self._diagonal()
        yield stage.V, outside


class _Plan:
    """What of a model is trained, decided before anything of it changes: a configuration that does not fit is refused here.

    ``trained``: the stages; ``scaled``: those of them that are put into the gauge Ψ = I, which is only a choice of scale for
    each state where σ is homogeneous, and stay there; ``groups``: parameters by the factor of their learning rate.
    What a caller froze is not moved. Raises `InvalidParameterError`.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self.config = config
        self.stages = [module for module in model.modules() if isinstance(module, LBEN)]
        chosen = config.stages
        self.trained = [stage for k, stage in enumerate(self.stages) if chosen is None or k in chosen]
        self.penalised = config.penalty.weight > 0.0 or config.penalty.freeze
        self._require_stages(model)
        free = [stage for stage in self.trained if all(p.requires_grad for p in stage.parameters())]
        self.scaled = [stage for stage in free if config.balance and stage.scalable]
        if self.scaled and len(self.scaled) == len(self.trained) and config.learning_rates.Psi not in (0.0, 1.0):
            reason = "Ψ stays I where it is only a scale of states: set balance to false to train it"
            raise InvalidParameterError("learning_rates.Psi", config.learning_rates.Psi, reason)
        self.groups = self._groups(model)
        if config.optimizer == "muon" and not self._split(matrices=True):
            raise InvalidParameterError("optimizer", "muon", "no matrix is trained, and it is for matrices alone")

    def _require_stages(self, model: nn.Module) -> None:
        """Options that are about LBEN stages need some."""
        config, default = self.config, TrainingConfig()
        needs = [
            n for n in ("stages", "learning_rates", "epsilon", "roots") if getattr(config, n) != getattr(default, n)
        ]
        if needs and not self.stages:
            raise InvalidParameterError(needs[0], getattr(config, needs[0]), "only a converted network has such stages")
        if config.stages is not None and max(config.stages) >= len(self.stages):
            raise InvalidParameterError("stages", config.stages, f"the network has {len(self.stages)}, from 0")
        if self.penalised and not any(stage.grid for stage in self.trained):
            raise InvalidParameterError("penalty", config.penalty, "no stage that is trained is on images")
        if config.compile and _equilibria(model):
            raise InvalidParameterError(
                "compile", True, "equilibria are solved by loops; only explicit layers gain by it"
            )
        if config.penalty.freeze and config.weight_decay:
            raise InvalidParameterError("weight_decay", config.weight_decay, "it would move what penalty.freeze keeps")

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameters by what stands in their names, each with the factor of its learning rate."""
        names = {"log_psi": "Psi", "G": "G", "U": "U", "V": "V", "S": "S", "b_z": "b", "b_y": "b"}
        of_stage = {id(p): names[n] for stage in self.stages for n, p in stage.named_parameters(recurse=False)}
        chosen = {id(p) for stage in self.trained for p in stage.parameters()}
        balanced = {id(stage.log_psi) for stage in self.scaled}
        found: dict[float, list[nn.Parameter]] = {}
        for parameter in model.parameters():
            group = of_stage.get(id(parameter))
            factor = 1.0 if group is None else getattr(self.config.learning_rates, group) * (id(parameter) in chosen)
            if parameter.requires_grad and factor > 0.0 and id(parameter) not in balanced:
                found.setdefault(factor, []).append(parameter)
        if not found:
            reason = "nothing is left to train" + (": with balance Ψ stays I" if balanced else "")
            raise InvalidParameterError("learning_rates", self.config.learning_rates, reason)
        return [{"params": parameters, "factor": factor} for factor, parameters in found.items()]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam, behind Muon for the matrices where the configuration asks for it.

        Muon: O ≈ the orthogonal factor of Nesterov's momentum, W ← W − 0.2 √max(rows, columns) lr O, as large in rms as a
        step of Adam. Kernels of stages on images are no matrices here, so it mixes no entries that ``penalty.freeze`` keeps.
        """
        config = self.config
        rate, decay = config.learning_rate, config.weight_decay
        found, rest = list[torch.optim.Optimizer](), self.groups
        if config.optimizer == "muon":
            matrices, rest = self._split(matrices=True), self._split(matrices=False)
            found.append(
                torch.optim.Muon(matrices, rate, decay, momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
            )
        if rest:
            found.append(torch.optim.Adam(rest, rate, config.betas, weight_decay=decay, fused=True))
        return found

    def _split(self, *, matrices: bool) -> list[dict[str, Any]]:
        """The groups with matrices alone, or with everything else, without empty ones."""
        split = [
            {**group, "params": [p for p in group["params"] if (p.dim() == 2) == matrices]} for group in self.groups
        ]
        return [group for group in split if group["params"]]


@isolated
def require_fit(net: Network, train: Any, config: TrainingConfig) -> None:
    """Raises what `finetune` would raise of a configuration for a network of these shapes, before anything is trained."""
    samples, _ = _split(train, None, config, net.input_shape)
    Augmentation(config.augment, samples.shape)
    _Plan(net, config)


class _Run:
    """One run: what it needs, and its state, which can be saved between any two steps."""

    def __init__(
        self,
        model: nn.Module,
        converted: Callable[[], Network],
        samples: Samples,
        held: Samples | None,
        config: TrainingConfig,
        about: _About,
        fabric: Any,
    ) -> None:
        self.model, self.converted, self.config, self.about, self.fabric = model, converted, config, about, fabric
        self.rank, self.world, self.device = fabric.global_rank, fabric.world_size, fabric.device
        self.dtype = torch.float64 if config.precision == "64-true" else torch.float32
        if config.batch_size < self.world:
            raise InvalidParameterError("batch_size", config.batch_size, f"there are {self.world} processes")
        self.samples, self.held = samples.to(self.device), held
        self.augmentation = Augmentation(config.augment, samples.shape)
        self.per_epoch = math.ceil(len(samples) / config.batch_size)
        self.total = config.epochs * self.per_epoch
        self.uncompiled: tuple[type[Exception], ...] = ()  # what a failed compilation raises
        self.found: dict[str, Any] | None = None  # a state to go on from
        # The state of the run.
        self.step = 0
        self.sums = {"loss": 0.0, "penalty": 0.0, "seconds": 0.0}
        self.history: list[EpochRecord] = []
        self.kept, self.weights = 0, dict[str, Any]()
        self.saved_at = time.monotonic()

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The model as it is trained: its dtype and device, ε, roots, frozen parameters, loose solves; as before outside."""
        config, model = self.config, self.model
        parts = {"start": fingerprint(model), "training data": self.samples.fingerprint()}
        if self.held is not None:
            parts["validation data"] = self.held.fingerprint()
        self.key = {**config.model_dump(mode="json"), "processes": self.world, **parts}
        self.found = self.find()
        plan = _Plan(model, config)
        # Nothing of the model has been changed so far: what is refused stays as it was. What follows comes before the
        # weights are rounded to the precision they are trained in.
        for stage in plan.scaled:
            stage.balance()
        self.supports = [_Support(stage) for stage in plan.trained if stage.grid] if plan.penalised else []
        frozen = [pair for support in self.supports for pair in support.frozen()] if config.penalty.freeze else []
        model.to(self.dtype)
        with torch.no_grad():
            for k, stage in enumerate(plan.trained):
                if config.epsilon is not None:
                    stage.epsilon = config.epsilon
                if config.roots:
                    kept = next((mask for parameter, mask in frozen if parameter is stage.V), None)
                    _grow_roots(stage, config.roots, _generator(config.seed, 0, 1 + k), kept)
                stage.refresh()
        moving = {id(p) for group in plan.groups for p in group["params"]}
        resting = [p for p in model.parameters() if p.requires_grad and id(p) not in moving]
        with ExitStack() as stack:
            if (device := next((p.device for p in model.parameters()), self.device)) != self.device:
                stack.callback(model.to, device)
            stack.enter_context(loosely_solved(model, config.tolerance))
            for parameter in resting:
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, True)
            for parameter, mask in frozen:
                if parameter.requires_grad:
                    handle = parameter.register_hook(lambda g, m=mask: g.masked_fill(m.to(g.device), 0.0))
                    stack.callback(handle.remove)
            self.optimizers = plan.optimizers()
            # Shapes are fixed but for the last batch of an epoch, which is compiled once more.
            trained = model
            if config.compile:
                from torch._dynamo.exc import TorchDynamoException  # here: it takes a second to import

                trained, self.uncompiled = torch.compile(model, dynamic=False), (TorchDynamoException,)
            self.wrapped, *self.steppers = self.fabric.setup(trained, *self.optimizers)
            yield
            model.eval()

    def go(self) -> None:
        """From where the state is to the end."""
        if not self.history:
            self._close(0)
        self.begun = time.perf_counter()
        while self.step < self.total and not self.stopped:
            epoch, first = divmod(self.step, self.per_epoch)
            generator = _generator(self.config.seed, 1 + epoch, 0)
            order = torch.randperm(len(self.samples), generator=generator).split(self.config.batch_size)
            self.wrapped.train()
            for rows in order[first:]:
                at = self.step
                try:
                    loss = self._step(rows, epoch)
                except LipconvertError as error:
                    error.step = at
                    raise
                except self.uncompiled as error:
                    reason = (
                        f"torch could not compile the network ({str(error).strip().splitlines()[0]}): set it to false"
                    )
                    raise InvalidParameterError("compile", True, reason) from error
                if self.about.on_step is not None and self.rank == 0:
                    self.about.on_step(self.step, self.total, loss)
                if self.step % self.per_epoch and time.monotonic() - self.saved_at >= self.about.save_seconds:
                    self.save()
            self._close(epoch + 1)

    @property
    def stopped(self) -> bool:
        """Whether the patience is at its end."""
        patience = self.config.patience
        return patience is not None and len(self.history) - 1 - self._best() >= patience

    def _best(self) -> int:
        """The epoch of the best mean certified accuracy, of equals that of the best natural one, of equals the first."""
        means = [(sum(record.certified_accuracy), record.natural_accuracy or 0.0) for record in self.history]
        return means.index(max(means))

    def _step(self, rows: Tensor, epoch: int) -> float:
        config = self.config
        draws = self.augmentation.draw(len(rows), _generator(config.seed, 1 + epoch, 1 + self.step))
        share = slice(self.rank, None, self.world)
        mine, weight = rows[share], self.world / len(rows)
        if len(mine) == 0:  # the last batch of an epoch may be smaller than the number of processes
            share, mine, weight = slice(0, 1), rows[:1], 0.0
        x, labels = self.samples.batch(mine, self.dtype)
        x = self.augmentation(x, draws[share])
        rate = config.learning_rate * schedule_factor(config.schedule, self.step, self.total)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            optimizer.zero_grad()
        penalised = self.supports if config.penalty.weight else []
        with ExitStack() as stack:
            for support in penalised:
                stack.enter_context(support.stage.held())
            with default_dtype(self.dtype):  # to which Fabric casts what comes out
                logits = self.wrapped(x.reshape(len(x), *self.about.input_shape))
            logits = logits.to(self.dtype)
            margin = math.sqrt(2.0) * self.history[-1].lipschitz * config.loss.offset
            loss = weight * margin_loss(logits, labels, margin, config.loss.temperature, "sum")
            costs = [config.penalty.weight * support.cost(config.penalty.norm) for support in penalised]
            cost = torch.stack(costs).sum() if costs else loss.new_zeros(())
            self.fabric.backward(loss + cost)
        if config.clip is not None:
            # Of all optimisers together, where Fabric's takes one; no precision here scales gradients.
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        for stepper in self.steppers:
            stepper.step()
        self.step += 1
        value = float(self.fabric.all_reduce(loss.detach(), reduce_op="mean"))
        penalty = float(cost.detach())
        if not math.isfinite(value + penalty):
            raise NotFiniteError(f"the loss, at learning rate {rate:g}", 1, 1)
        self.sums["loss"] += value * len(rows)
        self.sums["penalty"] += penalty * len(rows)
        return value + penalty

    def _close(self, epoch: int) -> None:
        """The end of an epoch (0: before the first): what is proved, what is measured, what is kept."""
        self.sums["seconds"] += time.perf_counter() - self.begun if epoch else 0.0
        self.model.eval()
        for name, parameter in self.model.named_parameters():
            if bad := int((~torch.isfinite(parameter)).sum()):
                raise NotFiniteError(f"{name} after step {self.step}", bad, parameter.numel())
        with loosely_solved(self.model, None):
            net = copy.deepcopy(self.converted()).cpu().double()
        certifier = Certifier(net, "prescribed")
        if not epoch:
            class_labels(self.samples.labels, torch.empty(()).expand(len(self.samples), certifier.classes))
        found = measure(certifier, self.held, self.config)
        count = len(self.samples)
        record = EpochRecord(
            epoch=epoch,
            step=self.step,
            learning_rate=self.config.learning_rate * schedule_factor(self.config.schedule, self.step, self.total)
            if self.step < self.total
            else 0.0,
            loss=self.sums["loss"] / count if epoch else None,
            penalty=self.sums["penalty"] / count if epoch and self.config.penalty.weight else None,
            seconds=self.sums["seconds"],
            **found,
        )
        self.history.append(record)
        self.sums = dict.fromkeys(self.sums, 0.0)
        if self.held is None or self.config.keep == "last" or self._best() == epoch:
            self.kept, self.weights = epoch, copy.deepcopy(self.model.state_dict())
        if self.rank == 0:
            self._log(record)  # before the state, which a run that is killed here would not look back behind
            self.save()
            if self.about.on_epoch is not None:
                self.about.on_epoch(record)
        self.begun = time.perf_counter()

    def _log(self, record: EpochRecord) -> None:
        if self.about.folder is not None:
            with whole(Path(self.about.folder) / METRICS) as partial, partial.open("w", newline="") as file:
                writer = csv.writer(file)
                rows = [_flat(entry, self.config.radii) for entry in self.history]
                writer.writerow(rows[0])
                writer.writerows(row.values() for row in rows)
        numbers = {k: v for k, v in _flat(record, self.config.radii).items() if isinstance(v, float)}
        self.fabric.log_dict(numbers, step=record.step)

    # What is saved, and found again.

    def save(self) -> None:
        """The whole state into the folder, at once; only the first process writes."""
        self.saved_at = time.monotonic()
        if self.about.folder is None or self.rank != 0:
            return
        sums = dict(self.sums)
        if self.step % self.per_epoch:
            sums["seconds"] += time.perf_counter() - self.begun
        state = {
            "key": self.key,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "sums": sums,
            "history": [record.model_dump(mode="json") for record in self.history],
            "kept": self.kept,
            "weights": self.weights,
        }
        keep(state, Path(self.about.folder) / STATE)

    def find(self) -> dict[str, Any] | None:
        """The state in the folder, if there is one.

        Raises `InvalidParameterError` where it is of another run, `WeightsError` where it is damaged.
        """
        path = None if self.about.folder is None else Path(self.about.folder) / STATE
        if path is None or not path.is_file():
            return None
        try:
            state = opened(path)
        except WeightsError as error:
            raise WeightsError(str(path), "it is damaged: remove it to begin the run again") from error
        lacking = [name for name in STATE_ENTRIES if not isinstance(state, dict) or name not in state]
        if lacking:
            raise WeightsError(str(path), f"it has no {', '.join(lacking)}: remove it to begin the run again")
        here, there = ({k: repr(v) for k, v in key.items()} for key in (self.key, state["key"]))
        if differ := [k for k in here | there if here.get(k) != there.get(k)]:
            # An option that one of them lacks: the run is of another version.
            shown = ", ".join(
                f"{k}: {there.get(k, 'nothing')} there, {here.get(k, 'nothing')} here" for k in differ[:3]
            )
            hint = "take another one (--out), or remove it"
            if differ == ["start"]:
                hint = f"give the weights that run began with (training has changed those it was interrupted on), or {hint}"
            raise InvalidParameterError("folder", str(path.parent), f"it holds another run ({shown}): {hint}")
        return state

    def resume(self) -> None:
        """Go on from the state that was found."""
        if self.found is None:
            return
        self.model.load_state_dict(self.found["model"])
        for optimizer, state in zip(self.optimizers, self.found["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.sums = self.found["step"], self.found["sums"]
        self.history = [EpochRecord.model_validate(record) for record in self.found["history"]]
        self.kept, self.weights = self.found["kept"], self.found["weights"]
        self.found = None

    def finish(self) -> FinetuneReport:
        """The weights kept into the model, and the report."""
        config, about = self.config, self.about
        self.model.load_state_dict(self.weights)
        if isinstance(self.model, Network):
            kept = self.history[self.kept]
            self.model.training_summary = TrainingSummary(
                data=about.data,
                epochs=self.kept,
                notes={"seed": config.seed, "learning_rate": config.learning_rate, "loss": kept.loss},
            )
        report = FinetuneReport(
            model=about.model or type(self.model).__name__,
            data=about.data,
            train_samples=len(self.samples),
            validation_samples=0 if self.held is None else len(self.held),
            config=config,
            history=self.history,
            kept=self.kept,
            stopped_early=self.step < self.total,
            processes=self.world,
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            versions=versions("lipconvert", "torch", "lightning"),
            seconds=sum(record.seconds for record in self.history),
        )
        if about.folder is not None and self.rank == 0:
            report.write(Path(about.folder) / REPORT)
            plot_training(report, Path(about.folder) / CURVES)
        return report


def measure(certifier: Certifier, held: Samples | None, config: TrainingConfig) -> dict[str, Any]:
    """The fields of an `EpochRecord` that are proved of a network (float64), or measured with the proof.

    Raises `NotPSDError` below `LEAST_EIGENVALUE`.
    """
    net, least = certifier.net, math.inf
    for stage in net.stages:
        dae = stage.dae()
        H = unit_gauge(H_matrix(dae), dae.Lambda)
        least = min(least, margin := least_eigenvalue(H))
        allowed = max(-LEAST_EIGENVALUE, roundoff(H, H_scale(dae)))
        if margin < -allowed:
            raise NotPSDError(f"H(Ψ⁻¹, L) of {stage.name!r} (gauge Ψ = I)", margin, allowed)
    found: dict[str, Any] = {
        "least_eigenvalue": least if net.stages else 0.0,
        "lipschitz": net.lipschitz,
        "proved_lipschitz": certifier.bounds[0].lipschitz,
        "delta": certifier.delta,
    }
    if held is not None:
        data = held.dataset(net.input_shape, torch.float64)
        results = over(data, lambda x, labels, start: certifier(x, labels))
        radius = results["radius"][:, 0]
        right = results["correct"]
        found["natural_accuracy"] = float(right.double().mean())
        found["certified_accuracy"] = [float((right & (radius > r)).double().mean()) for r in config.radii]
    return found


def keep(content: Any, path: Path) -> None:
    """Tensors and plain data into a torch file, whole or not at all.

    By way of memory: where a disk is full, torch's own writer hides the `OSError` behind a RuntimeError of its archive.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with whole(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def _equilibria(model: nn.Module) -> list[Any]:
    """The modules that solve an equilibrium, by their `SolverOptions`."""
    return [m for m in model.modules() if isinstance(getattr(m, "options", None), SolverOptions)]


@contextmanager
def loosely_solved(model: nn.Module, tolerance: float | None) -> Iterator[None]:
    """Every equilibrium in a model solves to a tolerance inside, and as before outside.

    Gradients of minibatches need no thirteen digits; None is the dtype's own tolerance, for what is reported.
    """
    layers = _equilibria(model)
    before = [layer.options for layer in layers]
    try:
        for layer in layers:
            layer.options = replace(layer.options, tolerance=tolerance, throw=True)
        yield
    finally:
        for layer, options in zip(layers, before, strict=True):
            layer.options = options


def _grow_roots(stage: LBEN, size: float, generator: torch.Generator, kept: Tensor | None) -> None:
    """Random entries into the rows of V that are zero: ∂(V′V)/∂V = 0 there, so that no gradient would ever move them.

    ``kept``: where V stays as it is.
    """
    V = stage.V.detach()
    rows = (V == 0).flatten(1).all(1).nonzero().flatten()
    if len(rows):
        entries = torch.randn(len(rows), *V.shape[1:], generator=generator, dtype=torch.float64)
        if kept is not None:
            entries = entries.masked_fill(kept[rows].to(entries.device), 0.0)
        V[rows] = (size / math.sqrt(V[0].numel()) * entries).to(V)


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of packages, for reports."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _flat(record: EpochRecord, radii: Sequence[float]) -> dict[str, Any]:
    """A record as a row of metrics.csv."""
    row = record.model_dump(mode="json")
    certified = row.pop("certified_accuracy")
    return row | {f"certified_accuracy at {radius_name(r)}": a for r, a in zip(radii, certified, strict=False)}
