"""Everything lipconvert writes or reads as JSON, as pydantic models; ``schemas/*.schema.json`` is generated from them.

``make schemas`` writes them; a test compares them with the ones in the repository.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .files import whole

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def write(self, path: str | Path) -> None:
        """Write as indented JSON, whole or not at all."""
        with whole(path) as partial:
            partial.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


class CheckResult(_Document):
    """One measured number against its bound."""

    name: str = Field(description="what was measured")
    where: str = Field(description="network, or the stage it was measured on")
    value: float | None = Field(description="the number; null when it is not finite")
    bound: float = Field(description="what it is compared with")
    relation: Literal["<=", ">="] = Field(description="value relation bound must hold")
    passed: bool


class ValidationReport(_Document):
    """Source network against its DAE and its LBEN: numbers and a verdict."""

    model: str = Field(description="type of the source network")
    dtype: str = Field(description="dtype of the converted network")
    samples: int = Field(ge=1, description="inputs compared")
    lipschitz: float = Field(gt=0.0, description="L of the converted network")
    methods: list[str] = Field(description="solver of each stage")
    checks: list[CheckResult]
    passed: bool = Field(description="every check passed")

    def failures(self) -> list[str]:
        """The checks that failed, each in words."""
        return [f"{c.name} ({c.where}): {c.value} is not {c.relation} {c.bound:g}" for c in self.checks if not c.passed]

    def value(self, name: str) -> float:
        """The worst number measured under a name, over all stages (the least for lower bounds)."""
        found = [c for c in self.checks if c.name == name]
        values = [float("nan") if c.value is None else c.value for c in found]
        if not values:
            raise KeyError(name)
        return max(values) if found[0].relation == "<=" else min(values)


class RobustnessReport(_Document):
    """Natural and certified accuracy; radii are l2 in the units of the input (pixels in [0, 1])."""

    method: Literal["prescribed"] = Field(description="prescribed: margin > √2·L·ε with the network's own L")
    lipschitz: float = Field(gt=0.0, description="L of the network, input to logits")
    samples: int = Field(ge=1)
    natural_accuracy: Probability
    radii: list[float] = Field(description="ascending, in the same order as certified_accuracy")
    certified_accuracy: list[Probability]
    unconverged: int = Field(ge=0, description="samples whose solve did not converge: counted as not certified")
    worst_error: float = Field(ge=0.0, description="largest bound of the logits' solver error that was subtracted")


class StageInfo(_Document):
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


class NetworkInfo(_Document):
    """What ``lipconvert info`` and ``lipconvert convert`` print about a network."""

    input_shape: list[int]
    lipschitz: float = Field(gt=0.0)
    parameters: int = Field(ge=0)
    dtype: str
    steps: list[StageInfo]


class ConversionReport(_Document):
    """What ``lipconvert convert --json`` prints."""

    out: str | None = Field(description="the checkpoint; null when validation failed and nothing was written")
    network: NetworkInfo
    validation: ValidationReport


class PluginRecord(_Document):
    """One row of ``lipconvert plugins``."""

    name: str
    distribution: str
    version: str
    module: str
    hooks: list[str]
    paper: str = ""
    lipschitz: str = ""
    covers: str = ""
    error: str | None = None


class PluginList(_Document):
    """What ``lipconvert plugins`` prints."""

    plugins: list[PluginRecord]


class GlueEntry(_Document):
    """A glue module in a checkpoint: its type and constructor arguments."""

    kind: Literal["glue"] = "glue"
    type: str
    arguments: dict[str, str | float | int | list[int] | list[float] | None]


class StageEntry(_Document):
    """An LBEN stage in a checkpoint: what its tensors do not say."""

    kind: Literal["lben"] = "lben"
    name: str
    inputs: int = Field(ge=1)
    states: int = Field(ge=1)
    outputs: int = Field(ge=1)
    lipschitz: float = Field(gt=0.0)
    epsilon: float = Field(ge=0.0)
    activations: list[tuple[str, int]]
    blocks: list[int]
    image: list[int] = Field(default=[])


class Manifest(_Document):
    """The metadata entry ``lipconvert`` of a checkpoint in safetensors form."""

    format_version: Literal[1] = 1
    lipconvert_version: str
    input_shape: list[int]
    dtype: Literal["float32", "float64"]
    steps: list[Annotated[StageEntry | GlueEntry, Field(discriminator="kind")]]


class TrainConfig(_Document):
    """How the demo trains its small networks."""

    epochs: int = Field(default=24, ge=1)
    batch_size: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=3e-2, gt=0.0, description="peak of the one-cycle schedule")
    offset: float = Field(default=0.6, ge=0.0, description="radius asked for by the loss, in input units")
    temperature: float = Field(default=0.12, gt=0.0)
    seed: int = Field(default=0, ge=0)


class DemoRow(_Document):
    """One architecture of the demo."""

    architecture: str
    parameters: int = Field(ge=0, description="of the source network")
    lipschitz: float = Field(gt=0.0)
    max_output_difference: float = Field(ge=0.0, description="|source − LBEN|, largest entry over the test set")
    least_eigenvalue: float = Field(description="of H(Λ, L), the least over the stages")
    train_seconds: float = Field(ge=0.0)
    convert_seconds: float = Field(ge=0.0)
    validation: ValidationReport
    robustness: RobustnessReport
    curve_radii: list[float] = Field(description="radii of the certified-accuracy curve")
    curve_accuracy: list[Probability]


class DemoReport(_Document):
    """What ``lipconvert demo`` writes to report.json."""

    data: str
    train_samples: int = Field(ge=1)
    test_samples: int = Field(ge=1)
    config: TrainConfig
    versions: dict[str, str]
    rows: list[DemoRow]


DOCUMENTS: dict[str, type[_Document]] = {
    "conversion-report": ConversionReport,
    "demo-report": DemoReport,
    "manifest": Manifest,
    "network-info": NetworkInfo,
    "plugin-list": PluginList,
    "robustness-report": RobustnessReport,
    "train-config": TrainConfig,
    "validation-report": ValidationReport,
}


def schema_text(name: str) -> str:
    """The JSON schema of one document as it stands in ``schemas/``."""
    schema = DOCUMENTS[name].model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def main(directory: str) -> None:
    """Write ``<name>.schema.json`` for every document."""
    for name in DOCUMENTS:
        Path(directory, f"{name}.schema.json").write_text(schema_text(name), encoding="utf-8")
