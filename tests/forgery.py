"""The files of a checkpoint read, changed and signed anew without lipconvert, and what is true of them by numpy in float64.

`Files` knows the format alone: safetensors, ONNX, JSON and SHA-256. `Truth` evaluates the network of some files, layer by
layer, and the matrix inequalities of its certificates; `lost` searches what a user would lose who believes them.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import StringStringEntryProto, TensorProto

GRAPH, DATA = "net.onnx", "net.safetensors"

# A checkpoint comes as a graph with its data beside it, as one file that holds both, and as the data alone.
FORMS = ("pair", "embedded", "data")

KINDS = {"float32": ("F32", TensorProto.FLOAT, np.float32), "float64": ("F64", TensorProto.DOUBLE, np.float64)}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@dataclass
class Files:
    """A checkpoint in memory, to be changed: manifest (JSON), tensors, and graph; `write` makes every hash fit again."""

    form: str
    manifest: dict[str, Any]
    tensors: dict[str, np.ndarray]
    model: onnx.ModelProto | None = None
    entries: bool = True  # whether the manifest's entries of tensors are written anew
    places: dict[str, dict[str, Any]] = field(default_factory=dict)  # other external data than where the bytes are

    @classmethod
    def read(cls, path: Path, form: str) -> Files:
        tensors = {}
        if form == "embedded":
            model = onnx.load(path)
            for proto in initializers(model):
                tensors[proto.name] = onnx.numpy_helper.to_array(proto).copy()
            (text,) = (entry.value for entry in model.metadata_props if entry.key == "lipconvert.manifest")
            return cls(form, json.loads(text), tensors, model)
        header, body = split(path.with_suffix(".safetensors").read_bytes())
        text = header.pop("__metadata__")["lipconvert"]
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            kind = next(kind for word, _, kind in KINDS.values() if word == entry["dtype"])
            tensors[name] = np.frombuffer(body[start:stop], kind).reshape(entry["shape"]).copy()
        model = onnx.load(path, load_external_data=False) if form == "pair" else None
        return cls(form, json.loads(text), tensors, model)

    def copy(self) -> Files:
        return copy.deepcopy(self)

    def differs(self, other: Files) -> bool:
        """Whether anything of it is another."""
        mine, its = (
            (f.manifest, {name: (M.dtype, M.shape, M.tobytes()) for name, M in f.tensors.items()}, f.model, f.places)
            for f in (self, other)
        )
        return mine != its

    @property
    def stages(self) -> list[int]:
        """The places of the stages among the steps."""
        return [k for k, entry in enumerate(self.manifest["steps"]) if entry["kind"] == "lben"]

    def initializer(self, name: str) -> TensorProto:
        assert self.model is not None
        return next(proto for proto in initializers(self.model) if proto.name == name)

    def add(self, name: str, values: np.ndarray) -> None:
        """A tensor more, with an initialiser that no node reads."""
        self.tensors[name] = values
        if self.model is not None:
            self.model.training_info[0].algorithm.initializer.add().name = name

    def remove(self, name: str) -> None:
        """A tensor less, and its initialiser."""
        del self.tensors[name]
        if self.model is not None:
            for kept in (self.model.graph, *(info.algorithm for info in self.model.training_info)):
                left = [proto for proto in kept.initializer if proto.name != name]
                del kept.initializer[:]
                kept.initializer.extend(left)

    def write(self, folder: Path) -> Path:
        """Sign and write; the path that is loaded."""
        if self.entries:
            self.manifest["tensors"] = [
                {"name": name, "dtype": str(M.dtype), "shape": list(M.shape), "sha256": digest(M.tobytes())}
                for name, M in sorted(self.tensors.items())
            ]
        text = json.dumps(self.manifest, separators=(",", ":"), ensure_ascii=False)
        places: dict[str, tuple[int, int]] = {}
        if self.form != "embedded":
            places = self._write_data(folder / DATA, text)
        if self.model is None:
            return folder / DATA
        for proto in initializers(self.model):
            if proto.name not in self.tensors:
                continue
            M = self.tensors[proto.name]
            proto.dims[:] = M.shape
            proto.data_type = KINDS[str(M.dtype)][1]
            proto.ClearField("raw_data")
            proto.ClearField("external_data")
            if self.form == "embedded":
                proto.ClearField("data_location")
                proto.raw_data = M.tobytes()
                continue
            start, stop = places[proto.name]
            where = {"location": DATA, "offset": start, "length": stop - start} | self.places.get(proto.name, {})
            proto.data_location = TensorProto.EXTERNAL
            for key, value in where.items():
                proto.external_data.append(StringStringEntryProto(key=key, value=str(value)))
        known = {"lipconvert.manifest", "lipconvert.sha256"}
        others = [(entry.key, entry.value) for entry in self.model.metadata_props if entry.key not in known]
        del self.model.metadata_props[:]
        for key, value in [*others, ("lipconvert.manifest", text)]:
            self.model.metadata_props.append(StringStringEntryProto(key=key, value=value))
        body = self.model.SerializeToString(deterministic=True)
        last = StringStringEntryProto(key="lipconvert.sha256", value=digest(body))
        (folder / GRAPH).write_bytes(body + onnx.ModelProto(metadata_props=[last]).SerializeToString())
        return folder / GRAPH

    def _write_data(self, path: Path, text: str) -> dict[str, tuple[int, int]]:
        header: dict[str, Any] = {
            "__metadata__": {"lipconvert": text, "lipconvert.sha256": digest(text.encode())},
        }
        body, order = b"", sorted(self.tensors, key=lambda name: (-self.tensors[name].itemsize, name))
        for name in order:
            M = self.tensors[name]
            offsets = [len(body), len(body) + M.nbytes]
            header[name] = {"dtype": KINDS[str(M.dtype)][0], "shape": list(M.shape), "data_offsets": offsets}
            body += M.tobytes()
        words = json.dumps(header, separators=(",", ":")).encode()
        words += b" " * (-len(words) % 64)
        path.write_bytes(struct.pack("<Q", len(words)) + words + body)
        first = 8 + len(words)
        return {
            name: (first + entry[0], first + entry[1]) for name in order for entry in [header[name]["data_offsets"]]
        }


def initializers(model: onnx.ModelProto) -> list[TensorProto]:
    return [*model.graph.initializer, *(t for info in model.training_info for t in info.algorithm.initializer)]


# ---- the network, by numpy


def flattened(x: np.ndarray) -> np.ndarray:
    """One row of float64 for each sample."""
    return x.reshape(len(x), int(np.prod(x.shape[1:]))).astype(np.float64)


def circulant(K: np.ndarray) -> np.ndarray:
    """The matrix of y_i[s] = Σ_j Σ_a K_ij[a] x_j[s + a] on flattened images; a matrix as it is."""
    if K.ndim == 2:
        return K
    q, p, h, w = K.shape
    s, t = np.arange(h * w) // w, np.arange(h * w) % w
    blocks = K[:, :, (s[None, :] - s[:, None]) % h, (t[None, :] - t[:, None]) % w]
    return blocks.transpose(0, 2, 1, 3).reshape(q * h * w, p * h * w)


@dataclass
class Stage:
    """z = σ(Wz + Ux + b_z), y = Gz + b_y on flattened images: W as stored, and as paper eq. (2) gives it."""

    W: np.ndarray
    rebuilt: np.ndarray
    U: np.ndarray
    G: np.ndarray
    b_z: np.ndarray
    b_y: np.ndarray
    relu: np.ndarray  # (n,) bool: ReLU, else the identity
    pixels: int
    shape: tuple[int, ...]  # of one output

    @classmethod
    def of(cls, entry: dict[str, Any], t: dict[str, np.ndarray]) -> Stage:
        image = entry.get("image", [])
        pixels = int(np.prod(image)) if image else 1
        t = {name: M.astype(np.float64) for name, M in t.items()}
        W = t["W"]
        if image:
            h, w = image
            full = np.zeros((*W.shape[:2], h, w))
            rows, columns = (
                [(o + k) % size for k in range(n)]
                for o, n, size in zip(entry["origin"], W.shape[2:], image, strict=True)
            )
            full[:, :, np.array(rows)[:, None], np.array(columns)] = W
            W = full
        W, U, G, V, S = (circulant(M) for M in (W, t["U"], t["G"], t["V"], t["S"]))
        L, epsilon, eye = entry["lipschitz"], entry["epsilon"], np.eye(len(W))
        Psi = np.repeat(np.exp(t["log_psi"]), pixels)[:, None]
        rebuilt = eye - Psi * (
            G.T @ G / (2 * L) + (U / Psi) @ (U / Psi).T / (2 * L) + V.T @ V + S - S.T + epsilon * eye
        )
        relu = np.repeat([name == "relu" for name, size in entry["activations"] for _ in range(size)], pixels)
        assert {name for name, _ in entry["activations"]} <= {"relu", "identity"}
        b_z, b_y = (np.repeat(t[name], pixels) for name in ("b_z", "b_y"))
        return cls(W, rebuilt, U, G, b_z, b_y, relu, pixels, (entry["outputs"], *image))

    def sigma(self, v: np.ndarray) -> np.ndarray:
        return np.where(self.relu, np.maximum(v, 0.0), v)

    def states(self, x: np.ndarray, W: np.ndarray) -> np.ndarray:
        """The equilibrium for flat inputs (B, p): iterated, then by Newton's steps on the pattern of active states."""
        u = x @ self.U.T + self.b_z
        z = np.zeros_like(u)
        small = 1e-14 * (1.0 + np.abs(u).max(initial=0.0))
        for _ in range(len(W) + 1):  # exact for a triangular W
            z, before = self.sigma(z @ W.T + u), z
            if np.abs(z - before).max(initial=0.0) <= small:
                return z
        for _ in range(200):
            v = z @ W.T + u
            if np.abs(z - self.sigma(v)).max(initial=0.0) <= small:
                break
            D = np.where(self.relu, v > 0.0, True).astype(float)
            z = np.linalg.solve(np.eye(len(W)) - D[:, :, None] * W, (D * u)[:, :, None])[:, :, 0]
        return z

    def run(self, x: np.ndarray, which: str = "W") -> tuple[np.ndarray, np.ndarray]:
        """(y, slopes) for flat inputs."""
        W = getattr(self, which)
        z = self.states(x, W)
        slopes = np.where(self.relu, z @ W.T + x @ self.U.T + self.b_z > 0.0, True).astype(float)
        return z @ self.G.T + self.b_y, slopes

    def pull(self, g: np.ndarray, slopes: np.ndarray) -> np.ndarray:
        """The gradient of ⟨g, y⟩ by the input, for the slopes of each sample."""
        g = g @ self.G
        p, before = slopes * g, None
        for _ in range(64):  # exact for a triangular W of as many blocks
            p, before = slopes * (p @ self.W + g), p
            if np.abs(p - before).max(initial=0.0) <= 1e-12 * (1.0 + np.abs(g).max(initial=0.0)):
                return p @ self.U
        M = np.eye(len(self.W)) - slopes[:, :, None] * self.W.T
        return np.linalg.solve(M, (slopes * g)[:, :, None])[:, :, 0] @ self.U


class Truth:
    """The network of some files in float64, of flat inputs; its steps are written out here."""

    def __init__(self, files: Files) -> None:
        self.steps: list[Any] = []
        self.shape = tuple(files.manifest["input_shape"])
        shape = self.shape
        for k, entry in enumerate(files.manifest["steps"]):
            prefix = f"steps.{k}."
            own = {key.removeprefix(prefix): M for key, M in files.tensors.items() if key.startswith(prefix)}
            if entry["kind"] == "lben":
                stage = Stage.of(entry, own)
                self.steps.append(stage)
                shape = stage.shape
            elif entry["type"] == "Normalize":
                mean, std = (np.broadcast_to(own[name].astype(np.float64), shape[:1]) for name in ("mean", "std"))
                pixels = int(np.prod(shape[1:]))
                self.steps.append((np.diag(np.repeat(1.0 / std, pixels)), -np.repeat(mean / std, pixels)))
            elif entry["type"] == "MeanPool":
                c, h, w = shape
                r = entry["arguments"]["kernel_size"]
                P = np.zeros((c, h // r, w // r, c, h, w))
                for i, s, t in itertools.product(range(c), range(h), range(w)):
                    P[i, s // r, t // r, i, s, t] = 1.0 / r
                shape = (c, h // r, w // r)
                self.steps.append((P.reshape(int(np.prod(shape)), -1), 0.0))
            else:
                assert entry["type"] == "Flatten"
                shape = (int(np.prod(shape)),)

    @property
    def stages(self) -> list[Stage]:
        return [step for step in self.steps if isinstance(step, Stage)]

    def logits(self, x: np.ndarray, which: str = "W") -> np.ndarray:
        """(B, *input_shape) → (B, q)."""
        x = flattened(x)
        for step in self.steps:
            x = step.run(x, which)[0] if isinstance(step, Stage) else x @ step[0].T + step[1]
        return x

    def gradient(self, x: np.ndarray, g: np.ndarray) -> np.ndarray:
        """Of ⟨g, y⟩ at each x, g (B, q): (B, *input_shape)."""
        flat, tape = flattened(x), []
        for step in self.steps:
            if isinstance(step, Stage):
                flat, slopes = step.run(flat)
                tape.append(slopes)
            else:
                flat = flat @ step[0].T + step[1]
        for step in reversed(self.steps):
            g = step.pull(g, tape.pop()) if isinstance(step, Stage) else g @ step[0]
        return g.reshape(x.shape)


# ---- what a user would lose


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def differences(y: np.ndarray) -> np.ndarray:
    return y[:, :, None] - y[:, None, :]


@dataclass
class Honest:
    """A checkpoint as `lipconvert.save` writes it, and the errors its graph states (where it states a radius, or would)."""

    files: Files
    errors: np.ndarray


def lost(path: Path, files: Files, honest: Honest) -> list[str]:
    """What is not true of files that are believed: claims better than their proof, other answers, broken radii."""
    truth = Truth(files)
    found = [*_claims(files, honest, truth)]
    if files.model is not None:
        found += _answers(session(path), files, honest, truth)
    return found


# By what factors an honest writer claims less than was proved; what is between is true.
OUTWARDS = {
    name: 1.0 + share * (1.0 - 1e-6)
    for name, share in {"rounding": 1e-6, "skipped": 1e-6, "lipschitz": 1e-6, "pairs": 1e-6, "errors": 2e-2}.items()
}

DERIVED = ("W", "multiplier", "metric", "pairs", "errors")


def _claims(files: Files, honest: Honest, truth: Truth) -> list[str]:
    """Claims of the manifest and the tensors: (10) and (3) by eigenvalues, paper eq. (2), the rest by the honest ones."""
    found = []
    given, ours = files.manifest, honest.files.manifest  # the former may leave out what is empty or null
    eps = np.finfo(given["dtype"]).eps
    for k, stage in zip(files.stages, truth.stages, strict=True):
        entry, own = given["steps"][k], ours["steps"][k]
        n = len(stage.W) // stage.pixels
        most = (64 + 4 * n) * eps * max(1.0, float(np.abs(stage.rebuilt).max()))
        if not np.abs(stage.W - stage.rebuilt).max() <= most:
            found.append(f"stage {k}: W is not what the parameters give")
        certificate = entry.get("certificate")
        if certificate is not None:
            Lambda, P = (
                np.repeat(files.tensors[f"steps.{k}.{name}"].astype(np.float64), stage.pixels)
                for name in ("multiplier", "metric")
            )
            L, LW = certificate["lipschitz"], Lambda[:, None] * stage.W
            LU = Lambda[:, None] * stage.U
            H = 2 * np.diag(Lambda) - LW - LW.T - stage.G.T @ stage.G / L - LU @ LU.T / L
            root = np.sqrt(np.outer(Lambda, Lambda))
            if not np.linalg.eigvalsh(H / root)[0] > -1e-13:
                found.append(f"stage {k}: condition (10) does not hold at L = {L:.9g}")
            if not entry["lipschitz"] * (1.0 + certificate["delta"]) * (1.0 + 1e-15) >= L:
                found.append(f"stage {k}: L is not the prescribed one times 1 + delta")
            PW = P[:, None] * stage.W
            X = (2 * np.diag(P) - PW - PW.T) / np.sqrt(np.outer(P, P))
            if not 2.0 * certificate["mu"] <= np.linalg.eigvalsh(X)[0] * (1.0 + 1e-12) + 1e-14:
                found.append(f"stage {k}: condition (3) does not hold with mu = {certificate['mu']:.9g}")
            same = own["certificate"] is not None and certificate["lipschitz"] <= own["certificate"]["lipschitz"]
            if same and certificate["rounding"] < own["certificate"]["rounding"] / OUTWARDS["rounding"]:
                found.append(f"stage {k}: a rounding error less than was proved")
        plan, own_plan = entry.get("graph"), own["graph"]
        if plan is not None and own_plan is not None and plan["skipped"] < own_plan["skipped"] / OUTWARDS["skipped"]:
            found.append(f"stage {k}: more of W is skipped than is said")
    count = len(given.get("class_names", []))
    if count not in (0, truth.logits(np.zeros((1, *truth.shape))).shape[1]):
        found.append(f"{count} class names")
    unchanged = all(
        np.array_equal(files.tensors.get(name, np.nan), M)
        for name, M in honest.files.tensors.items()
        if name.rsplit(".", 1)[-1] not in DERIVED
    )
    if unchanged and ours["bound"] is not None and given.get("bound") is not None:
        if given["bound"]["lipschitz"] < ours["bound"]["lipschitz"] / OUTWARDS["lipschitz"]:
            found.append("a constant of the logits less than was proved")
        for name in ("pairs", "errors"):
            if name in files.tensors and not (files.tensors[name] >= honest.files.tensors[name] / OUTWARDS[name]).all():
                found.append(f"{name} less than was proved")
    return found


def _inputs(truth: Truth, dtype: str) -> np.ndarray:
    """Pixels, normal numbers, and inputs that turn single states of the first stage on and off."""
    shape = truth.shape
    generator = np.random.default_rng(0)
    parts = [
        generator.random((100, *shape)),
        generator.standard_normal((100, *shape)),
        10.0 * generator.standard_normal((50, *shape)),
    ]
    A, c = np.eye(int(np.prod(shape))), np.zeros(1)
    for step in truth.steps:
        if isinstance(step, Stage):
            rows, levels = step.U @ A, step.b_z + step.U @ (c + np.zeros(len(A)))
            size = (rows**2).sum(1)
            for k in np.flatnonzero(size > 1e-6)[:: max(1, len(rows) // 32)]:
                reach = np.array([-2.0, -1.0, 1.0, 2.0]) * (1.0 + abs(levels[k])) / size[k]
                parts.append((reach[:, None] * rows[k]).reshape(4, *shape))
            break
        A, c = step[0] @ A, step[0] @ (c + np.zeros(step[0].shape[1])) + step[1]
    return np.concatenate(parts).astype(dtype)


def _answers(runner: onnxruntime.InferenceSession, files: Files, honest: Honest, truth: Truth) -> list[str]:
    """Answers of the graph that are off by more than it states, and points within a radius that have another class."""
    dtype = files.manifest["dtype"]
    errors = files.tensors.get("errors", honest.errors)
    names = [value.name for value in runner.get_outputs()]
    agreement = 1e-5 if dtype == "float32" else 1e-10

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, runner.run(None, {"input": x}), strict=True))

    def excess(x: np.ndarray) -> np.ndarray:
        y = run(x)["logits"].astype(np.float64)
        size = np.linalg.norm(flattened(x), axis=1)
        allowed = errors[0] + errors[1] * size[:, None, None] + np.finfo(np.float64).tiny
        worst = np.full(len(x), np.inf)
        for which in ("W", "rebuilt"):
            exact = truth.logits(x, which)
            off = np.abs(differences(y) - differences(exact)) / allowed
            scale = np.abs(exact).max(1, keepdims=True) + size[:, None]
            alone = np.abs(y - exact) / (agreement * scale)
            worst = np.minimum(worst, np.maximum(off.max((1, 2)), alone.max(1)))
        return np.where(np.isnan(worst), np.inf, worst)

    found = []
    x = _inputs(truth, dtype)
    # uphill from where the answers are furthest off
    generator = np.random.default_rng(1)
    best = excess(x)
    for step in (1.0, 0.3, 0.1):
        top = x[np.argsort(-best)[:8]]
        moved = top[:, None] + step * generator.standard_normal((8, 16, *truth.shape))
        moved = moved.reshape(-1, *truth.shape).astype(dtype)
        x, best = np.concatenate([x, moved]), np.concatenate([best, excess(moved)])
    if not best.max() <= 1.0:
        found.append(f"answers are off by {best.max():.3g} times what is stated")
    if "radius" not in names:
        return found
    first = run(x)
    radius, label = first["radius"], first["logits"].argmax(1)
    known = radius > 0.0
    x, radius, label = x[known], radius[known], label[known]
    broken = silent = 0
    for rival in range(first["logits"].shape[1]):
        here, goal = x[label != rival], label[label != rival]
        r = radius[label != rival]
        if not len(here):
            continue
        g = np.zeros((len(here), first["logits"].shape[1]))
        g[np.arange(len(here)), goal], g[:, rival] = -1.0, 1.0
        at = here
        for _ in range(3):
            direction = flattened(truth.gradient(at, g))
            direction /= np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1e-300)
            reach = (r * (1.0 - 1e-8))[:, None] * direction
            at = (here.astype(np.float64) + reach.reshape(here.shape)).astype(dtype)
            inside = np.linalg.norm(flattened(at) - flattened(here), axis=1) < r
            y = run(at)["logits"]
            none = np.isnan(y).any(1)
            silent += int((inside & none).sum())
            broken += int((inside & ~none & (y.argmax(1) != goal)).sum())
    if broken:
        found.append(f"{broken} points within a stated radius have another class")
    if silent:
        found.append(f"{silent} points within a stated radius have no answer")
    return found
