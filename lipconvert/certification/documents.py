"""What is proved, certified and attacked, as JSON."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..foundation.documents import Document, Probability
from ..networks.documents import Method, Search


class StageProof(Document):
    """What was proved about one step of a network: ‖f(x) − f(x′)‖ ≤ ``proved`` ‖x − x′‖."""

    name: str
    kind: Literal["lben", "glue"]
    states: int | None = Field(default=None, description="rows of Λ; null for glue")
    prescribed: float = Field(gt=0.0, description="L the step was built with")
    proved: float | None = Field(description="least constant proved for the floats in use; null: none")
    delta: float | None = Field(default=None, description="the prescribed L was proved at L(1 + δ); null: it was not")
    mu: float | None = Field(
        default=None, description="proved μ with X(P) ⪰ 2μP in some diagonal metric P (well-posed)"
    )
    rounding: float | None = Field(
        default=None, description="bound of the rounding error of H that the proof allows for"
    )
    reason: str = Field(default="", description="why something was not proved")


class MethodResult(Document):
    """Certified accuracy by one method."""

    method: Method
    certified_accuracy: list[Probability] = Field(description="at the report's radii")
    curve_accuracy: list[Probability] = Field(description="at the report's curve_radii")
    lipschitz: float = Field(ge=0.0, description="constant of the logits as a vector, proved by this method")
    least_pair: float = Field(ge=0.0, description="least constant of a logit difference y_i − y_j")
    greatest_pair: float = Field(ge=0.0, description="greatest constant of a logit difference, at most √2·lipschitz")
    seconds: float = Field(ge=0.0, description="time to find and prove the constants")


class AttackConfig(Document):
    """An attack to run beside a certificate."""

    method: Literal["pgd", "apgd", "ensemble"] = "pgd"
    steps: int = Field(default=50, ge=1)
    restarts: int = Field(default=1, ge=1)
    box: tuple[float, float] | None = Field(default=None, description="keep pixels inside; null: the whole l2 ball")
    samples: int | None = Field(default=None, ge=1, description="attack the first ones only; null: all")
    seed: int = Field(default=0, ge=0)


class AttackResult(Document):
    """Accuracy under an l2 attack: the true robust accuracy lies between certified_accuracy and attacked_accuracy."""

    method: Literal["pgd", "apgd", "ensemble"]
    steps: int = Field(ge=1)
    restarts: int = Field(ge=1)
    box: tuple[float, float] | None = Field(default=None, description="pixels kept inside; null: the whole l2 ball")
    samples: int = Field(ge=1, description="samples attacked, the first ones")
    attacked_accuracy: list[Probability] = Field(description="at the report's radii")
    gap_closed: list[float | None] = Field(
        description="share of attacked − prescribed that the report's method certifies; null where there is no gap"
    )
    broken: int = Field(ge=0, description="certified samples an attack has broken: anything but 0 is a bug")
    seconds: float = Field(ge=0.0)


class RobustnessReport(Document):
    """Natural and certified accuracy; radii are l2 in the units of the input (pixels in [0, 1]).

    A sample is certified at ε if it is classified correctly and no input within ε, evaluated in the network's own floats,
    gets another class: margin − error > K_ij ε for every other class, K_ij a proved constant of y_i − y_j.
    """

    model: str = Field(default="", description="what was certified, in the caller's words")
    data: str = Field(default="", description="on what")
    dtype: str = Field(description="dtype of the network, for whose floats the certificate holds")
    method: Method = Field(description="the strongest method that was run; certified_accuracy is by it")
    lipschitz: float = Field(gt=0.0, description="L the network was built with, input to logits")
    proved_lipschitz: float = Field(ge=0.0, description="least constant proved, input to logits")
    empirical_lipschitz: float | None = Field(default=None, description="a quotient that was met: a lower bound")
    delta: float = Field(ge=0.0, description="largest δ of the stages: L was proved at L(1 + δ)")
    samples: int = Field(ge=1)
    natural_accuracy: Probability
    radii: list[float] = Field(min_length=1, description="ascending, in the same order as certified_accuracy")
    certified_accuracy: list[Probability]
    unconverged: int = Field(ge=0, description="samples whose solve did not converge: counted as not certified")
    worst_error: float = Field(ge=0.0, description="largest bound of the error of a logit difference at a sample")
    methods: list[MethodResult] = Field(min_length=1, description="every method up to the strongest, weakest first")
    curve_radii: list[float] = Field(description="ascending from 0, for the figure")
    sample_radii: list[float] = Field(description="certified radius of every sample; 0: none")
    margins: list[float] = Field(description="y_label − max y_j of every sample, as evaluated; 0 for unconverged ones")
    stages: list[StageProof]
    attack: AttackResult | None = None


class PairBound(Document):
    """The proved constant of one logit difference y_i − y_j."""

    i: int = Field(ge=0)
    j: int = Field(ge=0)
    lipschitz: float = Field(ge=0.0)


class LipschitzReport(Document):
    """What ``lipconvert tighten`` prints: the best constants that were proved for a network."""

    method: Search
    dtype: str = Field(description="dtype of the network, for whose floats the proofs hold")
    prescribed: float = Field(gt=0.0, description="L the network was built with")
    lipschitz: float = Field(ge=0.0, description="proved constant of the output as a vector")
    empirical: float | None = Field(default=None, description="a quotient that was met: a lower bound")
    pairs: list[PairBound] = Field(
        default=[], description="of logit differences, where the output is a vector of logits"
    )
    stages: list[StageProof]
    seconds: float = Field(ge=0.0)
