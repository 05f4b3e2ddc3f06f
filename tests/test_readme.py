"""The README's code runs as printed, and its lists are the project's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lipconvert as lc

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def _float32():
    torch.set_default_dtype(torch.float32)  # as a reader has it


def test_own_model_in_ten_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = next(block for block in BLOCKS if "lc.certify" in block)
    statements = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(statements) <= 10
    scope: dict[str, object] = {}
    exec(compile(code, "README", "exec"), scope)
    net = scope["net"]
    assert isinstance(net, lc.Network)
    assert net.lipschitz == 1.0
    assert len(net.stages[0].b_z) == 240
    loaded = lc.load("net.safetensors")
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(loaded(x), net(x))


def test_plugin_of_your_own():
    code = next(block for block in BLOCKS if "hookimpl" in block)
    scope: dict[str, object] = {}
    try:
        exec(compile(code, "README", "exec"), scope)
        net = scope["net"]
        assert isinstance(net, lc.Network)
        assert net.lipschitz == 1.0
        model = torch.nn.Sequential(scope["Contraction"](4), scope["Contraction"](4)).double()
        x = torch.randn(8, 4, dtype=torch.float64)
        torch.testing.assert_close(lc.convert(model)(x), model(x), rtol=1e-12, atol=1e-12)
    finally:
        lc.registry().unregister("contraction")


def test_table_of_plugins_is_the_registry():
    listed = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \| [^|]+\|$", README, flags=re.MULTILINE))
    built_in = {p.name: p for p in lc.plugins() if p.distribution == "lipconvert"}
    assert set(listed) == set(built_in)
    for name, plugin in built_in.items():
        assert plugin.info is not None
        assert listed[name].strip() == plugin.info.lipschitz
        assert plugin.info.paper in README


def test_named_files_exist():
    root = Path(__file__).parents[1]
    for path in re.findall(r"\]\(([\w/.-]+)\)", README) + re.findall(r"`((?:benchmarks|examples)/[\w/.-]+)`", README):
        assert (root / path).exists(), path
