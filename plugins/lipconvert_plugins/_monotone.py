"""Monotone equilibrium models W = I − Φ(A′A + B′ − B + mI): what MonDEQ (Φ = I) and G-MonDEQ share (FORMULAS 1.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from lipconvert import (
    DAE,
    Activations,
    InvalidParameterError,
    SolverOptions,
    StateMap,
    activation_module,
    activation_of,
    equilibrium,
    psd_sqrt,
    required_option,
    spectral_norm,
)


class MonotoneDEQ(nn.Module):
    """z = σ(Wz + Ux + b), y = Wout z + c with W = I − Φ(A′A + B′ − B + mI), (..., in) → (..., out).

    ``hidden`` states; ``out_features=None`` reads the states themselves (G = I). Two ways to a Lipschitz constant:

    * ``lipschitz=None``: U and Wout are free, L = ‖Φ⁻¹U‖‖G‖/m with upper bounds of both norms (Theorem 3.3 for any G);
    * ``lipschitz=L``: U = mLΦQ and Wout = Q′ with (semi-)orthogonal Q, Q′ (Lip-MonDEQ; not U/√m orthogonal, FORMULAS
      P14), so that L holds by construction.

    Parameters carry the names of the public MonDEQ code: ``U``, ``A``, ``B``, ``Wout``. Raises `InvalidParameterError` for
    m ≤ 0 and `NotConvergedError` from the solver; ``options`` say how its equilibria are solved.
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
        super().__init__()
        self.options = SolverOptions() if options is None else options
        if not 0.0 < m < float("inf"):
            raise InvalidParameterError("m", m, "the monotonicity must be positive")
        if lipschitz is not None and not 0.0 < lipschitz < float("inf"):
            raise InvalidParameterError("lipschitz", lipschitz, "a prescribed constant must be positive")
        self.m, self.prescribed = float(m), None if lipschitz is None else float(lipschitz)
        self.activation = nn.ReLU() if activation is None else activation
        self.U = nn.Linear(in_features, hidden)
        self.A = nn.Linear(hidden, hidden, bias=False)
        self.B = nn.Linear(hidden, hidden, bias=False)
        self.Wout = None if out_features is None else nn.Linear(hidden, out_features)
        self.input_shape = (in_features,)
        if lipschitz is not None:
            # Without trivialisation Q is computed from the parameters alone: orthogonal to the precision of their dtype.
            orthogonal(self.U, use_trivialization=False)
            if self.Wout is not None:
                if self.Wout.out_features > hidden:
                    raise InvalidParameterError("out_features", out_features, f"at most the {hidden} hidden states")
                orthogonal(self.Wout, use_trivialization=False)

    def phi(self) -> Tensor:
        """The diagonal of Φ, (hidden,), positive."""
        raise NotImplementedError

    def input_map(self) -> Tensor:
        """U (hidden, in)."""
        U = self.U.weight
        return U if self.prescribed is None else self.m * self.prescribed * self.phi().unsqueeze(-1) * U

    def readout(self) -> Tensor:
        """G (out, hidden)."""
        return torch.eye(len(self.phi())).to(self.A.weight) if self.Wout is None else self.Wout.weight

    def W(self) -> Tensor:
        """W = I − Φ(A′A + B′ − B + mI), (hidden, hidden). (paper eq. 5, 6)"""
        A, B = self.A.weight, self.B.weight
        eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
        return eye - self.phi().unsqueeze(-1) * (A.mT @ A + B.mT - B + self.m * eye)

    def norms(self) -> tuple[float, float]:
        """Upper bounds (n_U, n_G) of ‖Φ⁻¹U‖ and ‖G‖; by construction mL and 1 where L is prescribed."""
        if self.prescribed is not None:
            return self.m * self.prescribed, 1.0
        n_U = spectral_norm(self.input_map().detach() / self.phi().detach().unsqueeze(-1))
        return float(n_U), float(spectral_norm(self.readout().detach()))

    @property
    def lipschitz(self) -> float:
        """L = n_U n_G / m (1 for a constant function, n_U n_G = 0)."""
        if self.prescribed is not None:
            return self.prescribed
        n_U, n_G = self.norms()
        return n_U * n_G / self.m or 1.0

    def forward(self, x: Tensor) -> Tensor:
        W = self.W()
        u = torch.nn.functional.linear(x, self.input_map(), self.U.bias)
        u, shape = u.reshape(u.shape[:-1].numel(), len(W)), u.shape
        sigma = Activations(activation_of(self.activation), len(W))
        map = StateMap(W, Lambda=self.phi().detach().reciprocal())
        z = equilibrium(W, u, sigma, map, self.options, f"the equilibrium of {type(self).__name__}")
        z = z.reshape(shape)
        return z if self.Wout is None else self.Wout(z)


def monotone_dae(model: MonotoneDEQ) -> DAE:
    """The model as a DAE: Λ = λΦ⁻¹, λ = n_G/n_U, L = n_U n_G/m, and the rows                           (FORMULAS 1.4)

    V = [ √λ A;  (n_G²I − G′G)^{1/2}/√2L;  λ(n_U²I − Φ⁻¹UU′Φ⁻¹)^{1/2}/√2L;  √c₀ I ],
    c₀ = λm − n_G²/2L − λ²n_U²/2L ≥ 0
    """
    A, G, U, phi = model.A.weight, model.readout(), model.input_map(), model.phi()
    A, G, U, phi = (t.detach() for t in (A, G, U, phi))
    n_U, n_G = model.norms()
    m, L = model.m, model.lipschitz
    # U = 0 or G = 0 is a constant function: any L > 0 does, and λ is what keeps c₀ ≥ 0.
    lam = n_G / n_U if n_U * n_G > 0 else n_G**2 / (m * L) if n_G > 0 else m * L / n_U**2 if n_U > 0 else 1.0
    eye = torch.eye(len(A), dtype=A.dtype)
    PU = U / phi.unsqueeze(-1)
    c_0 = lam * m - (n_G**2 + (lam * n_U) ** 2) / (2.0 * L)
    rows = [
        lam**0.5 * A,
        psd_sqrt(n_G**2 * eye - G.mT @ G, "n_G²I - G'G", scale=n_G**2) / (2.0 * L) ** 0.5,
        psd_sqrt(n_U**2 * eye - PU @ PU.mT, "n_U²I - Φ⁻¹UU'Φ⁻¹", scale=n_U**2) * lam / (2.0 * L) ** 0.5,
        # c₀ = 0 up to round-off when L = n_U n_G / m; it is positive for a constant function only.
        max(c_0, 0.0) ** 0.5 * eye if n_U * n_G == 0 else 0.0 * eye[:0],
    ]
    return DAE(
        W=model.W(),
        U=U,
        G=G,
        Lambda=lam / phi,
        b_z=model.U.bias,
        b_y=None if model.Wout is None else model.Wout.bias,
        activations=Activations(activation_of(model.activation), len(A)),
        lipschitz=L,
        V=torch.cat(rows),
    )


def monotone_from_state_dict(
    kind: type[MonotoneDEQ], name: str, extra: set[str], state_dict: Mapping[str, Tensor], options: Mapping[str, Any]
) -> nn.Module | None:
    """A model from the public layout U, A, B (and Wout), with ``extra`` keys; None if it is another one."""
    prefix = next((key.removesuffix("A.weight") for key in state_dict if key.endswith("A.weight")), None)
    if prefix is None:
        return None
    # The public code keeps the equilibrium layer under "mon.linear_module."; the readout stays outside.
    tensors = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    free = {"U.weight", "U.bias", "A.weight", "B.weight"} | extra
    readout = {"Wout.weight", "Wout.bias"} & set(tensors)
    stored = {key for key in tensors if ".parametrizations." in key}
    if stored:
        free = (free - {"U.weight"}) | stored
        readout -= {"Wout.weight"}
    if set(tensors) != free | readout or len(tensors["A.weight"]) != len(tensors["U.bias"]):
        return None
    m = required_option(options, "m", name, "the monotonicity of W = I - Φ(A'A + B' - B + mI)")
    meaning = "the constant γ its orthogonal U and Wout were scaled to"
    lipschitz = float(required_option(options, "lipschitz", name, meaning)) if stored else None
    U = tensors["U.weight"] if not stored else next(v for k, v in tensors.items() if k.startswith("U.param"))
    model = kind(
        U.shape[1],
        len(U),
        len(tensors["Wout.bias"]) if "Wout.bias" in tensors else None,
        m=float(m),
        lipschitz=lipschitz,
        activation=activation_module(required_option(options, "activation", name, "relu, tanh, leaky_relu(0.1), ...")),
    ).to(tensors["A.weight"].dtype)
    model.load_state_dict(tensors)
    return model
