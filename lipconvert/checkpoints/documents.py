"""The manifest of a checkpoint, and what checking its claims found."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import FailFast, Field

from ..escaping import printable
from ..foundation.documents import Document, Image, Shape
from ..networks.documents import GraphEntry, LogitBound, Provenance, StageCertificate, TrainingSummary


class GlueEntry(Document):
    """A glue module in a checkpoint: its type and constructor arguments."""

    kind: Literal["glue"] = "glue"
    type: str
    arguments: dict[str, str | float | int | list[int] | list[float] | None] = Field(max_length=10)


class StageEntry(Document):
    """An LBEN stage in a checkpoint: what its tensors do not say."""

    kind: Literal["lben"] = "lben"
    name: str
    inputs: int = Field(ge=1)
    states: int = Field(ge=1)
    outputs: int = Field(ge=1)
    lipschitz: float = Field(gt=0.0)
    epsilon: float = Field(ge=0.0)
    activations: Annotated[list[tuple[str, int]], FailFast()] = Field(min_length=1)
    blocks: Annotated[list[int], FailFast()] = Field(min_length=1)
    image: Image = Field(default=[])
    origin: Image = Field(default=[], description="offset of the first stored tap of the kernels W")
    graph: GraphEntry | None = Field(default=None, description="null in a file without a graph")
    certificate: StageCertificate | None = Field(default=None, description="null: nothing was proved")


class TensorEntry(Document):
    """A tensor of a checkpoint."""

    name: str
    dtype: Literal["float32", "float64"]
    shape: Shape
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of its bytes, little-endian, row by row")


FORMAT_VERSION = 2


class Manifest(Document):
    """What a checkpoint says of itself, in the metadata of its data file (``lipconvert``) and of its graph."""

    format_version: Literal[2] = FORMAT_VERSION
    versions: dict[str, str] = Field(
        max_length=100, description="of lipconvert, onnx and onnx_ir, which wrote the graph"
    )
    input_shape: Shape
    dtype: Literal["float32", "float64"]
    steps: Annotated[list[Annotated[StageEntry | GlueEntry, Field(discriminator="kind")]], FailFast()] = Field(
        max_length=1000
    )
    tensors: Annotated[list[TensorEntry], FailFast()] = Field(max_length=10_000)
    bound: LogitBound | None = Field(default=None, description="null: nothing was proved of the logits")
    class_names: Annotated[list[Annotated[str, Field(max_length=1000)]], FailFast()] = Field(
        default=[], description="as many as there are outputs, or none"
    )
    provenance: Provenance | None = None
    training: TrainingSummary | None = None


class Claim(Document):
    """One thing a checkpoint claims, and what was found."""

    claim: str
    where: str = Field(description="a file, a stage, or the network")
    passed: bool | None = Field(description="null: it could not be checked, so nothing is known of it")
    found: str = Field(description="the numbers, in words")


class VerificationReport(Document):
    """What ``lipconvert verify`` found; every claim was checked afresh from the files alone."""

    path: str
    claims: list[Claim] = Field(min_length=1)
    passed: bool = Field(description="every claim was checked, and holds")

    @property
    def refuted(self) -> bool:
        """Whether some claim was checked and does not hold."""
        return any(c.passed is False for c in self.claims)

    def failures(self) -> list[str]:
        """The claims that do not hold, or could not be checked, in words."""
        return [f"{c.claim} ({c.where}): {c.found}" for c in self.claims if not c.passed]

    def __str__(self) -> str:
        """One line for each claim, and how many are false, or not checked; fit for a terminal whatever names are in it."""
        words = {True: "ok         ", False: "FAILED     ", None: "not checked"}
        lines = [printable(f"{words[c.passed]}  {c.where}: {c.claim}: {c.found}") for c in self.claims]
        false, unknown = (sum(c.passed is state for c in self.claims) for state in (False, None))
        verdict = f"{len(lines)} claims, {false or 'none'} of them false"
        return "\n".join([*lines, verdict + (f"; not verified: {unknown} not checked" if unknown else "")])
