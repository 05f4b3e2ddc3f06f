"""Files that are links, as in caches of downloads: they load and verify as what they lead to; and claims not checked."""

import json
import os
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
from typer.testing import CliRunner

import lipconvert as lc
from lipconvert.checkpoints.documents import VerificationReport
from lipconvert.cli import app

from .test_container import DATA, GRAPH, Forgery, bits, network, placed, saved


def _snapshot(folder, kind, embed):
    """As huggingface_hub lays files: names in a snapshot lead to blobs, which are named by their hashes alone."""
    (folder / "blobs").mkdir()
    snapshot = folder / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for k, (name, content) in enumerate(saved(kind, embed=embed).items()):
        (folder / "blobs" / f"{k:064x}").write_bytes(content)
        (snapshot / name).symlink_to(Path("..", "..", "blobs", f"{k:064x}"))
    return snapshot / GRAPH


def _hard(folder, kind, embed):
    (folder / "real").mkdir()
    (folder / "names").mkdir()
    placed(folder / "real", kind, embed=embed)
    for name in saved(kind, embed=embed):
        os.link(folder / "real" / name, folder / "names" / name)
    return folder / "names" / GRAPH


def _chain(folder, kind, embed):
    """Links to links, and a folder that is one."""
    path = _snapshot(folder, kind, embed)
    (folder / "first").mkdir()
    for name in saved(kind, embed=embed):
        (folder / "first" / name).symlink_to(path.with_name(name))
    (folder / "second").symlink_to(folder / "first")
    return folder / "second" / GRAPH


def _data_alone(folder, kind, embed):
    """The graph is a file, its data a link."""
    path = placed(folder, kind, embed=embed)
    if not embed:
        path.with_name(DATA).rename(folder / "blob")
        path.with_name(DATA).symlink_to("blob")
    return path


LINKS = {"a snapshot": _snapshot, "hard": _hard, "a chain": _chain, "the data": _data_alone}


@pytest.mark.parametrize("embed", [False, True], ids=["pair", "embedded"])
@pytest.mark.parametrize("kind", ["tiny", "images", "equilibrium"])
@pytest.mark.parametrize("links", list(LINKS))
def test_links_load_and_verify(links, kind, embed, tmp_path):
    path = LINKS[links](tmp_path, kind, embed)
    assert bits(lc.load(path)) == bits(network(kind))
    report = lc.verify(path, seed=0)
    assert report.passed, report
    assert lc.verify(path.with_name(DATA), seed=0).passed or embed


def test_a_lie_behind_links_is_one(tmp_path):
    (tmp_path / "real").mkdir()
    forgery = Forgery("tiny")
    forgery.tensors[forgery.key("W")] *= 1.01
    real = forgery.hashes().place().write(tmp_path / "real")
    for name in (GRAPH, DATA):
        (tmp_path / name).symlink_to(real.with_name(name))
    report = lc.verify(tmp_path / GRAPH, seed=0)
    assert report.refuted


def test_what_runs_is_what_was_read(tmp_path, monkeypatch):
    # the files go as soon as they have been read: nothing that follows opens them, or anything else
    path = placed(tmp_path, "equilibrium")
    module = sys.modules["lipconvert.checkpoints.verify"]  # the package has a function of this name
    read = module.read

    def once(name):
        stored = read(name)
        for file in (GRAPH, DATA):
            (tmp_path / file).unlink()
        return stored

    monkeypatch.setattr(module, "read", once)
    report = lc.verify(path, seed=0)
    assert report.passed, report
    assert not list(tmp_path.iterdir())


class TestNotChecked:
    """A claim is true, false, or not checked; a network is verified where all are true."""

    def report(self, *states):
        claims = [{"claim": f"c{k}", "where": "w", "passed": state, "found": "f"} for k, state in enumerate(states)]
        return VerificationReport.model_validate({"path": "p", "claims": claims, "passed": all(states)})

    @pytest.mark.parametrize(
        ("states", "refuted", "words"),
        [
            ((True, True), False, "2 claims, none of them false"),
            ((True, False), True, "2 claims, 1 of them false"),
            ((True, None), False, "2 claims, none of them false; not verified: 1 not checked"),
            ((False, None), True, "2 claims, 1 of them false; not verified: 1 not checked"),
        ],
    )
    def test_verdicts(self, states, refuted, words):
        report = self.report(*states)
        assert report.refuted is refuted
        assert str(report).splitlines()[-1] == words
        assert len(report.failures()) == sum(not state for state in states)
        for state, line in zip(states, str(report).splitlines(), strict=False):
            assert line.startswith({True: "ok ", False: "FAILED ", None: "not checked "}[state])

    def run(self, path, *options):
        return CliRunner().invoke(app, ["verify", str(path), "--seed", "0", *options])

    def test_exit_codes(self, tmp_path, monkeypatch):
        path = placed(tmp_path, "tiny")
        assert self.run(path).exit_code == 0

        def unable(*_, **__):
            raise RuntimeError("there is no memory")

        with monkeypatch.context() as patched:
            patched.setattr(onnxruntime, "InferenceSession", unable)
            result = self.run(path, "--json")
        assert result.exit_code == 2
        claims = json.loads(result.stdout)["claims"]
        assert [claim["passed"] for claim in claims].count(None) == 1
        assert False not in [claim["passed"] for claim in claims]

        (tmp_path / DATA).rename(tmp_path / "elsewhere")
        result = self.run(path)
        assert result.exit_code == 2
        assert "not verified: 1 not checked" in result.stdout
        assert self.run(tmp_path / "nothing.onnx").exit_code == 2

        (tmp_path / DATA).write_bytes(saved("tiny", seed=1)[DATA])
        assert self.run(path).exit_code == 1

    def test_a_graph_of_another_version(self, tmp_path):
        # it may compute the same; nobody knows, and it is not run
        forgery = Forgery("tiny")
        forgery.manifest["versions"] = {"lipconvert": "0.0.1"}
        forgery.hashes().place()
        forgery.model.graph.node.append(onnx.helper.make_node("Neg", ["logits"], ["more"]))
        report = lc.verify(forgery.write(tmp_path), seed=0)
        assert not report.passed
        assert not report.refuted
        assert [claim.passed for claim in report.claims].count(None) == 3
