"""How a run trains, and what it reports epoch by epoch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..foundation.documents import Document, Options, Probability

Pair = tuple[float, float]


Factor = Annotated[float, Field(ge=0.0)]


class AugmentConfig(Options):
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


class LossConfig(Options):
    """CE((y − √2·L·offset·onehot)/T)·T: asks the label to lead by the margin that certifies the radius ``offset``."""

    offset: float = Field(default=1.0, ge=0.0, description="a radius, in the units of the input")
    temperature: float = Field(default=0.25, gt=0.0, description="T")


class ScheduleConfig(Options):
    """The learning rate over the run, as a factor of ``learning_rate``.

    ``triangular``: up to 1 at 2/5 of the run, down to 1/20 at 4/5, then to 0. ``one_cycle``: up for
    ``warm_up`` of the run, then down to 0, both along a cosine. ``linear``: the same along straight lines. ``constant``: 1.
    """

    kind: Literal["triangular", "one_cycle", "linear", "constant"] = "one_cycle"
    warm_up: float = Field(default=0.15, ge=0.0, lt=1.0, description="part of the run; of one_cycle and linear")


class LearningRates(Options):
    """Factors of the learning rate for each group of parameters of the stages; 0 freezes a group, as it is once balanced."""

    Psi: Factor = 1.0
    G: Factor = 1.0
    U: Factor = 1.0
    V: Factor = 1.0
    S: Factor = 1.0
    b: Factor = 1.0


class PenaltyConfig(Options):
    """weight·‖W outside its support at the start‖, for the kernels W of stages on images. (paper 4.1)"""

    weight: float = Field(default=0.0, ge=0.0, description="0: none; the paper has 0.1")
    norm: Literal["l1", "l2"] = "l1"
    freeze: bool = Field(
        default=False, description="entries of G, U, V and S outside the support of the start keep their values"
    )


class TrainingConfig(Options):
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


class EpochRecord(Document):
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


class FinetuneReport(Document):
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
