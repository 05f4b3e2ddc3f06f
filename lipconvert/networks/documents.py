"""What is said of a network as JSON: its stages, where it came from, how it was trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import FailFast, Field

from ..foundation.documents import Document

# By which search a constant was found; "sdp" can be asked for one alone.
Method = Literal["prescribed", "pairwise", "tightened"]
Search = Literal["prescribed", "pairwise", "tightened", "sdp"]

GraphMethod = Literal["substitution", "convolutions", "sweeps", "splitting"]


class GraphEntry(Document):
    """How a stage is written in the graph of a checkpoint."""

    function: str = Field(description="name of the model-local function, in the domain lipconvert")
    method: GraphMethod = Field(description="straight-line for the first two, a loop for the others")
    skipped: float = Field(
        ge=0.0, description="bound of the norm of what is not read of W; in sweeps, of W above its blocks"
    )
    tolerance: float = Field(default=0.0, ge=0.0, description="of a loop: NaN where the relative residual is larger")
    max_steps: int = Field(default=0, ge=0, le=10**9, description="of a loop")
    alpha: float = Field(default=1.0, gt=0.0, description="step of a splitting")
    inverse_steps: int = Field(default=0, ge=0, le=200, description="Newton-Schulz steps for its resolvent")


class StageCertificate(Document):
    """What was proved of the W, U and G that are stored; the tensors ``multiplier`` and ``metric`` are the proofs."""

    lipschitz: float = Field(gt=0.0, description="H(multiplier, lipschitz) ≻ 0: condition (10)")
    delta: float = Field(ge=0.0, description="lipschitz is the prescribed constant times 1 + δ")
    mu: float = Field(gt=0.0, description="X(metric) ⪰ 2μ·metric: condition (3), well-posed")
    rounding: float = Field(ge=0.0, description="bound of the rounding error of H that the proof allows for")


class PluginSource(Document):
    """A plugin that described part of a model."""

    name: str
    distribution: str
    version: str


class Provenance(Document):
    """Where a converted network comes from."""

    model: str = Field(description="type of the source model")
    sha256: str = Field(description="of its state dict: names, dtypes, shapes and bytes in order of names")
    plugins: Annotated[list[PluginSource], FailFast()]
    versions: dict[str, str] = Field(max_length=100, description="of lipconvert and torch at conversion")


class TrainingSummary(Document):
    """What was done to a network after conversion, in the words of who did it."""

    data: str = ""
    epochs: int | None = Field(default=None, ge=0)
    notes: dict[str, str | float | int | bool | None] = Field(default={}, max_length=1000)


class LogitBound(Document):
    """Constants proved of the logits; those of their differences are the tensor ``pairs``."""

    method: Method
    lipschitz: float = Field(ge=0.0, description="of the logits as a vector")


class StageInfo(Document):
    """One step of a converted network."""

    kind: Literal["lben", "glue"]
    name: str
    inputs: int | None = None
    states: int | None = None
    outputs: int | None = None
    image: list[int] = Field(default=[])
    blocks: list[int] = Field(default=[])
    activations: str = ""
    epsilon: float | None = None
    lipschitz: float = Field(gt=0.0)
    parameters: int = Field(ge=0)
    graph: GraphEntry | None = Field(default=None, description="of a checkpoint with a graph")
    certificate: StageCertificate | None = Field(default=None, description="of a checkpoint")


class NetworkInfo(Document):
    """What ``lipconvert info`` and ``lipconvert convert`` print about a network; the last fields are of checkpoints."""

    input_shape: list[int]
    lipschitz: float = Field(gt=0.0)
    parameters: int = Field(ge=0)
    dtype: str
    steps: list[StageInfo]
    bound: LogitBound | None = None
    pairs: tuple[float, float] | None = Field(
        default=None, description="least and greatest constant of logit differences"
    )
    class_names: list[str] = Field(default=[])
    provenance: Provenance | None = None
    training: TrainingSummary | None = None
