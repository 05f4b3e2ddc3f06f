"""Every document that lipconvert writes or reads as JSON; ``schemas/*.schema.json`` is generated from them.

``make schemas`` writes them; a test compares them with the ones in the repository. Each is defined where it belongs, in the
``documents.py`` of its package.
"""

from __future__ import annotations

import json
from pathlib import Path

from .certification.documents import AttackConfig, LipschitzReport, RobustnessReport
from .checkpoints.documents import Manifest, VerificationReport
from .conversion.documents import ConversionReport, ValidationReport
from .experiments.documents import DemoReport, Recipe, RecipeResult
from .foundation.documents import Document
from .foundation.files import whole
from .networks.documents import NetworkInfo
from .plugin_api.documents import PluginList
from .training.documents import FinetuneReport, TrainingConfig

DOCUMENTS: dict[str, type[Document]] = {
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
