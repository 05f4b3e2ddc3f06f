"""The graphs in onnx's own ReferenceEvaluator, which reads functions in the order in which they are written."""

import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import lipconvert as lc
from lipconvert.networks import glue

DTYPES = {"float32": (torch.float32, 2e-5), "float64": (torch.float64, 1e-9)}


@functools.cache
def network(kind, dtype):
    """(network, the method its graph has to take)."""
    if kind == "substitution":
        net = lc.convert(lc.registry().example_models("sll", 0)[1].double(), (4,), check=False)
    elif kind == "images":
        net = lc.convert(lc.registry().example_models("sll", 0)[2].double(), check=False)
    elif kind == "equilibrium":
        net = lc.convert(lc.registry().example_models("mondeq", 0)[2].double(), (4,), check=False)
    else:  # nearly triangular, as after fine-tuning
        net = lc.convert(lc.registry().example_models("sll", 0)[1].double(), (4,), check=False)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            S = net.stages[0].S
            S += 1e-3 * torch.randn(S.shape, generator=generator, dtype=S.dtype)
    return net.to(DTYPES[dtype][0])


METHODS = {"substitution": "substitution", "sweeps": "sweeps", "equilibrium": "splitting"}


@pytest.mark.parametrize("inline", [False, True], ids=["functions", "inline"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("kind", ["substitution", "sweeps", "equilibrium", "images"])
def test_the_same_as_onnxruntime_and_torch(kind, dtype, inline, tmp_path):
    net, tolerance = network(kind, dtype), DTYPES[dtype][1]
    path = tmp_path / "net.onnx"
    outputs = ("residual", "radius")
    lc.save(net, path, outputs=outputs, inline=inline)
    methods = {step.graph.method for step in lc.read_manifest(path).steps if hasattr(step, "graph")}
    if kind == "images":
        assert "convolutions" in methods or dtype == "float64"
    else:
        assert methods == {METHODS[kind]}
    model = onnx.load(path)
    assert bool(model.functions) != inline
    names = ["logits", *outputs]
    x = torch.randn(5, *net.input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(net.dtype)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    runs = session.run(names, {"input": x.numpy()})
    with np.errstate(divide="ignore", invalid="ignore"):  # of a class with itself, which is not looked at
        found = ReferenceEvaluator(model).run(names, {"input": x.numpy()})
    expected = net(x).detach().numpy()
    assert np.abs(found[0] - expected).max() <= tolerance * np.abs(expected).max()
    for name, ours, theirs in zip(names, found, runs, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= tolerance * max(1.0, np.abs(theirs).max()), name
    assert (found[2] > 0.0).any()


@pytest.mark.parametrize("kind", ["substitution", "sweeps", "equilibrium", "images", "glue alone"])
@pytest.mark.parametrize("inline", [False, True], ids=["functions", "inline"])
def test_functions_before_their_callers_and_no_domain_without_use(kind, inline, tmp_path):
    net = lc.convert(torch.nn.Sequential(glue.Normalize(0.5, 0.5)), (3,)) if kind == "glue alone" else None
    net = network(kind, "float64") if net is None else net
    lc.save(net, tmp_path / "net.onnx", inline=inline)
    model = onnx.load(tmp_path / "net.onnx")
    written = {("", "any")}
    for function in model.functions:
        called = {(node.domain, node.op_type) for node in function.node if node.domain}
        assert called <= written, "it calls what is written behind it"
        domains = {node.domain for node in function.node} | {""}
        assert {opset.domain for opset in function.opset_import} == domains
        written.add((function.domain, function.name))
    assert {opset.domain for opset in model.opset_import} == {""} | {node.domain for node in model.graph.node}
    assert ("lipconvert" in {opset.domain for opset in model.opset_import}) == bool(model.functions)
