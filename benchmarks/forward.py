"""Forward pass of a converted LBEN against the explicit network it came from, interleaved in one run.

    python benchmarks/forward.py [--features 512] [--depth 3] [--batch 256] [--repeats 30] [--json FILE]

The explicit network is given every advantage: its T is computed once, beforehand, as a deployed network would; the
plain module, which recomputes T at each call as in training, is timed beside it. Medians; only the ratios mean anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from lipconvert_plugins.sll import SLLLinear, SLLNetwork
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

import lipconvert as lc


def frozen(model: SLLNetwork) -> Callable[[Tensor], Tensor]:
    """The network with W and 2WT⁻¹ of every layer as constants."""
    layers = []
    for layer in model:
        if isinstance(layer, SLLLinear):
            weight, T = layer.weight.detach(), layer.T().detach()
            layers.append((weight, layer.bias, (2.0 * weight.mT / T).contiguous()))
    classes = model.head.features

    def forward(x: Tensor) -> Tensor:
        for weight, bias, R in layers:
            x = x - functional.linear(functional.linear(x, weight, bias).relu_(), R)
        return x[:, :classes]

    return forward


def measure(features: int, depth: int, batch: int, repeats: int, dtype: torch.dtype) -> dict[str, float | str]:
    torch.manual_seed(0)
    model = SLLNetwork(inputs=features, classes=features, features=features, dense_depth=depth).to(dtype).eval()
    net = lc.convert(model, check=False).to(dtype)
    x = torch.randn(batch, features, dtype=dtype)
    contestants = {"explicit": frozen(model), "module": model, "lben": net}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    with torch.no_grad():
        outputs = {name: f(x) for name, f in contestants.items()}
        for _ in range(repeats):
            for name, f in contestants.items():
                start = time.perf_counter()
                f(x)
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "method": net.methods(x)[0],
        "explicit_ms": 1e3 * median["explicit"],
        "module_ms": 1e3 * median["module"],
        "lben_ms": 1e3 * median["lben"],
        "lben_to_explicit": median["lben"] / median["explicit"],
        "lben_to_module": median["lben"] / median["module"],
        "max_difference": float((outputs["lben"] - outputs["explicit"]).abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json")
    options = parser.parse_args()
    rows = [
        measure(options.features, options.depth, options.batch, options.repeats, dtype)
        for dtype in (torch.float64, torch.float32)
    ]
    title = f"SLL {options.depth} x {options.features}, batch {options.batch}, {torch.get_num_threads()} threads"
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.3g}" for value in row.values()))
    Console().print(table)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
