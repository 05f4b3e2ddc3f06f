"""Weight files of the field's public code, written here by references that share nothing with the package, and opened.

Each reference is the formula of its paper in a few lines, with its tensors named as the public code names them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import lipconvert as lc

TOLERANCE = 1e-10


@dataclass
class Public:
    """A public model: its tensors, its function, the input shape, the options that its file needs, and its constant."""

    tensors: dict[str, Tensor]
    function: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    options: dict[str, Any]
    plugin: str
    dense: bool = False  # zero padding is converted on flattened images only


def draw(*size: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(size)


# --- equilibrium models --------------------------------------------------------------------------------------------------


def fixed_point(W: Tensor, u: Tensor, sigma: str) -> Tensor:
    """z = σ(Wz + u) by damped Newton's method, one sample after the other."""
    W, u = W.detach().numpy(), u.detach().numpy()
    act, slope = {
        "relu": (lambda v: np.maximum(v, 0.0), lambda v: (v > 0) * 1.0),
        "tanh": (np.tanh, lambda v: 1.0 - np.tanh(v) ** 2),
    }[sigma]
    rows = []
    for b in u:
        z, size = np.zeros(len(b)), 0.0
        for _ in range(100):  # damped Newton: half the step until the residual falls
            residual = z - act(W @ z + b)
            size = np.abs(residual).max()
            if size < 1e-14:
                break
            step, t = np.linalg.solve(np.eye(len(b)) - slope(W @ z + b)[:, None] * W, residual), 1.0
            while t > 1e-8 and np.abs(z - t * step - act(W @ (z - t * step) + b)).max() >= size:
                t /= 2
            z = z - t * step
        assert size < 1e-12
        rows.append(z)
    return torch.from_numpy(np.stack(rows))


def lben(form: str, gamma: float, m: float, sigma: str = "relu") -> Public:
    n, p, q = 7, 5, 3
    t = {"B.weight": draw(n, p), "B.bias": draw(n), "V.weight": draw(n, n), "S.weight": draw(n, n)}
    t |= {"G.weight": draw(q, n), "G.bias": draw(q)}
    B, V, S, G = (t[f"{name}.weight"] for name in "BVSG")
    eye = torch.eye(n)
    if form == "psi":
        t["psi"] = 0.3 * draw(n)
        Psi = torch.diag(t["psi"].exp())
        inner = G.T @ G / (2 * gamma) + Psi.inverse() @ B @ B.T @ Psi.inverse() / (2 * gamma) + V.T @ V + m * eye
        W = eye - Psi @ (inner + S.T - S)
        options = {"lipschitz": gamma, "epsilon": m, "activation": sigma}
    else:
        t["Lambda"] = torch.rand(n) + 0.5
        L = torch.diag(t["Lambda"])
        W = 0.5 * L.inverse() @ (2 * L - G.T @ G / gamma - L @ B @ B.T @ L / gamma - V.T @ V - m * eye + S.T - S)
        options = {"lipschitz": gamma, "m": m, "activation": sigma}

    def function(x: Tensor) -> Tensor:
        return fixed_point(W, x @ B.T + t["B.bias"], sigma) @ G.T + t["G.bias"]

    return Public({f"mon.linear_module.{k}": v for k, v in t.items()}, function, (p,), options, "lben")


def mondeq(form: str, m: float, sigma: str = "relu") -> Public:
    n, p, q = 7, 5, 3
    A, B, phi = draw(n, n, scale=0.5), draw(n, n), torch.ones(n)
    inside = {"U.weight": draw(n, p), "U.bias": draw(n)}
    outside = {"Wout.weight": draw(q, n), "Wout.bias": draw(q)}
    if form == "mondeq":
        inside |= {"A.weight": A, "B.weight": B}
        W = (1 - m) * torch.eye(n) - A.T @ A + inside["B.weight"] - inside["B.weight"].T
    else:
        inside |= {"V.weight": A, "S.weight": B}
        phi = torch.rand(n) + 0.5
        inside |= {"psi": phi.log()} if form == "psi" else {"Lambda": phi}
        W = torch.eye(n) - torch.diag(phi) @ (A.T @ A + m * torch.eye(n) + B.T - B)

    def function(x: Tensor) -> Tensor:
        z = fixed_point(W, x @ inside["U.weight"].T + inside["U.bias"], sigma)
        return z @ outside["Wout.weight"].T + outside["Wout.bias"]

    tensors = {f"mon.linear_module.{k}": v for k, v in inside.items()} | outside
    plugin = "mondeq" if form == "mondeq" else "g_mondeq"
    return Public(tensors, function, (p,), {"m": m, "activation": sigma}, plugin)


# --- residual layers -----------------------------------------------------------------------------------------------------


def operator(kernel: Tensor, h: int, w: int, padding_mode: str) -> Tensor:
    """The matrix of a convolution of odd kernels on flattened images, column by column."""
    _, c, kh, kw = kernel.shape
    units = torch.eye(c * h * w).reshape(-1, c, h, w)
    mode = "constant" if padding_mode == "zeros" else "circular"
    padded = functional.pad(units, (kw // 2, kw // 2, kh // 2, kh // 2), mode=mode)
    return functional.conv2d(padded, kernel).flatten(1).T


def sll_T(weight: Tensor, q: Tensor) -> Tensor:
    """Σ_j |W′W|_ij q_j/q_i; for kernels the sum of |autocorrelation| over all shifts stands for |W′W|."""
    n = len(weight)
    T = torch.zeros(n)
    for i in range(n):
        for j in range(n):
            if weight.dim() == 2:
                size = (weight[i] * weight[j]).sum().abs()
            else:
                kh, kw = weight.shape[2:]
                shifts = functional.conv2d(weight[j][None], weight[i][None], padding=(kh - 1, kw - 1))
                size = shifts.abs().sum()
            T[i] += size * q[j] / q[i]
    return T


def residual(x: Tensor, W: Tensor, b: Tensor, T: Tensor, sigma: Callable[[Tensor], Tensor]) -> Tensor:
    return x - 2.0 * (sigma(x @ W.T + b) / T) @ W


def residual_network(
    kind: str, code: str, image: tuple[int, int] = (), sigma: str = "relu", inputs: int = 5, bare: bool = False
) -> Public:  # fmt: skip
    """SLL (``q``) or CPL (a norm) layers as ``code`` keeps them: PC, SL, LB or CP (Meunier et al.), 1L."""
    convolutions, dense, classes, pool = (2 if image else 0), 2, 3, 2
    c, channels = 2, 3
    exp = code == "SL"
    padding_mode = "circular" if code == "PC" else "zeros"
    features = channels * image[0] * image[1] // pool**2 if image else 6
    names = {
        "PC": ([f"module.model.convs.{i}" for i in range(9)], [f"module.model.denses.{i}" for i in range(9)]),
        "SL": ([f"model.model.{i + 1}" for i in range(9)], [f"model.model.{i + 10}" for i in range(9)]),
        "LB": ([f"stable_block.{i}" for i in range(9)], [f"layers_linear.{i + 1}" for i in range(9)]),
        "CP": ([f"stable_block.{i}" for i in range(9)], [f"layers_linear.{i + 1}" for i in range(9)]),
        "1L": ([f"Block.{i}" for i in range(9)], [f"Dense.{i}" for i in range(9)]),
    }[code]
    tensors: dict[str, Tensor] = {}
    act = getattr(torch, sigma)
    steps: list[Callable[[Tensor], Tensor]] = []

    def block(path: str, weight: Tensor, matrix: Tensor, T: Tensor, bias: Tensor) -> None:
        repeat = len(matrix) // len(weight)
        kernel = weight.dim() == 4
        tensors[f"{path}.{'kernel' if kernel else 'weight' if exp else 'weights'}"] = weight
        tensors[f"{path}.bias"] = bias.reshape(1, -1, *[1] * (2 * kernel)) if exp else bias
        b, t = bias.repeat_interleave(repeat), T.repeat_interleave(repeat)
        steps.append(lambda x: residual(x, matrix, b, t, act))

    def diagonal(path: str, weight: Tensor, matrix: Tensor) -> Tensor:
        if kind == "sll":
            tensors[f"{path}.q"] = q = draw(len(weight))
            return sll_T(weight, q.exp() if exp else q.abs())
        if weight.dim() == 4 and padding_mode == "zeros":  # the circular convolution on larger images bounds it
            kh, kw = weight.shape[2:]
            matrix = operator(weight, image[0] + kh - 1, image[1] + kw - 1, "circular")
        norm = torch.linalg.svdvals(matrix)[0]
        if code == "CP":
            tensors[f"{path}.eval_sv_max"] = norm.reshape(1) * 0.99
            tensors[f"{path}.pm.u"] = draw(1, *weight.shape[1:2])
            if weight.dim() == 2:
                tensors[f"{path}.alpha"] = torch.zeros(1)
        else:
            tensors[f"{path}.u"] = draw(1, *weight.shape[1:2])
        return (norm**2).expand(len(weight))

    if image:
        steps.append(lambda x: functional.pad(x, (0, 0, 0, 0, 0, channels - c)).flatten(1))
    else:
        steps.append(lambda x: functional.pad(x, (0, features - inputs)))
    for i in range(convolutions):
        weight = draw(4, channels, 3, 3)
        matrix = operator(weight, *image, padding_mode)
        block(names[0][i], weight, matrix, diagonal(names[0][i], weight, matrix), draw(4))
    if image:
        steps.append(
            lambda x: functional.avg_pool2d(x.reshape(-1, channels, *image), pool, divisor_override=pool).flatten(1)
        )
    for i in range(dense):
        weight = draw(4 + i, features)
        block(names[1][i], weight, weight, diagonal(names[1][i], weight, weight), draw(4 + i))
    options: dict[str, Any] = {"activation": sigma}
    if kind == "sll":
        options["q"] = "exp" if exp else "abs"
    if code in ("SL", "CP"):
        path = "model.model.30" if code == "SL" else "last_last"
        tensors |= {f"{path}.weight": (weight := draw(classes, features)), f"{path}.bias": (b := draw(classes))}
        Q = weight / weight.norm(dim=1, keepdim=True)
        steps.append(lambda x: x @ Q.T + b)
    else:
        steps.append(lambda x: x[:, :classes])
        options["classes"] = classes
    if image:
        options |= {"image": f"{image[0]}x{image[1]}", "in_channels": c, "pool": pool, "padding_mode": padding_mode}
    else:
        options["inputs"] = inputs

    def function(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    dense_only = bool(image) and padding_mode == "zeros"
    return Public(tensors, function, (c, *image) if image else (inputs,), options, kind, dense_only)


# --- sandwich and AOL layers ---------------------------------------------------------------------------------------------


def cayley_pair(weight: Tensor, alpha: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """[A B] with AA′ + BB′ = I from the transform of (α/norm)·weight, (..., out, out + in)."""
    M = (alpha / norm * weight).mT
    out = M.shape[-1]
    X, Y = M[..., :out, :], M[..., out:, :]
    Z = X - X.mH + Y.mH @ Y
    eye = torch.eye(out).to(M)
    inverse = torch.linalg.inv(eye + Z)
    Q = torch.cat([inverse @ (eye - Z), -2 * Y @ inverse], -2).mT
    return Q[..., :out], Q[..., out:]


def sandwich_dense(
    A: Tensor, B: Tensor, psi: Tensor, bias: Tensor, scale: float, act: Callable[[Tensor], Tensor]
) -> Callable:
    def step(x: Tensor) -> Tensor:
        v = 2**0.5 * torch.exp(-psi) * (scale * x @ B.T) + bias
        return 2**0.5 * (torch.exp(psi) * act(v)) @ A

    return step


def sandwich(image: int = 0, gamma: float = 2.0, head: bool = False, lazy: bool = False, sigma: str = "relu") -> Public:
    """``model.N`` as Wang & Manchester's networks: convolutions (the second with stride 2), dense layers, a linear one."""
    act, root = getattr(torch, sigma), gamma**0.5
    tensors: dict[str, Tensor] = {}
    steps: list[Callable[[Tensor], Tensor]] = []
    c, n, index = 2, image, 0
    if image:
        for k, (width, stride, size) in enumerate([(4, 1, 3), (3, 2, 1), (3, 1, 2)]):
            incoming = c * stride**2
            n //= stride
            weight = draw(width, width + incoming, size, size)
            # K̂(ω) at the frequencies of rfft2, the kernel's middle at (size − 1)//2
            shift = torch.arange(size) - (size - 1) // 2
            rows = torch.exp(2j * torch.pi * torch.outer(torch.arange(n), shift) / n)
            columns = torch.exp(2j * torch.pi * torch.outer(torch.arange(n // 2 + 1), shift) / n)
            spectrum = torch.einsum("ijab,ka,mb->kmij", weight.to(torch.complex128), rows, columns)
            norm, alpha, psi, bias = spectrum.norm(), draw(1).abs() * 5, 0.3 * draw(width), draw(width)
            A, B = cayley_pair(spectrum, alpha, norm)
            t = {"weight": weight, "bias": bias, "psi": psi, "alpha": alpha.reshape(())}
            tensors |= {f"model.{index}.{name}": value for name, value in t.items()}
            scale = root if k == 0 else 1.0

            def convolve(x: Tensor, A=A, B=B, psi=psi, bias=bias, scale=scale, stride=stride, n=n) -> Tensor:
                x = functional.pixel_unshuffle(scale * x, stride)
                v = torch.einsum("kmij,bjkm->bikm", B, torch.fft.rfft2(x)) * 2**0.5
                v = torch.fft.irfft2(torch.exp(-psi)[:, None, None] * v, (n, n)) + bias[:, None, None]
                s = torch.fft.rfft2(torch.exp(psi)[:, None, None] * act(v))
                return torch.fft.irfft2(2**0.5 * torch.einsum("kmji,bjkm->bikm", A.conj(), s), (n, n))

            steps.append(convolve)
            c, index = width, index + 1
        steps.append(lambda x: x.flatten(1))
        index += 1
    width = c * n * n if image else 5
    shape = (2, image, image) if image else (width,)
    depth = 2
    for k in range(depth):
        out = 6 + k
        weight, alpha, psi, bias = draw(out, out + width), draw(1).abs() * 3, 0.3 * draw(out), draw(out)
        A, B = cayley_pair(weight, alpha, weight.norm())
        tensors |= {f"model.{index}.weight": weight, f"model.{index}.alpha": alpha, f"model.{index}.psi": psi}
        tensors[f"model.{index}.bias"] = bias
        if lazy:
            tensors[f"model.{index}.Q"] = torch.cat([A, B], 1)
        scale = (root if k == 0 and not image else 1.0) * (root if head and k == depth - 1 else 1.0)
        steps.append(sandwich_dense(A, B, psi, bias, scale, act))
        width, index = out, index + 1
    weight, bias = draw(3, width if head else 3 + width), draw(3)
    tensors |= {f"model.{index}.weight": weight, f"model.{index}.bias": bias}
    if head:
        Q, scale = weight / weight.norm(dim=1, keepdim=True), 1.0
    else:
        tensors[f"model.{index}.alpha"] = alpha = draw(1).abs() * 3
        Q, scale = cayley_pair(weight, alpha, weight.norm())[1], root
    steps.append(lambda x: scale * x @ Q.T + bias)

    def function(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    options: dict[str, Any] = {"lipschitz": gamma, "activation": sigma}
    options |= {"image": image, "in_channels": 2} if image else {}
    return Public(tensors, function, shape, options, "sandwich")


def aol(gamma: float = 1.0, sigma: str = "relu") -> Public:
    """``model.N.weights`` and ``bias``, P = W̃D with D_i = (Σ_j |W̃′W̃|_ij)^{-1/2}, √γ before the first and the last."""
    widths, act = (5, 6, 7, 3), getattr(torch, sigma)
    tensors = {}
    for k, (before, after) in enumerate(itertools.pairwise(widths)):
        tensors |= {f"model.{k}.weights": draw(after, before), f"model.{k}.bias": draw(after)}

    def function(x: Tensor) -> Tensor:
        for k in range(3):
            W = tensors[f"model.{k}.weights"]
            D = (W.T @ W).abs().sum(1).rsqrt()
            scale = gamma**0.5 if k in (0, 2) else 1.0
            x = scale * x @ (W * D).T + tensors[f"model.{k}.bias"]
            x = act(x) if k < 2 else x
        return x

    return Public(tensors, function, (5,), {"lipschitz": gamma, "activation": sigma}, "aol")


def compared_aol(epsilon: float = 0.0) -> Public:
    """``FirstConv``, ``BlockN.M``, ``ClassificationHead.0`` of 1L: MaxMin of neighbours, half the channels, PixelUnshuffle.

    Its code has ``epsilon`` = 1e-6 in D.
    """
    c, tensors = 4, {}
    steps: list[Callable[[Tensor], Tensor]] = [lambda x: functional.pad(x, (0, 0, 0, 0, 0, 1))]

    def convolution(path: str, channels: int, k: int) -> None:
        weight, bias = draw(channels, channels, k, k), draw(channels)
        tensors[f"{path}.parametrizations.weight.original"], tensors[f"{path}.bias"] = weight, bias
        sums = torch.zeros(channels)
        for i, j in itertools.product(range(channels), repeat=2):
            shifts = functional.conv2d(weight[None, :, i], weight[:, j][:, None], padding=k - 1, groups=channels)
            sums[i] += shifts.sum(1).abs().sum()
        P = weight / (sums + epsilon).sqrt()[None, :, None, None]

        def step(x: Tensor) -> Tensor:
            p = k // 2
            return functional.conv2d(functional.pad(x, (p, p, p, p), mode="circular"), P, bias)

        steps.append(step)

    def max_min(x: Tensor) -> Tensor:
        a, b = x[:, ::2], x[:, 1::2]
        return torch.stack([torch.maximum(a, b), torch.minimum(a, b)], 2).reshape(x.shape)

    convolution("FirstConv", c, 1)
    steps.append(max_min)
    for block, k in ((1, 3), (2, 1)):
        for layer in range(2):
            convolution(f"Block{block}.{2 * layer}", c, k)
            steps.append(max_min)
        steps.append(lambda x: functional.pixel_unshuffle(x[:, : x.shape[1] // 2], 2))
        c *= 2
    convolution("ClassificationHead.0", c, 1)
    steps.append(lambda x: functional.adaptive_max_pool2d(x, 1).flatten(1)[:, :5])

    def function(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return Public(tensors, function, (3, 4, 4), {"in_channels": 3, "classes": 5}, "aol")


# --- what is written opens -----------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[], Public]] = {
    "lben psi": lambda: lben("psi", 1.5, 0.3),
    "lben psi, tanh": lambda: lben("psi", 0.4, 1.0, "tanh"),
    "lben Lambda": lambda: lben("Lambda", 1.5, 0.3),
    "lben Lambda, tanh": lambda: lben("Lambda", 0.4, 1.0, "tanh"),
    "mondeq": lambda: mondeq("mondeq", 0.7),
    "mondeq, tanh": lambda: mondeq("mondeq", 1.0, "tanh"),
    "g_mondeq psi": lambda: mondeq("psi", 0.7),
    "g_mondeq Lambda": lambda: mondeq("Lambda", 1.0, "tanh"),
    "sll PC": lambda: residual_network("sll", "PC"),
    "sll PC images": lambda: residual_network("sll", "PC", (6, 4)),
    "sll SL": lambda: residual_network("sll", "SL"),
    "sll SL images": lambda: residual_network("sll", "SL", (4, 6)),
    "sll LB": lambda: residual_network("sll", "LB", sigma="tanh"),
    "sll LB images": lambda: residual_network("sll", "LB", (4, 4)),
    "cpl CP": lambda: residual_network("cpl", "CP"),
    "cpl CP images": lambda: residual_network("cpl", "CP", (4, 4)),
    "cpl 1L": lambda: residual_network("cpl", "1L", inputs=6),
    "cpl 1L images": lambda: residual_network("cpl", "1L", (4, 6)),
    "sandwich": lambda: sandwich(),
    "sandwich with Q": lambda: sandwich(lazy=True, gamma=0.5, sigma="tanh"),
    "sandwich normalised head": lambda: sandwich(head=True),
    "sandwich images": lambda: sandwich(image=8),
    "sandwich images, normalised head": lambda: sandwich(image=4, head=True, gamma=1.0),
    "aol": lambda: aol(),
    "aol gamma": lambda: aol(3.0, "tanh"),
    "aol 1L images": lambda: compared_aol(),
}


@pytest.fixture(params=LAYOUTS)
def public(request: pytest.FixtureRequest) -> Public:
    return LAYOUTS[request.param]()


def opened(public: Public, **changes: Any) -> nn.Module:
    return lc.from_state_dict(public.tensors, public.options | changes)


def written(public: Public, folder: Any) -> Iterator[Any]:
    """The tensors in every container and with every wrapper that training scripts leave."""
    tensors = {name: value.contiguous() for name, value in public.tensors.items()}
    wrapped = {f"module.{name}": value for name, value in tensors.items()}
    contents = {
        "plain.pt": tensors,
        "w.params": tensors,
        "model.ckpt-3.pth": {"epoch": 3, "global_step": 9, "model_state_dict": wrapped, "optimizer_state_dict": {}},
        "lightning.pth": {"state_dict": wrapped},
        "backbone.pt": {"backbone": {f"module.model.{name}": value for name, value in tensors.items()}},
    }
    for name, content in contents.items():
        torch.save(content, folder / name)
        yield folder / name
    save_file(wrapped, folder / "w.safetensors")  # which sorts its names
    yield folder / "w.safetensors"


def test_it_is_the_network_of_its_code(public: Public, tmp_path):
    x = draw(6, *public.shape)
    expected = public.function(x)
    assert float(expected.std()) > 1e-3
    for path in written(public, tmp_path):
        model = lc.from_state_dict(lc.read_weights(path), public.options)
        with torch.no_grad():
            assert float((model(x) - expected).abs().max()) < TOLERANCE, path.name


def test_it_converts_to_the_network_of_its_code(public: Public):
    model = opened(public)
    assert tuple(model.input_shape) == public.shape
    x = draw(6, *public.shape)
    net = lc.convert(model, dense=public.dense)  # validates itself
    with torch.no_grad():
        assert float((net(x) - public.function(x)).abs().max()) < TOLERANCE
        near = x + draw(*x.shape, scale=0.1)
        slope = (public.function(near) - public.function(x)).norm(dim=1) / (near - x).flatten(1).norm(dim=1)
    assert float(slope.max()) <= net.lipschitz * (1 + 1e-9)


def test_condition_10_holds(public: Public):
    conditions = lc.check(lc.to_dae(opened(public), dense=public.dense))
    assert conditions.condition_10
    assert conditions.well_posed


def test_float32_files_give_float32_models(public: Public):
    small = {name: value.float() for name, value in public.tensors.items()}
    model = lc.from_state_dict(small, public.options)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    x = draw(6, *public.shape)
    with torch.no_grad():
        assert float((model.double()(x) - public.function(x)).abs().max()) < 1e-2


# --- what does not open --------------------------------------------------------------------------------------------------


def test_every_missing_option_is_asked_for_by_name(public: Public):
    for missing in public.options:
        given = {name: value for name, value in public.options.items() if name != missing}
        with pytest.raises(lc.MissingOptionError, match=f"--option {missing}=") as caught:
            lc.from_state_dict(public.tensors, given)
        assert (caught.value.plugin, caught.value.option) == (public.plugin, missing)


def test_options_nobody_asked_for_are_refused(public: Public):
    with pytest.raises(lc.InvalidParameterError, match="option 'surprise'"):
        opened(public, surprise=1)


WRONG = {
    "activation": ("gelu", "gelu|GELU"),
    "lipschitz": (-1.0, "lipschitz"),
    "epsilon": (-1.0, "epsilon"),
    "m": (-1.0, r"\bm\b|epsilon"),
    "q": ("log", "option 'q' is 'log', but it must be abs or exp"),
    "padding_mode": ("reflect", "padding_mode"),
    "image": ("10x4", "image|features|shape"),
    "in_channels": (9, "in_channels|tensor"),
    "pool": (4, "pool|shape"),
    "classes": (99, "classes"),
    "inputs": (99, "inputs"),
}


def test_options_that_do_not_fit_are_named(public: Public):
    for option in public.options:
        value, said = WRONG[option]
        with pytest.raises(lc.LipconvertError, match=said) as caught:
            lc.convert(opened(public, **{option: value}), dense=public.dense)
        assert not isinstance(caught.value, lc.PluginError), option
    numbers = [option for option in public.options if option not in ("q", "padding_mode", "activation", "image")]
    for option in numbers:
        with pytest.raises(lc.InvalidParameterError, match=f"option {option!r} is 'many'"):
            opened(public, **{option: "many"})


def carries(name: str, public: Public) -> bool:
    """Whether a network without this tensor is not the network: what is left when a power iteration is not read."""
    last = name.rpartition(".")[2]
    return not (public.plugin == "cpl" and last in ("u", "alpha")) and last != "Q"


def test_every_missing_tensor_is_named(public: Public):
    for name in public.tensors:
        if not carries(name, public):
            continue
        rest = {other: value for other, value in public.tensors.items() if other != name}
        last = name.rpartition(".")[2]
        with pytest.raises(lc.WeightsError, match=rf"{last}|no plugin recognises"):
            lc.from_state_dict(rest, public.options)


def first_weight(public: Public) -> str:
    """The tensor whose columns are the inputs, "" where an option or another tensor says how many there are."""
    if any(name.endswith(".Q") for name in public.tensors):
        return ""
    names = {
        "lben": "B.weight",
        "mondeq": "U.weight",
        "g_mondeq": "U.weight",
        "sandwich": "0.weight",
        "aol": "0.weights",
    }
    end = names.get(public.plugin, "?") if len(public.shape) == 1 else "?"
    return next((name for name in public.tensors if name.endswith(end)), "")


def test_every_tensor_of_a_wrong_shape_is_named(public: Public):
    for name, value in public.tensors.items():
        last = name.rpartition(".")[2]
        if last in ("u", "eval_sv_max") or (public.plugin == "cpl" and last == "alpha"):
            continue
        changed = public.tensors | {name: torch.cat([value.reshape(-1), value.reshape(-1), draw(1)])}
        with pytest.raises(lc.LipconvertError, match=r"shape|no plugin|rows"):
            lc.from_state_dict(changed, public.options)
        if value.dim() > 1:
            narrower = public.tensors | {name: value[:, :-1].clone()}
            if name == first_weight(public):  # it says how many inputs there are
                assert tuple(lc.from_state_dict(narrower, public.options).input_shape) == (public.shape[0] - 1,)
                continue
            with pytest.raises(lc.LipconvertError, match=r"shape|no plugin|rows|alpha") as caught:
                lc.from_state_dict(narrower, public.options)
            assert not isinstance(caught.value, lc.PluginError)


def test_nan_is_named(public: Public):
    for name, value in public.tensors.items():
        if not carries(name, public) or name.endswith("eval_sv_max"):
            continue
        bad = value.clone()
        bad.view(-1)[0] = float("nan")
        with pytest.raises(lc.LipconvertError):
            lc.convert(lc.from_state_dict(public.tensors | {name: bad}, public.options), dense=public.dense)


@pytest.mark.parametrize("code", ["PC", "SL", "LB"])
def test_the_file_does_not_say_what_q_is(code):
    """The same tensors are two networks: neither is taken without being told."""
    public = residual_network("sll", code)
    with pytest.raises(lc.MissingOptionError, match=r"q \(abs where T is made of \|q\|, exp"):
        lc.from_state_dict(public.tensors, {k: v for k, v in public.options.items() if k != "q"})
    x = draw(6, *public.shape)
    other = {"abs": "exp", "exp": "abs"}[public.options["q"]]
    with torch.no_grad():
        assert float((opened(public, q=other)(x) - public.function(x)).abs().max()) > 1e-3


def test_a_zero_q_is_refused_where_t_divides_by_it():
    public = residual_network("sll", "PC")
    name = "module.model.denses.1.q"
    public.tensors[name][[0, 3]] = 0.0
    with pytest.raises(lc.InvalidParameterError, match=r"tensor 'module\.model\.denses\.1\.q' is 0 in 2 of 5 entries"):
        opened(public)
    opened(public, q="exp")


def test_even_kernels_are_no_residual_layers():
    public = residual_network("sll", "PC", (6, 4))
    name = "module.model.convs.0.kernel"
    with pytest.raises(lc.ShapeError, match="odd"):
        lc.from_state_dict(public.tensors | {name: draw(4, 3, 2, 2)}, public.options)


def test_zero_padding_is_converted_on_flattened_images_only():
    public = residual_network("sll", "SL", (4, 6))
    with pytest.raises(lc.UnsupportedModuleError, match="padding_mode"):
        lc.convert(opened(public))


def test_a_transform_of_other_weights_is_refused():
    public = sandwich(lazy=True)
    public.tensors["model.0.Q"] += 1e-3
    with pytest.raises(lc.WeightsError, match=r"'model\.0\.Q' is not the Cayley transform .* 1\.0e-03"):
        opened(public)


def test_sandwich_convolutions_before_their_first_forward_pass_have_no_norm():
    public = sandwich(image=8)
    del public.tensors["model.1.alpha"]
    with pytest.raises(lc.WeightsError, match=r"'model\.1\.alpha' is missing.*first forward pass"):
        opened(public)


def test_linear_layers_stand_last_in_a_sandwich_network():
    public = sandwich()
    del public.tensors["model.0.psi"]
    with pytest.raises(lc.WeightsError, match=r"'model\.0\.psi' is missing: only the last"):
        opened(public)


def test_aol_convolutions_that_divide_output_channels_are_refused():
    public = aol()
    tensors = {"model.0.kernel": draw(4, 2, 3, 3), "model.0.bias": draw(4)}
    tensors |= {name.replace("model.", "model.5"): value for name, value in public.tensors.items()}
    with pytest.raises(lc.WeightsError, match=r"'model\.0\.kernel' .* no AOLConv2d"):
        lc.from_state_dict(tensors, public.options)


def test_two_diagonals_are_one_too_many():
    for public in (lben("psi", 1.0, 0.3), mondeq("psi", 0.5)):
        tensors = public.tensors | {"mon.linear_module.Lambda": torch.ones(7)}
        with pytest.raises(lc.WeightsError, match="both 'psi'"):
            lc.from_state_dict(tensors, public.options)


def test_a_diagonal_must_be_positive():
    for public in (lben("Lambda", 1.0, 0.3), mondeq("Lambda", 0.5)):
        public.tensors["mon.linear_module.Lambda"][2] = 0.0
        with pytest.raises(lc.InvalidParameterError, match="'Lambda' is 0"):
            opened(public)


def test_two_weights_in_one_layer_are_one_too_many():
    public = residual_network("sll", "PC")
    tensors = public.tensors | {"module.model.denses.0.weight": draw(4, 6)}
    with pytest.raises(lc.WeightsError, match="not both"):
        lc.from_state_dict(tensors, public.options)


def test_a_wrong_constant_is_another_network_that_nothing_contradicts():
    """W is rebuilt from whatever γ and m are given, so that condition (10) holds: only the outputs tell."""
    x = draw(6, 5)
    for public, changes in (
        (lben("psi", 1.5, 0.3), {"lipschitz": 3.0}),
        (lben("Lambda", 1.5, 0.3), {"m": 0.6}),
        (mondeq("mondeq", 0.7), {"m": 1.4}),
        (sandwich(), {"lipschitz": 1.0}),
        (aol(2.0), {"lipschitz": 1.0}),
    ):
        model = opened(public, **changes)
        assert lc.check(lc.to_dae(model)).condition_10
        with torch.no_grad():
            assert float((model(x) - public.function(x)).abs().max()) > 1e-3


def test_epsilon_of_the_older_layout_is_asked_for_as_its_m():
    """ε = m/2 there: the name of the other form is refused, not misread."""
    public = lben("Lambda", 1.5, 0.3)
    options = {"epsilon" if name == "m" else name: value for name, value in public.options.items()}
    with pytest.raises(lc.MissingOptionError, match="--option m="):
        lc.from_state_dict(public.tensors, options)
    with pytest.raises(lc.InvalidParameterError, match="option 'epsilon'"):
        opened(public, epsilon=0.3)


@pytest.mark.parametrize("order", [lambda n: sorted(n), lambda n: sorted(n, reverse=True)], ids=["sorted", "reversed"])
def test_the_order_of_a_file_does_not_matter(order):
    """More than ten layers: their numbers are counted, not spelt."""
    tensors, x = {}, draw(4, 6)
    expected = x
    for k in range(12):
        W, b, q = draw(5, 6), draw(5), draw(5)
        tensors |= {f"convs.{k}.weights": W, f"convs.{k}.bias": b, f"convs.{k}.q": q}
        expected = residual(expected, W, b, sll_T(W, q.abs()), torch.relu)
    model = lc.from_state_dict(
        {name: tensors[name] for name in order(tensors)},
        {"q": "abs", "inputs": 6, "classes": 6, "activation": "relu"},
    )
    with torch.no_grad():
        assert float((model(x) - expected).abs().max()) < TOLERANCE


def test_norms_from_a_power_iteration_are_not_believed():
    """A layer that divides by an estimate from below is not 1-Lipschitz; ours, from the same file, is."""
    public = residual_network("cpl", "1L", inputs=6)
    for name in public.tensors:
        if name.endswith(".u"):
            public.tensors[name] = torch.zeros_like(public.tensors[name])
    x = draw(4, *public.shape)
    with torch.no_grad():
        assert float((opened(public)(x) - public.function(x)).abs().max()) < TOLERANCE


def test_the_epsilon_of_a_code_moves_the_outputs_by_as_much():
    public = compared_aol(epsilon=1e-6)
    x = draw(6, *public.shape)
    with torch.no_grad():
        gap = float((opened(public)(x) - public.function(x)).abs().max())
    assert 1e-9 < gap < 1e-4


def test_convolutions_with_borders_of_zero_are_refused():
    """The public MonDEQ code zeroes the border pixels of its states after each step."""
    tensors = {"g": torch.tensor(1.0), "h": torch.tensor(1.0), "U.weight": draw(4, 1, 3, 3), "U.bias": draw(4)}
    tensors |= {"A.weight": draw(4, 4, 3, 3), "B.weight": draw(4, 4, 3, 3)}
    tensors = {f"mon.linear_module.{name}": value for name, value in tensors.items()}
    tensors |= {"Wout.weight": draw(10, 16), "Wout.bias": draw(10)}
    with pytest.raises(lc.WeightsError, match="border"):
        lc.from_state_dict(tensors, {"m": 1.0, "activation": "relu"})
    tensors["mon.linear_module.psi"] = torch.zeros(1, 4, 1, 1)
    with pytest.raises(lc.WeightsError, match="border"):
        lc.from_state_dict(tensors, {"m": 1.0, "activation": "relu"})


@pytest.mark.parametrize(
    "names",
    [
        {"a.weight": (2, 2, 3, 3), "b.scale": (2,)},
        {"a.bias": (2,), "b.scale": (2,)},
        {"a.weights": (2, 2), "a.bias": (2,), "b.running": (2,)},
        {"a.weight": (2, 2), "a.bias": (2,), "b.weight": (2, 2), "b.bias": (2,)},
        {"attention.q": (2, 2), "attention.k": (2, 2), "out.weight": (2, 2), "out.bias": (2,)},
    ],
    ids=str,
)
def test_files_of_others_are_left_to_other_plugins(names):
    tensors = {name: draw(*size) for name, size in names.items()}
    with pytest.raises(lc.WeightsError, match="no plugin recognises"):
        lc.from_state_dict(tensors, {})
