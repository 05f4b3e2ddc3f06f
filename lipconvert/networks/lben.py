"""The Lipschitz-bounded equilibrium network as a torch module.

    W = I − Ψ( G′G/2L + Ψ⁻¹UU′Ψ⁻¹/2L + V′V + S − S′ + εI ),  Ψ = exp(log_psi)                      (paper eq. 2)
    z = σ(Wz + Ux + b_z),  y = Gz + b_y

W is never a parameter: it is rebuilt from (log_psi, G, U, V, S), for which H(Ψ⁻¹, L) = 2V′V + 2εI ⪰ 0 whatever their
values (FORMULAS 0.6). So L survives every optimiser step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dae.activations import Activation, Activations, activation_of
from ..dae.dae import DAE
from ..equilibria.equilibrium import DEFAULT, Solution, SolverOptions, equilibrium, full_precision, solve
from ..errors import InvalidParameterError, ShapeError
from ..foundation.arguments import count, isolated, make_ordinary, number, plain_tensor, require_ordinary, sizes
from ..foundation.integrity import recorded, require_own
from ..linalg.spectrum import Grid, from_samples, require_finite
from ..linalg.state_map import StateMap, triangular_blocks
from .construction import assemble, construct


@dataclass
class _Assembled:
    """What inference reuses while the parameters stay: W, U and G as matrices, the rows of U that hold anything and whether
    they are I (as for every residual network)."""

    key: tuple[object, ...]
    map: StateMap
    U: Tensor
    G: Tensor
    driven: slice
    copies: bool


@recorded("options", "name", "_inference", whole=True)
class LBEN(nn.Module):
    """An L-Lipschitz equilibrium network x (..., p) → y (..., q) with n states, trainable without constraints.

    ``LBEN(p, n, q)`` starts from random weights (the paper's baseline); ``LBEN.from_dae(dae)`` from a converted network.
    ``image=(h, w)``: a network of circular convolutions, x (B, p, h, w) → y (B, q, h, w) with n channels of states.
    ``lipschitz``: L. ``epsilon``: ε ≥ 0; with ε > 0 it is well-posed for all parameters (H ≻ 0, Proposition 2.2), with
    ε = 0 only as long as (3) holds (`lipconvert.check`). ``activation``: one for all states, or `Activations`.
    ``blocks``: sizes of the groups of states that substitution and sweeps go by, one group by default. ``options``: how its
    equilibria are solved. ``fill=False`` leaves the parameters unset, for those who write them all.

    Parameters: log_psi (n,), G (q, n), U (n, p), V (n, n), S (n, n), b_z (n,), b_y (q,). With an image G, U, V and S are
    real kernels of its size, G (q, n, h, w) and so on (`Grid.kernels`): every value of them is an L-Lipschitz network.
    Forward raises `ShapeError` for inputs that do not fit, `NotFiniteError` for samples that are not numbers and
    `NotConvergedError`.
    """

    log_psi: nn.Parameter
    G: nn.Parameter
    U: nn.Parameter
    V: nn.Parameter
    S: nn.Parameter
    b_z: nn.Parameter
    b_y: nn.Parameter

    def __init__(
        self,
        in_features: int,
        states: int,
        out_features: int,
        *,
        lipschitz: float = 1.0,
        epsilon: float = 1e-2,
        activation: nn.Module | str | Activation | Activations = "relu",
        blocks: Sequence[int] | None = None,
        options: SolverOptions = DEFAULT,
        name: str = "lben",
        image: int | Sequence[int] = (),
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        fill: bool = True,
    ) -> None:
        super().__init__()
        in_features, states = count(in_features, "in_features"), count(states, "states")
        out_features = count(out_features, "out_features")
        lipschitz, epsilon = _constants(lipschitz, epsilon)
        if isinstance(activation, Activations):
            self.sigma = activation
        else:
            self.sigma = Activations(activation_of(activation), states)
        if len(self.sigma) != states:
            raise ShapeError("activations", f"{states} rows", f"{len(self.sigma)} rows")
        self.lipschitz, self.epsilon = lipschitz, epsilon
        self.options, self.name = options, name
        self.blocks = _blocks((states,) if blocks is None else blocks, states)
        self.grid = Grid(tuple(image) if isinstance(image, Sequence) else (image, image))
        self.input_shape = (in_features, *self.grid.image)
        shapes = {
            "log_psi": (states,),
            "G": (out_features, states, *self.grid.image),
            "U": (states, in_features, *self.grid.image),
            "V": (states, states, *self.grid.image),
            "S": (states, states, *self.grid.image),
            "b_z": (states,),
            "b_y": (out_features,),
        }
        for key, shape in shapes.items():
            setattr(self, key, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._inference: _Assembled | None = None
        self._held: tuple[Tensor, Tensor, Tensor] | None = None
        self._given: Tensor | None = None
        if fill:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random weights of size 1/√fan-in; Ψ = I, zero biases."""
        for weight in (self.G, self.U, self.V, self.S):
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        for bias in (self.log_psi, self.b_z, self.b_y):
            nn.init.zeros_(bias)

    @classmethod
    @isolated
    def from_dae(cls, dae: DAE, epsilon: float = 0.0, delta: float = 0.0, options: SolverOptions = DEFAULT) -> LBEN:
        """The LBEN with the same function and constant as a DAE, in float64; see `networks.construction.construct`."""
        P = construct(dae, epsilon, delta)
        require_finite(P.Psi, f"Ψ = 1/Λ of {dae.name!r}")
        if dae.grid:
            _require_real_kernels(dae, P.V)
        self = cls(
            dae.inputs,
            dae.states,
            dae.outputs,
            lipschitz=P.lipschitz,
            epsilon=P.epsilon,
            activation=dae.sigma,
            blocks=triangular_blocks(dae.W),
            options=options,
            name=dae.name,
            image=dae.grid.image,
            device=dae.W.device,
            dtype=torch.float64,
            fill=False,
        )
        with torch.no_grad():
            kernels = dae.grid.kernels
            self.V.zero_()
            self.V[: P.V.shape[-2]] = kernels(P.V)
            for parameter, value in (
                (self.log_psi, P.Psi.log()),
                (self.G, kernels(P.G)),
                (self.U, kernels(P.U)),
                (self.S, kernels(P.S)),
                (self.b_z, dae.bias_z),
                (self.b_y, dae.bias_y),
            ):
                parameter.copy_(value)
        return self

    @property
    def scalable(self) -> bool:
        """Whether `balance` applies: σ is positively homogeneous (ReLU, leaky ReLU, identity), and ε = 0 or Ψ = ψI.

        Else ε(Ψ − ψI) would have to go into V′V, which would cost V its zeros.
        """
        return self.sigma.homogeneous and (self.epsilon == 0.0 or bool((self.log_psi == self.log_psi[0]).all()))

    @torch.no_grad()
    def balance(self) -> bool:
        """The same function in the gauge Ψ = I, in place, where it is `scalable`; whether it is. (FORMULAS L4)

        With D = Ψ^{-1/2}: U ← DU, b_z ← Db_z, G ← GD⁻¹, V ← VD⁻¹, S ← D⁻¹SD⁻¹, ε ← εψ, Ψ ← I. For training: W moves by Ψ
        times what V and S do, and in a converted residual network Ψ is 1 for some states and may be in the hundreds for
        others, while Adam's steps are of one size.
        """
        if not self.scalable:
            return False
        if bool(self.log_psi.any()):
            Psi = self.log_psi.double().exp()
            D = Psi.rsqrt()
            rows, columns = D.reshape(-1, *[1] * (self.S.dim() - 1)), D.reshape(-1, *[1] * (self.S.dim() - 2))
            for parameter, value in (
                (self.U, rows * self.U),
                (self.b_z, D * self.b_z),
                (self.G, self.G / columns),
                (self.V, self.V / columns),
                (self.S, self.S / rows / columns),
            ):
                parameter.copy_(value)
            self.epsilon *= float(Psi[0])
            self.log_psi.zero_()
            self.refresh()
        return True

    @property
    def Psi(self) -> Tensor:
        """Ψ = exp(log_psi), the diagonal, (n,); Λ = Ψ⁻¹."""
        return self.log_psi.exp()

    @property
    def W(self) -> Tensor:
        """W (n, n), or (F, n, n), rebuilt from the parameters, differentiable. (paper eq. 2)"""
        return self.matrices()[0]

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """(W, U, G) as matrices, for each frequency with an image; differentiable."""
        if self._held is not None:
            return self._held
        if self._given is not None:
            return self.grid.matrices(self._given), self.grid.matrices(self.U), self.grid.matrices(self.G)
        G, U, V, S = (self.grid.matrices(p) for p in (self.G, self.U, self.V, self.S))
        return assemble(self.Psi, G, U, V, S, self.epsilon, self.lipschitz), U, G

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, `matrices` are assembled once: for a training step that needs W besides the forward pass."""
        self._held = self.matrices()
        try:
            yield
        finally:
            self._held = None

    def with_W(self, W: Tensor) -> LBEN:
        """A frozen copy in float64 on the CPU whose W is given instead of rebuilt: z = σ(Wz + Ux + b_z), y = Gz + b_y.

        ``W``: (n, n), or with an image real kernels (n, n, h, w). Its other floats are those of the original to the last bit;
        V and S have no part in it. For what holds a W of its own, such as a file.
        """
        if W.shape != self.S.shape:
            raise ShapeError(f"W of {self.name!r}", tuple(self.S.shape), tuple(W.shape))
        stage = copy.deepcopy(self).to("cpu", torch.float64).requires_grad_(False)
        stage._given = W.detach().to("cpu", torch.float64)
        return stage

    @property
    def given(self) -> Tensor | None:
        """The W of `with_W`, as it was given; None where W is rebuilt from the parameters."""
        return self._given

    def dae(self) -> DAE:
        """The network as a DAE (float64, detached): W rebuilt in float64 (or the one given), Λ = Ψ⁻¹, without V.

        Raises `ModifiedModuleError` where the stage runs something else.
        """
        require_own(self, f"stage {self.name!r}")
        with torch.no_grad():
            Psi = self.log_psi.double().exp()
            G, U, V, S = (self.grid.matrices(p.double()) for p in (self.G, self.U, self.V, self.S))
            if self._given is None:
                W = assemble(Psi, G, U, V, S, self.epsilon, self.lipschitz)
            else:
                W = self.grid.matrices(self._given)
            return self._with(W, U, G, Psi.reciprocal())

    def running(self) -> DAE:
        """The floats in use, widened to float64 without rounding: W, U and G as assembled in the module's own precision.

        `dae` rebuilds W in float64; this is what a certificate speaks of. Λ = Ψ⁻¹ is only a multiplier. Raises
        `ModifiedModuleError` where the stage runs something else.
        """
        require_own(self, f"stage {self.name!r}")
        with torch.no_grad():
            assembled = self._assembled()
            U = assembled.U.new_zeros(*self.grid.batch, len(self.b_z), self.U.shape[1])
            U[..., assembled.driven, :] = assembled.U
            return self._with(assembled.map.W, U, assembled.G, self.log_psi.double().neg().exp())

    def _with(self, W: Tensor, U: Tensor, G: Tensor, Lambda: Tensor) -> DAE:
        rest = {"blocks": self.blocks, "name": self.name, "grid": self.grid}
        return DAE(W, U, G, Lambda, self.b_z, self.b_y, self.sigma, self.lipschitz, **rest)

    def state_map(self) -> StateMap:
        """z → Wz for the weights as they are, assembled once per change of them; see `refresh`."""
        return self._assembled().map

    def assembled(self) -> tuple[Tensor, Tensor, Tensor]:
        """W, and the rows of U and G, that inference runs with; not to be written to."""
        assembled = self._assembled()
        return assembled.map.W, assembled.U, assembled.G

    def refresh(self) -> None:
        """Forget the assembled W, also of `held`. Needed only after writing a few entries through ``parameter.data``.

        Optimiser steps, ``load_state_dict``, ``.to(...)`` and ``train()``/``eval()`` are noticed through version counters
        or hooks, writes to whole tensors through ``.data`` by a sample of their entries.
        """
        self._inference, self._held = None, None

    def train(self, mode: bool = True) -> LBEN:
        self.refresh()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> LBEN:
        self.refresh()
        with torch.inference_mode(False):  # as of a network
            make_ordinary(self)
            return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.refresh()
        super()._load_from_state_dict(*args, **kwargs)

    def _assembled(self) -> _Assembled:
        tensors = (self.log_psi, self.G, self.U, self.V, self.S)
        with torch.no_grad():
            # About a thousand entries of each tensor: torch does not count what is written through .data.
            sample = torch.stack([p.flatten()[:: 1 + p.numel() // 1000].sum() for p in tensors]).tolist()
        key = (
            self.lipschitz,
            self.epsilon,
            self.blocks,
            *sample,
            *((p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.device) for p in tensors),
        )
        if self._inference is None or self._inference.key != key:
            # Kept for later calls, which may differentiate: no inference tensors.
            with torch.inference_mode(False), torch.no_grad():
                W, U, G = (M.detach() for M in self.matrices())
                map = StateMap(W, self.blocks, self.Psi.reciprocal(), grid=self.grid)
                driven = (self.U != 0).flatten(1).any(1).nonzero().flatten()
            rows = slice(int(driven[0]), int(driven[-1]) + 1) if len(driven) else slice(0, 0)
            n, p = rows.stop - rows.start, self.U.shape[1]
            U = U[..., rows, :]
            copies = n == p and torch.equal(U, torch.eye(p, dtype=U.dtype, device=U.device).expand_as(U))
            self._inference = _Assembled(key, map, U, G, rows, copies)
        return self._inference

    def drive(self, x: Tensor, assembled: _Assembled | None = None) -> Tensor:
        """Ux + b_z without gradient, in coordinates; only the rows of U that hold anything are multiplied.
        (B, p, ...) → (B, n) or (B, n, F)."""
        assembled = assembled or self._assembled()
        u, X = self.grid.constant(self.b_z, len(x)), self.grid.coordinates(x)
        u[:, assembled.driven] += X if assembled.copies else self.grid.apply(assembled.U, X)
        return u

    def _flat(self, x: Tensor) -> Tensor:
        x, expected = plain_tensor(x, f"the input of {self.name!r}"), self.input_shape
        if x.dim() < len(expected) or tuple(x.shape[-len(expected) :]) != expected:
            sizes = ", ".join(map(str, ("...", *expected)))
            raise ShapeError(f"the input of {self.name!r}", f"({sizes})", tuple(x.shape))
        if x.dtype != self.b_z.dtype:
            requirement = f"its parameters are {self.b_z.dtype}: cast one to the other"
            raise InvalidParameterError(f"the dtype of the input of {self.name!r}", x.dtype, requirement)
        return x.reshape(x.shape[: x.dim() - len(expected)].numel(), *expected)

    @property
    def _where(self) -> str:
        return f"the equilibrium of stage {self.name!r}"

    def solve(self, x: Tensor, options: SolverOptions | None = None) -> Solution:
        """The states z of a batch x (B, p, ...), in coordinates, with status, residual and steps per sample; no gradient."""
        flat = self._flat(x)
        with torch.no_grad(), from_samples(flat, f"the input of {self.name!r}"):
            return self._solve(flat, self._assembled(), options)

    def _solve(self, x: Tensor, assembled: _Assembled, options: SolverOptions | None = None) -> Solution:
        u = self.drive(x, assembled)
        return solve(assembled.map, self.sigma, u, options or self.options, self._where, consume=True)

    def readout(self, z: Tensor, assembled: _Assembled | None = None) -> Tensor:
        """y = Gz + b_y for states in coordinates, without gradient to G: (B, n) → (B, q), or (B, n, F) → (B, q, h, w)."""
        G = (assembled or self._assembled()).G
        return self.grid.values(self.grid.affine(G, z, self.b_y)).contiguous()

    @full_precision
    def forward(self, x: Tensor) -> Tensor:
        """y = Gz + b_y: (..., p) → (..., q), or (..., p, h, w) → (..., q, h, w). Autocast changes nothing here."""
        flat = self._flat(x)
        with from_samples(flat, f"the input of {self.name!r}"):
            y = self._forward(flat)
        return y.reshape(*x.shape[: x.ndim - len(self.input_shape)], *y.shape[1:])

    def _forward(self, flat: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            assembled = self._assembled()
            return self.readout(self._solve(flat, assembled).value, assembled)
        require_ordinary(self, f"stage {self.name!r}")
        if any(p.requires_grad for p in (self.log_psi, self.G, self.U, self.V, self.S)):
            W, U, G = self.matrices()
            map = StateMap(W, self.blocks, self.Psi.detach().reciprocal(), grid=self.grid, kept=False)
        else:
            assembled = self._assembled()
            map, U, G = assembled.map, self.grid.matrices(self.U), assembled.G
            W = map.W
        u = self.grid.affine(U, self.grid.coordinates(flat), self.b_z)
        z = equilibrium(W, u, self.sigma, map, self.options, self._where)
        return self.grid.values(self.grid.affine(G, z, self.b_y)).contiguous()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a file of the whole module takes along: not the assembled W, and no compiled call."""
        return {**super().__getstate__(), "_inference": None, "_held": None}

    def get_extra_state(self) -> dict[str, Any]:
        """L, ε, σ and the blocks travel with the state dict: without them the tensors are another network."""
        return {
            "lipschitz": self.lipschitz,
            "epsilon": self.epsilon,
            "activations": [[str(activation), size] for activation, size in self.sigma],
            "blocks": list(self.blocks),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        runs: Sequence[tuple[str, int]] = state["activations"]
        sigma, blocks = Activations.of((name, size) for name, size in runs), _blocks(state["blocks"], len(self.b_z))
        lipschitz, epsilon = _constants(state["lipschitz"], state["epsilon"])
        if len(sigma) != len(self.b_z):
            raise ShapeError("the activations of an LBEN", f"{len(self.b_z)} rows", f"{len(sigma)} rows")
        self.lipschitz, self.epsilon, self.sigma, self.blocks = lipschitz, epsilon, sigma, blocks
        self.refresh()

    def extra_repr(self) -> str:
        return (
            f"{self.U.shape[1]} inputs, {len(self.b_z)} states, {len(self.b_y)} outputs, "
            + (f"{self.grid.image[0]}x{self.grid.image[1]} pixels, " if self.grid else "")
            + f"L={self.lipschitz:g}, epsilon={self.epsilon:g}, {self.sigma!r}"
        )


def _require_real_kernels(dae: DAE, V: Tensor) -> None:
    """Whether the matrices of a DAE are spectra of real kernels; what is not, the transform to kernels would drop.

    W, U and G are products and sums, symmetric to round-off (W in the gauge Λ = I); a root V only to √u, in the kernel of H.
    """
    root = dae.Lambda.sqrt()
    W = root.unsqueeze(-1) * dae.W / root
    for name, M, tolerance in (("U", dae.U, 1e-9), ("G", dae.G, 1e-9), ("W", W, 1e-9), ("V", V / root, 1e-6)):
        error, bound = dae.grid.asymmetry(M), tolerance * max(1.0, float(M.abs().max())) if M.numel() else 0.0
        if error > bound:
            raise InvalidParameterError(
                f"{name} of {dae.name!r}",
                f"off by {error:.3e} as real kernels",
                f"the matrices of W, U, G and V must be spectra of real kernels (to {bound:.1e}), as Grid.convolution makes "
                "them: usual causes are a matrix multiplied by a complex number, or a root of each frequency with any phase",
            )


def _constants(lipschitz: float, epsilon: float) -> tuple[float, float]:
    """(L, ε) as floats, L > 0 and ε ≥ 0."""
    L = number(lipschitz, "lipschitz", "a Lipschitz constant must be positive and finite", above=0.0)
    return L, number(epsilon, "epsilon", "it must be finite and not negative", least=0.0)


def _blocks(given: Sequence[int], states: int) -> tuple[int, ...]:
    blocks = sizes(given, "the blocks of an LBEN", f"positive sizes that add up to {states}")
    if sum(blocks) != states:
        raise ShapeError("the blocks of an LBEN", f"positive sizes that add up to {states}", blocks)
    return blocks
