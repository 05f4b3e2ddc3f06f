"""A CUDA device pretended on the CPU, so that what would raise on one raises in every test run.

Inside ``with PretendedDevice() as device:`` tensors made on or moved to "cuda" stay in the memory of the CPU and are computed
there, but their storage carries a mark. Marked tensors say ``device == cuda:0``; an operation among marked and unmarked ones
raises as torch does on a real device (but for what it takes beside it: 0-dimensional CPU tensors in elementwise operations,
copies, CPU indices of a device tensor), and so do ``numpy()`` of a marked tensor and a generator of the wrong device. The
device has random numbers of its own. ``device.synchronisations`` counts where the host would wait.

It marks storages, not tensors: views, ``.data``, ``nn.Parameter`` and autograd need nothing. Three layers do it:

* attributes and methods that tell or change the device of a tensor are replaced on `torch.Tensor`, `torch.cuda` says what
  it says beside one GPU;
* `_Calls`, above autograd, notes which device a call of torch asks for, or else that of its arguments: C++ reads the real
  device of tensors, so it makes new ones "like" them on the CPU;
* `PretendedDevice` itself, below autograd, sees every operation: it checks the devices of what goes in, and marks what
  comes out.

What passes here can still fail on a device. Not pretended: the kernels (what they refuse, their rounding, TF32, atomics and
their order, numbers drawn by a seed), streams, asynchronous errors, memory, several devices, torch.compile, threads that
torch did not start; autocast is that of the CPU, which lowers other operations to bfloat16; a custom backward that returns
a gradient on the wrong device is seen only where that gradient is used, or asked for by `torch.autograd.grad`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
TORCH = str(Path(torch.__file__).parent)

# The real attributes of tensors and of torch, which are replaced inside.
_DEVICE = Tensor.device
_TO, _TOLIST, _GENERATOR = Tensor.to, Tensor.tolist, torch.Generator
_MARK = "pretended"  # attribute of a storage: torch keeps the Python object of a storage as long as the storage

# Operations that hand a number, or the size of their result, from the device to the host.
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "linalg_eig",
    "linalg_lstsq",
}
# Operations between devices, and those whose indices may be on the CPU.
COPIES = {"copy_", "_to_copy", "set_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# Not elementwise: here not even a 0-dimensional CPU tensor is taken beside tensors on the device.
STRICT = ("cat", "stack", "gather", "scatter", "index_select", "index_add", "index_copy", "masked_scatter", "linalg")
# Made from numbers, below dispatch.
FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)


def marked(x: Tensor) -> bool:
    """Whether a tensor is on the pretended device."""
    try:
        return getattr(x.untyped_storage(), _MARK, False)
    except (NotImplementedError, RuntimeError):  # a sparse tensor has no storage
        return False


def mark(x: Tensor, there: bool = True) -> Tensor:
    """The same tensor, with all that share its storage, on the pretended device or not."""
    setattr(x.untyped_storage(), _MARK, there)
    return x


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values, also in lists, tuples and dictionaries (but for those that begin with a number: sizes)."""
    found = list[Tensor]()
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            if value and not isinstance(value[0], int):
                found += _tensors(value)
        elif isinstance(value, dict):
            found += _tensors(value.values())
    return found


@dataclass(frozen=True)
class _Traits:
    """What an operation is: asked for once, as some hundred thousand of few kinds are done."""

    name: str
    strict: bool
    writes: bool  # into its first argument
    random: bool

    def waits(self, args: Any) -> bool:
        """Whether the host waits, where the result is on the device."""
        if self.name == "copy_":
            return marked(args[0]) != marked(args[1])
        if self.name not in INDEXING:
            return self.name in WAITS
        # A mask is counted before it selects, unless one number is put (that is masked_fill); a CPU index is copied.
        indices = _tensors(args[1])
        masked = any(i.dtype in (torch.bool, torch.uint8) for i in indices)
        fills = "put" in self.name and args[2].numel() == 1
        return (masked and not fills) or not all(map(marked, indices))


@cache
def _traits(func: Any) -> _Traits:
    name = func._schema.name.split("::")[1]
    first = func._schema.arguments[0].alias_info if func._schema.arguments else None
    return _Traits(
        name=name,
        strict=name.lstrip("_").startswith(STRICT),
        writes=first is not None and first.is_write,
        random=torch.Tag.nondeterministic_seeded in func.tags,
    )


def is_cuda(device: Any) -> bool:
    """Whether a device as torch takes it, also as a number, is the pretended one; raises RuntimeError for a second one."""
    device = torch.device("cuda", device) if type(device) is int else torch.device(device)
    if device.type == "cuda" and device.index not in (None, 0):
        raise RuntimeError(f"CUDA error: invalid device ordinal ({device}: one device is pretended)")
    return device.type == "cuda"


class _AnyGenerator(type(_GENERATOR)):
    """The generators of the CPU, made outside or in C++, are instances too."""

    def __instancecheck__(cls, x: object) -> bool:
        return isinstance(x, _GENERATOR)


class _Generator(_GENERATOR, metaclass=_AnyGenerator):
    """`torch.Generator`: one of the pretended device, or of the CPU as before."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return super().__new__(cls) if is_cuda(device) else _GENERATOR(device)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA


class _Move(torch.autograd.Function):
    """x on the other device; its gradient goes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: bool) -> Tensor:  # type: ignore[override]
        ctx.back = marked(x)
        return _copied(x, there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _copied(gradient, ctx.back), None


def _copied(x: Tensor, there: bool) -> Tensor:
    with torch._C._DisableTorchDispatch():
        return mark(x.detach().clone(), there)


class _Calls(TorchFunctionMode):
    """What a call of torch says of devices, before C++ reads it."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.pretended = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.untyped_storage or func.__name__ == "__get__":
            return func(*args, **kwargs)  # nothing is made
        pretended = self.pretended
        if func in FROM_DATA:
            return pretended.from_data(func, *args, **kwargs)
        before = pretended.asked, pretended.like, pretended.generator
        given, like = kwargs.get("device"), any(map(marked, _tensors((*args, *kwargs.values()))))
        if before == (None, like, None) and given is None and "generator" not in kwargs:
            return func(*args, **kwargs)
        pretended.asked, pretended.like = None if given is None else is_cuda(given), like
        pretended.generator = kwargs.get("generator")
        try:
            return func(*args, **kwargs)
        finally:
            pretended.asked, pretended.like, pretended.generator = before


class PretendedDevice(TorchDispatchMode):
    """A context in which torch has one CUDA device; see the module.

    ``synchronisations``: how often the host waited, by operation and line outside torch.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it costs more than the rest

    def __init__(self) -> None:
        super().__init__()
        self.synchronisations = Counter[str]()
        self.asked: bool | None = None  # the device that the call in progress names
        self.like = False  # the device of its arguments
        self.generator: torch.Generator | None = None  # the one it is given
        self.random = _GENERATOR().get_state()
        self._inside = ExitStack()

    # Operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((*args, *kwargs.values()) if kwargs else args)
        on = [marked(x) for x in tensors]
        there, takes_device, generator = any(on), "device" in kwargs, kwargs.get("generator")
        if not there and not takes_device and generator is None and (tensors or not self.like):
            return func(*args, **kwargs)  # on the CPU alone
        where, traits = there, _traits(func)
        if takes_device:
            wanted = kwargs["device"]
            if wanted is not None and torch.device(wanted).type == "meta":
                return func(*args, **kwargs)
            where = self._where(wanted, tensors, there)
            kwargs = {**kwargs, "device": wanted and "cpu"}
        elif not tensors:
            where = self.like
        if generator is not None:
            self._check_generator(where)
        if there and not all(on):
            self._check(func, traits, args, kwargs, tensors, on)
        if where and traits.waits(args):
            self.waits(traits.name)
        if where and traits.random and generator is None:
            with self._numbers_of_the_device():
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if where:
            given = [x.untyped_storage()._cdata for x in tensors]
            for x in _tensors((out,)):
                if x.untyped_storage()._cdata not in given:
                    mark(x)
        return out

    def _where(self, wanted: Any, tensors: list[Tensor], there: bool) -> bool:
        """Whether new tensors of an operation are on the device: where it is told, else where the arguments are.

        "cpu" is what C++ says also of tensors "like" marked ones: it counts only where the call in Python says it.
        """
        if wanted is not None and is_cuda(wanted):
            return True
        if self.asked is not None:
            return self.asked
        return there if tensors else self.like

    def _check(self, func: Any, traits: _Traits, args: Any, kwargs: Any, tensors: list[Tensor], on: list[bool]) -> None:
        """Raises what torch raises of an operation on tensors of both devices."""
        if traits.name in COPIES or any(_DEVICE.__get__(x).type == "meta" for x in tensors):
            return
        if traits.name in INDEXING:
            if not marked(args[0]) and any(map(marked, _tensors(args[1]))):
                text = "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
                raise RuntimeError(f"{text} ({func})")
            tensors = [args[0], *_tensors(args[2:3])]
            on = [marked(x) for x in tensors]
        written = _tensors([value for key, value in kwargs.items() if key.startswith("out")])
        if traits.writes:
            written += _tensors(args[:1])
        left = [x for x, there in zip(tensors, on, strict=True) if not there and (traits.strict or x.dim() > 0)]
        if (left and any(on)) or not all(map(marked, written)):
            text = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
            raise RuntimeError(f"{text} ({func})")

    def _check_generator(self, where: bool) -> None:
        if where != (type(self.generator) is _Generator):
            expected, found = ("cuda", "cpu") if where else ("cpu", "cuda")
            raise RuntimeError(f"Expected a '{expected}' device type for generator but found '{found}'")

    @contextmanager
    def _numbers_of_the_device(self) -> Iterator[None]:
        """The CPU's default generator stands for the device's inside."""
        generator = torch.default_generator
        here = generator.get_state()
        generator.set_state(self.random)
        try:
            yield
        finally:
            self.random = generator.get_state()
            generator.set_state(here)

    def waits(self, what: str) -> None:
        """Count a synchronisation, for the line outside torch that it comes from."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith((TORCH, __file__, "<")):
            frame = frame.f_back
        self.synchronisations[f"{what} {frame.f_code.co_filename}:{frame.f_lineno}"] += 1

    # Tensors between the devices

    def to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to`, with a device, a dtype or another tensor in any place."""
        given = [*args, *(kwargs.pop(key) for key in ("device", "other") if key in kwargs)]
        other = next((g for g in given if isinstance(g, Tensor)), None)
        place = next((g for g in given if isinstance(g, str | torch.device) or type(g) is int), None)
        dtype = next((g for g in given if isinstance(g, torch.dtype)), None)
        if other is not None:
            place, dtype = other.device, other.dtype
        dtype = kwargs.pop("dtype", None) or dtype or x.dtype
        kwargs.pop("non_blocking", None)
        if place is not None and torch.device(place).type == "meta":
            return _TO(x, place, dtype, **kwargs)
        if place is not None and is_cuda(place) != marked(x):
            self.waits("copy to " + ("cpu" if marked(x) else "cuda"))
            x = _Move.apply(x, is_cuda(place))  # type: ignore[assignment]
            kwargs.pop("copy", None)
        elif [g for g in given if isinstance(g, bool)] == [False, True] or [*map(type, given)].count(bool) == 2:
            kwargs["copy"] = given[-1]
        return _TO(x, dtype=dtype, **kwargs)

    def from_data(self, func: Callable[..., Tensor], *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        """`torch.tensor` and its kin: on the device they name, else that of the tensor they are given, else the default."""
        sources = [x for x in args if isinstance(x, Tensor)]
        if device is None:
            device = CUDA if any(map(marked, sources)) else torch.get_default_device() if not sources else "cpu"
        there = is_cuda(device)
        if not there and not any(map(marked, sources)):
            return func(*args, device=device, **kwargs)
        source = args[-1] if func is Tensor.new_tensor else args[0]
        if isinstance(source, Tensor) and func in (torch.as_tensor, torch.asarray):
            return self.to(source, device, kwargs.get("dtype") or source.dtype)
        if isinstance(source, Tensor):
            return self.to(source.detach().clone(), device, kwargs.get("dtype") or source.dtype)
        self.waits("copy of numbers to cuda")
        with torch._C._DisableTorchDispatch():
            return mark(func(*args, device="cpu", **kwargs), there)

    def _backward(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """The engine of autograd: Python in custom functions calls torch as everywhere, C++ fills in zeros like the roots."""

        def run(outputs: Any, gradients: Any, *args: Any, **kwargs: Any) -> Any:
            before = self.asked, self.like, self.generator
            self.asked, self.like, self.generator = None, any(map(marked, outputs)), None
            self._require_gradients(outputs, gradients)
            try:
                with _Calls(self):
                    found = real(outputs, gradients, *args, **kwargs)
            finally:
                self.asked, self.like, self.generator = before
            if found and not kwargs["accumulate_grad"]:  # args: whether to retain and to create graphs, inputs
                self._require_gradients(args[2], found)
            return found

        return run

    @staticmethod
    def _require_gradients(tensors: Any, gradients: Any) -> None:
        for k, (x, gradient) in enumerate(zip(tensors, gradients, strict=True)):
            if isinstance(x, Tensor) and isinstance(gradient, Tensor) and marked(x) != marked(gradient):
                text = f"invalid gradient at index {k} - expected device {x.device} but got {gradient.device}"
                raise RuntimeError(f"Function returned an {text}")

    # What is replaced while it lasts

    def __enter__(self) -> PretendedDevice:
        self._replace_in_tensors()
        self._replace_in_torch()
        self._replace_in_files()
        self._inside.enter_context(_Calls(self))
        super().__enter__()
        self._inside.push(super().__exit__)
        return self

    def __exit__(self, *error: object) -> None:
        self._inside.__exit__(*error)  # type: ignore[arg-type]

    def _put(self, owner: Any, **values: Any) -> None:
        for name, value in values.items():
            self._inside.enter_context(mock.patch.object(owner, name, value, create=True))

    def _replace_in_tensors(self) -> None:
        def on_the_host(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
                if marked(x):
                    text = (
                        "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
                    )
                    raise TypeError(f"{text}memory first.")
                return real(x, *args, **kwargs)

            return call

        def tolist(x: Tensor) -> Any:
            if marked(x):
                self.waits("tolist")
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                return _TOLIST(x)

        self._put(
            Tensor,
            device=property(lambda x: CUDA if marked(x) else _DEVICE.__get__(x)),
            is_cuda=property(marked),
            is_cpu=property(lambda x: not marked(x) and _DEVICE.__get__(x).type == "cpu"),
            get_device=lambda x: x.device.index if marked(x) else -1,
            to=self.to_method(),
            cuda=lambda x, device=0, **kwargs: self.to(x, 0 if device is None else device),
            cpu=lambda x, **kwargs: self.to(x, "cpu"),
            numpy=on_the_host(Tensor.numpy),
            __array__=on_the_host(Tensor.__array__),
            tolist=tolist,
        )

    def to_method(self) -> Callable[..., Tensor]:
        """`to`, as a function that binds to tensors."""
        return lambda x, *args, **kwargs: self.to(x, *args, **kwargs)

    def _replace_in_torch(self) -> None:
        def seed(number: int) -> None:
            self.random = _GENERATOR().manual_seed(number ^ 0x5EED).get_state()

        def set_state(state: Tensor, device: Any = None) -> None:
            self.random = state.clone()

        def says(value: Any) -> Callable[..., Any]:
            return lambda *args, **kwargs: value

        self._put(
            torch.cuda,
            is_available=says(True),
            is_initialized=says(True),
            device_count=says(1),
            current_device=says(0),
            get_device_name=says("a pretended device"),
            get_device_capability=says((8, 0)),
            is_bf16_supported=says(True),
            manual_seed=seed,
            manual_seed_all=seed,
            get_rng_state=lambda device=None: self.random.clone(),
            get_rng_state_all=lambda: [self.random.clone()],
            set_rng_state=set_state,
            set_rng_state_all=lambda states: set_state(states[0]),
            set_device=says(None),
            synchronize=lambda device=None: self.waits("synchronize"),
            empty_cache=says(None),
            _lazy_init=says(None),
        )
        self._put(torch, Generator=_Generator)
        self._put(torch.accelerator, current_accelerator=says(None))  # of optimizers, which ask for streams
        self._put(torch.autograd, _engine_run_backward=self._backward(torch.autograd._engine_run_backward))

        def of_the_cpu(kind: str) -> str:
            return "cpu" if is_cuda(kind) else kind

        begin = torch.autocast.__init__
        self._put(torch.autocast, __init__=lambda a, kind, *args, **kwargs: begin(a, of_the_cpu(kind), *args, **kwargs))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            real = getattr(torch, name)
            self._put(torch, **{name: lambda *kinds, real=real: real(*map(of_the_cpu, kinds))})

    def _replace_in_files(self) -> None:
        """Copies of storages keep the mark; files say where a storage was."""
        clone = torch.UntypedStorage.clone

        def copied(storage: torch.UntypedStorage) -> torch.UntypedStorage:
            new = clone(storage)
            setattr(new, _MARK, getattr(storage, _MARK, False))
            return new

        def told(storage: Any) -> str | None:
            return "cuda:0" if getattr(storage, _MARK, False) else None

        def restored(storage: Any, location: str) -> Any:
            if not location.startswith("cuda"):
                return None
            setattr(storage, _MARK, is_cuda(location))
            return storage

        self._put(torch.UntypedStorage, clone=copied)
        packages = torch.serialization._package_registry
        self._inside.callback(packages.__setitem__, slice(None), list(packages))
        torch.serialization.register_package(0, told, restored)
