"""Checkpoints of every architecture: sizes, times, and onnxruntime against torch.

    python benchmarks/checkpoints.py [--json FILE] [--quick]

*Agreement*: the largest difference between onnxruntime and torch at batches of 1, 7 and 256, relative to the largest output,
before and after every parameter was moved by 1e-3 N(0, 1) times the rms of its tensor (W is triangular no more then).
*Size*: of both files, over the bytes of the tensors in them (parameters, the W in use, multipliers), and over the parameters
alone. *Forward*: onnxruntime on the graph of the paper's network against onnxruntime on what ``torch.onnx.export`` makes of
the explicit network it came from, interleaved in one run. That exporter drops the ``divisor_override`` of its pooling, so its
outputs are others; its operators are the same. Exit status 1 when a floor is missed.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from lipconvert_plugins.sll import SLLNetwork

import lipconvert as lc

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from measure import CONSOLE, Floor, command_line, facts, interleaved, show, use_threads, verdict, write_json

BATCHES = (1, 7, 256)
AGREEMENT = {torch.float32: 1e-5, torch.float64: 1e-10}
PAPER = {"channels": 8, "inner": 5, "conv_depth": 4, "features": 512, "dense_depth": 2, "image": 32, "classes": 10}


def session(path: str | Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def networks(quick: bool) -> list[tuple[str, lc.Network]]:
    """Of every architecture the first and the last example, which is convolutional, and the paper's network."""
    found = []
    for name in lc.registry().names():
        examples = lc.registry().example_models(name, 0)
        for label, model in ((name, examples[0]), (f"{name}, images", examples[-1])):
            found.append((label, lc.convert(model.double(), getattr(model, "input_shape", None), check=False)))
    if not quick:
        torch.manual_seed(0)
        found.append(("the paper's", lc.convert(SLLNetwork(**PAPER).double(), check=False)))
    return found


def moved(net: lc.Network) -> lc.Network:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += 1e-3 * parameter.square().mean().sqrt() * torch.randn_like(parameter)
    return net


def agreement(net: lc.Network, path: Path) -> float:
    run = session(path)
    worst = 0.0
    for size in BATCHES:
        x = torch.rand(size, *net.input_shape, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
        x = x.to(net.dtype)
        with torch.no_grad():
            expected = net(x).numpy()
        found = np.asarray(run.run(None, {"input": x.numpy()})[0])
        worst = max(worst, float(np.nan_to_num(np.abs(found - expected), nan=np.inf).max() / np.abs(expected).max()))
    return worst


def measure(label: str, net: lc.Network, folder: Path) -> dict[str, Any]:
    path = folder / "net.onnx"
    start = time.perf_counter()
    lc.save(net, path)
    saved = time.perf_counter()
    lc.load(path)
    loaded = time.perf_counter()
    report = lc.verify(path, seed=0)
    verified = time.perf_counter()
    manifest = lc.read_manifest(path)
    stored = sum(int(np.prod(t.shape)) * (4 if t.dtype == "float32" else 8) for t in manifest.tensors)
    parameters = sum(p.numel() * p.element_size() for p in net.parameters())
    size = path.stat().st_size + path.with_suffix(".safetensors").stat().st_size
    methods = [step.graph.method for step in manifest.steps if step.kind == "lben" and step.graph is not None]
    return {
        "network": label,
        "dtype": str(net.dtype).removeprefix("torch."),
        "methods": ", ".join(dict.fromkeys(methods)),
        "agreement": agreement(net, path),
        "bytes": size,
        "over_stored": size - stored,
        "to_stored": size / stored,
        "to_parameters": size / parameters,
        "save": saved - start,
        "load": loaded - saved,
        "verify": verified - loaded,
        "passed": report.passed,
    }


def forward(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """onnxruntime on our graph and on the exported explicit network, in float32."""
    torch.manual_seed(0)
    model = SLLNetwork(**PAPER).eval()
    net = lc.convert(model, check=False).float()
    lc.save(net, folder / "net.onnx", prove=False)
    example = (torch.rand(2, *net.input_shape),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dimensions = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(
            model, example, folder / "explicit.onnx", dynamo=True, dynamic_shapes=dimensions, verbose=False
        )
    ours, explicit = session(folder / "net.onnx"), session(folder / "explicit.onnx")
    name, rows = explicit.get_inputs()[0].name, []
    for size in (1, 7, 64, 256):
        x = torch.rand(size, *net.input_shape).numpy()

        def run_explicit(x: Any = x) -> object:
            return explicit.run(None, {name: x})

        def run_ours(x: Any = x) -> object:
            return ours.run(None, {"input": x})

        seconds = interleaved({"explicit": run_explicit, "ours": run_ours}, repeats)
        ratio = seconds["ours"] / seconds["explicit"]
        rows.append(
            {"batch": size, "explicit_ms": 1e3 * seconds["explicit"], "ours_ms": 1e3 * seconds["ours"], "ratio": ratio}
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__, repeats=15, device=False)
    parser.add_argument("--quick", action="store_true", help="without the paper's network: shows that it runs")
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    rows: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, net in networks(options.quick):
            for dtype in (torch.float64, torch.float32):
                rows.append(measure(label, net.to(torch.float64).to(dtype), folder))
            rows.append(measure(f"{label}, moved", moved(net.to(torch.float64)), folder))
            rows.append(measure(f"{label}, moved", net.float(), folder))
        if not options.quick:
            times = forward(folder, options.repeats)
    CONSOLE.print(facts())
    show("onnxruntime against torch; seconds", rows[0], [list(row.values()) for row in rows])
    floors = [
        Floor(f"agreement in {kind}", max(row["agreement"] for row in rows if row["dtype"] == kind), limit)
        for kind, limit in (("float32", 1e-5), ("float64", 1e-10))
    ]
    floors.append(
        Floor(
            "bytes beyond 1.02 of the tensors", max(r["bytes"] - 1.02 * r["bytes"] / r["to_stored"] for r in rows), 1e5
        )
    )
    floors.append(Floor("checkpoints that do not verify", sum(not row["passed"] for row in rows), 0))
    if times:
        show("the paper's network in onnxruntime, float32", times[0], [list(row.values()) for row in times])
        paper = [row for row in rows if row["network"].startswith("the paper's")]
        plain = [row for row in paper if "moved" not in row["network"]]
        floors += [
            Floor(f"seconds to {what} the paper's", max(r[what] for r in plain), limit)
            for what, limit in (("save", 2.0), ("load", 2.0))
        ]
        floors.append(Floor("seconds to verify the paper's", max(r["verify"] for r in paper), 20.0))
        floors.append(Floor("forward, times the explicit network's", max(row["ratio"] for row in times), 3.0))
    write_json(options.json, {"rows": rows, "forward": times, "floors": [str(floor) for floor in floors]})
    for floor in floors:
        CONSOLE.print(str(floor))
    return verdict(floors)


if __name__ == "__main__":
    sys.exit(main())
