"""Tests on a real broker run under `make test-kafka` only."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("CHARTER_TEST_KAFKA") != "1":
        for item in items:
            if "kafka" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a real broker: make test-kafka"))
