"""What it takes to refuse a file: files that are made to be read for ever, or to fill the memory, and are refused unread.

Each is refused by `load`, `read_manifest` and `verify` alike, in a process of its own whose memory is watched.
"""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import StringStringEntryProto, helper

import lipconvert as lc
from lipconvert.checkpoints import container
from lipconvert.checkpoints.wire import fields, of_memory
from lipconvert.foundation import files
from lipconvert.networks.documents import TrainingSummary

from .test_container import DATA, GRAPH, Forgery, header_of, network, placed, saved, with_header

# Bytes that a refusal may take beside what the process has; the honest files have 12 kB.
MOST = 200_000_000

# A process that has imported lipconvert, and refuses files in forks of itself: prints what happened and the memory it took.
REFUSER = """
import json, os, resource, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
import lipconvert as lc
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
lc.verify(sys.argv[1], seed=0)
for line in sys.stdin:
    path = json.loads(line)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        lc.load(sys.argv[1])
        report, base = {}, most()
        for what in ("load", "read_manifest"):
            before = time.process_time()
            try:
                getattr(lc, what)(path)
                report[what] = "taken"
            except lc.CheckpointError as error:
                report[what] = "refused"
                report["why"] = str(error)
            except BaseException as error:
                report[what] = repr(error)[:300]
            report["seconds"] = max(report.get("seconds", 0.0), time.process_time() - before)
        before = time.process_time()
        try:
            found = lc.verify(path, seed=0)
            report["verify"] = [[claim.claim, claim.passed, claim.found[:300]] for claim in found.claims]
        except BaseException as error:
            report["verify"] = repr(error)[:300]
        report["verifying"] = time.process_time() - before
        report["memory"] = most() - base
        with os.fdopen(write, "w") as out:
            json.dump(report, out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    print(said or "null", flush=True)
"""


@pytest.fixture(scope="module")
def refuser(tmp_path_factory):
    """path → what the functions that read checkpoints say of it, and how much memory that took."""
    path = placed(tmp_path_factory.mktemp("honest"), "tiny")
    process = subprocess.Popen(
        [sys.executable, "-c", REFUSER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def call(path):
        process.stdin.write(json.dumps(str(path)) + "\n")
        process.stdin.flush()
        report = json.loads(process.stdout.readline())
        if log := os.environ.get("LIPCONVERT_REFUSALS"):  # a file for the table of what each takes
            with Path(log).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"test": os.environ["PYTEST_CURRENT_TEST"], **report}) + "\n")
        return report

    yield call
    process.stdin.close()
    process.wait(20)
    process.stdout.close()


def require_refused(report, *, loads=False):
    """Nothing but a `CheckpointError` came out, no claim that was checked is one of many, and it took little memory."""
    if not loads:
        assert report["load"] == "refused", report
        assert report["read_manifest"] in ("refused", "taken"), report
        assert len(report["why"]) < 10_000, "the message is as long as what it is about"
    assert isinstance(report["verify"], list), report
    assert not all(passed for _, passed, _ in report["verify"]), report
    assert report["memory"] < MOST, report


def write_sparse(path, pieces, size):
    """A file of ``size`` bytes, a hole but for some pieces at their places: it takes no room on the disk."""
    with path.open("wb") as file:
        file.truncate(size)
        for place, piece in pieces.items():
            file.seek(place)
            file.write(piece)


def key(number, length):
    """The head of a field of bytes: its number and wire type 2, and how long it is, as varints."""

    def varint(value):
        found = b""
        while value > 127:
            found, value = found + bytes([value & 127 | 128]), value >> 7
        return found + bytes([value])

    return varint(number << 3 | 2) + varint(length)


def trailer(text=b""):
    return container._trailer(text)


def signed(path, body):
    """A graph with the hash of its bytes behind them."""
    path.write_bytes(body + trailer(body))
    return path


def _doubling(model):
    """Sixty functions, each of which calls the next twice: 2^60 nodes, for whoever writes them out."""
    for k in range(60):
        inner = f"f{k + 1}" if k < 59 else None
        call = {"domain": "lipconvert"} if inner else {}
        nodes = [helper.make_node(inner or "Neg", [a], [b], **call) for a, b in (("x", "m"), ("m", "y"))]
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("lipconvert", 1)]
        model.functions.append(helper.make_function("lipconvert", f"f{k}", ["x"], ["y"], nodes, opsets))
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[list(last.output).index("logits")] = "before"
    model.graph.node.append(helper.make_node("f0", ["before"], ["logits"], domain="lipconvert"))


def _nodes(count):
    def change(model):
        model.graph.node.extend(onnx.NodeProto() for _ in range(count))

    return change


def _initializers(count):
    def change(model):
        model.graph.initializer.extend(onnx.TensorProto(name=f"t{k}", data_type=1, dims=[0]) for k in range(count))

    return change


def _metadata(count):
    def change(model):
        model.metadata_props.extend(StringStringEntryProto(key=f"k{k}", value="v" * 1000) for k in range(count))

    return change


# Graphs signed anew that `load`, which does not look at nodes, may take; `verify` must not.
GRAPHS = {
    "functions that call the next twice": _doubling,
    "two hundred thousand nodes": _nodes(200_000),
    "fifty thousand nodes": _nodes(50_000),
    "a hundred thousand initialisers": _initializers(10**5),
    "ten thousand entries of metadata": _metadata(10_000),
    "a text of 30 MB": lambda m: setattr(m, "doc_string", "x" * 30_000_000),
    "a text of 60 MB": lambda m: setattr(m, "doc_string", "x" * 60_000_000),
    "a text of 30 MB in the graph": lambda m: setattr(m.graph, "doc_string", "x" * 30_000_000),
    "a node of 30 MB": lambda m: setattr(m.graph.node[0], "doc_string", "x" * 30_000_000),
    "a name of 30 MB of an initialiser": lambda m: setattr(m.graph.initializer[0], "name", "x" * 30_000_000),
    "numbers of 30 MB in another field": lambda m: m.graph.initializer[0].double_data.extend([1.0] * 4_000_000),
    "many dims": lambda m: m.graph.initializer[0].dims.extend([1] * 10**5),
    "an output of many dims": lambda m: [
        m.graph.output[0].type.tensor_type.shape.dim.add(dim_value=1) for _ in range(10**5)
    ],
    "a thousand outputs": lambda m: m.graph.output.extend([m.graph.output[0]] * 1000),
    "more training information": lambda m: [m.training_info.add() for _ in range(10**5)],
}


class TestGraphs:
    @pytest.mark.parametrize("embed", [False, True], ids=["pair", "embedded"])
    @pytest.mark.parametrize("change", list(GRAPHS))
    def test_changed_and_signed(self, change, embed, tmp_path, refuser):
        forgery = Forgery("tiny").hashes()
        forgery = forgery.embed() if embed else forgery.place()
        GRAPHS[change](forgery.model)
        report = refuser(forgery.write(tmp_path, data=not embed))
        require_refused(report, loads=report["load"] == "taken")

    def test_no_checker_and_no_runtime_sees_another_graph(self, tmp_path, monkeypatch):
        forgery = Forgery("tiny").hashes().place()
        _doubling(forgery.model)
        path = forgery.write(tmp_path)

        def never(*_, **__):
            raise AssertionError("it was called")

        monkeypatch.setattr(onnx.checker, "check_model", never)
        monkeypatch.setattr(onnxruntime, "InferenceSession", never)
        monkeypatch.setattr(onnx.inliner, "inline_local_functions", never)
        claims = {claim.claim: claim for claim in lc.verify(path, seed=0).claims}
        assert claims["the graph is what lipconvert writes for these weights"].passed is False
        for unknown in ("the graph is well-formed", "onnxruntime computes what torch does"):
            assert claims[unknown].passed is None
            assert "not tried" in claims[unknown].found

    @pytest.mark.parametrize(
        "hole",
        [
            "zeros",
            "zeros and a hash",
            "unknown",
            "a node",
            "numbers",
            "a function",
            "metadata",
            "much metadata",
            "text",
        ],
    )
    def test_two_gigabytes_of_nothing(self, hole, tmp_path, refuser):
        # a hole in the file, accounted for by one field or another
        path, graph, size = placed(tmp_path, "tiny"), saved("tiny")[GRAPH], 2_000_000_000
        body, end = graph[: -container.TRAILER], graph[-container.TRAILER :]
        left = size - len(body) - len(end)
        pieces = {0: body}
        if hole != "zeros":
            pieces[size - len(end)] = end
        whole = {
            "unknown": key(1000, left - 7),
            "a function": key(25, left - 7),
            "text": key(6, left - 6),
            "a node": key(7, left - 6) + key(1, left - 12),
            "numbers": key(7, left - 6) + key(5, left - 12) + key(9, left - 18),
            "metadata": key(14, left - 6),
        }
        if hole in whole:
            pieces[len(body)] = whole[hole]
        if hole == "much metadata":
            step = 1_900_000
            for k in range(left // step):
                pieces[len(body) + k * step] = key(14, step - 5) + key(2, step - 10)
            rest = left % step
            pieces[size - len(end) - rest] = key(1000, rest - 6)
        write_sparse(path, pieces, size)
        report = refuser(path)
        require_refused(report)
        assert report["read_manifest"] == "refused"

    def test_the_heads_of_these_fields(self, tmp_path):
        # the holes above are fields, to their last byte: else they would be refused for that alone
        graph, size = saved("tiny")[GRAPH], 5_000_000
        body, end = graph[: -container.TRAILER], graph[-container.TRAILER :]
        hole = size - len(body) - len(end)
        text = body + key(1000, hole - 6) + bytes(hole - 6) + end
        found = fields(of_memory(memoryview(text)), 0, len(text), 1000)
        assert [field.number for field in found[-2:]] == [1000, 14]
        assert found[-1].stop == len(text)


MANIFESTS = {
    "a hundred thousand notes": lambda m: m.update(
        training={"data": "", "epochs": None, "notes": {str(k): k for k in range(10**5)}}
    ),
    "notes that are lists": lambda m: m.update(training={"notes": {str(k): [] for k in range(10**5)}}),
    "50 MB of notes": lambda m: m.update(training={"notes": {f"{k:07}": "x" * 500 for k in range(10**5)}}),
    "50 MB of provenance": lambda m: m.update(
        provenance={"model": "x" * 50_000_000, "sha256": "", "plugins": [], "versions": {}}
    ),
    "2 MB of provenance": lambda m: m.update(
        provenance={"model": "x" * container.MOST_MANIFEST, "sha256": "", "plugins": [], "versions": {}}
    ),
    "a hundred thousand plugins": lambda m: m.update(
        provenance={"model": "", "sha256": "", "plugins": [{}] * 10**5, "versions": {}}
    ),
    "a hundred thousand versions": lambda m: m.update(versions={str(k): "1" for k in range(10**5)}),
    "a hundred thousand unknown entries": lambda m: m.update({f"k{k}": 0 for k in range(10**5)}),
    "a million class names": lambda m: m.update(class_names=["c"] * 10**6),
    "a class name more": lambda m: m.update(class_names=["a", "b", "c", "d", "e"]),
    "a class name less": lambda m: m.update(class_names=["a"]),
    "class names that are long": lambda m: m.update(class_names=["a" * 1001] * 2),
    "a hundred thousand steps": lambda m: m.update(steps=m["steps"] + [IDENTITY] * 10**5),
    "forty thousand identities": lambda m: m.update(steps=m["steps"] + [IDENTITY] * 40_000),
    "a thousand identities": lambda m: m.update(steps=m["steps"] + [IDENTITY] * 1000),
    "a million tensors": lambda m: m.update(tensors=[{}] * 10**6),
    "nine thousand tensors more": lambda m: m["tensors"].extend(
        {"name": f"t{k}", "dtype": "float64", "shape": [0], "sha256": "0" * 64} for k in range(9000)
    ),
    "numbers in place of tensors": lambda m: m.update(tensors=[0] * 900_000),
    "a million blocks": lambda m: stage(m).update(blocks=[1] * 900_000),
    "a million empty blocks": lambda m: stage(m)["blocks"].extend([0] * 900_000),
    "blocks that are text": lambda m: stage(m).update(blocks=["x"] * 400_000),
    "a million runs of activations": lambda m: stage(m)["activations"].extend([["relu", 0]] * 10**6),
    "ninety thousand runs of activations": lambda m: stage(m)["activations"].extend([["relu", 0]] * 90_000),
    "an activation with a long name": lambda m: stage(m).update(activations=[["relu" * 400_000, 8]]),
    "an image of 10^12 pixels": lambda m: stage(m).update(image=[10**6, 10**6], origin=[0, 0]),
    "an image of a million dimensions": lambda m: stage(m).update(image=[1] * 900_000),
    "an origin of a million": lambda m: stage(m).update(origin=[0] * 900_000),
    "an input of a million dimensions": lambda m: m.update(input_shape=[1] * 900_000),
    "an input of 10^18": lambda m: m.update(input_shape=[2**31, 2**31]),
    "2^62 states": lambda m: stage(m).update(states=2**62),
    "a tensor of 2^40 rows and no columns": lambda m: m["tensors"][0].update(shape=[2**40, 0]),
    "a tensor of -1": lambda m: m["tensors"][0].update(shape=[-1, -1]),
    "a tensor of 2^64": lambda m: m["tensors"][0].update(shape=[2**64]),
    "a tensor of 2^32 by 2^32": lambda m: m["tensors"][0].update(shape=[2**32, 2**32]),
    "a tensor of a million dimensions": lambda m: m["tensors"][0].update(shape=[1] * 900_000),
    "padding to 10^9": lambda m: m["steps"].append(glue("PadChannels", channels=10**9)),
    "padding to 10^9 and back": lambda m: m["steps"].extend(
        [glue("PadChannels", channels=10**9), glue("FirstFeatures", features=2)]
    ),
    "unflattening to a million dimensions": lambda m: m["steps"].append(
        glue("Unflatten", dim=1, unflattened_size=[2] + [1] * 800_000)
    ),
    "unflattening to 10^18": lambda m: m["steps"].append(glue("Unflatten", dim=1, unflattened_size=[2**31, 2**31])),
    "shuffling by 10^9": lambda m: m["steps"].append(glue("PixelShuffle", upscale_factor=10**9)),
    "a mean of many numbers": lambda m: m["steps"].append(glue("Normalize", mean=[0.5] * 400_000, std=[1.0])),
    "a mean of a std of another size": lambda m: m["steps"].append(
        glue("Normalize", mean=[0.5] * 200_000, std=[1.0] * 100_000)
    ),
    "glue of a long name": lambda m: m["steps"].append(glue("x" * 1_900_000)),
    "glue of many arguments": lambda m: m["steps"].append(glue("Identity", **{f"a{k}": 0 for k in range(10**5)})),
    "pooling by 10^18": lambda m: m["steps"].append(glue("AvgPool2d", kernel_size=10**18, divisor_override=None)),
}

IDENTITY = {"kind": "glue", "type": "Identity", "arguments": {}}


def glue(kind, **arguments):
    return {"kind": "glue", "type": kind, "arguments": arguments}


def stage(manifest):
    return next(entry for entry in manifest["steps"] if entry["kind"] == "lben")


# Texts in place of a manifest.
TEXTS = {
    "50 MB of blanks": " " * 50_000_000,
    "1.9 MB of lists in lists": "[" * 1_900_000,
    "half a million lists": "[" + "[]," * 500_000 + "[]]",
    "half a million objects": "[" + "{}," * 500_000 + "{}]",
    "objects in objects": '{"a":' * 300_000 + "1" + "}" * 300_000,
    "a number of a million digits": '{"format_version":' + "9" * 10**6 + "}",
    "a hundred numbers of 4,000 digits": '{"format_version":2,"class_names":[' + ",".join(["9" * 4000] * 100) + "]}",
    "1e400": '{"format_version":1e400}',
    "a version that is a list": '{"format_version":[' + "0," * 900_000 + "0]}",
    "numbers": "[" + "0.1," * 470_000 + "0]",
    "a text": '"' + "x" * 1_900_000 + '"',
    "escapes": '"' + "\\u0041" * 300_000 + '"',
}


class TestManifests:
    """In both files, all hashes made to fit."""

    def require(self, forgery, folder, refuser):
        path = forgery.write(folder)
        for name in (GRAPH, DATA):
            require_refused(refuser(path.with_name(name)))

    @pytest.mark.parametrize("change", list(MANIFESTS))
    def test_changed_and_signed(self, change, tmp_path, refuser):
        forgery = Forgery("tiny").hashes()
        MANIFESTS[change](forgery.manifest)
        self.require(forgery.place(), tmp_path, refuser)

    @pytest.mark.parametrize("text", list(TEXTS))
    def test_texts(self, text, tmp_path, refuser):
        self.require(Forgery("tiny").hashes().place(TEXTS[text]), tmp_path, refuser)

    def test_class_names_as_many_as_outputs(self, tmp_path):
        forgery = Forgery("tiny").hashes()
        outputs = network("tiny")(torch.zeros(1, *network("tiny").input_shape)).numel()
        forgery.manifest["class_names"] = [f"{k}" for k in range(outputs)]
        path = forgery.place().write(tmp_path)
        assert lc.load(path).class_names == tuple(forgery.manifest["class_names"])
        assert lc.verify(path, seed=0).passed


class TestData:
    """The data file, with a header made by hand."""

    def require(self, folder, refuser):
        for name in (GRAPH, DATA):
            require_refused(refuser(folder / name))

    @pytest.mark.parametrize("size", [1, 8, 10**6, 40_000_000_000], ids=str)
    def test_a_tail_that_no_tensor_accounts_for(self, size, tmp_path, refuser):
        path = placed(tmp_path, "tiny").with_name(DATA)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + size)
        self.require(tmp_path, refuser)

    def test_a_tensor_that_accounts_for_it(self, tmp_path, refuser):
        # a tensor of 40 GB that the manifest does not have
        path = placed(tmp_path, "tiny").with_name(DATA)
        length, text = header_of(saved("tiny")[DATA])
        header, size = json.loads(text), 40_000_000_000
        stop = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        header["more"] = {"dtype": "F64", "shape": [size // 8], "data_offsets": [stop, stop + size]}
        path.write_bytes(with_header(header, saved("tiny")[DATA][8 + length :]))
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + size)
        self.require(tmp_path, refuser)

    def test_a_gap_between_tensors(self, tmp_path, refuser):
        path = placed(tmp_path, "tiny").with_name(DATA)
        length, text = header_of(saved("tiny")[DATA])
        header = json.loads(text)
        last = max(header, key=lambda name: header[name].get("data_offsets", [0])[0])
        start, stop = header[last]["data_offsets"]
        gap = 40_000_000_000
        header[last]["data_offsets"] = [start + gap, stop + gap]
        content = saved("tiny")[DATA][8 + length :]
        path.write_bytes(with_header(header, content[:start]))
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + gap)
            file.seek(0, os.SEEK_END)
            file.write(content[start:stop])
        self.require(tmp_path, refuser)

    @pytest.mark.parametrize(
        "header",
        {
            "100 MB of blanks": b"{}" + b" " * 100_000_000,
            "5 MB of lists": b"[" + b"[]," * 1_500_000 + b"[]]",
            "5 MB of objects": b"[" + b"{}," * 1_500_000 + b"{}]",
            "5 MB of keys": b"{" + b",".join(b'"%05x":0' % k for k in range(450_000)) + b"}",
            "5 MB of numbers": b"[" + b"0.1," * 1_200_000 + b"0]",
            "5 MB of text": b'{"__metadata__":{"x":"' + b"x" * 5_000_000 + b'"}}',
            "a shape of 2 million": b'{"x":{"dtype":"F64","shape":[' + b"1," * 2_000_000 + b'1],"data_offsets":[0,8]}}',
            "a number of a million digits": b'{"x":' + b"1" * 10**6 + b"}",
            "a thousand numbers of 4,000 digits": b'{"x":{"dtype":"F64","shape":['
            + b",".join([b"9" * 4000] * 1000)
            + b'],"data_offsets":[0,64]}}',
            "thirty thousand tensors": json.dumps(
                {f"t{k}": {"dtype": "F64", "shape": [0], "data_offsets": [0, 0]} for k in range(30_000)}
            ).encode(),
        }.items(),
        ids=lambda item: item[0],
    )
    def test_headers(self, header, tmp_path, refuser):
        path = placed(tmp_path, "tiny")
        path.with_name(DATA).write_bytes(with_header(header[1], bytes(64)))
        self.require(tmp_path, refuser)


class TestWhatIsNoFile:
    """Pipes, folders and devices: none is waited for, and none is read."""

    @pytest.mark.parametrize("name", [GRAPH, DATA])
    @pytest.mark.parametrize("instead", ["a pipe", "a folder", "/dev/zero", "a link to /dev/zero", "/dev/tty"])
    def test_in_place_of_a_file(self, name, instead, tmp_path, refuser):
        path = placed(tmp_path, "tiny")
        target = path.with_name(name)
        target.unlink()
        if instead == "a pipe":
            os.mkfifo(target)
        elif instead == "a folder":
            target.mkdir()
        elif instead == "a link to /dev/zero":
            (tmp_path / "link").symlink_to("/dev/zero")
            target.symlink_to(tmp_path / "link")
        else:
            target.symlink_to(instead)
        for opened in (GRAPH, name):
            report = refuser(path.with_name(opened))
            require_refused(report)
            assert report["verify"][0][1] is None, "nothing is known of what is not there"

    @pytest.mark.parametrize("left", ["40 GB", "a pipe", "a folder", "a header of 40 GB", "of another", "/dev/zero"])
    def test_what_a_save_has_left(self, left, tmp_path, refuser):
        # beside an honest pair, which is read all the same
        path = placed(tmp_path, "tiny")
        partial = files.partial_of(path.with_name(DATA))
        if left == "a pipe":
            os.mkfifo(partial)
        elif left == "a folder":
            partial.mkdir()
        elif left == "/dev/zero":
            partial.symlink_to(left)
        elif left == "of another":
            partial.write_bytes(saved("tiny", seed=1)[DATA])
        else:
            head = struct.pack("<Q", 39_000_000_000) if "header" in left else saved("tiny")[DATA]
            write_sparse(partial, {0: head}, 40_000_000_000)
        report = refuser(path)
        assert report["load"] == "taken", report
        assert all(passed for _, passed, _ in report["verify"])
        assert report["memory"] < MOST
        # and where the data are missing, it is no data either
        path.with_name(DATA).unlink()
        report = refuser(path)
        require_refused(report)


class TestSaveRefuses:
    """What could not be read is not written."""

    @pytest.mark.parametrize("suffix", [GRAPH, DATA])
    @pytest.mark.parametrize(
        "change",
        [
            lambda net: setattr(net, "class_names", ("x" * 1001, "y")),
            lambda net: setattr(net, "training_summary", TrainingSummary(data="x" * 3_000_000)),
        ],
        ids=["a long class name", "long notes"],
    )
    def test_what_is_too_long(self, suffix, change, tmp_path):
        net = lc.load(placed(tmp_path, "tiny"))
        change(net)
        assert net(torch.zeros(1, *net.input_shape)).shape == (1, 2)
        folder = tmp_path / "new"
        with pytest.raises(lc.CheckpointError):
            lc.save(net, folder / suffix)
        assert not folder.exists() or not list(folder.iterdir())


class TestHub:
    """A folder of the Hub, whose ``config.json`` repeats the manifest."""

    @pytest.mark.parametrize("config", ["100 MB of blanks", "lists in lists", "a million lists", "a pipe", "/dev/zero"])
    def test_configs(self, config, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(saved("tiny")[DATA])
        target = tmp_path / "config.json"
        if config == "a pipe":
            os.mkfifo(target)
        elif config == "/dev/zero":
            target.symlink_to(config)
        elif config == "100 MB of blanks":
            write_sparse(target, {0: b"{"}, 100_000_000)
        else:
            target.write_bytes(b"[" * 90_000 if config == "lists in lists" else b"[" + b"[]," * 10**6 + b"[]]")
        with pytest.raises(lc.CheckpointError, match="config"):
            lc.from_hub(tmp_path)
