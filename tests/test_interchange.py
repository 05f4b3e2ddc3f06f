"""A plain feed-forward graph computes what the network does, and VNN-LIB properties say what they say."""

import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from lipconvert_plugins.aol import AOLNetwork
from lipconvert_plugins.mondeq import MonDEQ
from lipconvert_plugins.sll import SLLConv2d, SLLLinear
from torch import nn

import lipconvert as lc

TRIANGULAR = [
    (name, index)
    for name in ("aol", "cpl", "sandwich", "sll")
    for index in range(len(lc.registry().example_models(name, 0)))
]


def session(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def example(name, index):
    model = lc.registry().example_models(name, 0)[index].double()
    return model, getattr(model, "input_shape", None) or (lc.to_dae(model).inputs,)


class TestExplicit:
    @pytest.mark.parametrize(("name", "index"), TRIANGULAR)
    def test_computes_what_the_source_does(self, name, index):
        model, shape = example(name, index)
        graph = lc.explicit(lc.convert(model, shape, check=False))
        onnx.checker.check_model(graph, full_check=True)
        assert not graph.functions
        assert {node.domain for node in graph.graph.node} == {""}
        allowed = {
            "Gemm",
            "Conv",
            "Pad",
            "Relu",
            "Tanh",
            "Add",
            "Sub",
            "Mul",
            "Div",
            "Concat",
            "Slice",
            "Gather",
            "Reshape",
        }
        allowed |= {"Constant", "Transpose", "ReduceSum", "Identity", "Abs", "Neg", "Exp", "Log", "Max", "Min"}
        assert {node.op_type for node in graph.graph.node} <= allowed
        for size in (1, 7, 0):
            x = torch.rand(size, *shape, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
            with torch.no_grad():
                expected = model(x)
            found = session(graph).run(None, {"input": x.float().numpy()})[0]
            assert found.shape == tuple(expected.shape)
            if not size:
                break
            np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5 * float(expected.abs().max()))

    def test_a_chain_of_dense_layers_is_one_product_for_each(self):
        torch.manual_seed(0)
        net = lc.convert(AOLNetwork(inputs=6, classes=3, features=8, dense_depth=3), check=False)
        graph = lc.explicit(net)
        kinds = [node.op_type for node in graph.graph.node if node.op_type != "Constant"]
        assert kinds == ["Gemm", "Relu"] * 3 + ["Gemm"]

    def test_glue_and_images(self):
        torch.manual_seed(0)
        model = nn.Sequential(
            lc.Normalize([0.1, 0.2], [0.5, 0.6]),
            SLLConv2d(2, 3),
            lc.MeanPool(2),
            SLLConv2d(2, 2),
            nn.Flatten(),
            SLLLinear(8),
            lc.FirstFeatures(3),
        )
        model = model.double()
        graph = lc.explicit(lc.convert(model, (2, 4, 4), check=False))
        x = torch.rand(5, 2, 4, 4, dtype=torch.float64)
        with torch.no_grad():
            expected = model(x).numpy()
        found = session(graph).run(None, {"input": x.float().numpy()})[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

    def test_a_true_equilibrium_is_refused(self):
        net = lc.convert(MonDEQ(4, 5, 3), check=False)
        with pytest.raises(lc.CheckpointError, match="no feed-forward form"):
            lc.explicit(net)

    def test_only_networks(self):
        with pytest.raises(lc.InvalidParameterError, match="net"):
            lc.explicit(nn.Linear(2, 2))

    def test_the_network_is_left_alone(self):
        net = lc.convert(AOLNetwork(inputs=6, classes=3), check=False)
        lc.explicit(net)
        assert net.dtype == torch.float64


def constraints(path):
    """(lower, upper) of the inputs, as another program reads them by hand."""
    text = path.read_text()
    found = {}
    for relation, index, value in re.findall(r"\(assert \((>=|<=) X_(\d+) (-?[0-9.]+)\)\)", text):
        found[relation, int(index)] = float(value)
    count = len(found) // 2
    return [np.array([found[relation, i] for i in range(count)]) for relation in (">=", "<=")]


class TestVnnLib:
    def test_the_box_is_in_the_ball_and_as_large_as_can_be(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        for p, radius in ((1, 0.5), (7, 0.1412), (64, 1e-3), (784, 1.0), (5, 0.0)):
            x = torch.rand(p, generator=generator, dtype=torch.float64)
            lc.write_vnnlib(tmp_path / "p.vnnlib", x, 1, 3, radius)
            low, high = constraints(tmp_path / "p.vnnlib")
            corner = np.maximum(high - x.numpy(), x.numpy() - low)
            assert np.linalg.norm(corner) <= radius
            assert np.linalg.norm(corner) >= radius * (1 - 1e-8)

    def test_pixels_are_kept_inside(self, tmp_path):
        lc.write_vnnlib(tmp_path / "p.vnnlib", torch.tensor([0.0, 1.0, 0.5]), 0, 2, 0.3, box=(0.0, 1.0))
        low, high = constraints(tmp_path / "p.vnnlib")
        assert low[0] == 0.0
        assert high[1] == 1.0
        assert low[2] < 0.5 < high[2]

    def test_another_reader_finds_the_same(self, tmp_path):
        compat = pytest.importorskip("vnnlib.compat")
        x = torch.tensor([[0.25, 1e-9], [-1e-12, 3e5]], dtype=torch.float64)
        lc.write_vnnlib(tmp_path / "p.vnnlib", x, 2, 4, 0.3)
        text = (tmp_path / "p.vnnlib").read_text()
        assert not re.search(r"\d[eE]", re.sub(r";.*", "", text))  # the standard has no exponents
        # the files of VNN-COMP, and the tools that read them, write −1 as it is, not (- 1) as SMT-LIB would
        with pytest.warns(UserWarning, match="literal negation"):
            ((box, cases),) = compat.read_vnnlib_simple(str(tmp_path / "p.vnnlib"), 4, 4)
        low, high = constraints(tmp_path / "p.vnnlib")
        np.testing.assert_array_equal(np.array(box), np.stack([low, high], 1))
        # y_2 − y_j ≤ 0 for one of the others
        found = sorted((matrix.ravel() * np.sign(matrix.ravel()[2])).tolist() for matrix, _ in cases)
        assert found == [[-1.0, 0.0, 1.0, 0.0], [0.0, -1.0, 1.0, 0.0], [0.0, 0.0, 1.0, -1.0]]
        assert all(float(np.max(np.abs(bound))) == 0.0 for _, bound in cases)

    def test_a_counterexample_satisfies_it_and_the_sample_does_not(self, tmp_path):
        """The inequalities of the file, evaluated at a sample and at an attacked one."""
        torch.manual_seed(0)
        net = lc.convert(AOLNetwork(inputs=6, classes=3, features=8), check=False)
        x = torch.rand(1, 6, dtype=torch.float64)
        with torch.no_grad():
            label = int(net(x).argmax())
        (path,) = lc.export_vnnlib(net, tmp_path / "folder", [(x[0], label)], 2.0)
        low, high = constraints(path)
        rivals = {int(j) for j in re.findall(rf"\(and \(>= Y_(\d+) Y_{label}\)\)", path.read_text())}
        assert rivals == {0, 1, 2} - {label}
        run = session(onnx.load(tmp_path / "folder" / "network.onnx"))

        def sat(point):
            y = run.run(None, {"input": point.astype(np.float32)})[0][0]
            inside = bool((point[0] >= low).all() and (point[0] <= high).all())
            return inside and any(y[j] >= y[label] for j in rivals)

        assert not sat(x.numpy())
        adversarial, margin = lc.pgd(net, x, torch.tensor([label]), 2.0, steps=50, restarts=5)
        clipped = np.clip(adversarial.numpy(), low, high)
        assert float(margin) < 0
        if net(torch.from_numpy(clipped)).argmax() != label:
            assert sat(clipped)
        assert (tmp_path / "folder" / "instances.csv").read_text() == "network.onnx,property_0.vnnlib,300\n"

    def test_samples_that_are_wrong_are_left_out(self, tmp_path):
        torch.manual_seed(0)
        net = lc.convert(AOLNetwork(inputs=6, classes=3, features=8), check=False)
        x = torch.rand(4, 6, dtype=torch.float64)
        with torch.no_grad():
            labels = net(x).argmax(1)
        labels[1] = (labels[1] + 1) % 3
        written = lc.export_vnnlib(net, tmp_path, list(zip(x, labels.tolist(), strict=True)), 0.1)
        assert [path.name for path in written] == ["property_0.vnnlib", "property_2.vnnlib", "property_3.vnnlib"]

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ((torch.zeros(2), 0, 2, -1.0), "radius"),
            ((torch.zeros(2), 0, 2, float("nan")), "radius"),
            ((torch.zeros(2), 0, 2, float("inf")), "radius"),
            ((torch.zeros(2), 2, 2, 0.1), "label"),
            ((torch.zeros(2), 0, 1, 0.1), "label"),
        ],
    )
    def test_what_makes_no_sense(self, tmp_path, arguments, reason):
        with pytest.raises(lc.InvalidParameterError, match=reason):
            lc.write_vnnlib(tmp_path / "p.vnnlib", *arguments)
        with pytest.raises(lc.ShapeError):
            lc.write_vnnlib(tmp_path / "p.vnnlib", torch.tensor([float("nan")]), 0, 2, 0.1)
        assert list(tmp_path.iterdir()) == []
