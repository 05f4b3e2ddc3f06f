"""Networks to files and back bit by bit, and every way a file can be wrong."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from lipconvert_plugins.aol import AOLNetwork
from lipconvert_plugins.cpl import CPLNetwork
from lipconvert_plugins.g_mondeq import GMonDEQConv2d
from lipconvert_plugins.mondeq import MonDEQConv2d
from lipconvert_plugins.sandwich import SandwichNetwork
from lipconvert_plugins.sll import SLLConv2d, SLLLinear, SLLNetwork
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lipconvert as lc

EXAMPLES = [
    (name, index) for name in lc.registry().names() for index in range(len(lc.registry().example_models(name, 0)))
]


def example(name, index=0, seed=0):
    return lc.registry().example_models(name, seed)[index]


def samples(net, count=6):
    generator = torch.Generator().manual_seed(3)
    dtype = next(net.parameters()).dtype
    return torch.randn(count, *net.input_shape, generator=generator, dtype=torch.float64).to(dtype)


def tensors_of(path):
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def write(path, tensors, manifest):
    """A file as somebody would write it who knows the format: hashes of what is there, under what the manifest says."""
    if isinstance(manifest, dict):
        for entry in manifest.get("tensors", []):
            found = tensors.get(entry["name"])
            if found is not None and (str(found.dtype).removeprefix("torch."), list(found.shape)) == (
                entry["dtype"],
                entry["shape"],
            ):
                entry["sha256"] = hashlib.sha256(found.contiguous().numpy().tobytes()).hexdigest()
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    save_file(
        tensors, path, metadata={"lipconvert": text, "lipconvert.sha256": hashlib.sha256(text.encode()).hexdigest()}
    )
    return path


def bits(tensor):
    """The bytes of a tensor: −0 and 0 differ, NaN equals itself."""
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.item().hex()


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
    @pytest.mark.parametrize(("name", "index"), EXAMPLES)
    def test_bit_by_bit(self, name, index, dtype, tmp_path):
        model = example(name, index).double()
        shape = getattr(model, "input_shape", None) or (lc.to_dae(model).inputs,)
        net = lc.convert(model, shape).to(dtype)
        path = tmp_path / "net.safetensors"
        lc.save(net, path)
        loaded = lc.load(path)
        # The file itself, read by another library, holds the parameters' bytes.
        stored, _ = tensors_of(path)
        parameters = dict(net.named_parameters()) | dict(net.named_buffers())
        assert {k: bits(stored[k]) for k in parameters} == {k: bits(v) for k, v in parameters.items()}
        again = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
        assert {k: bits(v) for k, v in again.items()} == {k: bits(v) for k, v in parameters.items()}
        assert (loaded.lipschitz, loaded.input_shape) == (net.lipschitz, net.input_shape)
        assert loaded.info() == net.info()
        x = samples(net)
        with torch.no_grad():
            assert torch.equal(loaded(x), net(x))
        assert loaded.methods(x) == net.methods(x)

    def test_every_kind_of_glue(self, tmp_path):
        torch.manual_seed(0)
        model = nn.Sequential(
            lc.Normalize([0.1, 0.2], [0.25, 0.3]),
            lc.PadChannels(3),
            nn.Identity(),
            nn.ReLU(),
            lc.MeanPool(2),
            nn.Flatten(),
            nn.Linear(12, 5),
            lc.FirstFeatures(2),
        )
        net = lc.convert(model, (2, 4, 4))
        lc.save(net, tmp_path / "net.safetensors")
        loaded = lc.load(tmp_path / "net.safetensors")
        assert [type(s) for s in loaded.steps] == [type(s) for s in net.steps]
        x = samples(net)
        with torch.no_grad():
            assert torch.equal(loaded(x), net(x))
        assert loaded.step_lipschitz == net.step_lipschitz
        assert net.step_lipschitz[0] == pytest.approx(4.0, rel=1e-7)  # 1/0.25; std is stored in torch's default dtype

    def test_strict_start_and_trained_weights(self, tmp_path):
        net = lc.convert(example("sandwich"), epsilon=1e-6, delta=1e-2)
        optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
        net(samples(net)).square().sum().backward()
        optimiser.step()
        lc.save(net, tmp_path / "net.safetensors")
        loaded = lc.load(tmp_path / "net.safetensors")
        assert [s.epsilon for s in loaded.stages] == [1e-6]
        assert loaded.lipschitz == net.lipschitz
        assert torch.equal(loaded(samples(net)), net(samples(net)))

    def test_activations_with_parameters(self, tmp_path):
        torch.manual_seed(0)
        layers = [
            nn.LeakyReLU(1 / 3),
            nn.ELU(0.7),
            nn.Softplus(2.5),
            nn.Tanh(),
            nn.Hardtanh(),
            nn.ReLU6(),
            nn.Sigmoid(),
        ]
        model = nn.Sequential(*[m for layer in layers for m in (nn.Linear(3, 3), layer)], nn.Linear(3, 2))
        net = lc.convert(model)
        lc.save(net, tmp_path / "net.safetensors")
        loaded = lc.load(tmp_path / "net.safetensors")
        assert [s.sigma for s in loaded.stages] == [s.sigma for s in net.stages]
        assert torch.equal(loaded(samples(net)), net(samples(net)))

    def test_overwriting_keeps_the_newest(self, tmp_path):
        path = tmp_path / "net.safetensors"
        lc.save(lc.convert(example("sll", 0, 0)), path)
        other = lc.convert(example("sll", 0, 1))
        lc.save(other, path)
        assert torch.equal(lc.load(path).stages[0].V, other.stages[0].V)
        assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def convolutional():
    """Images (2, 8, 4) through every kind of glue on images and two convolutional stages into a dense one."""
    torch.manual_seed(0)
    return nn.Sequential(
        lc.Normalize([0.1, 0.2], [0.25, 0.3]),
        lc.PadChannels(4),
        nn.PixelUnshuffle(2),
        lc.MaxMin(),
        nn.PixelShuffle(2),
        SLLConv2d(4, 3),
        nn.AvgPool2d(2, divisor_override=2),
        SLLConv2d(4, 2, kernel_size=(1, 2), activation=nn.Tanh()),
        lc.MeanPool(2),
        nn.Flatten(),
        SLLLinear(8, 5),
        lc.FirstFeatures(3),
    )


IMAGE = (2, 8, 4)


class TestImages:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
    def test_bit_by_bit(self, dtype, tmp_path):
        net = lc.convert(convolutional(), IMAGE).to(dtype)
        kinds = ["Normalize", "PadChannels", "PixelUnshuffle", "MaxMin", "PixelShuffle", "LBEN", "AvgPool2d", "LBEN"]
        kinds += ["MeanPool", "Flatten", "LBEN", "FirstFeatures"]
        assert [type(step).__name__ for step in net.steps] == kinds
        path = tmp_path / "net.safetensors"
        lc.save(net, path)
        stored, metadata = tensors_of(path)
        tensors = dict(net.named_parameters()) | dict(net.named_buffers())
        assert {k: bits(stored[k]) for k in tensors} == {k: bits(v) for k, v in tensors.items()}
        assert stored["steps.5.G"].shape == (4, 7, 8, 4)  # identity rows for the skip, 3 neurons; 8×4 pixels
        entries = json.loads(metadata["lipconvert"])["steps"]
        assert [entry["image"] for entry in entries if entry["kind"] == "lben"] == [[8, 4], [4, 2], []]
        loaded = lc.load(path)
        assert [type(step).__name__ for step in loaded.steps] == kinds
        again = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
        assert {k: bits(v) for k, v in again.items()} == {k: bits(v) for k, v in tensors.items()}
        assert loaded.info() == net.info()
        assert loaded.step_lipschitz == net.step_lipschitz
        x = samples(net)
        with torch.no_grad():
            assert torch.equal(loaded(x), net(x))
            expected = convolutional()(x.double())
        assert loaded.methods(x) == net.methods(x)
        tolerance = 1e-12 if dtype is torch.float64 else 1e-5
        torch.testing.assert_close(loaded(x).double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))

    @pytest.mark.parametrize(
        ("how", "model"),
        [
            ({"dense": True}, nn.Sequential(nn.Identity(), SLLConv2d(2, padding_mode="zeros"), lc.MeanPool(2))),
            ({"merge": True}, nn.Sequential(SLLConv2d(2), nn.PixelUnshuffle(2), SLLConv2d(8, 2, 1))),
            ({"epsilon": 1e-6, "delta": 1e-2}, nn.Sequential(SLLConv2d(2), nn.Flatten(), SLLLinear(16))),
        ],
        ids=["dense", "merge", "strict"],
    )
    def test_other_ways_of_converting(self, how, model, tmp_path):
        net = lc.convert(model.double(), (2, 4, 2), **how)
        lc.save(net, tmp_path / "net.safetensors")
        loaded = lc.load(tmp_path / "net.safetensors")
        assert [type(step) for step in loaded.steps] == [type(step) for step in net.steps]
        assert [s.epsilon for s in loaded.stages] == [s.epsilon for s in net.stages]
        assert loaded.lipschitz == net.lipschitz
        x = samples(net)
        with torch.no_grad():
            assert torch.equal(loaded(x), net(x))

    @pytest.mark.parametrize(
        "pool",
        [
            nn.AvgPool2d(2),
            nn.AvgPool2d((2, 1)),
            nn.AvgPool2d((2, 2), divisor_override=2),
            nn.AvgPool2d(2, 2, divisor_override=3),
        ],
        ids=["mean", "tuple", "tuple and divisor", "stride and divisor"],
    )
    def test_average_pooling(self, pool, tmp_path):
        net = lc.convert(nn.Sequential(SLLConv2d(2).double(), pool), (2, 4, 2))
        lc.save(net, tmp_path / "net.safetensors")
        loaded = lc.load(tmp_path / "net.safetensors")
        assert loaded.lipschitz == net.lipschitz
        x = samples(net)
        with torch.no_grad():
            assert torch.equal(loaded(x), net(x))


@pytest.fixture
def image_checkpoint(tmp_path):
    """(tensors, manifest, rewrite(tensors, manifest)) of a good checkpoint of `convolutional`; steps 5, 7 and 10 are LBEN."""
    path = tmp_path / "net.safetensors"
    lc.save(lc.convert(convolutional(), IMAGE, check=False), path)
    tensors, metadata = tensors_of(path)
    manifest = json.loads(metadata["lipconvert"])

    def rewrite(new_tensors=tensors, new_manifest=manifest):
        return write(path, new_tensors, new_manifest)

    return tensors, manifest, rewrite


class TestBadImages:
    @pytest.mark.parametrize(
        "image", [[4, 8], [8, 3], [16, 2], [32], [8, 4, 1], [0, 4], [-8, 4], [8, 0], [], [10**9, 10**9]], ids=str
    )
    def test_an_image_of_another_size(self, image_checkpoint, image):
        _, manifest, rewrite = image_checkpoint
        manifest["steps"][5]["image"] = image
        with pytest.raises(lc.CheckpointError, match="the manifest says") as caught:
            lc.load(rewrite(new_manifest=manifest))
        assert caught.value.field == "tensor 'steps.5.U'"

    @pytest.mark.parametrize("image", [[8.5, 4], None, "84", [[8], 4], 8], ids=str)
    def test_an_image_that_is_none(self, image_checkpoint, image):
        _, manifest, rewrite = image_checkpoint
        manifest["steps"][5]["image"] = image
        with pytest.raises(lc.CheckpointError, match="image"):
            lc.load(rewrite(new_manifest=manifest))

    def test_an_image_where_there_is_none(self, image_checkpoint):
        _, manifest, rewrite = image_checkpoint
        manifest["steps"][10]["image"] = [1, 1]
        with pytest.raises(lc.CheckpointError, match=r"tensor 'steps\.10\.U'"):
            lc.load(rewrite(new_manifest=manifest))

    @pytest.mark.parametrize("parameter", ["G", "U", "V", "S"])
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda t, k: t.pop(k), "missing"),
            (lambda t, k: t.update({k: t[k].mT.contiguous()}), "the manifest says"),
            (lambda t, k: t.update({k: t[k][..., :-1].contiguous()}), "the manifest says"),
            (lambda t, k: t.update({k: t[k][1:].contiguous()}), "the manifest says"),
            (lambda t, k: t.update({k: t[k][..., 0, 0].contiguous()}), "the manifest says"),
            (lambda t, k: t.update({k: t[k].flatten(2)}), "the manifest says"),
            (lambda t, k: t.update({k: t[k].float()}), "float32"),
            (lambda t, k: t[k].view(-1)[-1].fill_(float("nan")), "NaN or infinity"),
        ],
        ids=["missing", "turned", "narrow", "rows", "dense", "flat", "float32", "nan"],
    )
    def test_kernels(self, image_checkpoint, parameter, change, reason):
        tensors, _, rewrite = image_checkpoint
        key = f"steps.7.{parameter}"
        change(tensors, key)
        with pytest.raises(lc.CheckpointError, match=reason) as caught:
            lc.load(rewrite(new_tensors=tensors))
        assert caught.value.field == f"tensor {key!r}"

    def test_a_bias_for_each_pixel(self, image_checkpoint):
        tensors, _, rewrite = image_checkpoint
        tensors["steps.5.b_z"] = tensors["steps.5.b_z"][:, None, None].expand(-1, 8, 4).contiguous()
        with pytest.raises(lc.CheckpointError, match=r"tensor 'steps\.5\.b_z'.*the manifest says"):
            lc.load(rewrite(new_tensors=tensors))

    def test_manifests_from_before_there_were_images(self, image_checkpoint):
        _, manifest, rewrite = image_checkpoint
        del manifest["steps"][10]["image"]  # dense: nothing else is needed
        loaded = lc.load(rewrite(new_manifest=manifest))
        assert [stage.grid.image for stage in loaded.stages] == [(8, 4), (4, 2), ()]
        del manifest["steps"][5]["image"]
        with pytest.raises(lc.CheckpointError, match=r"tensor 'steps\.5\.U'"):
            lc.load(rewrite(new_manifest=manifest))

    def test_a_dense_checkpoint_from_before_there_were_images(self, checkpoint):
        path, _, manifest, rewrite = checkpoint
        x = samples(lc.load(path))
        with torch.no_grad():
            expected = lc.load(path)(x)
            for step in manifest["steps"]:
                step.pop("image", None)
            assert torch.equal(lc.load(rewrite(new_manifest=manifest))(x), expected)

    @pytest.mark.parametrize(
        ("index", "arguments"),
        [
            (2, {"downscale_factor": 2, "more": 1}),
            (3, {"channels": 4}),
            (4, {}),
            (6, {"kernel_size": 2}),
            (6, {"kernel_size": 0, "divisor_override": 2}),
            (6, {"kernel_size": "2", "divisor_override": 2}),
            (6, {"kernel_size": [2, 2, 2], "divisor_override": 2}),
            (8, {"kernel_size": 0}),
        ],
        ids=str,
    )
    def test_glue_with_wrong_arguments(self, image_checkpoint, index, arguments):
        _, manifest, rewrite = image_checkpoint
        manifest["steps"][index]["arguments"] = arguments
        with pytest.raises(lc.CheckpointError, match="manifest step"):
            lc.load(rewrite(new_manifest=manifest))


class TestNothingHalfWritten:
    def test_wrong_suffix(self, tmp_path):
        net = lc.convert(example("aol"))
        for name in ("net.pt", "net.bin", "net"):
            with pytest.raises(lc.CheckpointError, match="the suffix must be"):
                lc.save(net, tmp_path / name)
        assert list(tmp_path.iterdir()) == []

    def test_glue_that_cannot_be_rebuilt(self, tmp_path):
        class Shift(nn.Module):
            def forward(self, x):
                return x + 1.0

        net = lc.Network([Shift(), *lc.convert(example("aol")).steps], [1.0, None], example("aol").input_shape)
        with pytest.raises(lc.CheckpointError, match="Shift"):
            lc.save(net, tmp_path / "net.safetensors")
        assert list(tmp_path.iterdir()) == []

    def test_a_write_that_fails_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "net.safetensors"
        net = lc.convert(example("aol"))
        lc.save(net, path)
        before = path.read_bytes()

        def fails(path, tensors, manifest):
            path.write_bytes(b"half of it")
            raise OSError("disk full")

        monkeypatch.setattr("lipconvert.checkpoints.checkpoint.write_data", fails)
        with pytest.raises(OSError, match="disk full"):
            lc.save(net, path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.fixture
def checkpoint(tmp_path):
    """(path, tensors, manifest) of a good checkpoint with glue in it, and rewrite(tensors, manifest)."""
    torch.manual_seed(0)
    model = nn.Sequential(lc.Normalize(0.5, 0.25), nn.Flatten(), *example("aol"))
    path = tmp_path / "net.safetensors"
    lc.save(lc.convert(model, (5,)), path)
    tensors, metadata = tensors_of(path)
    manifest = json.loads(metadata["lipconvert"])

    def rewrite(new_tensors=tensors, new_manifest=manifest):
        return write(path, new_tensors, new_manifest)

    return path, tensors, manifest, rewrite


def _stage(manifest):
    return next(step for step in manifest["steps"] if step["kind"] == "lben")


def _glue(manifest, kind):
    return next(step for step in manifest["steps"] if step.get("type") == kind)


class TestBadFiles:
    def test_the_fixture_is_good(self, checkpoint):
        path, _, _, rewrite = checkpoint
        lc.load(path)
        lc.load(rewrite())

    def test_missing(self, tmp_path):
        with pytest.raises(lc.CheckpointError, match="cannot be read"):
            lc.load(tmp_path / "nothing.safetensors")

    def test_a_directory(self, tmp_path):
        with pytest.raises(lc.CheckpointError, match="cannot be read"):
            lc.load(tmp_path)

    @pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.99, -1])
    def test_truncated(self, checkpoint, keep):
        path, *_ = checkpoint
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
        with pytest.raises(lc.CheckpointError, match="cannot be read"):
            lc.load(path)

    @pytest.mark.parametrize("data", [b"not a checkpoint at all", bytes(64), b"PK\x03\x04" + bytes(60), b"\xff" * 64])
    def test_not_safetensors(self, tmp_path, data):
        path = tmp_path / "net.safetensors"
        path.write_bytes(data)
        with pytest.raises(lc.CheckpointError, match="cannot be read"):
            lc.load(path)

    def test_somebody_elses_safetensors(self, tmp_path):
        path = tmp_path / "net.safetensors"
        for metadata in (None, {"format": "pt"}):
            save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
            with pytest.raises(lc.CheckpointError, match="not a lipconvert checkpoint"):
                lc.load(path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', '{"format_version": 2}', "1e999"])
    def test_a_manifest_that_is_none(self, checkpoint, text):
        *_, rewrite = checkpoint
        with pytest.raises(lc.CheckpointError, match="metadata 'lipconvert'"):
            lc.load(rewrite(new_manifest=text))

    @pytest.mark.parametrize(
        "text", ["{}", '{"format_version": 1}', '{"format_version": "2"}', '{"format_version": null}']
    )
    def test_another_version(self, checkpoint, text):
        *_, rewrite = checkpoint
        with pytest.raises(lc.CheckpointError, match="this lipconvert reads 2") as caught:
            lc.load(rewrite(new_manifest=text))
        assert caught.value.field == "format_version"

    @pytest.mark.parametrize(
        ("change", "where"),
        [
            (lambda m: m.update(surprise=1), "surprise"),
            (lambda m: m.update(format_version=3), "format_version"),
            (lambda m: m.update(dtype="float16"), "dtype"),
            (lambda m: m.pop("input_shape"), "input_shape"),
            (lambda m: _stage(m).update(surprise=1), "surprise"),
            (lambda m: _stage(m).update(states=0), "states"),
            (lambda m: _stage(m).update(states=-3), "states"),
            (lambda m: _stage(m).update(lipschitz=0.0), "lipschitz"),
            (lambda m: _stage(m).update(lipschitz=-1.0), "lipschitz"),
            (lambda m: _stage(m).update(lipschitz=float("nan")), "lipschitz"),
            (lambda m: _stage(m).update(lipschitz=float("inf")), "lipschitz"),
            (lambda m: _stage(m).update(epsilon=-1e-3), "epsilon"),
            (lambda m: _stage(m).update(kind="cnn"), "kind"),
            (lambda m: _stage(m).update(states=_stage(m)["states"] + 1), "tensor"),
            (lambda m: _stage(m).update(blocks=[1]), "blocks"),
            (lambda m: _stage(m).update(blocks=[]), "blocks"),
            (lambda m: _stage(m).update(blocks=[_stage(m)["states"] + 1, -1]), "blocks"),
            (lambda m: _stage(m).update(activations=[["relu", 1]]), "activations"),
            (lambda m: _stage(m).update(activations=[["gelu", _stage(m)["states"]]]), "gelu"),
            (lambda m: _stage(m).update(activations=[["leaky_relu(1.5)", _stage(m)["states"]]]), "leaky_relu"),
            (lambda m: _stage(m).update(activations=[["leaky_relu(x)", _stage(m)["states"]]]), "leaky_relu"),
            (lambda m: _stage(m).update(inputs=_stage(m)["inputs"] + 1), "tensor"),
            (lambda m: _stage(m).update(outputs=_stage(m)["outputs"] + 1), "tensor"),
            (lambda m: m["steps"].append(dict(_glue(m, "Flatten"), type="Linear")), "unknown glue 'Linear'"),
            (lambda m: m["steps"].append(dict(_glue(m, "Flatten"), type="os.system")), "unknown glue"),
            (lambda m: _glue(m, "Flatten")["arguments"].update(surprise=1), "needs the arguments"),
            (lambda m: _glue(m, "Flatten").update(arguments={}), "needs the arguments"),
            (lambda m: _glue(m, "Normalize")["arguments"].update(std=[0.0]), "Normalize"),
            (lambda m: _glue(m, "Normalize")["arguments"].update(std=[-1.0]), "Normalize"),
            (lambda m: _glue(m, "Normalize")["arguments"].update(mean=[0.0, 0.0]), "tensor"),
            (lambda m: _glue(m, "Normalize").update(lipschitz=1.0), "lipschitz"),
            (lambda m: m["steps"].pop(0), "tensor"),
            (lambda m: m["steps"].clear(), "tensor"),
        ],
    )
    def test_tampered_manifest(self, checkpoint, change, where):
        _, _, manifest, rewrite = checkpoint
        change(manifest)
        with pytest.raises(lc.CheckpointError, match=where) as caught:
            lc.load(rewrite(new_manifest=manifest))
        assert caught.value.path.endswith("net.safetensors")

    def test_a_raised_step_constant_is_not_hidden_by_the_glue_tensors(self, checkpoint):
        """A smaller std in the tensors than in the manifest makes the network steeper, and it says so."""
        _, tensors, _, rewrite = checkpoint
        changed = {k: v / 10.0 if k.endswith("std") else v for k, v in tensors.items()}
        assert any(k.endswith("std") for k in tensors)
        honest, steeper = lc.load(rewrite()), lc.load(rewrite(new_tensors=changed))
        assert steeper.lipschitz == pytest.approx(10.0 * honest.lipschitz, rel=1e-12)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda t, k: t.pop(k), "missing"),
            (lambda t, k: t.update(extra=torch.zeros(1)), "unexpected"),
            (lambda t, k: t.update({k: t[k].float()}), "float32"),
            (lambda t, k: t.update({k: t[k].half()}), "float16"),
            (lambda t, k: t.update({k: t[k][:-1].clone()}), "the manifest says"),
            (lambda t, k: t.update({k: t[k].unsqueeze(0)}), "the manifest says"),
            (lambda t, k: t[k].view(-1)[0].fill_(float("nan")), "NaN or infinity"),
            (lambda t, k: t[k].view(-1)[-1].fill_(float("-inf")), "NaN or infinity"),
        ],
        ids=["missing", "unexpected", "float32", "float16", "short", "dimension", "nan", "inf"],
    )
    @pytest.mark.parametrize("parameter", ["log_psi", "G", "U", "V", "S", "b_z", "b_y"])
    def test_bad_tensors(self, checkpoint, parameter, change, reason):
        _, tensors, _, rewrite = checkpoint
        key = next(k for k in tensors if k.endswith(f".{parameter}"))
        change(tensors, key)
        with pytest.raises(lc.CheckpointError, match=reason) as caught:
            lc.load(rewrite(new_tensors=tensors))
        assert caught.value.field == f"tensor {'extra' if reason == 'unexpected' else key!r}".replace(
            "tensor extra", "tensor 'extra'"
        )


class _Malicious:
    """Unpickling this would create a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


class TestReadWeights:
    @pytest.mark.parametrize("nest", [None, "model_state_dict", "state_dict", "model"])
    @pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_torch_files(self, tmp_path, nest, prefix, dtype):
        state = {"a.weight": torch.arange(6.0, dtype=dtype).reshape(2, 3), "a.bias": torch.ones(2, dtype=dtype)}
        stored = {prefix + key: value for key, value in state.items()}
        torch.save(stored if nest is None else {nest: stored, "epoch": 3}, tmp_path / "w.pt")
        found = lc.read_weights(tmp_path / "w.pt")
        assert {k: bits(v) for k, v in found.items()} == {k: bits(v) for k, v in state.items()}

    def test_safetensors(self, tmp_path):
        state = {"module.w": torch.arange(3.0)}
        save_file(state, tmp_path / "w.safetensors")
        assert bits(lc.read_weights(tmp_path / "w.safetensors")["w"]) == bits(state["module.w"])

    def test_a_prefix_that_not_all_share_stays(self, tmp_path):
        torch.save({"module.w": torch.zeros(1), "v": torch.zeros(1)}, tmp_path / "w.pt")
        assert set(lc.read_weights(tmp_path / "w.pt")) == {"module.w", "v"}

    def test_what_is_neither_tensor_nor_extra_state_is_left_out(self, tmp_path):
        torch.save({"w": torch.zeros(1), "epoch": 3, "m._extra_state": {"a": [1]}}, tmp_path / "w.pt")
        found = lc.read_weights(tmp_path / "w.pt")
        assert set(found) == {"w", "m._extra_state"}
        assert found["m._extra_state"] == {"a": [1]}

    def test_pickles_are_not_executed(self, tmp_path):
        target = tmp_path / "executed"
        for name, dump in (("w.pt", torch.save), ("w.pth", lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2)))):
            dump({"w": torch.zeros(1), "code": _Malicious(target)}, tmp_path / name)
            with pytest.raises(lc.WeightsError, match="are not opened"):
                lc.read_weights(tmp_path / name)
        assert not target.exists()

    def test_a_whole_pickled_module_is_refused(self, tmp_path):
        torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
        with pytest.raises(lc.WeightsError, match="not a file of plain weights"):
            lc.read_weights(tmp_path / "w.pt")

    @pytest.mark.parametrize(
        "data", [b"", b"hello, this is text\n", b"PK\x03\x04" + bytes(60), bytes(100), b"\x80\x02."]
    )
    @pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
    def test_not_a_weights_file(self, tmp_path, data, suffix):
        path = tmp_path / f"w{suffix}"
        path.write_bytes(data)
        with pytest.raises(lc.WeightsError) as caught:
            lc.read_weights(path)
        assert caught.value.path == str(path)

    def test_missing_and_directories(self, tmp_path):
        for path in (tmp_path / "none.pt", tmp_path):
            with pytest.raises(lc.WeightsError, match="there is no such file"):
                lc.read_weights(path)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ([torch.zeros(1)], "holds a list"),
            (torch.zeros(1), "holds a Tensor"),
            (3, "holds a int"),
            ({}, "holds a"),
            ({"epoch": 3}, "no tensors"),
            ({"model_state_dict": {}}, "holds a"),
        ],
    )
    def test_no_state_dict_inside(self, tmp_path, content, reason):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(lc.WeightsError, match=reason):
            lc.read_weights(tmp_path / "w.pt")

    def test_truncated_torch_file(self, tmp_path):
        torch.save({"w": torch.randn(100, 100, generator=torch.Generator().manual_seed(0))}, tmp_path / "w.pt")
        data = (tmp_path / "w.pt").read_bytes()
        (tmp_path / "w.pt").write_bytes(data[: len(data) // 2])
        with pytest.raises(lc.WeightsError):
            lc.read_weights(tmp_path / "w.pt")


class TestRecognition:
    def test_unknown_weights_name_keys_and_plugins(self):
        with pytest.raises(
            lc.WeightsError, match=r"my\.pt: no plugin recognises these weights \(keys: conv1\.weight"
        ) as e:
            lc.from_state_dict({"conv1.weight": torch.zeros(2, 2)}, path="my.pt")
        assert "sll" in str(e.value)

    def test_missing_options_are_asked_for_by_name(self):
        state = example("sll").state_dict()
        with pytest.raises(lc.MissingOptionError, match="--option inputs=") as caught:
            lc.from_state_dict(state)
        assert (caught.value.plugin, caught.value.option) == ("sll", "inputs")
        with pytest.raises(lc.MissingOptionError) as caught:
            lc.from_state_dict(state, {"inputs": 5})
        assert caught.value.option == "classes"
        with pytest.raises(lc.MissingOptionError) as caught:
            lc.from_state_dict(state, {"inputs": 5, "classes": 3})
        assert caught.value.option == "activation"
        model = lc.from_state_dict(state, {"inputs": 5, "classes": 3, "activation": "relu"})
        x = torch.linspace(-1.0, 1.0, 10).reshape(2, 5).to(state["sll0.weight"].dtype)
        with torch.no_grad():
            assert torch.equal(model(x), example("sll")(x))

    def test_gamma_of_sandwich_and_m_of_mondeq(self):
        for name, option in (("sandwich", "lipschitz"), ("mondeq", "m"), ("g_mondeq", "m")):
            with pytest.raises(lc.MissingOptionError) as caught:
                lc.from_state_dict(example(name).state_dict())
            assert (caught.value.plugin, caught.value.option) == (name, option)

    def test_a_layout_of_the_public_mondeq_code(self):
        """``mon.linear_module.`` in front of U, A, B, and the readout beside it."""
        model = example("mondeq")
        state = {
            ("" if key.startswith("Wout") else "mon.linear_module.") + key: value
            for key, value in model.state_dict().items()
        }
        rebuilt = lc.from_state_dict(state, {"m": model.m, "activation": "relu"})
        for key, value in model.state_dict().items():
            assert torch.equal(rebuilt.state_dict()[key], value)


NETWORKS = {"sll": SLLNetwork, "cpl": CPLNetwork, "aol": AOLNetwork, "sandwich": SandwichNetwork}
EQUILIBRIA = {"mondeq": MonDEQConv2d, "g_mondeq": GMonDEQConv2d}


def shaken(model):
    for parameter in model.parameters():
        if parameter.dim():
            nn.init.normal_(parameter, std=0.3)
    return model


def image_network(name, image=(6, 4), pool=2):
    """(model, options) of a small convolutional network whose channels and widths all differ."""
    torch.manual_seed(0)
    sizes = {"image": image, "in_channels": 2, "channels": 3, "conv_depth": 2, "pool": pool, "dense_depth": 1}
    extra = {"inner": 4, "dense_inner": 7} if name in ("sll", "cpl") else {"features": 5, "kernel_size": (3, 2)}
    extra |= {"lipschitz": 1.7} if name == "sandwich" else {}
    model = shaken(NETWORKS[name](**sizes, **extra, classes=3, activation=nn.Tanh()))
    options = {"image": "x".join(map(str, image)), "in_channels": 2, "pool": pool, "activation": "tanh"}
    if name in ("sll", "cpl"):
        options["classes"] = 3
    elif name == "sandwich":
        options["lipschitz"] = 1.7
    return model, options


class TestConvolutionalRecognition:
    @pytest.mark.parametrize(("image", "text"), [((6, 4), "6x4"), ((8, 8), "8"), ((32, 32), 32), ((6, 4), "(6, 4)")])
    @pytest.mark.parametrize("name", NETWORKS)
    def test_networks(self, name, image, text):
        model, options = image_network(name, image, pool=2 if image[0] < 32 else 16)
        rebuilt = lc.from_state_dict(model.state_dict(), options | {"image": text})
        assert type(rebuilt) is type(model)
        assert rebuilt.input_shape == model.input_shape == (2, *image)
        x = torch.randn(3, 2, *image)
        with torch.no_grad():
            assert torch.equal(rebuilt(x), model(x))

    @pytest.mark.parametrize("pool", [1, 2])
    @pytest.mark.parametrize("name", NETWORKS)
    def test_the_constant_is_that_of_the_model(self, name, pool):
        model, options = image_network(name, pool=pool)
        rebuilt = lc.from_state_dict(model.float().state_dict(), options)
        assert next(rebuilt.parameters()).dtype is torch.float32
        net = lc.convert(rebuilt)
        assert net.lipschitz == lc.convert(model, check=False).lipschitz
        assert net.lipschitz == pytest.approx(1.7 if name == "sandwich" else 1.0, rel=1e-12)

    @pytest.mark.parametrize("kernel_size", [3, (1, 2)], ids=str)
    @pytest.mark.parametrize("readout", [2, None], ids=["readout", "states"])
    @pytest.mark.parametrize("lipschitz", [None, 2.0, 2], ids=["free", "prescribed", "a whole number"])
    @pytest.mark.parametrize("name", EQUILIBRIA)
    def test_equilibria(self, name, lipschitz, readout, kernel_size):
        model = EQUILIBRIA[name](2, 3, readout, kernel_size, m=0.6, lipschitz=lipschitz, activation=nn.Tanh())
        shaken(model)
        options = {"m": 0.6, "activation": "tanh", "lipschitz": "free" if lipschitz is None else lipschitz}
        rebuilt = lc.from_state_dict(model.state_dict(), options)
        assert type(rebuilt) is type(model)
        assert rebuilt.prescribed == lipschitz
        x = torch.randn(3, 2, 4, 3)
        with torch.no_grad():
            assert torch.equal(rebuilt(x), model(x))

    def test_a_layout_of_the_public_mondeq_code(self):
        model = shaken(MonDEQConv2d(2, 3, 2, m=0.6))
        state = {
            ("" if key.startswith("Wout") else "mon.linear_module.") + key: value
            for key, value in model.state_dict().items()
        }
        rebuilt = lc.from_state_dict(state, {"m": 0.6, "activation": "relu", "lipschitz": "free"})
        x = torch.randn(2, 2, 3, 3)
        with torch.no_grad():
            assert torch.equal(rebuilt(x), model(x))

    @pytest.mark.parametrize("name", [*NETWORKS, *EQUILIBRIA])
    def test_every_missing_option_is_named(self, name):
        if name in NETWORKS:
            model, options = image_network(name)
        else:
            model, options = EQUILIBRIA[name](2, 3), {"m": 1.0, "activation": "relu", "lipschitz": "free"}
        state = model.state_dict()
        for missing in options:
            given = {key: value for key, value in options.items() if key != missing}
            with pytest.raises(lc.MissingOptionError, match=f"--option {missing}=") as caught:
                lc.from_state_dict(state, given)
            assert (caught.value.plugin, caught.value.option) == (name, missing)
        with pytest.raises(lc.InvalidParameterError, match="'surprise'"):
            lc.from_state_dict(state, options | {"surprise": 1})
        lc.from_state_dict(state, options)

    @pytest.mark.parametrize(
        ("option", "value", "said"),
        [
            ("image", "5x4", "the image"),
            ("pool", 4, "pool"),
            ("pool", 0, "pool"),
            ("image", "12x8", r"\w+0\.weight|features"),
            ("pool", 1, r"\w+0\.weight|features"),
            ("in_channels", 4, r"conv0\.weight|channels"),
            ("activation", "gelu", "gelu"),
        ],
    )
    @pytest.mark.parametrize("name", NETWORKS)
    def test_options_that_do_not_fit(self, name, option, value, said):
        model, options = image_network(name)
        with pytest.raises(lc.LipconvertError, match=said):
            lc.from_state_dict(model.state_dict(), options | {option: value})

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("image", "0x4"),
            ("image", "-6x4"),
            ("image", "6x4x2"),
            ("image", "sixty"),
            ("in_channels", 0),
            ("in_channels", "two"),
            ("pool", 2.5),
        ],
    )
    @pytest.mark.parametrize("name", NETWORKS)
    def test_options_that_are_no_sizes_are_named(self, name, option, value):
        model, options = image_network(name)
        with pytest.raises(lc.LipconvertError, match=option):
            lc.from_state_dict(model.state_dict(), options | {option: value})

    @pytest.mark.parametrize(("option", "value"), [("m", 0.0), ("m", "x"), ("lipschitz", -1), ("lipschitz", "none")])
    @pytest.mark.parametrize("name", EQUILIBRIA)
    def test_numbers_of_equilibria_that_do_not_fit(self, name, option, value):
        options = {"m": 1.0, "activation": "relu", "lipschitz": "free", option: value}
        with pytest.raises(lc.LipconvertError, match=rf"\b{option}\b"):
            lc.from_state_dict(EQUILIBRIA[name](2, 3, 2).state_dict(), options)

    @pytest.mark.parametrize("name", [*NETWORKS, *EQUILIBRIA])
    def test_a_tensor_that_does_not_fit_is_named(self, name):
        if name in NETWORKS:
            model, options = image_network(name)
            keys = ["conv0.bias", "conv1.weight", "conv1.bias", f"{name}0.bias"]
        else:
            model, options = EQUILIBRIA[name](2, 3, 2), {"m": 1.0, "activation": "relu", "lipschitz": "free"}
            keys = ["B.weight", "Wout.weight", *(["log_phi"] if name == "g_mondeq" else [])]
        for key in keys:
            state = model.state_dict()
            state[key] = state[key][..., :-1].clone()
            with pytest.raises(lc.LipconvertError, match=key.replace(".", r"\.")):
                lc.from_state_dict(state, options)
            if name in NETWORKS:
                del state[key]
                with pytest.raises(lc.LipconvertError, match=key.replace(".", r"\.")):
                    lc.from_state_dict(state, options)

    @pytest.mark.parametrize("name", [*NETWORKS, *EQUILIBRIA])
    def test_a_matrix_in_the_place_of_a_kernel_is_named(self, name):
        if name in NETWORKS:
            (model, options), key = image_network(name), "conv0.weight"
        else:
            model, options = EQUILIBRIA[name](2, 3, 2), {"m": 1.0, "activation": "relu", "lipschitz": "free"}
            key = "U.weight"
        state = model.state_dict()
        state[key] = state[key].flatten(1)
        with pytest.raises(lc.LipconvertError, match=key.replace(".", r"\.")):
            lc.from_state_dict(state, options)


PUBLIC_LBEN = {"lipschitz": 1.5, "epsilon": 1.0, "activation": "relu"}


class TestPublicLBEN:
    """The layout of Revay et al.: psi = log Ψ, B = (U, b_z), V, S, G = (G, b_y), and S′ − S in place of S − S′."""

    @staticmethod
    def tensors() -> dict[str, Tensor]:
        n, p, q = 8, 5, 3
        sizes = {"B.weight": (n, p), "B.bias": (n,), "V.weight": (n, n), "S.weight": (n, n), "G.weight": (q, n)}
        return {key: torch.randn(size) for key, size in sizes.items()} | {
            "psi": 0.3 * torch.randn(n), "G.bias": torch.randn(q),
        }  # fmt: skip

    @pytest.mark.parametrize("prefix", ["", "mon.linear_module.", "module.mon.linear_module."])
    def test_it_is_the_network_of_its_code(self, prefix, tmp_path):
        t = self.tensors()
        torch.save({prefix + key: value for key, value in t.items()}, tmp_path / "fc_lip1.5_w8.params")
        model = lc.from_state_dict(lc.read_weights(tmp_path / "fc_lip1.5_w8.params"), PUBLIC_LBEN).double()
        psi, g = t["psi"].exp(), PUBLIC_LBEN["lipschitz"]
        G, B, V, S = (t[f"{name}.weight"].numpy() for name in "GBVS")
        inverse = np.diag(1.0 / psi.numpy())
        inner = G.T @ G / (2 * g) + inverse @ B @ B.T @ inverse / (2 * g) + V.T @ V + np.eye(8) + S.T - S
        W = np.eye(8) - np.diag(psi.numpy()) @ inner
        np.testing.assert_allclose(model.W.detach().numpy(), W, atol=1e-12)
        x = torch.randn(4, 5)
        for row, y in zip(x.numpy(), lc.convert(model)(x).detach().numpy(), strict=True):
            u, z = B @ row + t["B.bias"].numpy(), np.zeros(8)
            for _ in range(200_000):  # forward-backward with a small step
                z, old = np.maximum(z - 2e-3 * (z - W @ z - u), 0.0), z
                if np.abs(z - old).max() < 1e-16:
                    break
            np.testing.assert_allclose(y, G @ z + t["G.bias"].numpy(), atol=1e-9)

    @pytest.mark.parametrize("missing", PUBLIC_LBEN)
    def test_what_the_file_does_not_say_is_asked_for(self, missing):
        with pytest.raises(lc.MissingOptionError, match=missing):
            lc.from_state_dict(self.tensors(), {k: v for k, v in PUBLIC_LBEN.items() if k != missing})


def test_large_terms_that_cancel_are_no_lie(tmp_path, monkeypatch):
    """x + 4000 - 4000 in float32 loses 2e-4: more than two orders of summation leave, and less than is proved."""
    eye, shift = torch.eye(3), torch.full((3,), 4000.0)
    dae = lc.DAE(0.0 * eye, eye, eye, torch.ones(3), shift, -shift, lc.Activations("identity", 3))
    net = lc.Network([lc.LBEN.from_dae(dae)], [None], (3,)).float()
    lc.save(net, tmp_path / "net.onnx")
    report = lc.verify(tmp_path / "net.onnx", seed=0)
    assert report.passed, report
    assert "of what its rounding may do" in report.claims[-1].found
    # and a graph that is off by more than is proved is not what torch computes
    nothing = torch.zeros(2, dtype=torch.float64)
    monkeypatch.setattr("lipconvert.certification.accuracy.Accuracy.everywhere", lambda *_: (nothing, None))
    report = lc.verify(tmp_path / "net.onnx", seed=0)
    assert [claim.claim for claim in report.claims if claim.passed is False] == ["onnxruntime computes what torch does"]
