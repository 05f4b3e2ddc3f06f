"""What is registered, as JSON."""

from __future__ import annotations

from ..foundation.documents import Document


class PluginRecord(Document):
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


class PluginList(Document):
    """What ``lipconvert plugins`` prints."""

    plugins: list[PluginRecord]
