"""What a conversion and its validation report."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..foundation.documents import Document
from ..networks.documents import NetworkInfo


class CheckResult(Document):
    """One measured number against its bound."""

    name: str = Field(description="what was measured")
    where: str = Field(description="network, or the stage it was measured on")
    value: float | None = Field(description="the number; null when it is not finite")
    bound: float = Field(description="what it is compared with")
    relation: Literal["<=", ">="] = Field(description="value relation bound must hold")
    passed: bool


class ValidationReport(Document):
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


class ConversionReport(Document):
    """What ``lipconvert convert --json`` prints."""

    out: str | None = Field(description="the checkpoint; null when validation failed and nothing was written")
    network: NetworkInfo
    validation: ValidationReport
