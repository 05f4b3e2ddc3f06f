"""The layout of the Hugging Face Hub, in a local folder and through a client that records what it is told."""

import json
import types
from pathlib import Path

import pytest
import torch
from lipconvert_plugins.aol import AOLNetwork

import lipconvert as lc
from lipconvert.interop import hub


@pytest.fixture
def net():
    torch.manual_seed(0)
    found = lc.convert(AOLNetwork(inputs=6, classes=3, features=8), check=False).float()
    found.class_names = ("a", "b", "c")
    return found


def same(a, b):
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(
        torch.equal(x[k], y[k]) if isinstance(x[k], torch.Tensor) else x[k] == y[k] for k in x
    )


def test_a_folder_and_back(net, tmp_path):
    hub.write_folder(net, tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.onnx",
        "model.safetensors",
    ]
    back = lc.from_hub(tmp_path / "model")
    assert same(net, back)
    assert back.class_names == ("a", "b", "c")
    assert lc.verify(tmp_path / "model" / "model.onnx", seed=0).passed
    (tmp_path / "model" / "model.onnx").unlink()  # the weights alone are enough
    assert same(net, lc.from_hub(str(tmp_path / "model")))


def test_the_card_has_the_certified_table(net, tmp_path):
    x = torch.rand(20, 6)
    with torch.no_grad():
        data = list(zip(x, net(x).argmax(1), strict=True))
    report = lc.certify(net, data, radii=(0.01, 0.1), attack=lc.AttackConfig(steps=2), name="made-up")
    hub.write_folder(net, tmp_path, report)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: lipconvert\n")
    assert "| method | natural | ε = 0.01 | ε = 0.1 |" in card
    for method in report.methods:
        cells = " | ".join(f"{100 * share:.2f}" for share in method.certified_accuracy)
        assert f"| {method.method} | {100 * report.natural_accuracy:.2f} | {cells} |" in card
    assert "pgd-2 (upper bound)" in card
    assert "made-up, 20 samples" in card
    assert "AOLNetwork" in card


def test_config_and_weights_must_agree(net, tmp_path):
    hub.write_folder(net, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["library_name"] == "lipconvert"
    config["lipconvert"]["steps"][0]["lipschitz"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(lc.CheckpointError, match="not the manifest"):
        lc.from_hub(tmp_path)
    for text in ("", "[]", "{", "null"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(lc.CheckpointError, match=r"config\.json"):
            lc.from_hub(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(lc.CheckpointError, match="cannot be read"):
        lc.from_hub(tmp_path)


def test_damaged_weights_are_refused(net, tmp_path):
    hub.write_folder(net, tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(lc.CheckpointError, match="SHA-256"):
        lc.from_hub(tmp_path)


def test_push_uploads_the_folder_and_pull_downloads_it(net, tmp_path, monkeypatch):
    """Through huggingface_hub's own names; where they would go online, a folder."""
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            (tmp_path / "remote").mkdir()
            for path in Path(folder_path).iterdir():
                (tmp_path / "remote" / path.name).write_bytes(path.read_bytes())
            calls.append(("upload", repo_id, commit_message))
            return "https://example.org/commit/1"

    def snapshot_download(repo_id, *, revision, token, allow_patterns):
        calls.append(("download", repo_id, revision, token, tuple(allow_patterns)))
        return str(tmp_path / "remote")

    huggingface_hub = pytest.importorskip("huggingface_hub")
    for name in ("create_repo", "upload_folder"):  # what is replaced is there
        assert hasattr(huggingface_hub.HfApi, name)
    assert hasattr(huggingface_hub, "snapshot_download")
    monkeypatch.setattr(hub, "_hub", lambda: types.SimpleNamespace(HfApi=Api, snapshot_download=snapshot_download))
    assert lc.push_to_hub(net, "user/name", private=True, token="t") == "https://example.org/commit/1"
    back = lc.from_hub("user/name", revision="main", token="t")
    assert same(net, back)
    assert calls == [
        ("token", "t"),
        ("create", "user/name", True, True),
        ("upload", "user/name", "Upload a lipconvert network"),
        ("download", "user/name", "main", "t", ("config.json", "model.safetensors", "model.onnx")),
    ]


def test_without_the_extra(net, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(lc.InvalidParameterError, match=r"lipconvert\[hub\]"):
        lc.push_to_hub(net, "user/name")
    with pytest.raises(lc.InvalidParameterError, match=r"lipconvert\[hub\]"):
        lc.from_hub("user/name")
