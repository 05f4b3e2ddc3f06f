"""Forward pass of a converted LBEN against the explicit network it came from, interleaved in one run.

    python benchmarks/forward.py [--features 512] [--depth 3] [--batch 256] [--repeats 30] [--json FILE]

The explicit network is given every advantage: its T is computed once, beforehand, as a deployed network would; the
plain module, which recomputes T at each call as in training, is timed beside it. Medians; only the ratios mean anything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lipconvert_plugins.sll import SLLLinear, SLLNetwork
from torch import Tensor
from torch.nn import functional

import lipconvert as lc

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from measure import command_line, inference, interleaved, max_difference, show, use_threads, write_json


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
    contestants = {"explicit": inference(frozen(model), x), "module": inference(model, x), "lben": inference(net, x)}
    median = interleaved(contestants, repeats)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "method": net.methods(x)[0],
        "explicit_ms": 1e3 * median["explicit"],
        "module_ms": 1e3 * median["module"],
        "lben_ms": 1e3 * median["lben"],
        "lben_to_explicit": median["lben"] / median["explicit"],
        "lben_to_module": median["lben"] / median["module"],
        "max_difference": max_difference(contestants["lben"](), contestants["explicit"]()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, repeats=30, device=False)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    rows = [
        measure(options.features, options.depth, options.batch, options.repeats, dtype)
        for dtype in (torch.float64, torch.float32)
    ]
    title = f"SLL {options.depth} x {options.features}, batch {options.batch}, {torch.get_num_threads()} threads"
    show(title, rows[0], [list(row.values()) for row in rows])
    write_json(options.json, rows)


if __name__ == "__main__":
    main()
