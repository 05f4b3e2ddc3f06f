"""Everything lipconvert writes or reads as JSON, as pydantic models; ``schemas/*.schema.json`` is generated from them.

``make schemas`` writes them; a test compares them with the ones in the repository.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, JsonValue, model_validator

from .escaping import printable
from .foundation.files import whole

Probability = Annotated[float, Field(ge=0.0, le=1.0)]

# Of what comes in a file: the first entry that is wrong is told, not a million of them.
Size = Annotated[int, Field(ge=0, lt=2**63)]
Shape = Annotated[list[Size], FailFast(), Field(max_length=8)]
Image = Annotated[list[int], FailFast(), Field(max_length=8)]


def json_text(document: Any, indent: int | None = None) -> str:
    """JSON in ASCII: whatever names are in it, it may be shown on any terminal, and be written to any stream."""
    return json.dumps(document, indent=indent, ensure_ascii=True, allow_nan=False)


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def write(self, path: str | Path) -> None:
        """Write as indented JSON, whole or not at all."""
        with whole(path) as partial:
            partial.write_text(json_text(self.model_dump(mode="json"), indent=2) + "\n", encoding="ascii")


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


Method = Literal["prescribed", "pairwise", "tightened"]
Search = Literal["prescribed", "pairwise", "tightened", "sdp"]


class StageProof(_Document):
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


class MethodResult(_Document):
    """Certified accuracy by one method."""

    method: Method
    certified_accuracy: list[Probability] = Field(description="at the report's radii")
    curve_accuracy: list[Probability] = Field(description="at the report's curve_radii")
    lipschitz: float = Field(ge=0.0, description="constant of the logits as a vector, proved by this method")
    least_pair: float = Field(ge=0.0, description="least constant of a logit difference y_i − y_j")
    greatest_pair: float = Field(ge=0.0, description="greatest constant of a logit difference, at most √2·lipschitz")
    seconds: float = Field(ge=0.0, description="time to find and prove the constants")


class AttackConfig(_Document):
    """An attack to run beside a certificate."""

    method: Literal["pgd", "apgd", "ensemble"] = "pgd"
    steps: int = Field(default=50, ge=1)
    restarts: int = Field(default=1, ge=1)
    box: tuple[float, float] | None = Field(default=None, description="keep pixels inside; null: the whole l2 ball")
    samples: int | None = Field(default=None, ge=1, description="attack the first ones only; null: all")
    seed: int = Field(default=0, ge=0)


class AttackResult(_Document):
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


class RobustnessReport(_Document):
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


GraphMethod = Literal["substitution", "convolutions", "sweeps", "splitting"]


class GraphEntry(_Document):
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


class StageCertificate(_Document):
    """What was proved of the W, U and G that are stored; the tensors ``multiplier`` and ``metric`` are the proofs."""

    lipschitz: float = Field(gt=0.0, description="H(multiplier, lipschitz) ≻ 0: condition (10)")
    delta: float = Field(ge=0.0, description="lipschitz is the prescribed constant times 1 + δ")
    mu: float = Field(gt=0.0, description="X(metric) ⪰ 2μ·metric: condition (3), well-posed")
    rounding: float = Field(ge=0.0, description="bound of the rounding error of H that the proof allows for")


class PluginSource(_Document):
    """A plugin that described part of a model."""

    name: str
    distribution: str
    version: str


class Provenance(_Document):
    """Where a converted network comes from."""

    model: str = Field(description="type of the source model")
    sha256: str = Field(description="of its state dict: names, dtypes, shapes and bytes in order of names")
    plugins: Annotated[list[PluginSource], FailFast()]
    versions: dict[str, str] = Field(max_length=100, description="of lipconvert and torch at conversion")


class TrainingSummary(_Document):
    """What was done to a network after conversion, in the words of who did it."""

    data: str = ""
    epochs: int | None = Field(default=None, ge=0)
    notes: dict[str, str | float | int | bool | None] = Field(default={}, max_length=1000)


class PairBound(_Document):
    """The proved constant of one logit difference y_i − y_j."""

    i: int = Field(ge=0)
    j: int = Field(ge=0)
    lipschitz: float = Field(ge=0.0)


class LipschitzReport(_Document):
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


class LogitBound(_Document):
    """Constants proved of the logits; those of their differences are the tensor ``pairs``."""

    method: Method
    lipschitz: float = Field(ge=0.0, description="of the logits as a vector")


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
    graph: GraphEntry | None = Field(default=None, description="of a checkpoint with a graph")
    certificate: StageCertificate | None = Field(default=None, description="of a checkpoint")


class NetworkInfo(_Document):
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
    arguments: dict[str, str | float | int | list[int] | list[float] | None] = Field(max_length=10)


class StageEntry(_Document):
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


class TensorEntry(_Document):
    """A tensor of a checkpoint."""

    name: str
    dtype: Literal["float32", "float64"]
    shape: Shape
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of its bytes, little-endian, row by row")


FORMAT_VERSION = 2


class Manifest(_Document):
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


class Claim(_Document):
    """One thing a checkpoint claims, and what was found."""

    claim: str
    where: str = Field(description="a file, a stage, or the network")
    passed: bool | None = Field(description="null: it could not be checked, so nothing is known of it")
    found: str = Field(description="the numbers, in words")


class VerificationReport(_Document):
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


class _Options(_Document):
    """Options as people write them: true and false are no numbers, though Python has them as 1 and 0."""

    @model_validator(mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields and cls.model_fields[name].annotation is not bool:
                raise ValueError(f"{name} must be a number or words, not {str(value).lower()}")
        return given


Pair = tuple[float, float]
Factor = Annotated[float, Field(ge=0.0)]


class AugmentConfig(_Options):
    """Random changes of training images, each sample its own: those of SLL (Araujo et al. 2023), none by default."""

    crop: int = Field(default=0, ge=0, description="pixels of padding on each side before a crop of the old size")
    padding: Literal["reflect", "zeros"] = Field(default="reflect", description="what the padding holds")
    flip: bool = Field(default=False, description="left to right, half of the samples")
    brightness: Pair = Field(default=(1.0, 1.0), description="range of the factor; (1, 1): none")
    contrast: Pair = Field(default=(1.0, 1.0), description="range of the factor; (1, 1): none")
    saturation: Pair = Field(default=(1.0, 1.0), description="range of the factor; (1, 1): none")
    hue: float = Field(default=0.0, ge=0.0, le=0.5, description="largest shift, as a part of the colour circle")

    @model_validator(mode="after")
    def _ranges(self) -> AugmentConfig:
        for name in ("brightness", "contrast", "saturation"):
            low, high = getattr(self, name)
            if not 0.0 <= low <= high:
                raise ValueError(f"{name} must be two numbers, the smaller first, none of them negative")
        return self

    @property
    def colours(self) -> bool:
        """Whether colours are changed."""
        ranges = (self.brightness, self.contrast, self.saturation)
        return self.hue > 0.0 or any(pair != (1.0, 1.0) for pair in ranges)


class LossConfig(_Options):
    """CE((y − √2·L·offset·onehot)/T)·T: asks the label to lead by the margin that certifies the radius ``offset``."""

    offset: float = Field(default=1.0, ge=0.0, description="a radius, in the units of the input")
    temperature: float = Field(default=0.25, gt=0.0, description="T")


class ScheduleConfig(_Options):
    """The learning rate over the run, as a factor of ``learning_rate``.

    ``triangular``: up to 1 at 2/5 of the run, down to 1/20 at 4/5, then to 0. ``one_cycle``: up for
    ``warm_up`` of the run, then down to 0, both along a cosine. ``linear``: the same along straight lines. ``constant``: 1.
    """

    kind: Literal["triangular", "one_cycle", "linear", "constant"] = "one_cycle"
    warm_up: float = Field(default=0.15, ge=0.0, lt=1.0, description="part of the run; of one_cycle and linear")


class LearningRates(_Options):
    """Factors of the learning rate for each group of parameters of the stages; 0 freezes a group, as it is once balanced."""

    Psi: Factor = 1.0
    G: Factor = 1.0
    U: Factor = 1.0
    V: Factor = 1.0
    S: Factor = 1.0
    b: Factor = 1.0


class PenaltyConfig(_Options):
    """weight·‖W outside its support at the start‖, for the kernels W of stages on images. (paper 4.1)"""

    weight: float = Field(default=0.0, ge=0.0, description="0: none; the paper has 0.1")
    norm: Literal["l1", "l2"] = "l1"
    freeze: bool = Field(
        default=False, description="entries of G, U, V and S outside the support of the start keep their values"
    )


class TrainingConfig(_Options):
    """How a network is trained or fine-tuned. All randomness is a function of ``seed`` and the step."""

    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=256, ge=1, description="of all processes together")
    optimizer: Literal["adam", "muon"] = Field(
        default="adam",
        description="muon: matrices by torch.optim.Muon (momentum, about orthogonalised in bfloat16 whatever the precision), "
        "kernels and vectors by Adam",
    )
    learning_rate: float = Field(
        default=1e-3, gt=0.0, description="at the peak of the schedule; Muon's steps are scaled to the size of Adam's"
    )
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (0.9, 0.999)
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0, description="of Muon")
    weight_decay: float = Field(default=0.0, ge=0.0, description="in Adam's gradient; decoupled in Muon")
    clip: float | None = Field(default=None, gt=0.0, description="largest norm of the gradient")
    schedule: ScheduleConfig = ScheduleConfig()
    learning_rates: LearningRates = Field(default=LearningRates(), description="of the stages of a converted network")
    stages: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, min_length=1, description="the stages of a converted network that are trained, from 0; null: all"
    )
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    penalty: PenaltyConfig = PenaltyConfig()
    balance: bool = Field(
        default=True,
        description="scale the states so that Ψ = I, and keep it, where activations are homogeneous and ε = 0 or Ψ = ψI: the "
        "same function. Stages of which the caller has frozen parameters stay as they are",
    )
    epsilon: float | None = Field(
        default=None,
        ge=0.0,
        description="ε of the stages that are trained, in the gauge of training: W − εΨ has the same L and is well-posed; "
        "null: as it is",
    )
    roots: float = Field(
        default=0.0,
        ge=0.0,
        description="size of random entries in rows of V that are zero, which no gradient moves (within the "
        "support, where penalty.freeze keeps it)",
    )
    tolerance: float = Field(default=1e-3, gt=0.0, description="of equilibria while training; never of certificates")
    precision: Literal["bf16-mixed", "32-true", "64-true"] = Field(
        default="32-true", description="bf16 is for glue and explicit layers: parameters and equilibria have 32 bits"
    )
    compile: bool = Field(
        default=False,
        description="torch.compile of explicit source networks: pays after about a thousand steps; needs a C++ compiler",
    )
    held_out: int = Field(default=0, ge=0, description="training samples kept for validation, where no other are given")
    validation_samples: int | None = Field(default=None, ge=1, description="of the validation set; null: all")
    radii: list[Annotated[float, Field(ge=0.0)]] = Field(
        default=[36 / 255, 72 / 255, 108 / 255, 1.0], min_length=1, description="l2, for certified accuracy"
    )
    keep: Literal["best", "last"] = Field(
        default="best", description="by the mean of certified accuracy over the radii"
    )
    patience: int | None = Field(default=None, ge=1, description="stop after so many epochs without a better one")
    seed: int = Field(default=0, ge=0, lt=2**63)
    accelerator: Literal["auto", "cpu", "cuda"] = "cpu"
    devices: int = Field(default=1, ge=1, description="processes on this machine, each with a share of every batch")


class EpochRecord(_Document):
    """One epoch: what was learnt, and what was proved of the weights at its end."""

    epoch: int = Field(ge=0, description="0: before training")
    step: int = Field(ge=0)
    learning_rate: float = Field(ge=0.0, description="of the next step, 0 at the end")
    loss: float | None = Field(default=None, description="mean over the epoch; null before training")
    penalty: float | None = Field(default=None, description="mean over the epoch; null without one")
    natural_accuracy: Probability | None = Field(default=None, description="of the validation samples")
    certified_accuracy: list[Probability] = Field(default=[], description="at the radii of the config, by prescribed L")
    least_eigenvalue: float = Field(description="of H(Ψ⁻¹, L) in the gauge Ψ = I, the least over the stages")
    lipschitz: float = Field(gt=0.0, description="prescribed")
    proved_lipschitz: float = Field(gt=0.0, description="for the floats of the network in float64")
    delta: float = Field(ge=0.0, description="largest δ of the stages: L was proved at L(1 + δ)")
    seconds: float = Field(ge=0.0, description="of training, without what is measured here")


class FinetuneReport(_Document):
    """What `lipconvert.finetune` and `lipconvert.train` return and write: the run, epoch by epoch."""

    model: str = Field(description="what was trained, in the caller's words")
    data: str
    train_samples: int = Field(ge=1)
    validation_samples: int = Field(ge=0)
    config: TrainingConfig
    history: list[EpochRecord] = Field(min_length=1, description="before training, and after each epoch")
    kept: int = Field(ge=0, description="the epoch whose weights the network has now")
    stopped_early: bool
    processes: int = Field(ge=1)
    device: str
    versions: dict[str, str]
    seconds: float = Field(ge=0.0)


class ModelConfig(_Document):
    """A source network: what is called, and with what."""

    factory: str = Field(description="package.module:name")
    arguments: dict[str, JsonValue] = Field(default={}, description="keyword arguments")
    mean: list[float] | None = Field(default=None, description="of a Normalize in front of it, one per channel")
    std: list[Annotated[float, Field(gt=0.0)]] | None = Field(
        default=None, description="of the Normalize, 1 by default; L is multiplied by 1/min(std)"
    )
    unshuffle: int = Field(
        default=1, ge=1, description="pixels of s x s blocks become channels before it (PixelUnshuffle)"
    )


class ConversionConfig(_Document):
    """How a source network is converted. (`lipconvert.convert`)"""

    epsilon: float = Field(default=0.0, ge=0.0)
    delta: float = Field(default=0.0, ge=0.0)
    merge: bool = False
    dense: bool = False


class PaperRow(_Document):
    """A row of Table 1 of Havens et al. 2023."""

    model: str
    natural: Probability
    certified: list[Probability] = Field(min_length=4, max_length=4, description="at 36/255, 72/255, 108/255 and 1")


class Recipe(_Document):
    """A training run with all that it needs: one file, one command.

    Either ``model`` is trained from scratch, or the network of the recipe ``start`` is converted and fine-tuned.
    """

    title: str
    data: str = Field(description="as --data of the command line: mnist, parquet:DIR, ...")
    model: ModelConfig | None = None
    start: str | None = Field(default=None, description="another recipe, relative to this one")
    convert: ConversionConfig = ConversionConfig()
    training: TrainingConfig = TrainingConfig()
    method: Method = Field(default="tightened", description="the strongest to certify with; weaker ones come along")
    seconds: float | None = Field(default=None, gt=0.0, description="at most, for the search of multipliers of method")
    paper: PaperRow | None = None

    @model_validator(mode="after")
    def _one_start(self) -> Recipe:
        if (self.model is None) == (self.start is None):
            raise ValueError("either model or start is needed, and not both")
        if self.model is not None and self.convert != ConversionConfig():
            raise ValueError("convert goes with start: it says how that is converted before it is fine-tuned")
        if self.training.patience is not None and not self.training.held_out:
            raise ValueError(
                "training.patience needs training.held_out: there are no other samples to be patient about"
            )
        return self

    def makes(self) -> Recipe:
        """What decides on the weights: without words, and without what is done with them afterwards."""
        return self.model_copy(update={"title": "", "paper": None, "method": "tightened", "seconds": None})


class RecipeResult(_Document):
    """What came of a recipe with one seed, certified on the test set in float64."""

    name: str = Field(description="of the recipe's file, without its suffix")
    recipe: Recipe
    starts: list[Recipe] = Field(default=[], description="the recipes it started from, the first of them last")
    seed: int
    limit: int | None = Field(default=None, description="of training and test samples, where it was tried out")
    samples: int = Field(ge=1, description="of the test set")
    natural_accuracy: Probability
    radii: list[float]
    methods: list[Method] = Field(min_length=1, description="weakest first")
    certified_accuracy: list[list[Probability]] = Field(description="for each method, at each radius")
    proved_lipschitz: float = Field(gt=0.0)
    parameters: int = Field(ge=0, description="of what was trained: the source network, or the converted one")
    epochs: int = Field(ge=0, description="of this recipe alone")
    seconds: float = Field(ge=0.0, description="of training, of this recipe alone")
    threads: int = Field(ge=1)
    device: str
    versions: dict[str, str]
    commit: str = Field(default="", description="of the recipe's repository, + where files differ from it")


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


class DemoReport(_Document):
    """What ``lipconvert demo`` writes to report.json."""

    data: str
    train_samples: int = Field(ge=1)
    test_samples: int = Field(ge=1)
    config: TrainingConfig
    versions: dict[str, str]
    rows: list[DemoRow]


DOCUMENTS: dict[str, type[_Document]] = {
    "attack-config": AttackConfig,
    "conversion-report": ConversionReport,
    "demo-report": DemoReport,
    "finetune-report": FinetuneReport,
    "lipschitz-report": LipschitzReport,
    "manifest": Manifest,
    "network-info": NetworkInfo,
    "plugin-list": PluginList,
    "recipe": Recipe,
    "recipe-result": RecipeResult,
    "robustness-report": RobustnessReport,
    "training-config": TrainingConfig,
    "validation-report": ValidationReport,
    "verification-report": VerificationReport,
}


def schema_text(name: str) -> str:
    """The JSON schema of one document as it stands in ``schemas/``."""
    schema = DOCUMENTS[name].model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def main(directory: str) -> None:
    """Write ``<name>.schema.json`` for every document."""
    for name in DOCUMENTS:
        with whole(Path(directory, f"{name}.schema.json")) as partial:
            partial.write_text(schema_text(name), encoding="utf-8")
