"""Discovery, conflicts, ambiguity and failing plugins: distributions are made up as dist-info directories on sys.path."""

import importlib.metadata
import sys

import pytest
import torch
from torch import nn

import lipconvert as lc

BUILT_IN = {"aol", "cpl", "g_mondeq", "lben", "mondeq", "sandwich", "sll"}
CLAIMS_EVERYTHING = """
import lipconvert as lc

@lc.hookimpl
def to_dae(model):
    return lc.elementwise("relu", 3)
"""
CLAIMS_NOTHING = """
import lipconvert as lc

@lc.hookimpl
def to_dae(model):
    return None
"""


class Marked(nn.Module):
    """A module no built-in plugin knows, 2x on three coordinates."""

    def forward(self, x):
        return 2.0 * x


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(distribution, {entry point: source}) puts a distribution with one module for each plugin on sys.path."""
    modules = []

    def _install(distribution, plugins, version="1.2", folder="site"):
        site = tmp_path / folder
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = ["[lipconvert]"]
        for name, source in plugins.items():
            module = f"fake_{distribution.replace('-', '_')}_{name}"
            (site / f"{module}.py").write_text(source)
            lines.append(f"{name} = {module}")
            modules.append(module)
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        if str(site) not in sys.path:
            monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        return info

    yield _install
    for module in modules:
        sys.modules.pop(module, None)


def _plugin(registry, name):
    return next(p for p in registry.plugins() if p.name == name)


class TestDiscovery:
    def test_built_in_plugins_come_through_entry_points(self):
        registry = lc.Registry.discover()
        assert set(registry.names()) >= BUILT_IN
        for name in BUILT_IN:
            plugin = _plugin(registry, name)
            assert (plugin.distribution, plugin.module) == ("lipconvert", f"lipconvert_plugins.{name}")
            assert plugin.version == importlib.metadata.version("lipconvert")

    def test_another_distribution_is_listed_with_name_and_version(self, install):
        install("somebody-else", {"extra": CLAIMS_NOTHING}, version="3.4")
        registry = lc.Registry.discover()
        plugin = _plugin(registry, "extra")
        assert (plugin.distribution, plugin.version, plugin.hooks, plugin.error) == (
            "somebody-else",
            "3.4",
            ("to_dae",),
            None,
        )
        assert set(registry.names()) >= BUILT_IN | {"extra"}

    def test_one_distribution_found_twice_is_no_conflict(self, install, monkeypatch):
        install("twice", {"extra": CLAIMS_NOTHING}, folder="site")
        install("twice", {"extra": CLAIMS_NOTHING}, folder="checkout")
        # importlib.metadata itself drops the second copy; hand both over, as older versions of it do.
        entries = tuple(
            entry
            for distribution in importlib.metadata.distributions()
            for entry in distribution.entry_points
            if entry.group == "lipconvert" and entry.dist.name == "twice"
        )
        assert len(entries) == 2
        # By module name: the attribute lipconvert.plugin_api.registry is the function.
        monkeypatch.setattr(sys.modules["lipconvert.plugin_api.registry"], "entry_points", lambda group: entries)
        registry = lc.Registry.discover()
        assert registry.names() == ["extra"]

    def test_two_distributions_with_one_name_conflict_and_neither_is_loaded(self, install):
        install("first", {"same": CLAIMS_EVERYTHING, "alone": CLAIMS_NOTHING}, version="1.0")
        install("second", {"same": CLAIMS_NOTHING}, version="2.0")
        registry = lc.Registry.discover()
        plugin = _plugin(registry, "same")
        assert plugin.hooks == ()
        assert "first 1.0 (fake_first_same)" in plugin.error
        assert "second 2.0 (fake_second_same)" in plugin.error
        assert not {"fake_first_same", "fake_second_same"} & set(sys.modules)
        assert "same" not in registry.names()
        assert set(registry.names()) >= BUILT_IN | {"alone"}
        with pytest.raises(lc.PluginError, match="registered more than once"):
            registry.to_dae(Marked(), plugin="same")

    def test_a_name_of_the_core_distribution_is_not_overridden(self, install):
        install("usurper", {"sll": CLAIMS_EVERYTHING})
        registry = lc.Registry.discover()
        assert "sll" not in registry.names()
        assert "lipconvert_plugins.sll" in _plugin(registry, "sll").error
        assert "usurper 1.2" in _plugin(registry, "sll").error

    def test_two_entries_of_one_name_in_one_distribution_conflict(self, install):
        info = install("stutter", {"one": CLAIMS_NOTHING})
        (info / "entry_points.txt").write_text("[lipconvert]\none = fake_stutter_one\none = fake_stutter_two\n")
        assert "more than once" in _plugin(lc.Registry.discover(), "one").error

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
            ("import a_module_that_is_not_there", "ModuleNotFoundError"),
            ("def to_dae(model:", "SyntaxError"),
            ("import lipconvert as lc\n@lc.hookimpl\ndef to_date(model): return None\n", "to_date"),
            ("import lipconvert as lc\n@lc.hookimpl\ndef to_dae(network): return None\n", "network"),
            ("def to_dae(model): return None\n", "no to_dae marked with lipconvert.hookimpl"),
            (CLAIMS_NOTHING + "\n@lc.hookimpl\ndef describe(): raise KeyError('oops')\n", "KeyError: 'oops'"),
        ],
        ids=["raises", "missing import", "syntax", "unknown hook", "wrong signature", "not marked", "describe"],
    )
    def test_a_plugin_that_cannot_be_used_is_reported_and_the_others_live(self, install, source, reason):
        install("broken", {"broken": source, "sound": CLAIMS_NOTHING}, version="0.3")
        registry = lc.Registry.discover()
        plugin = _plugin(registry, "broken")
        assert reason in plugin.error
        assert (plugin.distribution, plugin.version, plugin.module) == ("broken", "0.3", "fake_broken_broken")
        assert set(registry.names()) >= BUILT_IN | {"sound"}
        assert registry.to_dae(nn.Linear(2, 2)) is None  # nothing of it is left among the hooks
        with pytest.raises(lc.PluginError) as caught:
            registry.ask("broken", "to_dae", model=nn.Linear(2, 2), input_shape=None)
        assert caught.value.plugin == "broken"
        assert reason in str(caught.value)

    def test_an_object_that_is_missing_from_its_module_is_reported(self, install):
        info = install("hollow", {"hollow": CLAIMS_NOTHING})
        (info / "entry_points.txt").write_text("[lipconvert]\nhollow = fake_hollow_hollow:nowhere\n")
        registry = lc.Registry.discover()
        assert "AttributeError" in _plugin(registry, "hollow").error
        assert set(registry.names()) >= BUILT_IN

    def test_the_variable_restricts_loading(self, install, monkeypatch):
        install("unwanted", {"unwanted": "raise RuntimeError('imported')"})
        monkeypatch.setenv("LIPCONVERT_PLUGINS", " sll, aol ,")
        registry = lc.Registry.discover()
        assert [p.name for p in registry.plugins()] == ["aol", "sll"]
        monkeypatch.setenv("LIPCONVERT_PLUGINS", "")
        assert lc.Registry.discover().plugins() == []
        assert "fake_unwanted_unwanted" not in sys.modules

    def test_the_variable_naming_an_unknown_plugin_raises(self, monkeypatch):
        monkeypatch.setenv("LIPCONVERT_PLUGINS", "sll,sl")
        with pytest.raises(lc.PluginError, match="LIPCONVERT_PLUGINS names it") as caught:
            lc.Registry.discover()
        assert caught.value.plugin == "sl"


class _Claims:
    """A plugin object that answers to_dae with what it is given."""

    def __init__(self, answer):
        self.answer = answer

    @lc.hookimpl
    def to_dae(self, model):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer if isinstance(model, Marked) else None


def _tuple(n=3):
    return torch.zeros(n, n), torch.eye(n), torch.eye(n), torch.ones(n)


class TestClaims:
    @pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
    def test_two_claims_are_ambiguous_in_either_order(self, order):
        registry = lc.Registry()
        for name in order:
            registry.register(_Claims(lc.elementwise("relu" if name == "a" else "tanh", 3)), name)
        with pytest.raises(lc.AmbiguousModelError, match=r"claimed by 2 plugins: a, b\b") as caught:
            registry.to_dae(Marked(), path="body.3")
        assert (caught.value.plugins, caught.value.path) == (("a", "b"), "body.3")
        for name, activation in (("a", "relu"), ("b", "tanh")):
            winner, dae = registry.to_dae(Marked(), plugin=name)
            assert winner == name
            assert [str(a) for a, _ in dae.sigma] == [activation]

    def test_the_named_plugin_has_the_first_word_not_the_only_one(self):
        registry = lc.Registry()
        registry.register(_Claims(None), "a")
        registry.register(_Claims(lc.elementwise("relu", 3)), "b")
        assert registry.to_dae(Marked(), plugin="a")[0] == "b"
        assert registry.to_dae(nn.ReLU(), plugin="a") is None
        with pytest.raises(lc.PluginError, match=r"it is not installed\. Loaded plugins: a, b\."):
            registry.to_dae(Marked(), plugin="c")

    def test_a_bare_tuple_means_relu_zero_biases_and_L_1(self):
        registry = lc.Registry()
        registry.register(_Claims(_tuple()), "bare")
        name, dae = registry.to_dae(Marked())
        assert name == "bare"
        assert dae.lipschitz == 1.0
        assert dae.bias_z.tolist() == dae.bias_y.tolist() == [0.0, 0.0, 0.0]
        assert [(str(a), n) for a, n in dae.sigma] == [("relu", 3)]

    @pytest.mark.parametrize(
        "answer", ["a string", 1, _tuple()[:3], (*_tuple(), 1), list(_tuple()), {"W": torch.zeros(1, 1)}, True]
    )
    def test_rubbish_is_a_plugin_error(self, answer):
        registry = lc.Registry()
        registry.register(_Claims(answer), "rubbish")
        with pytest.raises(lc.PluginError, match="must return a DAE or a tuple") as caught:
            registry.to_dae(Marked())
        assert caught.value.plugin == "rubbish"
        assert type(answer).__name__ in str(caught.value)

    @pytest.mark.parametrize("cause", [ValueError("bad luck"), ZeroDivisionError("half"), StopIteration("end")])
    def test_an_exception_in_a_plugin_is_named_and_kept(self, cause):
        registry = lc.Registry()
        registry.register(_Claims(cause), "raises")
        with pytest.raises(lc.PluginError, match=f"'raises': to_dae failed with {type(cause).__name__}") as caught:
            registry.to_dae(Marked())
        chain = caught.value.__cause__
        while chain is not None and chain is not cause:
            chain = chain.__cause__
        assert chain is cause

    def test_an_error_of_ours_passes_through_a_plugin(self):
        registry = lc.Registry()
        error = lc.ShapeError("weight", (1,), (2,))
        registry.register(_Claims(error), "careful")
        with pytest.raises(lc.ShapeError) as caught:
            registry.to_dae(Marked())
        assert caught.value is error

    def test_tuple_entries_that_are_no_matrices(self):
        registry = lc.Registry()
        registry.register(_Claims((1, 2, 3, 4)), "numbers")
        with pytest.raises(lc.LipconvertError):
            registry.to_dae(Marked())


class TestInProcess:
    def test_register_convert_unregister(self):
        registry = lc.registry()
        registry.register(_Claims(lc.affine(2.0 * torch.eye(3))), "mine")
        try:
            plugin = next(p for p in lc.plugins() if p.name == "mine")
            assert (plugin.distribution, plugin.hooks) == ("(this process)", ("to_dae",))
            net = lc.convert(Marked(), input_shape=(3,))
            x = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
            torch.testing.assert_close(net(x), 2.0 * x, rtol=1e-12, atol=1e-12)  # round-off of one stage
            with pytest.raises(lc.PluginError, match="registered already"):
                registry.register(_Claims(None), "mine")
        finally:
            registry.unregister("mine")
        assert "mine" not in [p.name for p in lc.plugins()]
        with pytest.raises(lc.UnsupportedModuleError, match=r"Marked.*no plugin claims it"):
            lc.convert(Marked(), input_shape=(3,))

    def test_a_refused_plugin_leaves_nothing_behind(self):
        class Misspelt(_Claims):
            @lc.hookimpl
            def to_dea(self, model):
                return None

        class Raises(_Claims):
            @lc.hookimpl
            def describe(self):
                raise RuntimeError("no description")

        registry = lc.Registry()
        for plugin, reason in ((Misspelt(None), "to_dea"), (Raises(None), "no description"), (object(), "no to_dae")):
            with pytest.raises(lc.PluginError, match=reason):
                registry.register(plugin, "again")
            assert registry.plugins() == []
        registry.register(_Claims(_tuple()), "again")
        assert registry.names() == ["again"]

    def test_one_object_under_two_names_is_refused(self):
        registry = lc.Registry()
        plugin = _Claims(None)
        registry.register(plugin, "one")
        with pytest.raises(lc.PluginError):
            registry.register(plugin, "two")
        assert registry.names() == ["one"]
        assert registry.to_dae(Marked()) is None

    def test_hooks_not_implemented_answer_nothing(self):
        registry = lc.Registry()
        registry.register(_Claims(None), "small")
        assert registry.example_models("small", 0) == ()
        assert registry.new_model("small", 2, 2, 0) is None
        assert registry.glue_lipschitz(nn.Dropout()) is None
        with pytest.raises(lc.WeightsError, match=r"no plugin recognises these weights \(keys: a"):
            registry.from_state_dict({"a": torch.zeros(1)}, {}, path="file.pt")

    def test_two_plugins_recognising_one_weights_file(self):
        class Recognises(_Claims):
            @lc.hookimpl
            def from_state_dict(self, state_dict, options):
                return nn.Linear(1, 1)

        registry = lc.Registry()
        registry.register(Recognises(None), "b")
        registry.register(Recognises(None), "a")
        with pytest.raises(lc.AmbiguousModelError, match="a, b"):
            registry.from_state_dict({"w": torch.zeros(1)}, {}, path="w.pt")
        assert registry.from_state_dict({"w": torch.zeros(1)}, {}, plugin="b")[0] == "b"
