"""Everything a checkpoint claims, checked afresh from its files alone: no plugin, no GPU, nothing believed.

Its hashes, and that graph and data belong together; that W is what the free parameters give; that conditions (10) and (3)
hold for the floats stored; that the constants of logits can be proved again; that onnxruntime computes what torch does.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort  # type: ignore[attr-defined]
from torch import Tensor

from ..certification.accuracy import Accuracy
from ..certification.bounds import Bounds, extremes
from ..certification.certify import Certifier
from ..certification.proofs import Enclosure, NotProved, Proof, prove_constant, prove_lmi, proves_monotone
from ..errors import CheckpointError, LipconvertError, UnreadableError
from ..foundation.arguments import isolated
from ..linalg.rounding import gamma, operations, transform_growth, unit_roundoff
from ..networks.lben import LBEN
from ..networks.network import Network
from ..onnx_export.onnx_graph import INPUT, LOGITS
from ..onnx_export.onnx_plan import Plan, flaw, plan, road
from . import checkpoint
from .checkpoint import ERRORS, PAIRS, errors_of, exact_network, network_of
from .container import DIGEST, Graph, Stored, read
from .documents import Claim, StageEntry, VerificationReport

# Largest difference of outputs, relative to the largest output: what two orders of summation leave, and two solvers.
AGREEMENT = {torch.float32: 1e-5, torch.float64: 1e-10}

# Inputs that are tried: batches of several sizes, pixels and normal numbers.
BATCHES = (1, 7, 32)

# What onnxruntime raises for a graph it cannot load or run.
REFUSED = (
    ort.Fail,
    ort.InvalidArgument,
    ort.InvalidGraph,
    ort.InvalidProtobuf,
    ort.NoSuchFile,
    ort.NotImplemented,
    ort.RuntimeException,
    RuntimeError,
    ValueError,
)


# How the stages are written, derived once.
Plans = Callable[[], dict[int, Plan]]


@isolated
def verify(path: str | Path, seed: int | None = None) -> VerificationReport:
    """Check every claim of a checkpoint. ``seed``: of the inputs the graph is tried on, a fresh one by default.

    A file that is damaged, or no checkpoint, fails its first claim; nothing is raised for what is in it. What cannot be
    checked, as the files cannot be read or the graph is that of another version, is not known, and so not verified.
    """
    name = str(path)
    try:
        stored = read(path)
        net = network_of(stored.manifest, stored.tensors, name)
    except CheckpointError as error:
        known = None if isinstance(error, UnreadableError) else False
        claims = [_claim("the files are what was saved", name, known, str(error))]
        return VerificationReport(path=name, claims=claims, passed=False)
    kinds = "graph and data" if stored.graph is not None else "data"
    found = f"SHA-256 of {kinds}, {len(stored.tensors)} tensors"
    claims = [_claim("the files are what was saved", name, True, found)]
    # What costs least comes first: checkers and runtimes see no graph that lipconvert has not written.
    own = None
    plans = cache(lambda: _plans(stored, net))
    if stored.graph is not None:
        written, own = _written(stored, stored.graph, net, plans, name)
        claims.append(written)
    stages = [(k, entry) for k, entry in enumerate(stored.manifest.steps) if isinstance(entry, StageEntry)]
    exact = exact_network(net, {k: (stored.tensors[f"steps.{k}.W"], _origin(entry)) for k, entry in stages})
    for check in (_stages(stored, net, exact), _bounds(stored, exact, plans)):
        claims += check
    if stored.graph is not None:
        seed = secrets.randbits(32) if seed is None else seed
        claims += _runs(own, stored, net, exact, plans, seed, name)
    return VerificationReport(path=name, claims=claims, passed=all(claim.passed for claim in claims))


def _claim(claim: str, where: str, passed: bool | None, found: str) -> Claim:
    return Claim(claim=claim, where=where, passed=passed, found=found)


def _stages(stored: Stored, net: Network, exact: Network) -> Iterator[Claim]:
    """``net``: rebuilt from the free parameters; ``exact``: with the W that is stored, of which all proofs speak."""
    for k, (entry, step, proper) in enumerate(zip(stored.manifest.steps, net.steps, exact.steps, strict=True)):
        if not isinstance(entry, StageEntry) or not isinstance(step, LBEN) or not isinstance(proper, LBEN):
            continue
        where = f"step {k}, {entry.name}"
        try:
            yield _rebuilt(where, step, proper)
        except LipconvertError as error:  # parameters whose W is not finite
            yield _claim("W is what the parameters give", where, False, str(error))
        multiplier, metric = (stored.tensors.get(f"steps.{k}.{name}") for name in ("multiplier", "metric"))
        yield from _proofs(where, entry, proper, multiplier, metric)


def _rebuilt(where: str, step: LBEN, proper: LBEN) -> Claim:
    """The stored W against paper eq. (2) of the free parameters, entry by entry, within what evaluating it rounds.

    γ_k Σ|terms| for the sums of k products of each entry. W on images is rounded once and stored without taps that are
    noise (`lipconvert.onnx_export.onnx_plan.stored_W`); it is rebuilt from spectra, in float64.
    """
    grid, dtype = step.grid, step.b_z.dtype
    W = proper.given
    assert W is not None
    expected = step.dae()
    K = grid.kernels(expected.W)
    G, U, V, S = (grid.matrices(p.detach().double()).abs() for p in (step.G, step.U, step.V, step.S))
    Psi = expected.Lambda.reciprocal().unsqueeze(-1)
    half = 0.5 / step.lipschitz
    terms = half * (Psi * (G.mT @ G) + U @ (U / Psi).mT) + Psi * (V.mT @ V + S + S.mT)
    terms = terms + (1.0 + step.epsilon * Psi) * torch.eye(len(Psi), dtype=terms.dtype)
    count = operations(sum(step.G.shape[:1]) + step.U.shape[1] + len(step.V) + 32, expected.W)
    if grid:
        eps, largest = torch.finfo(dtype).eps, float(K.abs().max())
        u = unit_roundoff(torch.float64)
        rounded = (gamma(count, u) + transform_growth(grid.image) * u) * grid.pixels**0.5 * terms.amax(0)
        allowed = 64.0 * eps * largest + eps * K.abs() + rounded[..., None, None]
    else:
        allowed = 2.0 * gamma(count, unit_roundoff(dtype)) * terms
    off = (W - K).abs()
    share = float((off / allowed.clamp(min=torch.finfo(torch.float64).tiny)).max())
    found = f"off by {float(off.max()):.1e}, an entry by {share:.1e} of what rounding allows for it"
    return _claim("W is what the parameters give", where, bool((off <= allowed).all()), found)


def _proofs(
    where: str, entry: StageEntry, proper: LBEN, multiplier: Tensor | None, metric: Tensor | None
) -> Iterator[Claim]:
    """(10) and (3) for the floats stored, by the multipliers stored; found anew where there are none."""
    lipschitz, well_posed = "condition (10): Lipschitz with its constant", "condition (3): one equilibrium"
    given = entry.certificate
    try:
        E = Enclosure.of_stage(proper)
        if given is None and multiplier is None and metric is None:
            anew = prove_constant(proper.running(), E)
            passed = isinstance(anew, Proof)
            found = f"proved anew at L = {anew.lipschitz:.9g}" if isinstance(anew, Proof) else _reason(anew)
            yield _claim(lipschitz, where, passed, found)
            yield _claim(well_posed, where, passed, "(10) with a margin implies it" if passed else "(10) has no proof")
            return
        if given is None or multiplier is None or metric is None:
            yield _claim(
                lipschitz, where, False, "a certificate and its tensors multiplier and metric are not all there"
            )
            return
        proof = prove_lmi(E, multiplier, given.lipschitz)
        honest = given.lipschitz == entry.lipschitz * (1.0 + given.delta)
        honest = honest and isinstance(proof, Proof) and proof.rounding <= given.rounding
        stated = f"{entry.lipschitz:g} (1 + {given.delta:g})"
        found = f"H > 0 at L = {given.lipschitz:.9g} = {stated}, rounding {proof.rounding:.1e}"
        yield _claim(lipschitz, where, bool(proof) and honest, found if isinstance(proof, Proof) else _reason(proof))
        monotone = proves_monotone(E, metric, given.mu)
        found = f"mu = {given.mu:.6g}, {'proved' if monotone else 'which has no proof'}"
        yield _claim(well_posed, where, monotone, found)
    except LipconvertError as error:  # a multiplier of another size, or not positive
        yield _claim(lipschitz, where, False, str(error))


def _reason(answer: Proof | NotProved) -> str:
    return answer.reason if isinstance(answer, NotProved) else ""


def _bounds(stored: Stored, exact: Network, plans: Plans) -> Iterator[Claim]:
    """The constants of the logits, proved again by the method that is claimed, and the error bounds of the graph."""
    claimed, pairs, errors = stored.manifest.bound, stored.tensors.get(PAIRS), stored.tensors.get(ERRORS)
    if claimed is None and pairs is None and errors is None:
        return
    what, where = "constants of the logits", "the network"
    if claimed is None or pairs is None:
        yield _claim(what, where, False, "only one of the manifest's bound and the tensor of pairs is there")
        return
    try:
        certifier = Certifier(exact, claimed.method)
        found = certifier.bounds[-1]
        assert found.pairs is not None
        holds = found.lipschitz <= claimed.lipschitz and not _exceeds(found.pairs, pairs)
        numbers = f"L = {found.lipschitz:.7g}, claimed {claimed.lipschitz:.7g}"
        least, greatest = extremes(found.pairs)
        text = f"{claimed.method}: {numbers}; of differences {least:.7g} to {greatest:.7g}"
        yield _claim(what, where, holds, text)
        if errors is None:
            return
        own = errors_of(certifier, plans())
        text = f"{float(own[0].max()):.1e} + {float(own[1].max()):.1e} |x| of a logit difference at most"
        yield _claim("error bounds of the graph", where, not _exceeds(own, errors), text)
    except LipconvertError as error:
        yield _claim(what, where, False, str(error))


def _exceeds(found: Tensor, claimed: Tensor) -> bool:
    """Whether any number found is more than is claimed, or they do not fit, or the claims make no sense."""
    sane = found.shape == claimed.shape and bool(((claimed >= 0.0) & torch.isfinite(claimed)).all())
    return not (sane and bool((found <= claimed).all()))


def _plans(stored: Stored, net: Network) -> dict[int, Plan]:
    """How the stages are written: what the manifest says, held against the plans made here from the same floats.

    Raises `CheckpointError` where it says nothing, or what is not right for these weights (`onnx_export.onnx_plan.flaw`).
    """
    plans = {}
    for k, (entry, step) in enumerate(zip(stored.manifest.steps, net.steps, strict=True)):
        if isinstance(entry, StageEntry) and isinstance(step, LBEN):
            if entry.graph is None:
                raise CheckpointError("the manifest", f"step {k}", "it does not say how the stage is written")
            own = plan(step, f"stage_{k}", stored.tensors[f"steps.{k}.W"], _origin(entry))
            plans[k] = chosen = replace(own, how=entry.graph)
            if reason := flaw(chosen, own):
                said = f"by {entry.graph.method}, which these weights do not allow ({own.how.method} is right)"
                raise CheckpointError("the manifest", f"step {k}", f"it is written {said}: not so: {reason}")
    return plans


def _origin(entry: StageEntry) -> tuple[int, int]:
    return (entry.origin[0], entry.origin[1]) if entry.image else (0, 0)


def _written(
    stored: Stored, graph: Graph, net: Network, plans: Plans, where: str
) -> tuple[Claim, onnx.ModelProto | None]:
    """The graph against the one that is written for these weights here, part by part, and that one where they are the same.

    Byte by byte, and without parsing what is not: the comparison takes as long as reading, whatever functions call.
    """
    manifest, what = stored.manifest, "the graph is what lipconvert writes for these weights"
    try:
        inline = bool(plans()) and "functions" not in graph.parts
        # Where the numbers are is no part of a graph: those of both are the tensors that were read.
        places = dict.fromkeys(stored.tensors, (0, 0))
        tensors = checkpoint.external(stored.tensors, "tensors", places)
        own = checkpoint.graph_of(net, plans(), tensors, graph.outputs[1:], manifest, inline)
        expected = Graph.of(own.SerializeToString(deterministic=True))
    except (LipconvertError, ValueError, KeyError, IndexError) as error:
        return _claim(what, where, False, f"none can be written: {error}"), None
    expected.parts["metadata_props"].append(DIGEST.encode())
    parts = sorted(graph.parts.keys() | expected.parts.keys())
    if not (other := [part for part in parts if graph.parts.get(part) != expected.parts.get(part)]):
        functions = len(own.functions)
        nodes = len(own.graph.node) + sum(len(function.node) for function in own.functions)
        found = f"{nodes} nodes, {functions} function{'' if functions == 1 else 's'}"
        return _claim(what, where, True, found), own
    found = f"{', '.join(other)} differ"
    if manifest.versions == (here := checkpoint.writers()):
        return _claim(what, where, False, found), None
    # another version may write another graph that computes the same: it has to be checked, or written, by that
    found += f"; it says that {_words(manifest.versions)} have written it, and here are {_words(here)}: save it again"
    return _claim(what, where, None, found), None


def _runs(
    own: onnx.ModelProto | None, stored: Stored, net: Network, exact: Network, plans: Plans, seed: int, where: str
) -> Iterator[Claim]:
    """onnx's checker, and onnxruntime against torch, on the graph that was compared and the tensors that were read.

    Neither opens a file: what runs is what was hashed, and links, which both refuse as external data, are no matter.
    """
    formed, what = "the graph is well-formed", "onnxruntime computes what torch does"
    if own is None:  # it might compute anything, for ever
        for claim in (formed, what):
            yield _claim(claim, where, None, "not tried, as it is another graph")
        return
    del own.training_info[:]
    checked = onnx.ModelProto()
    checked.CopyFrom(own)
    # Initialisers as inputs of their dtype and shape: the checker would look for the numbers, and needs none.
    for tensor in own.graph.initializer:
        value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        checked.graph.input.append(value)
    del checked.graph.initializer[:]
    try:
        onnx.checker.check_model(checked, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        yield _claim(formed, where, False, str(error))
        return
    yield _claim(formed, where, True, "onnx.checker, with shape inference")
    try:
        session = session_of(own, stored.tensors)
    except REFUSED as error:
        yield _claim(what, where, None, f"onnxruntime does not load it: {error}")
        return
    yield from _agreement(session, exact, net.dtype, plans, seed, where)


def _words(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items()) or "no versions"


def _read_names(graph: onnx.GraphProto) -> set[str]:
    """The names of all values that the nodes of a graph read, those in loops too."""
    names = {name for node in graph.node for name in node.input}
    return names.union(*(_read_names(a.g) for node in graph.node for a in node.attribute if a.HasField("g")))


def session_of(model: onnx.ModelProto, tensors: Mapping[str, Tensor]) -> onnxruntime.InferenceSession:
    """A graph whose initialisers are external in onnxruntime, with tensors in memory, on the CPU, quietly."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    used = _read_names(model.graph)  # onnxruntime takes no tensor that it has left out as nothing reads it
    names = [initializer.name for initializer in model.graph.initializer if initializer.name in used]
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(tensors[name].detach().numpy()) for name in names]
    options.add_external_initializers(names, values)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _agreement(
    session: onnxruntime.InferenceSession, exact: Network, dtype: torch.dtype, plans: Plans, seed: int, where: str
) -> Iterator[Claim]:
    """The graph on fresh inputs against torch in float64, with the same W: within `AGREEMENT`, or what rounding may do."""
    what = "onnxruntime computes what torch does"
    generator = torch.Generator().manual_seed(seed)
    batches = [
        draw(size, *exact.input_shape, generator=generator, dtype=torch.float64).to(dtype)
        for size in BATCHES
        for draw in (torch.rand, torch.randn)
    ]
    off, worst = [], 0.0
    for x in batches:
        try:
            with torch.no_grad():
                expected = exact(x.double())
            actual = torch.from_numpy(np.asarray(session.run([LOGITS], {INPUT: x.numpy()})[0])).double()
        except LipconvertError as error:
            yield _claim(what, where, None, f"torch finds no equilibrium (inputs of seed {seed}): {error}")
            return
        except REFUSED as error:
            yield _claim(what, where, None, f"onnxruntime does not run it: {error}")
            return
        if actual.shape != expected.shape:
            yield _claim(what, where, False, f"its outputs are {tuple(actual.shape)}, torch's {tuple(expected.shape)}")
            return
        off.append(torch.linalg.vector_norm((actual - expected).flatten(1), dim=1))
        share = (actual - expected).abs().max() / (expected.abs().max() or 1.0)
        worst = max(worst, float(share.nan_to_num(nan=math.inf)))
    found = f"off by {worst:.1e} of the largest output, {{}}; batches of {', '.join(map(str, BATCHES))}, seed {seed}"
    limit = AGREEMENT[dtype]
    if worst <= limit:
        yield _claim(what, where, True, found.format(f"{limit:g} allowed"))
        return
    # Where large terms cancel, more is honest: as much as is proved.
    try:
        accuracy = Accuracy(Bounds(exact))
        roads = {k: road(chosen, accuracy.dae(k)) for k, chosen in plans().items()}
        (at_0, growth), _ = accuracy.everywhere(roads, dtype)
        evaluated = [accuracy.evaluate(x.double()).error[:, 0] for x in batches]
    except LipconvertError as error:
        reason = f"{limit:g} would be beyond doubt, and no bound of its rounding is known ({error})"
        yield _claim(what, where, None, found.format(reason))
        return
    allowed = [
        at_0 + growth * torch.linalg.vector_norm(x.double().flatten(1), dim=1) + own
        for x, own in zip(batches, evaluated, strict=True)
    ]
    within = all(bool((a <= b).all()) for a, b in zip(off, allowed, strict=True))
    largest = max(float((a / b).nan_to_num(nan=math.inf).max()) for a, b in zip(off, allowed, strict=True))
    yield _claim(what, where, within, found.format(f"{largest:.1e} of what its rounding may do"))
