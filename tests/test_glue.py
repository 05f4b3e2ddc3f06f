"""Glue modules: their value written out, and their Lipschitz constant as the largest singular value of their matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lipconvert as lc
from lipconvert import InvalidParameterError, ShapeError, UnsupportedModuleError
from lipconvert.networks.glue import affine_image, core_lipschitz

CASES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (lc.Normalize(), (3,)),
    (lc.Normalize(0.4, 0.25), (1, 4, 4)),
    (lc.Normalize([0.1, 0.2, 0.3], [0.5, 2.0, 0.25]), (3, 2, 2)),
    (lc.Normalize([0.1, 0.2], 4.0), (2,)),
    (lc.PadChannels(5), (5,)),
    (lc.PadChannels(5), (2,)),
    (lc.PadChannels(4), (3, 2, 2)),
    (lc.FirstFeatures(2), (5,)),
    (lc.FirstFeatures(5), (5,)),
    (lc.MeanPool(1), (2, 3, 3)),
    (lc.MeanPool(2), (2, 4, 6)),
    (lc.MeanPool(3), (1, 3, 6)),
    (nn.Flatten(), (2, 2, 3)),
    (nn.Identity(), (4,)),
    (nn.Unflatten(1, (2, 3)), (6,)),
    (nn.AvgPool2d(2), (2, 4, 6)),
    (nn.AvgPool2d(4, divisor_override=4), (1, 4, 8)),
    (nn.AvgPool2d((1, 3), divisor_override=2), (2, 2, 6)),
    (nn.PixelUnshuffle(2), (2, 4, 6)),
    (nn.PixelShuffle(2), (4, 2, 3)),
]


def matrix(module: nn.Module, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """By finite differences with step 1 of an affine map, one input at a time."""
    size = int(np.prod(shape))
    zero = module(torch.zeros(1, *shape)).flatten().detach().numpy()
    columns = [module(torch.eye(size)[k].reshape(1, *shape)).flatten().detach().numpy() - zero for k in range(size)]
    return np.stack(columns, 1), zero


@pytest.mark.parametrize(("module", "shape"), CASES, ids=lambda v: repr(v)[:40])
def test_lipschitz_constant_is_the_norm_of_the_matrix(module: nn.Module, shape: tuple[int, ...]) -> None:
    module = module.double()
    M, b = matrix(module, shape)
    known = core_lipschitz(module)
    assert known is not None
    assert float(np.linalg.norm(M, 2)) == pytest.approx(known, rel=1e-6)  # Normalize was made in float32 at import
    assert float(np.linalg.norm(M, 2)) <= known * (1.0 + 1e-14)
    image, constant = affine_image(module, shape)
    np.testing.assert_allclose(image.numpy(), M, rtol=0.0, atol=1e-15)
    np.testing.assert_allclose(constant.numpy(), b, rtol=0.0, atol=1e-15)


def test_normalize_value() -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 2.0, 0.25]
    x = torch.rand(2, 3, 4, 5)
    expected = np.stack([(x[:, c].numpy() - mean[c]) / std[c] for c in range(3)], 1)
    np.testing.assert_allclose(lc.Normalize(mean, std)(x).numpy(), expected, rtol=1e-15)
    assert lc.Normalize(mean, std).lipschitz == 4.0
    assert lc.Normalize(0.0, 0.5)(torch.ones(2, 7)).tolist() == [[2.0] * 7] * 2


def test_pad_value() -> None:
    x = torch.randn(2, 3, 2, 2)
    padded = lc.PadChannels(5)(x)
    assert padded.shape == (2, 5, 2, 2)
    assert torch.equal(padded[:, :3], x)
    assert bool((padded[:, 3:] == 0).all())


def test_first_features_value() -> None:
    x = torch.randn(4, 6)
    assert torch.equal(lc.FirstFeatures(2)(x), torch.stack([x[:, 0], x[:, 1]], 1))


def test_mean_pool_value() -> None:
    x = torch.randn(2, 3, 4, 6)
    expected = torch.zeros(2, 3, 2, 3)
    for i in range(2):
        for j in range(3):
            window = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            expected[:, :, i, j] = 2.0 * window.mean((2, 3))  # k times the mean
    torch.testing.assert_close(lc.MeanPool(2)(x), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (0.0, 0.0),
        (0.0, -1.0),
        (0.0, [1.0, 0.0]),
        (float("nan"), 1.0),
        (0.0, float("inf")),
        (0.0, float("nan")),
    ],
)
def test_normalize_refuses_bad_numbers(mean: float, std: float | list[float]) -> None:
    with pytest.raises(InvalidParameterError):
        lc.Normalize(mean, std)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (lc.Normalize([0.0] * 3, [1.0] * 3), torch.zeros(2, 4, 2, 2)),
        (lc.Normalize(), torch.zeros(3)),
        (lc.PadChannels(2), torch.zeros(2, 3)),
        (lc.FirstFeatures(4), torch.zeros(2, 3)),
        (lc.FirstFeatures(1), torch.zeros(2, 3, 3)),
        (lc.MeanPool(2), torch.zeros(2, 1, 3, 4)),
        (lc.MeanPool(2), torch.zeros(2, 4)),
    ],
    ids=lambda v: repr(v)[:30] if isinstance(v, nn.Module) else "",
)
def test_inputs_that_do_not_fit(module: nn.Module, x: Tensor) -> None:
    with pytest.raises(ShapeError) as caught:
        module(x)
    assert type(module).__name__ in caught.value.where


def test_a_window_has_a_size() -> None:
    with pytest.raises(InvalidParameterError):
        lc.MeanPool(0)


def test_other_modules_are_not_glue() -> None:
    class Doubled(nn.Flatten):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    assert core_lipschitz(nn.ReLU()) == 1.0
    for module in (nn.Linear(2, 2), nn.Dropout(), Doubled()):
        assert core_lipschitz(module) is None
    # Windows that overlap, or end outside the image, count a pixel more than once or not at all.
    for pool in (nn.AvgPool2d(3, 1), nn.AvgPool2d(2, padding=1), nn.AvgPool2d(2, ceil_mode=True), nn.MaxPool2d(2)):
        assert core_lipschitz(pool) is None


def test_max_min_is_one_lipschitz_glue() -> None:
    """Slopes are permutations of pairs: the largest quotient over random pairs of inputs is 1, and is met."""
    assert core_lipschitz(lc.MaxMin()) == 1.0
    x, y = torch.randn(500, 4, 2, 2), torch.randn(500, 4, 2, 2)
    quotients = (lc.MaxMin()(x) - lc.MaxMin()(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert float(quotients.max()) <= 1.0 + 1e-14
    near = lc.MaxMin()(x + 1e-6 * y) - lc.MaxMin()(x)
    assert float((near.flatten(1).norm(dim=1) / (1e-6 * y).flatten(1).norm(dim=1)).max()) > 1.0 - 1e-6
    with pytest.raises(ShapeError, match="even"):
        lc.MaxMin()(torch.zeros(2, 3, 2, 2))


def test_a_large_mean_does_not_blur_the_matrix() -> None:
    net = lc.convert(nn.Sequential(lc.Normalize(-1e4, 50.0), nn.Linear(8, 3)).double(), (8,), merge=True)
    assert len(net.steps) == 1
    matrix, constant = affine_image(lc.Normalize(-1e4, 50.0).double(), (8,))
    assert torch.equal(matrix, torch.eye(8, dtype=torch.float64) / 50.0)
    assert torch.equal(constant, torch.full((8,), 200.0, dtype=torch.float64))


def test_affine_image_refuses_what_is_not_affine() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x**2

    for module in (nn.ReLU(), Square()):
        with pytest.raises(UnsupportedModuleError) as caught:
            affine_image(module, (3,), "tail")
        assert caught.value.path == "tail"
    M, b = affine_image(nn.Linear(3, 2), (3,))
    assert M.shape == (2, 3)
    assert b.shape == (2,)


def test_glue_is_shown_with_its_numbers() -> None:
    assert "5" in repr(lc.PadChannels(5))
    assert "2" in repr(lc.FirstFeatures(2))
    assert "3" in repr(lc.MeanPool(3))


class Far(nn.Module):
    """x -> (x + 4096) - 4096: the identity, but for twelve binary digits."""

    shift = 4096.0

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.shift) - self.shift


class FarPlugin:
    """Knows the constant of `Far`, not what it rounds."""

    @staticmethod
    @lc.hookimpl
    def to_dae(model: nn.Module) -> None:
        del model

    @staticmethod
    @lc.hookimpl
    def glue_lipschitz(module: nn.Module) -> float | None:
        return 1.0 if isinstance(module, Far) else None


class ExactFarPlugin(FarPlugin):
    """Knows both: |x + c| u, twice, and a little for u squared."""

    @staticmethod
    @lc.hookimpl
    def glue_rounding(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[float, float] | None:
        if not isinstance(module, Far):
            return None
        return 3.0 * module.shift * math.prod(input_shape) ** 0.5, 3.0


@pytest.fixture
def registered(request: pytest.FixtureRequest) -> Iterator[None]:
    lc.registry().register(request.param, "far")
    yield
    lc.registry().unregister("far")


def far_network() -> lc.Network:
    torch.manual_seed(0)
    head = nn.Linear(4, 3, bias=False)
    nn.init.orthogonal_(head.weight)
    return lc.convert(nn.Sequential(Far(), head), (4,), plugin="far")


@pytest.mark.parametrize("registered", [FarPlugin], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("registered")
def test_nothing_is_certified_through_glue_whose_rounding_nobody_states(dtype: torch.dtype) -> None:
    net = far_network().to(dtype)
    assert lc.lipschitz_bound(net).lipschitz == pytest.approx(1.0, abs=1e-5)  # of the exact network
    with pytest.raises(lc.NoCertificateError, match=r"step 0, Far.*glue_rounding"):
        lc.Certifier(net)
    with pytest.raises(lc.NoCertificateError, match=r"step 0, Far.*glue_rounding"):
        lc.certify(net, [(torch.rand(4, dtype=dtype), 0)])


@pytest.mark.parametrize("registered", [ExactFarPlugin], indirect=True)
@pytest.mark.usefixtures("registered")
def test_what_glue_rounds_is_taken_off_the_radius() -> None:
    """Inputs next to a boundary of two classes: their exact margins are a few units of what the glue loses."""
    net = far_network().float()
    certifier = lc.Certifier(net)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(600, 4, generator=generator)
    M = torch.autograd.functional.jacobian(far_network(), torch.rand(1, 4).double())[0, :, 0].numpy()
    logits = x.double().numpy() @ M.T
    top, second = np.argsort(-logits, 1)[:, :2].T
    away = M[top] - M[second]
    gap = (logits[range(600), top] - logits[range(600), second]) / (away**2).sum(1)
    wanted = np.geomspace(1e-5, 1e-1, 600)  # l2 distances from the boundary
    near = x.double().numpy() - (gap - wanted / np.linalg.norm(away, axis=1))[:, None] * away
    x = torch.from_numpy(near).float()
    radius = certifier(x, net(x).argmax(1))["radius"][:, -1]
    certified = radius > 0
    assert 100 < int(certified.sum()) < 500  # a margin below the rounding of the glue has no radius
    assert float(radius.max()) > 0.05  # and a large one loses nothing much
    directions = torch.from_numpy(-away / np.linalg.norm(away, axis=1, keepdims=True))
    own = net(x).argmax(1)
    for share in (0.3, 0.9, 0.999):
        moved = (x.double() + share * radius.clamp(min=0.0)[:, None] * directions).float()
        inside = torch.linalg.vector_norm(moved.double() - x.double(), dim=1) < radius
        assert bool((net(moved).argmax(1) == own)[certified & inside].all())


@pytest.mark.parametrize("answer", [3.0, (1.0,), (-1.0, 0.0), (0.0, float("nan")), ("a", 1.0), (10**400, 0)])
def test_a_statement_of_rounding_that_is_none(answer: object) -> None:
    class Wrong(FarPlugin):
        @staticmethod
        @lc.hookimpl
        def glue_rounding(module: nn.Module) -> object:
            return answer

    lc.registry().register(Wrong, "far")
    try:
        with pytest.raises(lc.PluginError, match=r"glue_rounding must return \(a, b\)"):
            far_network()
    finally:
        lc.registry().unregister("far")
