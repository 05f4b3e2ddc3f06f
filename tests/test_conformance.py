"""The conformance suite over everything registered: a plugin cannot be registered and go untested.

A plugin that has no ``example_models`` fails collection here (see `PluginConformance.pytest_generate_tests`).
"""

import types
from importlib import import_module

import pytest

import lipconvert as lc
from lipconvert.testing import PluginConformance


def _suite(name: str) -> type[PluginConformance]:
    title = "Test" + "".join(part.capitalize() for part in name.replace("-", "_").split("_"))
    # the weights of one seed here and of another on the device: both see the same kinds of network
    return type(title, (PluginConformance,), {"plugin": name, "seeds": (0,), "__module__": __name__})


@pytest.mark.usefixtures("device")
class _OnTheDevice:
    """What a suite has besides on a device, a real one or one pretended: models and inputs are there."""

    device = "cuda"
    seeds = (1,)
    directions = 2  # it takes five times as long as on the CPU, where Jacobians are compared in all

    def pytest_generate_tests(self, metafunc):
        """The first and the last example of a plugin, of vectors and of images: on a device it matters where tensors are."""
        if "model" in metafunc.fixturenames:
            (seed,) = self.seeds
            last = len(lc.registry().example_models(self.plugin, seed)) - 1
            cases = sorted({(seed, 0), (seed, last)})
            metafunc.parametrize("model", cases, indirect=True, ids=[f"seed{s}-example{i}" for s, i in cases])

    @pytest.fixture(autouse=True)
    def few_directions(self, monkeypatch):
        """Also in the validation that `convert` ends with."""
        monkeypatch.setattr(import_module("lipconvert.conversion.validate"), "DIRECTIONS", self.directions)


def _on_the_device(suite: type[PluginConformance]) -> type[PluginConformance]:
    return type(f"{suite.__name__}OnTheDevice", (_OnTheDevice, suite), {"__module__": __name__})


SUITES = [_suite(name) for name in lc.registry().names()]
globals().update({suite.__name__: suite for cpu in SUITES for suite in (cpu, _on_the_device(cpu))})


def test_every_plugin_loads_and_has_a_suite():
    assert {plugin.name: plugin.error for plugin in lc.plugins() if plugin.error is not None} == {}
    assert len({suite.__name__ for suite in SUITES}) == len(lc.registry().names()) > 0


def test_collection_fails_without_examples():
    bare = types.ModuleType("bare")
    bare.to_dae = lc.hookimpl(lambda model: None)
    metafunc = types.SimpleNamespace(fixturenames=["model"])
    lc.registry().register(bare, "bare")
    try:
        with pytest.raises(pytest.Collector.CollectError, match=r"'bare' has no example_models .*Implement the hook"):
            _suite("bare")().pytest_generate_tests(metafunc)
    finally:
        lc.registry().unregister("bare")
    with pytest.raises(pytest.Collector.CollectError, match="'bare' is not loaded: it is not installed"):
        _suite("bare")().pytest_generate_tests(metafunc)
