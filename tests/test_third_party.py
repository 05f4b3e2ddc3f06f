"""A plugin in a distribution of its own: built, installed, listed, converted, conformance-tested in another process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
