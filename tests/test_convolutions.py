"""Circular convolutions: every architecture on images of every kind, against torch's own convolution and dense algebra.

Three roads that share nothing with the package: the layers' formulas with ``nn.functional.conv2d`` on circularly padded
images; dense circulant matrices, written entry by entry; numpy's full, two-sided spectrum for everything per frequency.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lipconvert_plugins import aol, cpl, g_mondeq, mondeq, sandwich, sll
from torch import Tensor, nn
from torch.nn import functional

import lipconvert as lc
from lipconvert.conversion.trace import group, trace

Image = tuple[int, int]
ONE: Image = (1, 1)

SIGMA: list[nn.Module] = [nn.ReLU(), nn.Tanh(), nn.LeakyReLU(0.2), nn.Softplus(2.0)]


# ---- the layers, written out ----------------------------------------------------------------------------------------


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, mode: str = "circular") -> Tensor:
    """torch's convolution on an image padded by (k − 1)//2 in front and k − 1 − (k − 1)//2 behind."""
    kh, kw = weight.shape[2:]
    p, r = (kh - 1) // 2, (kw - 1) // 2
    return functional.conv2d(functional.pad(x, (r, kw - 1 - r, p, kh - 1 - p), mode=mode), weight, bias, stride)


def adjoint(s: Tensor, weight: Tensor, mode: str = "circular") -> Tensor:
    """Its transpose: the kernel flipped, in and out exchanged, the padding the other way round."""
    kh, kw = weight.shape[2:]
    p, r = (kh - 1) // 2, (kw - 1) // 2
    padded = functional.pad(s, (kw - 1 - r, r, kh - 1 - p, p), mode=mode)
    return functional.conv2d(padded, weight.flip(2, 3).transpose(0, 1))


def dense(weight: Tensor, image: Image, zeros: bool = False) -> Tensor:
    """The matrix of `conv` on flattened images, (out·h·w, in·h·w), entry by entry: taps that meet add up."""
    (out, into, kh, kw), (h, w) = weight.shape, image
    M = weight.new_zeros(out, h, w, into, h, w)
    for a in range(kh):
        for b in range(kw):
            for s in range(h):
                for t in range(w):
                    row, column = s + a - (kh - 1) // 2, t + b - (kw - 1) // 2
                    if zeros and not (0 <= row < h and 0 <= column < w):
                        continue
                    M[:, s, t, :, row % h, column % w] += weight[:, :, a, b]
    return M.reshape(out * h * w, into * h * w)


def circulant(weight: Tensor, image: Image) -> Tensor:
    """`dense` for large images: its rows are shifts of one another."""
    (out, into, kh, kw), (h, w) = weight.shape, image
    first = weight.new_zeros(out, into, h, w)
    for a in range(kh):
        for b in range(kw):
            first[:, :, (a - (kh - 1) // 2) % h, (b - (kw - 1) // 2) % w] += weight[:, :, a, b]
    rows = [first.roll((s, t), (2, 3)).reshape(out, into * h * w) for s in range(h) for t in range(w)]
    return torch.stack(rows, 1).reshape(out * h * w, into * h * w)


def gershgorin(weight: Tensor) -> Tensor:
    """Σ_s |Σ_ca K_i[c, a] K_j[c, a + s]| over the shifts of a torus of (2k − 1)² pixels, where none of them meet."""
    kh, kw = weight.shape[2:]
    wide = functional.pad(weight, (0, kw - 1, 0, kh - 1))
    shifts = [(s, t) for s in range(2 * kh - 1) for t in range(2 * kw - 1)]
    return sum(torch.einsum("icab,jcab->ij", wide, wide.roll(s, (2, 3))).abs() for s in shifts)  # type: ignore[return-value]


def four(weight: Tensor) -> Tensor:
    """A dense layer is a 1×1 convolution on images of one pixel."""
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def norm_on(weight: Tensor, image: Image) -> Tensor:
    h, w = image
    first = circulant(weight, image).reshape(len(weight), h, w, weight.shape[1], h, w)[:, 0, 0]
    return torch.linalg.svdvals(torch.fft.fft2(first).permute(2, 3, 0, 1)).max()


def T_of(layer: nn.Module, image: Image) -> Tensor:
    weight = four(layer.weight)
    if isinstance(layer, cpl.CPLLinear | cpl.CPLConv2d):
        return norm_on(weight, image).square().expand(len(weight))
    q = layer.log_q.exp()
    return (gershgorin(weight) * q / q[:, None]).sum(1)  # (9)


def P_of(layer: nn.Module) -> Tensor:
    weight = four(layer.weight)
    return weight * gershgorin(weight.transpose(0, 1)).sum(1).rsqrt()[:, None, None]  # (8)


def AB_of(layer: nn.Module, image: Image) -> tuple[Tensor, Tensor]:
    """The Cayley transform of the dense circulant matrix: real, out·h·w square, no Fourier transform."""
    weight = layer.alpha / layer.weight.square().sum().sqrt() * four(layer.weight)
    n = len(weight) * image[0] * image[1]
    M, eye = circulant(weight, image).T, torch.eye(n)
    X, Y = M[:n], M[n:]
    Z = X - X.T + Y.T @ Y
    inverse = torch.linalg.inv(eye + Z)
    return (inverse @ (eye - Z)).T, (-2.0 * Y @ inverse).T


def monotone_of(layer: nn.Module, image: Image) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, U, G and Φ of (5), (6) as dense matrices."""
    A, B, U = (circulant(layer.get_submodule(k).weight, image) for k in "ABU")
    pixels = image[0] * image[1]
    phi = (layer.log_phi.exp() if hasattr(layer, "log_phi") else torch.ones(layer.A.out_channels)).repeat_interleave(
        pixels
    )
    eye = torch.eye(len(phi))
    G = eye if layer.Wout is None else circulant(layer.Wout.weight, image)
    if layer.prescribed is not None:
        U = layer.m * layer.prescribed * phi[:, None] * U / torch.linalg.matrix_norm(U, 2)
        G = G if layer.Wout is None else G / torch.linalg.matrix_norm(G, 2)
    W = eye - phi[:, None] * (A.T @ A + B.T - B + layer.m * eye)
    return W, U, G, phi


@torch.enable_grad()
def newton(W: Tensor, u: Tensor, sigma: nn.Module) -> Tensor:
    """z = σ(Wz + u) for each row of u, by Newton with backtracking; one more step carries the gradient."""
    rows, eye = [], torch.eye(len(W))
    for drive in u:
        M, c = W.detach(), drive.detach()
        z = torch.zeros(len(c))
        for _ in range(200):
            v = (M @ z + c).requires_grad_(True)
            value = sigma(v)
            (slope,) = torch.autograd.grad(value.sum(), v)
            residual = (z - value).detach()
            size = float(residual.norm())
            system = eye - slope[:, None] * M
            if size <= 1e-14 * (1.0 + float(z.norm())):
                break
            step, t = torch.linalg.solve(system, residual), 1.0
            with torch.no_grad():
                while t > 1e-6 and float((z - t * step - sigma(M @ (z - t * step) + c)).norm()) > size:
                    t *= 0.5
            if t <= 1e-6:
                break
            z = z - t * step
        assert size <= 1e-12 * (1.0 + float(z.norm())), "the reference did not converge"
        if W.requires_grad or u.requires_grad:
            z = z - torch.linalg.inv(system).detach() @ (z - sigma(W @ z + drive))
        rows.append(z)
    return torch.stack(rows)


def spread(b: Tensor | None, rows: int, image: Image) -> Tensor:
    """A bias, the same in every pixel of a channel, on flattened images."""
    return (torch.zeros(rows) if b is None else b).repeat_interleave(image[0] * image[1])


def plain(module: nn.Module, x: Tensor) -> Tensor:
    """What a module computes, by the formula of its paper."""
    if x.dim() == 2 and isinstance(module, sll.SLLLinear | cpl.CPLLinear | aol.AOLLinear | sandwich.SandwichLinear):
        return _plain(module, x[:, :, None, None]).flatten(1)
    return _plain(module, x)


def _plain(module: nn.Module, x: Tensor) -> Tensor:
    image: Image = (x.shape[2], x.shape[3]) if x.dim() == 4 else ONE
    if isinstance(module, nn.Sequential):
        for child in module:
            x = plain(child, x)
        return x
    if isinstance(module, sll.SLLLinear | sll.SLLConv2d | cpl.CPLLinear | cpl.CPLConv2d):
        weight = four(module.weight)
        mode = "constant" if getattr(module, "padding_mode", "") == "zeros" else "circular"
        s = module.activation(conv(x, weight, module.bias, mode=mode))
        return x - 2.0 * adjoint(s / T_of(module, image)[:, None, None], weight, mode)
    if isinstance(module, aol.AOLConv2d) and module.stride > 1:
        return module(x)  # see test_strided_AOL
    if isinstance(module, aol.AOLLinear | aol.AOLConv2d):
        mode = "constant" if getattr(module, "padding_mode", "") == "zeros" else "circular"
        return conv(x, P_of(module), module.bias, mode=mode)
    if isinstance(module, sandwich.SandwichLinear | sandwich.SandwichConv2d):
        x = functional.pixel_unshuffle(x, getattr(module, "stride", 1))
        image = (x.shape[2], x.shape[3])
        A, B = AB_of(module, image)
        out, bias = len(module.weight), spread(module.bias, len(module.weight), image)
        if module.activation is None:
            y = module.scale * x.flatten(1) @ B.T + bias
        else:
            phi = module.psi.exp().repeat_interleave(image[0] * image[1])
            v = 2.0**0.5 * module.scale * (x.flatten(1) @ B.T) / phi + bias
            y = 2.0**0.5 * (module.activation(v) * phi) @ A
        return y.reshape(len(x), out, *image)
    if isinstance(module, mondeq.MonDEQConv2d | g_mondeq.GMonDEQConv2d):
        W, U, G, _ = monotone_of(module, image)
        z = newton(W, x.flatten(1) @ U.T + spread(module.U.bias, len(module.U.weight), image), module.activation)
        y = z @ G.T + (0.0 if module.Wout is None else spread(module.Wout.bias, len(module.Wout.weight), image))
        return y.reshape(len(x), -1, *image)
    if isinstance(module, lc.Normalize):
        return (x - module.mean.reshape(-1, *[1] * (x.dim() - 2))) / module.std.reshape(-1, *[1] * (x.dim() - 2))
    if isinstance(module, lc.PadChannels):
        return torch.cat([x, x.new_zeros(len(x), module.channels - x.shape[1], *x.shape[2:])], 1)
    if isinstance(module, lc.FirstFeatures):
        return x[:, : module.features]
    if isinstance(module, lc.MeanPool | nn.AvgPool2d):
        k = int(module.kernel_size)
        total = x.unflatten(3, (-1, k)).unflatten(2, (-1, k)).sum((3, 5))
        return total / (k if isinstance(module, lc.MeanPool) else module.divisor_override or k * k)
    if isinstance(module, lc.MaxMin):
        a, b = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        return torch.cat([torch.where(a > b, a, b), torch.where(a > b, b, a)], 1)
    assert type(module) in (
        nn.Flatten,
        nn.Linear,
        nn.PixelUnshuffle,
        nn.PixelShuffle,
        nn.Conv2d,
        *map(type, SIGMA),
    ) or hasattr(module, "parametrizations")
    return module(x)  # torch's own


# ---- the formulas of W, U, G and Λ, on whatever an operator is ----------------------------------------------------------

Form = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # W, U, G (..., n, m), Λ (n,)


def blocks(rows: list[list[np.ndarray | int]], like: np.ndarray) -> np.ndarray:
    """np.block for batches; an int is the width of a zero block."""
    heights = [next(b.shape[-2] for b in row if not isinstance(b, int)) for row in rows]
    full = [
        np.concatenate([np.zeros((*like.shape[:-2], k, b), like.dtype) if isinstance(b, int) else b for b in row], -1)
        for k, row in zip(heights, rows, strict=True)
    ]
    return np.concatenate(full, -2)


def H(M: np.ndarray) -> np.ndarray:
    return np.conj(np.swapaxes(M, -1, -2))


def eye(n: int, like: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.eye(n, dtype=like.dtype), (*like.shape[:-2], n, n))


def residual_form(K: list[np.ndarray], T: list[np.ndarray]) -> Form:
    """(13)–(15): rows W_n′[I, −R_0, …, −R_{n−1}], R = 2WT⁻¹; K holds W_n′. (FORMULAS 1.1)"""
    d, sizes = K[0].shape[-1], [k.shape[-2] for k in K]
    R = [2.0 * H(k) / t for k, t in zip(K, T, strict=True)]
    one = eye(d, K[0])
    rows: list[list[np.ndarray | int]] = [[0.0 * one, *sizes]]
    for n, k in enumerate(K):
        rows.append([k, *[-k @ R[m] for m in range(n)], *sizes[n:]])
    U = np.concatenate([one, *[0.0 * k for k in K]], -2)
    Lambda = np.concatenate([np.ones(d), *[2.0 / t for t in T]])
    return blocks(rows, K[0]), U, np.concatenate([one, *[-r for r in R]], -1), Lambda


def chain_form(first: np.ndarray, links: list[np.ndarray], last: np.ndarray, Lambda: np.ndarray) -> Form:
    """A chain: each row reads the one before it, the first reads x, the output reads the last."""
    sizes = [first.shape[-2], *[link.shape[-2] for link in links]]
    rows: list[list[np.ndarray | int]] = [[0.0 * eye(sizes[0], first), *sizes[1:]]]
    for n, link in enumerate(links):
        rows.append([*sizes[:n], link, *sizes[n + 1 :]])
    below = [np.zeros((*first.shape[:-2], size, first.shape[-1]), first.dtype) for size in sizes[1:]]
    before = [np.zeros((*last.shape[:-2], last.shape[-2], size), last.dtype) for size in sizes[:-1]]
    return blocks(rows, first), np.concatenate([first, *below], -2), np.concatenate([*before, last], -1), Lambda


def form_of(layers: list[nn.Module], image: Image, as_dense: bool) -> Form:
    """(W, U, G, Λ) of FORMULAS 1.1–1.4 for a chain of one architecture: dense circulant matrices, or all frequencies."""
    repeat = image[0] * image[1] if as_dense else 1

    def operator(weight: Tensor) -> np.ndarray:
        weight = four(weight).detach()
        return dense(weight, image).numpy() if as_dense else spectrum(circulant(weight, image), image)

    def diagonal(values: Tensor) -> np.ndarray:
        return values.detach().repeat_interleave(repeat).numpy()

    first = layers[0]
    if isinstance(first, sll.SLLConv2d | cpl.CPLConv2d):
        return residual_form([operator(k.weight) for k in layers], [diagonal(T_of(k, image)) for k in layers])
    if isinstance(first, aol.AOLConv2d):
        P = [operator(P_of(layer)) for layer in layers]
        return chain_form(P[0], P[1:], eye(P[-1].shape[-2], P[-1]), np.ones(sum(p.shape[-2] for p in P)))
    if isinstance(first, sandwich.SandwichConv2d):
        pairs = [[M.detach() for M in AB_of(layer, image)] for layer in layers]
        AB = [[M.numpy() if as_dense else spectrum(M, image) for M in pair] for pair in pairs]
        phi = [diagonal(layer.psi.exp()) for layer in layers]
        links = [
            2.0 * (AB[n][1] @ H(AB[n - 1][0])) * phi[n - 1] / phi[n][:, None] for n in range(1, len(layers))
        ]  # 2Φ_n⁻¹ B_n A_{n−1}′ Φ_{n−1}
        U = 2.0**0.5 * first.scale * AB[0][1] / phi[0][:, None]
        return chain_form(U, links, 2.0**0.5 * H(AB[-1][0]) * phi[-1], np.concatenate(phi) ** 2 / first.scale)
    matrices = [M.detach() for M in monotone_of(first, image)]
    W, U, G = (M.numpy() if as_dense else spectrum(M, image) for M in matrices[:3])
    phi = diagonal(first.log_phi.exp() if hasattr(first, "log_phi") else torch.ones(first.A.out_channels))
    n_U, n_G = np.linalg.norm(U / phi[:, None], 2, axis=(-2, -1)).max(), np.linalg.norm(G, 2, axis=(-2, -1)).max()
    return W, U, G, n_G / n_U / phi


def spectrum(M: Tensor, image: Image) -> np.ndarray:
    """All h·w matrices of a circulant one: conj of the two-sided DFT of its kernel. (FORMULAS 4)"""
    h, w = image
    kernel = M.reshape(-1, h, w, M.shape[1] // (h * w), h, w)[:, 0, 0].detach().numpy()
    return np.moveaxis(np.conj(np.fft.fft2(kernel)), (2, 3), (0, 1)).reshape(h * w, *kernel.shape[:2])


def rebuilt(stage: lc.LBEN) -> Form:
    """(2) written out in numpy at every frequency, from the free parameters of a stage."""
    h, w = stage.grid.image
    kernels = [getattr(stage, name).detach().numpy() for name in "GUVS"]
    G, U, V, S = (np.moveaxis(np.conj(np.fft.fft2(K)), (2, 3), (0, 1)).reshape(h * w, *K.shape[:2]) for K in kernels)
    Psi, L = np.exp(stage.log_psi.detach().numpy()), stage.lipschitz
    PU = U / Psi[:, None]
    inner = (H(G) @ G + PU @ H(PU)) / (2.0 * L) + H(V) @ V + S - H(S) + stage.epsilon * np.eye(len(Psi))
    return np.eye(len(Psi)) - Psi[:, None] * inner, U, G, 1.0 / Psi


def least_of_H(form: Form, L: float) -> float:
    """λ_min of (10) over all frequencies, relative to max(1, max Λ)."""
    W, U, G, Lambda = form
    LU, LW = Lambda[:, None] * U, Lambda[:, None] * W
    M = 2.0 * np.diag(Lambda) - LW - H(LW) - (H(G) @ G + LU @ H(LU)) / L
    return float(np.linalg.eigvalsh(0.5 * (M + H(M))).min()) / max(1.0, Lambda.max())


def gauged(W: np.ndarray, Lambda: np.ndarray) -> float:
    """The largest Frobenius norm in the gauge Λ = I."""
    root = np.sqrt(Lambda)
    return float(np.linalg.norm(root[:, None] * W / root, axis=(-2, -1)).max())


# ---- models -----------------------------------------------------------------------------------------------------------


def shaken(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.dim() > 1 and "parametrizations" not in name:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def build(
    kind: str, depth: int, channels: int, kernel: int | tuple[int, int], sigma: nn.Module = SIGMA[0], seed: int = 0
) -> nn.Sequential:
    """A chain of convolutions with biases, for images of some channels; widths change wherever they may."""
    torch.manual_seed(seed)
    widths = [channels] + [1 + (channels + 2 * k + 1) % max(channels, 2) for k in range(1, depth + 1)]
    model = nn.Sequential()
    for k in range(depth):
        into, out = widths[k], widths[k + 1]
        if kind in ("sll", "cpl"):
            model.append((sll.SLLConv2d if kind == "sll" else cpl.CPLConv2d)(channels, out, kernel, activation=sigma))
        elif kind == "aol":
            model.append(aol.AOLConv2d(into, out, kernel))
            model.append(copy.deepcopy(sigma))
        elif kind == "sandwich":
            scale = 1.7 if k == 0 else 1.0
            model.append(sandwich.SandwichConv2d(into, out, kernel, activation=sigma, scale=scale))
        else:
            model.append(
                (mondeq.MonDEQConv2d if kind == "mondeq" else g_mondeq.GMonDEQConv2d)(
                    into,
                    max(2, out),
                    None if seed % 3 == 1 else 1 + seed % 3,
                    kernel,
                    m=0.5 + 0.2 * seed,
                    lipschitz=1.5 if seed % 3 == 2 else None,
                    activation=sigma,
                )
            )
    return shaken(model)  # type: ignore[return-value]


def layers_of(model: nn.Sequential) -> list[nn.Module]:
    return [layer for layer in model if type(layer) not in map(type, SIGMA)]


EXPLICIT = ("sll", "cpl", "aol", "sandwich")
EQUILIBRIUM = ("mondeq", "g_mondeq")
KINDS = (*EXPLICIT, *EQUILIBRIUM)
CONVS = {
    "sll": sll.SLLConv2d,
    "cpl": cpl.CPLConv2d,
    "aol": aol.AOLConv2d,
    "sandwich": sandwich.SandwichConv2d,
    "mondeq": mondeq.MonDEQConv2d,
    "g_mondeq": g_mondeq.GMonDEQConv2d,
}

# Image, depth, channels, kernel: every image, every depth, kernels 1 to 5, 1 to 8 channels.
Kernel = int | tuple[int, int]
CASES: list[tuple[Image, int, int, Kernel]] = [
    ((8, 8), 1, 8, 3),
    ((8, 8), 4, 2, 5),
    ((7, 7), 2, 4, 4),
    ((8, 7), 3, 5, 2),
    ((9, 6), 4, 3, 1),
    ((9, 6), 1, 7, (3, 2)),
    ((12, 5), 2, 6, 5),
    ((33, 17), 3, 1, 4),
    ((33, 17), 1, 2, 3),
]
# What a conversion promises: outputs, relative; W in the gauge Λ = I, relative to max(1, ‖W‖); H, relative to max(1, ‖Λ‖).
OUTPUT, REBUILT, LEAST = 1e-10, 1e-12, -1e-12


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max()) / (float(expected.abs().max()) or 1.0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "case"),
    [(kind, case) for kind in KINDS for case in range(len(CASES))],
)
def test_every_architecture_on_every_image(kind: str, case: int) -> None:
    """Outputs, W, U, G, Λ, H and L of a whole chain as one stage on the grid of its images."""
    image, depth, channels, kernel = CASES[case]
    depth = depth if kind in EXPLICIT else 1
    with torch.enable_grad():
        model = build(kind, depth, channels, kernel, SIGMA[case % 4], seed=case)
        x = 2.0 * torch.randn(1 if image == (33, 17) else 2, channels, *image)
        expected = plain(model, x).detach()
    net = lc.convert(model, x.shape[1:], check=False)
    (stage,) = net.steps
    assert stage.grid.image == image
    assert relative(net(x), expected) <= OUTPUT
    assert relative(model(x), expected) <= OUTPUT  # the layers' own forward
    W, U, G, Lambda = form_of(layers_of(model), image, as_dense=False)
    found = rebuilt(stage)
    assert gauged(found[0] - W, Lambda) <= REBUILT * max(1.0, gauged(W, Lambda))
    # The half spectrum that the module works with, column by column of the whole.
    half = found[0].reshape(*image, *W.shape[1:])[:, : image[1] // 2 + 1].reshape(-1, *W.shape[1:])
    assert gauged(half - stage.W.numpy(), Lambda) <= REBUILT * max(1.0, gauged(W, Lambda))
    for matrix, reference in zip(found[1:], (U, G, Lambda), strict=True):
        np.testing.assert_allclose(matrix, reference, rtol=0.0, atol=REBUILT * max(1.0, np.abs(reference).max()))
    L = 1.7 if kind == "sandwich" else 1.0
    if kind in EQUILIBRIUM:
        phi = stage.log_psi.exp().numpy() / np.exp(stage.log_psi.numpy()).max()
        n_U = np.linalg.norm(U / phi[:, None], 2, axis=(1, 2)).max() / np.exp(_log_phi_max(model[0]))
        L = n_U * np.linalg.norm(G, 2, axis=(1, 2)).max() / model[0].m
    # An upper bound of norms, loose by round-off.
    assert net.lipschitz == pytest.approx(L, rel=1e-12)
    assert least_of_H(found, stage.lipschitz) >= LEAST
    # Tight: the layers' constants are used up, or nearly, so that a constant a thousandth smaller shows.
    if kind in ("sll", "cpl"):
        assert least_of_H(found, 0.999 * stage.lipschitz) < -1e-4


def _log_phi_max(layer: nn.Module) -> float:
    return float(layer.log_phi.max()) if hasattr(layer, "log_phi") else 0.0


def test_the_cases_meet_everything() -> None:
    assert {image for image, *_ in CASES} == {(8, 8), (7, 7), (8, 7), (9, 6), (12, 5), (33, 17)}
    assert {depth for _, depth, *_ in CASES} == {1, 2, 3, 4}
    assert {1, 2, 3, 4, 5} <= {kernel for *_, kernel in CASES}
    assert {1, 2, 3, 4, 5, 6, 7, 8} == {channels for _, _, channels, _ in CASES}


SMALL: list[tuple[Image, Kernel]] = [((3, 4), 3), ((4, 3), 2), ((4, 4), 4), ((3, 4), 5), ((2, 3), 3), ((1, 5), (1, 3))]


@torch.no_grad()
@pytest.mark.parametrize(("image", "kernel"), SMALL)
@pytest.mark.parametrize("kind", KINDS)
def test_dense_expansion_is_dense_algebra(kind: str, image: Image, kernel: Kernel) -> None:
    """Entry by entry: the formulas with dense circulant matrices, also of kernels larger than the image."""
    model = build(kind, 2 if kind in EXPLICIT else 1, 2, kernel, nn.Tanh(), seed=3 + image[0])
    grid = lc.to_dae(model, (2, *image))
    assert grid.grid == lc.Grid(image)
    dae = lc.densify(grid)
    W, U, G, Lambda = form_of(layers_of(model), image, as_dense=True)
    for found, expected in zip(dae, (W, U, G, Lambda), strict=True):
        assert not found.is_complex()
        np.testing.assert_allclose(found.numpy(), expected, rtol=0.0, atol=1e-13 * max(1.0, np.abs(expected).max()))
    # The rows in closed form: V′V = H/2, dense.
    LU = Lambda[:, None] * U
    M = 2.0 * np.diag(Lambda) - Lambda[:, None] * W - W.T * Lambda - (G.T @ G + LU @ LU.T) / dae.lipschitz
    assert dae.V is not None
    np.testing.assert_allclose((dae.V.T @ dae.V).numpy(), M / 2, rtol=0.0, atol=1e-12 * max(1.0, Lambda.max()))
    assert np.linalg.eigvalsh(M)[0] >= LEAST * max(1.0, Lambda.max())
    # Its spectrum is that of the frequencies together.
    frequencies = np.linalg.eigvalsh(_H_of(form_of(layers_of(model), image, as_dense=False), dae.lipschitz))
    np.testing.assert_allclose(np.sort(frequencies.flatten()), np.linalg.eigvalsh(M), atol=1e-12 * Lambda.max())


def _H_of(form: Form, L: float) -> np.ndarray:
    W, U, G, Lambda = form
    LU, LW = Lambda[:, None] * U, Lambda[:, None] * W
    return 2.0 * np.diag(Lambda) - LW - H(LW) - (H(G) @ G + LU @ H(LU)) / L


# ---- the constants of the layers ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kernel", [1, 2, 3, (2, 4)])
@pytest.mark.parametrize("image", [(2, 3), (3, 5), (5, 6), (6, 7), (9, 8)])
def test_T_of_SLL_is_gershgorins_bound_of_the_dense_matrix(image: Image, kernel: Kernel) -> None:
    layer = shaken(sll.SLLConv2d(2, 3, kernel))
    kh, kw = layer.weight.shape[2:]
    pixels = image[0] * image[1]
    K, q = dense(layer.weight, image), layer.log_q.exp().repeat_interleave(pixels)
    bound = ((K @ K.T).abs() * q / q[:, None]).sum(1)  # (9) of the circulant matrix
    T = layer.T(image).repeat_interleave(pixels)
    if image[0] >= 2 * kh - 1 and image[1] >= 2 * kw - 1:
        np.testing.assert_allclose(T.numpy(), bound.numpy(), rtol=1e-13)
    else:  # shifts meet and may cancel
        assert bool((bound * (1.0 - 1e-13) <= T).all())
    assert float(torch.linalg.eigvalsh(torch.diag(T) - K @ K.T)[0]) >= -1e-12 * float(T.max())
    zeros = dense(layer.weight, image, zeros=True)
    assert float(torch.linalg.eigvalsh(torch.diag(T) - zeros @ zeros.T)[0]) >= -1e-12 * float(T.max())


@torch.no_grad()
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, (3, 2)])
@pytest.mark.parametrize("image", [(3, 4), (5, 5), (8, 7)])
def test_AOL_and_CPL_norms(image: Image, kernel: Kernel) -> None:
    layer = shaken(aol.AOLConv2d(2, 3, kernel))
    P, origin = layer.P()
    assert origin == ((P.shape[2] - 1) // 2, (P.shape[3] - 1) // 2)
    norms = [float(torch.linalg.matrix_norm(dense(P, image, zeros), 2)) for zeros in (False, True)]
    assert max(norms) <= 1.0 + 1e-14
    assert norms[0] > 0.3  # and not for nothing
    convex = shaken(cpl.CPLConv2d(2, 3, kernel))
    expected = float(torch.linalg.matrix_norm(dense(convex.weight, image), 2))
    np.testing.assert_allclose(convex.norm(image).item(), expected, rtol=1e-12)
    assert convex.norm(image).item() >= expected  # rounded up
    np.testing.assert_allclose(convex.T(image).numpy(), expected**2, rtol=1e-12)
    zeros = float(torch.linalg.matrix_norm(dense(convex.weight, image, zeros=True), 2))
    convex.padding_mode = "zeros"
    assert zeros <= convex.norm(image).item() <= 3.0 * zeros


@torch.no_grad()
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("readout", [None, 2])
@pytest.mark.parametrize("lipschitz", [None, 1.5])
@pytest.mark.parametrize("kind", EQUILIBRIUM)
def test_L_of_equilibrium_models(kind: str, lipschitz: float | None, readout: int | None, kernel: int) -> None:
    """‖Φ⁻¹U‖‖G‖/m with dense norms; what is prescribed is met exactly, on images of any size."""
    model = shaken(CONVS[kind](2, 3, readout, kernel, m=0.4, lipschitz=lipschitz))
    for image in ((3, 4), (4, 5)):
        W, U, G, phi = monotone_of(model, image)
        L = float(torch.linalg.matrix_norm(U / phi[:, None], 2) * torch.linalg.matrix_norm(G, 2)) / 0.4
        dae = lc.to_dae(model, (2, *image))
        assert dae.lipschitz == pytest.approx(L, rel=1e-12)
        if lipschitz is not None:
            assert dae.lipschitz == lipschitz
        found = lc.densify(dae)
        np.testing.assert_allclose(found.W.numpy(), W.numpy(), atol=1e-13)
        np.testing.assert_allclose(found.U.numpy(), U.numpy(), atol=1e-13)
        np.testing.assert_allclose(found.G.numpy(), G.numpy(), atol=1e-13)


@pytest.mark.parametrize("image", [(4, 5), (5, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_layers(kind: str, image: Image) -> None:
    """To every parameter and the input: the layer against autograd through the plain formula."""
    model = build(kind, 1, 2, 3, nn.Softplus(), seed=image[0])
    x = torch.randn(2, 2, *image, requires_grad=True)
    parameters = [x, *model.parameters()]
    y = model(x)
    direction = torch.randn_like(y)
    found = torch.autograd.grad((model(x) * direction).sum(), parameters)
    expected = torch.autograd.grad((plain(model, x) * direction).sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        assert float(b.abs().max()) > 0.0
        # The equilibria of both roads are good to 1e-13 over a monotonicity of 1/2.
        assert relative(a, b) <= 1e-9


# ---- training ---------------------------------------------------------------------------------------------------------


def jacobian_norm(net: nn.Module, x: Tensor) -> float:
    x = x.clone().requires_grad_(True)
    y = net(x).flatten(1)
    rows = [torch.autograd.grad(y[:, k].sum(), x, retain_graph=True)[0].flatten(1) for k in range(y.shape[1])]
    return float(np.linalg.norm(torch.stack(rows, 1).numpy(), 2, axis=(1, 2)).max())


TRAINED: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "lben": lambda: (lc.LBEN(2, 4, 2, image=(3, 4), lipschitz=1.5), (2, 3, 4)),
    "lben odd": lambda: (lc.LBEN(1, 5, 2, image=(5, 3), lipschitz=0.7, epsilon=1e-3, activation="tanh"), (1, 5, 3)),
    **{
        kind: lambda kind=kind: (
            lc.convert(build(kind, 2 if kind in EXPLICIT else 1, 2, 3, SIGMA[2]), (2, 3, 2), check=False),
            (2, 3, 2),
        )
        for kind in KINDS
    },
}


@pytest.mark.parametrize("name", TRAINED)
def test_ten_steps_uphill_keep_the_constant(name: str) -> None:
    """Adam on a loss that asks for gain; the Jacobian of all outputs at new points."""
    net, shape = TRAINED[name]()
    stages = [net] if isinstance(net, lc.LBEN) else net.stages
    L, x = net.lipschitz, torch.randn(3, *shape)
    for stage in stages:
        stage.options = lc.SolverOptions(tolerance=1e-7)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    losses = []
    for _ in range(10):
        loss = -(net(x) - net(x + 0.1)).square().sum() / 0.1**2
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for stage in stages:
        stage.options = lc.SolverOptions()
    assert net.lipschitz == L
    norm = jacobian_norm(net, torch.cat([x[:1], 3.0 * torch.randn(1, *shape)]))
    assert norm <= L * (1.0 + 1e-6)
    assert losses[-1] < 1.1 * losses[0] < 0.0  # it went where it was sent
    for stage in stages:
        assert least_of_H(rebuilt(stage), L) >= -1e-10


@pytest.mark.parametrize("kind", ["sll", "sandwich", "g_mondeq"])
def test_gradients_of_a_converted_network(kind: str) -> None:
    """Central differences in a random direction of each parameter; tanh and softplus, so that no kink is crossed."""
    model = build(kind, 2 if kind in EXPLICIT else 1, 2, 2, nn.Softplus(), seed=1)
    net = lc.convert(model, (2, 4, 3), check=False)
    x = torch.randn(3, 2, 4, 3)
    with torch.no_grad():
        weight = torch.randn_like(net(x))
    (net(x) * weight).sum().backward()
    for name, parameter in net.named_parameters():
        direction = torch.randn_like(parameter)
        values = []
        for t in (1e-4, -1e-4):
            with torch.no_grad():
                parameter += t * direction
                values.append(float((net(x) * weight).sum()))
                parameter -= t * direction
        slope = float((parameter.grad * direction).sum())
        # An error of t² f‴/6, and of 1e-13/t.
        assert slope == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-5, abs=1e-5), name


# ---- strides, unshuffling, MaxMin, plain convolutions -------------------------------------------------------------------


def check_network(model: nn.Module, shape: tuple[int, ...], steps: list[type], **options: bool) -> lc.Network:
    """Converts, compares with the plain formulas, and says which steps there are."""
    net = lc.convert(model, shape, **options)
    x = torch.randn(3, *shape)
    with torch.no_grad():
        assert relative(net(x), plain(model, x)) <= OUTPUT
    assert [type(step) for step in net.steps] == steps
    for stage in net.stages:
        if stage.grid:
            assert least_of_H(rebuilt(stage), stage.lipschitz) >= LEAST
    return net


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_strided_AOL(kernel: int) -> None:
    """y = W̃Dx at every second pixel, D = (Σ|W̃′W̃|)^{-1/2} of the dense strided matrix."""
    layer = shaken(aol.AOLConv2d(2, 3, kernel, stride=2)).requires_grad_(False)
    image = (10, 12)  # large enough that no shifts meet
    M = dense(layer.weight, image).reshape(3, *image, -1)[:, ::2, ::2].reshape(3 * 30, -1)
    sums = (M.T @ M).abs().sum(1)
    P = M * torch.where(sums > 0.0, sums, 1.0).rsqrt()  # a 1×1 kernel reads one pixel in four
    x = torch.randn(3, 2, *image)
    expected = (x.flatten(1) @ P.T).reshape(3, 3, 5, 6) + layer.bias[:, None, None]
    np.testing.assert_allclose(layer(x).numpy(), expected.numpy(), atol=1e-13)
    assert float(torch.linalg.matrix_norm(P, 2)) <= 1.0 + 1e-14
    net = lc.convert(nn.Sequential(layer, nn.ReLU()), (2, *image))
    assert [type(step) for step in net.steps] == [nn.PixelUnshuffle, lc.LBEN]
    assert net.stages[0].grid.image == (5, 6)
    assert net.lipschitz == 1.0
    with torch.no_grad():
        assert relative(net(x), expected.relu()) <= OUTPUT
    small = torch.randn(2, 2, 4, 6)  # shifts meet: still of norm 1
    J = torch.stack([layer.linear(e.reshape(1, 2, 4, 6)).flatten() for e in torch.eye(48)], 1)
    assert float(torch.linalg.matrix_norm(J, 2)) <= 1.0 + 1e-14
    np.testing.assert_allclose(
        (layer(small) - layer.bias[:, None, None]).flatten(1), small.flatten(1) @ J.T, atol=1e-13
    )


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_strided_sandwich(kernel: int) -> None:
    model = shaken(nn.Sequential(sandwich.SandwichConv2d(1, 3, kernel, stride=2, scale=0.8), nn.Tanh()))
    net = check_network(model, (1, 6, 8), [nn.PixelUnshuffle, lc.LBEN])
    assert net.lipschitz == 0.8
    assert net.stages[0].grid.image == (3, 4)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(3, 1, 1), (3, 1, "same"), (1, 1, 0), (4, 1, "same"), (5, 1, 2), (3, 2, 1), (2, 2, 0), (4, 2, 1), (5, 3, 2)],
)
def test_circular_conv2d_is_an_affine_layer(kernel: int, stride: int, padding: int | str) -> None:
    layer = nn.Conv2d(2, 3, kernel, stride=stride, padding=padding, padding_mode="circular")
    image = (6, 9) if stride == 3 else (6, 8)
    expected = [lc.LBEN] if stride == 1 else [nn.PixelUnshuffle, lc.LBEN]
    net = check_network(nn.Sequential(layer, nn.ReLU()), (2, *image), expected)
    x = torch.randn(2, 2, *image)
    with torch.no_grad():
        assert relative(net(x), conv(x, layer.weight, layer.bias, stride).relu()) <= OUTPUT
        M = dense(layer.weight, image).reshape(3, *image, -1)[:, ::stride, ::stride]
        norm = float(torch.linalg.matrix_norm(M.reshape(-1, 2 * image[0] * image[1]), 2))
    assert net.lipschitz == pytest.approx(norm, rel=1e-12)
    assert net.lipschitz >= norm


def test_one_pixel_kernels_have_no_padding_mode() -> None:
    check_network(nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh()), (2, 3, 4), [lc.LBEN])


def test_parametrized_convolutions() -> None:
    layer = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    nn.utils.parametrizations.weight_norm(layer)
    check_network(nn.Sequential(layer, nn.ReLU(), layer), (2, 4, 5), [lc.LBEN])
    normed = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")).eval()
    check_network(nn.Sequential(normed, nn.ReLU()), (2, 4, 5), [lc.LBEN])


def test_an_activation_joins_the_convolution_beside_it() -> None:
    layer = sll.SLLConv2d(2)
    check_network(nn.Sequential(nn.ReLU(), layer, nn.Tanh(), layer, nn.ReLU()), (2, 4, 3), [lc.LBEN])
    net = check_network(
        nn.Sequential(lc.MeanPool(2), nn.ReLU(), lc.MeanPool(2)), (2, 4, 4), [lc.MeanPool, nn.ReLU, lc.MeanPool]
    )
    assert net.lipschitz == 1.0


@pytest.mark.parametrize("merge", [False, True])
def test_pixel_unshuffle(merge: bool) -> None:
    """Glue between two stages, or taken to the front: the stage before it then lives on the coarse grid."""
    model = shaken(nn.Sequential(sll.SLLConv2d(2), nn.ReLU(), nn.PixelUnshuffle(2), sll.SLLConv2d(8, 3)))
    steps = [nn.PixelUnshuffle, lc.LBEN] if merge else [lc.LBEN, nn.PixelUnshuffle, lc.LBEN]
    net = check_network(model, (2, 6, 4), steps, merge=merge)
    assert net.lipschitz == 1.0
    twice = shaken(nn.Sequential(sll.SLLConv2d(1), nn.PixelUnshuffle(2), nn.PixelUnshuffle(3), sll.SLLConv2d(36, 3)))
    steps = [nn.PixelUnshuffle] * 2 + [lc.LBEN] if merge else [lc.LBEN, *[nn.PixelUnshuffle] * 2, lc.LBEN]
    check_network(twice, (1, 12, 6), steps, merge=merge)


@pytest.mark.parametrize("merge", [False, True])
def test_pixel_shuffle_stays_glue(merge: bool) -> None:
    model = shaken(nn.Sequential(sll.SLLConv2d(4), nn.PixelShuffle(2), cpl.CPLConv2d(1)))
    check_network(model, (4, 3, 4), [lc.LBEN, nn.PixelShuffle, lc.LBEN], merge=merge)


@pytest.mark.parametrize("merge", [False, True])
def test_strided_layers_in_a_row(merge: bool) -> None:
    model = shaken(
        nn.Sequential(
            lc.Normalize([0.4, 0.5], [0.5, 0.25]),
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv2d(3, 2, 4, stride=2, padding=1, padding_mode="circular"),
            nn.ReLU(),
            sandwich.SandwichConv2d(2, 2, 2, stride=2),
            nn.ReLU(),
        )
    )
    inner = [lc.Normalize, lc.LBEN, nn.PixelUnshuffle, lc.LBEN, nn.PixelUnshuffle, lc.LBEN]
    steps = [nn.PixelUnshuffle, nn.PixelUnshuffle, lc.LBEN] if merge else inner
    check_network(model, (2, 8, 4), steps, merge=merge)


def test_merging_leaves_glue_without_a_layer_alone() -> None:
    model = nn.Sequential(lc.Normalize(0.5, 0.5), nn.PixelUnshuffle(2), nn.Flatten(), sll.SLLLinear(64))
    expected = [lc.Normalize, nn.PixelUnshuffle, nn.Flatten, lc.LBEN]
    check_network(model, (1, 8, 8), expected, merge=True)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("shape", [(6,), (4, 3, 5)])
def test_max_min(shape: tuple[int, ...], merge: bool) -> None:
    """Alone it is glue; beside a layer it is one residual step of its stage."""
    c = shape[0]
    x = torch.randn(5, *shape)
    values = torch.sort(torch.stack([x[:, : c // 2], x[:, c // 2 :]]), 0, descending=True).values
    assert torch.equal(lc.MaxMin()(x), torch.cat([values[0], values[1]], 1))
    alone = lc.convert(nn.Sequential(lc.MaxMin()), shape, merge=merge)
    assert [type(step) for step in alone.steps] == [lc.MaxMin]
    assert torch.equal(alone(x), lc.MaxMin()(x))
    layers = (sll.SLLLinear, cpl.CPLLinear) if len(shape) == 1 else (sll.SLLConv2d, cpl.CPLConv2d)
    first, second = shaken(layers[0](c)), shaken(layers[1](c))
    one = check_network(nn.Sequential(first, lc.MaxMin(), first), shape, [lc.LBEN], merge=merge)
    assert one.lipschitz == 1.0
    steps = [lc.LBEN] if merge else [lc.LBEN] * 2
    check_network(nn.Sequential(first, lc.MaxMin(), second, lc.MaxMin()), shape, steps, merge=merge)
    linear = nn.Linear(c, c) if len(shape) == 1 else nn.Conv2d(c, c, 3, padding=1, padding_mode="circular")
    check_network(nn.Sequential(linear, lc.MaxMin(), linear), shape, [lc.LBEN], merge=merge)


def test_max_min_as_a_dae_is_dense_algebra() -> None:
    """W, U, G of FORMULAS 1.2's residual step; H = 0."""
    dae = lc.densify(lc.max_min(2, grid=lc.Grid((1, 2))))
    w, one, zero = torch.cat([-torch.eye(2), torch.eye(2)]), torch.eye(4), torch.zeros(2, 2)
    W = torch.cat([torch.zeros(4, 6), torch.cat([w.T, zero], 1)])
    for found, expected in zip(
        dae, (W, torch.cat([one, zero.repeat(1, 2)]), torch.cat([one, -w], 1), torch.ones(6)), strict=True
    ):
        np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-15)
    M = 2.0 * torch.eye(6) - W - W.T
    G, U = torch.cat([one, -w], 1), torch.cat([one, zero.repeat(1, 2)])
    np.testing.assert_allclose((M - G.T @ G - U @ U.T).numpy(), 0.0, atol=1e-15)


# ---- zero padding ------------------------------------------------------------------------------------------------------

ZERO: dict[str, Callable[[], nn.Module]] = {
    "sll": lambda: sll.SLLConv2d(2, 3, padding_mode="zeros"),
    "cpl": lambda: cpl.CPLConv2d(2, 3, padding_mode="zeros"),
    "aol": lambda: aol.AOLConv2d(2, 3, 3, padding_mode="zeros"),
    "conv": lambda: nn.Conv2d(2, 3, 3, padding=1),
}


@pytest.mark.parametrize("name", ZERO)
def test_zero_padding_is_refused_per_frequency_and_taken_densely(name: str) -> None:
    layer = shaken(ZERO[name]())
    model = nn.Sequential(layer, nn.ReLU())
    for convert in (lc.convert, lc.to_dae):
        with pytest.raises(lc.UnsupportedModuleError) as caught:
            convert(model, (2, 4, 3))
        text = str(caught.value)
        for said in ("0", type(layer).__name__, '"zeros"', "frequency", "dense=True", "small images"):
            assert said in text
    net = lc.convert(model, (2, 4, 3), dense=True)
    assert [type(step) for step in net.steps] == [nn.Flatten, lc.LBEN, nn.Unflatten]
    x = torch.randn(3, 2, 4, 3)
    with torch.no_grad():
        if name == "cpl":  # T rests on an upper bound of the norm
            K = dense(layer.weight, (4, 3), zeros=True)
            s = functional.relu(x.flatten(1) @ K.T + spread(layer.bias, 3, (4, 3))).div(float(layer.T((4, 3))[0]))
            expected = (x - 2.0 * (s @ K).reshape(x.shape)).relu()
        else:
            expected = plain(model, x) if name != "conv" else conv(x, layer.weight, layer.bias, mode="constant").relu()
        assert relative(net(x), expected) <= OUTPUT
        if name == "conv":
            norm = float(torch.linalg.matrix_norm(dense(layer.weight, (4, 3), zeros=True), 2))
            assert net.lipschitz == pytest.approx(norm, rel=1e-12)
        else:
            assert net.lipschitz == 1.0
    dae = lc.to_dae(model, (2, 4, 3), dense=True)
    assert not dae.grid
    assert dae.inputs == 24


@pytest.mark.parametrize(
    "kind",
    [
        "sll",
        "cpl",
        "aol",
        "sandwich",
        "mondeq",
        "g_mondeq",
    ],
)
def test_circular_layers_densely(kind: str) -> None:
    model = build(kind, 1, 2, 3, seed=4)
    x = torch.randn(3, 2, 4, 3)
    net = lc.convert(model, (2, 4, 3), dense=True)
    assert [type(step) for step in net.steps] == [nn.Flatten, lc.LBEN, nn.Unflatten]
    with torch.no_grad():
        assert relative(net(x), plain(model, x)) <= OUTPUT
    assert net.lipschitz == lc.convert(model, (2, 4, 3), check=False).lipschitz


def test_groups_dilation_and_valid_padding_densely() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 2, dilation=2, stride=(1, 2), padding=1), nn.Flatten()
    )
    net = lc.convert(model, (2, 5, 6), dense=True)
    x = torch.randn(3, 2, 5, 6)
    with torch.no_grad():
        assert relative(net(x), model(x)) <= OUTPUT
    assert [type(step) for step in net.steps] == [nn.Flatten, lc.LBEN]


# ---- what is refused ---------------------------------------------------------------------------------------------------


def circular(*arguments: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(*arguments, padding_mode="circular", **options)  # type: ignore[arg-type]


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None, type[Exception], tuple[str, ...]]] = {
    # model, input_shape, error, what it must say
    "unknown sll": (lambda: sll.SLLConv2d(2), None, lc.ShapeError, ("SLLConv2d", "unknown", "input_shape=(c, h, w)")),
    "unknown aol": (lambda: aol.AOLConv2d(2, 2, 3), None, lc.ShapeError, ("AOLConv2d", "input_shape=(c, h, w)")),
    "unknown sandwich": (lambda: sandwich.SandwichConv2d(2, 2, 3), None, lc.ShapeError, ("input_shape=(c, h, w)",)),
    "unknown mondeq": (lambda: mondeq.MonDEQConv2d(2, 2), None, lc.ShapeError, ("input_shape=(c, h, w)",)),
    "unknown conv": (lambda: circular(2, 2, 3, padding=1), None, lc.ShapeError, ("Conv2d", "unknown", "input_shape=")),
    "flat": (lambda: nn.Sequential(sll.SLLConv2d(2)), (32,), lc.ShapeError, ("(32,)", "(c, h, w)", "layer '0'")),
    "sll channels": (lambda: nn.Sequential(sll.SLLConv2d(2)), (3, 4, 4), lc.ShapeError, ("3, 4, 4", "2", "'0'")),
    "aol channels": (
        lambda: nn.Sequential(aol.AOLConv2d(2, 3, 3)), (3, 4, 4), lc.ShapeError, ("3, 4, 4", "2", "'0'"),
    ),
    "sandwich channels": (
        lambda: nn.Sequential(sandwich.SandwichConv2d(2, 3, 3)), (3, 4, 4), lc.ShapeError, ("3, 4, 4", "2", "'0'"),
    ),
    "mondeq channels": (
        lambda: nn.Sequential(mondeq.MonDEQConv2d(2, 3)), (3, 4, 4), lc.ShapeError, ("'0'", "(3, 4, 4)", "(2, 4, 4)"),
    ),
    "aol stride": (
        lambda: nn.Sequential(aol.AOLConv2d(2, 3, 3, stride=2)), (2, 5, 4), lc.ShapeError, ("5, 4", "multiples of 2", "'0'"),
    ),
    "sandwich stride": (
        lambda: nn.Sequential(sandwich.SandwichConv2d(2, 3, 3, stride=2)), (2, 5, 4), lc.ShapeError,
        ("5, 4", "multiples of 2", "'0'"),
    ),
    "conv stride": (
        lambda: nn.Sequential(circular(2, 3, 3, stride=2, padding=1)), (2, 5, 4), lc.ShapeError,
        ("'0'", "(2, 5, 4)", "multiples of 2"),
    ),
    "pool": (
        lambda: nn.Sequential(sll.SLLConv2d(2), lc.MeanPool(4)), (2, 6, 6), lc.ShapeError, ("MeanPool", "multiples of 4"),
    ),
    "pool's name": (
        lambda: nn.Sequential(sll.SLLConv2d(2), lc.MeanPool(4)), (2, 6, 6), lc.ShapeError, ("'1'",),
    ),
    "odd pairs": (
        lambda: nn.Sequential(sll.SLLConv2d(3), lc.MaxMin()), (3, 4, 4), lc.ShapeError, ("'1'", "3", "even"),
    ),
    "groups": (lambda: circular(2, 2, 3, padding=1, groups=2), (2, 4, 4), lc.UnsupportedModuleError, ("groups = 2",)),
    "dilation": (
        lambda: circular(2, 2, 3, padding=2, dilation=2), (2, 4, 4), lc.UnsupportedModuleError, ("dilation = (2, 2)",),
    ),
    "groups' remedy": (
        lambda: circular(2, 2, 3, padding=1, groups=2), (2, 4, 4), lc.UnsupportedModuleError, ("dense=True",),
    ),
    "strides": (lambda: circular(2, 2, 3, padding=1, stride=(1, 2)), (2, 4, 4), lc.UnsupportedModuleError, ("(1, 2)",)),
    "padding": (
        lambda: circular(2, 2, 3), (2, 4, 4), lc.UnsupportedModuleError, ("padding (0, 0)", "(kernel_size - 1)//2"),
    ),
    "even": (
        lambda: nn.Sequential(circular(2, 3, 4, padding=1)), (2, 6, 6), lc.UnsupportedModuleError,
        ("0 (Conv2d)", "padding (1, 1)", "(4, 4)"),
    ),
    "even's remedy": (
        lambda: nn.Sequential(circular(2, 3, 4, padding=1)), (2, 6, 6), lc.LipconvertError, ('"same"',),
    ),
    "no flatten": (
        lambda: nn.Sequential(sll.SLLConv2d(2), sll.SLLLinear(4)), (2, 4, 4), lc.ShapeError, ("'1'", "nn.Flatten()"),
    ),
    "no flatten, other width": (
        lambda: nn.Sequential(sll.SLLConv2d(2), sll.SLLLinear(32)), (2, 4, 4), lc.ShapeError, ("'1'", "nn.Flatten()"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_how(name: str) -> None:
    make, shape, error, said = REFUSED[name]
    for convert in (lc.convert, lc.to_dae):
        with pytest.raises(error) as caught:
            convert(make(), shape)
        for text in said:
            assert text in str(caught.value), str(caught.value)


def test_sizes_are_checked_when_a_layer_is_made() -> None:
    for make in (
        lambda: sll.SLLConv2d(2, kernel_size=0),
        lambda: aol.AOLConv2d(2, 2, 3, stride=0),
        lambda: sandwich.SandwichConv2d(2, 2, 3, scale=0.0),
        lambda: sll.SLLConv2d(2, padding_mode="reflect"),
        lambda: aol.AOLConv2d(2, 2, 3, padding_mode="same"),
        lambda: sll.SLLNetwork(inputs=4, image=4),
        lambda: sandwich.SandwichNetwork(),
    ):
        with pytest.raises(lc.InvalidParameterError):
            make()
    for network in (sll.SLLNetwork, cpl.CPLNetwork, aol.AOLNetwork, sandwich.SandwichNetwork):
        with pytest.raises(lc.ShapeError, match="multiples of pool = 4"):
            network(image=(8, 6))


def test_padding_cannot_take_channels_away() -> None:
    with pytest.raises(lc.InvalidParameterError, match=r"channels is 2.*3 input channels"):
        sll.SLLNetwork(image=8, in_channels=3, channels=2)


def test_converting_without_gradients() -> None:
    with torch.no_grad():
        lc.convert(shaken(sll.SLLConv2d(2)), (2, 3, 4))


# ---- one DAE for a whole model -----------------------------------------------------------------------------------------


def dense_difference(model: nn.Module, shape: tuple[int, ...]) -> float:
    """A dense DAE of flattened images against the plain formulas."""
    dae = lc.to_dae(model, shape)
    assert dae.inputs == math.prod(shape)
    assert not dae.grid
    x = torch.randn(3, *shape)
    with torch.no_grad():
        return relative(lc.LBEN.from_dae(dae)(x.flatten(1)), plain(model, x).flatten(1))


def test_one_dae_stays_on_the_grid_or_is_expanded() -> None:
    head = [nn.Flatten(), nn.Linear(18, 4)]
    body = [lc.Normalize(0.5, 0.5), lc.PadChannels(3), sll.SLLConv2d(3, 2), nn.ReLU(), cpl.CPLConv2d(3), lc.MaxMin()]
    on_grid = shaken(nn.Sequential(*body[:-1]))
    dae = lc.to_dae(on_grid, (2, 4, 6))
    assert dae.grid == lc.Grid((4, 6))
    assert dae.states == 2 + 3 + 3  # two convolutions and the activation between them; no row only carries the image
    x = torch.randn(3, 2, 4, 6)
    with torch.no_grad():
        assert relative(lc.LBEN.from_dae(dae)(x), plain(on_grid, x)) <= OUTPUT
    assert dae.lipschitz == 2.0
    assert dense_difference(nn.Sequential(*body[:-1], lc.MeanPool(2), nn.ReLU(), *head), (2, 4, 6)) <= OUTPUT
    assert dense_difference(nn.Sequential(aol.AOLConv2d(2, 3, 3, stride=2), nn.ReLU(), *head), (2, 4, 6)) <= OUTPUT
    for large in (sll.SLLNetwork(image=32), nn.Sequential(sll.SLLConv2d(5), nn.Flatten())):
        with pytest.raises(lc.ShapeError, match="at most 4096"):
            lc.to_dae(large, (*large.input_shape,) if hasattr(large, "input_shape") else (5, 32, 32))


@pytest.mark.parametrize("layer", ["unshuffle", "strided"])
def test_one_dae_of_unshuffled_images(layer: str) -> None:
    inner = nn.PixelUnshuffle(2) if layer == "unshuffle" else aol.AOLConv2d(1, 4, 3, stride=2)
    model = shaken(nn.Sequential(sll.SLLConv2d(1), inner, nn.Flatten(), sll.SLLLinear(16)))
    assert dense_difference(model, (1, 4, 4)) <= OUTPUT


# ---- whole networks ----------------------------------------------------------------------------------------------------


def test_the_papers_network_is_two_stages() -> None:
    model = sll.SLLNetwork(channels=8, inner=5, conv_depth=4, features=512, dense_depth=2, image=32, classes=10)
    groups = group(trace(model))
    assert [len(members) for members in groups] == [1, 4, 1, 1, 2, 1]
    kinds = [type(members[0].module).__name__ for members in groups]
    assert kinds == ["PadChannels", "SLLConv2d", "MeanPool", "Flatten", "SLLLinear", "FirstFeatures"]
    assert groups[0][0].input_shape == (3, 32, 32)
    assert groups[1][0].dae is not None
    assert groups[1][0].dae.grid == lc.Grid((32, 32))
    assert sum(p.numel() for p in model.parameters()) == 4 * (5 * 8 * 9 + 5 + 5) + 2 * (512 * 512 + 512 + 512)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "sll": lambda: sll.SLLNetwork(
        image=(8, 6), in_channels=2, channels=3, inner=2, conv_depth=3, pool=2, dense_depth=2, dense_inner=6, classes=4
    ),
    "cpl": lambda: cpl.CPLNetwork(
        image=(4, 8), in_channels=3, channels=4, conv_depth=2, pool=4, features=20, dense_depth=2, classes=5
    ),
    "aol": lambda: aol.AOLNetwork(image=(6, 9), in_channels=2, channels=3, pool=3, features=8, classes=3),
    "sandwich": lambda: sandwich.SandwichNetwork(
        image=(6, 4), in_channels=2, channels=3, pool=2, features=7, dense_depth=2, classes=3, lipschitz=1.5
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_whole_networks(kind: str) -> None:
    """Convolutions and dense layers end to end: outputs, L, one stage for each half, float32."""
    model = shaken(NETWORKS[kind]())
    net = lc.convert(model)
    glue = [lc.MeanPool, nn.Flatten]
    inside = {"sll": [lc.PadChannels], "cpl": [lc.PadChannels]}.get(kind, [])
    joint = {"cpl": [*glue, lc.PadChannels]}.get(kind, glue)
    behind = [lc.FirstFeatures] if kind in ("sll", "cpl") else []
    assert [type(step) for step in net.steps] == [*inside, lc.LBEN, *joint, lc.LBEN, *behind]
    x = torch.randn(5, *model.input_shape)
    with torch.no_grad():
        expected = plain(model, x)
        assert relative(net(x), expected) <= OUTPUT
        for i in range(5):  # a prediction does not depend on its batch
            assert relative(net(x[i : i + 1]), net(x)[i : i + 1]) <= 1e-13
    assert net.lipschitz == pytest.approx(1.5 if kind == "sandwich" else 1.0, rel=1e-15)
    assert least_of_H(rebuilt(net.stages[0]), net.stages[0].lipschitz) >= LEAST
    assert dense_difference(model, model.input_shape) <= OUTPUT
    single = copy.deepcopy(net).float()
    with torch.no_grad():
        y = single(x.float())
        assert y.dtype == torch.float32
        assert relative(y.double(), plain(model, x.float().double())) <= 1e-5


def mixed() -> tuple[nn.Sequential, tuple[int, ...]]:
    """Convolutions of three plugins, both poolings, and an orthogonal readout of norm 1."""
    model = nn.Sequential(
        lc.Normalize([0.4, 0.5], [0.5, 0.25]),
        lc.PadChannels(4),
        sll.SLLConv2d(4, 2, 2),
        cpl.CPLConv2d(4, 3),
        lc.MaxMin(),
        nn.AvgPool2d(4, divisor_override=4),
        sandwich.SandwichConv2d(4, 3, 1, activation=nn.Tanh()),
        nn.ReLU(),
        aol.AOLConv2d(3, 5, 2),
        nn.Flatten(),
        nn.utils.parametrizations.orthogonal(nn.Linear(10, 3)),
    )
    return shaken(model), (2, 8, 4)  # type: ignore[return-value]


def test_plugins_stay_apart_unless_merged() -> None:
    model, shape = mixed()
    apart = [lc.Normalize, lc.PadChannels, lc.LBEN, lc.LBEN, nn.AvgPool2d, lc.LBEN, lc.LBEN, nn.Flatten, lc.LBEN]
    net = check_network(model, shape, apart)
    together = check_network(model, shape, [lc.LBEN, nn.AvgPool2d, lc.LBEN, nn.Flatten, lc.LBEN], merge=True)
    for found in (net, together):
        # 1/min(std); every layer, the pooling (√16/4) and the readout have norm 1, the latter as an upper bound.
        assert found.lipschitz == pytest.approx(4.0, rel=1e-12)
        assert found.lipschitz >= 4.0 * (1.0 - 1e-15)
    x = torch.randn(4, *shape)
    with torch.no_grad():
        assert relative(together(x), net(x)) <= OUTPUT
    report = lc.validate(model, together, x, merge=True)
    assert report.passed
    pair = shaken(nn.Sequential(sll.SLLConv2d(2), cpl.CPLConv2d(2)))
    check_network(pair, (2, 4, 3), [lc.LBEN, lc.LBEN])
    assert check_network(pair, (2, 4, 3), [lc.LBEN], merge=True).lipschitz == 1.0


def test_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    model, shape = mixed()
    net = lc.convert(model, shape, check=False)
    lc.save(net, tmp_path / "net.safetensors")
    again = lc.load(tmp_path / "net.safetensors")
    assert again.lipschitz == net.lipschitz
    assert again.input_shape == shape
    assert [stage.grid for stage in again.stages] == [stage.grid for stage in net.stages]
    for name, tensor in net.state_dict().items():
        if isinstance(tensor, Tensor):
            assert torch.equal(tensor, again.state_dict()[name])
    x = torch.randn(4, *shape)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))


@pytest.mark.parametrize("kind", ["sll", "sandwich"])
def test_no_attack_flips_a_certified_sample(kind: str) -> None:
    """Certified fractions recomputed from the plain logits; projected gradient ascent on the source inside the radius."""
    model = shaken(NETWORKS[kind]())
    net = lc.convert(model, check=False)
    x = torch.rand(24, *model.input_shape)
    with torch.no_grad():
        logits = plain(model, x)
    labels = logits.argmax(1)
    labels[::6] = (labels[::6] + 1) % logits.shape[1]  # some are wrong
    ordered = logits.sort(1, descending=True).values
    L = 1.5 if kind == "sandwich" else 1.0
    radius = torch.where(labels == logits.argmax(1), ordered[:, 0] - ordered[:, 1], -1.0) / (2.0**0.5 * L)
    assert float(radius.max()) > 0.02
    levels = radius.sort().values
    radii = [0.0, *(float(levels[k : k + 2].mean()) for k in (8, 12, 20))]  # between two samples
    data = [(image, int(label)) for image, label in zip(x, labels, strict=True)]
    report = lc.certify(net, data, radii, "prescribed")
    assert report.certified_accuracy == [float((radius > r).double().mean()) for r in radii]
    assert report.natural_accuracy == float((radius > 0).double().mean())
    held = radius > 0
    start, inside = x[held], 0.999 * radius[held].reshape(-1, 1, 1, 1)
    for _ in range(3):
        delta = torch.randn_like(start)
        for _ in range(15):
            delta = (delta / delta.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) * inside).requires_grad_(True)
            y = model(start + delta)
            assert torch.equal(y.argmax(1), labels[held])
            rivals = y.scatter(1, labels[held][:, None], -torch.inf).amax(1)
            own = y.gather(1, labels[held][:, None]).squeeze(1)
            (gradient,) = torch.autograd.grad((rivals - own).sum(), delta)
            step = gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(-1, 1, 1, 1)
            delta = (delta + 0.5 * inside * step).detach()


@pytest.mark.parametrize("parameter", ["log_psi", "G", "U", "V", "S", "b_z", "b_y"])
def test_validate_finds_a_changed_weight(parameter: str) -> None:
    model = shaken(NETWORKS["sll"]())
    net = lc.convert(model, check=False)
    assert lc.validate(model, net).passed
    with torch.no_grad():
        weight = getattr(net.stages[0], parameter)
        weight += 1e-6 * torch.randn_like(weight)
    report = lc.validate(model, net, throw=False)
    failed = {check.name for check in report.checks if not check.passed}
    assert "output: LBEN - source" in failed
    assert "output: DAE - source" not in failed
    if parameter in ("log_psi", "G", "U", "V", "S"):
        assert "W rebuilt - W" in failed


def test_large_images_are_refused_densely_before_they_fill_the_memory() -> None:
    with pytest.raises(lc.ShapeError, match="at most 4096"):
        lc.convert(nn.Sequential(sll.SLLConv2d(5)), (5, 32, 32), dense=True)
