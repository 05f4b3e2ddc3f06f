"""Kill a fine-tuning run at random moments, let it go on each time, and compare its end with that of a run in one go.

    python benchmarks/resume.py [--kills 20] [--seed 0]

A convolutional SLL network on scikit-learn's digits, converted, fine-tuned with augmentation; the state is saved every
fifth of a second, so kills fall between steps, into steps, into saves and between epochs. Then the same run on two processes,
in float64. Exit status 1 when a weight differs by a bit, or two processes by more than 1e-6.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lipconvert_plugins.sll import SLLNetwork

import lipconvert as lc
from lipconvert import data
from lipconvert.experiments.recipes import checked

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from measure import CONSOLE, Floor, command_line, facts, max_difference, show, verdict, write_json

CONFIG = {
    "epochs": 6,
    "batch_size": 50,  # 1,237 samples: the last batch of an epoch has 37
    "learning_rate": 1e-3,
    "augment": {"crop": 1, "padding": "zeros"},
    "penalty": {"weight": 1e-3},
    "epsilon": 1e-3,
    "held_out": 200,
}
SAVE_SECONDS = 0.2


def child(folder: str, changes: str) -> int:
    """One attempt: what is killed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"in_channels": 1, "channels": 6, "inner": 6, "conv_depth": 2, "dense_depth": 1, "image": 8, "pool": 2}
    net = lc.convert(SLLNetwork(**sizes, classes=10), check=False)
    config = checked(CONFIG, lc.TrainingConfig, "the config", json.loads(changes))
    lc.finetune(net, data.load("digits", "train"), config=config, folder=folder, save_seconds=SAVE_SECONDS)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        torch.save(net.state_dict(), Path(folder) / "weights.pt")
    return 0


def start(folder: Path, **changes: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--child", str(folder), json.dumps(changes)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = torch.load(folder / "weights.pt", weights_only=False)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def step_of(folder: Path) -> int:
    file = folder / "state.pt"
    return int(torch.load(file, weights_only=True)["step"]) if file.is_file() else 0


def killed(scratch: Path, kills: int, seconds: float) -> tuple[list[int], list[Path]]:
    """Kill attempts after random times, and let each run end in the end: the step each kill left behind, and the runs."""
    chance, steps, runs = random.Random(0), list[int](), list[Path]()
    while len(steps) < kills:
        runs.append(scratch / f"broken-{len(runs)}")
        while True:
            process = start(runs[-1])
            if len(steps) < kills:
                time.sleep(chance.uniform(0.0, seconds))
            else:
                process.wait()
            if process.poll() is not None:
                break
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            steps.append(step_of(runs[-1]))
        if process.returncode != 0:
            raise RuntimeError("an attempt ended with an error")
    return steps, runs


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "--child":
        return child(*arguments[1:])
    parser = command_line(__doc__, device=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=CONFIG["epochs"])
    options = parser.parse_args(arguments)
    CONSOLE.print(facts())
    CONFIG["epochs"] = options.epochs
    with tempfile.TemporaryDirectory() as scratch:
        whole, one, two = (Path(scratch, name) for name in ("whole", "one", "two"))
        begun = time.perf_counter()
        if start(whole).wait() != 0:
            raise RuntimeError("the run in one go ended with an error")
        seconds = time.perf_counter() - begun
        steps, runs = killed(Path(scratch), options.kills, 0.9 * seconds)
        expected, found = weights(whole), [weights(folder) for folder in runs]
        differing = sum(int((expected[name] != end[name]).sum()) for end in found for name in expected)
        for folder, devices in ((one, 1), (two, 2)):
            if start(folder, precision="64-true", devices=devices).wait() != 0:
                raise RuntimeError(f"the run on {devices} processes ended with an error")
        a, b = weights(one), weights(two)
        apart = max(max_difference(a[name], b[name]) / float(a[name].abs().max()) for name in a)
    show(
        "fine-tuning a converted SLL network on digits",
        ("what", "found"),
        [
            ("kills, in so many runs", f"{len(steps)}, {len(runs)}"),
            ("steps saved when killed", ", ".join(map(str, steps))),
            ("weights that differ from the run in one go", differing),
            ("two processes, largest difference relative to the tensor, float64", apart),
        ],
    )
    write_json(
        options.json,
        {"kills": len(steps), "runs": len(runs), "steps": steps, "differing": differing, "two_processes": apart},
    )
    return verdict([Floor("differing weights", float(differing), 0.0), Floor("two processes", apart, 1e-6)])


if __name__ == "__main__":
    sys.exit(main())
