"""The written constitution: records, loading, comparing, importing."""

from charter.constitution.loader import check, load
from charter.constitution.model import (
    Constitution,
    CritiqueExample,
    Phase,
    PreferenceExample,
    Principle,
)

__all__ = ["Constitution", "CritiqueExample", "Phase", "PreferenceExample", "Principle", "check", "load"]
