"""What every document is made of: pydantic models that are frozen, strict about names, and written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from .files import whole

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


# Of what comes in a file: the first entry that is wrong is told, not a million of them.
Size = Annotated[int, Field(ge=0, lt=2**63)]


Shape = Annotated[list[Size], FailFast(), Field(max_length=8)]


Image = Annotated[list[int], FailFast(), Field(max_length=8)]


def json_text(document: Any, indent: int | None = None) -> str:
    """JSON in ASCII: whatever names are in it, it may be shown on any terminal, and be written to any stream."""
    return json.dumps(document, indent=indent, ensure_ascii=True, allow_nan=False)


class Document(BaseModel):
    """A frozen document: no field is unknown, no number infinite or NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def write(self, path: str | Path) -> None:
        """Write as indented JSON, whole or not at all."""
        with whole(path) as partial:
            partial.write_text(json_text(self.model_dump(mode="json"), indent=2) + "\n", encoding="ascii")


class Options(Document):
    """Options as people write them: true and false are no numbers, though Python has them as 1 and 0."""

    @model_validator(mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields and cls.model_fields[name].annotation is not bool:
                raise ValueError(f"{name} must be a number or words, not {str(value).lower()}")
        return given
