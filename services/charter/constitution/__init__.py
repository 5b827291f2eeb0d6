"""The written constitution: records, loading, comparing, importing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from charter.constitution.model import (
    Constitution,
    CritiqueExample,
    Phase,
    PreferenceExample,
    Principle,
)

if TYPE_CHECKING:
    from charter.constitution.loader import Report

__all__ = ["Constitution", "CritiqueExample", "Phase", "PreferenceExample", "Principle", "check", "load"]

# YAML and JSON schema are loaded with the first file: most who import the records never read one.


def load(name: str | os.PathLike[str]) -> Constitution:
    """See `charter.constitution.loader.load`."""
    from charter.constitution import loader

    return loader.load(name)


def check(name: str | os.PathLike[str]) -> Report:
    """See `charter.constitution.loader.check`."""
    from charter.constitution import loader

    return loader.check(name)
