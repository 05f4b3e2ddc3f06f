"""Bad input gets a named error with its numbers, exit code 2, and no output file: through the API and the command line."""

import io
import pickle
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from lipconvert_plugins.aol import AOLLinear
from lipconvert_plugins.g_mondeq import GMonDEQ
from lipconvert_plugins.mondeq import MonDEQ
from lipconvert_plugins.sandwich import SandwichNetwork
from lipconvert_plugins.sll import SLLLinear, SLLNetwork
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import lipconvert as lc
from lipconvert.cli import app


class Underestimated(SLLLinear):
    """T a fifth too small, as a power iteration stopped early would have it."""

    def T(self, image=()):
        return 0.8 * super().T(image)


class MaxMin(nn.Module):
    def forward(self, x):
        return torch.cat([x.unflatten(-1, (-1, 2)).amax(-1), x.unflatten(-1, (-1, 2)).amin(-1)], -1)


class Abs(nn.Module):
    def forward(self, x):
        return x.abs()


class Unheard(nn.Module):
    def forward(self, x):
        return x


def sll():
    torch.manual_seed(0)
    return SLLNetwork(inputs=6, classes=3, dense_depth=2)


def with_entry(value, count=1):
    model = sll()
    with torch.no_grad():
        model.sll1.weight.view(-1)[:count] = value
    return model


def under():
    torch.manual_seed(0)
    model = nn.Sequential(SLLLinear(6), Underestimated(6))
    model.input_shape = (6,)
    return model


def with_activation(activation):
    torch.manual_seed(0)
    return nn.Sequential(AOLLinear(6, 4), activation, AOLLinear(4, 2))


def wrong_shape():
    return nn.Sequential(AOLLinear(6, 4), nn.ReLU(), AOLLinear(5, 2))


MODELS = {
    "nan": lambda: with_entry(float("nan")),
    "inf": lambda: with_entry(float("inf"), 2),
    "minus_inf": lambda: with_entry(-float("inf"), 3),
    "under": under,
    "unheard": lambda: nn.Sequential(AOLLinear(6, 4), Unheard()),
    "gelu": lambda: with_activation(nn.GELU()),
    "prelu": lambda: with_activation(nn.PReLU()),
    "abs": lambda: with_activation(Abs()),
    "maxmin": lambda: with_activation(MaxMin()),
    "inside": lambda: SLLNetwork(inputs=6, classes=3, activation=nn.SiLU()),
    "layers": wrong_shape,
    "sll": sll,
}

# model -> error and what the message must say
REFUSED = {
    "nan": (lc.NotFiniteError, ("parameter 'sll1.weight'", "1 of 36")),
    "inf": (lc.NotFiniteError, ("parameter 'sll1.weight'", "2 of 36")),
    "minus_inf": (lc.NotFiniteError, ("parameter 'sll1.weight'", "3 of 36")),
    "under": (lc.NotPSDError, ("least eigenvalue -", "layer '1', Underestimated", "W'W must not exceed T")),
    "unheard": (lc.UnsupportedModuleError, ("1 (Unheard)", "no plugin claims it", "sandwich")),
    "gelu": (lc.UnsupportedActivationError, ("1: activation GELU", "slope in [0, 1]")),
    "prelu": (lc.UnsupportedActivationError, ("1: activation PReLU", "LeakyReLU")),
    "abs": (lc.UnsupportedActivationError, ("1: activation Abs", "slope is -1")),
    "maxmin": (lc.UnsupportedActivationError, ("1: activation MaxMin", "mixes pairs")),
    "inside": (lc.UnsupportedActivationError, ("SiLU", "layer 'sll0', SLLLinear")),
    "layers": (lc.ShapeError, ("the input of '2'", "(4,)", "(5,)")),
}


@pytest.fixture(autouse=True)
def factories(tmp_path, monkeypatch):
    """A module ``bad_models`` with one factory for each model above; the current folder is empty."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("bad_models")
    for name, build in MODELS.items():
        setattr(module, name, build)
    monkeypatch.setitem(sys.modules, "bad_models", module)
    return module


def refused(*arguments, files=()):
    """Run ``lipconvert convert``; exit code 2, one line of error, nothing on stdout, no file that was not there."""
    result = CliRunner().invoke(app, ["convert", *map(str, arguments), "--out", "out/net.safetensors"])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert sorted(p.name for p in Path().rglob("*") if p.is_file()) == sorted(files)
    return result.stderr


@pytest.mark.parametrize("name", REFUSED)
def test_bad_models(name):
    kind, said = REFUSED[name]
    with pytest.raises(kind) as caught:
        lc.convert(MODELS[name](), (6,))
    shown = refused(f"bad_models:{name}", "--input-shape", "6")
    for text in said:
        assert text in str(caught.value)
        assert text in shown


def test_numbers_travel_as_attributes():
    with pytest.raises(lc.NotFiniteError) as caught:
        lc.convert(MODELS["inf"]())
    assert (caught.value.count, caught.value.total) == (2, 36)
    with pytest.raises(lc.UnsupportedActivationError) as activation:
        lc.convert(MODELS["maxmin"](), (6,))
    assert (activation.value.path, activation.value.activation) == ("1", "MaxMin")


def test_the_least_eigenvalue_of_an_underestimated_T_is_the_one_of_dense_algebra():
    layer = under()[1].double()
    with torch.no_grad():
        W, T = layer.weight.detach(), layer.T()
    # I − T^{-1/2} W′W T^{-1/2}; in the layer `weight` is W′.
    expected = float(torch.linalg.eigvalsh(torch.eye(6) - W @ W.mT / torch.sqrt(T[:, None] * T[None])).min())
    assert expected < -0.01
    with pytest.raises(lc.NotPSDError) as caught:
        lc.convert(under())
    assert caught.value.least_eigenvalue == pytest.approx(
        expected, rel=1e-12, abs=1e-14
    )  # eigenvalues of a 6x6 in float64
    assert caught.value.layer == "'1', Underestimated"
    assert f"{expected:.6e}" in refused("bad_models:under")


def test_two_plugins_that_claim_one_module():
    class Second:
        @lc.hookimpl
        def to_dae(self, model):
            return lc.registry().ask("sll", "to_dae", model=model, input_shape=None)

    lc.registry().register(Second(), "second")
    try:
        with pytest.raises(lc.AmbiguousModelError) as caught:
            lc.convert(sll())
        assert caught.value.plugins == ("second", "sll")
        assert caught.value.path == "sll0"
        shown = refused("bad_models:sll")
        assert "sll0 is claimed by 2 plugins: second, sll" in shown
        assert "--plugin second" in shown
        assert CliRunner().invoke(app, ["info", "bad_models:sll", "--plugin", "sll"]).exit_code == 0
    finally:
        lc.registry().unregister("second")
    assert CliRunner().invoke(app, ["info", "bad_models:sll"]).exit_code == 0


def test_wrong_input_shape_of_a_conversion():
    with pytest.raises(lc.ShapeError) as caught:
        lc.convert(sll(), (7,))
    assert (caught.value.expected, caught.value.actual) == ((6,), (7,))
    shown = refused("bad_models:sll", "--input-shape", "7")
    assert "(6,)" in shown
    assert "(7,)" in shown


def test_wrong_input_shape():
    with pytest.raises(lc.ShapeError, match="'sll0'") as caught:
        lc.convert(sll(), (7,))
    assert caught.value.actual == (7,)
    assert "(7,)" in refused("bad_models:sll", "--input-shape", "7")
    net = lc.convert(sll())
    with pytest.raises(lc.ShapeError, match=r"\(B, 6\)"):
        net(torch.zeros(2, 5))
    with pytest.raises(lc.ShapeError, match=r"\(2, 7\)"):
        lc.validate(sll(), net, torch.zeros(2, 7))


@pytest.mark.parametrize("shape", ["", "a,b", "3,,3", "0,4", "-1"])
def test_an_input_shape_that_is_none(shape):
    assert "--input-shape" in refused("bad_models:sll", f"--input-shape={shape}")


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def not_weights(kind):
    whole = io.BytesIO()
    torch.save(sll().state_dict(), whole)
    if kind == "text.pt":
        return b"these are my weights\n"
    if kind == "empty.pt":
        return b""
    if kind == "truncated.pt":
        return whole.getvalue()[: len(whole.getvalue()) // 2]
    if kind == "pickle.pt":
        return pickle.dumps({"sll0.weight": Bomb("exploded")}, protocol=2)
    if kind == "module.pt":
        file = io.BytesIO()
        torch.save(nn.Sequential(nn.Linear(2, 2)), file)
        return file.getvalue()
    if kind == "zipped-pickle.pt":
        file, source = io.BytesIO(), io.BytesIO(whole.getvalue())
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w") as new:
            for item in old.namelist():
                new.writestr(
                    item, pickle.dumps(Bomb("exploded"), protocol=2) if item.endswith("data.pkl") else old.read(item)
                )
        return file.getvalue()
    if kind == "number.pt":
        file = io.BytesIO()
        torch.save(3.0, file)
        return file.getvalue()
    if kind == "strings.pt":
        file = io.BytesIO()
        torch.save({"a": "b"}, file)
        return file.getvalue()
    return b"\x08\x00\x00\x00\x00\x00\x00\x00not json"  # text.safetensors


FILES = {
    "text.pt": "not a file of plain weights",
    "empty.pt": "not a file of plain weights",
    "truncated.pt": "not a file of plain weights",
    "pickle.pt": "not a file of plain weights",
    "module.pt": "not a file of plain weights",
    "zipped-pickle.pt": "not a file of plain weights",
    "number.pt": "it holds a float, not a state dict",
    "strings.pt": "there are no tensors in it",
    "text.safetensors": "cannot be read as safetensors",
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_weights(tmp_path, name):
    (tmp_path / name).write_bytes(not_weights(name))
    with pytest.raises(lc.WeightsError, match=FILES[name]) as caught:
        lc.read_weights(tmp_path / name)
    assert caught.value.path == str(tmp_path / name)
    for arguments in ([name], ["bad_models:sll", "--weights", name]):
        shown = refused(*arguments, files=[name])  # "exploded" would be one more file
        assert FILES[name] in shown
        assert name in shown


def test_the_bomb_would_have_gone_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(str(tmp_path / "exploded")))).close()
    assert (tmp_path / "exploded").exists()


def test_a_weights_file_that_is_not_there():
    with pytest.raises(lc.WeightsError, match="no such file"):
        lc.read_weights("nowhere.pt")
    assert "nowhere.pt: there is no such file" in refused("bad_models:sll", "--weights", "nowhere.pt")
    assert "there is no such file" in refused("nowhere.pt")


def test_weights_nobody_recognises(tmp_path):
    tensors = {"encoder.kernel": torch.zeros(2, 3)}
    with pytest.raises(lc.WeightsError, match="no plugin recognises"):
        lc.from_state_dict(tensors)
    save_file(tensors, tmp_path / "w.safetensors")
    shown = refused("w.safetensors", files=["w.safetensors"])
    assert "encoder.kernel" in shown
    assert "mondeq" in shown


@pytest.mark.parametrize(
    ("build", "plugin", "option", "complete"),
    [
        (lambda: MonDEQ(4, 5, 3, m=0.7), "mondeq", "m", {"m": "0.7"}),
        (lambda: GMonDEQ(4, 5, 3, m=0.7), "g_mondeq", "m", {"m": "0.7"}),
        (lambda: MonDEQ(4, 5, 3, m=0.7, lipschitz=2.0), "mondeq", "lipschitz", {"m": "0.7", "lipschitz": "2.0"}),
        (lambda: SandwichNetwork(inputs=4, classes=3, lipschitz=2.0), "sandwich", "lipschitz", {"lipschitz": "2.0"}),
        (lambda: SLLNetwork(inputs=4, classes=3), "sll", "classes", {"inputs": "4", "classes": "3"}),
    ],
)
def test_weights_that_need_an_option(tmp_path, build, plugin, option, complete):
    torch.manual_seed(0)
    torch.save(build().state_dict(), tmp_path / "w.pt")
    complete = {**complete, "activation": "relu"}
    for missing in (option, "activation"):
        asked_for(tmp_path, plugin, missing, complete)


def asked_for(tmp_path, plugin, option, complete):
    """Without this option the weights are refused by name; with all of them they convert."""
    partial = {key: value for key, value in complete.items() if key != option}
    with pytest.raises(lc.MissingOptionError) as caught:
        lc.from_state_dict(lc.read_weights(tmp_path / "w.pt"), partial)
    assert (caught.value.plugin, caught.value.option) == (plugin, option)
    given = [text for key, value in partial.items() for text in ("--option", f"{key}={value}")]
    shown = refused("w.pt", *given, files=["w.pt"])
    assert plugin in shown
    assert f"--option {option}=" in shown
    whole = [text for key, value in complete.items() for text in ("--option", f"{key}={value}")]
    assert CliRunner().invoke(app, ["convert", "w.pt", *whole, "--out", "net.safetensors"]).exit_code == 0
    (tmp_path / "net.safetensors").unlink()


@pytest.mark.parametrize("text", ["m", "m=", "=1.0"])
def test_an_option_that_is_none(tmp_path, text):
    torch.save(MonDEQ(4, 5, 3).state_dict(), tmp_path / "w.pt")
    assert "NAME=VALUE" in refused("w.pt", "--option", text, files=["w.pt"])


@pytest.mark.parametrize("value", ["0", "-1", "nan", "abc"])
def test_an_option_out_of_range(tmp_path, value):
    torch.save(MonDEQ(4, 5, 3).state_dict(), tmp_path / "w.pt")
    shown = refused("w.pt", "--option", f"m={value}", "--option", "activation=relu", files=["w.pt"])
    assert value in shown


def test_a_solve_that_does_not_converge(monkeypatch, factories):
    torch.manual_seed(0)
    hasty = lc.LBEN(4, 6, 3, options=lc.SolverOptions(max_steps=2)).double()
    net = lc.Network([hasty], [None], (4,))
    x = torch.randn(5, 4)
    with pytest.raises(lc.NotConvergedError) as caught:
        net(x)
    error = caught.value
    assert error.unconverged == 5
    # The residual by hand: ‖z − relu(Wz + Ux + b)‖ relative to ‖z‖ + ‖Ux + b‖ + ‖Wz‖.
    with torch.no_grad():
        z, u = error.solution.value, x @ hasty.U.mT + hasty.b_z
        Wz = z @ hasty.W.mT
        residual = (z - (Wz + u).relu()).norm(dim=1) / (z.norm(dim=1) + u.norm(dim=1) + Wz.norm(dim=1))
    assert error.worst_residual == pytest.approx(float(residual.max()), rel=1e-9)  # a residual of 1e-2, formed twice
    factories.hasty = lambda: hasty
    shown = refused("bad_models:hasty", "--input-shape", "4")
    assert "did not converge" in shown
    assert "peaceman_rachford" in shown
    assert "after 2 steps" in shown


@pytest.mark.parametrize("option", ["--epsilon=-1", "--delta=-1", "--epsilon=nan", "--dtype=float16"])
def test_numbers_out_of_range(option):
    refused("bad_models:sll", option)


def test_an_epsilon_that_is_too_large_says_what_would_do():
    shown = refused("bad_models:sll", "--epsilon", "0.5")
    assert "delta" in shown
