"""Networks on the Hugging Face Hub: ``config.json``, ``model.safetensors``, ``model.onnx``, a model card (extra ``hub``)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..certification.certify import Certifier
from ..certification.documents import RobustnessReport
from ..checkpoints.checkpoint import info, load, save
from ..checkpoints.container import DATA, GRAPH, MOST_HEADER, read_manifest, read_text
from ..errors import CheckpointError, InvalidParameterError
from ..escaping import markdown
from ..foundation.arguments import isolated
from ..foundation.files import alone, whole
from ..networks.documents import NetworkInfo
from ..networks.network import Network

CONFIG, CARD, MODEL = "config.json", "README.md", "model"


@isolated
def write_folder(
    net: Network,
    folder: str | Path,
    report: RobustnessReport | None = None,
    *,
    outputs: Sequence[str] = (),
    certifier: Certifier | None = None,
) -> None:
    """The files of a model repository in a folder: the checkpoint ``model.onnx`` + ``model.safetensors``, ``config.json``
    (its manifest), and ``README.md``, the model card with the certified accuracies of ``report``.

    ``outputs``, ``certifier``: as `lipconvert.save` takes them. Raises what `save` raises, and `InvalidParameterError` where
    another process that writes to the folder does not end.
    """
    target = Path(folder)
    graph = target / (MODEL + GRAPH)
    with alone(target, patient=True):
        save(net, graph, outputs=outputs, certifier=certifier)
        manifest = read_manifest(graph)
        said = manifest.model_dump(mode="json")
        config = {"library_name": "lipconvert", "model_type": "lipconvert", "lipconvert": said}
        with whole(target / CONFIG) as partial:
            partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with whole(target / CARD) as partial:
            partial.write_text(card(info(graph), report), encoding="utf-8")


def card(found: NetworkInfo, report: RobustnessReport | None = None) -> str:
    """The model card, in Markdown with the Hub's metadata in front."""
    shape = " x ".join(map(str, found.input_shape))
    lines = [
        "---",
        "library_name: lipconvert",
        "tags: [certified-robustness, lipschitz, deep-equilibrium-model, onnx]",
        "---",
        "",
        "# A Lipschitz-bounded equilibrium network",
        "",
        f"Input {shape}, {found.parameters:,} parameters in {found.dtype}, prescribed Lipschitz constant {found.lipschitz:g} "
        "(l2, input to output).",
    ]
    if found.provenance is not None:
        plugins = ", ".join(f"{p.name} ({p.distribution} {p.version})" for p in found.provenance.plugins) or "no plugin"
        lines.append(f"Converted from {markdown(found.provenance.model)} by {markdown(plugins)}.")
    lines += ["", "| stage | states | L | proved for these floats | graph |", "|:--|--:|--:|--:|:--|"]
    for step in found.steps:
        if step.kind == "lben":
            proved = "-" if step.certificate is None else f"{step.certificate.lipschitz:.7g}"
            how = step.graph and step.graph.method
            lines.append(f"| {markdown(step.name)} | {step.states} | {step.lipschitz:g} | {proved} | {how} |")
    if report is not None:
        data = f", {markdown(report.data)}" if report.data else ""
        radii = " | ".join(f"ε = {radius:.4g}" for radius in report.radii)
        lines += [
            "",
            f"Certified accuracy in %, l2{data}, {report.samples} samples, for the {markdown(report.dtype)} floats that run:",
            "",
            f"| method | natural | {radii} |",
            "|:--|--:|" + "--:|" * len(report.radii),
        ]
        natural = f"{100 * report.natural_accuracy:.2f}"
        for method in report.methods:
            cells = " | ".join(f"{100 * share:.2f}" for share in method.certified_accuracy)
            lines.append(f"| {method.method} | {natural} | {cells} |")
        if report.attack is not None:
            cells = " | ".join(f"{100 * share:.2f}" for share in report.attack.attacked_accuracy)
            lines.append(f"| {report.attack.method}-{report.attack.steps} (upper bound) | {natural} | {cells} |")
    lines += [
        "",
        "```python",
        "import lipconvert as lc",
        "",
        'net = lc.from_hub("...")  # an nn.Module',
        "```",
        "",
        "`lipconvert verify model.onnx` checks every claim of the files again; `model.onnx` runs in onnxruntime.",
        "",
    ]
    return "\n".join(lines)


@isolated
def push_to_hub(
    net: Network,
    repo_id: str,
    report: RobustnessReport | None = None,
    *,
    outputs: Sequence[str] = (),
    certifier: Certifier | None = None,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload a lipconvert network",
) -> str:
    """Upload a network (`write_folder`) to ``repo_id``, "user/name", made if it is not there; returns the commit's address.

    Raises what `save` raises, `InvalidParameterError` without the extra ``hub``, and the errors of huggingface_hub.
    """
    api = _hub().HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(net, folder, report, outputs=outputs, certifier=certifier)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))


@isolated
def from_hub(repo: str | Path, *, revision: str | None = None, token: str | None = None) -> Network:
    """The network in a repository "user/name" of the Hub, or in a folder that is there already.

    Its hashes are checked as `lipconvert.load` does. Raises `CheckpointError`, also where ``config.json`` says another thing
    than the weights; `InvalidParameterError` without the extra ``hub``; the errors of huggingface_hub.
    """
    folder = Path(repo)
    if not folder.is_dir():
        wanted = [CONFIG, MODEL + DATA, MODEL + GRAPH]
        folder = Path(_hub().snapshot_download(str(repo), revision=revision, token=token, allow_patterns=wanted))
    data = folder / (MODEL + DATA)
    try:
        config = json.loads(read_text(folder / CONFIG, MOST_HEADER))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(folder / CONFIG), "file", f"it cannot be read ({error})") from error
    if not isinstance(config, dict) or config.get("lipconvert") != read_manifest(data).model_dump(mode="json"):
        raise CheckpointError(str(folder / CONFIG), "lipconvert", f"it is not the manifest of {data.name}")
    graph = folder / (MODEL + GRAPH)
    return load(graph if graph.is_file() else data)


def _hub() -> Any:
    try:
        return import_module("huggingface_hub")
    except ImportError as error:
        raise InvalidParameterError("hub", None, "pip install 'lipconvert[hub]'") from error
