"""What a DAE checks when it is constructed, and what it stores."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch

from lipconvert import DAE, Activations, Grid, InvalidParameterError, LipconvertError, NotFiniteError, ShapeError

N, P, Q = 4, 3, 2


def parts(**changes: Any) -> dict[str, Any]:
    good = {
        "W": torch.randn(N, N),
        "U": torch.randn(N, P),
        "G": torch.randn(Q, N),
        "Lambda": torch.rand(N) + 0.5,
        "b_z": torch.randn(N),
        "b_y": torch.randn(Q),
        "activations": Activations("tanh", N),
        "lipschitz": 2.0,
        "V": torch.randn(5, N),
        "blocks": (1, 3),
        "name": "block 7",
    }
    return good | changes


def test_a_good_one_keeps_what_it_is_given() -> None:
    given = parts()
    dae = DAE(**given)
    for field in ("W", "U", "G", "Lambda", "b_z", "b_y", "V"):
        assert torch.equal(getattr(dae, field), given[field])
    assert (dae.states, dae.inputs, dae.outputs) == (N, P, Q)
    assert dae.lipschitz == 2.0
    assert dae.blocks == (1, 3)
    assert dae.name == "block 7"
    assert dae.sigma == Activations("tanh", N)
    assert torch.equal(dae.bias_z, given["b_z"])
    assert torch.equal(dae.bias_y, given["b_y"])
    assert all(word in repr(dae) for word in ("block 7", "3 inputs", "4 states", "2 outputs", "tanh", "L=2"))


def test_defaults() -> None:
    given = parts()
    dae = DAE(given["W"], given["U"], given["G"], given["Lambda"])
    assert torch.equal(dae.bias_z, torch.zeros(N))
    assert torch.equal(dae.bias_y, torch.zeros(Q))
    assert dae.sigma == Activations("relu", N)
    assert dae.lipschitz == 1.0
    assert dae.V is None
    assert dae.blocks == (N,)
    mixed = DAE(**parts(activations=Activations.of([("relu", 1), ("identity", 2), ("relu", 1)]), blocks=()))
    assert mixed.blocks == (1, 2, 1)


def test_unpacks_as_W_U_G_Lambda() -> None:
    given = parts()
    W, U, G, Lambda = DAE(**given)
    for actual, field in zip((W, U, G, Lambda), ("W", "U", "G", "Lambda"), strict=True):
        assert torch.equal(actual, given[field])


def test_a_diagonal_matrix_is_a_Lambda() -> None:
    diagonal = torch.rand(N) + 0.5
    assert torch.equal(DAE(**parts(Lambda=torch.diag(diagonal))).Lambda, diagonal)
    # One state: (1,) and (1, 1) both say it.
    one = parts(W=torch.zeros(1, 1), U=torch.ones(1, P), G=torch.ones(Q, 1), b_z=None, V=None, blocks=())
    for Lambda in (torch.tensor([3.0]), torch.tensor([[3.0]])):
        dae = DAE(**one | {"Lambda": Lambda, "activations": None})
        assert torch.equal(dae.Lambda, torch.tensor([3.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_other_dtypes_become_float64(dtype: torch.dtype) -> None:
    given = parts()
    for field in ("W", "U", "G", "Lambda", "b_z", "b_y", "V"):
        # Two bits and no zero, so that every dtype holds it exactly.
        given[field] = torch.randint(1, 4, given[field].shape).to(dtype)
    dae = DAE(**given)
    for field in ("W", "U", "G", "Lambda", "b_z", "b_y", "V"):
        assert getattr(dae, field).dtype == torch.float64
        assert getattr(dae, field).tolist() == given[field].tolist()


def test_frequencies_become_complex128() -> None:
    complex_ = {
        "W": torch.randn(6, N, N, dtype=torch.complex64),
        "U": torch.randn(6, N, P, dtype=torch.complex64),
        "G": torch.randn(6, Q, N, dtype=torch.complex64),
        "V": torch.randn(6, 5, N, dtype=torch.complex64),
    }
    dae = DAE(**parts(**complex_, grid=Grid((2, 4))))
    assert {t.dtype for t in (dae.W, dae.U, dae.G, dae.V) if t is not None} == {torch.complex128}
    assert (dae.states, dae.inputs, dae.outputs) == (N, P, Q)
    assert dae.Lambda.dtype == dae.bias_z.dtype == torch.float64


def test_gradients_do_not_reach_in() -> None:
    W = torch.randn(N, N, requires_grad=True)
    assert not DAE(**parts(W=W)).W.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_source_is_copied(dtype: torch.dtype) -> None:
    given = parts()
    for field in ("W", "U", "G", "Lambda", "b_z", "b_y", "V"):
        given[field] = given[field].to(dtype)
    kept = {field: given[field].clone() for field in ("W", "U", "G", "Lambda", "b_z", "b_y", "V")}
    dae = DAE(**given)
    for field in kept:
        given[field].fill_(7.0)  # an optimiser step, in place
        assert torch.equal(getattr(dae, field), kept[field].double()), field


def test_frozen() -> None:
    dae = DAE(**parts())
    for field in fields(dae):
        with pytest.raises(FrozenInstanceError):
            setattr(dae, field.name, None)
    with pytest.raises(FrozenInstanceError):
        del dae.W


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("W", torch.zeros(N)),
        ("W", torch.zeros(N, N + 1)),
        ("W", torch.zeros(N + 1, N + 1)),
        ("W", [[0.0] * N] * N),
        ("U", torch.zeros(N)),
        ("U", torch.zeros(N + 1, P)),
        ("U", torch.zeros(2, N, P)),
        ("G", torch.zeros(N)),
        ("G", torch.zeros(Q, N + 1)),
        ("G", torch.zeros(2, Q, N)),
        ("Lambda", torch.ones(N + 1)),
        ("Lambda", torch.ones(1)),
        ("Lambda", torch.tensor(1.0)),
        ("Lambda", torch.ones(N, N)),
        ("Lambda", torch.ones(N, 1)),
        ("Lambda", torch.ones(N, dtype=torch.complex128)),
        ("b_z", torch.zeros(N + 1)),
        ("b_z", torch.zeros(N, 1)),
        ("b_z", torch.tensor(0.0)),
        ("b_y", torch.zeros(Q + 1)),
        ("b_y", torch.zeros(1, Q)),
        ("activations", Activations("relu", N - 1)),
        ("activations", Activations("relu", N + 1)),
        ("V", torch.zeros(N)),
        ("V", torch.zeros(5, N + 1)),
        ("V", torch.zeros(2, 5, N)),
        ("blocks", (1, 2)),
        ("blocks", (1, 4)),
        ("blocks", (0, 4)),
        ("blocks", (5, -1)),
    ],
)
def test_wrong_shapes(field: str, value: object) -> None:
    with pytest.raises(ShapeError) as caught:
        DAE(**parts(**{field: value}))
    assert isinstance(caught.value, LipconvertError)
    # W decides what the others must be, so a larger W is reported as a U that does not fit.
    bigger = field == "W" and tuple(getattr(value, "shape", ())) == (N + 1, N + 1)
    assert ("U" if bigger else field) in caught.value.where
    assert "'block 7'" in str(caught.value)


@pytest.mark.parametrize("field", ["W", "U", "G", "Lambda", "b_z", "b_y", "V"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(field: str, bad: float) -> None:
    given = parts()
    given[field].view(-1)[-1] = bad
    with pytest.raises(NotFiniteError) as caught:
        DAE(**given)
    assert caught.value.count == 1
    assert caught.value.total == given[field].numel()
    assert caught.value.where == f"{field} of 'block 7'"


@pytest.mark.parametrize("bad", [0.0, -0.0, -1e-300, -1.0])
def test_Lambda_must_be_positive(bad: float) -> None:
    Lambda = torch.ones(N)
    Lambda[2] = bad
    for form in (Lambda, torch.diag(Lambda)):
        with pytest.raises(InvalidParameterError) as caught:
            DAE(**parts(Lambda=form))
        assert caught.value.where == "Lambda of 'block 7'"
        assert caught.value.value == bad


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_L_must_be_positive_and_finite(bad: float) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        DAE(**parts(lipschitz=bad))
    assert caught.value.where == "L of 'block 7'"


def test_compared_by_identity() -> None:
    # Comparing tensors entry by entry has no single truth value.
    dae = DAE(**parts())
    assert dae == dae
    assert dae != DAE(**parts())
    assert len({dae, dae}) == 1


# ---- on a grid ------------------------------------------------------------------------------------------------------

H, WIDTH = 3, 4
F = H * (WIDTH // 2 + 1)


def frequencies(*shape: int) -> torch.Tensor:
    return torch.randn(F, *shape, dtype=torch.complex128)


def grid_parts(**changes: Any) -> dict[str, Any]:
    complex_ = {"W": frequencies(N, N), "U": frequencies(N, P), "G": frequencies(Q, N), "V": frequencies(5, N)}
    return parts(**complex_, grid=Grid((H, WIDTH))) | changes


def test_a_good_one_on_a_grid() -> None:
    given = grid_parts()
    dae = DAE(**given)
    for field in ("W", "U", "G", "Lambda", "b_z", "b_y", "V"):
        assert torch.equal(getattr(dae, field), given[field])
    assert (dae.states, dae.inputs, dae.outputs) == (N, P, Q)
    assert (dae.input_shape, dae.output_shape) == ((P, H, WIDTH), (Q, H, WIDTH))
    assert "3x4 pixels" in repr(dae)
    bare = DAE(given["W"], given["U"], given["G"], given["Lambda"], grid=given["grid"])
    assert torch.equal(bare.bias_z, torch.zeros(N))
    assert torch.equal(bare.bias_y, torch.zeros(Q))
    assert (bare.blocks, bare.sigma) == ((N,), Activations("relu", N))
    dense = DAE(**parts())
    assert (dense.input_shape, dense.output_shape) == ((P,), (Q,))


def test_a_Lambda_that_is_constant_over_the_pixels_of_a_channel() -> None:
    Lambda = torch.rand(N) + 0.5
    given = Lambda[:, None, None].expand(N, H, WIDTH)
    dae = DAE(**grid_parts(Lambda=given))
    assert torch.equal(dae.Lambda, Lambda)
    # The square one too: (n, h, w) is not mistaken for anything else.
    square = grid_parts(Lambda=Lambda[:, None, None].expand(N, N, N).clone(), grid=Grid((N, N)))
    square |= {k: torch.randn(N * 3, *square[k].shape[1:], dtype=torch.complex128) for k in ("W", "U", "G", "V")}
    assert torch.equal(DAE(**square).Lambda, Lambda)


@pytest.mark.parametrize("pixel", [(0, 0), (1, 2), (2, 3)])
@pytest.mark.parametrize("factor", [1.5, 1.0 + 1e-12])
def test_a_Lambda_that_varies_inside_a_channel_is_refused(pixel: tuple[int, int], factor: float) -> None:
    Lambda = torch.ones(N, H, WIDTH)
    Lambda[(1, *pixel)] *= factor
    with pytest.raises(InvalidParameterError) as caught:
        DAE(**grid_parts(Lambda=Lambda))
    assert caught.value.where == "Lambda of 'block 7'"
    assert "varying inside a channel" in str(caught.value)


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_Lambda_on_a_grid_must_be_positive(bad: float) -> None:
    Lambda = torch.ones(N)
    Lambda[2] = bad
    for given in (Lambda, Lambda[:, None, None].expand(N, H, WIDTH)):
        with pytest.raises(InvalidParameterError) as caught:
            DAE(**grid_parts(Lambda=given))
        assert caught.value.where == "Lambda of 'block 7'"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("W", torch.zeros(N, N, dtype=torch.complex128)),
        ("W", torch.zeros(F + 1, N, N, dtype=torch.complex128)),
        ("W", torch.zeros(H * WIDTH, N, N, dtype=torch.complex128)),  # the full spectrum
        ("U", torch.zeros(F + 1, N, P, dtype=torch.complex128)),
        ("U", torch.zeros(N, P, dtype=torch.complex128)),
        ("U", torch.zeros(F, N + 1, P, dtype=torch.complex128)),
        ("G", torch.zeros(F, Q, N + 1, dtype=torch.complex128)),
        ("G", torch.zeros(1, Q, N, dtype=torch.complex128)),
        ("V", torch.zeros(5, N, dtype=torch.complex128)),
        ("V", torch.zeros(F, 5, N + 1, dtype=torch.complex128)),
        ("Lambda", torch.ones(N, WIDTH, H)),
        ("Lambda", torch.ones(F, N)),
        ("Lambda", torch.ones(N, dtype=torch.complex128)),
        ("b_z", torch.zeros(N, H, WIDTH)),
        ("b_z", torch.zeros(N, dtype=torch.complex128)),
        ("b_y", torch.zeros(Q, dtype=torch.complex128)),
        ("b_y", torch.zeros(Q, 1, 1)),
    ],
)
def test_wrong_shapes_on_a_grid(field: str, value: torch.Tensor) -> None:
    with pytest.raises(ShapeError) as caught:
        DAE(**grid_parts(**{field: value}))
    assert field in caught.value.where
    assert "'block 7'" in str(caught.value)


@pytest.mark.parametrize("field", ["W", "U", "G", "V"])
def test_real_matrices_on_a_grid_are_refused(field: str) -> None:
    with pytest.raises(ShapeError) as caught:
        DAE(**grid_parts(**{field: grid_parts()[field].real}))
    assert caught.value.where == f"{field} of 'block 7'"


@pytest.mark.parametrize("field", ["W", "U", "G", "V", "Lambda", "b_z", "b_y"])
def test_complex_entries_without_a_grid_are_refused(field: str) -> None:
    with pytest.raises(ShapeError) as caught:
        DAE(**parts(**{field: parts()[field].to(torch.complex128)}))
    assert field in caught.value.where


@pytest.mark.parametrize("field", ["W", "U", "G", "V"])
@pytest.mark.parametrize("bad", [complex(0.0, float("nan")), complex(float("inf"), 0.0)])
def test_nan_and_infinity_in_frequencies(field: str, bad: complex) -> None:
    given = grid_parts()
    given[field].view(-1)[-1] = bad
    with pytest.raises(NotFiniteError) as caught:
        DAE(**given)
    assert caught.value.where == f"{field} of 'block 7'"


def test_derive_checks_what_changes_and_keeps_the_rest() -> None:
    dae = DAE(**grid_parts())
    Lambda = torch.rand(N) + 0.1
    new = dae.derive(Lambda=Lambda, lipschitz=3.0)
    assert (new.lipschitz, new.grid, new.blocks, new.name) == (3.0, dae.grid, dae.blocks, dae.name)
    assert torch.equal(new.Lambda, Lambda)
    assert new.W is dae.W
    assert (dae.lipschitz, bool(torch.equal(dae.Lambda, Lambda))) == (2.0, False)
    for bad in ({"W": torch.zeros(N, N)}, {"b_z": torch.zeros(N + 1)}, {"grid": Grid()}, {"blocks": (N + 1,)}):
        with pytest.raises(ShapeError):
            dae.derive(**bad)
    with pytest.raises(InvalidParameterError):
        dae.derive(Lambda=-Lambda)
    with pytest.raises(NotFiniteError):
        dae.derive(G=dae.G / 0.0)
