"""What a caller gives, in one form or refused by name: numbers, counts, radii, tensors; and the settings of torch around it.

Everything public that takes a batch admits it by `inputs_of` (of a network: `Network.checked`), so that one kind of input
means one thing everywhere.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InvalidParameterError, ShapeError

P = ParamSpec("P")
T = TypeVar("T")

# Sizes are 64-bit numbers in torch.
LARGEST = 2**63 - 1


@contextmanager
def plain_settings() -> Iterator[None]:
    """Inside, torch is set as in a new process: no inference mode, gradients taken, new tensors on the CPU.

    What was set comes back afterwards. The default dtype stays: it is the caller's, and lipconvert names the dtype of
    all it makes.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":  # the mode costs some microseconds for each call of torch
            stack.enter_context(torch.device("cpu"))
        yield


def isolated(function: Callable[P, T]) -> Callable[P, T]:
    """For a public function: it runs in `plain_settings`, and gives what it gives in a new process."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with plain_settings():
            return function(*args, **kwargs)

    return wrapped


def require_no_autocast(device: torch.device) -> None:
    """Raise `InvalidParameterError` where autocast would run parts of a network in another dtype than its own."""
    if torch.is_autocast_enabled(device.type):
        raise InvalidParameterError("autocast", "enabled", "a certificate is about one dtype; leave the autocast block")


def require_ordinary(module: nn.Module, where: str) -> None:
    """Raise `InvalidParameterError` where a tensor of a module was made in inference mode: no gradient goes through it."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_inference():
            raise InvalidParameterError(
                f"tensor {name!r} of {where}",
                "an inference tensor",
                "gradients need others: cast or move the network outside of torch.inference_mode(), as by net.to(net.dtype)",
            )


def make_ordinary(module: nn.Module) -> None:
    """Copies, in place, of parameters and buffers that were made in inference mode. For use outside of it."""
    for part in module.modules():
        held: list[Any] = [part._parameters, part._buffers]
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_inference():
                    copied = tensor.detach().clone()
                    trained = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(copied, tensor.requires_grad) if trained else copied


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, torch's default dtype is this one: for libraries that cast to it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def number(
    value: Any,
    where: str,
    requirement: str = "it must be a finite number",
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    finite: bool = True,
) -> float:
    """A real number as a float: of Python, of numpy, or a tensor or array of one entry without dimensions.

    Raises `InvalidParameterError` with ``where`` and ``requirement`` for anything else (a bool, a string), for NaN, for
    integers too large for a float, and where least ≤ value, above < value and value ≤ most do not hold.
    """
    given = value
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidParameterError(where, repr(given), requirement)
    try:
        result = float(value)
    except OverflowError:
        raise InvalidParameterError(where, given, f"{requirement}; floats end at 1.8e308") from None
    within = least <= result <= most and (result > above or above == -math.inf)
    if not within or (finite and not math.isfinite(result)):
        raise InvalidParameterError(where, given, requirement)
    return result


def count(value: Any, where: str, requirement: str = "", *, least: int = 1) -> int:
    """A whole number from ``least`` to 2⁶³ − 1: an int of Python or numpy, or an integer tensor without dimensions.

    Raises `InvalidParameterError` with ``where`` for anything else, such as a bool or a float.
    """
    requirement = requirement or f"it must be a whole number, at least {least}"
    given = value
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    try:
        result = operator.index(value)
    except TypeError:
        raise InvalidParameterError(where, repr(given), requirement) from None
    if isinstance(value, bool) or not least <= result <= LARGEST:
        raise InvalidParameterError(where, given, requirement)
    return result


def sizes(values: Any, where: str, expected: str, *, least: int = 1) -> tuple[int, ...]:
    """Sizes of at least ``least``, one or several, as a tuple. Raises `ShapeError` with ``expected`` for others."""
    several = isinstance(values, Iterable) and getattr(values, "ndim", 1) and not isinstance(values, str | bytes)
    values = tuple(values) if several else (values,)
    try:
        return tuple(count(size, where, least=least) for size in values)
    except InvalidParameterError as error:
        raise ShapeError(where, expected, values, str(error)) from None


def radii_of(values: Any) -> list[float]:
    """Radii as floats, in their order: a list, tuple, or an array or tensor of one dimension.

    Raises `InvalidParameterError` where there are none, and for what is no finite number ≥ 0.
    """
    requirement = "it must be a list of numbers, none of them negative or infinite"
    if isinstance(values, Tensor | np.ndarray):
        if values.ndim != 1:
            raise InvalidParameterError("radii", f"of shape {tuple(values.shape)}", requirement)
        values = values.tolist()
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise InvalidParameterError("radii", repr(values), requirement)
    if not values:
        raise InvalidParameterError("radii", values, "at least one is needed")
    return [
        number(r, f"radius {k} of radii", "it must be finite and not negative", least=0.0) for k, r in enumerate(values)
    ]


def plain_tensor(x: Any, where: str) -> Tensor:
    """A tensor of ordinary memory: of a tensor, whatever its strides, or of a numpy array, whatever its byte order.

    Subclasses that only add names to a tensor (``torchvision.tv_tensors``) lose them; an inference tensor is copied outside
    of inference mode, so that gradients may go through it. Raises `InvalidParameterError`, saying what to give, for lists and
    other objects, and for tensors that are sparse, quantised, nested, on ``meta``, or of classes that compute by themselves.
    """
    if isinstance(x, np.ndarray):
        if x.dtype.kind not in "biuf":
            raise InvalidParameterError(f"the dtype of {where}", x.dtype, "an array must hold real numbers")
        # a copy: torch reads neither foreign byte orders nor negative strides, and warns of arrays that are read-only
        return torch.from_numpy(np.array(x, dtype=x.dtype.newbyteorder("="), order="C", copy=True)).to("cpu")
    if not isinstance(x, Tensor):
        requirement = "it must be a tensor; torch.as_tensor(..., dtype=torch.float64) makes one of a list"
        raise InvalidParameterError(where, f"a {type(x).__name__}", requirement)
    kind: Any = type(x)
    plain: Any = Tensor
    refusals = (
        (x.is_nested, "nested", "give one tensor of a batch of equal shapes"),
        (
            kind.__torch_dispatch__ is not plain.__torch_dispatch__,
            f"a {kind.__name__}",
            "it must be a plain torch.Tensor: what this class computes is not known",
        ),
        (x.is_quantized, "quantised", "give x.dequantize()"),
        (x.layout is not torch.strided, f"of layout {x.layout}", "give x.to_dense()"),
        (x.device.type == "meta", "on the device meta", "it must hold numbers"),
    )
    for refused, what, requirement in refusals:
        if refused:
            raise InvalidParameterError(where, what, requirement)
    if kind not in (Tensor, nn.Parameter):
        x = x.as_subclass(Tensor)
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def inputs_of(x: Any, where: str = "the input") -> Tensor:
    """`plain_tensor` of floats, of whatever precision. Raises `InvalidParameterError` for integers and complex numbers."""
    x = plain_tensor(x, where)
    if not x.is_floating_point():
        raise InvalidParameterError(f"the dtype of {where}", x.dtype, "pixels must be floats (in [0, 1], not 0..255)")
    return x


def class_labels(labels: Tensor, y: Tensor) -> Tensor:
    """Labels (B,) of logits y (B, at least 2) as int64, on their device; `ShapeError`, `InvalidParameterError` for others."""
    if y.dim() != 2 or y.shape[1] < 2:
        raise ShapeError("the logits", "(B, at least 2)", tuple(y.shape))
    labels = plain_tensor(labels, "labels")
    if labels.shape != y.shape[:1]:
        raise ShapeError("labels", (len(y),), tuple(labels.shape))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InvalidParameterError("the dtype of the labels", labels.dtype, "labels must be integers: labels.long()")
    labels = labels.to(y.device).long()
    wrong = labels[(labels < 0) | (labels >= y.shape[1])]
    if len(wrong):
        raise InvalidParameterError("a label", int(wrong[0]), f"the network has the classes 0..{y.shape[1] - 1}")
    return labels
