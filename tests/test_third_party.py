"""Plugins that are not lipconvert's own: one in a distribution, built, installed, listed, converted and conformance-tested
in another process; and layers on images, registered in this one."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import lipconvert as lc
from lipconvert.testing import PluginConformance

SOURCE = Path(__file__).parent.parent / "examples" / "lipconvert-orthogonal"

REPORT = """
import json, sys, torch, lipconvert as lc
import lipconvert_orthogonal
plugin = next(p for p in lc.plugins() if p.name == "orthogonal")
torch.manual_seed(0)
model = lipconvert_orthogonal.OrthogonalNetwork(inputs=6, classes=4, features=9, depth=2).double()
net = lc.convert(model)
x = torch.randn(5, 6, dtype=torch.float64)
y = x
for name, layer in model.named_children():
    y = layer(y) if name.startswith("activation") else y @ layer.weight.mT + layer.bias
print(json.dumps({
    "module": lipconvert_orthogonal.__file__,
    "provenance": [plugin.distribution, plugin.version, plugin.module, plugin.error],
    "hooks": plugin.hooks,
    "stages": len(net.stages),
    "lipschitz": net.lipschitz,
    "difference": (net(x) - y).abs().max().item(),
    "names": lc.registry().names(),
}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the distribution installed into it, built by the environment's own setuptools."""
    base = tmp_path_factory.mktemp("third-party")
    copy = base / "source"  # setuptools builds in place
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command += ["--disable-pip-version-check", "--no-warn-script-location", "--target", str(base / "site"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=base, check=False)
    assert done.returncode == 0, done.stderr
    return base / "site"


def _python(site, *arguments, **environment):
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-P", *arguments], capture_output=True, text=True, cwd=site.parent, env=env, check=False
    )


def test_listed_and_converted(site):
    done = _python(site, "-c", REPORT)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert Path(report["module"]).is_relative_to(site)
    assert report["provenance"] == ["lipconvert-orthogonal", "0.1.0", "lipconvert_orthogonal", None]
    assert report["hooks"] == ["to_dae", "example_models", "new_model", "describe"]
    assert {"orthogonal", "sll", "sandwich"} <= set(report["names"])
    assert report["stages"] == 1
    assert abs(report["lipschitz"] - 1.0) < 1e-12  # three upper bounds of norms that are 1 to round-off
    assert report["difference"] < 1e-12  # five samples of size 1 through three layers


def test_it_can_be_left_out(site):
    done = _python(site, "-c", "import lipconvert as lc; print(lc.registry().names())", LIPCONVERT_PLUGINS="sll")
    assert (done.returncode, done.stdout.strip()) == (0, "['sll']"), done.stderr


def test_its_conformance_tests_pass(site):
    """The distribution's own test file, run against what was installed: two lines that inherit the suite."""
    tests = site.parent / "source" / "tests"
    done = _python(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tests.parent), str(tests))
    assert done.returncode == 0, done.stdout + done.stderr
    closing = done.stdout.strip().splitlines()[-1]
    passed = int(closing.split(" passed")[0].split()[-1])
    assert passed > 60, closing  # about 20 tests over two examples and two seeds, and the single ones
    assert "failed" not in closing
    assert "skipped" not in closing


def test_only_public_names(site):
    """It is the example to copy: nothing of lipconvert's inside, nothing of the built-in plugins'."""
    text = (site / "lipconvert_orthogonal" / "__init__.py").read_text(encoding="utf-8")
    assert "lipconvert_plugins" not in text
    assert "import lipconvert as lc" in text
    assert "from lipconvert" not in text
    check = (
        "import ast, pathlib, lipconvert as lc, lipconvert_orthogonal as o\n"
        "tree = ast.parse(pathlib.Path(o.__file__).read_text())\n"
        "used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, 'id', '') == 'lc'}\n"
        "print(sorted(used - set(lc.__all__)), len(used) > 3)"
    )
    done = _python(site, "-c", check)
    assert done.stdout.strip() == "[] True", done.stderr


class Blur(nn.Module):
    """x → ReLU(w * x + b), one circular 3×3 kernel w ≥ 0 of sum 1 for each channel: its norm is 1."""

    def __init__(self, channels):
        super().__init__()
        self.logits, self.bias = nn.Parameter(torch.randn(channels, 9)), nn.Parameter(0.3 * torch.randn(channels))

    def kernels(self):
        return self.logits.softmax(1).unflatten(1, (3, 3))

    def forward(self, x):
        x = functional.pad(x, (1, 1, 1, 1), mode="circular")
        return torch.relu(functional.conv2d(x, self.kernels().unsqueeze(1), self.bias, groups=len(self.bias)))


class Squeeze(nn.Module):
    """x → ReLU(Q unshuffled(x)) with orthogonal Q: a 2×2 convolution of stride 2 from images to images half as large."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4 * channels, 4 * channels))

    def Q(self):
        return torch.linalg.qr(self.weight).Q

    def forward(self, x):
        return torch.relu(torch.einsum("ij,bjhw->bihw", self.Q(), functional.pixel_unshuffle(x, 2)))


class ImagePlugin:
    """H = 2I − I − UU′ ⪰ 0 with Λ = I and L = 1. It knows nothing of ``dense``."""

    @staticmethod
    @lc.hookimpl
    def to_dae(model, input_shape):
        if isinstance(model, Blur):
            n, image = len(model.bias), input_shape[1:]
            placed = torch.zeros(n, *image)
            for a in range(3):
                for b in range(3):
                    placed[:, (a - 1) % image[0], (b - 1) % image[1]] += model.kernels()[:, a, b]
            # x[s + a]: a correlation, whose transfer function is the conjugate of the kernel's.
            U = torch.diag_embed(torch.fft.rfft2(placed).conj().flatten(1).mT)
            b_z = model.bias
        elif isinstance(model, Squeeze):
            image, n = (input_shape[1] // 2, input_shape[2] // 2), len(model.weight)
            frequencies = image[0] * (image[1] // 2 + 1)
            U, b_z = model.Q().to(torch.complex128).expand(frequencies, n, n), None
        else:
            return None
        eye = torch.eye(n, dtype=torch.complex128).expand_as(U)
        return lc.DAE(W=torch.zeros_like(U), U=U, G=eye, Lambda=torch.ones(n), b_z=b_z, grid=lc.Grid(image))

    @staticmethod
    @lc.hookimpl
    def example_models(seed):
        torch.manual_seed(seed)
        models = [
            Blur(2),
            nn.Sequential(Blur(1), Squeeze(1), nn.Flatten(), lc.FirstFeatures(5)),
            nn.Sequential(Blur(1), Squeeze(1)),
        ]
        for model, shape in zip(models, [(2, 3, 4), (1, 4, 6), (1, 4, 2)], strict=True):
            model.input_shape = shape
        return models

    @staticmethod
    @lc.hookimpl
    def describe():
        return lc.PluginInfo("Image", "a test", "1", "Blur, Squeeze")


@pytest.fixture
def image_plugin():
    lc.registry().register(ImagePlugin, "image", "a-test", "0")
    yield
    lc.registry().unregister("image")


class ImageConformance(PluginConformance):
    """Not collected: the plugin is registered in a test only."""

    plugin = "image"


CHECKS = [name for name in vars(PluginConformance) if name.startswith("test_")]


@pytest.mark.parametrize("name", CHECKS)
def test_layers_on_images_pass_the_suite(image_plugin, name, tmp_path):
    suite = ImageConformance()
    check = getattr(suite, name)
    wanted = inspect.signature(check).parameters
    models = [None]
    if "model" in wanted:
        models = [m.double().eval() for seed in suite.seeds for m in lc.registry().example_models("image", seed)]
        assert len(models) == 6
    for model in models:
        given = {"model": model, "dtype": torch.float32, "tmp_path": tmp_path}
        check(**{key: value for key, value in given.items() if key in wanted})


@pytest.mark.parametrize("dense", [False, True])
def test_layers_on_images_convert_with_and_without_a_dense_form(image_plugin, dense):
    torch.manual_seed(3)
    model = nn.Sequential(lc.Normalize(0.5, 0.25), Blur(2), Blur(2), Squeeze(2), lc.MeanPool(1), nn.Flatten())
    net = lc.convert(model, (2, 4, 6), dense=dense)
    assert {stage.grid.image for stage in net.stages} == ({()} if dense else {(4, 6), (2, 3)})
    assert net.lipschitz == 4.0
    assert lc.validate(model, net, dense=dense).passed
    x = torch.rand(5, 2, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(net(x), model(x), rtol=0, atol=1e-12)  # outputs of size 1
    assert lc.to_dae(model[1:], (2, 4, 6), dense=dense).lipschitz == 1.0


class UnevenPlugin:
    """The same layers with a Λ for every pixel, raised in one of them."""

    raised = 1.5

    @classmethod
    @lc.hookimpl
    def to_dae(cls, model, input_shape):
        dae = ImagePlugin.to_dae(model, input_shape)
        if dae is None:
            return None
        Lambda = torch.ones(dae.states, *dae.grid.image)
        Lambda[1, 0, 2] = cls.raised
        return lc.DAE(dae.W, dae.U, dae.G, Lambda, dae.b_z, grid=dae.grid)


def test_a_multiplier_that_varies_inside_a_channel_is_refused(monkeypatch):
    torch.manual_seed(4)
    model = nn.Sequential(nn.ReLU(), nn.Sequential(Blur(2)), nn.Flatten())
    lc.registry().register(UnevenPlugin, "uneven")
    try:
        with pytest.raises(
            lc.InvalidParameterError, match=r"varying inside a channel \(by 5\.0e-01 relative\)"
        ) as caught:
            lc.convert(model, (2, 4, 6))
        assert caught.value.layer == "'1.0', Blur"
        assert "[layer '1.0', Blur]" in str(caught.value)
        assert "densely" in str(caught.value)
        monkeypatch.setattr(UnevenPlugin, "raised", 1.0)  # the same number in every pixel is one for the channel
        assert lc.convert(model, (2, 4, 6)).lipschitz == 1.0
    finally:
        lc.registry().unregister("uneven")
