"""Linear algebra of (..., rows, cols) matrices, ′ being the conjugate transpose (``.mH``), and where they come from.

A dense matrix has no leading dimension. A circular convolution on h×w images is a batch of F = h (⌊w/2⌋ + 1) complex
matrices, one for each frequency of the real transform ``rfft2`` (`Grid`; FORMULAS 4). Every function here, and every
formula of the core, broadcasts over leading dimensions, so both go through the same lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from ..errors import InvalidParameterError, NotFiniteError, NotPSDError, ShapeError
from ..foundation.arguments import sizes
from .rounding import gamma, operations


@dataclass(frozen=True)
class Grid:
    """Where states live: on the h×w pixels of a circular image, ``Grid((h, w))``, or nowhere, ``Grid()``: a dense network.

    *Pixels* are what a module sees, (B, n, h, w) real; *coordinates* are those in which W is block diagonal: the half
    spectrum (B, n, F) complex of ``rfft2`` without normalisation. Dense pixels and coordinates are both (B, n). A circular
    operator is stored as ``matrices`` (F, rows, cols), or as real ``kernels`` (rows, cols, h, w) in torch's orientation with
    tap (a, b) at offset (a, b) modulo (h, w):

        y_i[s, t] = Σ_j Σ_ab K_ij[a, b] x_j[s + a, t + b],   K̂(ω) = conj(rfft2(K))                             (FORMULAS 4)

    Coordinates lie in memory as (F, n, B), so that applying an operator is one batched product; what is not is copied.
    """

    image: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", sizes(self.image, "the image of a Grid", "(h, w) or ()"))
        if len(self.image) not in (0, 2):
            raise ShapeError("the image of a Grid", "(h, w) or ()", self.image)

    def __bool__(self) -> bool:
        """Whether there are pixels."""
        return bool(self.image)

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading dimensions of a matrix: (F,), or () for a dense one."""
        return (self.image[0] * self._half,) if self.image else ()

    @property
    def pixels(self) -> int:
        """h·w, 1 for a dense one."""
        return self.image[0] * self.image[1] if self.image else 1

    @property
    def _half(self) -> int:
        return self.image[1] // 2 + 1

    def weights(self, like: Tensor) -> Tensor:
        """(F,) weights with Σ_pixels |x|² = Σ_F weight |X|²: 1/(hw) for kx = 0 and, if w is even, kx = w/2; else 2/(hw).

        Real, on the device and in the precision of ``like``; 1 for a dense grid. (FORMULAS 4)
        """
        if not self.image:
            return like.new_ones((), dtype=like.real.dtype)
        return _half_spectrum(*self.image, like.device, like.real.dtype)

    def coordinates(self, x: Tensor) -> Tensor:
        """Pixels (B, n, h, w) → coordinates (B, n, F); a dense (B, n) stays as it is."""
        if not self.image:
            return x
        _require_float(x, "images")
        return self.samples(_rfft2(x).flatten(2).permute(2, 1, 0).contiguous())

    def values(self, X: Tensor) -> Tensor:
        """Coordinates (B, n, F) → pixels (B, n, h, w); a dense (B, n) stays as it is."""
        if not self.image:
            return X
        # Along the first two dimensions, as coordinates lie in memory: the transform copies them no more than once.
        spectrum = self.columns(X).unflatten(0, (self.image[0], self._half))
        return _irfft2(spectrum, self.image, (0, 1)).permute(3, 2, 0, 1)

    def matrices(self, K: Tensor) -> Tensor:
        """Kernels (rows, cols, h, w) → matrices (F, rows, cols), differentiable; a dense (rows, cols) stays as it is."""
        if not self.image:
            return K
        if tuple(K.shape[2:]) != self.image:
            raise ShapeError("a kernel", ("rows", "cols", *self.image), tuple(K.shape))
        _require_float(K, "kernels")
        return _rfft2(K).conj().flatten(2).permute(2, 0, 1).resolve_conj().contiguous()

    def kernels(self, M: Tensor) -> Tensor:
        """Matrices (F, rows, cols) → kernels (rows, cols, h, w); the inverse of `matrices`.

        Real because the spectrum of a real kernel is symmetric; principal roots, Cayley transforms and products keep that.
        """
        if not self.image:
            return M
        spectrum = M.conj().permute(1, 2, 0).resolve_conj().contiguous()
        return _irfft2(spectrum.reshape(*M.shape[1:], self.image[0], self._half), self.image)

    def matrices_error(self, K: Tensor, M: Tensor) -> Tensor:
        """Entrywise bounds (F, rows, cols) of |M − exact spectra of the kernels K|, M as some FFT computed them.

        No FFT is trusted: the sums are formed again as two matrix products, whose rounding is bounded
        (`lipconvert.linalg.rounding`); cos and sin of angles within [−π, π] are within 16u of their values.
        """
        h, w = self.image
        K, slack = K.detach().to("cpu", torch.float64), 1.0 + 2e-9
        rows, columns = _fourier(h, h), _fourier(w, self._half)
        along = K.to(torch.complex128) @ columns
        exact = (rows @ along).conj().flatten(2).permute(2, 0, 1)
        per_term = gamma(operations(w + 2, columns)) + gamma(operations(h + 2, rows)) + 40.0 * 2.0**-53
        size = K.abs().sum((2, 3))
        # products of subnormal numbers may lose half of the smallest one, each; of zeros they lose nothing
        bound = per_term * size * slack + torch.where(size > 0.0, 16 * h * w * 2.0**-1074, 0.0)
        return (M.detach().to("cpu", torch.complex128) - exact).abs() * slack + bound

    def mirrored(self, M: Tensor) -> Tensor:
        """conj M(−ω) where the half spectrum (F, ...) holds both, M(ω) elsewhere: M itself for real kernels."""
        if not self.image:
            return M
        h, w = self.image
        both = M.reshape(h, self._half, *M.shape[1:])
        mirrored = both.clone()
        for column in (0, -1) if w % 2 == 0 else (0,):
            mirrored[:, column] = both[-torch.arange(h, device=M.device) % h, column].conj()
        return mirrored.reshape(M.shape)

    def asymmetry(self, M: Tensor) -> float:
        """The largest |M(−ω) − conj M(ω)| where the half spectrum (F, rows, cols) holds both: 0 for real kernels."""
        return float((M - self.mirrored(M)).abs().max()) if self.image and M.numel() else 0.0

    def convolution(self, weight: Tensor, origin: tuple[int, int] | None = None) -> Tensor:
        """The matrices (F, out, in) of circular `conv2d_same` with a weight (out, in, k, k); of a matrix (out, in) applied in
        every pixel; on a dense grid the weight as it is."""
        if not self.image:
            return weight
        if weight.dim() == 2:
            weight = weight[:, :, None, None]
        return self.matrices(fold(weight, self.image, origin))

    def columns(self, X: Tensor) -> Tensor:
        """Coordinates (B, n, F) as columns (F, n, B), samples side by side as a batched product wants them; dense (n, B)."""
        columns = X.permute(2, 1, 0) if self.image else X.mT
        return columns if not self.image or columns.stride(2) == 1 else columns.contiguous()

    def samples(self, columns: Tensor) -> Tensor:
        """The inverse of `columns`, a view."""
        return columns.permute(2, 1, 0) if self.image else columns.mT

    def apply(self, M: Tensor, X: Tensor) -> Tensor:
        """M (F, rows, cols) times coordinates X (B, cols, F) for each sample → (B, rows, F); dense: X M′."""
        return self.samples(M @ self.columns(X)) if self.image else X @ M.mT

    def affine(self, M: Tensor, X: Tensor, b: Tensor) -> Tensor:
        """M X + b, b (rows,) the same in every pixel."""
        if not self.image:
            return functional.linear(X, M, b)
        constant = functional.pad((self.pixels * b).to(M.dtype).reshape(1, -1, 1), (0, 0, 0, 0, 0, len(M) - 1))
        return self.samples(torch.baddbmm(constant, M, self.columns(X)))

    def apply_onto(self, u: Tensor, M: Tensor, X: Tensor) -> Tensor:
        """M X + u, with u (B, rows[, F])."""
        if not self.image:
            return torch.addmm(u, X, M.mT)
        return self.samples(torch.baddbmm(self.columns(u), M, self.columns(X)))

    def constant(self, b: Tensor, count: int) -> Tensor:
        """The coordinates of ``count`` images that are b (n,) in every pixel, (B, n[, F]), in memory of their own."""
        if not self.image:
            return b.expand(count, -1).clone()
        dtype = torch.complex128 if b.dtype == torch.float64 else torch.complex64
        spectrum = torch.zeros(*self.batch, len(b), count, dtype=dtype, device=b.device)
        spectrum[0] = (self.pixels * b).unsqueeze(-1)
        return self.samples(spectrum)

    def norm(self, X: Tensor) -> Tensor:
        """The l2 norm of each sample's pixels, from coordinates: (B, n[, F]) → (B,)."""
        if not self.image:
            return torch.linalg.vector_norm(X, dim=-1)
        return torch.linalg.vector_norm(self.channel_norms(X), dim=-1)

    def channel_norms(self, X: Tensor) -> Tensor:
        """The l2 norm of each channel of each sample, from coordinates: (B, n[, F]) → (B, n)."""
        if not self.image:
            return X.abs()
        parts = torch.view_as_real(self.columns(X)).flatten(1)  # one matrix-vector product sums over the frequencies
        power = self.weights(X) @ parts.square()
        return power.reshape(X.shape[1], X.shape[0], 2).sum(-1).sqrt().mT


def _rfft2(x: Tensor) -> Tensor:
    """``torch.fft.rfft2`` of images (..., h, w), also of none: torch with MKL raises for those (pytorch issue 174984)."""
    if 0 not in x.shape[:-2]:
        return torch.fft.rfft2(x)
    none = x.new_zeros(*x.shape[:-1], x.shape[-1] // 2 + 1, dtype=x.dtype.to_complex())
    return none + x.sum()  # a function of x, as autograd sees it


def _irfft2(X: Tensor, image: tuple[int, ...], dim: tuple[int, int] = (-2, -1)) -> Tensor:
    """``torch.fft.irfft2`` along ``dim`` to images of a size; none from none, as `_rfft2`."""
    if X.numel():
        return torch.fft.irfft2(X, s=image, dim=dim)
    shape = list(X.shape)
    for axis, size in zip(dim, image, strict=True):
        shape[axis] = size
    return X.new_zeros(shape, dtype=X.dtype.to_real()) + X.sum().real


def _require_float(x: Tensor, what: str) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise InvalidParameterError(f"the dtype of {what}", x.dtype, "their transform takes float32 or float64")


def _fourier(size: int, count: int) -> Tensor:
    """exp(−2πi jk/size), (size, count), symmetric: angles reduced to [−π, π] in integers."""
    product = torch.outer(torch.arange(size), torch.arange(count)) % size
    product = torch.where(2 * product > size, product - size, product)
    angle = product.double() * (-2.0 * math.pi / size)
    return torch.complex(angle.cos(), angle.sin())


@cache
def _half_spectrum(h: int, w: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # kept for later calls, which may differentiate
        row = torch.full((w // 2 + 1,), 2.0 / (h * w), dtype=torch.float64)
        row[0] = 1.0 / (h * w)
        if w % 2 == 0:
            row[-1] = 1.0 / (h * w)
        return row.repeat(h).to(device, dtype)


DENSE = Grid()


def same_origin(weight: Tensor) -> tuple[int, int]:
    """The tap that stays in place: (k − 1)//2 in each direction, as torch's ``padding="same"`` has it."""
    return (weight.shape[2] - 1) // 2, (weight.shape[3] - 1) // 2


def fold(weight: Tensor, image: tuple[int, ...], origin: tuple[int, int] | None = None) -> Tensor:
    """A weight (out, in, k, k) as kernels (out, in, h, w): tap (a, b) goes to (a, b) − origin modulo (h, w), accumulated.

    Taps that meet, on images smaller than the kernel, add up. ``origin`` defaults to `same_origin`. Differentiable.
    """
    (p, r), (h, w) = origin or same_origin(weight), image
    rows = (torch.arange(weight.shape[2], device=weight.device) - p) % h
    columns = (torch.arange(weight.shape[3], device=weight.device) - r) % w
    place = (rows.unsqueeze(-1) * w + columns).flatten()
    flat = weight.new_zeros(*weight.shape[:2], h * w).index_add(2, place, weight.flatten(2))
    return flat.unflatten(2, (h, w))


def conv2d_same(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    origin: tuple[int, int] | None = None,
    padding_mode: str = "circular",
) -> Tensor:
    """torch's convolution with kernels of any size, (B, in, h, w) → (B, out, h/stride, w/stride).

        y_i[s, t] = b_i + Σ_j Σ_ab weight_ij[a, b] x_j[stride·s + a − p, stride·t + b − r],  (p, r) = ``origin``

    Pixels outside the image are taken modulo (h, w), or are 0 with ``padding_mode="zeros"``. ``origin`` defaults to
    `same_origin`: then it is ``nn.Conv2d(padding="same", padding_mode=...)``, whose circular kernels end at about twice the
    image. Raises `ShapeError` unless the stride divides h and w.
    """
    if x.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise ShapeError("the input of a convolution", f"(B, {weight.shape[1]}, h, w)", tuple(x.shape))
    if x.shape[2] % stride or x.shape[3] % stride:
        raise ShapeError("the input of a convolution", f"(B, c, h, w), h and w multiples of {stride}", tuple(x.shape))
    p, r = origin or same_origin(weight)
    if padding_mode == "circular" and (weight.shape[2] > x.shape[2] or weight.shape[3] > x.shape[3]):
        weight, p, r = fold(weight, tuple(x.shape[2:]), (p, r)), 0, 0
    # torch's compiler and tracer take no function with derivatives of its own.
    taken_apart = torch.compiler.is_compiling() or is_tracing()
    if padding_mode == "circular" and stride == 1 and not taken_apart:
        if autocasts(x.device) and x.dtype != torch.float64:
            # As it would cast a convolution; the backward pass runs outside of it, where x, weight and y must have one dtype.
            x, weight = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, weight))
        y = _Circular.apply(x, weight, p, r)
        return y if bias is None else y + bias[:, None, None].to(y)
    mode = "constant" if padding_mode == "zeros" else padding_mode
    return functional.conv2d(functional.pad(x, _around(weight, (p, r)), mode=mode), weight, bias, stride)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; there are some, as torch's meta device, that have none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _around(weight: Tensor, origin: tuple[int, int]) -> tuple[int, int, int, int]:
    """Pixels that a kernel needs on the (left, right, top, bottom) of an image."""
    (p, r), (kh, kw) = origin, weight.shape[2:]
    return r, kw - 1 - r, p, kh - 1 - p


class _Circular(torch.autograd.Function):
    """`conv2d_same` on circular images with stride 1, whose derivative in x is its adjoint: a convolution as fast as itself.

    Autograd's own derivative of a padded convolution takes three to five times as long on a CPU, most of it in the padding.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, p: int, r: int) -> Tensor:
        return functional.conv2d(functional.pad(x, _around(weight, (p, r)), mode="circular"), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, *ctx.origin = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        (x, weight), (g,) = ctx.saved_tensors, grad_outputs
        dx = conv2d_adjoint(g, weight, origin=ctx.origin) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None
        padded = functional.pad(x, _around(weight, ctx.origin), mode="circular")
        return dx, conv2d_weight(padded, weight.shape, g), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (x, weight), (dx, dweight, *_) = ctx.saved_tensors, tangents
        dx = torch.zeros_like(x) if dx is None else dx
        dweight = torch.zeros_like(weight) if dweight is None else dweight
        return _Circular.apply(dx, weight, *ctx.origin) + _Circular.apply(x, dweight, *ctx.origin)  # type: ignore[operator]


def conv2d_adjoint(
    x: Tensor, weight: Tensor, padding_mode: str = "circular", origin: tuple[int, int] | None = None
) -> Tensor:
    """The adjoint of `conv2d_same` with stride 1: (B, out, h, w) → (B, in, h, w), by the flipped, transposed kernel."""
    p, r = origin or same_origin(weight)
    kh, kw = weight.shape[2:]
    return conv2d_same(x, weight.flip(2, 3).transpose(0, 1), None, 1, (kh - 1 - p, kw - 1 - r), padding_mode)


def pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    """torch's ``pixel_unshuffle``, (B, c, h, w) → (B, c·factor², h/factor, w/factor); its own leaves the shape of B = 0."""
    if x.numel():
        return functional.pixel_unshuffle(x, factor)
    return x.reshape(len(x), x.shape[1] * factor**2, x.shape[2] // factor, x.shape[3] // factor)


def strided_weight(weight: Tensor, stride: int) -> tuple[Tensor, tuple[int, int]]:
    """The weight (out, in·stride², k′, k′) and origin of a strided convolution, on ``pixel_unshuffle(x, stride)``.

        conv2d_same(x, weight, b, stride) = conv2d_same(pixel_unshuffle(x, stride), weight′, b, 1, origin′)

    The polyphase form: on the coarse grid the strided layer is an ordinary convolution. (FORMULAS 4)
    """
    if stride == 1:
        return weight, same_origin(weight)
    pads, origin = [], []
    for k, p in zip(weight.shape[2:], same_origin(weight), strict=True):
        before = -p % stride  # the first tap moves to a multiple of the stride
        pads.append((before, -(k + before) % stride))
        origin.append((p + before) // stride)
    padded = functional.pad(weight, (*pads[1], *pads[0]))
    return pixel_unshuffle(padded, stride), (origin[0], origin[1])


def hull(M: Tensor, dim: int) -> slice:
    """From the first to the last row (``dim`` −2) or column (−1) of matrices that holds anything; empty where none does."""
    alive = (M != 0).any(-1 if dim == -2 else -2)
    places = alive.reshape(-1, M.shape[dim]).any(0).nonzero().flatten()
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)


def add_gram(M: Tensor, R: Tensor, alpha: float = 1.0) -> Tensor:
    """M + αR′R written over M (..., n, n); returns it. ``R`` (..., r, n); zero columns at either end cost nothing."""
    columns = hull(R, -1)
    part = R[..., columns]
    M[..., columns, columns].add_(part.mH @ part, alpha=alpha)
    return M


class _Gram(torch.autograd.Function):
    """R′R, whose derivative R(D + D′) is one product; autograd would take two."""

    @staticmethod
    def forward(ctx: Any, R: Tensor) -> Tensor:
        ctx.save_for_backward(R)
        return R.mH @ R

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Tensor:
        (R,), (D,) = ctx.saved_tensors, grad_outputs
        return R @ (D + D.mH)  # type: ignore[no-any-return]


def gram(*rows: Tensor) -> Tensor:
    """Σ R′R over matrices (..., r, n) stacked on one another: (..., n, n), differentiable."""
    return _Gram.apply(torch.cat(rows, dim=-2))  # type: ignore[no-any-return]


@contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """torch on one thread inside, where ``wanted``; the number of threads belongs to the process."""
    threads = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if wanted:
            torch.set_num_threads(threads)


def _lu_goes_wrong(A: Tensor) -> bool:
    """torch's batched LU on the CPU is wrong on several threads from n = 160 or so (pytorch issue 142815)."""
    return A.device.type == "cpu" and A.dim() > 2 and A.shape[-1] > 128 and torch.get_num_threads() > 1


def lu_factor(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(LU, pivots, info) of A (..., n, n), as ``torch.linalg.lu_factor_ex``: a singular matrix gives infinite solutions."""
    with one_thread(_lu_goes_wrong(A)):
        LU, pivots, info = torch.linalg.lu_factor_ex(A)
    return LU, pivots, info


def linear_solve(A: Tensor, B: Tensor) -> Tensor:
    """A⁻¹B (..., n, k), differentiable; infinite where A is singular."""
    with one_thread(_lu_goes_wrong(A)):
        return torch.linalg.solve_ex(A, B)[0]


def require_finite(tensor: Tensor, where: str) -> None:
    """Raise `NotFiniteError` when any entry is NaN or infinite."""
    if bool(torch.isfinite(tensor.sum())):  # one bad entry spoils the sum; so may an overflow, hence the count
        return
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise NotFiniteError(where, bad, tensor.numel())


def require_finite_samples(x: Tensor, where: str) -> None:
    """Raise `NotFiniteError`, with the places of the samples, when any of a batch (B, ...) holds NaN or infinity."""
    if bool(torch.isfinite(x.sum())):  # as in `require_finite`
        return
    good = torch.isfinite(x).reshape(len(x), -1)
    if samples := (~good.all(1)).nonzero().flatten().tolist():
        raise NotFiniteError(where, int((~good).sum()), x.numel(), samples)


@contextmanager
def from_samples(x: Tensor, where: str) -> Iterator[None]:
    """Inside, what is not finite is put down to the samples of x (B, ...) that are not, before anything else.

    Nothing is looked at, and no device waited for, until it is raised.
    """
    try:
        yield
    except NotFiniteError:
        require_finite_samples(x, where)
        raise


def hermitian(M: Tensor) -> Tensor:
    """(M + M′)/2, (..., n, n) → (..., n, n)."""
    return 0.5 * (M + M.mH)


def spectral_norm(M: Tensor) -> Tensor:
    """An upper bound of ‖M‖₂, the largest over the leading dimensions; 0-d, differentiable.

    The largest singular value of a backward stable SVD is within p(m, n) u ‖M‖ of the true one (u: unit round-off);
    ``4 max(m, n) u`` is added for it, so that a certificate may rest on the value. Power iteration, which
    under-estimates, is never used. The rounding of a transform that made M from kernels is not covered.
    """
    if 0 in M.shape:
        return M.new_zeros((), dtype=M.real.dtype)
    inflation = 1.0 + 4.0 * max(M.shape[-2:]) * torch.finfo(M.dtype).eps
    return torch.linalg.svdvals(M).amax() * inflation


def least_eigenvalue(H: Tensor) -> float:
    """λ_min of a Hermitian matrix, the smallest over the leading dimensions (LAPACK's, error about n u ‖H‖)."""
    if 0 in H.shape:
        return float("inf")
    return float(torch.linalg.eigvalsh(hermitian(H)).amin())


def roundoff(H: Tensor, scale: float = 0.0) -> float:
    """Allowance for λ_min of a computed H: 32 n u max(‖H‖_F, scale).

    Forming H by products of length n and LAPACK's eigenvalues both err by a small multiple of n u times the size of
    the terms that were added up; ``scale`` is that size where H itself is what is left after they cancelled.
    """
    size = max(float(torch.linalg.matrix_norm(H).amax()), scale) if 0 not in H.shape else scale
    return 32.0 * max(H.shape[-1], 1) * torch.finfo(H.dtype).eps * size


def psd_sqrt(H: Tensor, where: str, scale: float = 0.0) -> Tensor:
    """The principal square root F = F′ of H ⪰ 0, so F′F = H; (..., n, n) → (..., n, n).

    Eigenvalues in [−roundoff(H, scale), 0) are round-off and count as 0: F′F is then PSD by construction and differs
    from H by no more than that. The principal root keeps the symmetry of a real convolution's spectrum, to √u in its kernel.

    Raises `NotPSDError` with λ_min when it is below −roundoff(H, scale). (FORMULAS 0, "Getting V".)
    """
    if 0 in H.shape:
        return H
    values, vectors = torch.linalg.eigh(hermitian(H))
    tolerance = roundoff(H, scale)
    least = float(values.amin())
    if least < -tolerance:
        raise NotPSDError(where, least, tolerance)
    return (vectors * values.clamp(min=0.0).sqrt().unsqueeze(-2)) @ vectors.mH


def psd_factor(H: Tensor, where: str, scale: float = 0.0) -> Tensor:
    """Some F with F′F = H ⪰ 0, (..., n, n): the Cholesky factor where there is one, which is fast, else `psd_sqrt`.

    Both keep the symmetry of a real convolution's spectrum. Raises `NotPSDError` as `psd_sqrt` does.
    """
    if 0 in H.shape:
        return H
    R, info = torch.linalg.cholesky_ex(hermitian(H), upper=True)
    return R if not bool(info.any()) else psd_sqrt(H, where, scale)


def triangular_factor(rows: Tensor) -> Tensor:
    """The R of a QR: R′R = rows′rows with at most n rows; (..., r, n) → (..., min(r, n), n).

    Never squares the condition number and works for singular R′R (FORMULAS 0, "Getting V").
    """
    return torch.linalg.qr(rows, mode="r").R
