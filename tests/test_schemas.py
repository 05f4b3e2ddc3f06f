"""schemas/*.schema.json are what `lipconvert.schema` generates, and they are schemas."""

import json
import math
from pathlib import Path

import pydantic
import pytest

from lipconvert.certification.documents import RobustnessReport
from lipconvert.conversion.documents import CheckResult, ValidationReport
from lipconvert.schema import DOCUMENTS, main, schema_text
from lipconvert.training.documents import TrainingConfig

SCHEMAS = Path(__file__).parent.parent / "schemas"
TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}
KEYWORDS = {
    "$defs", "$ref", "$schema", "additionalProperties", "anyOf", "const", "default", "description", "discriminator",
    "enum", "exclusiveMaximum",
    "exclusiveMinimum", "items", "maxItems", "maxLength", "maxProperties", "maximum", "minItems", "minimum", "oneOf",
    "pattern", "prefixItems", "properties", "required", "title", "type",
}  # fmt: skip


def _nodes(schema, root):
    """Every subschema of a schema."""
    yield schema
    for key in ("$defs", "properties"):
        for child in schema.get(key, {}).values():
            yield from _nodes(child, root)
    for key in ("anyOf", "oneOf", "prefixItems"):
        for child in schema.get(key, []):
            yield from _nodes(child, root)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from _nodes(schema[key], root)


def test_the_folder_holds_one_file_for_each_document():
    assert {p.name for p in SCHEMAS.iterdir()} == {f"{name}.schema.json" for name in DOCUMENTS}


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_file_is_what_is_generated(name):
    text = (SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8")
    assert text == schema_text(name), "run `make schemas`"


def test_main_writes_them(tmp_path):
    main(str(tmp_path))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in SCHEMAS.iterdir()}


@pytest.mark.parametrize("path", sorted(SCHEMAS.glob("*.json")), ids=lambda p: p.name.split(".")[0])
def test_file_is_a_closed_json_schema(path):
    """Draft 2020-12 keywords only, every $ref resolves, every object refuses what it does not know."""
    root = json.loads(path.read_text(encoding="utf-8"))
    assert root["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert root["type"] == "object"
    for node in _nodes(root, root):
        assert set(node) <= KEYWORDS, set(node) - KEYWORDS
        assert node.get("type", "object") in TYPES
        if "$ref" in node:
            assert node["$ref"].removeprefix("#/$defs/") in root["$defs"]
        if "properties" in node:
            assert node["additionalProperties"] is False
            assert set(node.get("required", [])) <= set(node["properties"])


REPORT = {
    "model": "",
    "data": "",
    "dtype": "float64",
    "method": "prescribed",
    "lipschitz": 1.0,
    "proved_lipschitz": 1.0,
    "empirical_lipschitz": None,
    "delta": 0.0,
    "samples": 2,
    "natural_accuracy": 0.5,
    "radii": [0.1],
    "certified_accuracy": [0.5],
    "unconverged": 0,
    "worst_error": 0.0,
    "methods": [
        {
            "method": "prescribed",
            "certified_accuracy": [0.5],
            "curve_accuracy": [0.5, 0.0],
            "lipschitz": 1.0,
            "least_pair": 1.4,
            "greatest_pair": 1.5,
            "seconds": 0.0,
        }
    ],
    "curve_radii": [0.0, 1.0],
    "sample_radii": [0.3, 0.0],
    "margins": [0.5, -0.1],
    "stages": [],
    "attack": None,
}


def test_documents_agree_with_their_schema_on_what_is_required():
    schema = json.loads((SCHEMAS / "robustness-report.schema.json").read_text(encoding="utf-8"))
    assert set(schema["properties"]) == set(REPORT)
    assert RobustnessReport.model_validate(REPORT).model_dump(mode="json") == REPORT
    for field in schema["required"]:
        with pytest.raises(pydantic.ValidationError, match=field):
            RobustnessReport.model_validate({k: v for k, v in REPORT.items() if k != field})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lipschitz", 0.0),
        ("lipschitz", math.nan),
        ("lipschitz", math.inf),
        ("samples", 0),
        ("natural_accuracy", 1.5),
        ("certified_accuracy", [-0.1]),
        ("worst_error", -1.0),
        ("method", "hope"),
        ("note", "unknown field"),
    ],
)
def test_bad_values_are_refused(field, value):
    with pytest.raises(pydantic.ValidationError, match=field):
        RobustnessReport.model_validate({**REPORT, field: value})


def test_documents_are_frozen_and_defaults_are_legal():
    config = TrainingConfig()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.epochs = 2
    assert TrainingConfig.model_validate_json(config.model_dump_json()) == config


def test_write_is_whole_or_nothing(tmp_path):
    report = RobustnessReport.model_validate(REPORT)
    target = tmp_path / "deeper" / "report.json"
    report.write(target)
    assert json.loads(target.read_text(encoding="utf-8")) == REPORT
    assert [p.name for p in target.parent.iterdir()] == ["report.json"]


def test_worst_value_of_a_check():
    def check(value, relation):
        return CheckResult(name="n", where="w", value=value, bound=1.0, relation=relation, passed=True)

    def report(*checks):
        return ValidationReport(
            model="M", dtype="float64", samples=1, lipschitz=1.0, methods=[], checks=list(checks), passed=True
        )

    assert report(check(1.0, "<="), check(3.0, "<="), check(2.0, "<=")).value("n") == 3.0
    assert report(check(1.0, ">="), check(-3.0, ">=")).value("n") == -3.0
    with pytest.raises(KeyError):
        report().value("n")
