"""Recipes, their results, and the demo's report."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, JsonValue, model_validator

from ..certification.documents import RobustnessReport
from ..conversion.documents import ValidationReport
from ..foundation.documents import Document, Probability
from ..networks.documents import Method
from ..training.documents import TrainingConfig


class ModelConfig(Document):
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


class ConversionConfig(Document):
    """How a source network is converted. (`lipconvert.convert`)"""

    epsilon: float = Field(default=0.0, ge=0.0)
    delta: float = Field(default=0.0, ge=0.0)
    merge: bool = False
    dense: bool = False


class PaperRow(Document):
    """A row of Table 1 of Havens et al. 2023."""

    model: str
    natural: Probability
    certified: list[Probability] = Field(min_length=4, max_length=4, description="at 36/255, 72/255, 108/255 and 1")


class Recipe(Document):
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


class RecipeResult(Document):
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


class DemoRow(Document):
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


class DemoReport(Document):
    """What ``lipconvert demo`` writes to report.json."""

    data: str
    train_samples: int = Field(ge=1)
    test_samples: int = Field(ge=1)
    config: TrainingConfig
    versions: dict[str, str]
    rows: list[DemoRow]
