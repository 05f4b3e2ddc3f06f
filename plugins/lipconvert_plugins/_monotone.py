"""Monotone equilibrium models W = I − Φ(A′A + B′ − B + mI): what MonDEQ (Φ = I) and G-MonDEQ share (FORMULAS 1.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from lipconvert import (
    DAE,
    Activations,
    Grid,
    InvalidParameterError,
    ShapeError,
    SolverOptions,
    StateMap,
    WeightsError,
    activation_module,
    activation_of,
    equilibrium,
    full_precision,
    number,
    psd_sqrt,
    required_option,
    spectral_norm,
)

from ._convolution import image_of, kernel_shape
from ._layouts import FILE, require_shape, unwrapped
from ._orthogonal import Orthogonal

DENSE = Grid()


class Monotone(nn.Module):
    """z = σ(Wz + Ux + b), y = Gz + c with W = I − Φ(A′A + B′ − B + mI): dense, or circular convolutions on images.

    Subclasses make the parameters (``U``, ``A``, ``B``, ``Wout``, as the public MonDEQ code calls them) and say what Φ is. On
    a `Grid` the matrices below are those of each frequency.
    """

    U: nn.Linear | nn.Conv2d
    A: nn.Linear | nn.Conv2d
    B: nn.Linear | nn.Conv2d
    Wout: nn.Linear | nn.Conv2d | None
    input_shape: tuple[int, ...]

    def __init__(
        self, m: float, lipschitz: float | None, activation: nn.Module | None, options: SolverOptions | None
    ) -> None:
        super().__init__()
        self.options = SolverOptions() if options is None else options
        self.m = number(m, "m", "the monotonicity must be positive", above=0.0)
        requirement = "a prescribed constant must be positive"
        self.prescribed = None if lipschitz is None else number(lipschitz, "lipschitz", requirement, above=0.0)
        self.activation = nn.ReLU() if activation is None else activation

    def grid(self, image: tuple[int, ...] = ()) -> Grid:
        """Where the states live for inputs of a size."""
        raise NotImplementedError

    def phi(self) -> Tensor:
        """The diagonal of Φ, (hidden,), positive."""
        raise NotImplementedError

    def unit(self, weight: Tensor, grid: Grid) -> Tensor:
        """The matrices of a weight of U or Wout, scaled to norm 1 where L is prescribed."""
        raise NotImplementedError

    def input_map(self, grid: Grid = DENSE) -> Tensor:
        """U (hidden, in)."""
        U = self.unit(self.U.weight, grid)
        return U if self.prescribed is None else self.m * self.prescribed * self.phi().unsqueeze(-1) * U

    def readout(self, grid: Grid = DENSE) -> Tensor:
        """G (out, hidden)."""
        if self.Wout is not None:
            return self.unit(self.Wout.weight, grid)
        A = grid.convolution(self.A.weight)
        return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)

    def W(self, grid: Grid = DENSE) -> Tensor:
        """W = I − Φ(A′A + B′ − B + mI), (hidden, hidden). (paper eq. 5, 6)"""
        A, B = grid.convolution(self.A.weight), grid.convolution(self.B.weight)
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        return eye - self.phi().unsqueeze(-1) * (A.mH @ A + B.mH - B + self.m * eye)

    def norms(self, grid: Grid = DENSE) -> tuple[float, float]:
        """Upper bounds (n_U, n_G) of ‖Φ⁻¹U‖ and ‖G‖; by construction mL and 1 where L is prescribed."""
        if self.prescribed is not None:
            return self.m * self.prescribed, 1.0
        n_U = spectral_norm(self.input_map(grid).detach() / self.phi().detach().unsqueeze(-1))
        return float(n_U), float(spectral_norm(self.readout(grid).detach()))

    def lipschitz_on(self, grid: Grid) -> float:
        """L = n_U n_G / m on a grid (1 for a constant function, n_U n_G = 0), or as prescribed."""
        if self.prescribed is not None:
            return self.prescribed
        n_U, n_G = self.norms(grid)
        return n_U * n_G / self.m or 1.0

    @full_precision
    def forward(self, x: Tensor) -> Tensor:
        grid = self.grid(tuple(x.shape[-2:]))
        rank = 3 if grid else 1
        inputs = self.U.weight.shape[1]
        if x.dim() < rank or x.shape[x.dim() - rank] != inputs:
            sizes = "(..., c, h, w)" if grid else "(..., c)"
            raise ShapeError(f"the input of {type(self).__name__}", f"{sizes} with c = {inputs}", tuple(x.shape))
        lead, x = x.shape[: x.dim() - rank], x.reshape(-1, *x.shape[x.dim() - rank :])
        W = self.W(grid)
        u = grid.affine(self.input_map(grid), grid.coordinates(x), self._bias(self.U))
        sigma = Activations(activation_of(self.activation), W.shape[-1])
        map = StateMap(W, Lambda=self.phi().detach().reciprocal(), grid=grid, kept=False)
        z = equilibrium(W, u, sigma, map, self.options, f"the equilibrium of {type(self).__name__}")
        y = z if self.Wout is None else grid.affine(self.readout(grid), z, self._bias(self.Wout))
        y = grid.values(y)
        return y.reshape(*lead, *y.shape[1:])

    @staticmethod
    def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
        return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias


class MonotoneDEQ(Monotone):
    """The dense model, (..., in) → (..., out). ``hidden`` states; ``out_features=None`` reads the states (G = I).

    Two ways to a Lipschitz constant:

    * ``lipschitz=None``: U and Wout are free, L = ‖Φ⁻¹U‖‖G‖/m with upper bounds of both norms (Theorem 3.3 for any G);
    * ``lipschitz=L``: U = mLΦQ and Wout = Q′ with (semi-)orthogonal Q, Q′ (Lip-MonDEQ; not U/√m orthogonal, FORMULAS
      P14), so that L holds by construction.

    Raises `InvalidParameterError` for m ≤ 0 and `NotConvergedError` from the solver; ``options`` say how its equilibria
    are solved.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int | None = None,
        *,
        m: float = 1.0,
        lipschitz: float | None = None,
        activation: nn.Module | None = None,
        options: SolverOptions | None = None,
    ) -> None:
        super().__init__(m, lipschitz, activation, options)
        self.U = nn.Linear(in_features, hidden)
        self.A = nn.Linear(hidden, hidden, bias=False)
        self.B = nn.Linear(hidden, hidden, bias=False)
        self.Wout = None if out_features is None else nn.Linear(hidden, out_features)
        self.input_shape = (in_features,)
        if lipschitz is not None:
            # Computed from the parameters alone: orthogonal to the precision of their dtype.
            register_parametrization(self.U, "weight", Orthogonal())
            if self.Wout is not None:
                if self.Wout.out_features > hidden:
                    raise InvalidParameterError("out_features", out_features, f"at most the {hidden} hidden states")
                register_parametrization(self.Wout, "weight", Orthogonal())

    def grid(self, image: tuple[int, ...] = ()) -> Grid:
        return DENSE

    def unit(self, weight: Tensor, grid: Grid) -> Tensor:
        return weight  # orthogonal by its parametrisation where L is prescribed

    @property
    def lipschitz(self) -> float:
        """L (`Monotone.lipschitz_on`)."""
        return self.lipschitz_on(DENSE)


class MonotoneDEQConv2d(Monotone):
    """The convolutional model, (B, in_channels, h, w) → (B, out_channels, h, w), circular, for kernels of any size.

    ``hidden`` channels of states; ``out_channels=None`` reads the states (G = I), else ``Wout`` is a 1×1 convolution.
    ``lipschitz=None``: L = ‖Φ⁻¹U‖‖G‖/m with the largest norms over the frequencies of the images at hand. ``lipschitz=L``:
    U = mLΦK/‖K‖ and Wout = K′/‖K′‖ with free kernels, so that L holds by construction on images of any size.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int | None = None,
        kernel_size: int | tuple[int, int] = 3,
        *,
        m: float = 1.0,
        lipschitz: float | None = None,
        activation: nn.Module | None = None,
        options: SolverOptions | None = None,
    ) -> None:
        super().__init__(m, lipschitz, activation, options)
        kernel = kernel_shape(kernel_size)
        self.U = nn.Conv2d(in_channels, hidden, kernel)
        self.A = nn.Conv2d(hidden, hidden, kernel, bias=False)
        self.B = nn.Conv2d(hidden, hidden, kernel, bias=False)
        self.Wout = None if out_channels is None else nn.Conv2d(hidden, out_channels, 1)

    def grid(self, image: tuple[int, ...] = ()) -> Grid:
        return Grid(image)

    def unit(self, weight: Tensor, grid: Grid) -> Tensor:
        matrices = grid.convolution(weight)
        if self.prescribed is None:
            return matrices
        norm = spectral_norm(matrices)
        return matrices / torch.where(norm > 0, norm, torch.ones_like(norm))


def monotone_states(model: Monotone) -> int:
    """The states of `monotone_dae`, 0 where σ is the identity."""
    return 0 if isinstance(model.activation, nn.Identity) else len(model.A.weight)


def monotone_dae(model: Monotone, input_shape: tuple[int, ...] | None = None) -> DAE:
    """The model as a DAE: Λ = λΦ⁻¹, λ = n_G/n_U, L = n_U n_G/m, and the rows                           (FORMULAS 1.4)

    V = [ √λ A;  (n_G²I − G′G)^{1/2}/√2L;  λ(n_U²I − Φ⁻¹UU′Φ⁻¹)^{1/2}/√2L;  √c₀ I ],
    c₀ = λm − n_G²/2L − λ²n_U²/2L ≥ 0
    """
    grid = model.grid(image_of(model, input_shape) if isinstance(model, MonotoneDEQConv2d) else ())
    A, G, U, phi = grid.convolution(model.A.weight), model.readout(grid), model.input_map(grid), model.phi()
    A, G, U, phi = (t.detach() for t in (A, G, U, phi))
    n_U, n_G = model.norms(grid)
    m, L = model.m, model.lipschitz_on(grid)
    # U = 0 or G = 0 is a constant function: any L > 0 does, and λ is what keeps c₀ ≥ 0.
    lam = n_G / n_U if n_U * n_G > 0 else n_G**2 / (m * L) if n_G > 0 else m * L / n_U**2 if n_U > 0 else 1.0
    eye = torch.eye(len(phi), dtype=A.dtype).expand(*grid.batch, -1, -1)
    PU = U / phi.unsqueeze(-1)
    c_0 = lam * m - (n_G**2 + (lam * n_U) ** 2) / (2.0 * L)
    rows = [
        lam**0.5 * A,
        psd_sqrt(n_G**2 * eye - G.mH @ G, "n_G²I - G'G", scale=n_G**2) / (2.0 * L) ** 0.5,
        psd_sqrt(n_U**2 * eye - PU @ PU.mH, "n_U²I - Φ⁻¹UU'Φ⁻¹", scale=n_U**2) * lam / (2.0 * L) ** 0.5,
        # c₀ = 0 up to round-off when L = n_U n_G / m; it is positive for a constant function only.
        max(c_0, 0.0) ** 0.5 * (eye if n_U * n_G == 0 else eye[..., :0, :]),
    ]
    return DAE(
        W=model.W(grid),
        U=U,
        G=G,
        Lambda=lam / phi,
        b_z=model.U.bias,
        b_y=None if model.Wout is None else model.Wout.bias,
        activations=Activations(activation_of(model.activation), len(phi)),
        lipschitz=L,
        V=torch.cat(rows, dim=-2),
        grid=grid,
    )


def monotone_from_state_dict(
    kind: type[MonotoneDEQ],
    conv: type[MonotoneDEQConv2d],
    name: str,
    extra: set[str],
    state_dict: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> nn.Module | None:
    """A model from the public layout U, A, B (and Wout), with ``extra`` keys; None if it is another one.

    Any m > 0 gives a monotone W, and L is taken from the tensors: nothing in the file can tell that m is wrong.
    """
    # The public code keeps the equilibrium layer under "mon.linear_module."; the readout stays outside.
    tensors = unwrapped(state_dict, "A.weight")
    if "A.weight" not in tensors:
        return None
    if {"g", "h", "B.weight"} <= set(tensors):
        raise WeightsError(
            FILE,
            "these are convolutions of the public MonDEQ code (g, h), which sets the border of the states to zero: "
            "not one activation for each channel, and no circular model",
        )
    free = {"U.weight", "U.bias", "A.weight", "B.weight"} | extra
    readout = {"Wout.weight", "Wout.bias"} if {"Wout.weight", "Wout.bias"} & set(tensors) else set[str]()
    stored = {key for key in tensors if ".parametrizations." in key}
    if stored:
        free = (free - {"U.weight"}) | stored
        readout -= {"Wout.weight"}
    missing = (free | readout) - set(tensors)
    if set(tensors) - free - readout or len(missing) > 1 or missing & extra:
        return None
    if missing:
        raise WeightsError(FILE, f"these look like {name} weights, but {missing.pop()!r} is missing")
    if len(tensors["A.weight"]) != len(tensors["U.bias"]):
        raise ShapeError(
            "tensor 'A.weight'", f"{len(tensors['U.bias'])} rows, as U.bias", tuple(tensors["A.weight"].shape)
        )
    images = tensors["A.weight"].dim() == 4
    arguments: dict[str, Any] = {
        "m": required_option(options, "m", name, "the monotonicity of W = I - Φ(A'A + B' - B + mI)", float),
        "activation": activation_module(
            required_option(options, "activation", name, "relu, tanh, leaky_relu(0.1), ...")
        ),
    }
    if stored or images:
        meaning = "the constant γ that U and Wout are scaled to" + (', or "free"' if images else "")
        arguments["lipschitz"] = required_option(
            options, "lipschitz", name, meaning, lambda v: None if images and v == "free" else float(v)
        )
    U = tensors["U.weight"] if not stored else next(v for k, v in tensors.items() if k.startswith("U.param"))
    if U.dim() != tensors["A.weight"].dim():
        raise ShapeError("tensor 'U.weight'", f"{tensors['A.weight'].dim()} dimensions, as A.weight", tuple(U.shape))
    sizes = (U.shape[1], len(U), len(tensors["Wout.bias"]) if "Wout.bias" in tensors else None)
    kernel = {"kernel_size": (U.shape[2], U.shape[3])} if images else {}
    model = (conv if images else kind)(*sizes, **kernel, **arguments).to(U.dtype)
    for key, value in model.state_dict().items():
        require_shape(tensors[key], key, tuple(value.shape))
    model.load_state_dict(tensors)
    return model
