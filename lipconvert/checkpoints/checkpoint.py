"""Networks to files and back: ``net.onnx`` describes, ``net.safetensors`` holds (DESIGN section 7).

The data file holds every tensor once: the free parameters, the W in use, and the certificate. Its header carries the
manifest (`Manifest`): what the tensors do not say. The initialisers of the graph are external data at
(offset, length) in that file, so torch reads and onnxruntime runs the same bytes. `checkpoints.container` says how the two
hold together and what is refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import cache, reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import onnx
import onnx.inliner
import onnx_ir as ir
import torch
from onnx import StringStringEntryProto
from pydantic import ValidationError
from torch import Tensor, nn

from ..certification.bounds import class_pairs, extremes, metrics, output_shape
from ..certification.certify import Certifier
from ..certification.proofs import Enclosure, Proof, prove_constant, prove_monotone
from ..dae.activations import activation_of, is_activation
from ..errors import CheckpointError, NoCertificateError
from ..foundation.arguments import isolated
from ..foundation.files import replaced, whole
from ..foundation.integrity import require_own
from ..networks.documents import GraphEntry, LogitBound, NetworkInfo, StageCertificate
from ..networks.glue import KNOWN
from ..networks.lben import LBEN
from ..networks.network import Network
from ..onnx_export.onnx_author import DOMAIN, DTYPES
from ..onnx_export.onnx_graph import RADIUS, RESIDUAL, build
from ..onnx_export.onnx_plan import OUTWARDS, Plan, full_kernels, plan, road, stored_W
from .container import DATA, GRAPH, MANIFEST, Header, entry_of, finish, location_of, read, write_data, write_graph
from .documents import FORMAT_VERSION, GlueEntry, Manifest, StageEntry
from .skeleton import ERRORS, PAIRS, skeleton

# Shares by which claims are weaker than what was proved here: sums are added up in another order elsewhere, a search ends a
# little sooner. Error bounds consist of norms that are found in steps (`linalg.rounding.norm_bound`). Whoever verifies
# them compares exactly.
OUTWARDS_ERRORS = 2e-2


@isolated
def save(
    net: Network,
    path: str | Path,
    *,
    embed: bool = False,
    outputs: Sequence[str] = (),
    inline: bool = False,
    prove: bool = True,
    certifier: Certifier | None = None,
) -> None:
    """Write a network: ``net.onnx`` and ``net.safetensors`` beside it, or the latter alone.

    ``path``: with the suffix ``.onnx`` both are written, and what is read is the old pair or the new one, also after a kill;
    with ``.safetensors`` only the data, without a graph. Two that are saved to one path at a time are saved one after the
    other. ``embed``: a single ``.onnx`` that holds its data. ``outputs``:
    what the graph returns beside the logits: ``"residual"``, the largest residual of the stages, (B,), and ``"radius"``, the
    certified radius of each sample, (B,). ``inline``: a graph without functions, for runtimes that have none. ``prove``:
    prove each stage's constant and well-posedness for the floats stored, and write the multipliers, so that `verify` only
    checks. ``certifier``: what was proved of the logits, to be kept with it; made with the method ``"tightened"`` where a
    radius is asked for.

    Raises `CheckpointError` for another suffix, a dtype that is not float32 or float64, glue that cannot be rebuilt from
    numbers, NaN, a number of class names that is not that of the outputs, a ``certifier`` of another network, and an
    equilibrium that no graph solves; `NoCertificateError` where there is no radius, or the network has changed since;
    `ModifiedModuleError` where hooks and the like compute what no file would hold; `InvalidParameterError` where another
    writer of the same files does not end; `OSError`.
    """
    target = Path(path)
    if target.suffix not in (GRAPH, DATA):
        raise CheckpointError(str(target), "path", f"the suffix must be {GRAPH} or {DATA}")
    if not isinstance(net, Network):
        raise CheckpointError(
            str(target), "net", f"a converted network is saved, not a {type(net).__name__}: convert it first"
        )
    require_own(net)
    if net.dtype not in DTYPES:
        raise CheckpointError(str(target), "dtype", f"{net.dtype} is not written; only float32 and float64 are")
    with_graph = target.suffix == GRAPH
    data = target.with_suffix(DATA)
    location = location_of(data) if with_graph and not embed else ""
    if (embed or outputs or inline) and not with_graph:
        raise CheckpointError(
            str(target), "path", f"embed, outputs and inline are about a graph: the suffix must be {GRAPH}"
        )
    outputs = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    for output in outputs:
        if output not in (RESIDUAL, RADIUS):
            raise CheckpointError(str(target), "outputs", f"{output!r} is none of {RESIDUAL!r}, {RADIUS!r}")
    if certifier is not None:
        if certifier.net is not net:
            raise CheckpointError(
                str(target), "certifier", "it is that of another network: what it proved is not of this one"
            )
        certifier.accuracy.require_unchanged()
    if net.class_names:
        shape = reduce(lambda before, step: output_shape(step, before), net.steps, net.input_shape)
        if len(net.class_names) != math.prod(shape):
            reason = f"there are {len(net.class_names)}, and {math.prod(shape)} outputs"
            raise CheckpointError(str(target), "class_names", reason)
    if RADIUS in outputs and certifier is None:
        certifier = Certifier(net)
    try:
        manifest, tensors, plans = _described(net, str(target), with_graph, prove, certifier, RADIUS in outputs)
    except ValidationError as error:  # too many steps, or names that are too long
        raise CheckpointError(str(target), "manifest", str(error)) from error
    if not with_graph:
        with whole(target) as partial:
            finish(target.with_suffix(GRAPH))  # of which this would overwrite what a kill left of its data
            write_data(partial, tensors, manifest)
        return
    if embed:
        with whole(target) as partial:
            write_graph(partial, graph_of(net, plans, embedded(tensors), outputs, manifest, inline))
        return
    # The graph is replaced first: from then on the pair is the new one, and `recover` finishes what a kill left undone.
    with replaced(target, data) as (partial_graph, partial_data):
        finish(target)
        write_data(partial_data, tensors, manifest)
        places = Header.read(partial_data).places
        held = external(tensors, location, places)
        write_graph(partial_graph, graph_of(net, plans, held, outputs, manifest, inline))


def _described(
    net: Network, path: str, with_graph: bool, prove: bool, certifier: Certifier | None, with_radius: bool
) -> tuple[Manifest, dict[str, Tensor], dict[int, Plan]]:
    """The manifest, all tensors on the CPU, and how each stage is written."""
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in net.state_dict().items() if isinstance(value, Tensor)
    }
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            reason = "it holds NaN or infinity: training has diverged, usually. Go back to an earlier state"
            raise CheckpointError(path, f"tensor {name!r}", reason)
    Ws: dict[int, tuple[Tensor, tuple[int, int]]] = {}
    for k, step in enumerate(net.steps):
        if isinstance(step, LBEN):
            step.refresh()
            Ws[k] = stored_W(step)
    exact = exact_network(net, Ws)
    entries: list[StageEntry | GlueEntry] = []
    plans: dict[int, Plan] = {}
    for k, (step, proper) in enumerate(zip(net.steps, exact.steps, strict=True)):
        if not isinstance(step, LBEN):
            entries.append(_glue_entry(step, path))
            continue
        assert isinstance(proper, LBEN)
        tensors[f"steps.{k}.W"], origin = Ws[k]
        graph = certificate = None
        if with_graph:
            plans[k] = chosen = plan(step, f"stage_{k}", *Ws[k])
            graph = chosen.how
        if prove and (proved := _proved(proper)) is not None:
            certificate, tensors[f"steps.{k}.multiplier"], tensors[f"steps.{k}.metric"] = proved
        entries.append(_stage_entry(step, origin, graph, certificate))
    bound = None
    if certifier is not None:
        if not _same_operators(net, exact):  # on images W is rounded once more where it is stored
            certifier = Certifier(exact, certifier.method)
        found = certifier.bounds[-1]
        assert found.pairs is not None  # a certifier has logits
        tensors[PAIRS] = _outwards(found.pairs)
        bound = LogitBound(method=certifier.method, lipschitz=_outwards(found.lipschitz))
        if with_radius:
            tensors[ERRORS] = _outwards(errors_of(certifier, plans), OUTWARDS_ERRORS)
    manifest = Manifest(
        versions=writers(),
        input_shape=list(net.input_shape),
        dtype="float32" if net.dtype is torch.float32 else "float64",
        steps=entries,
        tensors=[entry_of(name, tensor) for name, tensor in sorted(tensors.items())],
        bound=bound,
        class_names=list(net.class_names),
        provenance=net.provenance,
        training=net.training_summary,
    )
    try:
        manifest.model_dump_json()
    except ValueError as error:  # of pydantic, where UTF-8 has no such character
        reason = f"a name in it cannot be written ({error}): it has bytes or halves of characters that are no text"
        raise CheckpointError(path, "manifest", reason) from error
    return manifest, tensors, plans


def errors_of(certifier: Certifier, plans: Mapping[int, Plan]) -> Tensor:
    """(2, q, q): y_i − y_j of the graph is off by at most errors[0] + errors[1]·‖x‖ at any x, and errors[1]·r more within r.

    Off the exact network that the certifier is about. Raises `NoCertificateError` where there is no finite bound.
    """
    accuracy = certifier.accuracy
    dtype = next(iter(plans.values())).stage.b_z.dtype if plans else certifier.net.dtype
    error, pair_error = accuracy.everywhere({k: road(chosen, accuracy.dae(k)) for k, chosen in plans.items()}, dtype)
    pairs = certifier.bounds[-1].pairs
    assert pairs is not None
    errors = (2.0**0.5 * error).reshape(2, 1, 1).expand(2, *pairs.shape).clone()
    if pair_error is not None:
        i, j = torch.tensor(class_pairs(len(pairs))).T
        errors[:, i, j] = errors[:, j, i] = pair_error.T
    if not bool(torch.isfinite(errors).all()):
        raise NoCertificateError("the graph", "there is no bound of what rounding does in it")
    errors.diagonal(dim1=1, dim2=2).zero_()
    return errors


def embedded(tensors: Mapping[str, Tensor]) -> dict[str, ir.TensorProtocol]:
    """Tensors as initialisers that hold their bytes."""
    return {name: ir.tensor(tensor.numpy(), name=name) for name, tensor in tensors.items()}


def external(
    tensors: Mapping[str, Tensor], file: str, places: Mapping[str, tuple[int, int]]
) -> dict[str, ir.TensorProtocol]:
    """Tensors as initialisers whose bytes are in a file, from and to these places."""
    found: dict[str, ir.TensorProtocol] = {}
    for name, tensor in tensors.items():
        start, stop = places[name]
        shape = ir.Shape(list(tensor.shape))
        found[name] = ir.ExternalTensor(file, start, stop - start, DTYPES[tensor.dtype], shape=shape, name=name)
    return found


@cache
def _writers() -> tuple[tuple[str, str], ...]:
    return tuple((name, version(name)) for name in ("lipconvert", "onnx", "onnx-ir"))


def writers() -> dict[str, str]:
    """The versions of what writes a graph."""
    return dict(_writers())


def exact_network(net: Network, Ws: Mapping[int, tuple[Tensor, Sequence[int]]]) -> Network:
    """The network of the floats in a file, in float64 on the CPU: each stage has the W that is stored, and runs in a graph.

    ``Ws``: of each stage, by the number of its step, W and the offset of its first tap (`stored_W`).
    """
    exact = copy.deepcopy(net).to("cpu", torch.float64).eval().requires_grad_(False)
    for k, (W, origin) in Ws.items():
        step = exact.steps[k]
        assert isinstance(step, LBEN)
        exact.steps[k] = step.with_W(full_kernels(W, origin, step.grid))
    return exact


def _same_operators(net: Network, exact: Network) -> bool:
    """Whether all stages run the very same W, U and G."""
    both = zip((stage.running() for stage in net.stages), (stage.running() for stage in exact.stages), strict=True)
    return all(
        torch.equal(a.cpu(), b) for mine, its in both for a, b in zip(tuple(mine)[:3], tuple(its)[:3], strict=True)
    )


Bound = TypeVar("Bound", float, Tensor)


def _outwards(proved: Bound, slack: float = OUTWARDS) -> Bound:
    """Upper bounds a little above what was proved, which are what is claimed."""
    return proved * (1.0 + slack)


def _proved(stage: LBEN) -> tuple[StageCertificate, Tensor, Tensor] | None:
    """(certificate, multiplier, metric) for a stage of `exact_network`; None where (10) or (3) has no proof."""
    dae, E = stage.running(), Enclosure.of_stage(stage)
    proof = prove_constant(dae, E)
    if not isinstance(proof, Proof):
        return None
    for metric in reversed(metrics(dae)):  # Perron's, where there is one, has the most margin
        if (mu := prove_monotone(E, metric)) > 0.0:
            certificate = StageCertificate(
                lipschitz=proof.lipschitz,
                delta=proof.delta,
                mu=mu * (1.0 - OUTWARDS),
                rounding=_outwards(proof.rounding),
            )
            return certificate, proof.Lambda.contiguous(), metric.clone()
    return None


def graph_of(
    net: Network,
    plans: Mapping[int, Plan],
    tensors: Mapping[str, ir.TensorProtocol],
    outputs: Sequence[str],
    manifest: Manifest,
    inline: bool = False,
) -> onnx.ModelProto:
    """The graph with the manifest; what it does not compute with are the initialisers of its training information."""
    model = ir.to_proto(build(net, plans, tensors, outputs))
    if inline:
        model = onnx.inliner.inline_local_functions(model)
        kept = [opset for opset in model.opset_import if opset.domain != DOMAIN]  # there are no functions left
        del model.opset_import[:]
        model.opset_import.extend(kept)
    used = {initializer.name for initializer in model.graph.initializer}
    algorithm = model.training_info.add().algorithm
    algorithm.name = "parameters"
    algorithm.doc_string = (
        "What a stage is trained by and what was proved of it. W = I - P(G'G/2L + inv(P)UU'inv(P)/2L + V'V + S - S' + eI), "
        "P = diag(exp(log_psi)); multiplier and metric are the diagonals of the proofs of conditions (10) and (3)."
    )
    algorithm.initializer.extend(ir.to_proto(tensor) for name, tensor in sorted(tensors.items()) if name not in used)
    for key, value in (("lipconvert.format_version", str(FORMAT_VERSION)), (MANIFEST, manifest.model_dump_json())):
        model.metadata_props.append(StringStringEntryProto(key=key, value=value))
    return model


@isolated
def load(path: str | Path) -> Network:
    """Read a network written by `save`, from its graph and data, or from the data alone: the same tensors bit for bit.

    Raises `CheckpointError` naming the tensor or entry that is missing, misshapen, changed, not finite or unknown.
    """
    stored = read(path)
    return network_of(stored.manifest, stored.tensors, str(path))


@isolated
def info(path: str | Path) -> NetworkInfo:
    """What there is to say about a checkpoint: its network, how it is written, what was proved. Raises `CheckpointError`."""
    stored = read(path)
    manifest = stored.manifest
    net = network_of(manifest, stored.tensors, str(path))
    found = net.info()
    steps = []
    for step, entry in zip(found.steps, manifest.steps, strict=True):
        known = {"graph": entry.graph, "certificate": entry.certificate} if isinstance(entry, StageEntry) else {}
        steps.append(step.model_copy(update=known))
    more: dict[str, object] = {}
    if manifest.bound is not None and (pairs := stored.tensors.get(PAIRS)) is not None:
        more |= {"bound": manifest.bound, "pairs": extremes(pairs)}
    return found.model_copy(update={"steps": steps, **more})


def network_of(manifest: Manifest, tensors: Mapping[str, Tensor], name: str) -> Network:
    """The network that a manifest describes, with its tensors."""
    net = skeleton(manifest, name)
    for key, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(name, f"tensor {key!r}", "it holds NaN or infinity")
    wanted = {key: value for key, value in net.state_dict().items() if isinstance(value, Tensor)}
    for key, value in wanted.items():
        given = tensors.get(key)
        if given is None or given.shape != value.shape or given.dtype != value.dtype:
            expected, actual = ("missing" if t is None else f"{t.dtype} {tuple(t.shape)}" for t in (value, given))
            raise CheckpointError(name, f"tensor {key!r}", f"it is {actual}, the manifest says {expected}")
    net.load_state_dict({key: tensors[key] for key in wanted}, strict=False, assign=True)
    net.class_names = tuple(manifest.class_names)
    net.provenance, net.training_summary = manifest.provenance, manifest.training
    return net


def _stage_entry(
    stage: LBEN, origin: tuple[int, int], graph: GraphEntry | None, certificate: StageCertificate | None
) -> StageEntry:
    return StageEntry(
        name=stage.name,
        inputs=stage.U.shape[1],
        states=len(stage.b_z),
        outputs=len(stage.b_y),
        lipschitz=stage.lipschitz,
        epsilon=stage.epsilon,
        activations=[(str(activation), size) for activation, size in stage.sigma],
        blocks=list(stage.blocks),
        image=list(stage.grid.image),
        origin=list(origin) if stage.grid else [],
        graph=graph,
        certificate=certificate,
    )


def _glue_entry(module: nn.Module, path: str) -> GlueEntry:
    if is_activation(module):
        return GlueEntry(type="Activation", arguments={"name": str(activation_of(module))})
    if type(module) not in KNOWN:
        kind = type(module).__name__
        raise CheckpointError(path, f"glue {kind}", "it is not the core's own, so a file cannot rebuild it")
    arguments: dict[str, Any] = {}
    for name in KNOWN[type(module)]:
        value = getattr(module, name)
        arguments[name] = value.tolist() if isinstance(value, Tensor) else value
        if isinstance(value, tuple):
            arguments[name] = list(value)
    return GlueEntry(type=type(module).__name__, arguments=arguments)
